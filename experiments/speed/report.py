"""From rows to speed: ``python -m experiments.speed.report outputs/speed`` writes speed.{md,png,pdf} there.

Reads only speed.jsonl; needs no GPU. Every ratio is against dense attention measured in the same run.
"""

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from experiments.arguments import parse
from experiments.errors import user_errors
from experiments.files import SPEED, check_exists, read_rows, write_atomically
from experiments.plots import BLACK, entitle, pyplot, save, styles
from experiments.speed.rows import (
    CASE,
    CUDNN,
    DECODE,
    DECODE_PASSES,
    DENSE,
    FLASH_3,
    MODEL_DECODE,
    PASSES,
    PATTERNS,
    STAGES,
    batch,
    curves,
    setups,
    with_ratios,
)
from experiments.speed.shapes import shapes_table


def break_even(line: Sequence[tuple[int, float]]) -> str:
    """From which length on a method stays faster than dense attention, from (length, ratio) ascending.

    Between two measured lengths log(ratio) is taken as linear in log(length).
    """
    if not line:
        return "not measured"
    if line[-1][1] < 1:
        return "not reached"
    for (short, low), (long, high) in reversed(list(pairwise(line))):
        if low < 1:
            share = math.log(low) / (math.log(low) - math.log(high))
            return f"{tokens(short * (long / short) ** share)}"
    return f"{tokens(line[0][0])} or less"


def tokens(length: float) -> str:
    """A length for readers: 8k, 5.3k, 512."""
    return f"{length / 1024:.3g}k" if length >= 1024 else f"{length:.0f}"


def title(setup: tuple) -> str:
    device, heads, kv_heads, head_dim, chunk_size, dtype = setup
    return (
        f"{device}: {heads} heads, {kv_heads} KV heads of {head_dim}, chunks of {chunk_size}, {dtype}, batch 1, causal"
    )


def to_markdown(rows: Sequence[dict]) -> str:
    """All measurements, break-even lengths, and what was not measured and why."""
    rows = with_ratios(rows)
    out = shapes_table(rows)
    for setup, inside in setups(rows).items():
        out += [f"## {title(setup)}\n", *provenance_lines(inside)]
        at_once = [row for row in inside if row["pass"] in PASSES]
        if at_once:
            out += [*_measurements(at_once), *_break_even_table(at_once)]
        for name in DECODE_PASSES:
            out += _decode_table([row for row in inside if row["pass"] == name and row["status"] == "ok"])
        lines = not_measured(inside)
        if lines:
            head = [
                "\nNot measured:\n",
                "| method | stage | why | pass | inputs | lengths |",
                "|---|---|---|---|---|---|",
            ]
            out += [*head, *(f"| {' | '.join(line)} |" for line in lines)]
        out.append("")
    return "\n".join(out) + "\n"


def not_measured(rows: Sequence[dict]) -> list[tuple[str, ...]]:
    """(method, stage, why, passes, inputs, lengths) of the rows that have no time; those that differ only in length,
    inputs or pass share a line."""
    lines: list[tuple[str, ...]] = []
    for row in sorted((row for row in rows if row["status"] != "ok"), key=_order):
        why = row["status"] + (f": {in_a_cell(row['detail'])}" if row["detail"] else "")
        lines.append((row["method"], row["stage"], why, row["pass"], _inputs(row), _length(row)))
    for place in (5, 4, 3):
        merged: dict[tuple, list[str]] = {}
        for line in lines:
            merged.setdefault((*line[:place], *line[place + 1 :]), []).append(line[place])
        lines = [(*key[:place], ", ".join(values), *key[place:]) for key, values in merged.items()]
    return lines


def _order(row: dict) -> tuple:
    """Where a row stands in a table."""
    pattern = -1 if row["pattern"] is None else list(PATTERNS).index(row["pattern"])
    place = (row["length"], row["sparsity"] or 0, pattern, STAGES.index(row["stage"]), row["method"])
    return (*place, (*PASSES, *DECODE_PASSES).index(row["pass"]), batch(row))


