"""Weights that a model begins with or is evaluated with: where they are, and whether they fit."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from dashattn.backends import AttentionBackend
from dashattn.fields import user_path
from experiments.files import WEIGHTS, check_exists
from experiments.training.checkpoint import MANIFEST, damage, latest_checkpoint
from models.hf import is_hf_folder, read_tensors, read_weights


def find_weights(source: str | Path) -> Path:
    """The model.safetensors of a run directory (its latest checkpoint), of a checkpoint, or the file itself; a Hugging
    Face folder as it is.

    Raises:
        ValueError: if there are none, or they are damaged.
    """
    source = user_path(source)
    if is_hf_folder(source):
        return source
    if source.is_file():
        if source.name == WEIGHTS and (source.parent / MANIFEST).is_file():
            _check_intact(source.parent, names=(WEIGHTS,))
        return source
    check_exists(
        source, f"give a run directory, a checkpoint (RUN/checkpoints/step-...), a {WEIGHTS} or a Hugging Face folder"
    )
    checkpoints = source / "checkpoints"
    checkpoint = latest_checkpoint(checkpoints) if checkpoints.is_dir() else source
    if checkpoint is None:
        raise _no_weights(source, ["no checkpoint yet"])
    _check_intact(checkpoint)
    return checkpoint / WEIGHTS


def _check_intact(checkpoint: Path, names: Collection[str] | None = None) -> None:
    problems = damage(checkpoint, names=names, with_engine=False)
    if problems:
        raise _no_weights(checkpoint, problems)


def _no_weights(place: Path, problems: Sequence[str]) -> ValueError:
    return ValueError(
        f"no intact weights in {place} ({'; '.join(problems)}): give a run directory with a checkpoint, another "
        f"checkpoint, or a {WEIGHTS}; what was changed on purpose no longer has an entry in {MANIFEST}"
    )


@dataclass(frozen=True)
class Loaded:
    """Names of what differs between a model and the weights that it was given.

    Attributes:
        new_parameters: those of the model that stay as built.
        dropped_parameters: those of the weights that the model has no use for.
    """

    new_parameters: list[str]
    dropped_parameters: list[str]

    @property
    def differs(self) -> bool:
        return bool(self.new_parameters or self.dropped_parameters)

    def __str__(self) -> str:
        """In a line, the layers of a parameter together."""
        lists = {"new": self.new_parameters, "dropped": self.dropped_parameters}
        return "; ".join(f"{what}: {by_layer(names) or 'none'}" for what, names in lists.items())


def load_weights(model: nn.Module, path: Path) -> Loaded:
    """Load what ``find_weights`` found.

    Parameters of an attention backend may differ from what its layer was trained with: they are what one backend has
    and another has not (DashAttention's chunk queries over a dense checkpoint, or the other way in a layer that becomes
    dense). What the layer has no use for is dropped, what it lacks stays as built. Where a name is the same and a shape
    is not, the backends are of two kinds (NSA's variants), and nothing of that layer's is taken over.

    Raises:
        ValueError: for any other difference, naming it.
    """
    weights = read_weights(path, model.config) if path.is_dir() else read_tensors(path)
    own = model.state_dict()
    backends = [f"{name}." for name, module in model.named_modules() if isinstance(module, AttentionBackend)]

    def backend_of(name: str) -> str | None:
        return next((prefix for prefix in backends if name.startswith(prefix)), None)

    unlike = {name for name in weights.keys() & own.keys() if weights[name].shape != own[name].shape}
    replaced = {backend_of(name) for name in unlike} - {None}
    dropped = {name for name in weights if (backend_of(name) and name not in own) or backend_of(name) in replaced}
    weights = {name: tensor for name, tensor in weights.items() if name not in dropped}
    missing = own.keys() - weights.keys()
    problems = [f"the model's {name} is not in the file" for name in sorted(missing) if backend_of(name) is None]
    problems += [f"{name} is not in the model" for name in sorted(weights.keys() - own.keys())]
    problems += [
        f"{name} is {list(weights[name].shape)}, the model's is {list(own[name].shape)}"
        for name in sorted(unlike - dropped)
    ]
    if problems:
        shown = "; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
        raise ValueError(f"{path} does not fit: {shown}. Take the model it was trained with")
    model.load_state_dict(weights, strict=False)
    return Loaded(sorted(missing), sorted(dropped))


def by_layer(names: Iterable[str]) -> str:
    """Each parameter with its layers, in the notation of ``attention.layers``."""
    found: dict[str, list[int]] = {}
    for name in names:
        layer, _, parameter = name.removeprefix("layers.").partition(".")
        found.setdefault(parameter, []).append(int(layer))
    return ", ".join(f"{parameter} of layers {_ranges(sorted(layers))}" for parameter, layers in found.items())


def _ranges(layers: Iterable[int]) -> str:
    ranges: list[list[int]] = []
    for layer in layers:
        if ranges and layer == ranges[-1][1] + 1:
            ranges[-1][1] = layer
        else:
            ranges.append([layer, layer])
    return " ".join(f"{first}-{last}" if first < last else f"{first}" for first, last in ranges)
