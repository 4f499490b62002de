"""Figures 1, 2, 11 and 12: scores against what they cost."""

from collections.abc import Sequence
from pathlib import Path

from data.tasks import SUITES
from experiments.figures.rows import Drawn, Study, averaged, grouped, line_of
from experiments.frontier import is_ablation, of_frontiers, points, untrained
from experiments.pareto import draw as draw_frontiers
from experiments.pareto import table as frontier_table
from experiments.plots import grid, save, styles
from experiments.tasks.decoding import DECODE

MISSING = "missing"
# Columns of a RULER table: the groups the paper reports.
GROUPS = {
    "SG 1-3": ("niah_single_1", "niah_single_2", "niah_single_3"),
    "MK 1-3": ("niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
    "MV, MQ": ("niah_multivalue", "niah_multiquery"),
    "VT, CWE, FWE": ("vt", "cwe", "fwe"),
    "QA 1-2": ("qa_1", "qa_2"),
}
FACTORS = ("alpha", "chunk_size", "sigma", "prior", "summary", "group", "router_scale")
CONTROL = ("prior", "raw")  # of configs/sweep/ablations.yaml


def make_frontiers(study: Study) -> Drawn | None:
    found = points(row for row in of_frontiers(study.evaluations) if not is_ablation(row))
    if not found:
        return None
    notes = [f"{panel.title}: untrained, the dense control does not reach 99 %" for panel in sorted(untrained(found))]
    return Drawn(frontier_table(found), lambda path: draw_frontiers(found, path), notes)


def make_costs(study: Study) -> Drawn | None:
    """Score against bytes read and, where it was measured, time per decoded token."""
    decoding = {_model_of(row): row for row in study.of(DECODE, "ms")}
    rows = [row for row in of_frontiers(study.evaluations) if row.get("bytes_read") is not None]
    rows = [_with_panel(row) for row in rows if not is_ablation(row)]
    if not rows:
        return None
    costs = {"bytes_read": "bytes read per token"}
    timed = {id(row): decoding[_model_of(row)] for row in rows if _model_of(row) in decoding}
    if timed:
        costs["decode_ms"] = "ms per decoded token"
        devices = sorted({row["device"] for row in timed.values()})
        notes = [f"Time per decoded token: of one sequence, on {', '.join(devices)}."]
        rows = [row | {"decode_ms": timed[id(row)]["score"]} if id(row) in timed else row for row in rows]
    else:
        notes = [f"Time per decoded token: missing, rows come from evaluate.py tasks=[{DECODE}]."]
    table = []
    for cost in costs:
        with_cost = [row for row in rows if row.get(cost) is not None]
        means = averaged(with_cost, "panel", "label", "trained_knob", "knob")
        amounts = averaged(with_cost, "panel", "label", "trained_knob", "knob", value=cost)
        table += [{"cost": cost, **score, "amount": amount[cost]} for score, amount in zip(means, amounts, strict=True)]

    def draw(path: Path) -> None:
        panels = list(dict.fromkeys((row["cost"], row["panel"]) for row in table))
        figure, axes = grid(len(panels))
        style = styles(row["label"] for row in rows)
        for ax, (cost, panel) in zip(axes, panels, strict=True):
            inside = [row for row in table if (row["cost"], row["panel"]) == (cost, panel)]
            for label, line in grouped(inside, "label").items():
                line = sorted(line, key=lambda row: row["amount"])
                colour, mark = style[label]
                xs, ys = [row["amount"] for row in line], [row["score"] for row in line]
                ax.plot(xs, ys, color=colour, marker=mark, linewidth=1.2, linestyle=":", label=label)
            ax.set_title(panel, fontsize=10)
            ax.set_xlabel(costs[cost])
            ax.set_xscale("log")
            ax.grid(alpha=0.25)
            ax.legend(fontsize=8)
        save(figure, path)

    return Drawn(table, draw, notes)


def make_ruler(study: Study) -> Drawn | None:
    """One row a setting and length; columns are the 13 tasks, the paper's groups and the average."""
    rows = [row for row in study.evaluations if row["task"] in SUITES["ruler"]]
    if not rows:
        return None
    table, differs = [], {}
    for (line, length), inside in _by(rows, lambda row: (line_of(row), row["length"])).items():
        scores = {row["task"]: row["score"] for row in averaged(inside, "task")}
        table.append(
            {
                "model": line,
                "length": length,
                "causal_sparsity": sum(row["causal_sparsity"] for row in inside) / len(inside),
                "seeds": len({row["seed"] for row in inside}),
                **{task: scores.get(task, MISSING) for task in SUITES["ruler"]},
                **{name: _mean_or_missing(scores, tasks) for name, tasks in GROUPS.items()},
                "average": _mean_or_missing(scores, SUITES["ruler"]),
            }
        )
        differs |= {row["task"]: row["differs"] for row in inside if row.get("differs")}
    notes = [f"{task} departs from RULER: {how}." for task, how in sorted(differs.items())]
    return Drawn(sorted(table, key=lambda row: (row["length"], row["model"])), None, notes)


def make_ablations(study: Study) -> Drawn | None:
    """Rows whose label is FACTOR:VALUE, as in label=sigma:100."""
    rows = []
    for row in of_frontiers(study.evaluations):
        if is_ablation(row):
            factor, _, value = row["label"].partition(":")
            rows.append(_with_panel(row) | {"factor": factor, "value": value})
    if not rows:
        return None
    scores = averaged(rows, "factor", "panel", "value", "knob")
    sparsities = averaged(rows, "factor", "panel", "value", "knob", value="causal_sparsity")
    table = [
        score | {"causal_sparsity": sparsity["causal_sparsity"]}
        for score, sparsity in zip(scores, sparsities, strict=True)
    ]
    absent = [factor for factor in FACTORS if factor not in {row["factor"] for row in rows}]
    notes = [f"Missing: {', '.join(absent)}."] if absent else []
    control = [row for row in table if (row["factor"], row["value"]) == CONTROL]
    if control:
        notes.append(f"Dashed: {':'.join(CONTROL)}, from which the lines beside it differ in one option.")

    def draw(path: Path) -> None:
        panels = _by(table, lambda row: (row["panel"], row["factor"]))
        figure, axes = grid(len(panels))
        for ax, ((panel, factor), inside) in zip(axes, panels.items(), strict=True):
            style = styles(row["value"] for row in inside)
            for value, line in grouped(inside, "value").items():
                if (factor, value) != CONTROL:
                    colour, mark = style[value]
                    _line(ax, line, label=f"{factor} {value}", color=colour, marker=mark)
            beside = [row for row in control if row["panel"] == panel and factor in FACTORS]
            _line(ax, beside, label=" ".join(CONTROL), color="#444444", linestyle="--", marker=".")
            ax.set_title(f"{factor}\n{panel}", fontsize=9)
            ax.ticklabel_format(useOffset=False)
            ax.set_xlabel("causal sparsity")
            ax.grid(alpha=0.25)
            ax.legend(fontsize=8)
        save(figure, path)

    return Drawn(table, draw, notes)


def _line(ax, points: list[dict], **style) -> None:
    """Scores against sparsity, with the spread over seeds where there is one."""
    points = sorted(points, key=lambda row: row["causal_sparsity"])
    xs, ys = [row["causal_sparsity"] for row in points], [row["score"] for row in points]
    spread = [row["spread"] for row in points]
    if points:
        ax.errorbar(xs, ys, yerr=spread if any(spread) else None, linewidth=1.2, **style)


def _model_of(row: dict) -> tuple:
    """What tells the model and the length that a row is about."""
    return tuple(row[name] for name in ("data", "label", "config_hash", "seed", "step", "knob", "length"))


def _with_panel(row: dict) -> dict:
    return row | {"panel": points([row])[0].panel.title}


def _by(rows: Sequence[dict], key) -> dict:
    groups: dict = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _mean_or_missing(scores: dict[str, float], tasks: Sequence[str]) -> float | str:
    if any(task not in scores for task in tasks):
        return MISSING
    return sum(scores[task] for task in tasks) / len(tasks)
