"""From rows to frontiers: ``python -m experiments.figures.pareto outputs/NAME`` writes pareto.{md,csv,png,pdf} there.

Reads only results.jsonl of the run directories below. The x axis is measured causal sparsity.
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean

from experiments.arguments import parse
from experiments.errors import user_errors
from experiments.figures.frontier import (
    SOLVED,
    Panel,
    Point,
    common_span,
    curves,
    frontier,
    load_rows,
    mean_score,
    panels_to_draw,
    points,
    scores_at,
    untrained,
)
from experiments.files import to_csv, write_atomically
from experiments.plots import COLUMNS as PANEL_COLUMNS
from experiments.plots import grid, pyplot, save, styles

AT_SPARSITIES = (0.5, 0.75, 0.9, 0.95)
COLUMNS = [*Panel._fields, "label", "trained_knob", "knob", "causal_sparsity", "score"]


def table(points: Sequence[Point]) -> list[dict]:
    """A row for every point, with a column for the score of every seed."""
    return [
        dict(
            zip(COLUMNS, [*p.panel, p.label, p.trained_knob, p.knob, p.sparsity, p.score], strict=True),
            **{f"seed {seed}": p.of_seed[seed][1] if seed in p.of_seed else None for seed in _seeds(points)},
        )
        for p in points
    ]


def to_markdown(points: Sequence[Point]) -> str:
    """Every point, then each frontier at fixed sparsities."""
    out = []
    for panel in sorted({p.panel for p in points}):
        out.append(f"## {panel.title}\n")
        if panel in untrained(points):
            out.append(
                f"**Untrained: the dense control does not reach {SOLVED:.0%}; nothing here compares backends.**\n"
            )
        inside = [p for p in points if p.panel == panel]
        seeds = _seeds(inside)
        out.append("| attention | trained at | evaluated at | causal sparsity | score | " + _cells("seed {}", seeds))
        out.append("|---|---|---|---|---|" + "---|" * len(seeds))
        for p in sorted(inside, key=lambda p: (p.knob is not None, p.label, p.trained_knob or 0, p.sparsity)):
            trained = "untrained" if p.trained_knob is None else f"{p.trained_knob:g}"
            knobs = " | | " if p.knob is None else f" | {trained} | {p.knob:g} "
            each = [f"{p.of_seed[seed][1]:.4f}" if seed in p.of_seed else "missing" for seed in seeds]
            out.append(f"| {p.label}{knobs}| {p.sparsity:.1%} | {p.score:.4f} | " + _cells("{}", each))
        lines = {key[1:]: line for key, line in curves(inside).items()}
        if lines:
            span = common_span(lines.values())
            where = "no span in common" if span is None else f"mean over {span[0]:.0%}-{span[1]:.0%}"
            out.append("\n| frontier | curve | " + _cells("at {:.0%}", AT_SPARSITIES) + f" {where} |")
            out.append("|---|---|" + "---|" * (len(AT_SPARSITIES) + 1))
        for (label, curve), line in lines.items():
            read = [scores_at(line, s) for s in AT_SPARSITIES]
            shown = ["not measured" if scores is None else _with_seeds(scores) for scores in read]
            shown.append("not measured" if span is None else f"{mean_score(line, *span):.4f}")
            out.append(f"| {label} | {curve} | " + _cells("{}", shown))
        if lines and len(seeds) > 1:
            out.append("\nIn brackets, each seed's own frontier.")
        out.append("")
    return "\n".join(out) + "\n"


def _seeds(points: Iterable[Point]) -> list[int]:
    return sorted({seed for p in points for seed in p.of_seed})


def _cells(form: str, values: Iterable) -> str:
    return " | ".join(form.format(value) for value in values) + " |"


def _with_seeds(scores: Sequence[float]) -> str:
    each = f" ({', '.join(f'{score:.3f}' for score in scores)})" if len(scores) > 1 else ""
    return f"{mean(scores):.4f}{each}"


def draw(points: Sequence[Point], path: Path) -> None:
    """One panel per task that has lines: score against sparsity, a line per backend, the dense control as a level."""
    plt = pyplot()
    from matplotlib.ticker import PercentFormatter

    style = styles(p.label for p in points if p.knob is not None)
    panels = panels_to_draw(points)
    figure, axes = grid(len(panels), width=7.2 if len(panels) == 1 else 5.6, height=5.2)
    most = max(len(p.of_seed) for p in points)
    legend = {}
    for ax, panel in zip(axes, panels, strict=True):
        inside = [p for p in points if p.panel == panel]
        for p in inside:
            if p.knob is None:
                ax.axhline(p.score, color="#444444", linestyle="--", linewidth=1, label=f"{p.label} (dense)")
                continue
            colour, mark = style[p.label]
            ax.vlines(p.sparsity, min(p.scores), max(p.scores), color=colour, linewidth=1)
            ax.plot(
                p.sparsity,
                p.score,
                mark,
                color=colour,
                markerfacecolor=colour if p.is_trained else "white",
                markersize=6 if len(p.of_seed) == most else 3,
            )
        for (_, label, curve), line in curves(inside).items():
            edge = frontier(line)
            turned = curve.endswith("knob turned")
            ax.plot(
                [p.sparsity for p in edge],
                [p.score for p in edge],
                color=style[label][0],
                linestyle=":" if turned else "-",
                linewidth=1.5,
                label=f"{label}, {curve.removesuffix(', knob turned')}",
            )
        if panel.metric == "accuracy":
            _stretch(ax)
        note = "\nuntrained: dense control below 99 %" if panel in untrained(points) else ""
        ax.set_title(panel.title + note, fontsize=10)
        ax.set_xlabel("measured causal sparsity")
        ax.xaxis.set_major_formatter(PercentFormatter(1.0))
        ax.set_xlim(right=1.0)
        ax.grid(alpha=0.25)
        handles, names = ax.get_legend_handles_labels()
        legend |= dict(zip(names, handles, strict=True))

    def gray(**changes):
        return plt.Line2D([], [], color="gray", **{"marker": "o", "linestyle": ""} | changes)

    legend["evaluated as trained"] = gray()
    legend["knob turned at inference"] = gray(markerfacecolor="white")
    if most > 1:
        legend[f"lowest to highest of {most} seeds"] = gray(marker="|", markersize=12)
    if any(len(p.of_seed) < most for p in points):
        legend["fewer seeds"] = gray(markersize=3)
    # Below the panels: ten lines leave no corner free.
    columns = max(3, 2 * min(len(panels), PANEL_COLUMNS))
    figure.legend(legend.values(), legend.keys(), fontsize=8, ncols=columns, loc="outside lower center")
    save(figure, path)


def _stretch(ax) -> None:
    """Scores near 1, where the curves differ, apart: the axis is logarithmic in the distance from 1.01."""
    import numpy as np

    ax.set_yscale("function", functions=(lambda y: -np.log(np.maximum(1.01 - y, 1e-3)), lambda z: 1.01 - np.exp(-z)))
    ax.set_yticks([0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.98, 1.0])
    ax.set_ylim(top=1.002)
    ax.set_ylabel("logarithmic towards 1")


def main(arguments: Sequence[str]) -> None:
    with user_errors():
        root = parse("experiments.figures.pareto", arguments).directory
        found = points(load_rows(root))
        text = to_markdown(found)
        write_atomically(root / "pareto.md", text)
        write_atomically(root / "pareto.csv", to_csv(table(found)))
        draw(found, root / "pareto")
    print(text)
    print(f"{root / 'pareto.png'} and .pdf, pareto.md, pareto.csv")


if __name__ == "__main__":
    main(sys.argv[1:])
