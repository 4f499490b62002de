"""What sbatch is given; no Slurm is needed: the programs here stand for it."""

import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.sweep import submit as submission
from experiments.sweep.cells import ArmConfig, StudyConfig, SweepConfig, cells, record_done
from experiments.sweep.status import status
from experiments.sweep.submit import job_name, read_jobs, submit_run, submit_sweep
from slurm.launcher import LauncherConfig
from slurm.queue import cancel, ended, queue
from tests import forked

SBATCH = """#!/bin/sh
number=$(($(ls "$SCRIPTS" | wc -l) + 7))
cp "$1" "$SCRIPTS/$number.sh"
echo "Submitted batch job $number"
"""
# All that was submitted waits.
SQUEUE = r"""#!/bin/sh
for argument; do case "$argument" in --name=*) name=${argument#--name=};; esac; done
for script in "$SCRIPTS"/*.sh; do
    grep -qx "#SBATCH --job-name=$name" "$script" 2> /dev/null || continue
    job=$(basename "$script" .sh)
    last=$(sed -n 's/^#SBATCH --array=0-\([0-9]*\)%.*/\1/p' "$script")
    if [ -z "$last" ]; then echo "$job|PENDING|Resources"; continue; fi
    for task in $(seq 0 "$last"); do echo "${job}_$task|PENDING|Resources"; done
done
"""
SCONTROL = "#!/bin/sh\necho 'MaxArraySize            = 3'\n"


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """Folder where batch scripts end up, by the number of their job."""
    programs, folder = tmp_path / "programs", tmp_path / "scripts"
    for path in (programs, folder):
        path.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", "#!/bin/sh\n"), ("squeue", SQUEUE)):
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


def test_every_value_of_the_launcher_reaches_the_batch_script(
    scripts, make_config, tiny_overrides, tmp_path, monkeypatch
):
    launcher = LauncherConfig(
        partition="big",
        account="us",
        qos="high",
        nodes=2,
        gpus_per_node=4,
        cpus_per_task=6,
        mem_gb=100.3,
        hours=1.505,
        signal_s=200,
        setup=["module load cuda/13", "export NCCL_DEBUG=INFO"],
        python="apptainer exec --nv image.sif python",
        srun_args=["--container-image=image.sqsh"],
        sbatch_args={"constraint": "h100"},
    )
    config = make_config("run", "rows_per_batch=8")
    config.launcher, config.run_dir = replace(launcher, evaluate=["tasks=[loss]"]), "run"
    given, submit = [], submission.submit
    monkeypatch.setattr(submission, "submit", lambda *args, **options: given.append(args) or submit(*args, **options))
    monkeypatch.chdir(tmp_path)
    own = [o for o in tiny_overrides("run", "rows_per_batch=8")[0] if not o.startswith("run_dir=")]
    others = ["launcher=slurm", "launcher.hours=1", "+launcher.x=1", "~launcher.qos", "run_dir=run", "overwrite=false"]
    assert submit_run(config, [*others[:3], *own, *others[3:]]) == "7"
    ((work, ((cell, log_dir),), asked),) = given
    place = tmp_path / "run"
    assert (work, log_dir, asked) == (submission.run_in_job, place / "slurm", config.launcher)
    assert (cell.name, cell.run_dir, cell.base) == ("run", place, None)
    assert cell.commands == [["train.py", *own, f"run_dir={place}"], ["evaluate.py", f"run={place}", "tasks=[loss]"]]
    script = (scripts / "7.sh").read_text()
    asked = {
        **{
            "partition": "big",
            "account": "us",
            "qos": "high",
            "constraint": "h100",
            "job-name": job_name(place),
        },
        **{"nodes": "2", "ntasks-per-node": "4", "gpus-per-node": "4", "cpus-per-task": "6"},
        **{"mem": "102708M", "time": "91", "signal": "USR2@200", "requeue": "", "open-mode": "append"},
    }
    assert {key: flags(script).get(key) for key in asked} == asked

    module, nccl, _, _, _, path, safe, _, srun, *after = commands(script)
    assert (module, nccl, safe) == ("module load cuda/13", "export NCCL_DEBUG=INFO", "export PYTHONSAFEPATH=1")
    assert re.fullmatch(r"export PYTHONPATH=\S+/run/slurm/code-[0-9a-f]{32}", path)
    assert srun.startswith("srun --unbuffered ")
    assert (
        "--kill-on-bad-exit=1 --container-image=image.sqsh apptainer exec --nv image.sif python -u -m submitit" in srun
    )
    assert any("scontrol requeue" in line for line in after)


