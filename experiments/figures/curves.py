"""Figures 8, 9, 10, 13, 15 and 16: speed, training, length, numerics, throughput and scaling."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from operator import itemgetter
from pathlib import Path

from experiments.figures.frontier import is_ablation, of_frontiers, title_of
from experiments.figures.rows import BARS, Drawn, Study, as_trained, averaged, grouped
from experiments.plots import entitle, grid, handles_of, legend_below, plain_log, pyplot, save, styles
from experiments.speed import report as speed_report
from experiments.speed import rows as speed_rows
from experiments.throughput import report as throughput_report
from experiments.throughput import scaling_report

# y axis -> column of metrics.jsonl
TRAINING = {
    "loss, nats": "loss",
    "causal sparsity": "causal_sparsity",
    "gradient norm": "grad_norm",
    "router's gradient norm": "grad_norm_router",
}
MANY = 16  # more curves than that no panel holds
DRAWN = 60  # points of a curve, which has a few inches
SETTING = r"(-knob[^-]+|:.+?)?-seed\d+.*$"  # what a sweep's name of a run adds to its arm's
SPEED_COLUMNS = (
    *(*speed_rows.SETUP, "length", "batch", "pattern", "sparsity", "causal_sparsity", "stage", "method", "pass"),
    *("status", "ms", "ratio", "tokens_per_second"),
)
THROUGHPUT_COLUMNS = (
    *("device", *throughput_report.CASE, "sparsity", "status", "tokens_per_s", "mfu_causal", "mfu_sparse"),
    *("causal_sparsity", "peak_memory_mib", "step_time", "data_wait"),
)
PARALLEL_COLUMNS = (
    *("device", *scaling_report.WORK, *scaling_report.WAY, "status", "tokens_per_s", "efficiency"),
    *("step_time", "peak_memory_mib", "loss_difference", "against"),
)


def make_speed(study: Study) -> Drawn | None:
    rows = speed_rows.newest(study.speed)
    if not rows:
        return None
    table = [{name: row.get(name) for name in SPEED_COLUMNS} for row in speed_rows.with_ratios(rows)]
    notes = [] if any(row["pass"] == "decode" for row in rows) else ["Decoding: missing, no row is of pass decode."]
    notes += [
        f"Not measured: {method}, {stage}, {passes} at {lengths}: {why}."
        for method, stage, why, passes, _, lengths in speed_report.not_measured(rows)
    ]
    return Drawn(table, lambda path: speed_report.draw(rows, path), notes, rows)


def make_training(study: Study) -> Drawn | None:
    """Every run's curves against tokens and, for the loss, against time."""
    table = []
    for run, rows in study.training.items():
        seconds, step = 0.0, _first_step(rows)
        for row in rows:
            if row["split"] == "train":
                seconds += row["step_time"] * (row["step"] - step)
                step = row["step"]
            values = {key: row[key] for key in TRAINING.values() if row.get(key) is not None}
            table.append(
                {
                    "run": run,
                    "split": row["split"],
                    "tokens": row["tokens"],
                    "seconds": seconds,
                    "step": row["step"],
                    **values,
                }
            )
    if not table:
        return None
    present = {name: key for name, key in TRAINING.items() if any(key in row for row in table)}
    absent = [name for name in TRAINING if name not in present]
    notes = [f"Missing: {', '.join(absent)}, no row has it."] if absent else []
    notes.append(
        "Solid: training batches; dotted: validation. Colours are the methods', of runs that name none any; marks "
        "stand at a few of the points. Time is that of the training steps alone, of a branch its own."
    )
    for name, key in present.items():
        flat = sorted({r["run"] for r in table if r.get(key) == 0} - {r["run"] for r in table if r.get(key)})
        if "norm" in name and flat:
            notes.append(f"Always 0, which no logarithmic axis has: {name} of {', '.join(flat)}.")
    if len(study.training) > MANY:
        notes.append("Many runs: a panel an arm, and of all that was logged two; the table has the rest.")
        return Drawn(table, lambda path: _draw_arms(table, path), notes)

    def draw(path: Path) -> None:
        panels = [("tokens", name) for name in present] + [("seconds", "loss, nats")]
        figure, axes = grid(len(panels))
        for ax, (x, name) in zip(axes, panels, strict=True):
            inside = [row for row in table if TRAINING[name] in row]
            _draw_runs(ax, inside, x, TRAINING[name], study.training)
            ax.set_xlabel(x)
            ax.set_ylabel(name)
            if "norm" in name:
                ax.set_yscale("log")
                plain_log(ax.yaxis)
        legend_below(figure, handles_of(axes))
        save(figure, path)

    return Drawn(table, draw, notes)


