"""Submits runs and sweeps to Slurm, with the code as it is now.

DIR/slurm/code-*/     copies of the code, by content: what changes here later does not reach a job that waits
DIR/slurm/jobs.json   cell -> its latest job
DIR/slurm/*.out .err  what Slurm and submitit say; what the programs say is in DIR/logs/
"""

import hashlib
import json
import math
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from rich.console import Console
from submitit import SlurmExecutor

from experiments.config import LauncherConfig, TrainConfig
from experiments.errors import REQUEUE
from experiments.files import ROOT, SUBMITTED, write_atomically
from experiments.sweep.cells import Cell, SweepConfig, cells, write_plan
from experiments.training.check import check
from experiments.training.run_dir import SNAPSHOT, code_state
from slurm.job import run_task

JOBS = "jobs.json"
# Of the task alone: an array has the id of one of its tasks.
_TASK = '"${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"'
_CODE = ("dashattn", "data", "models", "experiments", "slurm", "configs", "train.py", "evaluate.py")


def submit_run(config: TrainConfig, overrides: Sequence[str]) -> str:
    """Submit a run, and the evaluation after it if the launcher names one. Returns the job's id.

    Args:
        overrides: of the command line that composed ``config``; the job repeats them, but for the launcher's.

    Raises:
        ValueError: the run cannot work, or Slurm will not take it.
    """
    launcher = config.launcher
    # What runs there need not run here: of device and precision the job itself judges.
    check(replace(config, device="cpu", deepspeed=replace(config.deepspeed, precision="fp32")), launcher.ranks)
    run_dir = Path(config.run_dir).expanduser().absolute()
    train = tuple(o for o in overrides if not o.lstrip("+~").startswith(("launcher", "run_dir=")))
    evaluate = None if launcher.evaluate is None else (f"run={run_dir}", *launcher.evaluate)
    cell = Cell(config.name, run_dir, (*train, f"run_dir={run_dir}"), evaluate, base=None)
    return _submit([cell], launcher, run_dir, run_dir / SUBMITTED)[cell.name]


def submit_sweep(config: SweepConfig, console: Console) -> None:
    """Submit the cells of a sweep that are neither done nor queued, as one array for each base they continue from."""
    output_dir = Path(config.output_dir).absolute()
    found = cells(replace(config, output_dir=str(output_dir)))
    write_plan(output_dir, found)
    submitted, queued = read_jobs(output_dir), queue()
    waiting = {name: job for name, job in submitted.items() if job in queued}
    todo = [cell for cell in found if not cell.is_done() and cell.name not in waiting]
    for base, group in groupby(sorted(todo, key=lambda cell: cell.base or ""), key=lambda cell: cell.base):
        waiting |= _submit(list(group), config.launcher, output_dir, output_dir / "logs", after=waiting.get(base))
    console.print(
        f"{config.name}: {len(todo)} cells submitted, {len(waiting) - len(todo)} were queued, "
        f"{len(found) - len(waiting)} done; how they stand: python -m experiments.sweep.status {config.output_dir}",
        highlight=False,
    )


def read_jobs(output_dir: Path) -> dict[str, str]:
    """Cell -> id of its latest job."""
    path = output_dir / SUBMITTED / JOBS
    return json.loads(path.read_text()) if path.exists() else {}


def queue() -> dict[str, str]:
    """Id -> state of the jobs in Slurm's queue. Raises ValueError if Slurm does not answer."""
    command = ["squeue", "--me", "--array", "--noheader", "--format=%i %T"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"Slurm does not answer ({getattr(error, 'stderr', None) or error}): try again") from None
    return dict(line.split() for line in lines)


def _submit(
    group: Sequence[Cell], launcher: LauncherConfig, output_dir: Path, log_dir: Path, after: str | None = None
) -> dict[str, str]:
    """Submit cells as one array, to start when the job ``after`` has succeeded. Returns cell -> job, and records it."""
    folder = output_dir / SUBMITTED
    try:
        executor = SlurmExecutor(folder, python=launcher.python)
        executor.update_parameters(**_parameters(launcher, snapshot(folder), output_dir.name, after))
        jobs = executor.map_array(run_task, group, [log_dir] * len(group))
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        raise ValueError(f"Slurm does not take the job ({error}): see the launcher's values") from error
    submitted = {cell.name: job.job_id for cell, job in zip(group, jobs, strict=True)}
    write_atomically(folder / JOBS, json.dumps(read_jobs(output_dir) | submitted, indent=1) + "\n")
    return submitted


def _parameters(launcher: LauncherConfig, code: Path, name: str, after: str | None) -> dict:
    """submitit's, for a job of ``launcher`` that runs ``code``."""
    more = {"requeue": True, **launcher.sbatch_args}
    if after is not None:
        more |= {"dependency": f"afterok:{after}", "kill-on-invalid-dep": "yes"}
    parameters = {
        "job_name": name,
        "time": math.ceil(launcher.hours * 60),
        "nodes": launcher.nodes,
        "ntasks_per_node": max(launcher.gpus_per_node, 1),
        "cpus_per_task": launcher.cpus_per_task,
        "gpus_per_node": launcher.gpus_per_node or None,
        "mem": None if launcher.mem_gb is None else f"{math.ceil(launcher.mem_gb * 1024)}M",
        "partition": launcher.partition,
        "account": launcher.account,
        "qos": launcher.qos,
        "signal_delay_s": launcher.signal_s,
        "array_parallelism": launcher.jobs,
        "additional_parameters": more,
        # A rank that is lost takes the others along: they would wait for it.
        "srun_args": ["--kill-on-bad-exit=1", *launcher.srun_args],
        # The copy of the code, and not what lies in the directory where the command was given.
        "setup": [*launcher.setup, f"export PYTHONPATH={shlex.quote(str(code))}", "export PYTHONSAFEPATH=1"],
        "teardown": ["code=$?", f"[ $code != {REQUEUE} ] || scontrol requeue {_TASK}", "exit $code"],
    }
    return {key: value for key, value in parameters.items() if value is not None}


def snapshot(folder: Path) -> Path:
    """Copy the code into ``folder``, once for all jobs that it is the same for, with its git state; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    copy = Path(tempfile.mkdtemp(prefix=".code-", dir=folder))
    for name in _CODE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        else:
            shutil.copy(ROOT / name, copy)
    git, diff = code_state()
    (copy / SNAPSHOT).write_text(json.dumps({"git": git, "diff": diff}, indent=1) + "\n")
    digest = hashlib.sha256()
    for path in sorted(path for path in copy.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(copy)}\0".encode() + path.read_bytes())
    target = folder / f"code-{digest.hexdigest()[:12]}"
    if target.exists():
        shutil.rmtree(copy)
    else:
        os.chmod(copy, 0o755)
        os.replace(copy, target)
    return target
