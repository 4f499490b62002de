"""Evaluation of one checkpoint at several values of the sparsity knob: scores, and the sparsity they were had at.

All tasks read the run's own validation split in one pass per knob value:

    loss       nats per target
    position   nats per target by position in the document, in bins that double: does more context still help?
    recall     share of MQAR queries answered right, of those that ask for their key the first time in the row: the
               answer to a repeated query also stands near by, after the earlier one
"""

import json
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING
from torch import Tensor

from data import IGNORE, BatchStream, MQARDataConfig, build_data
from experiments.checkpoint import find_weights, load_weights, read_state
from experiments.config import DEVICES, TrainConfig, load_config, resolve
from experiments.files import append_rows, read_rows
from experiments.run_dir import CONFIG, START, config_hash
from models import Transformer

RESULTS = "results.jsonl"
TASKS = ("loss", "position", "recall")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class EvaluateConfig:
    """One evaluation."""

    run: str = MISSING  # run directory (its latest checkpoint), or one of its checkpoints
    tasks: list[str] = field(default_factory=lambda: ["loss"])  # loss | position | recall
    knobs: list[float] | None = None  # values of the sparsity knob; null = the one trained with
    rows: int | None = None  # rows of the validation split; null = as many as the run validates on
    rows_per_batch: int = 8
    label: str | None = None  # name of the line in tables and figures; null = the backend's
    device: str = "auto"
    threads: int | None = None


def register_evaluate_config() -> None:
    ConfigStore.instance().store(name="evaluate_schema", node=EvaluateConfig)


@dataclass(frozen=True)
class Target:
    """A checkpoint with the configuration it was trained with."""

    run_dir: Path
    checkpoint: Path
    train: TrainConfig


