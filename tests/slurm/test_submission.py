"""What sbatch is given; no Slurm is needed: the programs here stand for it."""

import re
import stat
import subprocess
import sys

import pytest

from experiments.sweep.cells import ArmConfig, StudyConfig, SweepConfig
from experiments.sweep.submit import submit_run, submit_sweep
from slurm.launcher import LauncherConfig

SBATCH = """#!/bin/sh
number=$(($(ls "$SCRIPTS" | wc -l) + 7))
cp "$1" "$SCRIPTS/$number.sh"
echo "Submitted batch job $number"
"""


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """Folder where batch scripts end up, by the number of their job."""
    programs, folder = tmp_path / "programs", tmp_path / "scripts"
    for path in (programs, folder):
        path.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", "#!/bin/sh\n"), ("squeue", "#!/bin/sh\n")):
        (programs / name).write_text(text)
        (programs / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setenv("SCRIPTS", str(folder))
    return folder


def flags(script):
    """Of the #SBATCH lines."""
    return dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", script, re.MULTILINE))


def commands(script):
    """Lines that the shell runs, in their order."""
    return [line for line in script.splitlines() if line and not line.startswith("#")]


def test_every_value_of_the_launcher_reaches_the_batch_script(scripts, make_config, tiny_overrides):
    launcher = LauncherConfig(
        partition="big",
        account="us",
        qos="high",
        nodes=2,
        gpus_per_node=4,
        cpus_per_task=6,
        mem_gb=100.5,
        hours=1.5,
        signal_s=200,
        setup=["module load cuda/13", "export NCCL_DEBUG=INFO"],
        python="apptainer exec --nv image.sif python",
        srun_args=["--container-image=image.sqsh"],
        sbatch_args={"constraint": "h100"},
    )
    config = make_config("run", "rows_per_batch=8")
    config.launcher = launcher
    assert submit_run(config, tiny_overrides("run", "rows_per_batch=8")[0]) == "7"
    script = (scripts / "7.sh").read_text()
    asked = {
        **{"partition": "big", "account": "us", "qos": "high", "constraint": "h100", "job-name": "run"},
        **{"nodes": "2", "ntasks-per-node": "4", "gpus-per-node": "4", "cpus-per-task": "6"},
        **{"mem": "102912M", "time": "90", "signal": "USR2@200", "requeue": "", "open-mode": "append"},
    }
    assert {key: flags(script).get(key) for key in asked} == asked

    module, nccl, path, safe, _, srun, *after = commands(script)
    assert (module, nccl, safe) == ("module load cuda/13", "export NCCL_DEBUG=INFO", "export PYTHONSAFEPATH=1")
    assert re.fullmatch(r"export PYTHONPATH=\S+/run/slurm/code-[0-9a-f]{12}", path)
    assert srun.startswith("srun --unbuffered ")
    assert (
        "--kill-on-bad-exit=1 --container-image=image.sqsh apptainer exec --nv image.sif python -u -m submitit" in srun
    )
    assert any("scontrol requeue" in line for line in after)


def test_what_is_not_said_is_not_asked_for(scripts, make_config, tiny_overrides):
    config = make_config("run")
    config.launcher = LauncherConfig(gpus_per_node=0)
    submit_run(config, tiny_overrides("run")[0])
    script = (scripts / "7.sh").read_text()
    assert flags(script).keys().isdisjoint({"gpus-per-node", "mem", "partition", "account", "qos", "constraint"})
    assert flags(script)["ntasks-per-node"] == "1"
    assert f" {sys.executable} -u -m submitit" in script


ARRAY = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0"}  # whose id is that of one of its tasks, too


@pytest.mark.parametrize(
    ("code", "array", "requeued"),
    [(75, {}, "requeue 7\n"), (75, ARRAY, "requeue 7_0\n"), (0, {}, ""), (1, ARRAY, ""), (143, {}, "")],
)
def test_only_the_exit_code_that_asks_for_it_queues_the_task_again(
    scripts, make_config, tiny_overrides, tmp_path, code, array, requeued
):
    config = make_config("run")
    config.launcher = LauncherConfig(gpus_per_node=0)
    submit_run(config, tiny_overrides("run")[0])
    (tmp_path / "said").touch()
    (tmp_path / "programs" / "srun").write_text(f"#!/bin/sh\nexit {code}\n")
    (tmp_path / "programs" / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/said\n')
    (tmp_path / "programs" / "scontrol").chmod(stat.S_IRWXU)
    environment = {"PATH": f"{tmp_path}/programs:/bin", "SLURM_JOB_ID": "7", **array}
    assert subprocess.run(["bash", scripts / "7.sh"], env=environment).returncode == code
    assert (tmp_path / "said").read_text() == requeued


def test_arms_wait_for_their_base(scripts, tiny_overrides, tmp_path):
    common = [o for o in tiny_overrides("x")[0] if not o.startswith(("name=", "run_dir="))]
    arms = {"dense": ArmConfig(train=["attention=full"]), "dash": ArmConfig(train=["attention=dash"])}
    study = StudyConfig(train=common, base=["attention=full"], evaluate=["tasks=[loss]"], arms=arms)
    launcher = LauncherConfig(gpus_per_node=0, jobs=1)
    config = SweepConfig(
        name="s", output_dir=str(tmp_path / "s"), seeds=[0, 1], studies={"t": study}, launcher=launcher
    )
    submit_sweep(config)
    submitted = {path.stem: flags(path.read_text()) for path in scripts.iterdir()}
    assert {job: asked["array"] for job, asked in submitted.items()} == {"7": "0-1%1", "8": "0-1%1", "9": "0-1%1"}
    assert [submitted[job].get("dependency") for job in "789"] == [None, "afterok:7_0", "afterok:7_1"]
    assert [submitted[job].get("kill-on-invalid-dep") for job in "789"] == [None, "yes", "yes"]
