"""Frontiers of score against measured causal sparsity, from rows of results.jsonl.

A panel is a task at a length; where RULER's tasks were run, their average is one more. Points of one checkpoint with
its knob turned at inference and points trained at their own sparsity are different curves.
"""

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from data.task_sets import SUITES
from experiments.evaluation.tasks.decoding import DECODE
from experiments.figures.setpoints import is_as_trained, with_setpoints
from experiments.files import RESULTS, UNTRAINED, check_exists, files_below, read_rows
from experiments.intervals import LOSSES, SHARES, bar, stderr_of, unfiltered

HIGHER_IS_BETTER = {
    **dict.fromkeys(SHARES, True),
    **dict.fromkeys(LOSSES, False),
}
_READ = ("set", "text")  # columns that tell what was read: samples of a generated task, a folder's text and tokenizer
SOLVED = 0.99  # accuracy that the dense control must reach on synthetic recall


def title_of(data: str, *about: str | None) -> str:
    """What a panel is called by: the data, and what there is of task, length and form, in this order."""
    return ": ".join(filter(None, (data, ", ".join(filter(None, about)))))


class Panel(NamedTuple):
    """What is measured."""

    data: str
    task: str
    metric: str
    length: int
    variant: str

    @property
    def score(self) -> str:
        """What the scores are, for an axis."""
        scores = {"match": "share found", "nats": "nats (lower is better)"}
        return scores.get(self.metric, self.metric)

    @property
    def title(self) -> str:
        what = "validation loss" if self.task == "loss" else self.task
        return title_of(self.data, what, self.score, f"{self.length} tokens", self.variant)


@dataclass(frozen=True)
class Point:
    """One setting, over its seeds."""

    panel: Panel
    label: str  # the backend, or a variant of it
    trained_knob: float | None  # or ``AtSparsity``; None: dense, or not trained
    knob: float | None
    of_seed: Mapping[int, tuple[float, float]]  # seed -> (causal sparsity, score)
    of_samples: tuple[float, float] | None = None  # ``bar`` of a single seed

    @property
    def sparsity(self) -> float:
        return mean(sparsity for sparsity, _ in self.of_seed.values())

    @property
    def scores(self) -> list[float]:
        return [score for _, score in self.of_seed.values()]

    @property
    def score(self) -> float:
        return mean(self.scores)

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Lowest and highest of the seeds; of a single one, the interval over its samples."""
        return (min(self.scores), max(self.scores)) if len(self.of_seed) > 1 else self.of_samples

    def at_seed(self, seed: int) -> "Point":
        return replace(self, of_seed={seed: self.of_seed[seed]})

    @property
    def is_trained(self) -> bool:
        """Evaluated at the sparsity it was trained at, not with the knob turned at inference."""
        return is_as_trained(self.knob, self.trained_knob)


def load_rows(root: Path) -> list[dict]:
    """All rows of the run directories under ``root`` that a frontier shows, and RULER's averages.

    Raises:
        ValueError: there are none.
    """
    check_exists(root, "name a directory of evaluated runs")
    rows = [row for row in of_frontiers(read_results(root)) if not is_ablation(row)]
    if not rows:
        raise ValueError(f"no results under {root}: run a sweep or evaluate.py there first")
    return rows


def read_results(root: Path) -> list[dict]:
    """All rows of results.jsonl in a directory and below it, their ``run`` with where they lie."""
    return [
        row | {"run": str(path.parent.relative_to(root) / row.get("run", ""))}
        for path in files_below(root, RESULTS)
        for row in read_rows(path)
    ]


def of_frontiers(rows: Iterable[dict]) -> list[dict]:
    """Those that are one score of a whole task, the newest of each, and RULER's averages."""
    scores = [
        row
        for row in rows
        if unfiltered(row["metric"]) in HIGHER_IS_BETTER
        and row["position"] is None
        and row.get("depth") is None
        and row.get("part") is None
    ]
    rows = newest(scores)
    return rows + ruler_averages(rows)


def is_ablation(row: dict) -> bool:
    """Whether the row's label is FACTOR:VALUE: what differs from a default, and no line of a frontier."""
    return ":" in row["label"]


def newest(rows: Iterable[dict]) -> list[dict]:
    """Of rows that differ in the checkpoint's step only, those of the last step, and of one checkpoint the row written
    last; with sparsities as knobs, where they were asked for, and a ``variant``, which rows from before there were
    several lack. Other samples or another text make another measurement, and another device of times; other weights do
    at one step, since each step has its own."""
    keyed = [(_measured(row), row) for row in map(with_setpoints, rows)]
    last: dict[tuple, int] = {}
    for key, row in keyed:
        last[key] = max(row["step"], last.get(key, row["step"]))
    kept = {(*key, row.get("weights")): {"variant": None} | row for key, row in keyed if row["step"] == last[key]}
    return list(kept.values())


