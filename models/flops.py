"""Parameters and floating-point operations of a model, right for causal and for sparse attention.

One multiply-add counts as two operations. Norms, RoPE, softmax and the embedding lookup are not counted,
nor is recomputation: these are the FLOPs that model FLOPs utilisation (MFU) is defined over.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from dashattn.stats import AttentionStats
from models.config import ModelConfig
from models.transformer import Transformer


def count_parameters(model: nn.Module) -> int:
    """All of them, those of the attention backends included."""
    return sum(parameter.numel() for parameter in model.parameters())


@dataclass(frozen=True)
class FlopsPerToken:
    """Forward operations per token of the whole model by where they are spent, and those of the backward pass."""

    matmul: float  # projections, MLP, output head, and what the backend projects
    attention: float  # q k^T and attention weights times v, over the keys read
    routing: float  # over summaries or compressed keys
    backward: float

    @property
    def forward(self) -> float:
        return self.matmul + self.attention + self.routing

    @property
    def train(self) -> float:
        return self.forward + self.backward


def matmul_parameters(config: ModelConfig) -> int:
    """Weights that multiply every token: all but the norms, the embedding lookup and the backends' own."""
    if config.vocab_size is None:
        raise ValueError("model.vocab_size is null: set it to the vocabulary size of the data's tokenizer")
    heads = 2 * config.num_heads + 2 * config.num_kv_heads  # q and o, k and v
    layer = config.hidden_size * (heads * config.head_dim + 3 * config.intermediate_size)
    return config.num_layers * layer + config.hidden_size * config.vocab_size


def flops_per_token(
    model: Transformer,
    seq_len: int,
    *,
    active_tokens: float | Sequence[float] | None = None,
    routing_reads: float | Sequence[float] = 0.0,
) -> FlopsPerToken:
    """Operations per token, averaged over a sequence of ``seq_len`` tokens.

    Args:
        model: may lie on the meta device.
        active_tokens: keys a token reads per KV head (every query head of the group reads them), averaged over
            tokens and KV heads, of each layer or alike in all; None = dense causal attention, (seq_len + 1) / 2.
        routing_reads: summaries or compressed keys a token scores per KV head, averaged alike. ``layer_reads`` takes
            both from a measured model.
    """
    if active_tokens is None:
        active_tokens = (seq_len + 1) / 2
    count = len(model.backends)
    reads = [[x] * count if isinstance(x, int | float) else x for x in (active_tokens, routing_reads)]
    layers = [backend.flops(*read) for backend, *read in zip(model.backends, *reads, strict=True)]
    matmul = 2 * matmul_parameters(model.config)
    return FlopsPerToken(
        matmul=matmul + sum(layer.projections for layer in layers),
        attention=sum(layer.attention for layer in layers),
        routing=sum(layer.routing for layer in layers),
        backward=2 * matmul + sum(layer.backward for layer in layers),
    )


def layer_reads(stats: Sequence[AttentionStats]) -> tuple[list[float], list[float]]:
    """(active tokens, routing reads) per token and KV head of each layer, from ``ModelOutput.stats``.

    Synchronises with the device.
    """
    active_tokens = [layer.active_tokens.double().mean().item() for layer in stats]
    return active_tokens, [layer.routing_reads.double().mean().item() for layer in stats]
