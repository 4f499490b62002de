"""``python -m experiments.collect outputs/NAME results/NAME``: the rows of all runs below a directory in two files to
commit, results.jsonl and metrics.jsonl, whose rows say which run they are of."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.errors import user_errors
from experiments.files import read_rows, write_atomically
from experiments.frontier import RESULTS
from experiments.metrics import METRICS


def collect(source: Path, target: Path) -> dict[str, int]:
    """Writes both files, replacing what an earlier call wrote; returns how many rows each has.

    Raises:
        ValueError: there is nothing to collect, or the target lies below the source.
    """
    if target.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{target} lies in {source}, whose rows it would count twice: name another directory")
    found = {
        name: [{"run": path.parent.name} | row for path in sorted(source.rglob(name)) for row in read_rows(path)]
        for name in (RESULTS, METRICS)
    }
    if not any(found.values()):
        raise ValueError(f"no rows below {source}: name the directory of a sweep or of a run")
    target.mkdir(parents=True, exist_ok=True)
    for name, rows in found.items():
        write_atomically(target / name, "".join(json.dumps(row) + "\n" for row in rows))
    return {name: len(rows) for name, rows in found.items()}


def main(arguments: Sequence[str]) -> None:
    with user_errors():
        if len(arguments) != 2:
            raise ValueError("usage: python -m experiments.collect RUNS TARGET")
        counts = collect(*map(Path, arguments))
    print(", ".join(f"{count} rows in {Path(arguments[1]) / name}" for name, count in counts.items()))


if __name__ == "__main__":
    main(sys.argv[1:])
