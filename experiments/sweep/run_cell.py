"""What is done for a cell: its commands, here or as a task of a job."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.errors import REQUEUE
from experiments.files import ROOT, naming
from experiments.provenance import is_changed
from experiments.signals import STOP_SIGNALS, Children
from experiments.sweep.cells import Cell, record_done

_SIGNALS = ",".join(number.name for number in STOP_SIGNALS)  # passed on, so that every rank saves
_TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--signals-to-handle", _SIGNALS, "--nproc-per-node"]
_FAILED = re.compile(r"srun: (error: \S+: tasks? .*: Exited with exit code|.*Terminating StepId=)")


@dataclass(frozen=True)
class Outcome:
    """How a cell ended: ``done``, ``was done``, ``failed``, ``skipped`` or, by a signal and with its work saved,
    ``stopped``."""

    status: str
    seconds: float = 0.0
    message: str = ""


def run_cell(cell: Cell, log_dir: Path, children: Children, rank: int = 0, gpus: Sequence[str] = ()) -> Outcome:
    """Runs the cell's commands. Ranks beside the first only train, and log for themselves.

    Args:
        gpus: names that it may use, as of CUDA_VISIBLE_DEVICES; several train together. Empty: those that it finds.
    """
    start = time.perf_counter()
    log_dir.mkdir(parents=True, exist_ok=True)
    log_path = log_dir / (f"{cell.name}.log" if rank == 0 else f"{cell.name}.rank{rank}.log")
    visible = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}
    # The first command is the training, which all ranks of a job do together; an evaluation is one process.
    for command in cell.commands if rank == 0 else cell.commands[:1]:
        if is_changed():  # since the job began, or the command before
            message = f"{ROOT} holds other code than its name says: move it away and submit again"
            return Outcome("failed", time.perf_counter() - start, message)
        with naming(log_path), log_path.open("ab") as log:
            log.write(f"$ {shlex.join(command)}\n".encode())
            log.flush()
            launcher = [*_TORCHRUN, str(len(gpus))] if len(gpus) > 1 and command[0] == "train.py" else []
            code = children.run(
                [sys.executable, *launcher, str(ROOT / command[0]), *command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONUNBUFFERED": "1"} | visible,
            )
        if code != 0:
            # Asked to stop, by a signal of its own or by one passed on to it: no failure, and its work is saved.
            is_stopped = code == REQUEUE or children.received is not None
            if code is not None and code < 0:  # it could not say so itself
                name = signal.Signals(-code).name
                note = ", as by the kernel where memory ran out" if -code == signal.SIGKILL else ""
                with log_path.open("a") as log:
                    log.write(f"error: killed by signal {-code} ({name}){note}\n")
            message = f"{last_words(log_path)} (see {log_path})"
            return Outcome("stopped" if is_stopped else "failed", time.perf_counter() - start, message)
    if rank == 0:
        record_done(cell.run_dir, cell.commands)
    return Outcome("done", time.perf_counter() - start)


def last_words(log_path: Path) -> str:
    """The line that says why a process failed: the last one that names an error since its start, else the last. That it
    failed, srun says behind it."""
    lines = [line.strip() for line in log_path.read_text(errors="replace").splitlines() if line.strip()]
    lines = [line for line in lines if not _FAILED.match(line)] or lines
    start = max((index for index, line in enumerate(lines) if line.startswith("$ ")), default=-1)
    lines = lines[start + 1 :]
    errors = [line for line in lines if re.search(r"error:|Error\b", line)]
    return (errors or lines or ["no output"])[-1]


def run_in_job(cell: Cell, log_dir: Path, rank: int) -> int:
    """Train as this rank of a job; the first rank evaluates then. Returns the exit code.

    Slurm sends SIGUSR2 before the time is up: the run saves, and the code asks the batch script, outside of any
    container, to queue the job again. So does a run that another process still trains, as after a node was given up
    that lives on. SIGTERM saves too, but a job that is preempted or cancelled is Slurm's to queue.

    Raises:
        SystemExit: the cell did not get done.
    """
    with Children() as children:
        outcome = run_cell(cell, log_dir, children, rank=rank)
    if outcome.status == "stopped":
        return 128 + signal.SIGTERM if children.received is signal.SIGTERM else REQUEUE
    if outcome.status != "done":
        raise SystemExit(outcome.message)
    return 0
