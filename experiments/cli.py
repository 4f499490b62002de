"""``dashattn COMMAND ...``: every command of the project by one name, wherever it is started.

Each is the script or module that it names, with the same arguments, so that ``dashattn train`` is ``python train.py``.
"""

import os
import runpy
import sys
from collections.abc import Sequence

from experiments.arguments import PATH_COMMANDS, called, parse, parser
from experiments.files import ROOT
from experiments.help import did_you_mean, show

# What a command starts, and what it does.
COMMANDS = {
    "train": ("train.py", "train one model, or go on with it"),
    "evaluate": ("evaluate.py", "score a checkpoint or a Hugging Face folder along its sparsity knob"),
    "sweep": ("experiments.sweep", "train and evaluate the cells of a study that are missing"),
    "plan": ("experiments.plan", "memory and time of a run or a sweep, before a job is queued"),
    "pareto": ("experiments.figures.pareto", "table and figure of accuracy against measured sparsity"),
    "generate": ("experiments.evaluation.generate", "continue prompts with a trained model"),
    "export": ("experiments.evaluation.export", "write a run's model as a Hugging Face folder"),
    "collect": ("experiments.sweep.collect", "gather the rows of a study, to commit"),
    "prepare": ("experiments.training.prepare", "train the tokenizer and tokenise the corpora of a run"),
    "report": ("experiments.figures.run_page", "curves and configurations of runs on one page"),
    "status": ("experiments.sweep.status", "how the cells of a sweep stand"),
    "speed": ("experiments.speed", "time the kernels against dense attention"),
    "throughput": ("experiments.throughput", "time train.py's step on a GPU"),
    "scaling": ("experiments.throughput.scaling", "time train.py's step on several GPUs"),
    "figures": ("experiments.figures", "all figures of studies, and a page that shows them"),
    "corpus": ("data.collect", "gather text files into a corpus"),
    "harness": ("experiments.evaluation.harness", "lm-evaluation-harness with a run's model"),
}


def overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(
        ["usage: dashattn COMMAND ...", "", *lines, "", "dashattn COMMAND --help explains all its options."]
    )


def main(arguments: Sequence[str]) -> None:
    """Run a command in this process.

    Raises:
        SystemExit: it ended otherwise than well, or there is no such command.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        show(overview())
        return
    name, *rest = arguments
    if name not in COMMANDS:
        known = did_you_mean(name, COMMANDS) or f": choose from {', '.join(COMMANDS)}"
        print(f"error: dashattn {name} does not exist{known}", file=sys.stderr)
        raise SystemExit(1)
    what = COMMANDS[name][0]
    with called(what, f"dashattn {name}"):
        if what in PATH_COMMANDS and {"-h", "--help"}.intersection(rest):
            parser(what).print_help()  # before what it would start imports PyTorch
            return
        if what in PATH_COMMANDS:  # as it would itself, seconds later
            try:
                parse(what, rest)
            except ValueError as error:
                raise SystemExit(f"error: {error}") from None
        sys.argv[1:] = rest
        if what.endswith(".py"):
            sys.argv[0] = os.fspath(ROOT / what)
            runpy.run_path(sys.argv[0], run_name="__main__")
        else:
            runpy.run_module(what, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