@pytest.mark.parametrize(
    ("values", "ranks", "minutes"),
    [
        ({"nodes": 2, "gpus_per_node": 0}, 2, 24 * 60),
        ({"nodes": 2, "gpus_per_node": 4, "hours": 0.505}, 8, 31),
        ({}, 1, 24 * 60),
        ({"hours": 0.05, "signal_s": 119}, 1, 3),
        ({"hours": 0.05, "signal_s": 120}, 1, None),  # Slurm may send the signal a minute early
    ],
)
def test_ranks_and_minutes_of_a_job(values, ranks, minutes):
    launcher = LauncherConfig(**values)
    assert launcher.ranks == ranks
    if minutes is None:
        with pytest.raises(ValueError, match=r"launcher\.signal_s=120 seconds before, or a minute earlier"):
            launcher.check()
    else:
        launcher.check()
        assert launcher.minutes == minutes


def test_what_is_not_said_is_not_asked_for(scripts, make_config, tiny_overrides):
    config = make_config("run")
    config.launcher = LauncherConfig(gpus_per_node=0)
    submit_run(config, tiny_overrides("run")[0])
    script = (scripts / "7.sh").read_text()
    assert flags(script).keys().isdisjoint({"gpus-per-node", "mem", "partition", "account", "qos", "constraint"})
    assert flags(script)["ntasks-per-node"] == "1"
    asked = {"time": "1440", "nodes": "1", "cpus-per-task": "8", "signal": "USR2@120"}
    assert {key: flags(script)[key] for key in asked} == asked
    assert (LauncherConfig().jobs, LauncherConfig().gpus_per_node) == (256, 1)
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


def test_a_job_begins_with_the_code_and_the_call_that_were_submitted(scripts, make_config, tiny_overrides, tmp_path):
    config = make_config("run")
    config.launcher = LauncherConfig(gpus_per_node=0)
    umask = os.umask(0)  # which leaves what is written to everyone
    try:
        submit_run(config, tiny_overrides("run")[0])
    finally:
        os.umask(umask)
    (folder,) = (tmp_path / "run").glob("slurm")
    (code,) = folder.glob("code-*")
    (tmp_path / "programs" / "srun").write_text(f'#!/bin/sh\necho "$PYTHONDONTWRITEBYTECODE" > {tmp_path}/began\n')

    def begin():
        """(exit code, whether anything ran, what it said) of a start of the job, which a requeue repeats."""
        (tmp_path / "began").unlink(missing_ok=True)
        environment = {"PATH": f"{tmp_path}/programs:/usr/bin:/bin", "SLURM_JOB_ID": "7"}
        done = subprocess.run(["bash", scripts / "7.sh"], env=environment, capture_output=True, text=True)
        return done.returncode, (tmp_path / "began").exists(), done.stderr

    assert begin() == (0, True, "")
    assert (tmp_path / "began").read_text() == "1\n", "what it compiles is not kept there"
    refusal = f"error: {code} holds other code than its name says: move it away and submit again\n"
    source, kept = code / "slurm" / "job.py", (code / "slurm" / "job.py").read_bytes()
    compiled = code / "slurm" / "__pycache__" / "job.cpython-311.pyc"
    for change, undo in (
        (lambda: source.write_bytes(kept + b"\n"), lambda: source.write_bytes(kept)),
        (lambda: source.unlink(), lambda: source.write_bytes(kept)),
        (lambda: (compiled.parent.mkdir(), compiled.touch()), lambda: shutil.rmtree(compiled.parent)),
        (lambda: (code / "torch").symlink_to(tmp_path), lambda: (code / "torch").unlink()),  # a package of its own
        (lambda: (code / "torch.py").symlink_to("/dev/null"), lambda: (code / "torch.py").unlink()),
        (lambda: code.rename(tmp_path / "moved"), lambda: (tmp_path / "moved").rename(code)),
    ):
        change()
        returncode, began, said = begin()
        assert (returncode, began, said.splitlines(keepends=True)[-1]) == (1, False, refusal)
        undo()
    assert begin() == (0, True, "")

    pickled = folder / "7_submitted.pkl"
    assert pickled.stat().st_mode & 0o022 == 0
    if os.geteuid() == 0:
        os.chown(pickled, 12345, -1)
        refusal = f"error: {pickled} was written by another user: remove it and submit again\n"
        assert begin() == (1, False, refusal)


