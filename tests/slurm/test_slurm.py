"""Submitting to a real Slurm, which tests/slurm/start.sh starts on this machine."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.files import METRICS, read_rows
from experiments.sweep.cells import ArmConfig, StudyConfig, SweepConfig
from experiments.sweep.status import status
from experiments.sweep.submit import job_name, read_jobs, submit_run, submit_sweep
from slurm.launcher import LauncherConfig
from slurm.queue import ended, queue
from train import train

ROOT = Path(__file__).parents[2]
HERE = LauncherConfig(gpus_per_node=0, cpus_per_task=1, jobs=2, hours=0.5)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("slurmctld") is None, reason="no slurmctld: apt-get install slurm-wlm munge"),
    pytest.mark.skipif(os.geteuid() != 0, reason="Slurm is started as root"),
]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    started = subprocess.run(["bash", ROOT / "tests/slurm/start.sh", folder], capture_output=True, text=True)
    assert started.returncode == 0, started.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        yield
        subprocess.run(["scancel", "--me"], check=True)
        # What outlives its slurmd would drain a node of the next Slurm.
        wait_for(
            lambda: not subprocess.run(["squeue", "-h"], capture_output=True, check=True).stdout, "the queue to end"
        )
    subprocess.run(["bash", folder / "stop.sh"], check=True)


def wait_for(condition, what, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.5)


def queued(directory):
    """Id -> state of the jobs of a run or a sweep."""
    return {job: state for job, (state, _) in queue(job_name(directory)).items()}


def processes(word):
    """Of the train.py whose command line has ``word``."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            arguments = path.read_bytes().decode(errors="replace").split("\0")
            if any(a.endswith("/train.py") for a in arguments) and any(word in a for a in arguments):
                found.append(int(path.parent.name))
    return found


def begin_now(job):
    """Not after minutes, as Slurm would; nor in the second of the requeue, whose starts slurmd takes for revoked
    ones."""
    subprocess.run(["scontrol", "update", f"jobid={job}", "starttime=now+2"], check=True)


def losses(run_dir):
    return {row["step"]: row["loss"] for row in read_rows(run_dir / METRICS) if row["split"] == "train"}


def test_a_sweep_is_preempted_requeued_and_finished_by_a_second_call(slurm, make_config, tiny_overrides, tmp_path):
    common = [o for o in tiny_overrides("x")[0] if not o.startswith(("name=", "run_dir="))]
    corpus = tmp_path / "corpus.jsonl"
    arms = {f"lr{i}": ArmConfig(train=["attention=full", f"optim.lr=1e-{i}"]) for i in (2, 3, 4, 5)}
    arms["long"] = ArmConfig(train=["attention=full", "steps=400"])
    arms["lost"] = ArmConfig(train=["attention=full", "data=local", f"data.files=[{corpus}]"])
    study = StudyConfig(train=common, evaluate=["tasks=[loss]", "threads=1"], arms=arms)
    config = SweepConfig(name="s", output_dir=str(tmp_path / "s"), studies={"text": study}, launcher=HERE)
    whole = train(make_config("whole", "steps=400"))  # prepares the corpus, too

    submit_sweep(config)
    jobs = read_jobs(tmp_path / "s")
    assert len({job.split("_")[0] for job in jobs.values()}) == 1
    assert len(jobs) == 6

    long, job = tmp_path / "s" / "text-long-seed0", jobs["text-long-seed0"]
    wait_for(lambda: len(losses(long)) >= 20, "the long cell to train")
    subprocess.run(["scancel", "--signal=USR1", job], check=True)
    wait_for(lambda: queued(tmp_path / "s").get(job) == "PENDING", "it to be queued again")
    assert not (long / "cell.json").exists()
    begin_now(job)

    wait_for(lambda: not queued(tmp_path / "s"), "the jobs to end")
    rows = {name.removeprefix("text-").removesuffix("-seed0"): rest for name, *rest in status(tmp_path / "s")}
    assert {name: row[0] for name, row in rows.items()} == {name: "done" for name in arms} | {"lost": "failed"}
    assert str(corpus) in rows["lost"][2]
    assert len(list((long / "resumed").iterdir())) == 1
    assert losses(long) == losses(whole)
    assert len(read_rows(long / "results.jsonl")) == 1

    documents = ({"text": f"document {i} of a corpus that was lost and is found " * 9} for i in range(2000))
    corpus.write_text("".join(json.dumps(document) + "\n" for document in documents))
    submit_sweep(config)
    assert [name for name, job in read_jobs(tmp_path / "s").items() if job in queued(tmp_path / "s")] == [
        "text-lost-seed0"
    ]
    wait_for(lambda: not queued(tmp_path / "s"), "the lost cell")
    command = [sys.executable, "-m", "experiments.sweep.status", str(tmp_path / "s")]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "6 done" in shown
    assert "failed" not in shown


