"""DeepSpeed: the generated configuration, and what a step asks of the engine.

DeepSpeed is imported inside the functions: its import chooses an accelerator and sets environment variables.
"""

import contextlib
import io
from collections.abc import Callable, Iterator

import torch
import torch.distributed
from torch import Tensor, nn

from data import Batch, BatchStream
from experiments.config import TrainConfig
from experiments.training.optim import LR_FACTOR
from experiments.training.ranks import Ranks
from models import ModelOutput, Transformer
from models.transformer import TransformerBlock

BUCKET = 500_000_000  # elements that are reduced at once, at most, which is DeepSpeed's default


def deepspeed_json(
    config: TrainConfig, *, parameters: int, rows: int, micro_batches: int, universal: bool = False
) -> dict:
    """DeepSpeed's configuration, made from the composed one so that there is no second source of truth.

    Args:
        parameters: number of the model's parameters.
        rows: rows of a micro-batch of one rank.
        micro_batches: micro-batches a step.
        universal: a checkpoint of another number of ranks or stage will be loaded.
    """
    stage, precision = config.deepspeed.stage, config.deepspeed.precision
    # DeepSpeed's default would take gigabytes beside a small model; and it takes even numbers only.
    bucket = min(parameters + parameters % 2, BUCKET)
    result = {
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": micro_batches,
        # At stage 0 ``optimizer_step`` clips, because DeepSpeed would not tell the norm.
        "gradient_clipping": 0.0 if stage == 0 else config.optim.grad_clip,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        "checkpoint": {"load_universal": universal},
    }
    if precision == "bf16":
        # At stage 1 a gradient is added to the float32 sum as soon as it is there, and its 16 bits are freed.
        result["bf16"] = {"enabled": True, "immediate_grad_update": True}
        result["data_types"] = {"grad_accum_dtype": "fp32"}
    elif precision == "fp16":
        result["fp16"] = {"enabled": True}
    return result


def build_engine(model: Transformer, optimizer: torch.optim.Optimizer, json: dict):
    """``model`` and ``optimizer`` under DeepSpeed, which moves them to the device and broadcasts rank 0's weights."""
    import deepspeed
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    if json["zero_optimization"]["stage"] == 3 and model.embedding.weight.requires_grad:
        # Gather and free a layer's weights at once: DeepSpeed's hooks around every small module in it would take the
        # host longer than a short layer takes a GPU. Not where the first layer's input needs no gradient: DeepSpeed
        # then takes the layer's backward pass for done before it has begun.
        deepspeed.utils.set_z3_leaf_modules(model, [TransformerBlock])
    with contextlib.redirect_stdout(io.StringIO()):  # its bf16 optimizer prints how memory grows
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=json, dist_init_required=False)
    if isinstance(engine.optimizer, BF16_Optimizer) and torch.distributed.get_world_size() == 1:
        # The average over one rank would cost five passes over the gradient, and round its float32 sum to 16 bits.
        engine.enable_backward_allreduce = False
    if engine.zero_optimization_stage() == 3:
        # The model itself reads this weight of a submodule. Unless told, DeepSpeed finds out when the weight is first
        # missing, and fails if that is later than in the first steps: after a resume, say.
        head = model.embedding if model.lm_head is None else model.lm_head
        deepspeed.zero.register_external_parameter(engine.module, head.weight)
    return engine


