"""Figures 3 to 7: where attention is sparse, and what the router finds."""

from collections.abc import Callable
from pathlib import Path

from experiments.figures.rows import Drawn, Study, as_trained, averaged, grouped
from experiments.plots import grid, save, styles

DISPERSION = {
    "relevant_mass": "router's mass on the relevant blocks",
    "softmax_relevant_mass": "mass, softmax over the same scores",
    "dense_relevant_mass": "mass, dense attention of the same model",
    "entropy": "router's entropy, nats",
    "softmax_entropy": "entropy, softmax over the same scores",
    "support": "blocks above zero",
}
RECALLS = {
    "recall": "share of the answer's blocks selected",
    "topk_recall": "the same for as many blocks by softmax and top-k",
    "precision": "share of the selected blocks that hold the answer",
    "mass_recall": "share of dense attention's mass read",
    "mass_precision": "share of the selected among dense attention's heaviest",
}


def make_heat_map(study: Study) -> Drawn | None:
    """Causal sparsity of every layer and KV head, at the knob trained with."""
    rows = as_trained(study.of("sparsity", "causal_sparsity"))
    if not rows:
        return None
    means = averaged(rows, "data", "length", "line", value="per_head")
    table = [
        {"data": m["data"], "length": m["length"], "model": m["line"], "layer": layer, "kv_head": head}
        | {"causal_sparsity": value, "seeds": m["seeds"]}
        for m in means
        for layer, heads in enumerate(m["per_head"])
        for head, value in enumerate(heads)
    ]

    def draw(path: Path) -> None:
        figure, axes = grid(len(means), width=3.6, height=3.6)
        image = None
        for ax, m in zip(axes, means, strict=True):
            image = ax.imshow(m["per_head"], vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="lower")
            ax.set_title(f"{m['line']}\n{m['data']}, {m['length']} tokens", fontsize=9)
            ax.set_xlabel("KV head")
            ax.set_ylabel("layer")
            for axis in (ax.xaxis, ax.yaxis):
                axis.get_major_locator().set_params(integer=True)
        figure.colorbar(image, ax=axes, label="causal sparsity", shrink=0.8)
        save(figure, path)

    return Drawn(table, draw)


def make_active_tokens(study: Study) -> Drawn | None:
    """Median, p10 and p90 over tokens, layers and heads, by position."""
    rows = as_trained(study.of("sparsity", "active_tokens"))
    if not rows:
        return None
    rows = [row | {"first": row["position"][0], "last": row["position"][1]} for row in rows]
    keys = ("data", "length", "line", "first", "last")
    table = averaged(rows, *keys)
    for name in ("p10", "p90"):
        for entry, other in zip(table, averaged(rows, *keys, value=name), strict=True):
            entry[name] = other[name]

    def draw(path: Path) -> None:
        panels = _panels(table, "data", "length")
        figure, axes = grid(len(panels))
        style = styles(row["line"] for row in table)
        for ax, ((data, length), inside) in zip(axes, panels.items(), strict=True):
            last = max(row["last"] for row in inside)
            ax.plot([1, last + 1], [1, last + 1], color="#444444", linestyle="--", linewidth=1, label="dense")
            for line, bins in grouped(inside, "line").items():
                colour, mark = style[line]
                xs = [(row["first"] + row["last"]) / 2 + 1 for row in bins]
                ax.plot(xs, [row["score"] for row in bins], color=colour, marker=mark, markersize=4, label=line)
                ax.fill_between(xs, [r["p10"] for r in bins], [r["p90"] for r in bins], color=colour, alpha=0.15)
            ax.set_xscale("log", base=2)
            ax.set_yscale("log", base=2)
            ax.set_xlabel("position in the document")
            ax.set_ylabel("active tokens: median, p10-p90")
            ax.set_title(f"{data}, {length} tokens", fontsize=10)
            ax.grid(alpha=0.25)
            ax.legend(fontsize=8)
        save(figure, path)

    return Drawn(table, draw)


def make_adaptivity(study: Study) -> Drawn | None:
    """Active blocks against the number of blocks that the answer needs, for probes in which that varies."""
    rows = [
        row | {"probes": "mqar" if row["probe"] == "mqar" else "niah_values"}
        for row in as_trained(study.of("routing", "active_blocks"))
        if row["probe"] == "mqar" or _is_of_values(row["probe"])
    ]
    if not rows:
        return None
    keys = ("probes", "data", "length", "line", "relevant")
    table = averaged(rows, *keys)
    note = "Over tokens, layers and heads. Needed: in MQAR the blocks that hold pairs, in text pieces of the answer."
    draw = _lines(table, ("probes", "data", "length"), "relevant", "blocks that the answer needs", "active blocks")
    return Drawn(table, draw, [note])