def find_target(config: EvaluateConfig) -> Target:
    """Locates what is to be evaluated and refuses what cannot be.

    Raises:
        ValueError: no such run, unknown task, or a knob value that the backend cannot have.
    """
    checkpoint = find_weights(config.run).parent
    run_dir = checkpoint.parent.parent
    if not (run_dir / CONFIG).exists():
        raise ValueError(f"{checkpoint} does not lie in a run directory: {run_dir} has no {CONFIG}")
    train = load_config(run_dir / CONFIG)
    unknown = sorted(set(config.tasks) - set(TASKS))
    if unknown or not config.tasks:
        raise ValueError(f"tasks={list(config.tasks)}: choose from {', '.join(TASKS)}")
    if config.device not in DEVICES:
        raise ValueError(f"device={config.device}: choose one of {', '.join(DEVICES)}")
    if "recall" in config.tasks and not isinstance(train.data, MQARDataConfig):
        raise ValueError(f"task recall needs a run trained on MQAR; this one was trained on {train.data.name}")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but PyTorch sees no GPU: use device=cpu")
    for name in ("rows", "rows_per_batch", "threads"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: at least 1 is needed")
    for knob in config.knobs or ():
        train.attention.with_knob(knob)
    return Target(run_dir, checkpoint, resolve(replace(train, device=config.device)))


def trained_knob(train: TrainConfig) -> float | None:
    return None if train.attention.knob is None else getattr(train.attention, train.attention.knob)


def evaluate(config: EvaluateConfig, target: Target) -> Iterator[dict]:
    """Evaluates at every knob value that has rows missing; yields the rows, which are on disk by then."""
    train = target.train
    device = torch.device(train.device)
    rows = config.rows or train.data.validation_rows  # None: the whole split
    data = replace(train.data, validation_rows=rows)
    knobs = [trained_knob(train)] if config.knobs is None else list(dict.fromkeys(config.knobs))
    path = target.run_dir / RESULTS
    existing = read_rows(path)
    common = describe(target, rows) | {"label": config.label or train.attention.name}

    def missing(knob: float | None) -> list[str]:
        asked = {key: common[key] for key in ("checkpoint", "length", "rows", "label")} | {"knob": knob}
        done = {row["task"] for row in existing if all(row[key] == value for key, value in asked.items())}
        return [task for task in dict.fromkeys(config.tasks) if task not in done]

    if not any(missing(knob) for knob in knobs):
        return
    cache_dir = Path(train.cache_dir).expanduser()
    stream = build_data(data, split="validation", seed=train.seed, rows=config.rows_per_batch, cache_dir=cache_dir)
    check_data(target, stream)
    model = build_model(target)
    for knob in knobs:
        tasks = missing(knob)
        if not tasks:
            continue
        if knob is not None:
            model.set_knob(knob)
        start = time.perf_counter()
        tally = measure(model, stream, device, "recall" in tasks)
        shared = common | tally.sparsity() | {"knob": knob, "seconds": time.perf_counter() - start}
        new = [shared | scores for task in tasks for scores in SCORES[task](tally)]
        append_rows(path, new)
        yield from new


def check_data(target: Target, stream: BatchStream) -> None:
    """Raises ValueError if the corpus or its tokenizer is another than the run was trained on."""
    trained = json.loads((target.run_dir / START).read_text())["data"].get("tokens_fingerprint")
    if trained is not None and stream.describe()["tokens_fingerprint"] != trained:
        raise ValueError(
            f"the corpus of data.name={target.train.data.name} has changed since {target.run_dir} was trained (its "
            "fingerprint is another), and with it the tokens: restore it, or train again"
        )


def build_model(target: Target) -> Transformer:
    """The checkpoint's model in evaluation mode, at the step (schedules) it was saved at."""
    train = target.train
    model = Transformer(train.model, train.attention)
    new = load_weights(model, target.checkpoint / "model.safetensors")
    if new:
        raise ValueError(f"{target.checkpoint} lacks {', '.join(new)}: it is not a checkpoint of this configuration")
    model.set_step(read_state(target.checkpoint)["step"])
    return model.to(train.device, DTYPES[train.deepspeed.precision]).eval()


def describe(target: Target, rows: int | None) -> dict:
    """The columns that all rows of an evaluation share."""
    train = target.train
    git = json.loads((target.run_dir / "git.json").read_text())
    state = read_state(target.checkpoint)
    return {
        "backend": train.attention.name,
        "data": train.data.name,
        "length": train.data.seq_len,
        "rows": rows,
        "seed": train.seed,
        "knob_name": train.attention.knob,
        "trained_knob": trained_knob(train),
        "checkpoint": target.checkpoint.name,
        "step": state["step"],
        "tokens": state["tokens"],
        "config_hash": config_hash(train),
        "git_sha": git["sha"],
        "device": torch.cuda.get_device_name() if train.device == "cuda" else "cpu",
    }


def first_queries(input_ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
    """Of the positions that have a target, those whose input token had none at an earlier position of the row."""
    repeats_BTT = (input_ids_BT[:, :, None] == input_ids_BT[:, None, :]) & targets_BT[:, None, :]
    return targets_BT & ~repeats_BTT.tril(-1).any(-1)


class Tally:
    """Sums over a validation split, kept in float64 on the CPU."""

    def __init__(self, recall: bool) -> None:
        self.recall = recall
        self.loss = self.targets = self.right = self.queries = self.tokens = 0.0
        self.bin_loss: dict[int, float] = {}
        self.bin_targets: dict[int, float] = {}
        self.active = self.dense = self.reads = None
        self.paper: list[float] = []

    def add(self, batch, logits_BTV, stats) -> None:
        targets_BT = batch.labels != IGNORE
        losses = F.cross_entropy(logits_BTV.float().flatten(0, 1), batch.labels.flatten(), reduction="none")
        losses_BT = losses.view_as(batch.labels).double()
        self.loss += losses_BT.sum().item()
        self.targets += targets_BT.sum().item()
        if self.recall:
            first_BT = first_queries(batch.input_ids, targets_BT)
            self.queries += first_BT.sum().item()
            self.right += ((logits_BTV.argmax(-1) == batch.labels) & first_BT).sum().item()
        self.tokens += batch.labels.numel()
        # 0, 1, 2-3, 4-7, ...: the bin's index is the number of binary digits of the position
        bins = torch.frexp(batch.position_ids.double()).exponent.expand_as(targets_BT)
        for index in bins[targets_BT].unique().tolist():
            inside = (bins == index) & targets_BT
            self.bin_loss[index] = self.bin_loss.get(index, 0.0) + losses_BT[inside].sum().item()
            self.bin_targets[index] = self.bin_targets.get(index, 0.0) + inside.sum().item()
        active = torch.tensor([layer.active_tokens.double().mean(-1).sum() for layer in stats])
        dense = torch.tensor([(layer.positions.double() + 1).sum() for layer in stats])
        reads = torch.tensor([layer.routing_reads.double().sum() for layer in stats])
        sums = (active, dense, reads)
        if self.active is not None:
            sums = [old + new for old, new in zip((self.active, self.dense, self.reads), sums, strict=True)]
        self.active, self.dense, self.reads = sums
        if batch.cu_seqlens is None:
            self.paper.append(float(torch.stack([layer.paper_sparsity() for layer in stats]).mean()))

    def sparsity(self) -> dict:
        """Measured sparsity; ``paper_sparsity`` is null where no unpacked row is longer than its first 4096."""
        paper = sum(self.paper) / len(self.paper) if self.paper else math.nan
        return {
            "causal_sparsity": float(1 - self.active.sum() / self.dense.sum()),
            "causal_sparsity_per_layer": (1 - self.active / self.dense).tolist(),
            "paper_sparsity": None if math.isnan(paper) else paper,
            "active_tokens": float(self.active.mean() / self.tokens),
            "routing_reads": float(self.reads.mean() / self.tokens),
        }


@torch.inference_mode()
def measure(model: Transformer, stream: BatchStream, device: torch.device, recall: bool) -> Tally:
    """One pass over a validation stream."""
    tally = Tally(recall)
    for batch in stream:
        batch = batch.to(device)
        output = model(batch.input_ids, position_ids=batch.position_ids, cu_seqlens=batch.cu_seqlens, return_stats=True)
        tally.add(batch, output.logits, output.stats)
    return tally


def _loss_rows(tally: Tally) -> Iterable[dict]:
    return [{"task": "loss", "metric": "nats", "score": tally.loss / tally.targets, "position": None}]


def _position_rows(tally: Tally) -> Iterable[dict]:
    return [
        {
            "task": "position",
            "metric": "nats",
            "score": tally.bin_loss[index] / tally.bin_targets[index],
            "position": [2**index // 2, 2**index - 1],
        }
        for index in sorted(tally.bin_loss)
    ]


def _recall_rows(tally: Tally) -> Iterable[dict]:
    return [{"task": "recall", "metric": "accuracy", "score": tally.right / tally.queries, "position": None}]


SCORES = {"loss": _loss_rows, "position": _position_rows, "recall": _recall_rows}
