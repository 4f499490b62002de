"""From rows to scaling: ``python -m experiments.throughput.scaling_report DIRECTORY`` writes parallel.md there.

Reads only parallel.jsonl; needs no GPU.
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from experiments.files import SCALING, read_rows, write_atomically
from experiments.plots import from_zero, grid, save, styles
from experiments.speed.report import in_a_cell, print_report, tokens
from experiments.throughput.report import sections

# What the ranks compute together, and how: rows that agree in the first are compared.
WORK = ("backend", "length", "tokens_per_step", "tokens_per_micro_batch", "compile", "activation_checkpointing")
WAY = ("ranks", "stage", "shares_rows", "warmup", "steps")


def case_of(row: dict) -> tuple:
    """Equal for two measurements of the same thing on the same device."""
    return (row["device"], *row["train"], *(row[name] for name in (*WORK, *WAY)))


def _work_of(row: dict) -> tuple:
    return (row["device"], *row["train"], *(row[name] for name in WORK))


def compared(rows: Iterable[dict]) -> list[dict]:
    """Of rows about the same thing the one written last, each beside what one rank measured of the same work.

    ``efficiency`` is the tokens per second over as many times those of one rank, ``loss_difference`` the largest of a
    step, and ``against`` the commit that the one rank ran, if it was another; all are None where there is nothing to
    compare.
    """
    rows = list(rows)
    alone = [row for row in rows if row["ranks"] == 1 and row["status"] == "ok"]
    newest = {_work_of(row): row for row in alone}
    of_commit = {(_work_of(row), row["git_sha"]): row for row in alone}
    found = []
    for row in {case_of(row): row for row in rows}.values():
        work = _work_of(row)
        found.append(row | _against(row, of_commit.get((work, row["git_sha"])) or newest.get(work)))
    return found


def _against(row: dict, alone: dict | None) -> dict:
    if row["status"] != "ok" or row["ranks"] == 1 or alone is None:
        return dict.fromkeys(("efficiency", "loss_difference", "against"))
    steps = zip(row["losses"], alone["losses"], strict=False)
    return {
        "efficiency": row["tokens_per_s"] / alone["tokens_per_s"] / row["ranks"],
        "loss_difference": max(abs(loss - loss_alone) for loss, loss_alone in steps),
        "against": None if alone["git_sha"] == row["git_sha"] else (alone["git_sha"] or "unknown")[:10],
    }


def to_markdown(rows: Sequence[dict]) -> str:
    """All measurements, by device and by what was trained; of those about the same thing the one written last."""
    out = []
    for heading, inside in sections(compared(rows)):
        out += [
            *heading,
            "Efficiency: tokens per second over as many times those of one device at the same step. Loss: the largest "
            "difference of a step from one device. Memory: PyTorch's peak on the device that took most.\n",
            "| length | backend | devices | ZeRO stage | each row | compiled | checkpointed | tokens/s | efficiency "
            "| step | memory | loss |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        out += [_line(row) for row in sorted(inside, key=_order)]
        out.append("")
    return "\n".join(out) + "\n"


def _order(row: dict) -> tuple:
    return (row["length"], row["backend"] != "full", row["backend"], not row["compile"], row["ranks"], row["stage"])


def _line(row: dict) -> str:
    case = [tokens(row["length"]), row["backend"], str(row["ranks"]), str(row["stage"])]
    case += ["shared" if row["shares_rows"] else "whole"]
    case += ["yes" if row[name] else "no" for name in ("compile", "activation_checkpointing")]
    if row["status"] != "ok":
        why = in_a_cell(f"{row['status']} {row['detail'] or ''}")
        return f"| {' | '.join(case)} | {why} |" + " |" * 4
    efficiency = difference = ""
    if row["efficiency"] is not None:
        efficiency, difference = f"{row['efficiency']:.1%}", f"{row['loss_difference']:.1e}"
        efficiency += f", one device at commit {row['against']}" if row["against"] else ""
    measured = [f"{row['tokens_per_s']:,.0f}", efficiency, f"{row['step_time']:.3f} s"]
    measured += [f"{row['peak_memory_mib'] / 1024:.1f} GiB", difference]
    return f"| {' | '.join(case + measured)} |"


def draw(rows: Sequence[dict], path: Path) -> None:
    """Efficiency of every backend in every mode, a panel for each number of devices.

    ``rows`` are ``compared``; ``path`` has no suffix.
    """
    rows = sorted((row for row in rows if row["efficiency"] is not None), key=_mode_order)
    panels: dict[tuple, list[dict]] = {}
    for row in rows:
        panels.setdefault((row["ranks"], row["device"]), []).append(row)
    style = styles(row["backend"] for row in rows)
    widest = max(len({_mode(row) for row in inside}) for inside in panels.values())
    figure, axes = grid(len(panels), width=2.0 + 1.1 * widest)
    for ax, ((ranks, device), inside) in zip(axes, sorted(panels.items()), strict=True):
        modes = list(dict.fromkeys(map(_mode, inside)))
        backends = sorted({row["backend"] for row in inside})
        for number, backend in enumerate(backends):
            points = [row for row in inside if row["backend"] == backend]
            aside = (number - (len(backends) - 1) / 2) / (2 * len(backends))  # so that none covers another
            xs, ys = [modes.index(_mode(row)) + aside for row in points], [row["efficiency"] for row in points]
            ax.plot(xs, ys, color=style[backend][0], marker=style[backend][1], linestyle="", label=backend)
        ax.axhline(1, color="grey", linewidth=1, linestyle="--")
        ax.set_xticks(range(len(modes)), modes, fontsize=8)
        from_zero(ax)
        ax.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
        ax.set_ylabel("tokens per second, of the ideal")
        ax.set_title(f"{ranks} x {device}", fontsize=10)
        ax.grid(axis="y", alpha=0.25)
        ax.legend(fontsize=8, loc="lower left")
    save(figure, path)


def _mode_order(row: dict) -> tuple:
    return (row["length"], row["shares_rows"], row["stage"], not row["compile"], row["activation_checkpointing"])


def _mode(row: dict) -> str:
    return "\n".join(
        [
            f"{tokens(row['length'])}, ZeRO {row['stage']}",
            *(["rows shared"] if row["shares_rows"] else []),
            "compiled" if row["compile"] else "not compiled",
            *(["checkpointed"] if row["activation_checkpointing"] else []),
        ]
    )


def write_report(root: Path) -> str:
    """parallel.md from the rows in ``root``; returns the table.

    Raises:
        ValueError: there are no rows.
    """
    rows = read_rows(root / SCALING)
    if not rows:
        raise ValueError(
            f"no rows in {root / SCALING}: run `python -m experiments.throughput.scaling output_dir={root}`"
        )
    table = to_markdown(rows)
    write_atomically(root / "parallel.md", table)
    return table


def main(arguments: Sequence[str]) -> None:
    print_report("experiments.throughput.scaling_report", write_report, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
