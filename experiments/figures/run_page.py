"""Report page: report.html in the first of the runs that are given.

    python -m experiments.figures.run_page outputs/run [outputs/other ...]

One file that needs nothing else: the curves of all runs in the same panels, the sparsity of every layer over the
training, what they scored, and their configurations. Made from metrics.jsonl, results.jsonl, start.json and config.yaml
alone, so it can be drawn during a run.
"""

import io
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

from omegaconf import OmegaConf

from experiments.arguments import parse
from experiments.errors import user_errors
from experiments.figures import run_results
from experiments.figures.frontier import newest
from experiments.files import CONFIG, METRICS, RESULTS, START, check_exists, read_json, read_rows, write_atomically
from experiments.plots import entitle, method_of, pyplot, styles
from experiments.schema import flat, read_values

PAGE = "report.html"


@dataclass(frozen=True)
class Panel:
    """Curves of some keys of the rows; a panel whose keys no run has is left out.

    ``keys``: key -> its name in the legend; the first is drawn solid, the others dashed and dotted.
    """

    title: str
    keys: dict[str, str]
    log: bool = False


PANELS = (
    Panel("loss, nats per token", {"loss": "training", "validation/loss": "validation"}),
    Panel("learning rate", {"lr": ""}),
    Panel(
        "gradient norm before clipping",
        {"grad_norm": "total", "grad_norm_router": "router", "grad_norm_chunk_query": "chunk query"},
        log=True,
    ),
    Panel("causal sparsity, mean over the layers", {"causal_sparsity": ""}),
    Panel("alpha, mean over the layers", {"alpha": ""}),
    Panel("tokens per second", {"tokens_per_s": ""}),
    Panel(
        "model FLOPs utilisation", {"mfu_causal": "as dense causal attention", "mfu_sparse": "keys read, as measured"}
    ),
    Panel("seconds per step", {"step_time": "step", "data_wait": "of it, waiting for data"}),
    Panel("peak memory, MiB", {"peak_memory_mib": ""}),
)
_STYLES = ("-", "--", ":")
_FAR = 8  # times as long as the shortest run is the longest, from which their axis is logarithmic
_SYMBOLS = dict(zip("os^DvPX<>p*xdh", "●■▲◆▼✚✖◀▶⬟★✕⬧⬢", strict=True))


@dataclass(frozen=True)
class RunData:
    """What a run directory says of itself."""

    name: str
    config: dict[str, object]  # dotted keys
    rows: list[dict]
    evaluations: list[dict]
    parameters: int | None  # None: it does not say

    def curve(self, key: str) -> tuple[list[float], list[float]]:
        """Tokens and values of a key of the training rows, or of ``split/key``."""
        split, _, name = key.rpartition("/")
        rows = [row for row in self.rows if row["split"] == (split or "train") and row.get(name) is not None]
        return [row["tokens"] for row in rows], [row[name] for row in rows]

    def summary(self) -> dict[str, str]:
        """The figures one looks for first, of the last rows that have them."""

        def last(key: str, form: Callable[[float], str]) -> str:
            values = self.curve(key)[1]
            return form(values[-1]) if values else "-"

        train = [row for row in self.rows if row["split"] == "train"]
        return {
            "attention": str(self.config.get("attention.name")),
            "step": f"{train[-1]['step']} of {self.config.get('steps')}",
            "tokens": last("tokens", _short),
            "training loss": last("loss", "{:.4f}".format),
            "validation loss": last("validation/loss", "{:.4f}".format),
            "causal sparsity": last("causal_sparsity", "{:.1%}".format),
            "tokens/s": last("tokens_per_s", _short),
            "MFU causal": last("mfu_causal", "{:.1%}".format),
            "MFU sparse": last("mfu_sparse", "{:.1%}".format),
            "waits for data": self._waiting(),
            "peak memory": last("peak_memory_mib", lambda mib: f"{mib / 1024:.2f} GiB"),
        }

    def _waiting(self) -> str:
        rows = [row for row in self.rows if row["split"] == "train" and row.get("data_wait") is not None]
        return f"{rows[-1]['data_wait'] / rows[-1]['step_time']:.1%}" if rows else "-"


def read_run(path: Path) -> RunData:
    """Raises ValueError for what is no run directory or has no training rows yet."""
    check_exists(path, "name a run directory")
    if not (path / CONFIG).exists():
        raise ValueError(f"{path} is no run directory (it has no {CONFIG})")
    rows = read_rows(path / METRICS)
    if not any(row["split"] == "train" for row in rows):
        raise ValueError(f"{path / METRICS} has no training rows yet: wait for the run's first step")
    config = OmegaConf.to_container(read_values(path / CONFIG))
    parameters = read_json(path / START).get("parameters") if (path / START).exists() else None
    evaluations = newest(read_rows(path / RESULTS))
    return RunData(config.get("name") or path.name, flat(config), rows, evaluations, parameters)


