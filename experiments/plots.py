"""What figures share: a colour and a mark for each method, panels in rows, files that appear whole."""

import io
import re
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path

from experiments.files import write_atomically

# Told apart by readers who see colours otherwise (Okabe and Ito, 2008); without yellow, which no line shows on white.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILLION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#999999"
COLOURS = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY, GREY)
# Those that no method has, or few, stand first: they are what other lines are given.
MARKS = ("P", "h", "d", "<", ">", "v", "p", "X", "*", "o", "s", "^", "D")
# Of each method, in every figure; the sink is sky blue, a raw prior a square. The last four are routers by what they
# select with (configs/sweep/routers.yaml).
METHODS = {
    "full": (BLACK, "x"),
    "dash": (BLUE, "o"),
    "dash-raw": (VERMILLION, "s"),
    "dash-fine": (BLUE, "p"),
    "dash-sink": (SKY, "o"),
    "dash-sink-raw": (SKY, "s"),
    "dash-sink-window": (SKY, "X"),
    "dash-topk": (PURPLE, "v"),
    "dash-topk-sink": (PURPLE, "o"),
    "dash-topk-sink-tempered": (PURPLE, "D"),
    "dash-topp": (PURPLE, "<"),
    "dash-topp-sink": (PURPLE, ">"),
    "infllmv2": (GREEN, "D"),
    "nsa": (ORANGE, "^"),
    "indexer": (VERMILLION, "*"),
    "moba": (GREEN, "p"),
    "hils": (PURPLE, "*"),
    "sink-window": (GREY, "X"),
    "oracle": (BLACK, "*"),
    "oracle-topk": (BLACK, "*"),
    "block-sparse": (GREY, "d"),
    "released-dashattention": (SKY, "*"),
    "fla-nsa": (ORANGE, "<"),
    "xunhaolai-nsa": (ORANGE, "v"),
    "xunhaolai-nsa,-no-window": (ORANGE, ">"),
    "entmax": (BLUE, "D"),
    "topk": (PURPLE, "s"),
    "topp": (SKY, "^"),
    "index": (VERMILLION, "D"),
}
_MARKED = {name: re.compile(rf"(^|[-,:]){re.escape(name)}($|[-,:(])") for name in METHODS}
COLUMNS = 3  # panels in a row, where a figure does not say
WIDTH, HEIGHT = 4.1, 3.2  # inches of a panel: three are as wide as a laptop's window, with letters that can be read


def pyplot():
    """matplotlib without a display, imported when a figure is drawn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def method_of(label: str) -> str | None:
    """The method that a line's label or a run's name is about; None if it names none."""
    plain = re.sub(r"[_ ]", "-", label.lower())
    return max((name for name, found in _MARKED.items() if found.search(plain)), key=len, default=None)


def styles(labels: Iterable[str]) -> dict[str, tuple[str, str]]:
    """(colour, mark) of each line. A method has its own everywhere; of several lines of one, the colour is the same and
    the shortest label has the mark. What names no method gets what is left, by the alphabet: neighbours differ in both.
    """
    found: dict[str, tuple[str, str]] = {}
    free = [
        (colour, MARKS[(number + turn) % len(MARKS)])
        for turn in range(len(MARKS))
        for number, colour in enumerate((*COLOURS, BLACK))
    ]
    named = {label: method_of(label) for label in set(labels)}
    for label in sorted(named, key=lambda label: (named[label] is None, len(label), label)):
        taken = set(found.values())
        if named[label] is None:
            options = [style for style in free if style not in METHODS.values()]
        else:
            own = METHODS[named[label]]
            options = [own, *((own[0], mark) for mark in MARKS if (own[0], mark) not in METHODS.values())]
        found[label] = next((style for style in options if style not in taken), options[len(found) % len(options)])
    return found


def grid(panels: int, width: float = WIDTH, height: float = HEIGHT, columns: int = COLUMNS):
    """A figure and its axes, one a panel; at most ``columns`` in a row. A single one is wide enough for a legend."""
    columns = min(panels, columns)
    width = width if columns > 1 else max(width, 7.2)
    rows = -(-panels // columns)
    figure, axes = pyplot().subplots(
        rows, columns, figsize=(width * columns, height * rows), squeeze=False, layout="constrained"
    )
    for ax in axes.flat[panels:]:
        ax.remove()
    return figure, list(axes.flat[:panels])


def entitle(ax, text: str) -> None:
    """The panel's title, in lines that fit over it."""
    ax.set_title("\n".join(textwrap.fill(line, 54) for line in text.split("\n")), fontsize=9)


def from_zero(ax) -> None:
    """The values of lines that are drawn, from 0 up to where the highest mark stands whole."""
    ax.set_ylim(0, 1.08 * max(max(line.get_ydata()) for line in ax.lines))


def plain_log(axis) -> None:
    """Numbers instead of powers on a logarithmic axis, once its lines are drawn."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())


def handles_of(axes: Iterable) -> dict[str, object]:
    """What the panels' lines are called, and how they are drawn."""
    return {name: handle for ax in axes for handle, name in zip(*ax.get_legend_handles_labels(), strict=True)}


def legend_below(figure, handles: Mapping[str, object], columns: int | None = None) -> None:
    """One legend for all panels, under them: what many lines leave no corner free for. In ``columns``, by default as
    many as short names take, or in fewer where it would be wider than the figure."""
    renderer = figure.canvas.get_renderer()
    for count in range(columns or int(figure.get_figwidth() // 3), 0, -1):
        legend = figure.legend(handles.values(), handles.keys(), fontsize=8, loc="outside lower center", ncols=count)
        if count == 1 or legend.get_window_extent(renderer).width <= figure.bbox.width:
            return
        legend.remove()


def save(figure, path: Path) -> None:
    """``path`` with .png and with .pdf; closes the figure."""
    for kind in ("png", "pdf"):
        drawn = io.BytesIO()
        # No date in the file: the same rows give the same bytes.
        figure.savefig(drawn, format=kind, dpi=160, metadata={"CreationDate": None} if kind == "pdf" else None)
        write_atomically(path.with_name(f"{path.name}.{kind}"), drawn.getvalue())
    pyplot().close(figure)
