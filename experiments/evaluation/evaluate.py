"""Evaluation of one checkpoint at several values of the sparsity knob: scores, and the sparsity they were had at.

What can be measured stands in ``experiments/evaluation/tasks``; here it is run, and its rows are kept.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from hydra.core.config_store import ConfigStore

from data import BatchStream
from experiments.config import TrainConfig, load_config
from experiments.evaluation.config import EvaluateConfig, check_tasks
from experiments.evaluation.tasks.base import Setting, Task
from experiments.evaluation.tasks.select import build_tasks
from experiments.evaluation.tasks.streams import build_stream
from experiments.files import append_rows, read_rows
from experiments.training.check import DEVICES, resolve
from experiments.training.checkpoint import read_state
from experiments.training.run_dir import CONFIG, START, config_hash
from experiments.training.weights import find_weights, load_weights
from models import Transformer

RESULTS = "results.jsonl"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def register_evaluate_config() -> None:
    ConfigStore.instance().store(name="evaluate_schema", node=EvaluateConfig)


@dataclass(frozen=True)
class Target:
    """A checkpoint with the configuration it was trained with."""

    run_dir: Path
    checkpoint: Path
    train: TrainConfig


def locate(run: str, device: str) -> Target:
    """The checkpoint that ``run`` names (a run directory's latest, or one of its checkpoints), for a device.

    Raises:
        ValueError: no such run, or no such device.
    """
    checkpoint = find_weights(run).parent
    run_dir = checkpoint.parent.parent
    if not (run_dir / CONFIG).exists():
        raise ValueError(f"{checkpoint} does not lie in a run directory: {run_dir} has no {CONFIG}")
    if device not in DEVICES:
        raise ValueError(f"device={device}: choose one of {', '.join(DEVICES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but PyTorch sees no GPU: use device=cpu")
    train = load_config(run_dir / CONFIG)
    return Target(run_dir, checkpoint, resolve(replace(train, device=device)))


def find_target(config: EvaluateConfig) -> Target:
    """Locates what is to be evaluated and refuses what cannot be.

    Raises:
        ValueError: no such run, unknown task, or a knob value that the backend cannot have.
    """
    target = locate(config.run, config.device)
    check_tasks(config, target.train)
    for name in ("rows", "rows_per_batch", "threads"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: at least 1 is needed")
    for knob in config.knobs or ():
        target.train.attention.with_knob(knob)
    return target


def trained_knob(train: TrainConfig) -> float | None:
    return None if train.attention.knob is None else getattr(train.attention, train.attention.knob)


def evaluate(config: EvaluateConfig, target: Target) -> Iterator[dict]:
    """Evaluates at every knob value that has rows missing; yields the rows, which are on disk by then."""
    train = target.train
    device = torch.device(train.device)
    knobs = [trained_knob(train)] if config.knobs is None else list(dict.fromkeys(config.knobs))
    path = target.run_dir / RESULTS
    existing = read_rows(path)
    common = describe(target) | {"label": config.label or train.attention.name}
    tasks = build_tasks(config, train, validation_stream(target))

    def missing(task: Task, knob: float | None) -> list[str]:
        asked = {key: common[key] for key in ("checkpoint", "label")} | {"knob": knob} | task.columns
        done = {row["task"] for row in existing if all(row.get(key) == value for key, value in asked.items())}
        return [name for name in task.names if name not in done]

    if not any(missing(task, knob) for task in tasks for knob in knobs):
        return
    model = build_model(target)
    for knob in knobs:
        if knob is not None:
            model.set_knob(knob)
        setting = Setting(model, device, knob, target.checkpoint.name, target.run_dir)
        for task in tasks:
            names = missing(task, knob)
            if not names:
                continue
            start = time.perf_counter()
            rows = list(task.run(setting, names))
            when = {"date": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "seconds": time.perf_counter() - start}
            shared = common | task.columns | {"knob": knob} | when
            new = [shared | row | {"bytes_read": bytes_read(model, row)} for row in rows]
            append_rows(path, new)
            yield from new


def validation_stream(target: Target) -> BatchStream:
    """The run's validation batches. Raises ValueError if the corpus or its tokenizer is another than it was trained
    on."""
    train = target.train
    stream = build_stream(train.data, train.seed, 1, Path(train.cache_dir).expanduser())
    trained = json.loads((target.run_dir / START).read_text())["data"].get("tokens_fingerprint")
    if trained is not None and stream.describe()["tokens_fingerprint"] != trained:
        raise ValueError(
            f"the corpus of data.name={train.data.name} has changed since {target.run_dir} was trained (its "
            "fingerprint is another), and with it the tokens: restore it, or train again"
        )
    return stream


def build_model(target: Target) -> Transformer:
    """The checkpoint's model in evaluation mode, at the step (schedules) it was saved at."""
    train = target.train
    model = Transformer(train.model, train.attention)
    new = load_weights(model, target.checkpoint / "model.safetensors")
    if new:
        raise ValueError(f"{target.checkpoint} lacks {', '.join(new)}: it is not a checkpoint of this configuration")
    model.set_step(read_state(target.checkpoint)["step"])
    return model.to(train.device, DTYPES[train.deepspeed.precision]).eval()


def bytes_read(model: Transformer, row: dict) -> float:
    """Bytes of keys, values, summaries and compressed tokens that a token attends to or scores, over all layers, in 16
    bits: what decoding one has to fetch. From the row's measured means."""
    (backend, *_), layers = model.backends, len(model.backends)
    flops = backend.flops(row["active_tokens"], row["routing_reads"])
    # A number that is read takes part in a multiply-add, two operations, for every query head of the group.
    return 2 * layers * (flops.attention + flops.routing) / (2 * backend.shape.group_size)


def describe(target: Target) -> dict:
    """The columns that all rows of an evaluation share."""
    train = target.train
    git = json.loads((target.run_dir / "git.json").read_text())
    state = read_state(target.checkpoint)
    start = json.loads((target.run_dir / START).read_text())
    return {
        "backend": train.attention.name,
        "data": train.data.name,
        "seed": train.seed,
        "knob_name": train.attention.knob,
        "trained_knob": trained_knob(train),
        "checkpoint": target.checkpoint.name,
        "step": state["step"],
        "tokens": state["tokens"],
        "parameters": start["parameters"],
        "config_hash": config_hash(train),
        "git_sha": git["sha"],
        "device": torch.cuda.get_device_name() if train.device == "cuda" else "cpu",
    }
