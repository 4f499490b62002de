"""The run directory: what ran, on what code, in what environment.

config.yaml        the composed configuration, every interpolation resolved
overrides.yaml     what the command line changed
git.json git.diff  commit, branch, and what differed from it
environment.json   command line, versions, device
tokenizer/         of a run on text: the tokenizer.json its tokens were made with, and its settings
start.json         number of parameters, what the data are, which weights the run began with
resumed/step-N/    all but config.yaml again, of each resumed launch
metrics.jsonl      see experiments.training.metrics
anomalies.jsonl    see experiments.training.anomalies
slurm/             of a run that was submitted, see experiments.sweep.submit
traces/            see experiments.training.tracing
checkpoints/       see experiments.training.checkpoint
"""

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout
from omegaconf import OmegaConf

from data import TextTokenizer
from experiments.config import TrainConfig, plain
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
    check_writable,
    write_atomically,
)
from experiments.provenance import environment, git_state
from experiments.training.checkpoint import LATEST, STATE, damage, latest_checkpoint, read_latest, read_state
from experiments.training.metrics import drop_rows_after
from experiments.training.ranks import world_size

# A resumed run may say these otherwise: they change what is written and kept, or, like the number of ranks, how the
# work is divided, but not what is learned beyond rounding.
_MAY_DIFFER = (
    *("name", "run_dir", "cache_dir", "logger", "launcher", "log_every", "stats_every"),
    *("save_every", "keep_checkpoints", "keep_every", "max_skipped_steps"),
    *("activation_checkpointing", "peak_tflops", "profile_steps", "rows_per_micro_batch", "sequence_parallel"),
    "deepspeed.stage",
)
# ZeRO stage of a checkpoint -> stages that DeepSpeed can turn it into, on any number of ranks.
_CONVERTIBLE = {0: (0,), 1: (1, 2), 2: (1, 2), 3: (3,)}


@dataclass(frozen=True)
class RunDir:
    """A run directory that fits the configuration.

    Attributes:
        checkpoint: the one to resume from, None to start at step 0.
        state: that checkpoint's state.json, empty without one.
        is_resharded: the checkpoint was written by another number of ranks or ZeRO stage, and must be converted. Not
            so at stage 0, where every rank holds everything.
        damaged: later checkpoints that cannot be resumed from -> what is wrong with them.
    """

    path: Path
    checkpoint: Path | None = None
    state: dict = field(default_factory=dict)
    is_resharded: bool = False
    damaged: Mapping[str, str] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """Optimizer steps already done."""
        return self.state.get("step", 0)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"


def config_hash(config: TrainConfig) -> str:
    """SHA-256 over the values a resumed run must repeat."""
    values = {key: value for key, value in flat(plain(config)).items() if not _may_differ(key)}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def find_run_dir(config: TrainConfig, damaged: Mapping[str, str] | None = None) -> RunDir:
    """Look at ``config.run_dir`` without changing it.

    Args:
        damaged: checkpoints known not to be intact -> why.

    Raises:
        ValueError: if it holds a run of another configuration, or one that these ranks cannot resume, or something
            else; or if it cannot be written.
    """
    path = Path(config.run_dir).expanduser()
    check_writable(path, "give another run_dir=...")
    # A lock or a submission alone is the trace of a run that did not come to begin.
    if not path.exists() or all(entry.name == SUBMITTED or entry.name.startswith(".") for entry in path.iterdir()):
        return RunDir(path)
    if not (path / CONFIG).exists():
        raise ValueError(f"{path} is no run directory (it has no {CONFIG}): give another run_dir=...")
    different = _differences(OmegaConf.to_container(OmegaConf.load(path / CONFIG)), plain(config))
    if different:
        lines = "".join(f"\n  {key}: {old} there, {new} now" for key, (old, new) in sorted(different.items()))
        raise ValueError(
            f"{path} holds a run of another configuration:{lines}\n"
            "give another name=... or run_dir=... for a new run, or the old values to resume that one"
        )
    # state.json alone, which says where the run stands: every rank looks, and knows nothing of the others yet. The sums
    # of the large files are shared out among them, in ``verify_checkpoint``.
    damaged = dict(damaged or {})
    if (path / "checkpoints" / LATEST).exists() and read_latest(path / "checkpoints") is None:
        damaged[LATEST] = "it names no checkpoint"
    while (checkpoint := latest_checkpoint(path / "checkpoints", damaged)) is not None:
        problems = damage(checkpoint, names=(STATE,))
        if not problems:
            break
        damaged[checkpoint.name] = "; ".join(problems)
    if checkpoint is None:
        return RunDir(path)
    state = read_state(checkpoint)
    stage = config.deepspeed.stage
    stages = _CONVERTIBLE[state["stage"]]
    if stage not in stages and state["step"] < config.steps:
        raise ValueError(
            f"{checkpoint} was written at deepspeed.stage={state['stage']} and cannot be resumed at {stage}: use stage "
            f"{' or '.join(map(str, stages))}, on any number of ranks, or start a new run from its weights with "
            f"init_from={checkpoint}"
        )
    is_resharded = stage > 0 and (state["world_size"], state["stage"]) != (world_size(), stage)
    return RunDir(path, checkpoint, state, is_resharded, damaged)


def verify_checkpoint(run: RunDir, config: TrainConfig, ranks) -> RunDir:
    """``run`` with a checkpoint whose every checksum is right; all ranks must call it, and share the work."""
    while run.checkpoint is not None:
        own = damage(run.checkpoint, rank=ranks.rank, world_size=ranks.world_size)
        problems = sorted({problem for share in ranks.gather(own) for problem in share})
        if not problems:
            break
        run = find_run_dir(config, {**run.damaged, run.checkpoint.name: "; ".join(problems)})
    return run


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
        lock = FileLock(run.path / LOCK)
        lock.acquire(timeout=0)
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
    # Between the first look and the lock another process may have trained here, and left.
    if find_run_dir(config, run.damaged).step != run.step:
        raise ValueError(f"another process has just trained in {run.path}: start again to go on from where it stopped")
    record = run.path if run.step == 0 else run.path / "resumed" / f"step-{run.step:08d}"
    record.mkdir(parents=True, exist_ok=True)
    if run.step == 0:
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
    return lock


def _differences(old: dict, new: dict) -> dict[str, tuple]:
    """Dotted keys whose values differ -> (old, new)."""
    old, new = flat(old), flat(new)
    if new["model.vocab_size"] is None:
        new["model.vocab_size"] = old.get("model.vocab_size")  # null stands for the data's
    return {
        key: (old.get(key, "absent"), new.get(key, "absent"))
        for key in old.keys() | new.keys()
        if not _may_differ(key) and old.get(key, "absent") != new.get(key, "absent")
    }


def _may_differ(key: str) -> bool:
    return key in _MAY_DIFFER or key.split(".")[0] in _MAY_DIFFER


def flat(values: dict, prefix: str = "") -> dict:
    """Nested dictionaries as one, with dotted keys."""
    result = {}
    for key, value in values.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return result
