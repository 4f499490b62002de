"""Training loss above dense attention's on the same batches: a step's loss says more of its batch than of attention."""

import re
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from experiments.figures.curves import MANY, thinned
from experiments.figures.rows import Drawn, Study, grouped
from experiments.plots import BLACK, grid, handles_of, legend_below, plain_log, save, styles

DENSE = "attention=full"
OWN = ("attention", "optim.", "name=", "run_dir=")  # words of a run that change no batch


def make_excess(study: Study) -> Drawn | None:
    """Of each run of a sweep, step by step, less that of the dense run whose commands differ in the attention and the
    optimizer alone; mean, lowest and highest over seeds, at steps that all of them have."""
    dense = {_batches(words): run for run, words in study.trained.items() if _attention(words) == [DENSE]}
    sparse = [run for run, words in study.trained.items() if _attention(words) != [DENSE]]
    table = []
    for arm, runs in grouped(sparse, _arm).items():
        against = {run: dense.get(_batches(study.trained[run])) for run in runs}
        lines = [_differences(study.training[run], study.training[other]) for run, other in against.items() if other]
        for step, tokens in sorted(set.intersection(*map(set, lines))) if lines else ():
            values = [line[step, tokens] for line in lines]
            bounds = {"low": min(values), "high": max(values), "seeds": len(values)}
            table.append({"arm": arm, "step": step, "tokens": tokens, "excess": mean(values), **bounds})
    if not table:
        return None
    notes = [
        "Mean over seeds, bars their lowest and highest. At every step both runs read the same batch. Left out is a "
        "run whose sweep has no dense run of its seed, data and steps, or that did not complete."
    ]
    if len({row["arm"] for row in table}) > MANY:
        return Drawn(table, None, [*notes, "Many arms: a table alone."])

    def draw(path: Path) -> None:
        from matplotlib.ticker import EngFormatter

        figure, (ax,) = grid(1, height=4.0)
        style = styles(row["arm"] for row in table)
        for arm, rows in grouped(table, "arm").items():
            rows, (colour, mark) = thinned(rows), style[arm]
            xs, ys = [row["tokens"] for row in rows], [row["excess"] for row in rows]
            ax.plot(xs, ys, color=colour, marker=mark, markersize=4, label=arm, linewidth=1)
            ax.vlines(xs, [row["low"] for row in rows], [row["high"] for row in rows], color=colour, linewidth=0.8)
        lowest, highest = min(row["low"] for row in table), max(row["high"] for row in table)
        if lowest > 0:
            ax.set_yscale("log")
            ax.set_ylim(lowest / 1.2, highest * 1.2)
            plain_log(ax.yaxis)
        else:
            ax.axhline(0.0, color=BLACK, linestyle="--", linewidth=1)
        ax.set_xlabel("tokens")
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        ax.set_ylabel("training loss above dense, nats")
        ax.grid(alpha=0.25)
        legend_below(figure, handles_of([ax]))
        save(figure, path)

    return Drawn(table, draw, notes)


def _attention(words: Sequence[str]) -> list[str]:
    return [word for word in words if word.startswith("attention")]


def _batches(words: Sequence[str]) -> frozenset[str]:
    """What runs that read the same batches have in common."""
    return frozenset(word for word in words if not word.startswith(OWN))


def _arm(run: str) -> str:
    return re.sub(r"-seed\d+$", "", run)


def _differences(rows: Sequence[dict], dense: Sequence[dict]) -> dict[tuple[int, int], float]:
    """By step and tokens."""
    losses = {(row["step"], row["tokens"]): row["loss"] for row in dense if row["split"] == "train"}
    own = [(row["step"], row["tokens"], row["loss"]) for row in rows if row["split"] == "train"]
    return {(step, tokens): loss - losses[step, tokens] for step, tokens, loss in own if (step, tokens) in losses}
