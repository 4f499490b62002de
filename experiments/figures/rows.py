"""The rows of a study, and what a figure is made of."""

import os
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from statistics import mean

from experiments.figures.frontier import check_seeds, newest, read_results
from experiments.figures.setpoints import AtSparsity, is_as_trained
from experiments.files import (
    CELL,
    CELLS,
    METRICS,
    NUMERICS,
    SCALING,
    SPEED,
    THROUGHPUT,
    check_exists,
    files_below,
    read_done,
    read_rows,
)
from experiments.intervals import bar

BARS = (
    "Bars: lowest to highest of the seeds; of a single one, its 95 % interval over samples, where rows tell it, but of "
    "a loss. Points of a panel share their samples: their differences are known better than bars show."
)


@dataclass(frozen=True)
class Study:
    """All rows below one directory.

    Attributes:
        evaluations: of results.jsonl, of every evaluation the newest checkpoint's.
        training: of metrics.jsonl, by run; of runs that are called alike with where they lie.
        trained: what a sweep gave train.py, by those of its runs that completed and are called like no other.
        speed, numerics, throughput, parallel: of the files of these names.
    """

    name: str
    evaluations: list[dict]
    training: dict[str, list[dict]]
    trained: dict[str, list[str]]
    speed: list[dict]
    numerics: list[dict]
    throughput: list[dict]
    parallel: list[dict]

    def of(self, task: str, metric: str | None = None) -> list[dict]:
        return [row for row in self.evaluations if row["task"] == task and metric in (None, row["metric"])]


def load_study(root: Path) -> Study:
    """Raises ValueError if the directory has no rows."""
    check_exists(root, "name directories of runs, of studies or of measurements")
    curves: dict[tuple[str, str], list[dict]] = {}  # by name and folder of a run
    for path in files_below(root, METRICS):
        for row in read_rows(path):
            place = path.parent if "run" in row else path.parent.parent
            name = row.get("run") or path.parent.name
            curves.setdefault((name, os.path.relpath(place, root)), []).append(row)
    known = Counter(name for name, _ in curves)
    training = {name if known[name] == 1 else f"{place}: {name}": rows for (name, place), rows in curves.items()}
    done = [row for path in files_below(root, CELLS) for row in read_rows(path)]
    done += [{"run": path.parent.name} | read_done(path.parent) for path in files_below(root, CELL)]
    trained = {row["run"]: row["commands"][0][1:] for row in done if row["run"] in training}
    found = {
        name: [row for path in files_below(root, name) for row in read_rows(path)]
        for name in (SPEED, NUMERICS, THROUGHPUT, SCALING)
    }
    evaluations = newest(read_results(root))
    if not training and not evaluations and not any(found.values()):
        raise ValueError(f"no rows in {root}: name directories of runs, of studies or of measurements")
    return Study(root.resolve().name, evaluations, training, trained, *found.values())


@dataclass(frozen=True)
class Drawn:
    """A figure of one study.

    Attributes:
        table: what it shows, a row a point; its CSV.
        draw: writes path.png and path.pdf; None for what is a table only.
        notes: what a reader must know, and which parts are missing.
        rows: what it was made from.
    """

    table: list[dict]
    draw: Callable[[Path], None] | None
    notes: Sequence[str] = ()
    rows: Sequence[dict] = ()

    @property
    def origin(self) -> str:
        """Where its rows were measured, from which seeds and when, as far as they say."""
        devices, seeds, dates = (
            sorted({row[name] for row in self.rows if row.get(name) is not None}) for name in ("device", "seed", "date")
        )
        days = sorted({date[:10] for date in dates})
        return "; ".join([*devices, *([f"seed {', '.join(map(str, seeds))}"] if seeds else []), *days])


@dataclass(frozen=True)
class Figure:
    """``make`` gives None when the study has no rows for it; ``needs`` says what makes them."""

    number: int
    key: str
    title: str
    needs: str
    make: Callable[[Study], Drawn | None]

    @property
    def stem(self) -> str:
        return f"fig{self.number:02d}_{self.key}"


def as_trained(rows: Iterable[dict]) -> list[dict]:
    """Those whose knob is the one trained with; of a label that has none, those at the sparsity trained with."""
    rows = list(rows)
    exact = [row for row in rows if row["knob"] == row["trained_knob"]]
    labels = {row["label"] for row in exact}
    others = [row for row in rows if row["label"] not in labels]
    return exact + [row for row in others if is_as_trained(row["knob"], row["trained_knob"])]


def line_of(row: dict) -> str:
    """The line a row belongs to: its label and, where there is a knob, where it stands."""
    if row["knob"] is None:
        return row["label"]
    knob = row["knob"] if isinstance(row["knob"], AtSparsity) else f"{row['knob_name']} {row['knob']:g}"
    return f"{row['label']} ({knob})"


def averaged(rows: Iterable[dict], *keys: str, value: str = "score") -> list[dict]:
    """Mean, lowest and highest over seeds of the rows that agree in ``keys`` (``line`` is ``line_of``), in their order.
    Of a single seed ``low`` and ``high`` are the 95 % interval over its samples, where it is known, and of a score that
    is no loss.

    Lists, such as ``per_head``, are averaged element by element.

    Raises:
        ValueError: a seed has several of them.
    """
    out = []
    for key, group in grouped(rows, lambda row: tuple(line_of(row) if k == "line" else row[k] for k in keys)).items():
        check_seeds(group, f"{group[0]['task']}, {group[0]['length']} tokens")
        values = [row[value] for row in group]
        if isinstance(values[0], list):
            scores = {value: _mean_of_lists(values)}
        else:
            known = bar(group[0]) if len(group) == 1 and value == "score" else None
            low, high = known or (min(values), max(values))
            scores = {value: mean(values), "low": low, "high": high}
        out.append(dict(zip(keys, key, strict=True)) | scores | {"seeds": len(group)})
    return sorted(out, key=lambda row: tuple((row[k] is None, row[k]) for k in keys))


def _mean_of_lists(values: list) -> list | float | None:
    if isinstance(values[0], list):
        return [_mean_of_lists(list(parts)) for parts in zip(*values, strict=True)]
    present = [value for value in values if value is not None]
    return mean(present) if present else None


def grouped(rows: Iterable[dict], *keys: str | Callable[[dict], Hashable]) -> dict:
    """Rows by what stands in a column, or by what is made of them; of several keys by a tuple. In their order."""
    parts = [itemgetter(key) if isinstance(key, str) else key for key in keys]
    groups: dict = {}
    for row in rows:
        found = tuple(part(row) for part in parts)
        groups.setdefault(found if len(parts) > 1 else found[0], []).append(row)
    return groups
