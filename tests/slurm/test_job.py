"""What a task of a job does, without Slurm: which rank it is, what it runs, and how it ends."""

import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import submitit
import submitit.helpers

from experiments.errors import REQUEUE
from experiments.files import ROOT, read_done
from experiments.sweep import run_cell as run_cell_module
from experiments.sweep.cells import Cell
from experiments.sweep.run_cell import Outcome, last_words, run_cell, run_in_job
from slurm.job import run_task


class Exited(Exception):
    """In place of the process's end."""


@pytest.mark.parametrize(
    ("tasks", "rank", "code", "address", "ends"),
    [
        (1, 0, 0, None, None),
        (1, 0, 75, None, 75),
        (2, 0, 75, "10.0.0.7", 75),
        (2, 1, 75, "10.0.0.7", 0),
        (4, 3, 0, None, None),
    ],
)
def test_a_task_is_a_rank_and_ends_as_its_work_says(monkeypatch, tasks, rank, code, address, ends):
    called, exported = [], []

    class Environment:
        def export(self, **options):
            exported.append(options)
            os.environ.update(RANK=str(rank), MASTER_ADDR="node1")

    def exit_(code):
        raise Exited(code)

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "of the shell that submitted")
    monkeypatch.setattr(submitit, "JobEnvironment", lambda: SimpleNamespace(num_tasks=tasks, global_rank=rank))
    monkeypatch.setattr(submitit.helpers, "TorchDistributedEnvironment", Environment)
    monkeypatch.setattr(os, "_exit", exit_)
    if address is not None:
        monkeypatch.setenv("SLURM_LAUNCH_NODE_IPADDR", address)
    with nullcontext() if ends is None else pytest.raises(Exited, match=f"^{ends}$"):
        run_task(lambda *arguments: called.append(arguments) or code, "a", "b")
    assert called == [("a", "b", rank)]
    assert exported == ([{"set_cuda_visible_devices": False}] if tasks > 1 else [])
    left = {"RANK": str(rank), "MASTER_ADDR": address or "node1"} if tasks > 1 else {}
    assert not any("of the shell" in value for value in os.environ.values())
    assert {key: os.environ[key] for key in ("RANK", "MASTER_ADDR") if key in os.environ} == left


CELL = Cell("a-cell", Path("unused"), ("x=1", "y=a b"), ("run=r",), None, ("run=r", "knobs=[1]"))


@pytest.mark.parametrize(
    ("rank", "gpus", "count"), [(0, (), 3), (0, ("5",), 3), (0, ("2", "GPU-x"), 3), (2, (), 1), (2, ("5",), 1)]
)
def test_the_commands_of_a_cell(tmp_path, monkeypatch, rank, gpus, count):
    """All by the first rank; others only train, and no record is theirs."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "of the machine")
    ran, cell = [], Cell(CELL.name, tmp_path / "run", CELL.train, CELL.evaluate, CELL.base, CELL.evaluate_turned)
    cell.run_dir.mkdir()

    def run(command, *, env, stdout, **options):
        ran.append(command)
        seen = env["CUDA_VISIBLE_DEVICES"], env["PYTHONUNBUFFERED"]
        assert seen == (",".join(gpus) if gpus else "of the machine", "1")
        os.write(stdout.fileno(), b"said\n")
        return 0

    outcome = run_cell(cell, tmp_path / "logs", SimpleNamespace(run=run, received=None), rank=rank, gpus=gpus)
    assert (outcome.status, outcome.message) == ("done", "")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--signals-to-handle"]
    torchrun = [*torchrun, "SIGTERM,SIGUSR1,SIGUSR2,SIGINT", "--nproc-per-node", "2"] if len(gpus) > 1 else []
    assert (
        ran
        == [
            [sys.executable, *torchrun, str(ROOT / "train.py"), "x=1", "y=a b"],
            [sys.executable, str(ROOT / "evaluate.py"), "run=r"],
            [sys.executable, str(ROOT / "evaluate.py"), "run=r", "knobs=[1]"],
        ][:count]
    )
    (log,) = (tmp_path / "logs").iterdir()
    assert log.name == ("a-cell.log" if rank == 0 else "a-cell.rank2.log")
    said = ["$ train.py x=1 'y=a b'", "said", "$ evaluate.py run=r", "said", "$ evaluate.py run=r 'knobs=[1]'", "said"]
    assert log.read_text().splitlines() == said[: 2 * count]
    if rank == 0:
        assert read_done(cell.run_dir)["commands"] == cell.commands
    else:
        assert list(cell.run_dir.iterdir()) == []


def test_what_fails_ends_a_cell_with_its_last_words(tmp_path):
    def run(command, *, stdout, **options):
        os.write(stdout.fileno(), b"error: no room\nbye\n")
        return 3 if command[1].endswith("evaluate.py") else 0

    outcome = run_cell(CELL, tmp_path, SimpleNamespace(run=run, received=None))
    assert (outcome.status, outcome.message) == ("failed", f"error: no room (see {tmp_path / 'a-cell.log'})")
    assert (tmp_path / "a-cell.log").read_text().count("$ ") == 2
    assert not CELL.run_dir.exists()


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("", "no output"),
        ("$ train.py\n\n", "no output"),
        ("$ train.py\nstep 1\n  step 2  \n\n", "step 2"),
        ("$ train.py\nValueError: one\nerror: two\n\xff bye\n", "error: two"),
        ("$ train.py\nerror: one\n$ evaluate.py\nstep 1\n", "step 1"),
        ("Errors in a line of their own\nlast\n", "last"),
    ],
)
def test_last_words_are_the_last_error_since_the_start(tmp_path, log, said):
    (tmp_path / "log").write_bytes(log.encode("latin-1"))
    assert last_words(tmp_path / "log") == said


@pytest.mark.parametrize(
    ("status", "received", "code"),
    [
        ("done", None, 0),
        ("stopped", None, REQUEUE),
        ("stopped", signal.SIGUSR2, REQUEUE),
        ("stopped", signal.SIGTERM, 143),
        ("failed", None, "why"),
    ],
)
def test_a_job_asks_to_be_queued_again_where_it_was_stopped(monkeypatch, tmp_path, status, received, code):
    asked = []

    def run(cell, log_dir, children, *, rank):
        asked.append((cell, log_dir, rank))
        children.received = received
        return Outcome(status, 1.0, "why")

    monkeypatch.setattr(run_cell_module, "run_cell", run)
    with pytest.raises(SystemExit, match=r"^why$") if code == "why" else nullcontext():
        assert run_in_job(CELL, tmp_path, 2) == code
    assert asked == [(CELL, tmp_path, 2)]
