"""Checkpoints of a run: complete or absent, never half, and known to be intact when they are read.

checkpoints/step-00000100/deepspeed/          DeepSpeed's state: weights, master weights, optimizer
checkpoints/step-00000100/model.safetensors   consolidated weights, for evaluation and init_from
checkpoints/step-00000100/state.json          step, tokens, data position of every rank, hash of the configuration
checkpoints/step-00000100/config.yaml ...      of the run, so that a copied checkpoint is whole: its configuration,
                                              start.json, git.json and tokenizer/
checkpoints/step-00000100/manifest.json       size and SHA-256 of each of these files
checkpoints/latest                            name of the newest complete checkpoint
checkpoints/damaged-step-*                    did not match its manifest; kept, and never read again
checkpoints/stopped-step-*                    of a run whose losses were not finite; kept, and read only if asked for

Writing is synchronous. DeepSpeed 0.19.8 writes in the background through its decoupled engine only, which compiles an
asynchronous-I/O operation, gives up after five minutes, and leaves out a checkpoint whose writer has died unseen.
"""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.serialization import get_unsafe_globals_in_checkpoint

from experiments.errors import Stopped
from experiments.files import (
    CONFIG,
    GIT,
    START,
    STATE,
    TOKENIZER,
    WEIGHTS,
    DamagedFileError,
    read_json,
    sha256,
    sync,
    write_atomically,
)
from experiments.training.engine import consolidated_weights

MANIFEST = "manifest.json"
LATEST = "latest"
_ENGINE_TAG = "deepspeed"
_ANOTHER = "take another checkpoint"
# What DeepSpeed's own files need beside what PyTorch takes for weights alone: plain values all of them.
_HARMLESS = {
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
}
_STEP = re.compile(r"step-\d{8,}")
# How PyTorch tells a file that it could not write.
_NOT_WRITTEN = re.compile("inline_container|PytorchStreamWriter|cannot be opened|Parent directory")


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def latest_checkpoint(checkpoints: Path, damaged: Mapping[str, str] = MappingProxyType({})) -> Path | None:
    """The newest checkpoint up to the one that ``latest`` names, of all where it names none; None if there was never
    one.

    Args:
        damaged: names of those to leave out -> why.

    Raises:
        ValueError: there are damaged ones only.
    """
    names = {path.name for path in _steps(checkpoints)}
    named = read_latest(checkpoints)
    # Without it the run stopped before it wrote it, or it is damaged: what bears a step's name was complete.
    earlier = {name for name in names if named is not None and name < named}
    if earlier or named in names:
        names = earlier | {named}
    if not names:
        return None
    intact = max((name for name in names if name not in damaged), default=None)
    if intact is None:
        causes = "; ".join(f"{name}: {why}" for name, why in damaged.items())
        raise ValueError(
            f"no checkpoint in {checkpoints} is intact ({causes}): write the name of a later one, if there is one, "
            f"into {LATEST}, or move {checkpoints} away to begin again at step 0"
        )
    return checkpoints / intact


def read_latest(checkpoints: Path) -> str | None:
    """The name in ``latest``; None if there is none, or the file is damaged and names no step."""
    try:
        named = (checkpoints / LATEST).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return named if _STEP.fullmatch(named) else None


def _steps(checkpoints: Path) -> list[Path]:
    """The complete checkpoints, oldest first."""
    return sorted(path for path in checkpoints.glob("step-*") if _STEP.fullmatch(path.name) and path.is_dir())


def damage(
    checkpoint: Path,
    *,
    rank: int = 0,
    world_size: int = 1,
    names: Collection[str] | None = None,
    with_engine: bool = True,
) -> list[str]:
    """What differs from the manifest; empty if intact.

    Args:
        rank, world_size: checksums are computed for this rank's share of the files; sizes are compared for all.
        names: of the files to look at, None = all.
        with_engine: DeepSpeed's files, too, which only a resumption reads.
    """
    try:
        files = read_manifest(checkpoint)
    except DamagedFileError as error:  # whose mend is for who asked for this checkpoint
        return [f"{MANIFEST} {error.why}"]
    problems = [f"{name} is not in {MANIFEST}" for name in names or (STATE, WEIGHTS) if name not in files]
    files = {
        name: entry
        for name, entry in files.items()
        if (names is None or name in names) and (with_engine or not name.startswith(f"{_ENGINE_TAG}/"))
    }
    for index, (name, entry) in enumerate(sorted(files.items())):
        path = checkpoint / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != entry["bytes"]:
            problems.append(f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}")
        elif index % world_size == rank and sha256(path) != entry["sha256"]:
            problems.append(f"{name} has another checksum")
    return problems


