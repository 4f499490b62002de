"""From rows to frontiers: ``python -m experiments.pareto outputs/NAME`` writes pareto.{md,csv,png,pdf} there.

Reads only results.jsonl of the run directories below. The x axis is measured causal sparsity. Points of one
checkpoint with its knob turned at inference and points trained at their own sparsity are different curves.
"""

import csv
import io
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev

from experiments.errors import user_errors
from experiments.files import read_rows, write_atomically

RESULTS = "results.jsonl"
HIGHER_IS_BETTER = {"accuracy": True, "nats": False}
AT_SPARSITIES = (0.5, 0.75, 0.9, 0.95)
COLOURS = ("#c1272d", "#0071bc", "#e08a00", "#2e8b57", "#7b3f9e", "#8c6239")
MARKS = ("o", "s", "^", "D", "v", "P")
SOLVED = 0.99  # accuracy that the dense control must reach on synthetic recall


@dataclass(frozen=True)
class Point:
    """One setting, over its seeds."""

    panel: tuple[str, str, int]  # data, metric, length
    label: str  # the backend, or a variant of it
    trained_knob: float | None  # None: dense
    knob: float | None
    sparsity: float
    score: float
    spread: float  # standard deviation over the seeds; 0 for one
    seeds: int

    @property
    def is_trained(self) -> bool:
        """Evaluated at the sparsity it was trained at, not with the knob turned at inference."""
        return self.knob == self.trained_knob


def load_rows(root: Path) -> list[dict]:
    """All rows of the run directories under ``root`` that a frontier shows.

    Raises:
        ValueError: there are none.
    """
    rows = [row for path in sorted(root.rglob(RESULTS)) for row in read_rows(path) if row["position"] is None]
    if not rows:
        raise ValueError(f"no results under {root}: run a sweep or evaluate.py there first")
    return newest(rows)


def newest(rows: Iterable[dict]) -> list[dict]:
    """Of rows that differ in the checkpoint's step only, those of the last step."""
    kept: dict[tuple, dict] = {}
    for row in rows:
        key = tuple(row[k] for k in ("label", "config_hash", "task", "length", "rows", "seed", "knob"))
        if key not in kept or row["step"] >= kept[key]["step"]:
            kept[key] = row
    return list(kept.values())


def points(rows: Iterable[dict]) -> list[Point]:
    """Means over seeds.

    Raises:
        ValueError: a seed has two results, from runs or numbers of rows that do not belong into one mean.
    """
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for row in rows:
        panel = (row["data"], row["metric"], row["length"])
        group = groups[panel, row["label"], row["trained_knob"], row["knob"]]
        if any(row["seed"] == other["seed"] for other in group):
            raise ValueError(
                f"two results of {row['label']} on {title(panel)}, knob {row['knob']}, seed {row['seed']}: give one "
                "a label of its own (evaluate.py label=...), or the directory of one study only"
            )
        group.append(row)
    return [
        Point(
            panel,
            label,
            trained_knob,
            knob,
            mean(row["causal_sparsity"] for row in group),
            mean(row["score"] for row in group),
            stdev(row["score"] for row in group) if len(group) > 1 else 0.0,
            len(group),
        )
        for (panel, label, trained_knob, knob), group in groups.items()
    ]


def curves(points: Iterable[Point]) -> dict[tuple, list[Point]]:
    """The curves of each panel: (panel, label, what the curve is) -> points.

    One checkpoint with its knob turned is a curve. Where a label was trained at several sparsities, its points there
    are one more.
    """
    grouped: dict[tuple, dict[float, list[Point]]] = defaultdict(lambda: defaultdict(list))
    for point in points:
        if point.knob is not None:
            grouped[point.panel, point.label][point.trained_knob].append(point)
    found = {}
    for (panel, label), checkpoints in sorted(grouped.items()):
        if len(checkpoints) > 1:
            trained = [p for line in checkpoints.values() for p in line if p.is_trained]
            found[panel, label, "trained at each"] = trained
        for trained_knob, line in sorted(checkpoints.items()):
            if len(checkpoints) == 1 or len(line) > 1:
                found[panel, label, f"trained at {trained_knob:g}, knob turned"] = line
    return {key: line for key, line in found.items() if line}


def frontier(points: Iterable[Point]) -> list[Point]:
    """The points that no other beats in both sparsity and score, from dense to sparse."""
    points = list(points)
    higher = HIGHER_IS_BETTER[points[0].panel[1]]
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


COLUMNS = ["data", "metric", "length", "label", "trained_knob", "knob", "causal_sparsity", "score", "spread", "seeds"]


def to_csv(points: Sequence[Point]) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    writer.writerows(
        [*p.panel, p.label, p.trained_knob, p.knob, p.sparsity, p.score, p.spread, p.seeds] for p in points
    )
    return text.getvalue()


def title(panel: tuple[str, str, int]) -> str:
    data, metric, length = panel
    what = {"accuracy": "recall accuracy", "nats": "validation loss (nats, lower is better)"}[metric]
    return f"{data}: {what}, {length} tokens"


