"""From rows to frontiers: ``python -m experiments.pareto outputs/NAME`` writes pareto.{md,csv,png,pdf} there.

Reads only results.jsonl of the run directories below. The x axis is measured causal sparsity.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.errors import user_errors
from experiments.files import to_csv, write_atomically
from experiments.frontier import (
    SOLVED,
    Panel,
    Point,
    common_span,
    curves,
    frontier,
    load_rows,
    mean_score,
    points,
    score_at,
    untrained,
)
from experiments.plots import COLUMNS as PANEL_COLUMNS
from experiments.plots import grid, pyplot, save, styles

AT_SPARSITIES = (0.5, 0.75, 0.9, 0.95)
COLUMNS = [*Panel._fields, "label", "trained_knob", "knob", "causal_sparsity", "score", "spread", "seeds"]


def table(points: Sequence[Point]) -> list[dict]:
    """A row for every point."""
    return [
        dict(
            zip(
                COLUMNS,
                [*p.panel, p.label, p.trained_knob, p.knob, p.sparsity, p.score, p.spread, p.seeds],
                strict=True,
            )
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
    plt = pyplot()
    from matplotlib.ticker import PercentFormatter

    style = styles(p.label for p in points if p.knob is not None)
    panels = sorted({p.panel for p in points})
    figure, axes = grid(len(panels), height=5.2)
    legend = {}
    for ax, panel in zip(axes, panels, strict=True):
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
                label=f"{label}, {curve.removesuffix(', knob turned')}",
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
        ax.set_title(panel.title + note, fontsize=10)
        ax.set_xlabel("measured causal sparsity")
        ax.xaxis.set_major_formatter(PercentFormatter(1.0))
        ax.set_xlim(right=1.0)
        ax.grid(alpha=0.25)
        handles, names = ax.get_legend_handles_labels()
        legend |= dict(zip(names, handles, strict=True))
    legend["evaluated as trained"] = plt.Line2D([], [], color="gray", marker="o", linestyle="")
    legend["knob turned at inference"] = plt.Line2D(
        [], [], color="gray", marker="o", linestyle="", markerfacecolor="white"
    )
    # Below the panels: ten lines leave no corner free.
    columns = 2 * min(len(panels), PANEL_COLUMNS)
    figure.legend(legend.values(), legend.keys(), fontsize=8, ncols=columns, loc="outside lower center")
    save(figure, path)


def main(arguments: Sequence[str]) -> None:
    with user_errors():
        if len(arguments) != 1:
            raise ValueError("usage: python -m experiments.pareto DIRECTORY_OF_RUNS")
        root = Path(arguments[0])
        found = points(load_rows(root))
        text = to_markdown(found)
        write_atomically(root / "pareto.md", text)
        write_atomically(root / "pareto.csv", to_csv(table(found)))
        draw(found, root / "pareto")
    print(text)
    print(f"{root / 'pareto.png'} and .pdf, pareto.md, pareto.csv")


if __name__ == "__main__":
    main(sys.argv[1:])
