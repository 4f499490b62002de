"""The run directory: what ran, on what code, in what environment.

config.yaml        the composed configuration, every interpolation resolved
overrides.yaml     what the command line changed
git.json git.diff  commit, branch, and what differed from it
environment.json   command line, versions, device
tokenizer/         of a run on text: the tokenizer.json its tokens were made with, and its settings
start.json         number of parameters, what the data and the tokenizer are, which weights the run began with
resumed/step-N/    all but config.yaml again, of each resumed launch
metrics.jsonl      see experiments.training.metrics
anomalies.jsonl    see experiments.training.anomalies
slurm/             of a run that was submitted, see experiments.sweep.submit
traces/            see experiments.training.tracing
checkpoints/       see experiments.training.checkpoint
"""

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from filelock import FileLock, Timeout
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dashattn.fields import user_path
from data import NO_TOKEN, TextTokenizer
from experiments.config import TrainConfig, load_config, plain, read_config
from experiments.errors import Occupied
from experiments.files import (
    ANOMALIES,
    CONFIG,
    GIT,
    LOCK,
    METRICS,
    START,
    SUBMITTED,
    TOKENIZER,
    check_exists,
    check_writable,
    hold,
    read_json,
    write_atomically,
)
from experiments.origin import parse_branch
from experiments.provenance import environment, git_state
from experiments.schema import flat, read_values
from experiments.training.checkpoint import (
    LATEST,
    STATE,
    damage,
    latest_checkpoint,
    read_latest,
    read_state,
    step_name,
)
from experiments.training.metrics import drop_rows_after
from experiments.training.optim import learning_rate
from experiments.training.ranks import world_size

# A resumed run may say these otherwise: they change what is written, measured and kept, or, like the number of ranks,
# how the work is divided, but not what is learned beyond rounding; or, like the place of a corpus, where to look for
# what is known by its content.
MAY_DIFFER = (
    *("name", "run_dir", "overwrite", "cache_dir", "logger", "launcher", "log_every", "stats_every", "eval_every"),
    *("save_every", "keep_checkpoints", "keep_every", "max_skipped_steps"),
    *(
        "activation_checkpointing",
        "check_memory",
        "peak_tflops",
        "profile_steps",
        "rows_per_micro_batch",
        "sequence_parallel",
    ),
    *("threads", "data.validation_rows", "data.files", "deepspeed.stage", "any_tokenizer", "branch_from"),
)
_CORPUS = re.compile(r"data\.corpora\..+\.")
_FILES = re.compile(r"data\.corpora\..+\.files")
# A branch may say these otherwise, too, where they leave the learning rates of the steps before it as they were.
_OF_SCHEDULE = ("steps", "optim.schedule", "optim.warmup_steps", "optim.decay_fraction", "optim.min_lr_ratio")
# Rows that are kept name the hash of their run's configuration, so it stays what it was: over the values that it was
# first taken over, and those of keys that came later only where they are not these, which is what was done before. A
# backend's own key has its name in front.
_NOT_HASHED = frozenset(MAY_DIFFER) - {"eval_every", "threads", "data.validation_rows", "data.files"}
_LATER = {
    "data.bos_token": (None, NO_TOKEN),  # null: of data without text
    "data.document_separator": (None,),
    "data.document_bytes": (1_000_000,),
    "data.bad_rows": (100,),
    "model.rope.max_period": (None,),
    "model.rope.partial_rotary_factor": (None,),
    "optim.train_only": (None,),
    "dash.selector": ("entmax",),
    "dash.topk": (16,),
    "dash.top_p": (0.9,),
}
# ZeRO stage of a checkpoint -> stages that DeepSpeed can turn it into, on any number of ranks.
_CONVERTIBLE = {0: (0,), 1: (1, 2), 2: (1, 2), 3: (3,)}


