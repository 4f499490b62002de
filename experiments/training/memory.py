"""How much memory a run takes on each GPU, counted before anything is built there."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from dashattn.backends import AttentionBackend
from dashattn.fields import user_path
from data import MQARDataConfig, TextTokenizer
from experiments.config import TrainConfig
from experiments.host_memory import share_of_memory
from experiments.schema import DTYPES
from experiments.training.check import accumulation
from experiments.training.engine import BUCKET
from experiments.training.optim import freeze
from experiments.training.ranks import Ranks
from models import Transformer
from models.activations import layer_bytes, loss_bytes
from models.flops import count_parameters
from models.meta import without_memory

GIB = 2**30
LIVE = 1_000_000_000  # elements that DeepSpeed gathers at once, at most
# Of a GPU's memory, what contexts of CUDA and NCCL, cuBLAS's workspaces and fragments leave PyTorch's tensors.
USABLE = 0.93


def vocabulary(config: TrainConfig) -> int:
    """Tokens that the model will know, before any data are prepared: of a tokenizer that is trained, what was asked
    for, which short corpora may not reach.

    Raises:
        ValueError: only the data's tokenizer knows, and it is not at hand.
    """
    data = config.data
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    if isinstance(data, MQARDataConfig):
        return data.num_fillers + data.num_keys + data.num_values
    if data.tokenizer is None:
        return data.vocab_size
    if not user_path(data.tokenizer).exists():
        raise ValueError(f"data.tokenizer={data.tokenizer} is not at hand: set model.vocab_size")
    return TextTokenizer.load(data.tokenizer, data.eos_token, data.bos_token).vocab_size


def check_room(config: TrainConfig, ranks: Ranks) -> None:
    """As ``check_memory`` of this rank's GPU, or of its share of what the machine has free, unless the configuration
    insists. On a CPU attention takes more than is counted.

    Raises:
        ValueError: with what would fit.
    """
    if not config.check_memory:
        return
    if ranks.device.type == "cuda":
        room = torch.cuda.get_device_properties(ranks.device).total_memory
        check_memory(config, ranks.world_size, room)
    else:
        check_memory(config, ranks.world_size, share_of_memory(), "this machine has for it")


def check_memory(config: TrainConfig, ranks: int, room: int, where: str = "a GPU has") -> None:
    """Refuse what takes more than ``room`` bytes, all the memory of a GPU, or what is free ``where`` else.

    Raises:
        ValueError: with what it takes, and a change after which it fits, if there is one.
    """
    try:
        sized = replace(config, model=replace(config.model, vocab_size=vocabulary(config)))
    except ValueError:
        return
    model = meta_model(sized)
    needed = estimate_memory(sized, ranks, model)
    if needed.peak <= room:
        return
    mend = next((" ".join(x) for x, smaller in savings(sized, ranks) if fits(smaller, ranks, room, model)), None)
    raise ValueError(
        f"{where} {room / GIB:.1f} GiB, and this run takes {needed.peak / GIB:.1f} on each of {ranks} ({needed}): "
        + (f"with {mend} it fits" if mend else "take more GPUs, a smaller model or shorter rows")
        + "; check_memory=false tries it all the same"
    )


def fits(config: TrainConfig, ranks: int, room: float, model: Transformer | None = None) -> bool:
    """Whether a run leaves what else takes memory of ``room`` bytes."""
    return estimate_memory(config, ranks, model).peak <= USABLE * room


def savings(config: TrainConfig, ranks: int) -> Iterator[tuple[list[str], TrainConfig]]:
    """Ways to take less memory for the same training, the one that costs least time first: the overrides, and the
    configuration with them."""
    rows, _ = accumulation(config, ranks)
    checkpoints = (config.activation_checkpointing, True)
    for stage in range(config.deepspeed.stage, 4 if ranks > 1 else config.deepspeed.stage + 1):
        for checkpointing in dict.fromkeys(checkpoints):
            for count in (n for n in range(rows, 0, -1) if rows % n == 0):
                compiles = config.compile and stage < 3
                changes = {
                    "deepspeed.stage": (config.deepspeed.stage, stage),
                    "activation_checkpointing": (config.activation_checkpointing, checkpointing),
                    "rows_per_micro_batch": (rows, count),
                    "compile": (config.compile, compiles),
                }
                yield (
                    [f"{key}={str(new).lower()}" for key, (old, new) in changes.items() if old != new],
                    replace(
                        config,
                        deepspeed=replace(config.deepspeed, stage=stage),
                        activation_checkpointing=checkpointing,
                        rows_per_micro_batch=count,
                        compile=compiles,
                    ),
                )


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, where they are most.

    Attributes:
        weights: in the type that the model computes in.
        gradients: their sums, and what is on its way between ranks.
        optimizer: AdamW's moments, and float32 weights.
        activations: what all layers keep, and the one whose backward runs takes.
        logits: of the chunk whose loss is computed, with the output head's gradients.
        lists: of the sparse kernels of one layer, its priors included; they are part of ``activations``.
        peak: of all of them; activations and logits need not be largest at once.
        cache: of one sequence of data.seq_len tokens in generation.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    lists: float
    peak: float
    cache: float

    def __str__(self) -> str:
        names = ("weights", "gradients", "optimizer", "activations", "logits")
        return ", ".join(f"{name} {getattr(self, name) / GIB:.1f}" for name in names)


def meta_model(config: TrainConfig) -> Transformer:
    """The run's model without memory of its own.

    Raises:
        ValueError: the vocabulary is not known, or the backend cannot serve the model.
    """
    with without_memory():
        model = Transformer(config.model, config.attention)
    freeze(model, config.optim)
    return model


def estimate_memory(config: TrainConfig, ranks: int, model: Transformer | None = None) -> Memory:
    """Of a run on ``ranks`` GPUs.

    Args:
        config: as ``training.check.check`` returns it, with the vocabulary's size.
        model: as ``meta_model`` returns it.

    Raises:
        ValueError: the batch does not divide among the ranks.
    """
    model = meta_model(config) if model is None else model
    itemsize = DTYPES[config.deepspeed.precision].itemsize
    weights, gradients, optimizer = _states(config, ranks, model, itemsize)
    rows, _ = accumulation(config, ranks)
    length = config.data.seq_len
    tokens = rows * length // config.sequence_parallel
    layers = [
        layer_bytes(config.model, backend, length, itemsize, compiled=config.compile) for backend in model.backends
    ]
    logits = loss_bytes(config.model, tokens, itemsize, compiled=config.compile)
    hidden = itemsize * config.model.hidden_size * tokens
    table = config.model.vocab_size * config.model.hidden_size * itemsize
    if config.activation_checkpointing:
        kept = tokens * sum(layer.input for layer in layers)
        working = tokens * max(layer.kept + layer.scratch for layer in layers)
    else:
        kept = tokens * sum(layer.kept for layer in layers)
        working = tokens * max(layer.scratch for layer in layers)
    # At the loss everything is kept; in the backward of a layer its own comes on top.
    peak = weights + gradients + optimizer + kept + max(logits, working + hidden + table)
    # A token's keys, values and summaries; a block more or less does not count.
    cache = length * sum(_cached_bytes(backend, itemsize) for backend in model.backends)
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=kept + working,
        logits=logits,
        lists=tokens * max(layer.lists for layer in layers),
        peak=peak,
        cache=cache,
    )


def _cached_bytes(backend: AttentionBackend, itemsize: int) -> float:
    """Of a token in a layer."""
    fields = backend.cache_layout().fields.values()
    return sum(x.heads * x.dim * (max(itemsize, 4) if x.table else itemsize) / x.tokens_per_row for x in fields)


def _states(config: TrainConfig, ranks: int, model: Transformer, itemsize: int) -> tuple[float, float, float]:
    """Weights, gradients and optimizer as DeepSpeed lays them out for ``training.engine``."""
    stage = config.deepspeed.stage
    total = count_parameters(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    shares = ranks if stage > 0 else 1
    weights = itemsize * total
    optimizer = 8 * trained / shares  # Adam's moments
    if itemsize < 4 or stage > 0:
        optimizer += 4 * trained / shares  # float32 weights
    sums = 4 if config.deepspeed.precision != "fp16" else 2
    gradients = sums * trained
    if stage >= 2:
        gradients = sums * trained / ranks + itemsize * min(trained, BUCKET)
    if stage == 3:
        weights = itemsize * (total / ranks + min(total, LIVE))
    return weights, gradients, optimizer
