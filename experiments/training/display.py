"""What a run says on the terminal: the same lines on a TTY as in a pipe, and on a TTY a bar below them."""

import shlex
import sys

from dashattn.fields import user_path
from experiments.config import TrainConfig
from experiments.overrides import override
from experiments.sparsity import check_reachable, turned_layers

# Seconds over which the speed is averaged, for the time that is left; rich takes the last 1000 steps of them.
_SPEED_OVER_S = 3600
_SUGGESTED = (0.5, 0.75, 0.9)  # sparsities to evaluate at
_FORMATS = {
    "loss": "loss {:.4f}",
    "auxiliary_loss": "auxiliary loss {:.4g}",
    "lr": "lr {:.3g}",
    "grad_norm": "gradient {:.3g}",
    "tokens_per_s": "{:,.0f} tokens/s",
    "mfu_causal": "MFU {:.1%}",
    "mfu_sparse": "of what is read {:.1%}",
    "causal_sparsity": "sparsity {:.1%}",
    "knob": "knob {:.4g}",
    "alpha": "alpha {:.4g}",
}
_WAIT_SHOWN = 0.1  # share of a step that is spent waiting for data, from which it is told


class Display:
    """Lines and, where the output is a terminal, a bar that moves with every step."""

    def __init__(self, config: TrainConfig, step: int):
        """``step``: the one that the run stands at."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._name = config.name
        # FORCE_COLOR, which Jupyter sets for what it starts, makes no terminal of a pipe.
        self._console = Console(highlight=False, force_terminal=sys.stdout.isatty())
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self._console,
            expand=True,
            refresh_per_second=4,
            speed_estimate_period=_SPEED_OVER_S,
        )
        self._task = self._progress.add_task(self._name, total=config.steps, completed=step)
        if self._console.is_terminal:
            self._progress.start()

    def advance(self, step: int) -> None:
        """Step ``step`` is done."""
        self._progress.update(self._task, completed=step)

    @property
    def eta(self) -> str:
        """Time that the steps left will take, at the speed of the last ones; ``-`` until there were two."""
        from rich.progress import TimeRemainingColumn

        (task,) = self._progress.tasks
        return "-" if task.time_remaining is None else str(TimeRemainingColumn().render(task))

    def show(self, row: dict) -> None:
        """A row of metrics.jsonl as a line."""
        (task,) = self._progress.tasks
        shown = [f"step {row['step']}/{task.total:.0f}", *([row["split"]] if row["split"] != "train" else [])]
        shown += [form.format(row[key]) for key, form in _FORMATS.items() if key in row]
        if row.get("data_wait", 0) > _WAIT_SHOWN * row.get("step_time", 0):
            shown.append(f"waits for data {row['data_wait'] / row['step_time']:.0%}")
        if row.get("skipped_steps"):
            shown.append(f"skipped {row['skipped_steps']}")
        if "peak_memory_mib" in row:
            shown.append(f"memory {row['peak_memory_mib'] / 1024:.2f} GiB")
        if row["split"] == "train" and row["step"] < task.total:
            shown.append(f"ETA {self.eta}")
        self.print("  ".join(shown))

    def stopping(self) -> None:
        """The run was asked to stop: said in the bar, as the step may take long."""
        self._progress.update(self._task, description="saving after this step; again: ends at once")

    def print(self, text: str) -> None:
        """A line for the reader of the terminal."""
        self._console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._progress.live.is_started:
            self._progress.update(self._task, description=self._name)
            self._progress.stop()


def next_command(config: TrainConfig) -> str:
    """To type when the run is done: its evaluation, along its knob where there is one."""
    sparsities = []
    if config.attention.knob is not None:
        layers = turned_layers(config.attention, config.model.num_layers)
        for sparsity in _SUGGESTED:
            try:
                check_reachable(layers, sparsity, "causal", config.data.seq_len, packed=config.data.is_packed)
            except ValueError:
                continue
            sparsities.append(str(sparsity))
    words = ["python", "evaluate.py", override("run", str(user_path(config.run_dir)))]
    return shlex.join([*words, *([f"sparsities=[{','.join(sparsities)}]"] if sparsities else [])])
