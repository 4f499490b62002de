"""Parameter groups of AdamW and the learning rate as a pure function of the step."""

import hashlib
import json
import math
from itertools import product

import torch
from torch import nn

from dashattn.backends import AttentionBackend
from experiments.config import OptimConfig

LR_FACTOR = "lr_factor"  # of a parameter group: its learning rate over the schedule's


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Learning rate of optimizer step ``step`` (from 0) of ``steps``.

    A linear warm-up reaches ``lr`` at step ``warmup_steps``. Then ``constant`` stays there, ``cosine`` falls along half
    a cosine, and ``wsd`` stays and falls linearly over the last ``decay_fraction`` of the steps. Both falls end at
    ``min_lr_ratio * lr`` after the last step. Nothing but the step enters, so a resumed run has the same rates.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / (steps - config.warmup_steps)
        height = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        decay_steps = round(config.decay_fraction * steps)
        height = 1.0 if step < steps - decay_steps else (steps - step) / (decay_steps + 1)
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * height)


def freeze(model: nn.Module, config: OptimConfig) -> None:
    """Let only those parameters be trained that ``train_only`` names."""
    if config.train_only is None:
        return
    routers = {p for m in model.modules() if isinstance(m, AttentionBackend) for p in m.parameters()}
    for parameter in set(model.parameters()) - routers:
        parameter.requires_grad_(False)


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict]:
    """Weight decay for the matrices of linear layers; none for embeddings, norms, biases and routing vectors.

    A matrix that a linear layer shares with an embedding (tied embeddings) counts as an embedding. Routing vectors
    are the parameters an attention backend holds itself, outside linear layers. ``backend_lr`` gives all parameters of
    the backends groups of their own.
    """
    modules = list(model.modules())
    embeddings = {m.weight for m in modules if isinstance(m, nn.Embedding)}
    matrices = {m.weight for m in modules if isinstance(m, nn.Linear)} - embeddings
    backends = [m for m in modules if isinstance(m, AttentionBackend)]
    routing = {p for backend in backends for p in backend.parameters(recurse=False)}
    owned = {p for backend in backends for p in backend.parameters()}
    routing_eps = config.eps if config.routing_eps is None else config.routing_eps
    factor = 1.0 if config.backend_lr is None else config.backend_lr / config.lr

    parameters = [p for p in model.parameters() if p.requires_grad]
    kinds = [
        (matrices, {"weight_decay": config.weight_decay}),
        (set(parameters) - matrices - routing, {"weight_decay": 0.0}),
        (routing, {"weight_decay": 0.0, "eps": routing_eps}),
    ]
    factors = [(set(parameters) - owned, 1.0), (owned, factor)] if factor != 1.0 else [(set(parameters), 1.0)]
    # DeepSpeed lays a group's parameters end to end. Those of an odd size come last, the least even ones at the end:
    # behind them the others would lie at addresses that compiled kernels, which read 16 bytes at a time, cannot read.
    parameters.sort(key=lambda p: -_evenness(p))
    groups = [
        {"params": [p for p in parameters if p in kind & part], LR_FACTOR: scale, **options}
        for (kind, options), (part, scale) in product(kinds, factors)
    ]
    return [group for group in groups if group["params"]]


def _evenness(parameter: nn.Parameter) -> int:
    """The largest power of two that divides its size, up to the 8 numbers of 16 bytes."""
    return math.gcd(parameter.numel(), 8)


def parameter_order(model: nn.Module, config: OptimConfig) -> str:
    """What tells the order of the parameters in the optimizer, for a checkpoint's state. To be asked before DeepSpeed
    has the model: at stage 3 it takes the parameters' sizes away."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    ordered = [[names[p] for p in group["params"]] for group in parameter_groups(model, config)]
    return hashlib.sha256(json.dumps(ordered).encode()).hexdigest()[:16]


def check_order(model: nn.Module, own: str, saved: str | None) -> None:
    """Refuses a checkpoint whose optimizer state lies in another order than this version's.

    Args:
        own: the model's ``parameter_order``.
        saved: the checkpoint's; None in older versions, which took the parameters as the model names them.

    Raises:
        ValueError: with the mend.
    """
    is_plain = all(_evenness(p) == 8 for p in model.parameters() if p.requires_grad)
    if saved == own or (saved is None and is_plain):
        return
    raise ValueError(
        "the checkpoint is of a version that laid the parameters in another order, and its optimizer state would go to "
        "the wrong ones: start a new run from its weights, init_from=RUN"
    )


def build_optimizer(model: nn.Module, config: OptimConfig, device: torch.device) -> torch.optim.AdamW:
    """PyTorch's AdamW: DeepSpeed's own would be compiled on first use."""
    return torch.optim.AdamW(
        parameter_groups(model, config),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=device.type == "cuda",
    )
