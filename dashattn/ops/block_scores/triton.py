"""Block selection by attention over compressed keys on the GPU (InfLLM v2, NSA), as a PyTorch custom operator.

Shapes: B batch, T tokens, J windows, Hq query heads, H KV heads, D head size, W words of 32 blocks.
"""

import torch
from torch import Tensor

from dashattn.ops.band.triton import flatten_keys
from dashattn.ops.band.triton_forward import Band, forward
from dashattn.ops.block_scores.triton_select import ranks_by_logits, select
from dashattn.ops.operators import operator
from dashattn.ops.tiles import flatten_tokens, geometry
from dashattn.selection import Selection


@operator("select_blocks")
def _select_op(
    q: Tensor, compressed_k: Tensor, lse: Tensor | None, cu_seqlens: Tensor | None, kernel_size: int,
    kernel_stride: int, pooling: str, block_size: int, topk: int, init_blocks: int, local_blocks: int, scale: float,
) -> Tensor:  # fmt: skip
    """Words int32 [B, H, T, W]."""
    geo, band = geometry(q, compressed_k.shape[2], cu_seqlens), Band(kernel_size, kernel_stride)
    q_nHD, k_nHD, starts = flatten_tokens(q), flatten_keys(compressed_k), band.starts(geo)
    if lse is None and not ranks_by_logits(geo, pooling == "max"):
        _, lse = forward(q_nHD, k_nHD, None, starts, geo, band, scale)
    words = select(
        q_nHD, k_nHD, None if lse is None else lse.flatten(0, -2), starts, geo, band, -(-q.shape[1] // block_size),
        block_size, topk, init_blocks, local_blocks, pooling == "max", scale,
    )  # fmt: skip
    return words.unflatten(1, q.shape[:2]).transpose(0, 1).contiguous()


@_select_op.register_fake
def _(q, compressed_k, lse, cu_seqlens, kernel_size, kernel_stride, pooling, block_size, topk, init_blocks,
      local_blocks, scale):  # fmt: skip
    width = -(-q.shape[1] // (32 * block_size))
    return q.new_empty(q.shape[0], compressed_k.shape[2], q.shape[1], width, dtype=torch.int32)


def select_blocks(
    q: Tensor,
    compressed_k: Tensor,
    lse: Tensor | None = None,
    *,
    kernel_size: int,
    kernel_stride: int,
    pooling: str,
    block_size: int,
    topk: int,
    init_blocks: int,
    local_blocks: int,
    scale: float,
    cu_seqlens: Tensor | None,
) -> Selection:
    """``topk_selection`` of the probabilities of q over the compressed keys; no gradient passes.

    Args:
        q: [B, T, Hq, D].
        compressed_k: [B, J, H, D].
        lse: the log-normalisers that ``band.triton.compressed_attention`` returns; None computes them.
    """
    with torch.no_grad():
        words = _select_op(
            q, compressed_k, lse, cu_seqlens, kernel_size, kernel_stride, pooling, block_size, topk, init_blocks,
            local_blocks, scale,
        )  # fmt: skip
    return Selection(words, block_size)
