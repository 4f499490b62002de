"""``python -m experiments.figures OUTPUT STUDY...``: all figures and tables of studies, and a page that holds them.

A study is a directory with rows (results.jsonl, metrics.jsonl, speed.jsonl ...) in it or below. Each figure of each
study becomes OUTPUT/figNN_NAME-STUDY.{png,pdf,csv}, and OUTPUT/index.html shows them all. Figures that no study has
rows for are listed as missing.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.arguments import parse
from experiments.errors import user_errors
from experiments.figures.curves import (
    make_lengths,
    make_numerics,
    make_parallel,
    make_speed,
    make_throughput,
    make_training,
)
from experiments.figures.excess import make_excess
from experiments.figures.page import Section, to_html
from experiments.figures.paired import make_paired, make_paired_scores
from experiments.figures.published import make_published
from experiments.figures.routers import (
    make_active_tokens,
    make_adaptivity,
    make_dispersion,
    make_heat_map,
    make_recall,
)
from experiments.figures.rows import Figure, Study, load_study
from experiments.figures.scores import make_ablations, make_costs, make_frontiers, make_ruler
from experiments.files import to_csv, write_atomically

ROUTING = "evaluate.py tasks=[routing]"
RULER = "evaluate.py tasks=[ruler]"
FIGURES = (
    Figure(1, "frontier", "Score against measured causal sparsity", "evaluate.py sparsities=[...]", make_frontiers),
    Figure(
        2, "cost", "Score against bytes read and time", "evaluate.py tasks=[...,decode] sparsities=[...]", make_costs
    ),
    Figure(3, "heatmap", "Sparsity by layer and KV head", "evaluate.py tasks=[sparsity]", make_heat_map),
    Figure(4, "active", "Active tokens against position", "evaluate.py tasks=[sparsity]", make_active_tokens),
    Figure(5, "adaptivity", "Active blocks against the blocks that an answer needs", ROUTING, make_adaptivity),
    Figure(6, "recall", "What the router finds", f"{ROUTING} sparsities=[...]", make_recall),
    Figure(7, "dispersion", "Dispersion as the context grows", f"{ROUTING} lengths=[...]", make_dispersion),
    Figure(8, "speed", "Speed and memory against length", "python -m experiments.speed", make_speed),
    Figure(9, "training", "Training curves", "metrics.jsonl of runs", make_training),
    Figure(10, "lengths", "Needles by depth and length, and extrapolation", "evaluate.py lengths=[...]", make_lengths),
    Figure(11, "ruler", "RULER", RULER, make_ruler),
    Figure(12, "ablations", "Ablations", "runs evaluated with label=FACTOR:VALUE", make_ablations),
    Figure(13, "numerics", "Error against float64", "python -m experiments.speed.numerics", make_numerics),
    Figure(14, "published", "The paper's numbers and ours", "RULER and speed rows", make_published),
    Figure(15, "throughput", "Training throughput", "python -m experiments.throughput", make_throughput),
    Figure(16, "parallel", "Several GPUs against one", "python -m experiments.throughput.scaling", make_parallel),
    Figure(17, "paired", "Differences in loss on the same rows", "evaluate.py sparsities=[...]", make_paired),
    Figure(18, "excess", "Training loss above dense attention's", "a sweep with an arm attention=full", make_excess),
    Figure(19, "paired-ruler", "Differences in RULER on the same samples", RULER, make_paired_scores),
)


def write_figures(output: Path, studies: Sequence[Study]) -> list[Figure]:
    """Everything into ``output``; returns the figures that no study has rows for."""
    output.mkdir(parents=True, exist_ok=True)
    sections: dict[int, list[Section]] = {}
    for figure in FIGURES:
        for study in studies:
            drawn = figure.make(study)
            if drawn is None:
                continue
            stem = f"{figure.stem}-{study.name}"
            write_atomically(output / f"{stem}.csv", to_csv(drawn.table))
            if drawn.draw is not None:
                drawn.draw(output / stem)
            picture = None if drawn.draw is None else output / f"{stem}.png"
            sections.setdefault(figure.number, []).append(Section(study.name, drawn, picture))
    write_atomically(output / "index.html", to_html(FIGURES, sections))
    return [figure for figure in FIGURES if figure.number not in sections]


def main(arguments: Sequence[str]) -> None:
    with user_errors():
        given = parse("experiments.figures", arguments)
        studies = [load_study(root) for root in given.studies]
        names = [study.name for study in studies]
        if len(set(names)) != len(names):
            raise ValueError(
                f"studies {', '.join(names)}: two have the same name, and so would their figures: rename one"
            )
        missing = write_figures(given.output, studies)
    for figure in missing:
        print(f"missing: {figure.number}. {figure.title} (rows come from {figure.needs})")
    print(f"{len(FIGURES) - len(missing)} of {len(FIGURES)} figures: {given.output / 'index.html'}")


if __name__ == "__main__":
    main(sys.argv[1:])
