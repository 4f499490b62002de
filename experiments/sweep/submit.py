"""Submits runs and sweeps as jobs of Slurm, with the code as it is now.

DIR/slurm/code-*/     copies of the code, by content: what changes here later does not reach a job that waits
DIR/slurm/jobs.json   cell -> its latest job
DIR/slurm/*.out .err  what Slurm and submitit say; what the programs say is in DIR/logs/
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from experiments.config import TrainConfig
from experiments.errors import REQUEUE
from experiments.files import SUBMITTED, write_atomically
from experiments.provenance import snapshot
from experiments.sweep.cells import Cell, SweepConfig, cells, write_plan
from experiments.sweep.run_cell import run_in_job
from experiments.training.check import check
from slurm.launcher import LauncherConfig
from slurm.submit import queue, submit

_JOBS = "jobs.json"


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


def submit_sweep(config: SweepConfig) -> str:
    """Submit the cells of a sweep that are neither done nor queued, as one array for each base they continue from.

    Returns what became of the cells, in a sentence.
    """
    output_dir = Path(config.output_dir).absolute()
    found = cells(replace(config, output_dir=str(output_dir)))
    write_plan(output_dir, found)
    submitted, queued = read_jobs(output_dir), queue()
    waiting = {name: job for name, job in submitted.items() if job in queued}
    todo = [cell for cell in found if not cell.is_done() and cell.name not in waiting]
    for base, group in groupby(sorted(todo, key=lambda cell: cell.base or ""), key=lambda cell: cell.base):
        waiting |= _submit(list(group), config.launcher, output_dir, output_dir / "logs", after=waiting.get(base))
    return (
        f"{config.name}: {len(todo)} cells submitted, {len(waiting) - len(todo)} were queued, "
        f"{len(found) - len(waiting)} done; how they stand: python -m experiments.sweep.status {config.output_dir}"
    )


def read_jobs(output_dir: Path) -> dict[str, str]:
    """Cell -> id of its latest job."""
    path = output_dir / SUBMITTED / _JOBS
    return json.loads(path.read_text()) if path.exists() else {}


def _submit(
    group: Sequence[Cell], launcher: LauncherConfig, output_dir: Path, log_dir: Path, after: str | None = None
) -> dict[str, str]:
    """Submit cells as one array, to start when the job ``after`` has succeeded. Returns cell -> job, and records it."""
    folder = output_dir / SUBMITTED
    jobs = submit(
        run_in_job,
        [(cell, log_dir) for cell in group],
        launcher,
        name=output_dir.name,
        folder=folder,
        code=snapshot(folder),
        again=REQUEUE,
        after=after,
    )
    submitted = {cell.name: job for cell, job in zip(group, jobs, strict=True)}
    write_atomically(folder / _JOBS, json.dumps(read_jobs(output_dir) | submitted, indent=1) + "\n")
    return submitted
