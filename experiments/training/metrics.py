"""metrics.jsonl, the terminal, and Weights & Biases or TensorBoard: one row, three readers."""

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
from experiments.training.display import Display


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
    """Writes rows to metrics.jsonl, to the terminal and to the logger; silent unless ``main``."""

    def __init__(self, run_dir: Path, config: TrainConfig, *, main: bool, step: int = 0):
        """``step``: the one that the run stands at."""
        self._file = self._wandb = self._tensorboard = self._display = None
        if not main:
            return
        self._file = (run_dir / METRICS).open("a", encoding="utf-8")
        if config.logger.mode == "tensorboard":
            self._tensorboard = _start_tensorboard(run_dir, step)
        elif config.logger.mode != "off":
            self._wandb = _start_wandb(run_dir, config)
        self._display = Display(config, step)

    def write(self, row: dict) -> None:
        """Add a row; ``step`` and ``split`` say what it is about."""
        if self._file is None:
            return
        with naming(Path(self._file.name)):
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        values = {f"{row['split']}/{key}": row[key] for key in row if isinstance(row[key], int | float)}
        del values[f"{row['split']}/step"]
        if self._wandb is not None:
            self._wandb.log(values | {"step": row["step"]})
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, row["step"])
        self._display.show(row)

    def advance(self, step: int) -> None:
        """Step ``step`` is done, logged or not."""
        if self._display is not None:
            self._display.advance(step)

    def stopping(self) -> None:
        """The run was asked to stop, and is about to."""
        if self._display is not None:
            self._display.stopping()

    def print(self, text: str) -> None:
        """A line for the reader of the terminal."""
        if self._display is not None:
            self._display.print(text)

    def close(self) -> None:
        """End the display and the logger; the file is complete after every row."""
        for open_ in (self._display, self._tensorboard, self._file):
            if open_ is not None:
                open_.close()
        if self._wandb is not None:
            self._wandb.finish()


def _start_tensorboard(run_dir: Path, step: int):
    from torch.utils.tensorboard import SummaryWriter

    # A resumed run repeats steps: what was written of those behind its checkpoint is hidden.
    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)


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
