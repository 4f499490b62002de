"""From rows to speed: ``python -m experiments.speed.report outputs/speed`` writes speed.{md,png,pdf} there.

Reads only speed.jsonl; needs no GPU. Every ratio is against dense attention measured in the same run.
"""

import math
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from experiments.arguments import parse
from experiments.errors import user_errors
from experiments.files import SPEED, check_exists, read_rows, write_atomically
from experiments.plots import BLACK, entitle, handles_of, legend_below, plain_log, pyplot, save, styles
from experiments.speed.rows import (
    CASE,
    CUDNN,
    DECODE,
    DECODE_PASSES,
    DENSE,
    FLASH_3,
    FULL,
    MODEL_DECODE,
    PASSES,
    PATTERNS,
    STAGES,
    batch,
    curves,
    model_of,
    setups,
    with_ratios,
)
from experiments.speed.shapes import shapes_table

_AXES = {"ms": "ms", "ratio": "speed-up", "extra_mib": "extra memory, MiB"}  # columns of the rows
_WIDE = 4  # columns of a figure, side by side


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
            measured = [row for row in inside if row["pass"] == name and row["status"] == "ok"]
            for model in dict.fromkeys(map(model_of, measured)):
                out += _decode_table([row for row in measured if model_of(row) == model])
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
    """A line for each length, number of sequences, sparsity and method of one decoding pass, of one model if any."""
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
    rows = [row for row in with_ratios(rows) if row["pass"] != MODEL_DECODE and batch(row) == 1]
    for number, (setup, inside) in enumerate(setups(rows).items()):
        columns = _columns(inside)
        # As many side by side as a page is wide enough for.
        blocks = [columns[first : first + _WIDE] for first in range(0, len(columns), _WIDE)]
        values = [
            [key for key in _AXES if key != "extra_mib" or _has_memory(inside, [name for name, _ in block])]
            for block in blocks
        ]
        size = (3.1 * min(_WIDE, len(columns)), 2.4 * sum(map(len, values)) + 1.2)
        figure = pyplot().figure(figsize=size, layout="constrained")
        parts = figure.subfigures(len(blocks), 1, height_ratios=list(map(len, values)), squeeze=False)[:, 0]
        style_of = styles({curve.method for name, _ in columns for curve in curves(inside, name)})
        others = sorted({row["against"] for row in inside if row["ratio"]} - {FLASH_3})
        has_flash_3 = any(row["against"] == FLASH_3 for row in inside if row["ratio"])
        against = FLASH_3 if has_flash_3 else others.pop() if len(others) == 1 else "dense attention"
        handles = {}
        for part, block, keys in zip(parts, blocks, values, strict=True):
            cells = part.subplots(len(keys), min(_WIDE, len(columns)), squeeze=False, sharex=True, sharey="row")
            for ax in cells[:, len(block) :].flat:
                ax.remove()
            axes = cells[:, : len(block)]
            for column, (name, sparsity) in zip(axes.T, block, strict=True):
                _draw_column(dict(zip(keys, column, strict=True)), inside, name, sparsity, style_of)
            for ax, key in zip(axes[:, 0], keys, strict=True):
                ax.set_ylabel(_AXES[key] + (f" over {against}" if key == "ratio" else ""))
                if key == "ms":
                    plain_log(ax.yaxis)
                if key == "extra_mib":  # once all columns are drawn, which share the axis
                    ax.set_ylim(bottom=0)
                    ax.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
            handles |= handles_of(axes[0])
        legend_below(figure, handles, columns=3)
        figure.suptitle(
            f"{title(setup)}\nhollow: the sparsity reached is another, see the table; "
            f"a line has the lengths that were measured{_else(others)}",
            fontsize=9,
        )
        name = path.name if number == 0 else f"{path.name}-{number + 1}"
        save(figure, path.with_name(name))


def _else(against: Sequence[str]) -> str:
    return f"\nwhere {FLASH_3} was not timed in the same run, speed-up over {' or '.join(against)}" if against else ""


def _has_memory(rows: Iterable[dict], passes: Collection[str]) -> bool:
    return any(row["extra_mib"] is not None for row in rows if row["pass"] in passes)


def _draw_column(
    axes: Mapping, rows: Sequence[dict], name: str, sparsity: float | None, style_of: Mapping[str, tuple[str, str]]
) -> None:
    """One pass at one sparsity; ``axes`` by what they show."""
    from matplotlib.ticker import LogLocator, NullFormatter

    for key, ax in axes.items():
        for label, line in _dense_lines(rows, name).items() if key != "ratio" else ():
            dashes = {FLASH_3: "-", CUDNN: ":", FULL: "-."}.get(label, "--")
            _plot(ax, line, key, label=label, color=BLACK, linewidth=1, linestyle=dashes)
        for curve in curves(rows, name):
            if curve.sparsity == sparsity:
                colour, mark = style_of[curve.method]
                style = {"color": colour, "marker": mark, "markersize": 4, "linestyle": PATTERNS[curve.pattern]}
                _plot(ax, curve.rows, key, label=curve.label, **style)
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(lambda x, _: tokens(x))
        ax.grid(alpha=0.25)
        if key == "extra_mib":
            ax.set_yscale("symlog", linthresh=1)  # nothing is a possible amount
        else:
            ax.set_yscale("log")
        if key == "ratio":
            ax.axhline(1, color=BLACK, linewidth=1)
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter(lambda y, _: f"{y:g}x")
            ax.yaxis.set_minor_formatter(NullFormatter())
    first, *_, last = axes.values()
    what = name.replace("+", " + ")
    entitle(first, what if sparsity is None else f"{what}, {sparsity:.0%} sparse")
    last.set_xlabel("tokens")


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
