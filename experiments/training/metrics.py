"""metrics.jsonl, the progress display and Weights & Biases: one row, three readers."""

import json
import resource
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from dashattn.stats import AttentionStats
from experiments.config import TrainConfig, plain
from experiments.files import METRICS, naming, read_rows, write_atomically

_SHOWN = (
    *("split", "loss", "auxiliary_loss", "lr", "grad_norm", "tokens_per_s", "data_wait", "mfu_causal", "mfu_sparse"),
    *("causal_sparsity", "knob", "alpha"),
)


def drop_rows_after(path: Path, step: int) -> None:
    """Keep the rows up to ``step``: those after it will be written again by the resumed run."""
    rows = [row for row in read_rows(path) if row["step"] <= step]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


def peak_memory_mib(device: torch.device) -> float:
    """Peak of the GPU memory PyTorch allocated, or of this process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes / (2**20 if sys.platform == "darwin" else 2**10)


def attention_metrics(stats: list[AttentionStats]) -> dict:
    """Causal sparsity and summaries read per token, of each layer and on average over the layers."""
    sparsity = [float(layer.causal_sparsity()) for layer in stats]
    reads = [float(layer.routing_reads.float().mean()) for layer in stats]
    return {
        "causal_sparsity": sum(sparsity) / len(sparsity),
        "causal_sparsity_per_layer": sparsity,
        "routing_reads": sum(reads) / len(reads),
        "routing_reads_per_layer": reads,
    }


class Clock:
    """Time per step, of it the time spent waiting for data, and tokens per second since the last reading."""

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        """Forget what was counted: called after validation and saving, which are no training time."""
        self._start, self._steps, self._tokens, self._waited = time.perf_counter(), 0, 0.0, 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what fetches the data of a step."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def count(self, tokens: float) -> None:
        """A step has read ``tokens``."""
        self._steps += 1
        self._tokens += tokens

    def read(self) -> dict:
        """Seconds a step, seconds a step of waiting for data, tokens a second of all ranks; and start over."""
        seconds = time.perf_counter() - self._start
        values = {"step_time": seconds / self._steps, "data_wait": self._waited / self._steps}
        values["tokens_per_s"] = self._tokens / seconds
        self.restart()
        return values


class MetricsWriter:
    """Writes rows to metrics.jsonl, to the terminal and to Weights & Biases; silent unless ``main``."""

    def __init__(self, run_dir: Path, config: TrainConfig, *, main: bool):
        self._main = main
        self._file = self._wandb = self._progress = None
        if not main:
            return
        from rich import console, progress

        self._steps = config.steps
        self._console = console.Console(highlight=False)
        self._file = (run_dir / METRICS).open("a", encoding="utf-8")
        if config.logger.mode != "off":
            self._wandb = _start_wandb(run_dir, config)
        if self._console.is_terminal:
            self._progress = progress.Progress(
                progress.TextColumn(config.name),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[loss]}"),
                progress.TimeElapsedColumn(),
                progress.TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._progress.add_task(config.name, total=config.steps, loss="")
            self._progress.start()

    def write(self, row: dict) -> None:
        """Add a row; ``step`` and ``split`` say what it is about."""
        if not self._main:
            return
        with naming(Path(self._file.name)):
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        if self._wandb is not None:
            values = {key: value for key, value in row.items() if isinstance(value, int | float)}
            named = {f"{row['split']}/{key}": value for key, value in values.items() if key != "step"}
            self._wandb.log(named | {"step": row["step"]})
        if self._progress is not None and row["split"] == "train":
            self._progress.update(self._task, completed=row["step"], loss=f"loss {row['loss']:.4f}")
        else:
            shown = "  ".join(f"{key} {_short(row[key])}" for key in _SHOWN if key in row)
            self.print(f"step {row['step']}/{self._steps}  {shown}")

    def print(self, text: str) -> None:
        """A line for the reader of the terminal."""
        if self._main:
            self._console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        """End the display and the logger; the file is complete after every row."""
        if self._progress is not None:
            self._progress.stop()
        if self._wandb is not None:
            self._wandb.finish()
        if self._file is not None:
            self._file.close()


def _short(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _start_wandb(run_dir: Path, config: TrainConfig):
    import wandb

    logger = config.logger

    # The same id again makes a resumed run one curve.
    id_file = run_dir / "wandb_id"
    if not id_file.exists():
        write_atomically(id_file, secrets.token_hex(4))
    run = wandb.init(
        dir=str(run_dir),
        id=id_file.read_text(),
        resume="allow" if logger.mode == "online" else None,
        mode=logger.mode,
        project=logger.project,
        entity=logger.entity,
        group=logger.group,
        tags=list(logger.tags),
        name=config.name,
        config=plain(config),
        settings=wandb.Settings(silent=True),
    )
    # An axis of our own: a resumed run repeats steps, and wandb drops rows whose own step goes back.
    run.define_metric("step", hidden=True)
    run.define_metric("*", step_metric="step")
    return run
