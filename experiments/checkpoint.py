"""Checkpoints of a run: complete or absent, never half.

checkpoints/step-00000100/deepspeed/          DeepSpeed's state: weights, master weights, optimizer
checkpoints/step-00000100/model.safetensors   consolidated weights, for evaluation and init_from
checkpoints/step-00000100/state.json          step, tokens, data position of every rank, hash of the configuration
checkpoints/latest                            name of the newest complete checkpoint
"""

import contextlib
import io
import json
import os
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import nn

from dashattn.backends import AttentionBackend
from experiments.files import write_atomically
from models.hf import is_hf_folder, read_weights

WEIGHTS = "model.safetensors"
STATE = "state.json"
LATEST = "latest"
_ENGINE_TAG = "deepspeed"


def latest_checkpoint(checkpoints: Path) -> Path | None:
    """The checkpoint that `latest` names, without one the newest; None if there is none yet."""
    pointer = checkpoints / LATEST
    if not pointer.exists():
        # A run that stopped before it wrote the pointer; what bears a step's name was complete when it was renamed.
        return max(checkpoints.glob("step-*"), default=None)
    path = checkpoints / pointer.read_text().strip()
    if not (path / STATE).exists():
        raise ValueError(
            f"{pointer} names {path.name}, which is not a complete checkpoint: "
            "write the name of a complete one into it, or remove it to go on from the newest"
        )
    return path


def read_state(checkpoint: Path) -> dict:
    """What state.json holds. Raises ValueError if it is damaged."""
    try:
        return json.loads((checkpoint / STATE).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{checkpoint / STATE} is damaged ({error}): "
            f"write the name of another checkpoint into {checkpoint.parent / LATEST}"
        ) from None


def save_checkpoint(checkpoints: Path, state: dict, engine, ranks, *, keep: int) -> Path:
    """Write checkpoints/step-<state["step"]>; all ranks must call it. Returns the checkpoint's path.

    Everything goes into a temporary directory that is renamed when complete; then `latest` is replaced.

    Args:
        state: JSON-able; "step" names the checkpoint.
        keep: number of newest checkpoints to leave, 0 = all.
    """
    from experiments.engine import consolidated_weights

    name = f"step-{state['step']:08d}"
    target, temporary = checkpoints / name, checkpoints / f".{name}.tmp"
    if ranks.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    ranks.barrier()
    engine.save_checkpoint(str(temporary), tag=_ENGINE_TAG, save_latest=False)
    weights = consolidated_weights(engine, ranks.is_main)
    if ranks.is_main:
        save_file(weights, temporary / WEIGHTS, metadata={"format": "pt"})
        write_atomically(temporary / STATE, json.dumps(state, indent=1) + "\n")
        shutil.rmtree(target, ignore_errors=True)  # left by a run that stopped before it moved `latest`
        os.replace(temporary, target)
        write_atomically(checkpoints / LATEST, name + "\n")
        _remove_old(checkpoints, name, keep)
    ranks.barrier()
    return target


def _remove_old(checkpoints: Path, newest: str, keep: int) -> None:
    if keep:
        # Later ones than `newest` are of a run that was set back to an earlier checkpoint: they do not count.
        for old in sorted(path for path in checkpoints.glob("step-*") if path.name <= newest)[:-keep]:
            shutil.rmtree(old)


def load_checkpoint(checkpoint: Path, engine) -> None:
    """Put a checkpoint's weights and optimizer state into `engine`; all ranks must call it."""
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed's bf16 optimizer prints
        path, _ = engine.load_checkpoint(str(checkpoint), tag=_ENGINE_TAG)
    assert path is not None, f"DeepSpeed found nothing to load in {checkpoint}"


def find_weights(source: str | Path) -> Path:
    """The model.safetensors of a run directory (its latest checkpoint), of a checkpoint, or the file itself; a Hugging
    Face folder as it is.

    Raises:
        ValueError: if there is none.
    """
    source = Path(source).expanduser()
    if source.is_file() or is_hf_folder(source):
        return source
    if (source / WEIGHTS).exists():
        return source / WEIGHTS
    checkpoint = latest_checkpoint(source / "checkpoints")
    if checkpoint is not None:
        return checkpoint / WEIGHTS
    raise ValueError(f"no weights in {source}: give a run directory with a checkpoint, a checkpoint, or a {WEIGHTS}")


def load_weights(model: nn.Module, path: Path) -> list[str]:
    """Load what `find_weights` found; returns the names of the parameters that it lacks and that stay as built.

    Only parameters that belong to an attention backend may be lacking: they are what one backend has and another
    has not (DashAttention's chunk queries over a dense checkpoint).

    Raises:
        ValueError: for any other difference, naming it.
    """
    weights = read_weights(path, model.config) if path.is_dir() else load_file(path)
    own = model.state_dict()
    missing = own.keys() - weights.keys()
    foreign = missing - _backend_state(model)
    problems = [f"the model's {name} is not in the file" for name in sorted(foreign)]
    problems += [f"{name} is not in the model" for name in sorted(weights.keys() - own.keys())]
    problems += [
        f"{name} is {list(weights[name].shape)}, the model's is {list(own[name].shape)}"
        for name in sorted(weights.keys() & own.keys())
        if weights[name].shape != own[name].shape
    ]
    if problems:
        shown = "; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
        raise ValueError(f"{path} does not fit: {shown}. Take the model (and attention) it was trained with")
    model.load_state_dict(weights, strict=False)
    return sorted(missing)


def _backend_state(model: nn.Module) -> set[str]:
    """Names of the parameters and buffers that attention backends own."""
    return {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if isinstance(module, AttentionBackend)
        for name in module.state_dict()
    }