def foreign_code(checkpoint: Path, *, rank: int = 0, world_size: int = 1) -> list[str]:
    """What loading DeepSpeed's files, which are pickles, would call beside what every checkpoint of ours does.

    They are searched for it, not loaded. Checksums say nothing here: who writes a file can write its manifest.

    Args:
        rank, world_size: this rank's share of the files is searched.
    """
    problems = []
    for path in sorted((checkpoint / _ENGINE_TAG).rglob("*"))[rank::world_size]:
        if path.is_dir():
            continue
        try:
            names = sorted(set(get_unsafe_globals_in_checkpoint(str(path))) - _HARMLESS)
        except Exception as error:  # of several libraries' kinds: whatever cannot be searched is not loaded
            names = [f"something that cannot be searched: {' '.join(str(error).split())}"]
        problems += [f"{path.relative_to(checkpoint)} calls {', '.join(names)}"] if names else []
    return problems


def read_manifest(checkpoint: Path) -> dict[str, dict]:
    """Name of each file -> its ``bytes`` and ``sha256``. Raises DamagedFileError if there is no manifest, or none
    that holds them."""
    path = checkpoint / MANIFEST
    files = read_json(path, _ANOTHER)
    if not all(isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys() for entry in files.values()):
        raise DamagedFileError(path, "is damaged (it holds no checksums)", _ANOTHER)
    return files


def read_state(checkpoint: Path) -> dict:
    """What state.json holds. Raises ValueError if it is missing or damaged."""
    return read_json(checkpoint / STATE, _ANOTHER, keys=("step",))


def save_checkpoint(checkpoints: Path, state: dict, engine, ranks, *, keep: int, keep_every: int) -> Path:
    """Write checkpoints/step-<state["step"]> and let ``latest`` name it; all ranks must call it. Returns its path.

    Args:
        keep: number of newest checkpoints to leave, 0 = all.
        keep_every: those of a multiple of this many steps stay in any case, 0 = none.
    """
    target = checkpoints / step_name(state["step"])
    write_checkpoint(target, state, engine, ranks)
    if ranks.is_main:
        write_atomically(checkpoints / LATEST, target.name + "\n")
        _remove_old(checkpoints, target.name, keep, keep_every)
    ranks.barrier()
    return target


def write_checkpoint(target: Path, state: dict, engine, ranks) -> None:
    """Write a checkpoint under a temporary name, and rename it when it is whole and on disk; all ranks must call it.

    Args:
        state: JSON-able.

    Raises:
        Stopped: it could not be written; what was there before is intact.
    """
    temporary = target.with_name(f".{target.name}.tmp")
    if ranks.is_main:
        for left in target.parent.glob(".*"):  # by a process that was killed
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    try:
        if ranks.is_main:
            temporary.mkdir(parents=True)
        ranks.barrier()
        engine.save_checkpoint(str(temporary), tag=_ENGINE_TAG, save_latest=False)
        weights = consolidated_weights(engine, ranks.is_main)
        if ranks.is_main:
            save_file(weights, temporary / WEIGHTS, metadata={"format": "pt"})
            (temporary / STATE).write_text(json.dumps(state, indent=1) + "\n")
            # safetensors leaves its file to its owner alone.
            (temporary / WEIGHTS).chmod((temporary / STATE).stat().st_mode)
            _copy_identity(target.parent.parent, temporary)
        seal(temporary, ranks)
        if ranks.is_main:
            if target.exists():  # of a run that was set back to an earlier one
                _remove(target)
            os.replace(temporary, target)
            sync(target.parent)
        ranks.barrier()
    except (OSError, RuntimeError, SafetensorError) as error:  # PyTorch reports a full disk as RuntimeError
        if ranks.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, RuntimeError) and not _NOT_WRITTEN.search(str(error)):
            raise  # a rank that was lost, or a fault of ours
        raise Stopped(
            f"{target} could not be written ({error}): see that {target.parent} is writable and has space. The "
            "checkpoints before it are intact, and the same command goes on from the latest"
        ) from error