def in_a_cell(text: str) -> str:
    """On one line, and without what would end a cell of a table."""
    return " ".join(text.replace("|", "/").split())


def _length(row: dict) -> str:
    return tokens(row["length"]) + (f" x {batch(row)}" if batch(row) > 1 else "")


def _inputs(row: dict) -> str:
    return "any" if row["pattern"] is None else f"{row['pattern']} {row['sparsity']:.0%}"


def provenance_lines(rows: Sequence[dict]) -> list[str]:
    """Date, commit and versions that rows were measured with, and an empty line."""
    said = sorted(
        {
            f"{row['date'][:10]}, commit {(row['git_sha'] or 'unknown')[:10]}{' and changes' if row['dirty'] else ''}, "
            + ", ".join(f"{name} {version}" for name, version in row["versions"].items() if version)
            for row in rows
        }
    )
    return [*said, ""]


def _measurements(rows: Sequence[dict]) -> list[str]:
    """A line for each length, input and method: both passes beside each other."""
    cases: dict[tuple, dict[str, dict]] = {}
    for row in sorted(rows, key=_order):
        if row["status"] == "ok":
            cases.setdefault(tuple(row[name] for name in CASE[:-1]), {})[row["pass"]] = row
    against = sorted({row["against"] for row in rows if row["ratio"]})
    out = [
        f"Milliseconds (speed-up over dense attention{': ' if against else ''}{', '.join(against)}); after the comma, "
        "for short calls, those of a replay as a CUDA graph, which leaves out the host's share. Memory beside inputs "
        "and results.\n",
        "| length | inputs | causal sparsity | stage | method | forward | forward + backward | memory | memory, both |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for key in cases:
        length, _, _, stage, method = key
        passes = [cases[key].get(name) for name in PASSES]
        row = passes[0] or passes[1]
        sparsity = "" if row["causal_sparsity"] is None else f"{row['causal_sparsity']:.1%}"
        times = " | ".join(_time(p) for p in passes)
        memory = " | ".join("" if p is None or p["extra_mib"] is None else f"{p['extra_mib']:.0f} MiB" for p in passes)
        out.append(f"| {tokens(length)} | {_inputs(row)} | {sparsity} | {stage} | {method} | {times} | {memory} |")
    return out


def _decode_table(rows: Sequence[dict]) -> list[str]:
    """A line for each length, number of sequences, sparsity and method of one decoding pass."""
    if not rows:
        return []
    whole = rows[0]["pass"] == MODEL_DECODE
    against = ", ".join(sorted({row["against"] for row in rows if row["ratio"]}))
    note, unit, last = "one layer's attention, the caches' update included where it is ours", "microseconds", "layers"
    if whole:
        note = f"a whole model of {rows[0]['parameters'] / 1e6:.0f}M random parameters, from a token to the next logits"
        unit, last = "milliseconds", "tokens/s"
    out = [
        f"\nDecoding a token, {note}; caches were filled with random keys. Replays of a CUDA graph; speed-up over dense"
        f" attention{': ' if against else ''}{against}.\n",
        f"| length | sequences | causal sparsity | method | {unit} | speed-up | {last} |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (row["length"], batch(row), *_order(row))):
        sparsity = "" if row["causal_sparsity"] is None else f"{row['causal_sparsity']:.1%}"
        time = f"{row['ms']:.3g}" if whole else f"{row['ms'] * 1e3:.1f}"
        ratio = f"{row['ratio']:.2f}x" if row["ratio"] else ""
        end = f"{row['tokens_per_second']:.0f}" if whole else row["layers"]
        method = row["method"] + (", not compiled" if whole and not row.get("compiled") else "")
        case = f"| {tokens(row['length'])} | {batch(row)} | {sparsity} | {method} "
        out.append(f"{case}| {time} | {ratio} | {end} |")
    return out


def _time(row: dict | None) -> str:
    if row is None:
        return ""
    call = f"{row['ms']:.3g}" + (f" ({row['ratio']:.2f}x)" if row["ratio"] else "")
    if not row.get("graph_ms"):
        return call
    return f"{call}, {row['graph_ms']:.3g}" + (f" ({row['graph_ratio']:.2f}x)" if row["graph_ratio"] else "")


def _break_even_table(rows: Sequence[dict]) -> list[str]:
    found: dict[tuple, dict[str, str]] = {}
    for name in PASSES:
        for curve in curves(rows, name):
            line = [(row["length"], row["ratio"]) for row in curve.rows if row["ratio"]]
            graphs = [(row["length"], row["graph_ratio"] or row["ratio"]) for row in curve.rows if row["ratio"]]
            lengths = break_even(line)
            if any(row["graph_ratio"] for row in curve.rows):
                lengths += f", {break_even(graphs)} as a CUDA graph"
            found.setdefault((curve.method, curve.sparsity, curve.pattern), {})[name] = lengths
    if not found:
        return []
    out = ["\n| faster than dense from | inputs | forward | forward + backward |", "|---|---|---|---|"]
    for (method, sparsity, pattern), lengths in found.items():
        cells = " | ".join(lengths.get(name, "not measured") for name in PASSES)
        out.append(f"| {method} | {pattern} {sparsity:.0%} | {cells} |")
    return out


def draw(rows: Sequence[dict], path: Path) -> None:
    """Time, speed-up and extra memory against length; a column per pass and sparsity. ``path`` has no suffix.

    Of decoding one sequence in one layer.
    """
    plt = pyplot()
    import numpy as np
    from matplotlib.ticker import LogLocator, NullFormatter

    rows = [row for row in with_ratios(rows) if row["pass"] != MODEL_DECODE and batch(row) == 1]
    for number, (setup, inside) in enumerate(setups(rows).items()):
        columns = _columns(inside)
        # Columns that a page is wide enough for, in blocks of three rows.
        wide = min(4, len(columns))
        blocks = -(-len(columns) // wide)
        figure = plt.figure(figsize=(3.1 * wide, 7.5 * blocks + 0.5), layout="constrained")
        cells = figure.subplots(3 * blocks, wide, squeeze=False)
        axes = np.concatenate(np.split(cells, blocks), axis=1)
        for ax in axes[:, len(columns) :].flat:
            ax.remove()
        axes = axes[:, : len(columns)]
        for first in range(0, len(columns), wide):
            block = axes[:, first : first + wide]
            for row in block:
                for ax in row:
                    if ax is not block[0, 0]:
                        ax.sharex(block[0, 0])
                    if ax is not row[0]:
                        ax.sharey(row[0])
                        ax.tick_params(labelleft=False)
            for ax in block[:-1].flat:
                ax.tick_params(labelbottom=False)
        style_of = styles({c.method for name, _ in columns for c in curves(inside, name)})
        for column, (name, sparsity) in zip(axes.T, columns, strict=True):
            for label, line in _dense_lines(inside, name).items():
                style = {"color": BLACK, "linewidth": 1, "linestyle": {FLASH_3: "-", CUDNN: ":"}.get(label, "--")}
                _plot(column[0], line, "ms", label=label, **style)
                _plot(column[2], line, "extra_mib", **style)
            for curve in curves(inside, name):
                if curve.sparsity == sparsity:
                    colour, mark = style_of[curve.method]
                    style = {"color": colour, "marker": mark, "markersize": 4, "linestyle": PATTERNS[curve.pattern]}
                    _plot(column[0], curve.rows, "ms", label=curve.label, **style)
                    _plot(column[1], curve.rows, "ratio", **style)
                    _plot(column[2], curve.rows, "extra_mib", **style)
            column[1].axhline(1, color=BLACK, linewidth=1)
            what = name.replace("+", " + ")
            entitle(column[0], what if sparsity is None else f"{what}, {sparsity:.0%} sparse")
            column[2].set_xlabel("tokens")
        against = sorted({row["against"] for row in inside if row["ratio"]}) or ["dense"]
        over = ",\n".join(["speed-up over " + against[0], *against[1:]])
        for first in axes.T[::wide]:
            for ax, label in zip(first, ("ms", over, "extra memory, MiB"), strict=True):
                ax.set_ylabel(label)
        for ax in axes.flat:
            ax.set_xscale("log", base=2)
            ax.xaxis.set_major_formatter(lambda x, _: tokens(x))
            ax.grid(alpha=0.25)
        for time_ax, ratio_ax, memory_ax in axes.T:
            time_ax.set_yscale("log")
            ratio_ax.set_yscale("log")
            ratio_ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ratio_ax.yaxis.set_major_formatter(lambda y, _: f"{y:g}x")
            ratio_ax.yaxis.set_minor_formatter(NullFormatter())
            memory_ax.set_yscale("symlog", linthresh=1)  # nothing is a possible amount
            memory_ax.set_ylim(bottom=0)
            if not memory_ax.lines:
                memory_ax.set_visible(False)
                ratio_ax.tick_params(labelbottom=True)
                ratio_ax.set_xlabel("tokens")
        handles = {t: h for ax in axes[0] for h, t in zip(*ax.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles.keys(), fontsize=8, loc="outside lower center", ncols=3)
        figure.suptitle(
            f"{title(setup)}\nhollow: the sparsity reached is another, see the table; "
            "a line has the lengths that were measured",
            fontsize=9,
        )
        name = path.name if number == 0 else f"{path.name}-{number + 1}"
        save(figure, path.with_name(name))


def _columns(rows: Sequence[dict]) -> list[tuple[str, float | None]]:
    """The passes that were measured, each at every sparsity it was measured at."""
    columns = []
    for name in (*PASSES, DECODE):
        inside = [row for row in rows if row["pass"] == name]
        sparsities = sorted({row["sparsity"] for row in inside if row["sparsity"] is not None}) or [None]
        columns += [(name, sparsity) for sparsity in sparsities if inside]
    return columns


def _dense_lines(rows: Iterable[dict], name: str) -> dict[str, list[dict]]:
    lines: dict[str, list[dict]] = {}
    for row in sorted(rows, key=lambda row: row["length"]):
        if row["stage"] == DENSE and row["pass"] == name and row["status"] == "ok":
            lines.setdefault(row["method"], []).append(row)
    return lines


def _plot(ax, line: Sequence[dict], value: str, **style) -> None:
    points = [(row["length"], row[value]) for row in line if row[value] is not None]
    if points:
        ax.plot(*zip(*points, strict=True), linewidth=style.pop("linewidth", 1.5), **style)
    for row in line:  # short sequences do not get as sparse as asked for
        if row["sparsity"] is not None and abs(row["causal_sparsity"] - row["sparsity"]) > 0.02 and row[value]:
            ax.plot(row["length"], row[value], **(style | {"markerfacecolor": "white", "label": None, "zorder": 3}))


def write_report(root: Path) -> str:
    """speed.md, speed.png and speed.pdf from the rows in ``root``; returns the table.

    Raises:
        ValueError: there are no rows.
    """
    rows = read_rows(root / SPEED)
    if not rows:
        raise ValueError(
            f"no rows in {root / SPEED}: run `python -m experiments.speed output_dir={root}` on a GPU first"
        )
    table = to_markdown(rows)
    write_atomically(root / "speed.md", table)
    draw(rows, root / "speed")
    return table


def print_report(module: str, write: Callable[[Path], str], arguments: Sequence[str]) -> None:
    """The command line of a module that writes a report into a directory of rows and returns its table."""
    with user_errors():
        directory = parse(module, arguments).directory
        check_exists(directory, "name the directory of a benchmark's rows")
        table = write(directory)
    print(table)


def main(arguments: Sequence[str]) -> None:
    print_report("experiments.speed.report", write_report, arguments)
    print(f"{Path(arguments[0]) / 'speed.png'} and .pdf, speed.md")


if __name__ == "__main__":
    main(sys.argv[1:])
