"""Evaluation of one checkpoint at several values of the sparsity knob: scores, and the sparsity they were had at.

What can be measured stands in ``experiments/evaluation/tasks``; here it is run, and its rows are kept.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock, Timeout

from dashattn.fields import user_path
from data.cache import fingerprint
from experiments.evaluation.check import check_of_run, check_request
from experiments.evaluation.config import EvaluateConfig
from experiments.evaluation.folder import locate_folder
from experiments.evaluation.knobs import Setpoint, setpoints, turn_knob
from experiments.evaluation.select import build_tasks
from experiments.evaluation.target import Target, build_model, locate, trained_knob
from experiments.evaluation.tasks.base import Setting, Task
from experiments.files import (
    EVALUATING,
    GIT,
    RESULTS,
    START,
    UNTRAINED,
    append_rows,
    check_writable,
    columns_of,
    not_finite,
    read_json,
    read_rows,
)
from experiments.provenance import device_name, git_state, now
from experiments.training.checkpoint import read_state
from experiments.training.run_dir import config_hash
from models import Transformer
from models.flops import count_parameters
from models.hf import is_hf_folder, read_step
from models.meta import without_memory


def find_target(config: EvaluateConfig) -> Target:
    """Locates what is to be evaluated and refuses what cannot be.

    Raises:
        ValueError: no such run, unknown task, a knob value or sparsity that the attention cannot have, or no right to
            write where the rows are to be kept.
    """
    if is_hf_folder(user_path(config.run)):
        target = locate_folder(config)
    else:
        check_of_run(config)
        where = {"cache_dir": config.cache_dir, "any_data": config.any_data, "data": config.data}
        target = locate(config.run, config.device, config.output, **where)
    check_writable(target.rows_dir, "its rows are kept there unless output=... names another directory")
    check_request(config, target.train)
    return target


def evaluate(config: EvaluateConfig, target: Target) -> Iterator[dict]:
    """``Evaluation.run``, without a watcher."""
    return Evaluation(config, target).run()


class Pass(NamedTuple):
    """A task at one place of the knob; ``asked``: columns that tell its rows from those of other passes."""

    task: Task
    place: Setpoint
    asked: dict


class Evaluation:
    """Every task at every knob value or sparsity that was asked for."""

    def __init__(self, config: EvaluateConfig, target: Target):
        """Raises ValueError: as ``build_tasks``."""
        self._config, self._target = config, target
        self._path = target.rows_dir / RESULTS
        train = target.train
        target.rows_dir.mkdir(parents=True, exist_ok=True)
        self._common = describe(target) | target.identity | {"label": config.label or own_label(target)}
        tasks = build_tasks(config, target)
        identity = {key: self._common[key] for key in ("checkpoint", "label", *target.identity)}
        self._passes = [
            Pass(task, place, identity | place.columns() | task.columns)
            for place in setpoints(config, train)
            for task in tasks
        ]

    def rows(self) -> list[dict]:
        """What there is of all that was asked for, whoever made it, pass by pass."""
        kept = read_rows(self._path)
        return [row for one in self._passes for row in _rows_of(one, kept) if row["task"] in one.task.names]

    def run(self, watch: Callable[[float], None] = lambda share: None) -> Iterator[dict]:
        """Does the passes that have rows missing; yields the rows, which are on disk by then.

        Evaluations may go side by side, of one run too: each takes passes that no other one has in hand, and looks at
        the end that those were finished. No row is written twice.

        Args:
            watch: called with the share of the work that is done, 0 to 1.
        """
        passes = [one for one in self._passes if self._missing(one)]
        whole, done, model = sum(map(_weight, passes)), 0, None
        for waits in (False, True):
            left = []
            for one in passes:
                with in_hand(self._target.rows_dir, one.asked, waits=waits) as is_free:
                    if not is_free:
                        left.append(one)
                        continue
                    names = self._missing(one)  # another evaluation may just have made them
                    rows = []
                    if names:
                        model = model or build_model(self._target)
                        so_far, weight = done / whole, _weight(one) / whole
                        rows = self._do(one, names, model, lambda share, a=so_far, b=weight: watch(a + b * share))
                    done += _weight(one)
                    watch(done / whole)
                    yield from rows
            passes = left

    def _missing(self, one: Pass) -> list[str]:
        done = {row["task"] for row in _rows_of(one, read_rows(self._path))}
        return [name for name in one.task.names if name not in done]

    def _do(self, one: Pass, names: Sequence[str], model: Transformer, advance: Callable[[float], None]) -> list[dict]:
        """Makes the rows of a pass, and keeps them. Returns those that were not there."""
        config, target, task = self._config, self._target, one.task
        knob = turn_knob(model, one.place, task, config, target)
        start = time.perf_counter()
        source = "-".join((target.checkpoint.name, *target.identity.values()))
        setting = Setting(model, torch.device(target.train.device), knob, source, target.rows_dir, advance)
        rows = list(task.run(setting, names))
        when = {"date": now(), "seconds": time.perf_counter() - start}
        shared = self._common | task.columns | one.place.columns() | {"knob": knob} | when
        new = [shared | row | {"bytes_read": bytes_read(model, row)} for row in rows]
        _check_finite(new)
        return append_rows(self._path, new, partial(columns_of, names=(*one.asked, "task")))


def own_label(target: Target) -> str:
    """What rows are called that nobody named: the backend, and of a folder whose weights these are, or that they were
    not trained with it."""
    name = target.train.attention.name
    if not target.is_folder:
        return name
    return f"{name}, {UNTRAINED if target.is_untrained else target.checkpoint.resolve().name}"


def _rows_of(one: Pass, rows: Sequence[dict]) -> list[dict]:
    return [row for row in rows if all(row.get(key) == value for key, value in one.asked.items())]


def _weight(one: Pass) -> int:
    """How much work a pass is among others: the tokens it reads."""
    return one.task.columns["length"] * (one.task.columns["rows"] or 1)


@contextmanager
def in_hand(directory: Path, asked: dict, *, waits: bool) -> Iterator[bool]:
    """One pass as this process's: yields whether it is, or, if it ``waits``, when no other process has it any more."""
    folder = directory / EVALUATING
    folder.mkdir(exist_ok=True)
    # A few locks for all passes there may be. Of two with the same one the second is done later.
    lock = FileLock(folder / f"{int(fingerprint(asked), 16) % 64}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not waits:
            yield False
            return
        print("waiting for another evaluation, which has in hand what is missing here", file=sys.stderr)
        lock.acquire()
    try:
        yield True
    finally:
        lock.release()


def _check_finite(rows: list[dict]) -> None:
    for row in rows:
        wrong = not_finite(row)
        if wrong:
            raise ValueError(
                f"task {row['task']} at knob {row['knob']}: {', '.join(wrong[:3])}, as the outputs of "
                f"{row['checkpoint']} are no finite numbers there: evaluate an earlier checkpoint, or in another "
                "precision; the rows before it are kept"
            )


def bytes_read(model: Transformer, row: dict) -> float:
    """Bytes of keys, values, summaries and compressed tokens that a token attends to or scores, over all layers, in 16
    bits: what decoding one has to fetch. From the row's means of each layer."""
    reads = row["active_tokens_per_layer"], row["routing_reads_per_layer"]
    return 2 * sum(backend.numbers_read(*read) for backend, *read in zip(model.backends, *reads, strict=True))


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
    return columns | (_of_folder(target) if target.is_folder else _of_run(target))


def _of_run(target: Target) -> dict:
    git = read_json(target.home / GIT, keys=("sha",))
    state = read_state(target.checkpoint)
    start = read_json(target.home / START, keys=("parameters",))
    return {
        "step": state["step"],
        "tokens": state["tokens"],
        "parameters": start["parameters"],
        "config_hash": state["config_hash"],
        "git_sha": git["sha"],
    }


def _of_folder(target: Target) -> dict:
    """Nothing was trained here: ``untrained`` names the folder, unless it says that its weights were trained so."""
    train = target.train
    with without_memory():
        parameters = count_parameters(Transformer(train.model, train.attention))
    return {
        "step": read_step(target.checkpoint),
        "tokens": 0,
        "parameters": parameters,
        "config_hash": config_hash(train),
        "git_sha": git_state()[0]["sha"],
        "untrained": str(target.checkpoint) if target.is_untrained else None,
        "trained_knob": None if target.is_untrained else trained_knob(train),
    }
