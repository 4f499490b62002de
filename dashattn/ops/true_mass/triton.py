"""Attention mass of blocks on the GPU, as a PyTorch custom operator.

The mass of a block is the derivative of the softmax's log-normaliser by the block's bias. So the kernel that gives the
gradients of q and of the bias gives masses, too: with no gradient of the output, and -1 for ``delta``, which it
subtracts from that. It multiplies thrice where once would do.

Shapes: B batch, T tokens, n = B T, Hq query heads, H KV heads, D head size, N blocks, W words of 32 blocks.
"""

import torch
from torch import Tensor

from dashattn.ops.block_sparse.schedule import tile_lists
from dashattn.ops.block_sparse.triton import check_backward_room, flatten_words
from dashattn.ops.block_sparse.triton_backward import query_grad, query_grad_options
from dashattn.ops.operators import operator
from dashattn.ops.tiles import flatten_tokens, geometry
from dashattn.selection import Selection


@operator("block_masses")
def _masses_op(
    q: Tensor, k: Tensor, words: Tensor, lse: Tensor, cu_seqlens: Tensor | None, block_size: int, scale: float
) -> Tensor:
    """Float32 [B, T, H, N]."""
    geo, num_blocks = geometry(q, k.shape[2], cu_seqlens), -(-q.shape[1] // block_size)
    check_backward_room(q, geo, block_size, words.shape[-1], 0, geo.kv_heads, num_blocks)
    q_nHD, k_nHD = flatten_tokens(q), flatten_tokens(k)
    options = query_grad_options(geo.padded_dim, block_size, q.itemsize)
    lists = tile_lists(flatten_words(words), geo, block_size, geo.padded_tile_tokens(options["rows"]))
    sums = q.new_zeros(geo.tokens, geo.kv_heads, num_blocks, dtype=torch.float32)
    lse = lse.flatten(0, 1).contiguous()
    query_grad(
        q_nHD, k_nHD, k_nHD, None, torch.zeros_like(q_nHD), lse, torch.full_like(lse, -1.0), lists, geo, block_size,
        scale, sums, options,
    )  # fmt: skip
    return sums.div_(geo.group).view(*q.shape[:2], geo.kv_heads, num_blocks)


@_masses_op.register_fake
def _(q, k, words, lse, cu_seqlens, block_size, scale):
    return q.new_empty(*q.shape[:2], k.shape[2], -(-q.shape[1] // block_size), dtype=torch.float32)


def block_masses(
    q: Tensor,
    k: Tensor,
    selection: Selection,
    lse: Tensor,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """As ``reference.block_masses``; ``lse``: the log-normalisers of that attention, float32 [B, T, Hq], to base 2."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with torch.no_grad():
        return _masses_op(q, k, selection.words, lse, cu_seqlens, selection.block_size, scale)
