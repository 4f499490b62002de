"""What figures share: one set of colours and marks, panels in rows, files that appear whole."""

import io
from collections.abc import Iterable
from pathlib import Path

from experiments.files import write_atomically

COLOURS = ("#c1272d", "#0071bc", "#e08a00", "#2e8b57", "#7b3f9e", "#8c6239", "#0b7a75", "#d1495b", "#30638e")
MARKS = ("o", "s", "^", "D", "v", "P")
COLUMNS = 3  # panels in a row, where a figure does not say


def pyplot():
    """matplotlib without a display, imported when a figure is drawn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def styles(labels: Iterable[str]) -> dict[str, tuple[str, str]]:
    """(colour, mark) of each line, by the alphabet."""
    return {label: (COLOURS[i % len(COLOURS)], MARKS[i % len(MARKS)]) for i, label in enumerate(sorted(set(labels)))}


def grid(panels: int, width: float = 5.6, height: float = 4.2, columns: int = COLUMNS):
    """A figure and its axes, one a panel; at most ``columns`` in a row."""
    columns = min(panels, columns)
    rows = -(-panels // columns)
    figure, axes = pyplot().subplots(
        rows, columns, figsize=(width * columns, height * rows), squeeze=False, layout="constrained"
    )
    for ax in axes.flat[panels:]:
        ax.remove()
    return figure, list(axes.flat[:panels])


def legend_below(figure, axes: Iterable, columns: int = 4) -> None:
    """One legend for all panels, under them: what many lines leave no corner free for."""
    named = {name: handle for ax in axes for handle, name in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named.keys(), fontsize=8, loc="outside lower center", ncols=columns)


def save(figure, path: Path) -> None:
    """``path`` with .png and with .pdf; closes the figure."""
    for kind in ("png", "pdf"):
        drawn = io.BytesIO()
        # No date in the file: the same rows give the same bytes.
        figure.savefig(drawn, format=kind, dpi=160, metadata={"CreationDate": None} if kind == "pdf" else None)
        write_atomically(path.with_name(f"{path.name}.{kind}"), drawn.getvalue())
    pyplot().close(figure)
