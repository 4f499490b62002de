"""What runs scored, for their report: curves against measured sparsity, and a table of every row."""

from collections.abc import Mapping, Sequence
from html import escape

from experiments.evaluation.display import describe, place_of, with_interval
from experiments.figures.frontier import of_frontiers, points
from experiments.intervals import bar

Style = tuple[str, str]  # colour and mark


def draw_scores(ax, inside: Mapping[str, Sequence[dict]], style: Mapping[str, Style]) -> None:
    """A panel: rows of one task at one length, by run, with their intervals."""
    for run, rows in inside.items():
        colour, mark = style[run]
        rows = sorted(rows, key=lambda row: row["causal_sparsity"])
        xs, ys = [row["causal_sparsity"] for row in rows], [row["score"] for row in rows]
        ax.plot(xs, ys, color=colour, marker=mark, markersize=5, linewidth=1.2)
        for x, bounds in zip(xs, map(bar, rows), strict=True):
            if bounds is not None:
                ax.vlines(x, *bounds, color=colour, linewidth=1)


def panels(evaluations: Mapping[str, Sequence[dict]]) -> dict[tuple[str, str], dict[str, list[dict]]]:
    """(title, what the scores are) -> rows by run: of whole tasks, in which a run has scores at several sparsities."""
    found: dict[tuple[str, str], dict[str, list[dict]]] = {}
    for run, rows in evaluations.items():
        for row in of_frontiers(rows):
            (point,) = points([row])
            found.setdefault((point.panel.title, point.panel.score), {}).setdefault(run, []).append(row)
    return {key: runs for key, runs in sorted(found.items()) if any(len(rows) > 1 for rows in runs.values())}


def table(evaluations: Mapping[str, Sequence[dict]]) -> str:
    """HTML: a line a row, newest evaluations alone."""
    head = "".join(f"<th>{name}</th>" for name in ("run", "score of", "tokens", "knob", "sparsity", "score [95 %]"))
    lines = []
    for run, rows in evaluations.items():
        for row in rows:
            cells = (
                run,
                describe(row),
                row["length"],
                place_of(row),
                f"{row['causal_sparsity']:.1%}",
                with_interval(row),
            )
            lines.append("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in cells) + "</tr>")
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(lines)}</table></div>'