@pytest.fixture
def sweep(tiny_overrides, tmp_path):
    """Of two arms that continue from a base, and two seeds."""
    common = [o for o in tiny_overrides("x")[0] if not o.startswith(("name=", "run_dir="))]
    common += ["device=cuda", "deepspeed.precision=fp16"]  # of the machines that jobs run on
    arms = {"dense": ArmConfig(train=["attention=full"])}
    arms["dash"] = ArmConfig(train=["attention=dash", "attention.chunk_size=8"])
    study = StudyConfig(train=common, base=["attention=full"], evaluate=["tasks=[loss]"], arms=arms)
    launcher = LauncherConfig(gpus_per_node=0, jobs=1)
    return SweepConfig(name="s", output_dir=str(tmp_path / "s"), seeds=[0, 1], studies={"t": study}, launcher=launcher)


@pytest.fixture
def _unchecked(monkeypatch):
    """For tests of what becomes of cells that can work: to compose each costs more than to submit all."""
    monkeypatch.setattr(submission, "check_cells", lambda found, ranks, elsewhere: [])


def test_arms_wait_for_their_base(scripts, sweep, tmp_path, monkeypatch):
    given, submit = [], submission.submit
    monkeypatch.setattr(submission, "submit", lambda *args, **options: given.append(args) or submit(*args, **options))
    monkeypatch.chdir(tmp_path)
    submit_sweep(replace(sweep, output_dir="s"))
    tasks = [task for args in given for task in args[1]]
    assert [len(args[1]) for args in given] == [2, 2, 2]
    assert {cell.name: cell for cell, _ in tasks} == {cell.name: cell for cell in cells(sweep)}  # by whole paths
    assert {log_dir for _, log_dir in tasks} == {tmp_path / "s" / "logs"}
    submitted = {path.stem: flags(path.read_text()) for path in scripts.iterdir()}
    assert {job: asked["array"] for job, asked in submitted.items()} == {"7": "0-1%1", "8": "0-1%1", "9": "0-1%1"}
    needs = [submitted[job].get("dependency") for job in "789"]
    assert needs == [None, "afterok:7_0,afterany:7", "afterok:7_1,afterany:8"]  # one at a time, ``launcher.jobs``
    assert [submitted[job].get("kill-on-invalid-dep") for job in "789"] == [None, "yes", "yes"]