def _measured(row: dict) -> tuple:
    """What tells a row's measurement from others, but for the checkpoint."""
    names = (
        *("run", "label", "config_hash", "data", "task", "metric", "length", "rows", "seed", "knob", "variant"),
        *(("device",) if row["task"] == DECODE else ()),
    )
    within = ("probe", "position", "depth", "relevant", "part")  # of one evaluation
    return (*(row.get(name) for name in (*names, *_READ)), *(str(row.get(name)) for name in within))


def ruler_averages(rows: Sequence[dict]) -> list[dict]:
    """A row for every setting that has all RULER tasks which any setting has there; how many, its task says."""
    settings: dict[tuple, dict[str, dict]] = defaultdict(dict)
    for row in rows:
        if row["task"] in SUITES["ruler"]:
            names = ("data", "length", "variant", "rows", "label", "config_hash", "seed", "knob", "step")
            settings[tuple(row.get(name) for name in names)][row["task"]] = row
    asked: dict[tuple, set[str]] = defaultdict(set)
    for key, tasks in settings.items():
        asked[key[:4]] |= tasks.keys()
    averages = []
    for key, tasks in settings.items():
        if len(asked[key[:4]]) > 1 and tasks.keys() == asked[key[:4]]:
            means = {name: mean(row[name] for row in tasks.values()) for name in ("score", "causal_sparsity")}
            read = [row.get("bytes_read") for row in tasks.values()]
            means["bytes_read"] = None if None in read else mean(read)
            whole = "ruler" if len(tasks) == 13 else f"ruler ({len(tasks)} of 13 tasks)"
            averages.append(next(iter(tasks.values())) | means | scatter_of_mean(tasks.values()) | {"task": whole})
    return averages


def scatter_of_mean(rows: Collection[dict]) -> dict:
    """Of the mean of tasks, whose samples are drawn each for itself."""
    known = [stderr_of(row) for row in rows]
    if any(stderr is None for stderr, _ in known):
        return {"stderr": None, "samples": None}
    return {
        "stderr": math.hypot(*(stderr for stderr, _ in known)) / len(known),
        "samples": sum(samples for _, samples in known),
    }


def points(rows: Iterable[dict]) -> list[Point]:
    """The settings, each with all its seeds.

    Raises:
        ValueError: a seed has two results, from runs or numbers of rows that do not belong into one mean.
    """
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for row in rows:
        # Weights that nothing was trained of are so far off that beside them what was trained lies in one line.
        forms = filter(None, (row.get("variant"), UNTRAINED if row.get("untrained") else None))
        panel = Panel(row["data"], row["task"], row["metric"], row["length"], ", ".join(forms))
        groups[panel, row["label"], row["trained_knob"], row["knob"]].append(row)
    for (panel, *_), group in groups.items():
        check_seeds(group, panel.title)
    return [
        Point(
            panel,
            label,
            trained_knob,
            knob,
            {row["seed"]: (row["causal_sparsity"], row["score"]) for row in sorted(group, key=lambda row: row["seed"])},
            bar(group[0]) if len(group) == 1 else None,
        )
        for (panel, label, trained_knob, knob), group in groups.items()
    ]


def check_seeds(rows: Sequence[dict], what: str) -> None:
    """Refuses rows that would become one mean in which a seed counts twice.

    Raises:
        ValueError: with the mend.
    """
    first: dict[int, dict] = {}
    for row in rows:
        other = first.setdefault(row["seed"], row)
        if other is not row:
            names = ("run", "config_hash", "rows", "step", "weights", *_READ)
            differing = [name for name in names if row.get(name) != other.get(name)]
            how = f" (they differ in {', '.join(differing)})" if differing else ""
            how += f", from {other['run']} and {row['run']}" if "run" in differing else ""
            raise ValueError(
                f"two results of {row['label']} on {what}, knob {row['knob']}, seed {row['seed']}{how}: give one a "
                "label of its own (evaluate.py label=...), or the directory of one study only, or remove its rows"
            )


