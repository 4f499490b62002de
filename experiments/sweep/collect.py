"""The rows of a study, to commit, and back.

``python -m experiments.sweep.collect outputs/NAME results/NAME``: the rows of all runs below a directory in three files
to commit: results.jsonl and metrics.jsonl, and in cells.jsonl the commands of the sweep's cells that completed. Runs of
earlier calls, on another machine say, stay.

``python -m experiments.sweep.collect --restore results/NAME outputs/NAME``: there the sweep counts these cells as done,
and continues where only the rows are left.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.arguments import parse
from experiments.errors import user_errors
from experiments.files import (
    CELL,
    CELLS,
    METRICS,
    RESULTS,
    check_exists,
    files_below,
    locked,
    read_done,
    read_rows,
    write_atomically,
)
from experiments.sweep.cells import record_done


def collect(source: Path, target: Path) -> dict[str, int]:
    """Writes the files, in which the runs of ``source`` take the place of what an earlier call wrote of them; returns
    how many rows each has.

    Raises:
        ValueError: there is nothing to collect, two runs have one name, or the target lies below the source.
    """
    check_exists(source, "name the directory of a sweep or of a run")
    if target.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{target} lies in {source}, whose rows it would count twice: name another directory")
    runs = sorted({path.parent for name in (RESULTS, METRICS, CELL) for path in files_below(source, name)})
    names = [run.name for run in runs]
    twice = next((run for run in runs if names.count(run.name) > 1), None)
    if twice is not None:
        raise ValueError(f"several runs below {source} are called {twice.name}, {twice} among them: rename one of them")
    found = {
        name: [{"run": run.name} | row for run in runs for row in read_rows(run / name)] for name in (RESULTS, METRICS)
    }
    found[CELLS] = [{"run": run.name} | read_done(run) for run in runs if (run / CELL).exists()]
    if not found[RESULTS] and not found[METRICS]:
        raise ValueError(f"no rows below {source}: name the directory of a sweep or of a run")
    for name in found:
        _collected(target / name)  # before anything is written
    target.mkdir(parents=True, exist_ok=True)
    for name, rows in found.items():
        new = {row["run"] for row in rows}
        with locked(target / name):
            found[name] = [row for row in _collected(target / name) if row["run"] not in new] + rows
            write_atomically(target / name, "".join(json.dumps(row) + "\n" for row in found[name]))
    return {name: len(rows) for name, rows in found.items()}


def _collected(path: Path) -> list[dict]:
    """Rows that an earlier call wrote. Raises ValueError if others are among them."""
    rows = read_rows(path)
    if not all(isinstance(row.get("run"), str) for row in rows):
        raise ValueError(f"{path} has rows that say of no run: name another directory, or remove them")
    return rows


def restore(source: Path, target: Path) -> int:
    """Marks the cells of ``source``'s cells.jsonl as done in a sweep's directory that knows nothing of them; returns
    their number. Bases are left out: what is missing needs their weights.

    Raises:
        ValueError: there are none, or one's name would lead elsewhere.
    """
    check_exists(source, "give the directory that rows were collected in")
    rows = [row for row in read_rows(source / CELLS) if len(row["commands"]) > 1]
    if not rows:
        raise ValueError(f"{source / CELLS} names no cell: give the directory that rows were collected in")
    wrong = next((row["run"] for row in rows if not _is_directory_name(row["run"])), None)
    if wrong is not None:
        raise ValueError(f"{source / CELLS} names a cell {wrong!r}, which is no directory's name: do not trust it")
    missing = [row for row in rows if not any((target / row["run"]).glob("[!.]*"))]
    for row in missing:
        (target / row["run"]).mkdir(parents=True, exist_ok=True)
        record_done(target / row["run"], row["commands"])
    return len(missing)


def _is_directory_name(name: object) -> bool:
    return isinstance(name, str) and name not in ("", "..") and Path(name).name == name


def main(arguments: Sequence[str]) -> None:
    with user_errors():
        given = parse("experiments.sweep.collect", arguments)
        if given.restore:
            done = restore(given.source, given.target)
            print(f"{done} cells of {given.source} count as done in {given.target}")
            return
        counts = collect(given.source, given.target)
    print(", ".join(f"{count} rows in {given.target / name}" for name, count in counts.items()))


if __name__ == "__main__":
    main(sys.argv[1:])
