"""From rows to scaling: ``python -m experiments.parallel_report DIRECTORY`` writes parallel.md there.

Reads only parallel.jsonl; needs no GPU.
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from experiments.files import read_rows, write_atomically
from experiments.speed_report import in_a_cell, print_report, tokens
from experiments.throughput_report import sections

ROWS = "parallel.jsonl"
# What the ranks compute together, and how: rows that agree in the first are compared.
WORK = ("backend", "length", "tokens_per_step", "tokens_per_micro_batch", "compile", "activation_checkpointing")
WAY = ("ranks", "stage", "shares_rows", "warmup", "steps")


def case_of(row: dict) -> tuple:
    """Equal for two measurements of the same thing on the same device."""
    return (row["device"], *row["train"], *(row[name] for name in (*WORK, *WAY)))


def alone_of(rows: Iterable[dict]) -> dict[tuple, dict]:
    """(device, overrides, work) -> what one rank measured of it."""
    return {_work_of(row): row for row in rows if row["ranks"] == 1 and row["status"] == "ok"}


def _work_of(row: dict) -> tuple:
    return (row["device"], *row["train"], *(row[name] for name in WORK))


def to_markdown(rows: Sequence[dict]) -> str:
    """All measurements, by device and by what was trained; of those about the same thing the one written last."""
    out = []
    for heading, inside in sections({case_of(row): row for row in rows}.values()):
        out += [
            *heading,
            "Efficiency: tokens per second over as many times those of one device at the same step. Loss: the largest "
            "difference of a step from one device. Memory: PyTorch's peak on the device that took most.\n",
            "| length | backend | devices | ZeRO stage | each row | compiled | checkpointed | tokens/s | efficiency "
            "| step | memory | loss |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        alone = alone_of(inside)
        out += [_line(row, alone.get(_work_of(row))) for row in sorted(inside, key=_order)]
        out.append("")
    return "\n".join(out) + "\n"


def _order(row: dict) -> tuple:
    return (row["length"], row["backend"] != "full", row["backend"], not row["compile"], row["ranks"], row["stage"])


def _line(row: dict, alone: dict | None) -> str:
    case = [tokens(row["length"]), row["backend"], str(row["ranks"]), str(row["stage"])]
    case += ["shared" if row["shares_rows"] else "whole"]
    case += ["yes" if row[name] else "no" for name in ("compile", "activation_checkpointing")]
    if row["status"] != "ok":
        why = in_a_cell(f"{row['status']} {row['detail'] or ''}")
        return f"| {' | '.join(case)} | {why} |" + " |" * 4
    efficiency = difference = ""
    if alone is not None and row["ranks"] > 1:
        efficiency = f"{row['tokens_per_s'] / alone['tokens_per_s'] / row['ranks']:.1%}"
        steps = zip(row["losses"], alone["losses"], strict=False)
        difference = f"{max(abs(loss - loss_alone) for loss, loss_alone in steps):.1e}"
    measured = [f"{row['tokens_per_s']:,.0f}", efficiency, f"{row['step_time']:.3f} s"]
    measured += [f"{row['peak_memory_mib'] / 1024:.1f} GiB", difference]
    return f"| {' | '.join(case + measured)} |"


def write_report(root: Path) -> str:
    """parallel.md from the rows in ``root``; returns the table.

    Raises:
        ValueError: there are no rows.
    """
    rows = read_rows(root / ROWS)
    if not rows:
        raise ValueError(f"no rows in {root / ROWS}: run `python -m experiments.parallel output_dir={root}`")
    table = to_markdown(rows)
    write_atomically(root / "parallel.md", table)
    return table


def main(arguments: Sequence[str]) -> None:
    print_report("experiments.parallel_report", write_report, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