def test_a_requeued_job_does_not_begin_with_code_that_was_changed(slurm, tiny_overrides, tmp_path):
    common = [o for o in tiny_overrides("x")[0] if not o.startswith(("name=", "run_dir="))]
    arms = {"long": ArmConfig(train=["attention=full", "steps=300"])}
    study = StudyConfig(train=common, evaluate=["tasks=[loss]", "threads=1"], arms=arms)
    config = SweepConfig(name="s", output_dir=str(tmp_path / "s"), studies={"t": study}, launcher=HERE)
    submit_sweep(config)
    (job,), run_dir = read_jobs(tmp_path / "s").values(), tmp_path / "s" / "t-long-seed0"
    wait_for(lambda: len(losses(run_dir)) >= 20, "the cell to train")
    subprocess.run(["scancel", "--signal=USR1", job], check=True)
    wait_for(lambda: queued(tmp_path / "s").get(job) == "PENDING", "it to be queued again")
    before, (code,) = losses(run_dir), (tmp_path / "s" / "slurm").glob("code-*")
    (code / "slurm" / "job.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    begin_now(job)
    wait_for(lambda: not queued(tmp_path / "s"), "the job to end")
    ((_, state, _, why),) = status(tmp_path / "s")
    assert (state, why) == (
        "failed",
        f"error: {code} holds other code than its name says: move it away and submit again",
    )
    assert not (tmp_path / "ran").exists()
    assert losses(run_dir) == before
    code.rename(tmp_path / "away")
    submit_sweep(config)
    wait_for(lambda: not queued(tmp_path / "s"), "the job to end")
    assert [row[1] for row in status(tmp_path / "s")] == ["done"]


def test_a_run_on_two_nodes_with_its_evaluation(slurm, make_config, tiny_overrides):
    alone = train(make_config("alone"))
    overrides, run_dir = tiny_overrides("run", "sequence_parallel=2")
    launcher = ["launcher=slurm", "launcher.nodes=2", "launcher.gpus_per_node=0", "launcher.cpus_per_task=1"]
    launcher += ["launcher.hours=0.2", "launcher.evaluate=['tasks=[loss]','threads=1']"]
    done = subprocess.run(
        [sys.executable, "train.py", *overrides, *launcher], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("submitted job ")
    wait_for(lambda: not queued(run_dir), "the job to end")
    log = (run_dir / "slurm" / "run.log").read_text()
    assert losses(run_dir) == pytest.approx(losses(alone), rel=1e-5), log
    assert json.loads((run_dir / "checkpoints/step-00000004/state.json").read_text())["world_size"] == 2
    assert len(read_rows(run_dir / "results.jsonl")) == 1, log
    assert json.loads((run_dir / "git.json").read_text())["sha"]  # of the checkout that the copy was made from


def test_two_gpus_of_a_node_behind_a_module_and_a_container(slurm, make_config, tiny_overrides, tmp_path):
    """The GPUs are pretended, the module is a variable, and the container a program that starts Python."""
    container = tmp_path / "container"
    container.write_text(f'#!/bin/sh\necho "$MODULE $CUDA_VISIBLE_DEVICES $*" >> {tmp_path}/started\nexec "$@"\n')
    container.chmod(0o755)
    alone = train(make_config("alone"))
    config = make_config("run")
    config.launcher = replace(
        HERE,
        gpus_per_node=2,
        setup=["export MODULE=loaded"],
        python=f"{container} {sys.executable}",
        srun_args=["--label"],
        sbatch_args={"comment": "a-comment"},
    )
    overrides, run_dir = tiny_overrides("run")
    job = submit_run(config, overrides)
    shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True, check=True).stdout
    assert "gres/gpu:2" in shown.replace("gres:gpu", "gres/gpu")
    assert "Comment=a-comment" in shown
    wait_for(lambda: not queued(run_dir), "the job to end")
    log = (run_dir / "slurm" / "run.log").read_text()
    assert json.loads((run_dir / "checkpoints/step-00000004/state.json").read_text())["world_size"] == 2, log
    assert losses(run_dir) == pytest.approx(losses(alone), rel=1e-5)
    started = (tmp_path / "started").read_text().splitlines()
    assert len(started) == 2
    assert all(line.startswith(f"loaded 0,1 {sys.executable} ") for line in started)


def test_a_sweep_begins_from_a_base_run(slurm, tiny_overrides, tmp_path):
    common = [o for o in tiny_overrides("x")[0] if not o.startswith(("name=", "run_dir="))]
    arms = {"dense": ArmConfig(train=["attention=full"]), "dash": ArmConfig(train=["attention=dash"])}
    arms["dash"].train += ["attention.chunk_size=16"]
    study = StudyConfig(train=common, base=["attention=full"], evaluate=["tasks=[loss]", "threads=1"], arms=arms)
    lost = replace(study, base=["attention=full", f"init_from={tmp_path}/nowhere"])
    config = SweepConfig("s", str(tmp_path / "s"), studies={"good": study, "bad": lost}, launcher=HERE)
    submit_sweep(config)
    wait_for(lambda: not queued(tmp_path / "s"), "the jobs to end")
    rows = {name.removesuffix("-seed0"): rest for name, *rest in status(tmp_path / "s")}
    good = {name: row[0] for name, row in rows.items() if name.startswith("good")}
    assert good == {"good-base": "done", "good-dense": "done", "good-dash": "done"}
    assert rows["bad-base"][0] == "failed"
    assert not any((tmp_path / "s" / f"bad-{arm}-seed0").exists() for arm in arms)
    base = tmp_path / "s" / "good-base-seed0"
    for arm in arms:
        start = json.loads((tmp_path / "s" / f"good-{arm}-seed0" / "start.json").read_text())
        assert start["init_from"]["weights"].startswith(str(base / "checkpoints"))


def test_a_run_waits_for_its_process_that_lives_on_where_the_node_was_given_up(slurm, make_config, tiny_overrides):
    options = ("steps=320", "save_every=20")
    whole = train(make_config("whole", *options))
    config = make_config("run", *options)
    config.launcher = HERE
    overrides, run_dir = tiny_overrides("run", *options)
    job = submit_run(config, overrides)
    wait_for(lambda: len(losses(run_dir)) >= 25, "the run to train")
    (node,) = subprocess.run(["squeue", "-h", "-o", "%N"], capture_output=True, text=True, check=True).stdout.split()
    (process,) = processes(str(run_dir))
    os.kill(process, signal.SIGSTOP)  # it lives, and holds the run
    folder = Path(os.environ["SLURM_CONF"]).parent
    os.kill(int((folder / f"slurmd_{node}.pid").read_text()), signal.SIGKILL)
    try:
        subprocess.run(["scontrol", "update", f"nodename={node}", "state=down", "reason=lost"], check=True)
        for said in ("", "asks to be queued again"):
            wait_for(lambda: queued(run_dir).get(job) == "PENDING", "it to be queued again")
            assert said in (run_dir / "slurm" / "run.log").read_text()
            if not said:
                begin_now(job)
                wait_for(lambda: queued(run_dir).get(job) == "RUNNING", "it to begin again")
        os.kill(process, signal.SIGKILL)
        begin_now(job)
        wait_for(lambda: not queued(run_dir), "the job to end")
        assert losses(run_dir) == losses(whole), (run_dir / "slurm" / "run.log").read_text()
        assert len(list((run_dir / "resumed").iterdir())) == 1
    finally:
        subprocess.run(["slurmd", "-f", folder / "slurm.conf", "-N", node], check=True)
        # Unless it is back already.
        subprocess.run(["scontrol", "update", f"nodename={node}", "state=resume"], check=False)


def test_the_status_says_how_slurm_ended_a_job(slurm, tiny_overrides, tmp_path, monkeypatch):
    late = ["sbatch", "--parsable", "--time=1", f"--error={tmp_path}/%j_0_log.err", "--wrap=exec sleep 300"]
    late = subprocess.run(late, capture_output=True, text=True, check=True, cwd=tmp_path).stdout.strip()
    common = [o for o in tiny_overrides("x")[0] if not o.startswith(("name=", "run_dir="))]
    arms = {name: ArmConfig(train=["attention=full", "steps=4000"]) for name in ("killed", "cancelled")}
    study = StudyConfig(train=common, base=["attention=full"], evaluate=["tasks=[loss]", "threads=1"], arms=arms)
    config = SweepConfig("s", str(tmp_path / "s"), studies={"t": study}, launcher=HERE)
    submit_sweep(config)

    def rows():
        return {name.removeprefix("t-").removesuffix("-seed0"): rest for name, *rest in status(tmp_path / "s")}

    assert {rows()[arm][2] for arm in arms} <= {"waits for t-base-seed0 (pending)", "waits for t-base-seed0 (running)"}
    wait_for(lambda: all(losses(tmp_path / "s" / f"t-{arm}-seed0") for arm in arms), "all arms to train")
    jobs = read_jobs(tmp_path / "s")
    subprocess.run(["scancel", jobs["t-cancelled-seed0"]], check=True)
    (process,) = processes("name=t-killed-seed0")
    os.kill(process, signal.SIGKILL)
    wait_for(lambda: not queued(tmp_path / "s"), "the jobs to end")
    found = {name: (row[0], row[2]) for name, row in rows().items()}
    assert found["base"] == ("done", "")
    assert found["killed"][0] == "failed"
    assert "killed by signal 9 (SIGKILL)" in found["killed"][1]
    assert found["cancelled"][0] == "cancelled"

    look = ["squeue", "--noheader", f"--jobs={late}", "--states=all", "--format=%T"]
    wait_for(lambda: b"TIMEOUT" in subprocess.run(look, capture_output=True).stdout, "the time limit")
    assert ended(tmp_path, [late]) == {late: "timed out"}
    monkeypatch.setenv("PATH", str(tmp_path))  # when Slurm has forgotten the jobs
    assert ended(tmp_path, [late]) == {late: "timed out"}
    assert ended(tmp_path / "s" / "slurm", [jobs["t-cancelled-seed0"]]) == {jobs["t-cancelled-seed0"]: "cancelled"}