@pytest.mark.usefixtures("_unchecked")
def test_what_is_queued_is_not_submitted_again(scripts, sweep, make_config, tiny_overrides, tmp_path):
    assert "6 cells submitted, 0 were queued, 0 done" in submit_sweep(sweep)
    base = cells(sweep)[0]
    base.run_dir.mkdir()
    record_done(base.run_dir, base.commands)
    status_ = f"how they stand: python -m experiments.sweep.status {tmp_path / 's'}"
    assert submit_sweep(sweep) == f"s: 0 cells submitted, 6 were queued, 1 done; {status_}"
    (tmp_path / "link").symlink_to(tmp_path / "s")
    assert "0 cells submitted, 6 were queued" in submit_sweep(replace(sweep, output_dir=str(tmp_path / "link")))
    config = make_config("run")
    config.launcher = sweep.launcher
    assert submit_run(config, tiny_overrides("run")[0]) == "10"
    (tmp_path / "run-link").symlink_to(tmp_path / "run")
    for path in ("run", "run-link"):
        with pytest.raises(ValueError, match=rf"{path} waits or runs as job 10: .*`scancel` it first"):
            submit_run(replace(config, run_dir=str(tmp_path / path)), tiny_overrides("run")[0])
    assert len(list(scripts.iterdir())) == 4


def test_two_submissions_at_once_make_one_job_of_each_cell(scripts, tmp_path):
    command = [sys.executable, "-m", "experiments.sweep", "sweep=smoke", f"output_dir={tmp_path / 'smoke'}"]
    command += ["launcher=slurm", "launcher.gpus_per_node=0"]
    running = [forked.Process(command, stdout=(tmp_path / f"said{i}").open("w")) for i in range(2)]
    assert [process.wait(300) for process in running] == [0, 0]
    said = [(tmp_path / f"said{i}").read_text() for i in range(2)]
    assert sorted(re.search(r"(\d) cells submitted, (\d) were queued", text).groups() for text in said) == [
        ("0", "5"),
        ("5", "0"),
    ]
    assert len(list(scripts.iterdir())) == 2  # the base, and what waits for it
    assert len(read_jobs(tmp_path / "smoke")) == 5


