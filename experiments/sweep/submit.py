"""Submits runs and sweeps as jobs of Slurm, with the code as it is now.

DIR/slurm/code-*/          copies of the code, by content: what changes here later does not reach a job that waits, and
                           one that was changed itself runs in no job
DIR/slurm/jobs.json        cell -> its latest job
DIR/slurm/submitting.json  cells of an array while it is handed to Slurm
DIR/slurm/*.out .err       what Slurm and submitit say; what the programs say is in DIR/logs/

One submission goes on at a time, and looks in the queue for the jobs of DIR, by their name, before it makes any.
"""

import json
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from dashattn.fields import user_path
from data.cache import fingerprint
from experiments.columns import are_texts
from experiments.config import TrainConfig
from experiments.errors import REQUEUE
from experiments.files import SUBMITTED, locked, read_json, write_atomically
from experiments.overrides import override
from experiments.provenance import snapshot
from experiments.sweep.cells import Cell, SweepConfig, cells, missing, write_plan
from experiments.sweep.check import check_cells, check_run
from experiments.sweep.run_cell import run_in_job
from experiments.training.replacing import set_aside
from slurm.launcher import LauncherConfig
from slurm.queue import cancel, max_array_size, queue
from slurm.submit import has_call, submit

_JOBS, _SUBMITTING = "jobs.json", "submitting.json"


def submit_run(config: TrainConfig, overrides: Sequence[str]) -> str:
    """Submit a run, and the evaluation after it if the launcher names one. Returns the job's id.

    Args:
        overrides: of the command line that composed ``config``; the job repeats them, but for the launcher's.

    Raises:
        ValueError: the run cannot work, is in the queue already, or Slurm will not take it.
    """
    launcher = config.launcher
    launcher.check()
    run_dir = user_path(config.run_dir).absolute()
    # A job that is queued again goes on with its run: what makes way for it does so now.
    train = tuple(o for o in overrides if not o.lstrip("+~").startswith(("launcher", "run_dir=", "overwrite=")))
    evaluate = None if launcher.evaluate is None else (override("run", str(run_dir)), *launcher.evaluate)
    cell = Cell(config.name, run_dir, (*train, override("run_dir", str(run_dir))), evaluate, base=None)
    for note in check_run(cell, config, launcher.ranks):
        print(f"note: {note}")
    if config.overwrite and run_dir.exists():
        with _submitting(run_dir):
            _check_not_queued(cell, run_dir)
        set_aside(config)
    with _submitting(run_dir):
        _check_not_queued(cell, run_dir)
        return _submit([cell], launcher, run_dir, run_dir / SUBMITTED, [Counter()])[cell.name]


def _check_not_queued(cell: Cell, run_dir: Path) -> None:
    queued = _in_queue(run_dir)
    if cell.name in queued:
        raise ValueError(f"{run_dir} waits or runs as job {queued[cell.name]}: leave it to that, or `scancel` it first")


def submit_sweep(config: SweepConfig) -> str:
    """Submit the cells of a sweep that are neither done nor queued, as arrays for each base they continue from.

    Returns what became of the cells, in a sentence, and notes of what they are asked.

    Raises:
        ValueError: a cell cannot work, or Slurm will not take it.
    """
    config.launcher.check()
    output_dir = user_path(config.output_dir).absolute()
    found = cells(replace(config, output_dir=str(output_dir)))
    notes = check_cells(missing(found), config.launcher.ranks, elsewhere=True)
    write_plan(output_dir, found)
    with _submitting(output_dir):
        waiting = _in_queue(output_dir)
        todo = [cell for cell in missing(found) if cell.name not in waiting]
        waves = [Counter(map(_array, waiting.values()))]
        for base, group in groupby(sorted(todo, key=lambda cell: cell.base or ""), key=lambda cell: cell.base):
            after = waiting.get(base)
            waiting |= _submit(list(group), config.launcher, output_dir, output_dir / "logs", waves, after)
    return (
        f"{config.name}: {len(todo)} cells submitted, {len(waiting) - len(todo)} were queued, "
        f"{sum(cell.is_done() for cell in found)} done; how they stand: python -m experiments.sweep.status "
        f"{shlex.quote(config.output_dir)}" + "".join(f"\nnote: {note}" for note in notes)
    )


