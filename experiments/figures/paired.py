"""Differences in loss between attentions that read the same rows: what intervals over documents hide."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.figures.frontier import title_of
from experiments.figures.rows import Drawn, Study, grouped
from experiments.figures.setpoints import AtSparsity
from experiments.intervals import filled, ratio_stderr, student
from experiments.plots import BLACK, grid, handles_of, legend_below, save, styles

REFERENCE = "infllmv2"
AS_TRAINED = "as trained"


class Setting(NamedTuple):
    """What rows must share to be compared."""

    data: str
    length: int
    rows: int
    trained: str
    at: str


def make_paired(study: Study) -> Drawn | None:
    """Losses at a sparsity that was asked for, less those of ``REFERENCE`` on the same rows of the same seed. Its
    interval is over rows, whose differences are means over seeds; it says nothing of other seeds."""
    losses = [
        row
        for row in study.of("loss", "nats")
        if isinstance(row["knob"], AtSparsity) and row.get("by_row") and filled(row["by_row"]["targets"]) > 1
    ]
    table, unlike, twice = [], set(), set()
    for setting, rows in grouped(losses, _setting).items():
        arms = grouped(rows, "label")
        several = {label for label, own in arms.items() if len({row["seed"] for row in own}) < len(own)}
        twice |= several
        arms = {label: own for label, own in arms.items() if label not in several}
        reference = {row["seed"]: row for row in arms.pop(REFERENCE, ())}
        for label, own in arms.items():
            pairs = [(row, reference[row["seed"]]) for row in own if row["seed"] in reference]
            alike = [pair for pair in pairs if _are_alike(*pair)]
            unlike |= {label} if len(alike) < len(pairs) else set()
            if alike:
                table.append(setting._asdict() | {"label": label} | _difference(alike))
    if not table:
        return None
    table.sort(key=lambda row: (row["trained"], row["length"], row["at"] != AS_TRAINED, row["at"], row["label"]))
    notes = [
        f"Below 0 is better than {REFERENCE} at the same sparsity asked for. Bars: 95 % interval over rows, which both "
        "read; other seeds may differ by more.",
        "The measured sparsities of the two differ by up to "
        f"{100 * max(abs(row['sparsity_difference']) for row in table):.1f} points: in the table.",
        *([f"Left out, for other rows than those of {REFERENCE}: {', '.join(sorted(unlike))}."] if unlike else []),
        *([f"Left out, for several models of one seed: {', '.join(sorted(twice))}."] if twice else []),
    ]

    def draw(path: Path) -> None:
        panels = grouped(table, "data", "length", "trained")
        style = styles(row["label"] for row in table)
        figure, axes = grid(len(panels), columns=2)
        for ax, ((data, length, trained), rows) in zip(axes, panels.items(), strict=True):
            ticks = list(dict.fromkeys(row["at"] for row in rows))
            labels = sorted({row["label"] for row in rows})
            for place, label in enumerate(labels):
                line = [row for row in rows if row["label"] == label]
                at = [ticks.index(row["at"]) + 0.6 * ((place + 0.5) / len(labels) - 0.5) for row in line]
                means, colour, mark = [row["difference"] for row in line], *style[label]
                ax.vlines(at, [row["low"] for row in line], [row["high"] for row in line], color=colour, linewidth=1)
                ax.plot(at, means, mark, color=colour, markersize=5, label=label)
            ax.axhline(0.0, color=BLACK, linestyle="--", linewidth=1)
            ax.set_xticks(range(len(ticks)), ticks)
            ax.set_xlim(-0.5, len(ticks) - 0.5)
            ax.set_xlabel("causal sparsity asked for")
            ax.set_ylabel(f"nats above {REFERENCE}")
            ax.set_title(title_of(data, f"{length} tokens", trained), fontsize=9)
            ax.grid(alpha=0.25, axis="y")
        legend_below(figure, handles_of(axes))
        save(figure, path)

    return Drawn(table, draw, notes, losses)


def _setting(row: dict) -> Setting:
    knob = row["trained_knob"]
    trained = "untrained" if knob is None else "trained"
    if isinstance(knob, AtSparsity):  # others each have a knob of their own
        trained += f" at {knob}"
    at = AS_TRAINED if row["knob"].is_held else str(row["knob"])
    return Setting(row["data"], row["length"], row["rows"], trained, at)


def _are_alike(row: dict, reference: dict) -> bool:
    return all(row["by_row"][name] == reference["by_row"][name] for name in ("corpus", "targets"))


def _difference(pairs: Sequence[tuple[dict, dict]]) -> dict:
    """Of (row, reference), one a seed: mean over seeds of the difference, and its interval over rows."""
    of_rows = zip(*(zip(a["by_row"]["nats"], b["by_row"]["nats"], strict=True) for a, b in pairs), strict=True)
    nats = [sum(a - b for a, b in seeds) / len(pairs) for seeds in of_rows]
    targets = pairs[0][0]["by_row"]["targets"]
    difference = sum(nats) / sum(targets)
    low, high = student(difference, ratio_stderr(nats, targets), filled(targets))
    sparsity = sum(a["causal_sparsity"] - b["causal_sparsity"] for a, b in pairs) / len(pairs)
    return {
        "difference": difference,
        "low": low,
        "high": high,
        "sparsity_difference": sparsity,
        "seeds": len(pairs),
    }