@pytest.mark.usefixtures("_unchecked")
def test_a_submission_killed_before_it_recorded_its_jobs_makes_none_twice(scripts, sweep, tmp_path, monkeypatch):
    write = submission.write_atomically

    def killed(path, text):
        if path.name == "jobs.json":
            raise KeyboardInterrupt
        write(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(submission, "write_atomically", killed)
        with pytest.raises(KeyboardInterrupt):
            submit_sweep(sweep)
    assert read_jobs(tmp_path / "s") == {}
    assert "4 cells submitted, 2 were queued" in submit_sweep(sweep)
    assert read_jobs(tmp_path / "s")["t-base-seed1"] == "7_1"
    assert len(list(scripts.iterdir())) == 3
    # One cell alone is no array.
    alone = replace(sweep, output_dir=str(tmp_path / "alone"), seeds=[0])
    with monkeypatch.context() as patch:
        patch.setattr(submission, "write_atomically", killed)
        with pytest.raises(KeyboardInterrupt):
            submit_sweep(alone)
    assert "2 cells submitted, 1 were queued" in submit_sweep(alone)
    assert read_jobs(tmp_path / "alone")["t-base-seed0"] == "10"


@pytest.mark.usefixtures("_unchecked")
def test_jobs_of_a_submission_that_was_killed_before_they_had_their_calls_are_cancelled(scripts, sweep, tmp_path):
    submit_sweep(sweep)
    folder = tmp_path / "s" / "slurm"
    names = ["t-base-seed0", "t-base-seed1"]
    jobs = read_jobs(tmp_path / "s")
    (folder / "jobs.json").write_text(json.dumps({name: job for name, job in jobs.items() if name not in names}))
    (folder / "submitting.json").write_text(json.dumps({"cells": names}))
    (folder / "7_1_submitted.pkl").unlink()
    (tmp_path / "programs" / "scancel").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/cancelled\n')
    (tmp_path / "programs" / "scancel").chmod(stat.S_IRWXU)
    assert "1 cells submitted, 5 were queued" in submit_sweep(sweep)
    assert (tmp_path / "cancelled").read_text() == "7_1\n"
    assert read_jobs(tmp_path / "s") == jobs | {"t-base-seed1": "10"}
    assert not (folder / "submitting.json").exists()


@pytest.mark.usefixtures("_unchecked")
def test_arrays_are_as_long_as_the_cluster_takes_them(scripts, sweep, tmp_path):
    (tmp_path / "programs" / "scontrol").write_text(SCONTROL)
    (tmp_path / "programs" / "scontrol").chmod(stat.S_IRWXU)
    sweep.studies["t"].base = None
    sweep.seeds = [0, 1, 2, 3]
    submit_sweep(sweep)
    submitted = [flags((scripts / f"{job}.sh").read_text()) for job in (7, 8, 9)]
    assert [asked.get("array") for asked in submitted] == ["0-2%1", "0-2%1", "0-1%1"]
    assert [asked.get("dependency") for asked in submitted] == [None, "afterany:7", "afterany:8"]
    assert sorted(read_jobs(tmp_path / "s").values()) == ["7_0", "7_1", "7_2", "8_0", "8_1", "8_2", "9_0", "9_1"]


@pytest.mark.usefixtures("_unchecked")
def test_no_more_cells_than_asked_for_run_at_a_time(scripts, sweep, tmp_path, monkeypatch):
    """Over arrays that continue from different bases, and over those that a killed submission has left."""
    sweep.seeds, sweep.launcher.jobs = [0, 1, 2, 3], 4

    def needs():
        submit_sweep(sweep)
        asked = {path.stem: flags(path.read_text())["dependency"] for path in scripts.iterdir() if path.stem != "7"}
        return {job: re.sub(r"afterok:7_\d,?", "", asked[job]) for job in sorted(asked, key=int)}

    send = submission.submit
    with monkeypatch.context() as patch:
        patch.setattr(submission, "submit", lambda *a, **k: send(*a, **k) if len(k["behind"]) < 2 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            needs()
    # Four bases; two arms of two of them at a time.
    assert needs() == {
        **{"8": "afterany:7", "9": "afterany:7"},
        **{"10": "afterany:7,afterany:8,afterany:9", "11": "afterany:7,afterany:8,afterany:9"},
    }


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({"train": ["attention=dash", "attention.chunk_size=0"]}, "cell t-dash-seed0 cannot work: .*chunk_size"),
        ({"train": ["attention=dsah"]}, "cell t-dash-seed0 cannot work: .*dsah"),
        ({"train": ["attention=dash", "optim.lr=fast"]}, "cell t-dash-seed0 cannot work: .*fast"),
        ({"train": ["attention=dash", "rows_per_batch=3"]}, "rows_per_batch=3 does not divide"),
        ({"train": ["attention=full"], "evaluate": ["tasks=[lsos]"]}, "cell t-dash-seed0 cannot work: tasks="),
        ({"train": ["attention=full"], "knobs": [1.0]}, "cell t-dash-seed0 cannot work: .*knob"),
        (
            {
                "train": ["attention=dash", "attention.chunk_size=8"],
                "knobs": [1.0],
                "evaluate_turned": ["tasks=[lsos]"],
            },
            "cell t-dash-seed0 cannot work: tasks=",
        ),
    ],
)
def test_a_cell_that_cannot_work_is_refused_before_anything_is_submitted(scripts, sweep, arm, message):
    sweep.launcher = replace(sweep.launcher, gpus_per_node=2)
    sweep.studies["t"].evaluate_turned = arm.pop("evaluate_turned", None)
    sweep.studies["t"].arms["dash"] = ArmConfig(**arm)
    with pytest.raises(ValueError, match=message):
        submit_sweep(sweep)
    assert list(scripts.iterdir()) == []