def set_learning_rate(engine, rate: float) -> None:
    """Give every parameter group its share of the coming step's rate."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate * group.get(LR_FACTOR, 1.0)  # a checkpoint of an older version has none


def forward(engine, batch: Batch, device: torch.device, *, return_stats: bool = False) -> ModelOutput:
    """The loss of a batch, with gradients unless torch.no_grad."""
    batch = batch.to(device)
    return engine(
        batch.input_ids,
        labels=batch.labels,
        position_ids=batch.position_ids,
        cu_seqlens=batch.cu_seqlens,
        max_seqlen=batch.max_seqlen,
        return_stats=return_stats,
    )


def to_host(values: Tensor) -> Callable[[], list[float]]:
    """Copy numbers to the host while the device goes on. Returns the function that reads them: it waits for what the
    device was given before this call, but for nothing later."""
    copy = values.to("cpu", non_blocking=True)
    if values.device.type != "cuda":
        return copy.tolist
    copied = torch.cuda.Event()
    copied.record()

    def read() -> list[float]:
        copied.synchronize()
        return copy.tolist()

    return read


def optimizer_step(engine, grad_clip: float) -> Tensor | None:
    """To be called after every backward pass: clip, update and clear the gradients after the step's last one.

    If the gradient is not finite there is no update, only the clearing. To know it the host waits for the gradient, but
    not for the update.

    Returns the global L2 norm of the step's gradient before clipping, on the device; None if there was no update.
    """
    norm, updates = None, engine.is_gradient_accumulation_boundary()
    if updates and engine.zero_optimization_stage() == 0:
        norm = nn.utils.clip_grad_norm_(engine.module.parameters(), grad_clip or float("inf"))
        if not torch.isfinite(norm):  # what DeepSpeed does by itself at the other stages
            norm = None
            for parameter in engine.module.parameters():
                parameter.grad = None
    engine.step()
    if engine.zero_optimization_stage() > 0 and engine.was_step_applied():
        norm = engine.get_global_grad_norm()
    return norm


def gradient_norms(engine) -> dict[str, float]:
    """L2 norms of a step's gradient, before clipping, over all layers: of each vector that the attention backends hold
    themselves (``grad_norm_chunk_query``, say), and of all parameters of theirs, the router (``grad_norm_router``).

    To be called between the step's last backward pass and ``optimizer_step``; all ranks must call it.
    """
    from deepspeed.utils import safe_get_full_grad

    scale = getattr(engine.optimizer, "cur_scale", 1.0)  # of fp16's loss
    squares: dict[str, Tensor] = {}
    for backend in engine.module.backends:
        for name, parameter in backend.named_parameters():
            if not parameter.requires_grad:
                continue
            square = (safe_get_full_grad(parameter).float() / scale).square().sum()
            for key in ("router", *([] if "." in name else [name])):
                squares[key] = squares.get(key, 0) + square
    return {f"grad_norm_{key}": square.sqrt().item() for key, square in squares.items()}


def backend_metrics(engine) -> dict[str, float]:
    """What the attention backends want logged (alpha, say), on average over the layers. All ranks must call it."""
    import deepspeed

    values: dict[str, list[float]] = {}
    for backend in engine.module.backends:
        with deepspeed.zero.GatheredParameters(
            list(backend.parameters()), enabled=engine.zero_optimization_stage() == 3
        ):
            for key, value in backend.metrics().items():
                values.setdefault(key, []).append(value)
    return {key: sum(layers) / len(layers) for key, layers in values.items()}


class DataError(Exception):
    """A source of data failed, on this rank or on another one."""


@torch.no_grad()
def validation_loss(engine, stream: BatchStream, ranks: Ranks) -> float:
    """Mean loss in nats over the targets of the validation split; all ranks must call it.

    Raises:
        DataError: the split cannot be read, on all ranks alike.
    """
    engine.eval()
    total = targets = 0.0
    try:
        for batch in _read_together(stream, ranks):
            count = batch.num_targets
            total += forward(engine, batch, ranks.device).loss.item() * count
            targets += count
    finally:
        engine.train()
    total, targets = ranks.sum(total, targets / ranks.sequence_parallel)  # a rank's loss is its share of the rows'
    return total / targets


def _read_together(stream: BatchStream, ranks: Ranks) -> Iterator[Batch]:
    """A stream's batches, until one of the ranks cannot read its own: the others would wait for it."""
    batch, batches = None, iter(stream)
    while True:
        error = None
        try:
            batch = next(batches, None)
        except Exception as caught:  # whatever its kind: what was learned must be saved
            error = caught
        (failures,) = ranks.sum(error is not None)
        if failures:
            raise DataError(str(error or "on another rank")) from error
        if batch is None:
            return
        yield batch


def consolidated_weights(engine, main: bool) -> dict[str, Tensor]:
    """Full weights and persistent buffers on the CPU, in the dtype the forward pass uses; empty unless ``main``.

    All ranks must call it: at stage 3 each parameter is gathered from all of them, one at a time.
    """
    import deepspeed

    weights = {}
    for name, tensor in engine.module.state_dict(keep_vars=True).items():
        with deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
            if main:
                weights[name] = tensor.detach().to("cpu", copy=True).contiguous()
    return weights
