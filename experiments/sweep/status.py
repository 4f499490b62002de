"""How a sweep stands: ``python -m experiments.sweep.status outputs/NAME``, wherever its cells run."""

import argparse
import sys
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console
from rich.table import Table

from experiments.errors import user_errors
from experiments.files import LOCK, METRICS, read_rows
from experiments.sweep.cells import Cell, read_plan
from experiments.sweep.run_cell import last_words
from experiments.sweep.submit import read_jobs
from slurm.submit import queue


def status(output_dir: Path) -> list[tuple[str, str, str, str]]:
    """(cell, done | running | pending | failed | missing, last step in metrics.jsonl, why it failed), one a cell."""
    jobs = read_jobs(output_dir)
    queued = queue() if jobs else {}
    return [_cell_status(cell, output_dir, queued.get(jobs.get(cell.name))) for cell in read_plan(output_dir)]


def _cell_status(cell: Cell, output_dir: Path, job_state: str | None) -> tuple[str, str, str, str]:
    rows = read_rows(cell.run_dir / METRICS)
    step = str(rows[-1]["step"]) if rows else ""
    log = output_dir / "logs" / f"{cell.name}.log"
    if cell.is_done():
        return cell.name, "done", step, ""
    if job_state is not None:
        return cell.name, "pending" if job_state in ("PENDING", "REQUEUED") else "running", step, ""
    if _is_locked(cell.run_dir / LOCK):
        return cell.name, "running", step, ""
    if log.exists():
        return cell.name, "failed", step, last_words(log)
    return cell.name, "missing", step, ""


def _is_locked(path: Path) -> bool:
    """Whether a process trains there: it holds the lock."""
    if not path.exists():
        return False
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output_dir", type=Path, help="a sweep's")
    with user_errors():
        rows = status(parser.parse_args().output_dir)
    table = Table("cell", "status", "step", "why")
    for row in rows:
        table.add_row(*row)
    counts = {state: sum(row[1] == state for row in rows) for state in dict.fromkeys(row[1] for row in rows)}
    console = Console(width=None if sys.stdout.isatty() else 200, markup=False)
    console.print(table)
    console.print(", ".join(f"{count} {state}" for state, count in counts.items()))


if __name__ == "__main__":
    main()