@pytest.mark.parametrize(
    ("wrong", "said"), [("tasks=[lsos]", "lsos"), ("knobs=[1]", "no sparsity knob"), ("no_such_key=1", "no_such_key")]
)
def test_an_evaluation_that_cannot_work_is_refused_before_its_run_is_submitted(
    scripts, make_config, tiny_overrides, wrong, said
):
    config = make_config("run")
    config.launcher = LauncherConfig(gpus_per_node=0, evaluate=[wrong])
    with pytest.raises(ValueError, match=rf"launcher\.evaluate cannot work: .*{said}"):
        submit_run(config, tiny_overrides("run")[0])
    config.launcher = LauncherConfig(gpus_per_node=3)
    with pytest.raises(ValueError, match="rows_per_batch=4 does not divide among 3 ranks"):
        submit_run(config, tiny_overrides("run")[0])
    assert list(scripts.iterdir()) == []


def test_a_job_that_slurm_will_not_take_is_one_line_and_leaves_nothing(scripts, make_config, tiny_overrides, tmp_path):
    (tmp_path / "programs" / "sbatch").write_text(
        "#!/bin/sh\nprintf 'sbatch: error: no\\nsbatch: error: none\\n' >&2\nexit 1\n"
    )
    config = make_config("run")
    config.launcher = LauncherConfig(gpus_per_node=0)
    folder = tmp_path / "run" / "slurm"
    folder.mkdir(parents=True)
    for name in ("7_submitted.pkl", "0c.pkl", "0d.pkl"):  # a job's, and two of what became none
        (folder / name).touch()
    message = r"the job \(.*sbatch: error: no sbatch: error: none\b.*\): see the launcher's values"
    with pytest.raises(ValueError, match=message) as error:
        submit_run(config, tiny_overrides("run")[0])
    assert "\n" not in str(error.value)
    assert [path.name for path in folder.glob("*.pkl")] == ["7_submitted.pkl"]


def test_cells_that_take_the_model_of_a_base_are_submitted_with_it(scripts, sweep):
    sweep.studies["t"].arms["dash"].train += ["model=checkpoint"]
    sweep.studies["t"].arms["dense"].train = ["attention=checkpoint"]
    submit_sweep(sweep)
    assert len(list(scripts.iterdir())) == 3


def test_a_time_limit_below_the_signals_lead_is_refused(scripts, sweep, make_config, tiny_overrides):
    sweep.launcher = replace(sweep.launcher, hours=0.05, signal_s=120)
    with pytest.raises(ValueError, match=r"launcher.hours=0.05 is a time limit of 3 minutes.*again for ever"):
        submit_sweep(sweep)
    config = make_config("run")
    config.launcher = sweep.launcher
    with pytest.raises(ValueError, match=r"raise launcher\.hours or lower launcher\.signal_s"):
        submit_run(config, tiny_overrides("run")[0])
    assert list(scripts.iterdir()) == []


@pytest.mark.usefixtures("_unchecked")
def test_directories_may_have_almost_any_name(scripts, sweep, tmp_path):
    odd = tmp_path / "o= ,()[]{}'\"&#!~;^<>`*?|$äß漢字"
    sweep.output_dir = str(odd)
    assert shlex.split(submit_sweep(sweep))[-1] == str(odd)
    script = (scripts / "7.sh").read_text()
    shown = subprocess.run(["bash", "-c", script.split("# command")[0] + 'echo "$PYTHONPATH"'], capture_output=True)
    assert shown.stdout.decode().startswith(f"{odd}/slurm/code-")
    assert re.fullmatch(r"[\w.-]+", flags(script)["job-name"], re.ASCII)
    assert (cells(sweep)[0].run_dir.name, read_jobs(odd)["t-base-seed0"]) == ("t-base-seed0", "7_0")
    sweep.output_dir = str(tmp_path / "a%j:b")
    with pytest.raises(ValueError, match=r"cannot write to .* '%' ':': take another"):
        submit_sweep(sweep)
    for wrong in "%\\:":
        sweep.output_dir = str(tmp_path / f"a{wrong}b")
        with pytest.raises(ValueError, match="cannot write to"):
            submit_sweep(sweep)


