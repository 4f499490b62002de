"""The command lines of what takes paths rather than overrides; known without importing what they start."""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


class Parser(argparse.ArgumentParser):
    """Raises ValueError where argparse would end the process, with its message and the usage."""

    def error(self, message: str):
        raise ValueError(f"{message}; {' '.join(self.format_usage().split())}")


@contextmanager
def called(module: str, name: str) -> Iterator[None]:
    """In here the usage of ``module`` names the command that started it."""
    _called[module] = name
    try:
        yield
    finally:
        del _called[module]


def _path(text: str) -> Path:
    """As ``dashattn.fields.user_path``, before PyTorch is imported."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text}: no such home is known; give the path from / on") from None


_DESCRIPTIONS = {
    "experiments.evaluation.export": "Write a run's model as a Hugging Face folder.",
    "experiments.figures": "Draw all figures and tables of studies, and a page that shows them.",
    "experiments.figures.pareto": "Table and figure of accuracy against measured sparsity, of all runs of a directory.",
    "experiments.figures.run_page": "Write report.html, curves and configurations of runs, into the first of them.",
    "experiments.speed.numerics": "Measure every backend's error against float64, into DIRECTORY/numerics.jsonl.",
    "experiments.speed.report": "Table and figure of a speed benchmark again, from its rows.",
    "experiments.sweep.collect": "Gather the rows of a study into files to commit, or continue from such files.",
    "experiments.sweep.status": "Show how the cells of a sweep stand, wherever they run.",
    "experiments.throughput.report": "Table and figure of a throughput benchmark again, from its rows.",
    "experiments.throughput.scaling_report": "Table of a benchmark of several GPUs again, from its rows.",
}
PATH_COMMANDS = tuple(_DESCRIPTIONS)
_called: dict[str, str] = {}  # a module -> what started it, where that was not ``python -m MODULE``


def parser(module: str) -> Parser:
    """Of ``python -m MODULE``."""
    result = Parser(prog=_called.get(module, f"python -m {module}"), description=_DESCRIPTIONS[module])
    add = result.add_argument
    if module == "experiments.evaluation.export":
        add("--dense", action="store_true", help="write a sparse run's weights as those of a dense model")
        add("run", type=_path, help="run directory (its latest checkpoint), or one of its checkpoints")
        add("folder", type=_path, help="the folder to write, which must not exist")
    elif module == "experiments.figures":
        add("output", type=_path, help="folder of the figures and of index.html")
        add("studies", type=_path, nargs="+", help="directories with rows in them or below")
    elif module == "experiments.figures.pareto":
        add("directory", type=_path, help="a sweep's, or another above evaluated runs; the files are written there")
    elif module == "experiments.figures.run_page":
        add("runs", type=_path, nargs="+", help="run directories; report.html is written into the first")
    elif module == "experiments.speed.numerics":
        add("directory", type=_path, help="of the rows")
        add("length", type=int, nargs="?", default=1000, help="tokens of a row (1000)")
    elif module == "experiments.sweep.collect":
        add("--restore", action="store_true", help="count the cells of collected rows as done in a sweep's directory")
        add("source", type=_path, help="directory of a sweep or a run; with --restore, of collected rows")
        add("target", type=_path, help="directory of collected rows; with --restore, of a sweep")
    elif module == "experiments.sweep.status":
        add("output_dir", type=_path, help="a sweep's")
    else:
        add("directory", type=_path, help="of the rows; the files are written there")
    return result


def parse(module: str, arguments: Sequence[str]) -> argparse.Namespace:
    """The arguments of ``python -m MODULE``.

    Raises:
        ValueError: with the usage.
    """
    return parser(module).parse_args(arguments)
