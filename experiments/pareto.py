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

from experiments.checkpoint import write_atomically
from experiments.errors import user_errors
from experiments.metrics import read_rows

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
    label: str  # of the line: the backend, or a variant of it
    curve: str  # "dense", "knob at inference" or "trained"
    knob: float | None
    sparsity: float
    score: float
    spread: float  # standard deviation over the seeds; 0 for one
    seeds: int


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
    """Means over seeds."""
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for row in rows:
        panel = (row["data"], row["metric"], row["length"])
        if row["knob"] is None:
            curve = "dense"
        elif row["knob"] == row["trained_knob"]:
            curve = "trained"
        else:
            curve = "knob at inference"
        groups[panel, row["label"], curve, row["trained_knob"], row["knob"]].append(row)
    return [
        Point(
            panel,
            label,
            curve,
            knob,
            mean(row["causal_sparsity"] for row in group),
            mean(row["score"] for row in group),
            stdev(row["score"] for row in group) if len(group) > 1 else 0.0,
            len({row["seed"] for row in group}),
        )
        for (panel, label, curve, _, knob), group in groups.items()
    ]


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
    for left, right in pairwise(line):
        if left.sparsity <= sparsity <= right.sparsity:
            share = (sparsity - left.sparsity) / (right.sparsity - left.sparsity)
            return left.score + share * (right.score - left.score)
    return None


def area(line: Sequence[Point]) -> float | None:
    """Mean score over the sparsities that a frontier spans (its area by the trapezoid rule, over its width)."""
    width = line[-1].sparsity - line[0].sparsity
    if width <= 0:
        return None
    return sum((b.sparsity - a.sparsity) * (a.score + b.score) / 2 for a, b in pairwise(line)) / width


def to_csv(points: Sequence[Point]) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(
        [
            "data",
            "metric",
            "length",
            "label",
            "curve",
            "knob",
            "causal_sparsity",
            "score",
            "spread",
            "seeds",
            "on_frontier",
        ]
    )
    on_frontier = {id(p) for line in lines(points).values() for p in frontier(line)}
    for p in points:
        writer.writerow(
            [*p.panel, p.label, p.curve, p.knob, p.sparsity, p.score, p.spread, p.seeds, id(p) in on_frontier]
        )
    return text.getvalue()


def lines(points: Iterable[Point]) -> dict[tuple, list[Point]]:
    """Points of each sparse label per panel: all its curves together make its frontier."""
    grouped: dict[tuple, list[Point]] = defaultdict(list)
    for point in points:
        if point.curve != "dense":
            grouped[point.panel, point.label].append(point)
    return dict(sorted(grouped.items()))


def title(panel: tuple[str, str, int]) -> str:
    data, metric, length = panel
    what = {"accuracy": "recall accuracy", "nats": "validation loss (nats)"}[metric]
    return f"{data}: {what}, {length} tokens"


def untrained(points: Iterable[Point]) -> set[tuple]:
    """Recall panels whose dense control is missing or has not solved the task."""
    points = list(points)
    panels = {p.panel for p in points if p.panel[1] == "accuracy"}
    return panels - {p.panel for p in points if p.curve == "dense" and p.score >= SOLVED}


def to_markdown(points: Sequence[Point]) -> str:
    """Every point, then each frontier at fixed sparsities."""
    out = []
    for panel in sorted({p.panel for p in points}):
        out.append(f"## {title(panel)}\n")
        if panel in untrained(points):
            out.append(
                f"**Untrained: the dense control does not reach {SOLVED:.0%}; nothing here compares backends.**\n"
            )
        out.append("| attention | knob | curve | causal sparsity | score | seeds |")
        out.append("|---|---|---|---|---|---|")
        inside = [p for p in points if p.panel == panel]
        for p in sorted(inside, key=lambda p: (p.curve != "dense", p.label, p.sparsity)):
            knob = "" if p.knob is None else f"{p.knob:g}"
            spread = f" ± {p.spread:.4f}" if p.seeds > 1 else ""
            out.append(f"| {p.label} | {knob} | {p.curve} | {p.sparsity:.1%} | {p.score:.4f}{spread} | {p.seeds} |")
        heads = " | ".join(f"at {s:.0%}" for s in AT_SPARSITIES)
        out.append(f"\n| frontier | {heads} | mean over its span |")
        out.append("|---|" + "---|" * (len(AT_SPARSITIES) + 1))
        for (line_panel, label), line in lines(points).items():
            if line_panel == panel:
                edge = frontier(line)
                scores = [interpolate(edge, s) for s in AT_SPARSITIES] + [area(edge)]
                shown = " | ".join("not measured" if s is None else f"{s:.4f}" for s in scores)
                out.append(f"| {label} | {shown} |")
        out.append("")
    return "\n".join(out) + "\n"


def draw(points: Sequence[Point], path: Path) -> None:
    """One panel per task: score against sparsity, a line per backend, the dense control as a level."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import PercentFormatter

    labels = sorted({label for _, label in lines(points)})
    style = {label: (COLOURS[i % len(COLOURS)], MARKS[i % len(MARKS)]) for i, label in enumerate(labels)}
    panels = sorted({p.panel for p in points})
    figure, axes = plt.subplots(1, len(panels), figsize=(5.6 * len(panels), 4.2), squeeze=False, layout="constrained")
    for ax, panel in zip(axes[0], panels, strict=True):
        for p in points:
            if p.panel == panel and p.curve == "dense":
                ax.axhline(p.score, color="#444444", linestyle="--", linewidth=1, label=f"{p.label} (dense)")
        for (line_panel, label), line in lines(points).items():
            if line_panel != panel:
                continue
            edge = frontier(line)
            colour, mark = style[label]
            ax.plot([p.sparsity for p in edge], [p.score for p in edge], color=colour, linewidth=1.5, label=label)
            for p in line:
                face = colour if p.curve == "trained" else "white"
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
        unique = dict(zip([*names, "trained at this sparsity", "knob turned at inference"], handles, strict=True))
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