@pytest.mark.usefixtures("_unchecked")
def test_a_damaged_record_of_jobs_is_named_with_the_mend(scripts, sweep, tmp_path):
    submit_sweep(sweep)
    for content in ("{", '{"one": []}', '{"one": 3}'):
        (tmp_path / "s" / "slurm" / "jobs.json").write_text(content)
        for look in (submit_sweep, lambda config: status(Path(config.output_dir))):
            with pytest.raises(ValueError, match=r"jobs\.json is damaged .*`scancel --name=s-[0-9a-f]{8}`.*again"):
                look(sweep)


SACCT = """7_0|TIMEOUT|0:0
7_1|PREEMPTED|0:0
8_0|CANCELLED by 1000|0:0
8_1|FAILED|0:9
9_0|FAILED|137:0
9_1|OUT_OF_MEMORY|0:125
10|NODE_FAIL|0:0
11|FAILED|1:0
12|COMPLETED|0:0
13|BOOT_FAIL|0:0
14|FAILED|128:0
15|COMPLETED|0:9
"""


def test_a_slurm_that_does_not_answer_is_told_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "squeue").write_text(
        "#!/bin/sh\nprintf 'slurm_load_jobs error:\\n  Unable to contact\\n' >&2\nexit 1\n"
    )
    (tmp_path / "squeue").chmod(stat.S_IRWXU)
    said = r"^Slurm does not answer \(slurm_load_jobs error: Unable to contact\): try again$"
    with pytest.raises(ValueError, match=said):
        queue("a-job")
    with pytest.raises(ValueError, match=r"^Slurm does not answer \(.*No such file .*scancel'?\): try again$"):
        cancel(["7"])
    cancel([])


def test_how_jobs_ended_is_said_in_words(tmp_path, monkeypatch):
    (tmp_path / "sacct").write_text(f"#!/bin/sh\ncat <<'END'\n{SACCT}END\n")
    (tmp_path / "sacct").chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    jobs = [line.split("|")[0] for line in SACCT.splitlines()]
    said = ["timed out", "preempted", "cancelled", "killed by signal 9", "killed by signal 9", "out of memory"]
    assert list(ended(tmp_path, jobs).values()) == [
        *(*said, "node failed", "failed", "completed", "node failed", "failed", "completed")
    ]


LOGS = {
    "7_0": "slurmstepd-n1: error: *** JOB 7 ON n1 CANCELLED AT 2026-11-29T21:53:08 DUE TO TIME LIMIT ***",
    "7_1": "slurmstepd-n1: error: *** JOB 8 ON n1 CANCELLED AT 2026-11-29T21:53:08 DUE TO PREEMPTION ***",
    "8": "slurmstepd-n1: error: *** STEP 8.0 ON n1 CANCELLED AT 2026-11-29T21:53:08 ***",
    "9": "srun: error: n1: task 0: Killed\nsrun: Force Terminated StepId=3.0",
    "10": "Traceback ...",
    "14": "slurmstepd-n1: error: *** JOB 4 ON n1 CANCELLED AT 2026-11-29T21:53:08 DUE TO NODE FAILURE ***",
    "12": "slurmstepd-n1: error: *** JOB 4 ON n1 CANCELLED AT 2026-11-29T21:53:08 ***\nsrun: error: n1: task 0: Killed",
    "13": "slurmstepd-n1: error: *** JOB 4 ON n1 CANCELLED AT 2026-11-29T21:53:08 DUE TO JOB REQUEUE ***\n"
    "srun: error: n1: task 0: Killed",
}


def test_without_accounting_the_jobs_own_logs_tell_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}")
    for job, text in LOGS.items():
        (tmp_path / f"{job}_0_log.err").write_text(f"submitit INFO\n{text}\n")
    assert ended(tmp_path, [*LOGS, "11"]) == {
        **{"7_0": "timed out", "7_1": "preempted", "8": "cancelled", "9": "killed by signal 9"},
        **{"12": "cancelled", "13": "killed by signal 9", "14": "node failed"},
    }


