"""Figures 1, 2, 11 and 12: scores against what they cost."""

import math
from collections.abc import Sequence
from pathlib import Path

from data.task_sets import SUITES
from experiments.evaluation.tasks.decoding import DECODE
from experiments.figures.frontier import (
    Point,
    check_seeds,
    is_ablation,
    of_frontiers,
    panels_to_draw,
    points,
    scatter_of_mean,
    untrained,
)
from experiments.figures.pareto import draw as draw_frontiers
from experiments.figures.pareto import table as frontier_table
from experiments.figures.rows import BARS, Drawn, Study, averaged, grouped, line_of
from experiments.figures.setpoints import is_as_trained
from experiments.plots import BLACK, WIDTH, entitle, grid, handles_of, legend_below, save, styles

MISSING = "missing"
# Columns of a RULER table: the groups the paper reports.
GROUPS = {
    "SG 1-3": ("niah_single_1", "niah_single_2", "niah_single_3"),
    "MK 1-3": ("niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
    "MV, MQ": ("niah_multivalue", "niah_multiquery"),
    "VT, CWE, FWE": ("vt", "cwe", "fwe"),
    "QA 1-2": ("qa_1", "qa_2"),
}
RULER_MEANS = GROUPS | {"average": tuple(SUITES["ruler"])}
FACTORS = ("alpha", "chunk_size", "sigma", "prior", "summary", "group", "router_scale")
CONTROL = ("prior", "raw")  # of configs/sweep/ablations.yaml
BESIDE = " ".join(CONTROL)  # as a value of another factor
MARKED = f"Filled: as trained; open: the knob turned; small, and in no line: of fewer seeds than its neighbours. {BARS}"


def make_frontiers(study: Study) -> Drawn | None:
    rows = [row for row in of_frontiers(study.evaluations) if not is_ablation(row)]
    if not _has_sparse(rows):
        return None
    found = points(rows)
    notes = [f"{panel.title}: no dense control of 99 % or more" for panel in sorted(untrained(found))]
    notes += [*_not_drawn(found), BARS]
    return Drawn(frontier_table(found), lambda path: draw_frontiers(found, path), notes, rows)


def make_costs(study: Study) -> Drawn | None:
    """Score against bytes read and, where it was measured, time per decoded token, of each device by itself."""
    rows = [row for row in of_frontiers(study.evaluations) if row.get("bytes_read") is not None]
    rows = [_with_panel(row) for row in rows if not is_ablation(row)]
    if not _has_sparse(rows):
        return None
    found = points(rows)
    costs = {"bytes_read": "bytes read per token"}
    notes = [MARKED]
    for device, decoding in sorted(grouped(study.of(DECODE, "ms"), "device").items()):
        times = {_model_of(row): row["score"] for row in decoding}
        if any(_model_of(row) in times for row in rows):
            costs[f"decode_ms, {device}"] = f"ms per decoded token, {device}"
            rows = [row | {f"decode_ms, {device}": times.get(_model_of(row))} for row in rows]
    if len(costs) > 1:
        notes.append("Time per decoded token: of one sequence.")
    else:
        notes.append(f"Time per decoded token: missing, rows come from evaluate.py tasks=[{DECODE}].")
    notes += _not_drawn(found)
    table = []
    for cost in costs:
        with_cost = [row for row in rows if row.get(cost) is not None]
        keys = ("panel", "label", "trained_knob", "knob")
        means, amounts = averaged(with_cost, *keys), averaged(with_cost, *keys, value=cost)
        table += [{"cost": cost, **score, "amount": amount[cost]} for score, amount in zip(means, amounts, strict=True)]

    def draw(path: Path) -> None:
        from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, StrMethodFormatter

        named = {panel.title: panel.score for panel in panels_to_draw(found)}
        titles = list(named)
        panels = list(dict.fromkeys((row["cost"], row["panel"]) for row in table if row["panel"] in titles))
        panels.sort(key=lambda panel: (list(costs).index(panel[0]), titles.index(panel[1])))
        figure, axes = grid(
            len(panels), width=7.2 if len(panels) == 1 else WIDTH, height=4.4 if len(panels) == 1 else 3.6
        )
        style = styles(row["label"] for row in rows)
        for ax, (cost, panel) in zip(axes, panels, strict=True):
            inside = [row for row in table if (row["cost"], row["panel"]) == (cost, panel)]
            for (label, _), line in grouped(inside, "label", "trained_knob").items():
                _line(ax, line, "amount", *style[label], linestyle=":", label=label)
            entitle(ax, panel)
            ax.set_ylabel(named[panel])
            ax.set_xlabel(costs[cost])
            ax.set_xscale("log")
            ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.xaxis.set_major_formatter(EngFormatter() if cost == "bytes_read" else StrMethodFormatter("{x:g}"))
            ax.xaxis.set_minor_formatter(NullFormatter())
            ax.grid(alpha=0.25)
        legend_below(figure, handles_of(axes))
        save(figure, path)

    return Drawn(table, draw, notes, rows)


def make_ruler(study: Study) -> Drawn | None:
    """One row a setting and length; columns are the 13 tasks, the paper's groups and the average, each with its bounds
    as ``averaged`` has them."""
    rows = [row for row in study.evaluations if row["task"] in SUITES["ruler"]]
    if not rows:
        return None
    table, differs = [], {}
    keys = ("data", "variant", "trained_knob", "length")
    settings = grouped(rows, line_of, *keys)
    for (line, *setting), inside in settings.items():
        table.append(
            {
                "model": line,
                **dict(zip(keys, setting, strict=True)),
                "causal_sparsity": sum(row["causal_sparsity"] for row in inside) / len(inside),
                "seeds": len({row["seed"] for row in inside}),
            }
        )
        for name, tasks in ({task: (task,) for task in SUITES["ruler"]} | RULER_MEANS).items():
            table[-1] |= _mean_or_missing(name, inside, tasks)
        differs |= {row["task"]: row["differs"] for row in inside if row.get("differs")}
    notes = [f"{task} departs from RULER: {how}." for task, how in sorted(differs.items())]
    return Drawn(sorted(table, key=lambda row: (row["length"], row["model"])), None, notes, rows)


def make_ablations(study: Study) -> Drawn | None:
    """Rows whose label is FACTOR:VALUE, as in label=sigma:100. Means are over the seeds that have all values of a
    factor, since other seeds continue from other weights; CONTROL beside them is of the same seeds, and where it has
    some of them alone, so are they."""
    rows = []
    for row in of_frontiers(study.evaluations):
        if is_ablation(row):
            factor, _, value = row["label"].partition(":")
            rows.append(_with_panel(row) | {"factor": factor, "value": value})
    if not rows:
        return None
    table, notes, seeds = [], [], {}
    for (factor, panel), arms in grouped(rows, "factor", "panel").items():
        have = [{row["seed"] for row in arm} for arm in grouped(arms, "value").values()]
        control = []
        if factor in FACTORS and factor != CONTROL[0]:
            control = [row for row in rows if (row["factor"], row["value"], row["panel"]) == (*CONTROL, panel)]
        common = set.intersection(*have)
        shared = (common & {row["seed"] for row in control}) or common or set.union(*have)
        if left_out := set.union(*have) - shared:
            notes.append(f"{factor}: without seed {_listed(left_out)}, which has not all values.")
        elif len(set(map(frozenset, have))) > 1:
            notes.append(f"{factor}: no seed has all values, so these are means over different seeds.")
        seeds[factor, panel] = _listed(shared)
        beside = [row | {"factor": factor, "value": BESIDE} for row in control]
        arms = [row for row in [*arms, *beside] if row["seed"] in shared]
        keys = ("factor", "panel", "value", "trained_knob", "knob")
        for score, sparsity in zip(averaged(arms, *keys), averaged(arms, *keys, value="causal_sparsity"), strict=True):
            table.append(score | {"causal_sparsity": sparsity["causal_sparsity"]})
    absent = [factor for factor in FACTORS if factor not in {row["factor"] for row in rows}]
    notes += [f"Missing: {', '.join(absent)}."] if absent else []
    panels = grouped(table, "factor", "panel")
    # A control alone compares nothing.
    drawn = {
        (factor, panel): inside
        for (factor, panel), inside in sorted(panels.items())
        if factor in FACTORS and {row["value"] for row in inside} - {CONTROL[1] if factor == CONTROL[0] else BESIDE}
    }
    if not drawn:
        return Drawn(table, None, notes, rows)
    notes.append(
        f"{MARKED} Dashed: {BESIDE}, from which the lines beside it differ in one option. Other factors: in the table."
    )

    named = {row["panel"]: row["axis"] for row in rows}
    titles = {
        (factor, panel): (f"{factor}, seed {seeds[factor, panel]}\n{panel}", named[panel]) for factor, panel in drawn
    }
    return Drawn(table, lambda path: _draw_ablations(drawn, titles, path), notes, rows)


def _draw_ablations(panels: dict[tuple, list[dict]], titles: dict[tuple, tuple[str, str]], path: Path) -> None:
    """A panel for each factor and task; ``titles``: of each, and what its scores are."""
    figure, axes = grid(len(panels), height=3.4)
    for ax, (key, inside) in zip(axes, panels.items(), strict=True):
        factor, lines = key[0], grouped(inside, "value")
        control = CONTROL[1] if factor == CONTROL[0] else BESIDE
        style = styles(lines.keys() - {control}) | {control: (BLACK, "o")}
        for value, line in sorted(lines.items(), key=lambda item: (item[0] == control, _by_number(item[0]))):
            label, dashes = (BESIDE, "--") if value == control else (f"{factor} {value}", "-")
            _line(ax, line, "causal_sparsity", *style[value], linestyle=dashes, label=label)
        title, score = titles[key]
        entitle(ax, title)
        ax.set_ylabel(score)
        ax.ticklabel_format(useOffset=False)
        ax.set_xlabel("causal sparsity")
        ax.grid(alpha=0.25)
        ax.legend(fontsize=8)
    save(figure, path)


def _line(ax, line: list[dict], x: str, colour: str, mark: str, **style) -> None:
    """Scores against ``x`` in the knob's order, marked as MARKED says."""
    line = sorted(line, key=lambda row: (row["knob"] is not None, row["knob"]))
    most = max(row["seeds"] for row in line)
    for row in line:
        if row["seeds"] < most:
            ax.plot(row[x], row["score"], color=colour, marker=mark, markerfacecolor="white", markersize=3)
    line = [row for row in line if row["seeds"] == most]
    xs, ys = [row[x] for row in line], [row["score"] for row in line]
    ax.vlines(xs, [row["low"] for row in line], [row["high"] for row in line], color=colour, linewidth=1)
    ax.plot(xs, ys, color=colour, marker=mark, markerfacecolor="white", linewidth=1.2, **style)
    as_trained = [is_as_trained(row["knob"], row["trained_knob"]) for row in line]
    ax.plot(xs, ys, color=colour, marker=mark, linestyle="", markevery=as_trained)


def _has_sparse(rows: Sequence[dict]) -> bool:
    """Whether there is more than a dense control, which alone compares nothing."""
    return any(row["knob"] is not None for row in rows)


def _not_drawn(found: Sequence[Point]) -> list[str]:
    others = len({point.panel for point in found}) - len(panels_to_draw(found))
    return [f"In the table only: {others} panels in which no curve has several points."] if others else []


def _by_number(value: str) -> tuple[float, str]:
    """Sorts 32 before 128, and words behind numbers."""
    try:
        return float(value), value
    except ValueError:
        return math.inf, value


def _listed(seeds: set[int]) -> str:
    return ", ".join(map(str, sorted(seeds)))


def _model_of(row: dict) -> tuple:
    """What tells the model and the length that a row is about."""
    return tuple(row[name] for name in ("data", "label", "config_hash", "seed", "step", "knob", "length"))


def _with_panel(row: dict) -> dict:
    (point,) = points([row])
    return row | {"panel": point.panel.title, "axis": point.panel.score}


def _mean_or_missing(name: str, rows: Sequence[dict], tasks: Sequence[str]) -> dict:
    """Columns ``name``, ``name low`` and ``name high``: the mean over the tasks, of the seeds that have them all."""
    means = []
    rows = [row for row in rows if row["task"] in tasks]
    for task, own in grouped(rows, "task").items():
        check_seeds(own, task)
    for own in grouped(rows, "seed").values():
        if {row["task"] for row in own} == set(tasks):
            mean = {"task": name, "score": sum(row["score"] for row in own) / len(own)}
            means.append(own[0] | mean | (scatter_of_mean(own) if len(own) > 1 else {}))
    if not means:
        return {name: MISSING}
    (found,) = averaged(means, "task")
    return {name: found["score"], f"{name} low": found["low"], f"{name} high": found["high"]}
