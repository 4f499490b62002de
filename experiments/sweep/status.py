"""How a sweep stands: ``python -m experiments.sweep.status outputs/NAME``, wherever its cells run."""

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from experiments.arguments import parse
from experiments.errors import user_errors
from experiments.files import METRICS, SUBMITTED, read_rows
from experiments.sweep.cells import Cell, is_in_hand, read_plan
from experiments.sweep.run_cell import last_words
from experiments.sweep.submit import job_name, read_jobs
from slurm.queue import ended, queue


def status(output_dir: Path) -> list[tuple[str, str, str, str]]:
    """(cell, state, last step in metrics.jsonl, why it stands so), one a cell.

    States are done, running, pending, missing; of what ended otherwise failed, or in the words of ``slurm.queue.ended``
    how Slurm ended it.
    """
    plan = read_plan(output_dir)
    done = {cell.name for cell in plan if cell.is_done()}
    jobs = {name: job for name, job in read_jobs(output_dir).items() if name not in done}
    queued = queue(job_name(output_dir)) if jobs else {}
    ends = ended(output_dir / SUBMITTED, [job for job in jobs.values() if job not in queued])
    rows: dict[str, tuple[str, str, str, str]] = {}
    for cell in plan:  # a base stands before what continues from it
        job = jobs.get(cell.name)
        state = rows[cell.base][1] if cell.base in rows else None
        base = None if state in (None, "done") else f"{cell.base} ({state})"
        said = _said(output_dir / "logs" / f"{cell.name}.log", output_dir / SUBMITTED / f"{job}_0_log.err")
        rows[cell.name] = _cell_status(cell, said, queued.get(job), ends.get(job), base)
    return list(rows.values())


def _cell_status(
    cell: Cell, said: str | None, queued: tuple[str, str] | None, end: str | None, base: str | None
) -> tuple[str, str, str, str]:
    """``said``: its last words, if it ever began; ``queued``: state and reason of its job in the queue; ``end``: of a
    job that is there no more; ``base``: the cell it continues from and that one's state, unless it is done."""
    metrics = read_rows(cell.run_dir / METRICS)
    step = str(metrics[-1]["step"]) if metrics else ""
    if cell.is_done():
        return cell.name, "done", step, ""
    if queued is not None:
        state, reason = queued
        if state not in ("PENDING", "REQUEUED"):
            return cell.name, "running", step, ""
        return cell.name, "pending", step, f"waits for {base}" if base else reason.replace("None", "")
    if is_in_hand(cell):
        return cell.name, "running", step, ""
    if end not in (None, "failed", "completed"):
        # Slurm cancels a job whose base did not succeed.
        return cell.name, end, step, said or (f"continues from {base}" if end == "cancelled" and base else "")
    if said is not None:
        return cell.name, "failed", step, said
    return cell.name, "missing", step, ""


def _said(log: Path, job_log: Path) -> str | None:
    """The last words of a cell, or of its job where that ended before the cell began; None: neither said anything."""
    lines = job_log.read_text(errors="replace").splitlines() if job_log.is_file() else []
    if lines and lines[-1].startswith("error: "):  # a job that would not begin says no more
        return lines[-1]
    return last_words(log) if log.exists() else last_words(job_log) if lines else None


def main() -> None:
    with user_errors():
        rows = status(parse("experiments.sweep.status", sys.argv[1:]).output_dir)
    table = Table("cell", "status", "step", "why")
    for row in rows:
        table.add_row(*row)
    counts = {state: sum(row[1] == state for row in rows) for state in dict.fromkeys(row[1] for row in rows)}
    console = Console(width=None if sys.stdout.isatty() else 200, markup=False)
    console.print(table)
    console.print(", ".join(f"{count} {state}" for state, count in counts.items()))


if __name__ == "__main__":
    main()