def page(runs: Sequence[RunData]) -> str:
    """The HTML of the report. Runs that are called alike are numbered."""
    names = [run.name for run in runs]
    runs = [
        replace(run, name=f"{run.name} ({names[:i].count(run.name) + 1})") if names.count(run.name) > 1 else run
        for i, run in enumerate(runs)
    ]
    title = ", ".join(run.name for run in runs)
    curves = [_curves(panel, runs) for panel in PANELS if any(run.curve(key)[1] for run in runs for key in panel.keys)]
    if len({run.parameters for run in runs}) > 1 and all(run.parameters for run in runs):
        curves.insert(1, _curves(PANELS[0], runs, by_compute=True))
    strips = [_strip(run) for run in runs if run.curve("causal_sparsity_per_layer")[1]]
    summaries = [run.summary() for run in runs]
    keys = sorted({key for run in runs for key in run.config})
    differing = [key for key in keys if len({str(run.config.get(key)) for run in runs}) > 1]
    parts = [
        f"<h1>{escape(title)}</h1>",
        _table(["", *summaries[0]], [[run.name, *s.values()] for run, s in zip(runs, summaries, strict=True)], runs),
        f'<div class="panels">{"".join(curves)}</div>',
    ]
    evaluations = {run.name: run.evaluations for run in runs if run.evaluations}
    if evaluations:
        drawn = [_scores(*panel, runs) for panel in run_results.panels(evaluations).items()]
        parts += ["<h2>Scores</h2>", f'<div class="panels">{"".join(drawn)}</div>']
        count = sum(map(len, evaluations.values()))
        parts.append(f"<details><summary>All {count} scores</summary>{run_results.table(evaluations)}</details>")
    if strips:
        parts += ["<h2>Causal sparsity of every layer</h2>", f'<div class="strips">{"".join(strips)}</div>']
    if len(runs) > 1:
        parts += ["<h2>Where the configurations differ</h2>", _config_table(runs, differing)]
    parts += [f"<details><summary>Configuration, {len(keys)} values</summary>{_config_table(runs, keys)}</details>"]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title>'
    return "\n".join(["<!doctype html>", f'<html lang="en">{head}', _STYLE, *parts, "</html>", ""])


_STYLE = """<style>
:root { color-scheme: light dark }
body { font: 14px/1.45 system-ui, sans-serif; max-width: 1280px; margin: 2em auto; padding: 0 1.5em }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .25em .9em .25em 0; border-bottom: 1px solid #8884; vertical-align: top }
th, td.key, figcaption { color: light-dark(#555, #bbb) } th { font-weight: 600 }
td.key { font-family: ui-monospace, monospace; font-size: .9em }
.swatch { margin-right: .5em; background: white; padding: 0 .2em; border-radius: 2px }
.wide { overflow-x: auto }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(370px, 1fr)); gap: .5em; margin-top: 1.5em }
.strips { display: flex; flex-wrap: wrap; gap: 1em } figure { margin: 0 }
svg { width: 100%; height: auto; background: white }
.strips figure { flex: 1 1 480px; max-width: 640px } 
summary { cursor: pointer; margin-top: 2em; font-weight: 600 }
</style>"""