def _copy_identity(run: Path, checkpoint: Path) -> None:
    """Put what says what the weights are, and how to read text for them, beside them."""
    for name in (CONFIG, START, GIT):
        shutil.copyfile(run / name, checkpoint / name)
    if (run / TOKENIZER).is_dir():  # of a run on text
        shutil.copytree(run / TOKENIZER, checkpoint / TOKENIZER, copy_function=shutil.copyfile)


def seal(folder: Path, ranks) -> None:
    """Force all files of ``folder`` to disk and write their manifest; all ranks must call it, and share the work."""
    ranks.barrier()  # every rank has written its files
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    own = {}
    for path in files[ranks.rank :: ranks.world_size]:
        sync(path)
        own[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    manifest = {name: entry for share in ranks.gather(own) for name, entry in share.items()}
    if ranks.is_main:
        write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True) + "\n")
        for directory in {path.parent for path in files}:
            sync(directory)


def _remove_old(checkpoints: Path, newest: str, keep: int, keep_every: int) -> None:
    if not keep:
        return
    # Later ones than ``newest`` are of a run that was set back to an earlier checkpoint: they do not count.
    for old in [path for path in _steps(checkpoints) if path.name <= newest][:-keep]:
        if not keep_every or int(old.name.removeprefix("step-")) % keep_every:
            _remove(old)


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint so that a crash leaves no half of it under its name."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.old")
    os.replace(checkpoint, hidden)
    shutil.rmtree(hidden)


def load_checkpoint(checkpoint: Path, engine, ranks, *, reshard_in: Path | None = None) -> None:
    """Put a checkpoint's weights and optimizer state into ``engine``; all ranks must call it.

    Args:
        reshard_in: the checkpoint is of another number of ranks or ZeRO stage: take the way through DeepSpeed's
            universal format, which lies in this folder until it is loaded.
    """
    reshard = reshard_in is not None
    source = reshard_in / f".{checkpoint.name}.universal" if reshard else checkpoint
    if reshard and ranks.is_main:
        with _without_patterns(checkpoint.parent) as checkpoints, _without_patterns(reshard_in) as scratch:
            _convert_to_universal(checkpoints / checkpoint.name, scratch / source.name)
    ranks.barrier()
    groups = [
        {key: value for key, value in group.items() if key != "params"} for group in engine.optimizer.param_groups
    ]
    with _without_patterns(source.parent) as checkpoints, contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints
        path, _ = engine.load_checkpoint(str(checkpoints / source.name), tag=_ENGINE_TAG)
    assert path is not None, f"DeepSpeed found nothing to load in {source}"
    if reshard:
        # At stage 3 DeepSpeed gives every group the first one's weight decay and eps, and all states one and the same
        # step counter, which each of them then counts up; at the others it leaves that on the CPU, where fused AdamW
        # does not take it.
        for group, own in zip(engine.optimizer.param_groups, groups, strict=True):
            group.update(own)
        for parameter, state in engine.optimizer.optimizer.state.items():
            state["step"] = state["step"].to(parameter.device, copy=True)
    ranks.barrier()
    if reshard and ranks.is_main:
        shutil.rmtree(source)


@contextlib.contextmanager
def _without_patterns(folder: Path) -> Iterator[Path]:
    """``folder`` by another name: DeepSpeed looks for files with glob, to which [1] in a path means something else."""
    with tempfile.TemporaryDirectory() as temporary:
        link = Path(temporary) / "checkpoints"
        link.symlink_to(folder.absolute(), target_is_directory=True)
        yield link


def _convert_to_universal(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(source / _ENGINE_TAG), "--output_folder", str(target / _ENGINE_TAG)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Stopped(
            f"{source} could not be converted for another number of ranks or stage: go on with those that wrote it\n"
            f"{done.stderr[-2000:]}"
        )