REMEMBERED = """JobId=9 ArrayJobId=7 ArrayTaskId=1 JobName=x JobState=TIMEOUT Reason=TimeLimit ExitCode=0:15
JobId=10 JobName=x JobState=FAILED Reason=NonZeroExitCode Requeue=1 ExitCode=0:9
JobId=11 ArrayJobId=11 ArrayTaskId=0 JobName=x JobState=COMPLETED Reason=None ExitCode=0:0
"""


def test_without_accounting_slurm_itself_remembers_for_a_while(tmp_path, monkeypatch):
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\ncat <<'END'\n{REMEMBERED}END\n")
    (tmp_path / "scontrol").chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    said = {"7_1": "timed out", "10": "killed by signal 9", "11_0": "completed"}
    assert ended(tmp_path, ["7_0", "7_1", "9", "10", "11_0"]) == said


@pytest.mark.usefixtures("_unchecked")
def test_the_status_tells_why_a_cell_waits_or_ended(scripts, sweep, tmp_path):
    submit_sweep(sweep)
    squeue, sacct = tmp_path / "programs" / "squeue", tmp_path / "programs" / "sacct"
    squeue.write_text("#!/bin/sh\necho '7_0|PENDING|Priority'\necho '8_0|PENDING|Dependency'\n")
    sacct.write_text("#!/bin/sh\necho '7_1|TIMEOUT|0:0'\necho '8_1|PREEMPTED|0:0'\necho '9_0|CANCELLED by 0|0:0'\n")
    sacct.chmod(stat.S_IRWXU)
    (tmp_path / "s" / "logs").mkdir()
    (tmp_path / "s" / "logs" / "t-dash-seed0.log").write_text("$ train.py\nstopped by SIGTERM and saved at step 3\n")
    refused = "error: code-1 holds other code than its name says"
    (tmp_path / "s" / "slurm" / "9_1_0_log.err").write_bytes(
        f"srun: error: of an earlier life\n\xff\n{refused}\n".encode("latin-1")
    )
    rows = {name.removeprefix("t-"): (state, why) for name, state, _, why in status(tmp_path / "s")}
    assert rows == {
        "base-seed0": ("pending", "Priority"),
        "dense-seed0": ("pending", "waits for t-base-seed0 (pending)"),
        "dash-seed0": ("preempted", "stopped by SIGTERM and saved at step 3"),
        "base-seed1": ("timed out", ""),
        "dense-seed1": ("cancelled", "continues from t-base-seed1 (timed out)"),
        "dash-seed1": ("failed", refused),
    }
    squeue.write_text("#!/bin/sh\nprintf '%s\\n' '7_0|RUNNING|None' '8_0|REQUEUED|None' '7_1|PENDING|None'\n")
    rows = {name.removeprefix("t-"): (state, why) for name, state, _, why in status(tmp_path / "s")}
    assert rows["base-seed0"] == ("running", "")
    assert rows["dense-seed0"] == ("pending", "waits for t-base-seed0 (running)")
    assert rows["base-seed1"] == ("pending", "")
    cell = cells(sweep)[0]
    cell.run_dir.mkdir()
    record_done(cell.run_dir, cell.commands)  # of what is done nothing is asked
    asked = tmp_path / "asked"
    squeue.write_text("#!/bin/sh\n")
    sacct.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    assert status(tmp_path / "s")[0][1] == "done"
    jobs = ",".join(sorted(job for job in read_jobs(tmp_path / "s").values() if job != "7_0"))
    options = "--noheader --parsable2 --allocations --format=JobID,State,ExitCode"
    assert asked.read_text() == f"--array --jobs={jobs} {options}\n"
    said = "RuntimeError: it never began\nsrun: error: n1: task 0: Exited with exit code 1\n"
    said += "srun: launch/slurm: _step_signal: Terminating StepId=9.1\n"
    (tmp_path / "s" / "slurm" / "9_1_0_log.err").write_text(said)
    assert status(tmp_path / "s")[-1][1::2] == ("failed", "RuntimeError: it never began")