def make_recall(study: Study) -> Drawn | None:
    """Recall and precision of the selection against the sparsity, one panel a metric and probe."""
    rows = [row for metric in RECALLS for row in study.of("routing", metric)]
    if not rows:
        return None
    keys = ("metric", "probe", "length", "label", "knob")
    table = averaged(rows, *keys)
    for entry, other in zip(table, averaged(rows, *keys, value="causal_sparsity"), strict=True):
        entry["causal_sparsity"] = other["causal_sparsity"]
    for entry, other in zip(table, averaged(rows, *keys, value="per_head"), strict=True):
        values = [value for heads in other["per_head"] for value in heads if value is not None]
        entry["best_head"] = max(values)
    table.sort(key=lambda row: (list(RECALLS).index(row["metric"]), row["probe"], row["length"], row["label"]))
    longest = {probe: max(row["length"] for row in rows) for probe, rows in grouped(table, "probe").items()}
    drawn = [row for row in table if row["length"] == longest[row["probe"]] and not _is_of_values(row["probe"])]

    def draw(path: Path) -> None:
        panels = _panels(drawn, "metric", "probe")
        figure, axes = grid(len(panels), height=3.6)
        style = styles(row["label"] for row in drawn)
        for ax, ((metric, probe), inside) in zip(axes, panels.items(), strict=True):
            for label, points in grouped(inside, "label").items():
                points = sorted(points, key=lambda row: row["causal_sparsity"])
                xs = [row["causal_sparsity"] for row in points]
                colour, mark = style[label]
                ax.plot(xs, [row["score"] for row in points], color=colour, marker=mark, label=f"{label}, mean")
                best = [row["best_head"] for row in points]
                ax.plot(xs, best, color=colour, linestyle=":", label=f"{label}, best head")
            ax.set_title(f"{probe}, {longest[probe]} tokens:\n{RECALLS[metric]}", fontsize=9)
            ax.set_xlabel("causal sparsity")
            ax.set_ylim(-0.03, 1.03)
            ax.grid(alpha=0.25)
            ax.legend(fontsize=7)
        save(figure, path)

    return Drawn(table, draw, ["Drawn at the longest context; the table has all lengths and probes."])


def make_dispersion(study: Study) -> Drawn | None:
    """Against the context length, at the knob trained with."""
    rows = as_trained(row for metric in DISPERSION for row in study.of("routing", metric))
    if len({row["length"] for row in rows}) < 2:
        return None
    table = averaged(rows, "metric", "probe", "line", "length")
    table.sort(key=lambda row: (list(DISPERSION).index(row["metric"]), row["probe"], row["line"], row["length"]))
    named = [
        row | {"panel": f"{row['probe']}: {DISPERSION[row['metric']]}"}
        for row in table
        if not _is_of_values(row["probe"])
    ]
    return Drawn(table, _lines(named, ("panel",), "length", "context, tokens", ""))


def _is_of_values(probe: str) -> bool:
    """One of the probes that differ in how much they need only: figure 5 has them on one axis."""
    return probe.startswith("niah_values_")


def _panels(table: list[dict], *keys: str) -> dict[tuple, list[dict]]:
    panels: dict[tuple, list[dict]] = {}
    for row in table:
        panels.setdefault(tuple(row[key] for key in keys), []).append(row)
    return panels


def _lines(
    table: list[dict], panel_keys: tuple[str, ...], x: str, x_label: str, y_label: str
) -> Callable[[Path], None]:
    """A panel for each value of the keys, a line for each model."""

    def draw(path: Path) -> None:
        panels = _panels(table, *panel_keys)
        figure, axes = grid(len(panels), height=3.6)
        style = styles(row["line"] for row in table)
        for ax, (panel, inside) in zip(axes, panels.items(), strict=True):
            for line, points in grouped(inside, "line").items():
                colour, mark = style[line]
                ax.errorbar(
                    [row[x] for row in points],
                    [row["score"] for row in points],
                    yerr=[row["spread"] for row in points] if any(row["spread"] for row in points) else None,
                    color=colour,
                    marker=mark,
                    markersize=5,
                    label=line,
                )
            ax.set_xscale("log", base=2)
            ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            ax.set_title(", ".join(str(part) for part in panel), fontsize=9)
            ax.set_xlabel(x_label)
            ax.set_ylabel(y_label)
            ax.grid(alpha=0.25)
            ax.legend(fontsize=8)
        save(figure, path)

    return draw
