"""From rows to frontiers: ``python -m experiments.figures.pareto outputs/NAME`` writes pareto.{md,csv,png,pdf} there.

Reads only results.jsonl of the run directories below. The x axis is measured causal sparsity.
"""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    load_rows,
    mean_score,
    panels_to_draw,
    points,
    scores_at,
    untrained,
)
from experiments.files import UNTRAINED, to_csv, write_atomically
from experiments.intervals import LOSSES, unfiltered
from experiments.plots import BLACK, WIDTH, entitle, grid, legend_below, pyplot, save, styles
from experiments.plots import COLUMNS as PANEL_COLUMNS

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
                f"**No dense control of {SOLVED:.0%} or more: whether the task was learned is not shown here.**\n"
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

    panels = panels_to_draw(points)
    points = [p for p in points if p.panel in panels]
    style = styles(p.label for p in points if p.knob is not None)
    figure, axes = grid(len(panels), width=7.2 if len(panels) == 1 else WIDTH, height=4.8 if len(panels) == 1 else 3.8)
    most = max(len(p.of_seed) for p in points)
    legend = {}
    for ax, panel in zip(axes, panels, strict=True):
        inside = [p for p in points if p.panel == panel]
        show = _as_errors(ax) if panel.metric == "accuracy" else lambda score: score
        legend |= _draw_points(ax, inside, show, style, most) | _draw_curves(ax, inside, show, style)
        note = "\nno dense control of 99 % or more" if panel in untrained(points) else ""
        entitle(ax, panel.title + note)
        if panel.metric != "accuracy":
            ax.set_ylabel(panel.score)
        ax.set_xlabel("measured causal sparsity")
        ax.xaxis.set_major_formatter(PercentFormatter(1.0))
        ax.set_xlim(right=1.0)
        ax.grid(alpha=0.25)

    def gray(**changes):
        return plt.Line2D([], [], color="gray", **{"marker": "o", "linestyle": ""} | changes)

    legend["evaluated as trained"] = gray()
    legend["knob turned at inference"] = gray(markerfacecolor="white")
    legend |= {text: gray(marker="|", markersize=12) for text in [bars(points)] if text}
    if any(len(p.of_seed) < most for p in points):
        legend["fewer seeds"] = gray(markersize=3)
    if any(p.bounds is None and p.knob is not None and unfiltered(p.panel.metric) not in LOSSES for p in points):
        legend["no bar: samples' scatter not kept"] = gray(marker="")
    # Below the panels: ten lines leave no corner free.
    legend_below(figure, legend, columns=3 if len(panels) < PANEL_COLUMNS else 4)
    save(figure, path)


def _draw_points(ax, points: Sequence[Point], show: Callable, style: Mapping, most: int) -> dict[str, object]:
    """Of one panel, small where they have fewer than the ``most`` seeds; returns what the legend says of levels."""
    levels = {}
    for p in points:
        bounds = None if p.bounds is None else [show(bound) for bound in p.bounds]
        if p.knob is None:
            dashes = "-." if UNTRAINED in p.label else "--"
            levels[f"{p.label} (dense)"] = ax.axhline(show(p.score), color=BLACK, linestyle=dashes, linewidth=1)
            if bounds is not None:
                ax.axhspan(*bounds, color=BLACK, alpha=0.08, linewidth=0)
            continue
        colour, mark = style[p.label]
        if bounds is not None:
            ax.vlines(p.sparsity, *bounds, color=colour, linewidth=1)
        face, size = colour if p.is_trained else "white", 6 if len(p.of_seed) == most else 3
        ax.plot(p.sparsity, show(p.score), mark, color=colour, markerfacecolor=face, markersize=size)
    return levels


def _draw_curves(ax, points: Sequence[Point], show: Callable, style: Mapping) -> dict[str, object]:
    """Of one panel; returns what the legend says of them."""
    plt, lines = pyplot(), {}
    for (_, label, curve), line in curves(points).items():
        line = sorted(line, key=lambda p: p.sparsity)
        colour, mark = style[label]
        turned = "-." if UNTRAINED in f"{label}, {curve}" else ":"
        own = {"color": colour, "linestyle": turned if curve.endswith("knob turned") else "-", "linewidth": 1.5}
        ax.plot([p.sparsity for p in line], [show(p.score) for p in line], **own)
        # With its mark, filled as it is of most of the line.
        face = colour if curve == "trained at each" else "white"
        named = f"{label}, {curve.removesuffix(', knob turned')}"
        lines[named] = plt.Line2D([], [], marker=mark, markerfacecolor=face, **own)
    return lines


def bars(points: Iterable[Point]) -> str:
    """What the bars of points show; nothing where there are none."""
    kinds = {len(p.of_seed) for p in points if p.bounds is not None}
    seeds = f"lowest to highest of {max(kinds)} seeds" if max(kinds, default=1) > 1 else ""
    return "; ".join(filter(None, [seeds, "95 % interval over samples" if 1 in kinds else ""]))


def _as_errors(ax) -> Callable[[float], float]:
    """For accuracies near 1, where the curves differ: an axis of wrong answers, logarithmic above a half percent.
    Returns what an accuracy is on it."""
    from matplotlib.ticker import FixedLocator, NullLocator

    ax.set_yscale("symlog", linthresh=0.005, linscale=0.4)
    ax.yaxis.set_major_locator(FixedLocator([0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1]))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
    ax.set_ylim(1.1, -0.0008)  # fewer are better, and better is up
    ax.set_ylabel("queries answered wrong")
    return lambda score: 1 - score


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
