"""Weights that a model begins with or is evaluated with: where they are, and whether they fit."""

from pathlib import Path

from safetensors.torch import load_file
from torch import nn

from dashattn.backends import AttentionBackend
from experiments.files import WEIGHTS
from experiments.training.checkpoint import STATE, damage, latest_checkpoint
from models.hf import is_hf_folder, read_weights


def find_weights(source: str | Path) -> Path:
    """The model.safetensors of a run directory (its latest checkpoint), of a checkpoint, or the file itself; a Hugging
    Face folder as it is.

    Raises:
        ValueError: if there are none, or they are damaged.
    """
    source = Path(source).expanduser()
    if source.is_file() or is_hf_folder(source):
        return source
    checkpoints = source / "checkpoints"
    checkpoint = latest_checkpoint(checkpoints) if checkpoints.is_dir() else source
    problems = ["no checkpoint yet"] if checkpoint is None else damage(checkpoint, names=(WEIGHTS, STATE))
    if problems:
        raise ValueError(
            f"no intact weights in {checkpoint or source} ({'; '.join(problems)}): give a run directory with a "
            f"checkpoint, a checkpoint, or a {WEIGHTS}"
        )
    return checkpoint / WEIGHTS


def load_weights(model: nn.Module, path: Path) -> list[str]:
    """Load what ``find_weights`` found; returns the names of the parameters that it lacks and that stay as built.

    Only parameters that belong to an attention backend may be lacking: they are what one backend has and another
    has not (DashAttention's chunk queries over a dense checkpoint). Of a Hugging Face folder they may be too many, too:
    ``check_same_attention`` has asked whether that is meant.

    Raises:
        ValueError: for any other difference, naming it.
    """
    weights = read_weights(path, model.config) if path.is_dir() else load_file(path)
    own = model.state_dict()
    if path.is_dir():
        weights = {name: x for name, x in weights.items() if name in own or ".attention.backend." not in name}
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
