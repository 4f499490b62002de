"""From rows to throughput: ``python -m experiments.throughput.report DIRECTORY`` writes throughput.{md,png,pdf} there.

Reads only throughput.jsonl; needs no GPU.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from experiments.files import THROUGHPUT, read_rows, write_atomically
from experiments.plots import from_zero, grid, handles_of, legend_below, save, styles
from experiments.speed.report import in_a_cell, print_report, provenance_lines, tokens

CASE = ("backend", "length", "pattern", "micro_batch_tokens", "compile", "activation_checkpointing")
PANELS = {
    "tokens_per_s": "tokens per second",
    "mfu_causal": "MFU, counted as dense causal",
    "mfu_sparse": "MFU, of the keys that are read",
}


def newest(rows: Iterable[dict]) -> list[dict]:
    """Of rows about the same thing on the same device the one written last; running out of time unsays nothing."""
    kept: dict[tuple, dict] = {}
    for row in rows:
        key = (row["device"], *row["train"], row.get("sparsity"), *(row[name] for name in CASE))
        if key not in kept or row["status"] != "out of time":
            kept[key] = row
    return list(kept.values())


def label(row: dict) -> str:
    """What a line is of; rows from before they were kept lack the sparsity that was asked for."""
    asked = f" {row['sparsity']:.0%}" if row.get("sparsity") else ""
    return row["backend"] + (f", {row['pattern']}{asked}" if row["pattern"] else "")


def fastest(rows: Iterable[dict]) -> list[dict]:
    """Of each backend, length and pattern the fastest setting, by length."""
    best: dict[tuple, dict] = {}
    for row in rows:
        key = (row["device"], *row["train"], label(row), row["length"])
        if row["status"] == "ok" and row["tokens_per_s"] > best.get(key, row | {"tokens_per_s": 0})["tokens_per_s"]:
            best[key] = row
    return sorted(best.values(), key=lambda row: (row["length"], label(row)))


def is_measured(rows: Iterable[dict]) -> bool:
    """Whether there is a model's measurement among them."""
    return any(row["status"] == "ok" and row["backend"] != "loader" for row in rows)


def sections(rows: Iterable[dict]) -> Iterator[tuple[list[str], list[dict]]]:
    """Lines of a heading, and the rows of one device and one training."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["device"], *row["train"]), []).append(row)
    for (device, *train), inside in groups.items():
        yield [f"## {device}: {' '.join(train)}\n", *provenance_lines(inside)], inside


def to_markdown(rows: Sequence[dict]) -> str:
    """All measurements, by device and by what was trained."""
    out = []
    for heading, inside in sections(newest(rows)):
        out += [
            *heading,
            "| length | backend | micro-batch | compiled | checkpointed | causal sparsity | tokens/s | against dense "
            "| MFU, as dense | MFU, of keys read | peak memory | data wait |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        models = [row for row in inside if row["backend"] != "loader"]
        dense = {row["length"]: row["tokens_per_s"] for row in fastest(models) if row["backend"] == "full"}
        out += [_line(row, dense.get(row["length"])) for row in sorted(models, key=_order)]
        highest = max((row["tokens_per_s"] or 0 for row in models), default=0)
        for row in inside:
            if row["backend"] == "loader" and highest:
                rate = row["tokens_per_s"]
                out.append(
                    f"\nThe loader alone, packed documents in rows of {tokens(row['length'])}, one thread: {rate:,.0f} "
                    f"tokens/s, {rate / highest:.0f} times the fastest model."
                )
        out.append("")
    return "\n".join(out) + "\n"


def _order(row: dict) -> tuple:
    return (row["length"], row["backend"] != "full", label(row), -(row["tokens_per_s"] or 0))


def _line(row: dict, dense: float | None) -> str:
    case = [tokens(row["length"]), label(row), tokens(row["micro_batch_tokens"])]
    case += ["yes" if row[name] else "no" for name in ("compile", "activation_checkpointing")]
    if row["status"] != "ok":
        why = in_a_cell(f"{row['status']} {row['detail'] or ''}")
        return f"| {' | '.join(case)} | {why} |" + " |" * 6

    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.1%}"

    measured = [share(row["causal_sparsity"]), f"{row['tokens_per_s']:,.0f}"]
    measured += [f"{row['tokens_per_s'] / dense:.2f}x" if dense else ""]
    measured += [share(row.get("mfu_causal")), share(row.get("mfu_sparse"))]
    measured += [f"{row['peak_memory_mib'] / 1024:.1f} GiB", share(row["data_wait"] / row["step_time"])]
    return f"| {' | '.join(case + measured)} |"


def draw(rows: Sequence[dict], path: Path) -> None:
    """Throughput and both utilisations against length, of each backend's fastest setting; ``path`` has no suffix."""
    from matplotlib.ticker import EngFormatter, PercentFormatter

    rows = [row for row in fastest(newest(rows)) if row["backend"] != "loader"]
    present = {name: title for name, title in PANELS.items() if any(row.get(name) is not None for row in rows)}
    figure, axes = grid(len(present))
    lines: dict[str, list[dict]] = {}
    shared = set.intersection(*({row["device"], *row["train"]} for row in rows))
    for row in rows:
        own = [word for word in (row["device"], *row["train"]) if word not in shared]
        lines.setdefault(", ".join([label(row), *own]), []).append(row)
    style = styles(lines)
    for ax, (name, title) in zip(axes, present.items(), strict=True):
        for line, points in lines.items():
            colour, mark = style[line]
            if known := [row for row in points if row.get(name) is not None]:
                ax.plot([p["length"] for p in known], [p[name] for p in known], color=colour, marker=mark, label=line)
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(lambda x, _: tokens(x))
        from_zero(ax)
        ax.yaxis.set_major_formatter(EngFormatter(sep="") if name == "tokens_per_s" else PercentFormatter(1.0))
        ax.set_xlabel("tokens in a row")
        ax.set_ylabel(title)
        ax.grid(alpha=0.25)
    if rows[0]["device"] in shared:
        figure.suptitle(rows[0]["device"], fontsize=9)
    legend_below(figure, handles_of(axes))
    save(figure, path)


def write_report(root: Path) -> str:
    """throughput.md, .png and .pdf from the rows in ``root``; returns the table.

    Raises:
        ValueError: no model was measured.
    """
    rows = read_rows(root / THROUGHPUT)
    if not is_measured(rows):
        raise ValueError(
            f"no measurements in {root / THROUGHPUT}: run `python -m experiments.throughput output_dir={root}`"
        )
    table = to_markdown(rows)
    write_atomically(root / "throughput.md", table)
    draw(rows, root / "throughput")
    return table


def main(arguments: Sequence[str]) -> None:
    print_report("experiments.throughput.report", write_report, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
