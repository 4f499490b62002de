"""Evaluation of one checkpoint at several values of the sparsity knob: scores, and the sparsity they were had at.

What can be measured stands in ``experiments/evaluation/tasks``; here it is run, and its rows are kept.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from experiments.evaluation.config import EvaluateConfig, check_tasks
from experiments.evaluation.folder import locate_folder
from experiments.evaluation.knobs import Setpoint, setpoints, turn_knob
from experiments.evaluation.select import build_tasks
from experiments.evaluation.target import Target, build_model, locate, trained_knob, validation_stream
from experiments.evaluation.tasks.base import Setting, Task
from experiments.files import GIT, RESULTS, START, append_rows, read_rows
from experiments.provenance import device_name, git_state
from experiments.training.checkpoint import read_state
from experiments.training.run_dir import config_hash
from models import Transformer
from models.flops import count_parameters
from models.hf import is_hf_folder


def find_target(config: EvaluateConfig) -> Target:
    """Locates what is to be evaluated and refuses what cannot be.

    Raises:
        ValueError: no such run, unknown task, or a knob value or sparsity that the attention cannot have.
    """
    if is_hf_folder(Path(config.run).expanduser()):
        target = locate_folder(config)
    else:
        for name in ("attention", "data", "output"):
            if getattr(config, name) is not None:
                raise ValueError(f"{name}=... is for a Hugging Face folder: the run {config.run} has its own")
        target = locate(config.run, config.device)
    check_tasks(config, target.train)
    for name in ("rows", "rows_per_batch", "threads"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: at least 1 is needed")
    setpoints(config, target.train)
    return target


def evaluate(config: EvaluateConfig, target: Target) -> Iterator[dict]:
    """Evaluates at every knob value or sparsity that has rows missing; yields the rows, which are on disk by then."""
    train = target.train
    device = torch.device(train.device)
    places = setpoints(config, train)
    path = target.run_dir / RESULTS
    target.run_dir.mkdir(parents=True, exist_ok=True)  # of a folder's rows
    existing = read_rows(path)
    common = describe(target) | {"label": config.label or train.attention.name}
    tasks = build_tasks(config, train, validation_stream(target))
    # A checkpoint has one configuration; a folder is scored with any.
    identity = ("checkpoint", "label", "config_hash") if target.is_untrained else ("checkpoint", "label")

    def missing(task: Task, place: Setpoint) -> list[str]:
        asked = {key: common[key] for key in identity} | place.columns() | task.columns
        done = {row["task"] for row in existing if all(row.get(key) == value for key, value in asked.items())}
        return [name for name in task.names if name not in done]

    if not any(missing(task, place) for task in tasks for place in places):
        return
    model = build_model(target)
    for place in places:
        for task in tasks:
            names = missing(task, place)
            if not names:
                continue
            knob = turn_knob(model, place, task, config, target)
            setting = Setting(model, device, knob, target.checkpoint.name, target.run_dir)
            start = time.perf_counter()
            rows = list(task.run(setting, names))
            when = {"date": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "seconds": time.perf_counter() - start}
            shared = common | task.columns | place.columns() | {"knob": knob} | when
            new = [shared | row | {"bytes_read": bytes_read(model, row)} for row in rows]
            append_rows(path, new)
            yield from new


def bytes_read(model: Transformer, row: dict) -> float:
    """Bytes of keys, values, summaries and compressed tokens that a token attends to or scores, over all layers, in 16
    bits: what decoding one has to fetch. From the row's means of each layer."""
    reads = row["active_tokens_per_layer"], row["routing_reads_per_layer"]
    layers = [backend.flops(*read) for backend, *read in zip(model.backends, *reads, strict=True)]
    # A number that is read takes part in a multiply-add, two operations, for every query head of the group.
    return 2 * sum(flops.attention + flops.routing for flops in layers) / (2 * model.backends[0].shape.group_size)


def describe(target: Target) -> dict:
    """The columns that all rows of an evaluation share."""
    train = target.train
    attention = train.attention
    columns = {
        "backend": attention.name,
        "data": train.data.name,
        "seed": train.seed,
        "knob_name": attention.knob,
        "trained_knob": trained_knob(train),
        "trained_sparsity": attention.target_sparsity if attention.controls_sparsity else None,
        "trained_sparsity_count": attention.sparsity_count if attention.controls_sparsity else None,
        "checkpoint": target.checkpoint.name,
        "device": device_name(train.device),
    }
    return columns | (_of_folder(target) if target.is_untrained else _of_run(target))


def _of_run(target: Target) -> dict:
    git = json.loads((target.run_dir / GIT).read_text())
    state = read_state(target.checkpoint)
    start = json.loads((target.run_dir / START).read_text())
    return {
        "step": state["step"],
        "tokens": state["tokens"],
        "parameters": start["parameters"],
        "config_hash": state["config_hash"],
        "git_sha": git["sha"],
    }


def _of_folder(target: Target) -> dict:
    """Nothing was trained, which the rows say: ``untrained`` names the folder."""
    train = target.train
    with torch.device("meta"):
        parameters = count_parameters(Transformer(train.model, train.attention)).total
    return {
        "step": 0,
        "tokens": 0,
        "parameters": parameters,
        "config_hash": config_hash(train),
        "git_sha": git_state()[0]["sha"],
        "untrained": str(target.checkpoint),
        "trained_knob": None,
    }
