"""Figures 3 to 7: where attention is sparse, and what the router finds."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from experiments.figures.frontier import check_seeds, title_of
from experiments.figures.rows import BARS, Drawn, Study, as_trained, averaged, grouped, line_of
from experiments.figures.setpoints import is_as_trained
from experiments.plots import BLACK, entitle, grid, handles_of, legend_below, plain_log, save, styles
from experiments.speed.report import tokens

DISPERSION = {
    "relevant_mass": "router's mass on the relevant blocks",
    "softmax_relevant_mass": "mass, softmax over the same scores",
    "dense_relevant_mass": "mass, dense attention of the same model",
    "entropy": "router's entropy, nats",
    "softmax_entropy": "entropy, softmax over the same scores",
    "support": "blocks above zero",
}
DASHES = "Dashes only let a line show through another."
RECALLS = {
    "recall": "share of the answer's blocks selected",
    "topk_recall": "the same for as many blocks by softmax and top-k",
    "precision": "share of the selected blocks that hold the answer",
    "mass_recall": "share of dense attention's mass read",
    "mass_precision": "share of the selected among dense attention's heaviest",
}


_OF_RECALL = ("metric", "data", "variant", "probe")  # what a panel of recall is of


def make_heat_map(study: Study) -> Drawn | None:
    """Causal sparsity of every layer and KV head, at the knob trained with. Drawn are models in which it differs."""
    rows = as_trained(study.of("sparsity", "causal_sparsity"))
    if not rows:
        return None
    means = averaged(rows, "data", "variant", "length", "line", value="per_head")
    table = [
        {"data": m["data"], "variant": m["variant"], "length": m["length"]}
        | {"model": m["line"], "layer": layer, "kv_head": head}
        | {"causal_sparsity": value, "seeds": m["seeds"]}
        for m in means
        for layer, heads in enumerate(m["per_head"])
        for head, value in enumerate(heads)
    ]
    uneven = [m for m in means if len(set(_shown(m))) > 1] or means
    even = [f"{m['line']} ({_shown(m)[0]:.1%})" for m in means if m not in uneven]
    notes = [f"The same in all layers and heads: {', '.join(even)}."] if even else []

    def draw(path: Path) -> None:
        # A row of panels for each corpus and length.
        most = max(len(inside) for inside in grouped(uneven, "data", "variant", "length").values())
        figure, axes = grid(len(uneven), width=2.4, height=2.6, columns=min(most, 5))
        values = [value for m in uneven for value in _shown(m)]
        scale = {"vmin": min(values), "vmax": max(values), "cmap": "viridis"}
        image = None
        for ax, m in zip(axes, uneven, strict=True):
            image = ax.imshow(m["per_head"], aspect="auto", origin="lower", **scale)
            ax.set_title(f"{m['line']}\n{_title(m)}", fontsize=8)
            ax.set_xlabel("KV head")
            ax.set_ylabel("layer")
            for axis in (ax.xaxis, ax.yaxis):
                axis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        figure.colorbar(image, ax=axes, label="causal sparsity", shrink=0.8)
        save(figure, path)

    return Drawn(table, draw, notes, rows)


def _shown(mean: dict) -> list[float]:
    """Sparsities of all layers and heads, to a tenth of a point."""
    return [round(value, 3) for heads in mean["per_head"] for value in heads if value is not None]


def make_active_tokens(study: Study) -> Drawn | None:
    """Median, p10 and p90 over tokens, layers and heads, by position."""
    rows = as_trained(study.of("sparsity", "active_tokens"))
    if not rows:
        return None
    rows = [row | {"first": row["position"][0], "last": row["position"][1]} for row in rows]
    keys = ("data", "variant", "length", "line", "first", "last")
    table = averaged(rows, *keys)
    for name in ("p10", "p90"):
        for entry, other in zip(table, averaged(rows, *keys, value=name), strict=True):
            entry[name] = other[name]

    def draw(path: Path) -> None:
        panels = grouped(table, "data", "variant", "length")
        figure, axes = grid(len(panels))
        style = styles(row["line"] for row in table)
        for ax, inside in zip(axes, panels.values(), strict=True):
            last = max(row["last"] for row in inside)
            ax.plot([1, last + 1], [1, last + 1], color=BLACK, linestyle="--", linewidth=1, label="dense")
            for line, bins in grouped(inside, "line").items():
                colour, mark = style[line]
                xs = [(row["first"] + row["last"]) / 2 + 1 for row in bins]
                ax.plot(xs, [row["score"] for row in bins], color=colour, marker=mark, markersize=4, label=line)
                ax.fill_between(xs, [r["p10"] for r in bins], [r["p90"] for r in bins], color=colour, alpha=0.15)
            ax.set_xscale("log", base=2)
            ax.set_yscale("log", base=2)
            for axis in (ax.xaxis, ax.yaxis):
                axis.set_major_formatter(lambda value, _: tokens(value))
            ax.set_xlabel("position in the document")
            ax.set_ylabel("active tokens:\nmedian, p10-p90")
            entitle(ax, _title(inside[0]))
            ax.grid(alpha=0.25)
        legend_below(figure, handles_of(axes))
        save(figure, path)

    return Drawn(table, draw, rows=rows)


def make_adaptivity(study: Study) -> Drawn | None:
    """Active blocks against the number of blocks that the answer needs, for probes in which that varies."""
    rows = [
        row | {"probes": "mqar" if row["probe"] == "mqar" else "niah_values"}
        for row in as_trained(study.of("routing", "active_blocks"))
        if row["probe"] == "mqar" or _is_of_values(row["probe"])
    ]
    if not rows:
        return None
    keys = ("probes", "data", "variant", "length", "line", "relevant")
    table = averaged(_pooled(rows, keys), *keys)
    note = (
        f"Over tokens, layers and heads. {BARS} {DASHES} Needed: in text pieces of the answer, in "
        "MQAR the blocks that hold pairs, of which a single query needs one."
    )
    named = [row | {"panel": _title(row, row["probes"])} for row in table]
    return Drawn(table, _lines(named, "relevant"), [note], rows)


def _pooled(rows: Iterable[dict], keys: Sequence[str]) -> list[dict]:
    """A row for each seed: probes of several kinds may need as many blocks, and each had as many chances to as its row
    has ``counted``."""
    named = [row | {"line": line_of(row)} for row in rows]
    for (probe, *_), own in grouped(named, "probe", *keys, "config_hash").items():
        check_seeds(own, f"probes of {probe}")
    return [
        own[0]
        if len(own) == 1
        else own[0] | {"score": sum(r["score"] * r["counted"] for r in own) / sum(r["counted"] for r in own)}
        for own in grouped(named, *keys, "seed", "config_hash").values()
    ]


def make_recall(study: Study) -> Drawn | None:
    """Recall and precision of the selection, one panel a metric and probe: against the sparsity where a knob was
    turned, at the length that has the most settings, else against the length."""
    rows = [row | {"best_head": _best(row["per_head"])} for metric in RECALLS for row in study.of("routing", metric)]
    if not rows:
        return None
    keys = ("metric", "data", "variant", "probe", "length", "label", "trained_knob", "knob")
    table = averaged(rows, *keys)
    for name in ("causal_sparsity", "best_head"):
        for entry, other in zip(table, averaged(rows, *keys, value=name), strict=True):
            entry[name] = other[name]
            if name == "best_head":
                entry |= {"best_low": other["low"], "best_high": other["high"]}
    table.sort(key=lambda row: (list(RECALLS).index(row["metric"]), row["probe"], row["length"], row["label"]))
    settings = Counter((row["probe"], row["length"]) for row in table)
    # The last of a probe stands: most settings, and of equals the longest.
    most = {probe: length for (probe, length), _ in sorted(settings.items(), key=lambda item: (item[1], item[0][1]))}
    is_turned = any(len({row["knob"] for row in rows}) > 1 for rows in grouped(table, "label").values())
    drawn = [
        row
        for row in table
        if not _is_of_values(row["probe"]) and (not is_turned or row["length"] == most[row["probe"]])
    ]

    if is_turned:
        where = "Drawn at the context with the most settings; the table has all lengths and probes."
    elif all(is_as_trained(row["knob"], row["trained_knob"]) for row in table):
        where = "At the knob trained with."
    else:
        where = "Each at one place of its knob, which is in the table."
    notes = [f"{where} The best head is each seed's own. {BARS}"]
    for (metric, *place), inside in grouped(drawn, *_OF_RECALL).items():
        there = grouped(drawn, *_OF_RECALL[1:])[tuple(place)]
        absent = {row["label"] for row in there} - {row["label"] for row in inside}
        if absent:
            notes.append(
                f"{RECALLS[metric]}, {place[-1]}: not of {', '.join(sorted(absent))}, whose rows have no such score."
            )
    return Drawn(table, lambda path: _draw_recall(drawn, is_turned, path), notes, rows)


def _draw_recall(table: list[dict], is_turned: bool, path: Path) -> None:
    """Mean and best head: against the sparsity if knobs were turned, each probe at one length, else against that."""
    x = "causal_sparsity" if is_turned else "length"
    panels = grouped(table, *_OF_RECALL)
    figure, axes = grid(len(panels), height=3.0)
    style = styles(row["label"] for row in table)
    for ax, ((metric, data, variant, probe), inside) in zip(axes, panels.items(), strict=True):
        for (label, _), points in grouped(inside, "label", "trained_knob").items():
            points = sorted(points, key=lambda row: row[x])
            xs = [row[x] for row in points]
            colour, mark = style[label]
            line = {"color": colour, "marker": mark, "markersize": 5}
            ax.plot(xs, [row["score"] for row in points], label=f"{label}, mean of heads", **line)
            best = {"linestyle": ":", "markerfacecolor": "white"} | line
            ax.plot(xs, [row["best_head"] for row in points], label=f"{label}, best head", **best)
            for bounds in (("low", "high"), ("best_low", "best_high")):
                lows, highs = ([row[bound] for row in points] for bound in bounds)
                ax.vlines(xs, lows, highs, color=colour, linewidth=1)
        title = _title(inside[0], probe) if is_turned else title_of(data, probe, variant)
        entitle(ax, f"{title}:\n{RECALLS[metric]}")
        if is_turned:
            ax.set_xlabel("causal sparsity")
        else:
            _length_axis(ax)
        if metric != "precision":
            ax.set_ylim(-0.03, 1.03)
        ax.grid(alpha=0.25)
    legend_below(figure, handles_of(axes))
    save(figure, path)


def _best(per_head: list[list[float | None]]) -> float:
    return max(value for heads in per_head for value in heads if value is not None)


def make_dispersion(study: Study) -> Drawn | None:
    """Against the context length, at the knob trained with."""
    rows = as_trained(row for metric in DISPERSION for row in study.of("routing", metric))
    if len({row["length"] for row in rows}) < 2:
        return None
    table = averaged(rows, "metric", "data", "variant", "probe", "line", "length")
    table.sort(key=lambda row: (list(DISPERSION).index(row["metric"]), row["probe"], row["line"], row["length"]))
    named = [
        row | {"panel": f"{title_of(row['data'], row['probe'], row['variant'])}: {DISPERSION[row['metric']]}"}
        for row in table
        if not _is_of_values(row["probe"])
    ]
    return Drawn(table, _lines(named, "length"), [f"{BARS} {DASHES}"], rows)


def _is_of_values(probe: str) -> bool:
    """One of the probes that differ in how much they need only: figure 5 has them on one axis."""
    return probe.startswith("niah_values_")


def _title(row: dict, what: str | None = None) -> str:
    return title_of(row["data"], what, f"{row['length']} tokens", row["variant"])


def _length_axis(ax) -> None:
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set_xlabel("context, tokens")


def _lines(table: list[dict], x: str) -> Callable[[Path], None]:
    """A panel for each ``panel`` of the rows, a line for each model; ``x`` is length or relevant."""

    def draw(path: Path) -> None:
        panels = grouped(table, "panel")
        figure, axes = grid(len(panels), height=3.0)
        style = styles(row["line"] for row in table)
        dashes = {line: ("-", "--")[number % 2] for number, line in enumerate(sorted(style))}
        for ax, (panel, inside) in zip(axes, panels.items(), strict=True):
            for line, points in grouped(inside, "line").items():
                colour, mark = style[line]
                xs, ys = [row[x] for row in points], [row["score"] for row in points]
                lows, highs = [row["low"] for row in points], [row["high"] for row in points]
                ax.vlines(xs, lows, highs, color=colour, linewidth=1)
                ax.plot(xs, ys, color=colour, marker=mark, markersize=5, linestyle=dashes[line], label=line)
            entitle(ax, panel)
            if x == "length":
                _length_axis(ax)
                if inside[0]["metric"] == "support":
                    ax.set_yscale("log")
                    plain_log(ax.yaxis)
            else:
                for axis in (ax.xaxis, ax.yaxis):
                    axis.get_major_locator().set_params(integer=True, min_n_ticks=1)
                ax.set_xlabel("blocks that the answer needs")
                ax.set_ylabel("active blocks")
            ax.grid(alpha=0.25)
        legend_below(figure, handles_of(axes))
        save(figure, path)

    return draw