def _curves(panel: Panel, runs: Sequence[RunData], *, by_compute: bool = False) -> str:
    """Against tokens, or ``by_compute`` against the operations of training, 6 a parameter and token: of models of
    different size equal tokens are not equal effort."""
    plt = pyplot()
    figure, ax = plt.subplots(figsize=(4.6, 3.0), layout="constrained")
    names = []
    ends = []
    for run in runs:
        colour, mark = _styles(runs)[run.name]
        for (key, name), style in zip(panel.keys.items(), _STYLES, strict=False):
            tokens, values = run.curve(key)
            if values:
                xs = [6 * run.parameters * count for count in tokens] if by_compute else tokens
                ends.append(xs[-1])
                every = max(1, len(xs) // 5)
                ax.plot(xs, values, style, color=colour, linewidth=1.4, marker=mark, markersize=4, markevery=every)
                names += [] if (name, style) in names else [(name, style)]
    if len(names) > 1:
        handles = [plt.Line2D([], [], color="#555", linestyle=style) for _, style in names]
        ax.legend(handles, [name for name, _ in names], fontsize=8, frameon=False)
    if panel.log:
        ax.set_yscale("log")
    else:
        ax.yaxis.set_major_formatter(lambda value, _: _short(value))
    if max(ends) > _FAR * min(ends):
        ax.set_xscale("log")
    ax.set_title(panel.title, fontsize=10, loc="left")
    ax.set_xlabel("FLOPs of training, 6 x parameters x tokens" if by_compute else "tokens", fontsize=8)
    return f"<figure>{_svg(figure)}</figure>"


def _scores(named: tuple[str, str], inside: dict[str, list[dict]], runs: Sequence[RunData]) -> str:
    title, score = named
    figure, ax = pyplot().subplots(figsize=(4.6, 3.0), layout="constrained")
    run_results.draw_scores(ax, inside, _styles(runs))
    entitle(ax, title)
    ax.set_xlabel("measured causal sparsity; bars: 95 % interval", fontsize=8)
    ax.set_ylabel(score, fontsize=8)
    return f"<figure>{_svg(figure, percent=True)}</figure>"


def _strip(run: RunData) -> str:
    """Layers upwards, training to the right."""
    plt = pyplot()
    tokens, sparsity = run.curve("causal_sparsity_per_layer")
    layers = len(sparsity[0])
    figure, ax = plt.subplots(figsize=(6, min(1.2 + 0.1 * layers, 6)), layout="constrained")
    # A measurement holds until the next one; the last for as long as the one before.
    edges = [*tokens, 2 * tokens[-1] - [0, *tokens][-2]]
    mesh = ax.pcolormesh(
        edges,
        [layer - 0.5 for layer in range(layers + 1)],
        [[row[layer] for row in sparsity] for layer in range(layers)],
        vmin=0,
        vmax=1,
        cmap="viridis",
        rasterized=True,
    )
    ax.yaxis.get_major_locator().set_params(integer=True)
    ax.set_xlabel("tokens", fontsize=8)
    ax.set_ylabel("layer", fontsize=8)
    figure.colorbar(mesh, format=lambda value, _: f"{value:.0%}")
    return f"<figure>{_svg(figure)}<figcaption>{escape(run.name)}</figcaption></figure>"


def _svg(figure, *, percent: bool = False) -> str:
    """The figure as an element of a page, and closed."""
    plt = pyplot()
    figure.axes[0].xaxis.set_major_formatter(lambda value, _: f"{value:.0%}" if percent else _short(value))
    for ax in figure.axes:
        ax.tick_params(labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    buffer = io.StringIO()
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report"}):
        figure.savefig(buffer, format="svg", transparent=True, dpi=150, metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _styles(runs: Sequence[RunData]) -> dict[str, tuple[str, str]]:
    """(colour, mark) by name, which says the method as a rule; a run that does not say it is its attention's."""
    labels = {
        run.name: run.name if method_of(run.name) else f"{run.config.get('attention.name')} {run.name}" for run in runs
    }
    style = styles(labels.values())
    return {name: style[label] for name, label in labels.items()}


def _table(head: Iterable[str], rows: Sequence[Sequence[str]], runs: Sequence[RunData]) -> str:
    """A table with a row a run, each with its mark in its colour."""
    own = [_styles(runs)[run.name] for run in runs]
    marks = [f'<span class="swatch" style="color:{colour}">{_SYMBOLS[mark]}</span>' for colour, mark in own]
    body = [
        "".join(f"<td>{mark if not column else ''}{escape(cell)}</td>" for column, cell in enumerate(row))
        for mark, row in zip(marks, rows, strict=True)
    ]
    head = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(f"<tr>{row}</tr>" for row in body)}</table></div>'


def _config_table(runs: Sequence[RunData], keys: Sequence[str]) -> str:
    head = "".join(f"<th>{escape(run.name)}</th>" for run in runs)
    rows = "".join(
        f'<tr><td class="key">{escape(key)}</td>'
        + "".join(f"<td>{escape(str(run.config.get(key, '-')))}</td>" for run in runs)
        + "</tr>"
        for key in keys
    )
    return f'<div class="wide"><table><tr><th></th>{head}</tr>{rows}</table></div>'


def _short(value: float) -> str:
    """Four digits and a letter."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def main(arguments: Sequence[str]) -> None:
    with user_errors():
        paths = parse("experiments.figures.run_page", arguments).runs
        write_atomically(paths[0] / PAGE, page([read_run(path) for path in paths]))
        print(paths[0] / PAGE)


if __name__ == "__main__":
    main(sys.argv[1:])