@dataclass(frozen=True)
class RunDir:
    """A run directory that fits the configuration.

    Attributes:
        checkpoint: the one to resume from, None to start at step 0.
        is_branch: it is another run's, and this one has none yet.
        state: that checkpoint's state.json, empty without one.
        is_resharded: the checkpoint was written by another number of ranks or ZeRO stage, and must be converted. Not
            so at stage 0, where every rank holds everything.
        damaged: later checkpoints that cannot be resumed from -> what is wrong with them.
    """

    path: Path
    checkpoint: Path | None = None
    state: dict = field(default_factory=dict)
    is_branch: bool = False
    is_resharded: bool = False
    damaged: Mapping[str, str] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """Optimizer steps already done."""
        return self.state.get("step", 0)

    @property
    def is_new(self) -> bool:
        """Whether nothing was done here yet."""
        return self.checkpoint is None or self.is_branch

    @property
    def tokenizer_home(self) -> Path:
        """The folder that holds the tokenizer of its text, if it has one yet."""
        places = [self.path] if self.checkpoint is None else [self.path, self.checkpoint, self.checkpoint.parents[1]]
        return next((place for place in places if (place / TOKENIZER).is_dir()), self.path)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"


def config_hash(config: TrainConfig) -> str:
    """SHA-256 over the values that a run is known by; it keeps the one that it began with."""

    def is_as_ever(key: str, value: object) -> bool:
        key = _CORPUS.sub("data.", key)
        group, _, name = key.partition(".")
        return value in _LATER.get(f"{config.attention.name}.{name}" if group == "attention" else key, ())

    values = {
        key: value
        for key, value in flat(plain(config)).items()
        if not _is_among(key, _NOT_HASHED) and not is_as_ever(key, value)
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def find_run_dir(config: TrainConfig, damaged: Mapping[str, str] | None = None) -> RunDir:
    """Look at ``config.run_dir`` without changing it.

    Args:
        damaged: checkpoints known not to be intact -> why.

    Raises:
        ValueError: if it holds a run of another configuration, or one that these ranks cannot resume, or something
            else; or if it cannot be written.
    """
    path = user_path(config.run_dir)
    checkpoints = RunDir(path).checkpoints
    for directory in (path, checkpoints):
        check_writable(directory, "give another run_dir=...")
    # A lock or a submission alone is the trace of a run that did not come to begin.
    if not path.exists() or all(entry.name == SUBMITTED or entry.name.startswith(".") for entry in path.iterdir()):
        return _begin(path, config, damaged or {})
    if not (path / CONFIG).exists():
        raise ValueError(f"{path} is no run directory (it has no {CONFIG}): give another run_dir=...")
    different = _differences(path, config)
    if different:
        is_schedule = different.keys() <= set(_OF_SCHEDULE)
        raise ValueError(
            f"{path} holds a run of another configuration:{_listed(different)}\n"
            + (f"branch_from={path}@STEP, under another name, goes on from one of its checkpoints; " * is_schedule)
            + "give another name=... or run_dir=... for a new run, overwrite=true to move that one aside, or the old "
            f"values to resume it; only these may change: {', '.join(MAY_DIFFER)}"
        )
    # state.json alone, which says where the run stands: every rank looks, and knows nothing of the others yet. The sums
    # of the large files are shared out among them, in ``verify_checkpoint``.
    damaged = dict(damaged or {})
    if (checkpoints / LATEST).exists() and read_latest(checkpoints) is None:
        damaged[LATEST] = "it names no checkpoint"
    while (checkpoint := latest_checkpoint(checkpoints, damaged)) is not None:
        problems = damage(checkpoint, names=(STATE,))
        if not problems:
            break
        damaged[checkpoint.name] = "; ".join(problems)
    return _begin(path, config, damaged) if checkpoint is None else _resume(RunDir(path, checkpoint), config, damaged)


def _begin(path: Path, config: TrainConfig, damaged: Mapping[str, str]) -> RunDir:
    """A run directory without a checkpoint: at step 0, or where its run branches off another."""
    if config.branch_from is None:
        return RunDir(path)
    run, step = parse_branch(config.branch_from)
    check_exists(run, f"branch_from={config.branch_from} takes RUN@STEP")
    checkpoint, named = RunDir(run).checkpoints / step_name(step), f"branch_from={config.branch_from}"
    if not (checkpoint / STATE).exists():
        names = sorted(found.name.removeprefix("step-") for found in checkpoint.parent.glob("step-*"))
        steps = [name.lstrip("0") for name in names if name.isdecimal()]
        raise ValueError(f"{named}: no such checkpoint; {run} has those of the steps {', '.join(steps) or '(none)'}")
    problems = [damaged[checkpoint.name]] if checkpoint.name in damaged else damage(checkpoint, names=(STATE,))
    if problems:
        raise ValueError(f"{named} is damaged ({'; '.join(problems)}): branch from another step")
    different = {key: values for key, values in _differences(run, config).items() if key not in _OF_SCHEDULE}
    if different:
        raise ValueError(
            f"{named} is of a run of another configuration:{_listed(different)}\n"
            f"a branch may change {', '.join((*_OF_SCHEDULE, *MAY_DIFFER))}; init_from takes the weights alone"
        )
    _check_rates(load_config(run / CONFIG), config, step)
    return _resume(RunDir(path, checkpoint, is_branch=True), config, {})


def _check_rates(old: TrainConfig, new: TrainConfig, step: int) -> None:
    """A branch is what a run of its configuration would have been: its past has the same learning rates."""
    if step >= new.steps:
        raise ValueError(f"branch_from={new.branch_from} leaves nothing of steps={new.steps}: raise steps")
    for index in range(step):
        there, here = (learning_rate(config.optim, index, config.steps) for config in (old, new))
        if not math.isclose(there, here, rel_tol=1e-9):
            raise ValueError(
                f"branch_from={new.branch_from}: step {index + 1} was taken at a learning rate of {there:.4g}, and "
                f"would have been at {here:.4g} with steps={new.steps} and this schedule: branch before it, from the "
                "stable part of optim=wsd, or raise steps"
            )


def _resume(run: RunDir, config: TrainConfig, damaged: Mapping[str, str]) -> RunDir:
    """``run`` with what its checkpoint's state says. Raises ValueError if these ranks cannot resume it."""
    state, stage = read_state(run.checkpoint), config.deepspeed.stage
    stages = _CONVERTIBLE[state["stage"]]
    if stage not in stages and state["step"] < config.steps:
        raise ValueError(
            f"{run.checkpoint} was written at deepspeed.stage={state['stage']} and cannot be resumed at {stage}: use "
            f"stage {' or '.join(map(str, stages))}, on any number of ranks, or start a new run from its weights with "
            f"init_from={run.checkpoint}"
        )
    is_resharded = stage > 0 and (state["world_size"], state["stage"]) != (world_size(), stage)
    return replace(run, state=state, is_resharded=is_resharded, damaged=damaged)


def check_start(run: RunDir, data: dict) -> None:
    """Refuses other data than a run began with that has no checkpoint yet; one that has compares them with its state.

    Args:
        data: what the training stream says of itself.

    Raises:
        ValueError: with the mend.
    """
    if run.checkpoint is not None or not (run.path / START).exists():
        return
    began = read_json(run.path / START).get("data", {})
    different = [key for key in data if key.endswith("_fingerprint") and data[key] != began.get(key, data[key])]
    if different:
        raise ValueError(
            f"the data differ from those that the run in {run.path} began with ({', '.join(different)}): restore them, "
            "or give another name=... or run_dir=... for a new run"
        )


def open_run_dir(
    run: RunDir,
    config: TrainConfig,
    overrides: Sequence[str],
    start: dict,
    tokenizer: TextTokenizer | None = None,
) -> FileLock:
    """Write what explains this launch; on a resume also drop the metrics that will be written again.

    Args:
        overrides: of the command line.
        start: JSON-able facts that the configuration alone does not tell.
        tokenizer: of the data, which the run keeps.

    Returns:
        The lock on the directory, to be released when the run ends; it goes with the process in any case.

    Raises:
        ValueError: another process is training there, or it cannot be written.
        Occupied: another process is training there, and this one is a job of Slurm that was queued again.
    """
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        lock = hold(run.path / LOCK)
    except Timeout:
        if int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0:
            raise Occupied(
                f"another process still trains in {run.path}, as after a node was given up that lives on: this job "
                "asks to be queued again"
            ) from None
        raise ValueError(
            f"another process is training in {run.path}: wait for it, or give another run_dir=..."
        ) from None
    except OSError as error:
        raise ValueError(f"{run.path} cannot be written ({error}): give another run_dir=...") from None
    try:
        _record_start(run, config, overrides, start, tokenizer)
    except BaseException:
        lock.release()  # not only when the error that holds it is gone: this process may try again
        raise
    return lock


def _record_start(
    run: RunDir, config: TrainConfig, overrides: Sequence[str], start: dict, tokenizer: TextTokenizer | None
) -> None:
    # Between the first look and the lock another process may have trained here, and left.
    if find_run_dir(config, run.damaged).step != run.step:
        raise ValueError(f"another process has just trained in {run.path}: start again to go on from where it stopped")
    record = run.path if run.is_new else run.path / "resumed" / f"step-{run.step:08d}"
    record.mkdir(parents=True, exist_ok=True)
    if run.is_new:
        # First: with this file the directory is a run directory, so that one that is killed here can start again.
        write_atomically(run.path / CONFIG, OmegaConf.to_yaml(plain(config)))
    if tokenizer is not None and not (run.path / TOKENIZER).exists():
        tokenizer.save_folder(run.path / TOKENIZER)
    run.checkpoints.mkdir(exist_ok=True)
    for name in run.damaged:
        if (run.checkpoints / name).exists():
            os.replace(run.checkpoints / name, run.checkpoints / f"damaged-{name}-{time.time_ns()}")
    if run.damaged:
        write_atomically(run.checkpoints / LATEST, run.checkpoint.name + "\n")
    write_atomically(record / "overrides.yaml", OmegaConf.to_yaml(list(overrides)))
    git, diff = git_state()
    write_atomically(record / GIT, json.dumps(git, indent=1) + "\n")
    write_atomically(record / "git.diff", diff)
    write_atomically(record / "environment.json", json.dumps(environment(config.device), indent=1) + "\n")
    write_atomically(record / START, json.dumps(start, indent=1) + "\n")
    for rows in (run.path / METRICS, run.path / ANOMALIES):
        if rows.exists():
            drop_rows_after(rows, run.step)


def _differences(run: Path, config: TrainConfig) -> dict[str, tuple]:
    """Dotted keys whose values in ``run`` and ``config`` differ, and must not -> (there, now)."""
    try:
        saved = read_config(run / CONFIG)
    except OmegaConfBaseException:  # of a version that had other keys
        saved = read_values(run / CONFIG)
    old, new = flat(OmegaConf.to_container(saved, resolve=False)), flat(plain(config))
    for key in ("model.vocab_size", "data.bos_token"):
        if new.get(key) is None and key in old:
            new[key] = old[key]  # null stands for the data's, and for the tokenizer's
    different = {
        key: (old.get(key, "absent"), new.get(key, "absent"))
        for key in old.keys() | new.keys()
        if not _is_among(key, MAY_DIFFER) and old.get(key, "absent") != new.get(key, "absent")
    }
    if "data.tokenizer" in different and _is_kept(run / TOKENIZER, config):
        del different["data.tokenizer"]
    return different


def _is_kept(kept: Path, config: TrainConfig) -> bool:
    """Whether the tokenizer that the data name is the one that a run keeps, which lies elsewhere now."""
    data = config.data
    if not kept.is_dir() or getattr(data, "tokenizer", None) is None:
        return False
    own, theirs = (TextTokenizer.load(str(x), data.eos_token, data.bos_token) for x in (data.tokenizer, kept))
    return own.fingerprint() == theirs.fingerprint()


def _listed(different: dict[str, tuple]) -> str:
    return "".join(f"\n  {key}: {old} there, {new} now" for key, (old, new) in sorted(different.items()))


def _is_among(key: str, names: Container[str]) -> bool:
    return key in names or key.split(".")[0] in names or ("data.files" in names and _FILES.fullmatch(key) is not None)
