"""A block's step for a single token on a GPU, in few kernels: those of ``dashattn.ops.matvec`` around the attention.

Nothing is differentiable. Results are those of the modules' own ``forward`` but for rounding: less is rounded between.
Shapes: E hidden size, N outputs.
"""

import torch
from torch import Tensor, nn

from dashattn.backends import ALL_HEADS
from dashattn.implementation import HAS_TRITON
from dashattn.selection import Chosen
from models.modules import RMSNorm
from models.rope import no_rotation


def takes(x_BTE: Tensor) -> bool:
    """Whether the kernels take a block's input: one token in 16 bits on a GPU, without gradients."""
    if torch.is_grad_enabled() or not HAS_TRITON or not x_BTE.is_cuda:
        return False
    return kernels().takes(x_BTE)


def kernels():
    from dashattn.ops.matvec import triton

    return triton


def decode(block: nn.Module, x_11E: Tensor, rope, cache, taken: Chosen | None) -> tuple[Tensor, Chosen | None]:
    """What ``TransformerBlock.forward`` gives with a cache, and what the layer hands on."""
    mlp, pre_norm = block.mlp, not block.post_norm
    norms = [_parts(norm) if pre_norm else None for norm in (block.attention_norm, block.mlp_norm)]
    out, chosen = _attend(block, x_11E, norms[0], rope, cache, taken)
    x_11E = _add(block, x_11E, out, block.attention.o_proj, block.attention_norm)
    out = kernels().swiglu(x_11E, mlp.gate_proj.weight, mlp.up_proj.weight, norms[1])
    return _add(block, x_11E, out, mlp.down_proj, block.mlp_norm), chosen


def logits(hidden_11E: Tensor, head: Tensor, norm: RMSNorm, scale: float) -> Tensor:
    """[1, 1, V] of the output head [V, E] behind the last norm."""
    return kernels().product(hidden_11E, head, _parts(norm), scale=scale)


def _attend(block: nn.Module, x_11E, norm, rope, cache, taken) -> tuple[Tensor, Chosen | None]:
    attention = block.attention
    layers = (attention.q_proj, attention.k_proj, attention.v_proj)
    weights = [layer.weight for layer in layers]
    is_plain = attention.qk_norm == "none" and layers[0].bias is None
    turned_by = rope if is_plain and attention.turns else None
    *qkv, hidden = kernels().heads(x_11E, weights, attention.head_dim, norm, turned_by)
    rope = rope if attention.turns else no_rotation(rope)
    if not is_plain:
        flat = (x.flatten(-2) for x in qkv)
        flat = (x if layer.bias is None else x + layer.bias for x, layer in zip(flat, layers, strict=True))
        qkv = attention.heads(*flat, rope, ALL_HEADS)
    out = attention.backend.decode(*qkv, cache, **attention.options(hidden, rope, taken))
    out_11HD, chosen = out if attention.hands_on else (out, None)
    return out_11HD.flatten(-2), chosen


def _add(block: nn.Module, x_11E: Tensor, out_11N: Tensor, layer: nn.Linear, norm: RMSNorm) -> Tensor:
    """The residual stream with what ``layer`` makes of an output, after its norm where that is behind it."""
    if not block.post_norm:
        return kernels().product(out_11N, layer.weight, onto=x_11E, scale=block.residual_scale)
    return torch.add(x_11E, norm(kernels().product(out_11N, layer.weight)), alpha=block.residual_scale)


def _parts(norm: RMSNorm) -> tuple[Tensor, float]:
    return norm.weight, norm.eps