def _first_step(rows: Sequence[dict]) -> int:
    """The step that rows begin to count at: of a branch the one that it left the other run at."""
    first, *later = [row["step"] for row in rows if row["split"] == "train"] or [0]
    return max(0, 2 * first - later[0]) if later else 0


def _draw_runs(ax, rows: list[dict], x: str, y: str, runs: Iterable[str], arm: str = "") -> None:
    """Curves of runs: a colour a method, a mark here and there, dots for validation; named without their ``arm``."""
    from matplotlib.ticker import EngFormatter

    style = styles(runs)
    for run, own in grouped(rows, "run").items():
        for split, points in grouped(own, "split").items():
            points = thinned(points)
            colour, mark = style[run]
            line = {"linestyle": ":", "linewidth": 1} if split == "validation" else {"linewidth": 1}
            xs, ys = [row[x] for row in points], [row[y] for row in points]
            every = max(1, len(points) // 6)
            label = run.removeprefix(arm).lstrip("-:") if split == "train" else None
            ax.plot(xs, ys, color=colour, marker=mark, markersize=4, markevery=every, label=label, **line)
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.grid(alpha=0.25)


def thinned(points: Sequence[dict]) -> list[dict]:
    """As many points of a curve as a panel can show."""
    stride = -(-len(points) // DRAWN)
    return [row for number, row in enumerate(points) if number % stride == 0 or number == len(points) - 1]


def _draw_arms(table: list[dict], path: Path) -> None:
    """Loss, and the router's gradient norm; a panel for the runs that differ in a knob, a value or the seed."""
    rows = [row | {"arm": re.sub(SETTING, "", row["run"])} for row in table if row["split"] == "train"]
    panels = [
        (name, arm, points)
        for name in ("loss, nats", "router's gradient norm")
        for arm, points in sorted(grouped((row for row in rows if TRAINING[name] in row), "arm").items())
        if max(row["step"] for row in points) > 1
    ]
    figure, axes = grid(len(panels), width=3.1, height=2.2, columns=4)
    for ax, (name, arm, points) in zip(axes, panels, strict=True):
        runs = {row["run"] for row in points}
        _draw_runs(ax, points, "tokens", TRAINING[name], runs, arm)
        entitle(ax, arm)
        ax.set_xlabel("tokens")
        ax.set_ylabel(name)
        ax.set_yscale("log")
        plain_log(ax.yaxis)
        ax.legend(fontsize=6, ncols=1 + (len(runs) > 5))
    save(figure, path)


def make_lengths(study: Study) -> Drawn | None:
    """The needle heat map, and every score of a model that was measured at more than one length."""
    found = as_trained(study.of("niah"))
    needles = averaged(found, "data", "variant", "line", "length", "depth")
    scores = [
        row
        for row in as_trained(of_frontiers(study.evaluations))
        if not row["task"].startswith("niah_values") and not is_ablation(row)
    ]
    curve = itemgetter("data", "task", "variant", "line", "metric")
    lines = averaged(scores, "data", "task", "metric", "variant", "line", "length")
    lengths = Counter(map(curve, lines))
    lines = [row for row in lines if lengths[curve(row)] > 1]
    panels = grouped(lines, "data", "task", "metric", "variant")
    if not needles and not panels:
        return None
    table = needles + lines
    maps = grouped(needles, "data", "variant", "line")
    notes = []
    if not maps:
        notes.append("Needle heat map: missing.")
    if not panels:
        notes.append("Extrapolation: missing, nothing was measured at two lengths.")

    def draw(path: Path) -> None:
        figure, axes = grid(len(maps) + len(panels))
        for ax, ((data, variant, line), rows) in zip(axes, maps.items(), strict=False):
            _heat_map(ax, f"{title_of(data, 'needle found', variant)}: {line}", rows)
        style = styles(row["line"] for rows in panels.values() for row in rows)
        for ax, ((data, task, metric, variant), rows) in zip(axes[len(maps) :], panels.items(), strict=True):
            for line, points in grouped(rows, "line").items():
                colour, mark = style[line]
                xs = [p["length"] for p in points]
                ax.vlines(xs, [p["low"] for p in points], [p["high"] for p in points], color=colour, linewidth=1)
                ax.plot(xs, [p["score"] for p in points], color=colour, marker=mark, label=line)
            ax.set_xscale("log", base=2)
            ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            entitle(ax, title_of(data, task, variant))
            ax.set_xlabel("tokens")
            ax.set_ylabel(metric)
            ax.grid(alpha=0.25)
        if panels:
            legend_below(figure, handles_of(axes[len(maps) :]))
        save(figure, path)

    return Drawn(table, draw, [*notes, BARS], [*found, *scores])


def _heat_map(ax, title: str, rows: list[dict]) -> None:
    lengths, depths = sorted({row["length"] for row in rows}), sorted({row["depth"] for row in rows})
    found = {(row["depth"], row["length"]): row["score"] for row in rows}
    cells = [[found.get((depth, length), float("nan")) for length in lengths] for depth in depths]
    image = ax.imshow(cells, vmin=0, vmax=1, cmap="cividis", aspect="auto")
    ax.set_xticks(range(len(lengths)), [str(length) for length in lengths])
    ax.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    ax.set_xlabel("tokens")
    ax.set_ylabel("depth of the needle")
    entitle(ax, title)
    ax.figure.colorbar(image, ax=ax)


def make_numerics(study: Study) -> Drawn | None:
    """Relative RMS error of outputs and gradients against the reference in float64."""
    table = study.numerics
    if not table:
        return None

    def draw(path: Path) -> None:
        labels = sorted({f"{row['backend']}, {row['tensor']}" for row in table}, reverse=True)  # upwards
        kind = itemgetter("device", "impl", "dtype", "length")
        kinds = sorted(set(map(kind, table)))
        figure, axes = pyplot().subplots(figsize=(8, 1.2 + 0.28 * len(labels)), layout="constrained")
        style = styles(map(str, kinds))
        for device, impl, dtype, length in kinds:
            colour, mark = style[str((device, impl, dtype, length))]
            inside = [row for row in table if kind(row) == (device, impl, dtype, length)]
            ys = [labels.index(f"{row['backend']}, {row['tensor']}") for row in inside]
            xs = [row["error"] for row in inside]
            axes.plot(
                xs, ys, color=colour, marker=mark, linestyle="", label=f"{dtype}, {impl}, {device}, {length} tokens"
            )
        axes.set_yticks(range(len(labels)), labels)
        axes.set_xscale("log")
        axes.set_xlabel("relative RMS error against float64, whole operation")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
        save(figure, path)

    return Drawn(table, draw, rows=table)


def make_throughput(study: Study) -> Drawn | None:
    rows = throughput_report.newest(study.throughput)
    if not rows:
        return None
    table = [{name: row.get(name) for name in THROUGHPUT_COLUMNS} for row in rows]
    draw = (lambda path: throughput_report.draw(rows, path)) if throughput_report.is_measured(rows) else None
    return Drawn(table, draw, rows=rows)


def make_parallel(study: Study) -> Drawn | None:
    rows = scaling_report.compared(study.parallel)
    if not rows:
        return None
    table = [{name: row.get(name) for name in PARALLEL_COLUMNS} for row in rows]
    notes = ["Efficiency: tokens per second over as many times those of one device at the same step."]
    if any(row["efficiency"] is not None and row["efficiency"] > 1 for row in rows):
        notes.append("Above 100 %: one device alone was measured slower than each of several, so it could be faster.")
    if any(row["against"] for row in rows):
        notes.append("Against: the commit of the one device, where that was another.")
    is_compared = any(row["efficiency"] is not None for row in rows)
    draw = (lambda path: scaling_report.draw(rows, path)) if is_compared else None
    return Drawn(table, draw, notes, rows)
