"""Figures 1, 2, 11 and 12: scores against what they cost."""

from collections.abc import Sequence
from pathlib import Path

from data.tasks import SUITES
from experiments.figures.rows import Drawn, Study, averaged, grouped, line_of
from experiments.frontier import is_ablation, of_frontiers, points, untrained
from experiments.pareto import draw as draw_frontiers
from experiments.pareto import table as frontier_table
from experiments.plots import grid, save, styles

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


def make_frontiers(study: Study) -> Drawn | None:
    found = points(row for row in of_frontiers(study.evaluations) if not is_ablation(row))
    if not found:
        return None
    notes = [f"{panel.title}: untrained, the dense control does not reach 99 %" for panel in sorted(untrained(found))]
    return Drawn(frontier_table(found), lambda path: draw_frontiers(found, path), notes)


def make_costs(study: Study) -> Drawn | None:
    """Score against bytes read and, where it was measured, time per decoded token."""
    rows = [row for row in of_frontiers(study.evaluations) if row.get("bytes_read") is not None]
    rows = [_with_panel(row) for row in rows if not is_ablation(row)]
    if not rows:
        return None
    costs = {"bytes_read": "bytes read per token"}
    notes = []
    if any(row.get("decode_ms") is not None for row in rows):
        costs["decode_ms"] = "ms per decoded token"
    else:
        notes.append("Time per decoded token: missing, no row has decode_ms.")
    table = []
    for cost in costs:
        with_cost = [row for row in rows if row.get(cost) is not None]
        means = averaged(with_cost, "panel", "label", "trained_knob", "knob")
        amounts = averaged(with_cost, "panel", "label", "trained_knob", "knob", value=cost)
        table += [{"cost": cost, **score, "amount": amount[cost]} for score, amount in zip(means, amounts, strict=True)]

    def draw(path: Path) -> None:
        panels = [(cost, panel) for cost in costs for panel in grouped(rows, "panel")]
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
    return Drawn(table, None, [f"Missing: {', '.join(absent)}."] if absent else [])


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