def untrained(points: Iterable[Point]) -> set[tuple]:
    """Recall panels whose dense control is missing or has not solved the task."""
    points = list(points)
    panels = {p.panel for p in points if p.panel[1] == "accuracy"}
    return panels - {p.panel for p in points if p.knob is None and p.score >= SOLVED}


def to_markdown(points: Sequence[Point]) -> str:
    """Every point, then each frontier at fixed sparsities."""
    out = []
    for panel in sorted({p.panel for p in points}):
        out.append(f"## {title(panel)}\n")
        if panel in untrained(points):
            out.append(
                f"**Untrained: the dense control does not reach {SOLVED:.0%}; nothing here compares backends.**\n"
            )
        out.append("| attention | trained at | evaluated at | causal sparsity | score | seeds |")
        out.append("|---|---|---|---|---|---|")
        inside = [p for p in points if p.panel == panel]
        for p in sorted(inside, key=lambda p: (p.knob is not None, p.label, p.trained_knob or 0, p.sparsity)):
            knobs = " | | " if p.knob is None else f" | {p.trained_knob:g} | {p.knob:g} "
            spread = f" ± {p.spread:.4f}" if p.seeds > 1 else ""
            out.append(f"| {p.label}{knobs}| {p.sparsity:.1%} | {p.score:.4f}{spread} | {p.seeds} |")
        lines = {key[1:]: line for key, line in curves(inside).items()}
        if lines:
            span = common_span(lines.values())
            where = "no span in common" if span is None else f"mean over {span[0]:.0%}-{span[1]:.0%}"
            heads = " | ".join(f"at {s:.0%}" for s in AT_SPARSITIES)
            out.append(f"\n| frontier | curve | {heads} | {where} |")
            out.append("|---|---|" + "---|" * (len(AT_SPARSITIES) + 1))
        for (label, curve), line in lines.items():
            scores = [score_at(line, s) for s in AT_SPARSITIES]
            scores.append(None if span is None else mean_score(line, *span))
            shown = " | ".join("not measured" if s is None else f"{s:.4f}" for s in scores)
            out.append(f"| {label} | {curve} | {shown} |")
        out.append("")
    return "\n".join(out) + "\n"


def draw(points: Sequence[Point], path: Path) -> None:
    """One panel per task: score against sparsity, a line per backend, the dense control as a level."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import PercentFormatter

    labels = sorted({p.label for p in points if p.knob is not None})
    style = {label: (COLOURS[i % len(COLOURS)], MARKS[i % len(MARKS)]) for i, label in enumerate(labels)}
    panels = sorted({p.panel for p in points})
    figure, axes = plt.subplots(1, len(panels), figsize=(5.6 * len(panels), 4.2), squeeze=False, layout="constrained")
    for ax, panel in zip(axes[0], panels, strict=True):
        inside = [p for p in points if p.panel == panel]
        for p in inside:
            if p.knob is None:
                ax.axhline(p.score, color="#444444", linestyle="--", linewidth=1, label=f"{p.label} (dense)")
        for (_, label, curve), line in curves(inside).items():
            edge = frontier(line)
            colour, mark = style[label]
            turned = curve.endswith("knob turned")
            ax.plot(
                [p.sparsity for p in edge],
                [p.score for p in edge],
                color=colour,
                linestyle=":" if turned else "-",
                linewidth=1.5,
                label=f"{label}, {curve}",
            )
            for p in line:
                face = colour if p.is_trained else "white"
                ax.errorbar(
                    p.sparsity,
                    p.score,
                    yerr=p.spread or None,
                    fmt=mark,
                    color=colour,
                    markerfacecolor=face,
                    markersize=6,
                )
        note = "\nuntrained: dense control below 99 %" if panel in untrained(points) else ""
        ax.set_title(title(panel) + note, fontsize=10)
        ax.set_xlabel("measured causal sparsity")
        ax.xaxis.set_major_formatter(PercentFormatter(1.0))
        ax.set_xlim(right=1.0)
        ax.grid(alpha=0.25)
        handles, names = ax.get_legend_handles_labels()
        handles += [
            plt.Line2D([], [], color="gray", marker="o", linestyle=""),
            plt.Line2D([], [], color="gray", marker="o", linestyle="", markerfacecolor="white"),
        ]
        unique = dict(zip([*names, "evaluated as trained", "knob turned at inference"], handles, strict=True))
        ax.legend(unique.values(), unique.keys(), fontsize=8)
    for suffix in (".png", ".pdf"):
        temporary = path.with_name(f".{path.name}{suffix}")
        figure.savefig(temporary, dpi=160)
        temporary.replace(path.with_suffix(suffix))
    plt.close(figure)


def main(arguments: Sequence[str]) -> None:
    with user_errors():
        if len(arguments) != 1:
            raise ValueError("usage: python -m experiments.pareto DIRECTORY_OF_RUNS")
        root = Path(arguments[0])
        found = points(load_rows(root))
        table = to_markdown(found)
        write_atomically(root / "pareto.md", table)
        write_atomically(root / "pareto.csv", to_csv(found))
        draw(found, root / "pareto")
    print(table)
    print(f"{root / 'pareto.png'} and .pdf, pareto.md, pareto.csv")


if __name__ == "__main__":
    main(sys.argv[1:])
