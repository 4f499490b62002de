"""Where the sparsity knob stands for rows: at values that are given, or where it has the sparsities that are asked for.

calibrations.jsonl of the run directory keeps each knob that was found, so that all rows of a checkpoint at one sparsity
and length are of one knob, also those of a later call.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch

from dashattn.fields import user_path
from data import build_data
from data.cache import fingerprint
from experiments.config import TrainConfig
from experiments.evaluation.config import EvaluateConfig
from experiments.evaluation.target import Target, trained_knob
from experiments.evaluation.tasks.base import Task, halving
from experiments.evaluation.tasks.streams import STREAM_TASKS
from experiments.files import CALIBRATIONS, append_rows, columns_of, read_rows
from experiments.sparsity import Found, calibrate, check_reachable, turned_layers
from models import Transformer

_ROWS = 16  # of training text that a knob is found on; a power of two


@dataclass(frozen=True)
class Setpoint:
    """A value of the knob, or a sparsity and how it counts."""

    knob: float | None = None
    target: float | None = None
    count: str | None = None

    def columns(self) -> dict:
        """What rows at this setpoint agree in."""
        columns = {"target_sparsity": self.target, "sparsity_count": self.count}
        return columns if self.target is not None else columns | {"knob": self.knob}


def setpoints(config: EvaluateConfig, train: TrainConfig) -> list[Setpoint]:
    """Those of an evaluation, each once; of one that names none, the knob that was trained with.

    Raises:
        ValueError: a knob that the attention cannot have, or a sparsity that rows of these lengths cannot.
    """
    if config.sparsities is None:
        if config.knobs is None:
            return [Setpoint(trained_knob(train))]
        _check_knobs(config.knobs, train)
        return [Setpoint(knob) for knob in dict.fromkeys(config.knobs)]
    if config.knobs is not None:
        raise ValueError("knobs and sparsities both say where the knob stands: give one of them")
    if not config.sparsities:
        raise ValueError("sparsities=[] names none: give at least one, such as 0.75, or null")
    if train.attention.knob is None:
        raise ValueError(f"attention={train.attention.name} has no sparsity knob: leave sparsities away")
    layers = turned_layers(train.attention, train.model.num_layers)
    packed = train.data.is_packed and bool(set(config.tasks) & set(STREAM_TASKS))
    for sparsity in config.sparsities:
        for length in config.lengths or [train.data.seq_len]:
            check_reachable(layers, sparsity, config.sparsity_count, length, packed=packed)
    return [Setpoint(target=sparsity, count=config.sparsity_count) for sparsity in dict.fromkeys(config.sparsities)]


def _check_knobs(knobs: Sequence[float], train: TrainConfig) -> None:
    if not knobs:
        raise ValueError("knobs=[] names none: give at least one, or null")
    layers = turned_layers(train.attention, train.model.num_layers)
    for knob in knobs:
        for attention in (train.attention, *layers):
            attention.with_knob(knob)
    if not layers:
        raise ValueError("knobs need layers with a knob to turn: attention.layers leaves none of them")


def turn_knob(model: Transformer, setpoint: Setpoint, task: Task, config: EvaluateConfig, target: Target) -> float:
    """Sets the model's knob for a task, and returns it.

    A sparsity is looked for on the first rows of the training split, which nothing is scored on: of the task's length,
    and documents packed where the task's are.
    """
    if setpoint.target is None:
        if setpoint.knob is not None:
            model.set_knob(setpoint.knob)
        return setpoint.knob
    train, length = target.train, task.columns["length"]
    attention = {key: value for key, value in asdict(train.attention).items() if key != train.attention.knob}
    key = {
        "checkpoint": target.checkpoint.name,
        "attention": fingerprint(attention),
        "target_sparsity": setpoint.target,
        "sparsity_count": setpoint.count,
        "data": train.data.name,
        "length": length,
        "packed": task.packed,
        "mqar": config.mqar.given(),
    }
    key |= target.identity
    path = target.rows_dir / CALIBRATIONS

    def kept() -> float | None:
        rows = [row for row in read_rows(path) if all(row.get(name) == value for name, value in key.items())]
        return rows[0]["knob"] if rows else None

    if (knob := kept()) is not None:
        model.set_knob(knob)
        return knob
    data = train.data.at_length(length, **config.mqar.given())
    if train.data.is_packed and not task.packed:
        data = replace(data, pack="plain")
    cache_dir, device = user_path(train.cache_dir), torch.device(train.device)

    def search(rows: int) -> tuple[Found, int]:
        stream = build_data(data, split="train", seed=train.seed, rows=rows, cache_dir=cache_dir)
        batches = [next(stream) for _ in range(math.ceil(_ROWS / rows))]
        return calibrate(model, batches, setpoint.target, setpoint.count, length, device=device), rows * len(batches)

    # A power of two, as its halves are, so that it is found on the same rows however many go at once.
    at_once = 1 if task.packed else 2 ** (min(config.rows_per_batch, _ROWS).bit_length() - 1)
    (found, rows), _ = halving(search, at_once)
    new = [key | {"knob_name": train.attention.knob, "rows": rows} | found.record()]
    if not append_rows(path, new, partial(columns_of, names=key)):  # another evaluation has found one meanwhile
        model.set_knob(kept())
    return kept()