def job_name(directory: Path) -> str:
    """Of all jobs of a run or a sweep, and of no other one's, by whichever path it is named."""
    directory = directory.resolve()
    return f"{re.sub(r'[^A-Za-z0-9_.-]', '_', directory.name)}-{fingerprint(str(directory))[:8]}"


def read_jobs(output_dir: Path) -> dict[str, str]:
    """Cell -> id of its latest job. Raises ValueError if the record is damaged."""
    path = output_dir / SUBMITTED / _JOBS
    if not path.exists():
        return {}
    mend = f"`scancel --name={job_name(output_dir)}` what is queued, remove it, and submit again"
    jobs = read_json(path, mend)
    if not all(isinstance(job, str) for job in jobs.values()):
        raise ValueError(f"{path} is damaged (a job's id is a text): {mend}")
    return jobs


def _submitting(output_dir: Path):
    """Around what looks for jobs and makes them."""
    folder = output_dir / SUBMITTED
    folder.mkdir(parents=True, exist_ok=True)
    return locked(folder / _JOBS)


def _in_queue(output_dir: Path) -> dict[str, str]:
    """Cell -> id of its job, if that is in the queue; those included of a submission that was killed before it could
    record them, and those cancelled that it had not given their calls yet."""
    folder, jobs = output_dir / SUBMITTED, read_jobs(output_dir)
    queued = queue(job_name(output_dir))
    unknown = sorted(queued.keys() - set(jobs.values()))
    if (folder / _SUBMITTING).exists():
        names = read_json(folder / _SUBMITTING, "remove it", keys=("cells",))["cells"]
        if not are_texts(names):
            raise ValueError(f"{folder / _SUBMITTING} is damaged (its cells cannot be): remove it")
        if unknown:
            array = _array(unknown[0])
            made = {name: f"{array}_{i}" if len(names) > 1 else array for i, name in enumerate(names)}
            lost = [job for job in made.values() if job in queued and not has_call(folder, job)]
            cancel(lost)
            jobs |= {name: job for name, job in made.items() if job not in lost}
            write_atomically(folder / _JOBS, json.dumps(jobs, indent=1) + "\n")
        (folder / _SUBMITTING).unlink()
    return {name: job for name, job in jobs.items() if job in queued}


def _behind(waves: list[Counter[str]], count: int, most: int) -> list[str]:
    """The arrays that one of ``count`` cells has to wait for: Slurm holds each to ``most`` cells at a time, and so that
    this holds over all of a sweep's they go side by side in waves of no more, each behind the one before.

    Args:
        waves: array -> its cells, of each; a new one begins where the last is full.
    """
    if waves[-1] and waves[-1].total() + count > most:
        waves.append(Counter())
    return [] if len(waves) == 1 else list(waves[-2])


def _array(job: str) -> str:
    """Of a task of an array; a job of its own is its own."""
    return job.split("_")[0]


def _submit(
    group: Sequence[Cell],
    launcher: LauncherConfig,
    output_dir: Path,
    log_dir: Path,
    waves: list[Counter[str]],
    after: str | None = None,
) -> dict[str, str]:
    """Submit cells, to start when the job ``after`` has succeeded. Returns cell -> job, and records it.

    Args:
        waves: as of ``_behind``, of the arrays that are there; what is submitted is added.
    """
    folder, code = output_dir / SUBMITTED, snapshot(output_dir / SUBMITTED)
    size, submitted = max_array_size(), {}
    for start in range(0, len(group), size):
        part = group[start : start + size]
        names = [cell.name for cell in part]
        write_atomically(folder / _SUBMITTING, json.dumps({"cells": names}, indent=1) + "\n")
        jobs = submit(
            run_in_job,
            [(cell, log_dir) for cell in part],
            launcher,
            name=job_name(output_dir),
            folder=folder,
            code=code,
            again=REQUEUE,
            after=after,
            behind=_behind(waves, len(part), launcher.jobs),
        )
        submitted |= dict(zip(names, jobs, strict=True))
        write_atomically(folder / _JOBS, json.dumps(read_jobs(output_dir) | submitted, indent=1) + "\n")
        (folder / _SUBMITTING).unlink()
        waves[-1][_array(jobs[0])] += len(jobs)
    return submitted
