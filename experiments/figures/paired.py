"""Differences between attentions that read the same rows or answered the same samples: what intervals over these
hide."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from data.task_sets import SUITES
from experiments.figures.frontier import title_of
from experiments.figures.rows import Drawn, Study, grouped
from experiments.figures.setpoints import AtSparsity
from experiments.intervals import filled, ratio_stderr, student
from experiments.plots import BLACK, grid, handles_of, legend_below, save, styles

REFERENCE = "infllmv2"
AS_TRAINED = "as trained"
# Why a label is left out.
UNLIKE = f"for other rows than those of {REFERENCE}"
TWICE = "for several models of one seed"
LACKING = "for want of tasks that others have"

Pair = tuple[dict, dict]  # a row and the reference's
LeftOut = dict[str, set[str]]  # labels by the reason


class Setting(NamedTuple):
    """What rows must share to be compared."""

    data: str
    length: int
    rows: int
    variant: str | None
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
    left_out: LeftOut = {UNLIKE: set(), TWICE: set()}
    pairs = _pairs(losses, _have_same_rows, left_out)
    table = [at._asdict() | {"label": label} | _difference(own) for (at, label), own in pairs.items()]
    said = (
        f"Below 0 is better than {REFERENCE} at the same sparsity asked for. Bars: 95 % interval over rows, which both "
        "read; other seeds may differ by more."
    )
    return _drawn(table, table, said, f"nats above {REFERENCE}", left_out, losses)


def make_paired_scores(study: Study) -> Drawn | None:
    """RULER's tasks, as far as ``REFERENCE`` was asked them: at a sparsity that was asked for, scores less those of
    ``REFERENCE`` on the same samples, and the mean of these differences over the tasks. Intervals over samples."""
    left_out: LeftOut = {UNLIKE: set(), TWICE: set(), LACKING: set()}
    used = []
    found: dict[tuple[Setting, str, int], dict[str, Pair]] = {}  # of a seed, by task
    for task in SUITES["ruler"]:
        scores = [
            row
            for row in study.of(task, "match")
            if isinstance(row["knob"], AtSparsity) and len(row.get("by_sample") or ()) > 1
        ]
        used += scores
        for (at, label), own in _pairs(scores, _have_same_samples, left_out).items():
            for pair in own:
                found.setdefault((at, label, pair[0]["seed"]), {})[task] = pair
    asked = {at: {task for other, own in found.items() if other[0] == at for task in own} for at, _, _ in found}
    whole: dict[tuple[Setting, str], list[dict[str, Pair]]] = {}
    for (at, label, _), own in found.items():
        if own.keys() == asked[at]:
            whole.setdefault((at, label), []).append(own)
        else:
            left_out[LACKING].add(label)
    table, means = [], []
    for (at, label), seeds in whole.items():
        of_tasks = {task: _score_difference([own[task] for own in seeds]) for task in seeds[0]}
        whose = at._asdict() | {"label": label}
        means.append(whose | {"task": f"mean of {len(of_tasks)}"} | _mean(list(of_tasks.values())))
        table += [means[-1], *(whose | {"task": task} | difference for task, difference in of_tasks.items())]
    said = (
        f"Above 0 is better than {REFERENCE} at the same sparsity asked for: the mean over RULER's tasks, which stand "
        "in the table. Bars: 95 % interval over samples, which both answered; other seeds may differ by more."
    )
    return _drawn(table, means, said, f"RULER above {REFERENCE}", left_out, used)


def _pairs(
    rows: Sequence[dict], are_alike: Callable[[dict, dict], bool], left_out: LeftOut
) -> dict[tuple[Setting, str], list[Pair]]:
    """By setting and label the rows of each seed with the reference's of that seed. Labels that cannot be
    compared join ``left_out``."""
    found = {}
    for setting, of_setting in grouped(rows, _setting).items():
        arms = grouped(of_setting, "label")
        several = {label for label, own in arms.items() if len({row["seed"] for row in own}) < len(own)}
        left_out[TWICE] |= several
        arms = {label: own for label, own in arms.items() if label not in several}
        reference = {row["seed"]: row for row in arms.pop(REFERENCE, ())}
        for label, own in arms.items():
            pairs = [(row, reference[row["seed"]]) for row in own if row["seed"] in reference]
            alike = [pair for pair in pairs if are_alike(*pair)]
            left_out[UNLIKE] |= {label} if len(alike) < len(pairs) else set()
            if alike:
                found[setting, label] = alike
    return found


def _drawn(
    table: list[dict], points: list[dict], said: str, unit: str, left_out: LeftOut, used: list[dict]
) -> Drawn | None:
    """The figure of ``points``, which are rows of ``table``; None where there are none."""
    if not table:
        return None
    for lines in (table, points):
        lines.sort(key=lambda row: (row["trained"], row["length"], row["at"] != AS_TRAINED, row["at"], row["label"]))
    notes = [
        said,
        "The measured sparsities of the two differ by up to "
        f"{100 * max(abs(row['sparsity_difference']) for row in table):.1f} points: in the table.",
        *(f"Left out, {why}: {', '.join(sorted(labels))}." for why, labels in left_out.items() if labels),
    ]

    def draw(path: Path) -> None:
        panels = grouped(points, "data", "length", "variant", "trained")
        style = styles(row["label"] for row in points)
        figure, axes = grid(len(panels), columns=2)
        for ax, ((data, length, variant, trained), rows) in zip(axes, panels.items(), strict=True):
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
            ax.set_ylabel(unit)
            ax.set_title(title_of(data, f"{length} tokens", variant, trained), fontsize=9)
            ax.grid(alpha=0.25, axis="y")
        legend_below(figure, handles_of(axes))
        save(figure, path)

    return Drawn(table, draw, notes, used)


def _setting(row: dict) -> Setting:
    knob = row["trained_knob"]
    trained = "untrained" if knob is None else "trained"
    if isinstance(knob, AtSparsity):  # others each have a knob of their own
        trained += f" at {knob}"
    at = AS_TRAINED if row["knob"].is_held else str(row["knob"])
    return Setting(row["data"], row["length"], row["rows"], row["variant"], trained, at)


def _have_same_rows(row: dict, reference: dict) -> bool:
    own, other = row["by_row"], reference["by_row"]
    names = ["corpus", "targets"]
    if "read" in own and "read" in other:  # rows of before do not tell
        names.append("read")
    return all(own[name] == other[name] for name in names)


def _have_same_samples(row: dict, reference: dict) -> bool:
    return row["set"] == reference["set"] and len(row["by_sample"]) == len(reference["by_sample"])


def _difference(pairs: Sequence[Pair]) -> dict:
    """Of the loss, (row, reference), one a seed: mean over seeds of the difference, and its interval over rows."""
    of_rows = zip(*(zip(a["by_row"]["nats"], b["by_row"]["nats"], strict=True) for a, b in pairs), strict=True)
    nats = [sum(a - b for a, b in seeds) / len(pairs) for seeds in of_rows]
    targets = pairs[0][0]["by_row"]["targets"]
    difference = sum(nats) / sum(targets)
    low, high = student(difference, ratio_stderr(nats, targets), filled(targets))
    return {"difference": difference, "low": low, "high": high} | _sparsity_difference(pairs)


def _score_difference(pairs: Sequence[Pair]) -> dict:
    """The same of a task's score, over samples."""
    of_samples = zip(*(zip(a["by_sample"], b["by_sample"], strict=True) for a, b in pairs), strict=True)
    scores = [sum(a - b for a, b in seeds) / len(pairs) for seeds in of_samples]
    difference, stderr = mean(scores), ratio_stderr(scores, [1] * len(scores))
    low, high = student(difference, stderr, len(scores))
    return {"difference": difference, "low": low, "high": high} | _sparsity_difference(pairs)


def _mean(of_tasks: Sequence[dict]) -> dict:
    """Of ``_score_difference`` over tasks, whose samples are independent."""
    difference = mean(of["difference"] for of in of_tasks)
    half = math.hypot(*((of["high"] - of["low"]) / 2 for of in of_tasks)) / len(of_tasks)
    sparsity = mean(of["sparsity_difference"] for of in of_tasks)
    between = {"difference": difference, "low": difference - half, "high": difference + half}
    return between | {"sparsity_difference": sparsity, "seeds": of_tasks[0]["seeds"]}


def _sparsity_difference(pairs: Sequence[Pair]) -> dict:
    sparsity = mean(a["causal_sparsity"] - b["causal_sparsity"] for a, b in pairs)
    return {"sparsity_difference": sparsity, "seeds": len(pairs)}