def curves(points: Iterable[Point]) -> dict[tuple, list[Point]]:
    """The curves of each panel: (panel, label, what the curve is) -> points.

    One checkpoint with its knob turned is a curve. Where a label was trained at several sparsities, its points there
    are one more. A curve has only those points that have the most seeds, since a mean over others is no neighbour of
    theirs.
    """
    grouped: dict[tuple, dict[float, list[Point]]] = defaultdict(lambda: defaultdict(list))
    for point in points:
        if point.knob is not None:
            grouped[point.panel, point.label][point.trained_knob].append(point)
    found = {}
    for (panel, label), checkpoints in sorted(grouped.items()):
        if len([knob for knob in checkpoints if knob is not None]) > 1:
            trained = [p for line in checkpoints.values() for p in line if p.is_trained]
            found[panel, label, "trained at each"] = _of_most_seeds(trained)
        for trained_knob, line in sorted(checkpoints.items(), key=lambda item: (item[0] is not None, item[0])):
            line = _of_most_seeds(line)
            if len(checkpoints) == 1 or len(line) > 1:
                trained = UNTRAINED if trained_knob is None else f"trained at {trained_knob:g}"
                is_said = trained_knob is None and label.endswith(UNTRAINED)
                found[panel, label, "knob turned" if is_said else f"{trained}, knob turned"] = line
    return {key: line for key, line in found.items() if line}


def _of_most_seeds(line: Sequence[Point]) -> list[Point]:
    seeds = max((p.of_seed.keys() for p in line), key=len, default=())
    return [p for p in line if p.of_seed.keys() == seeds]


def panels_to_draw(points: Iterable[Point]) -> list[Panel]:
    """Those in which a curve has several points: a study may measure much at one setting only. Without any, all."""
    points = list(points)
    lined = {panel for (panel, _, _), line in curves(points).items() if len(line) > 1}
    return sorted(lined or {p.panel for p in points})


def frontier(points: Iterable[Point]) -> list[Point]:
    """The points that no other beats in both sparsity and score, from dense to sparse."""
    points = list(points)
    higher = HIGHER_IS_BETTER[unfiltered(points[0].panel.metric)]
    kept, best = [], -math.inf
    for point in sorted(points, key=lambda p: (-p.sparsity, -p.score if higher else p.score)):
        value = point.score if higher else -point.score
        if value > best:
            kept.append(point)
            best = value
    return kept[::-1]


def interpolate(line: Sequence[Point], sparsity: float) -> float | None:
    """Score at a sparsity between two points of a frontier; None beyond its measured ends."""
    if len(line) == 1 and line[0].sparsity == sparsity:
        return line[0].score
    for left, right in pairwise(line):
        if left.sparsity <= sparsity <= right.sparsity:
            share = (sparsity - left.sparsity) / (right.sparsity - left.sparsity)
            return left.score + share * (right.score - left.score)
    return None


def score_at(line: Sequence[Point], sparsity: float) -> float | None:
    """Score that the measured points of a curve offer at a sparsity; None outside the span they cover.

    Below the frontier's first point, that point stands: it is sparser, and no other is better.
    """
    edge = frontier(line)
    if min(p.sparsity for p in line) <= sparsity < edge[0].sparsity:
        return edge[0].score
    return interpolate(edge, sparsity)


def scores_at(line: Sequence[Point], sparsity: float) -> list[float] | None:
    """``score_at`` of each seed's own curve; None unless all cover the sparsity."""
    found = [score_at([p.at_seed(seed) for p in line], sparsity) for seed in line[0].of_seed]
    return None if None in found else found


def common_span(lines: Iterable[Sequence[Point]]) -> tuple[float, float] | None:
    """The sparsities that every curve covers; None if there are none."""
    lines = list(lines)
    low = max(min(p.sparsity for p in line) for line in lines)
    high = min(max(p.sparsity for p in line) for line in lines)
    return (low, high) if low < high else None


def mean_score(line: Sequence[Point], low: float, high: float) -> float:
    """Area under the frontier between two sparsities that it covers, over their distance."""
    inner = [p.sparsity for p in frontier(line) if low < p.sparsity < high]
    xs = [low, *inner, high]
    scores = [score_at(line, x) for x in xs]
    return sum((b - a) * (x + y) / 2 for (a, b), (x, y) in zip(pairwise(xs), pairwise(scores), strict=True)) / (
        high - low
    )


def untrained(points: Iterable[Point]) -> set[tuple]:
    """Recall panels whose dense control is missing or has solved the task at no length: one that it was not trained at
    asks for more."""
    points = [p for p in points if p.panel.metric == "accuracy"]
    solved = {p.panel._replace(length=0) for p in points if p.knob is None and p.score >= SOLVED}
    return {p.panel for p in points if p.panel._replace(length=0) not in solved}
