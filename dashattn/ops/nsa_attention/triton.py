"""NSA without gradients in one PyTorch operator, whose branches add up in the output: one at most is kept beside it.

Shapes: B batch, T tokens, J windows, Hq query heads, H KV heads, D head size, W words of 32 blocks; flat tensors
[B * T, ...] have the suffix ``_n``.
"""

import torch
from torch import Tensor

from dashattn.ops.band.triton import flatten_keys
from dashattn.ops.band.triton_forward import Band, forward
from dashattn.ops.block_scores.triton_select import select
from dashattn.ops.block_sparse.triton import attend, check_forward_room, check_kernels_fit
from dashattn.ops.gates.share import Share
from dashattn.ops.operators import operator
from dashattn.ops.tiles import flatten_tokens, geometry
from dashattn.selection import Selection


@operator("nsa_forward")
def _forward_op(
    q: Tensor, k: Tensor, v: Tensor, compressed_k: Tensor, compressed_v: Tensor, gates: Tensor, k_window: Tensor | None,
    v_window: Tensor | None, cu_seqlens: Tensor | None, kernel_size: int, kernel_stride: int, pooling: str,
    block_size: int, topk: int, init_blocks: int, local_blocks: int, window_size: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output [B, T, Hq, D] and selection words int32 [B, H, T, W]. Without a window branch its keys are None."""
    geo, windows = geometry(q, k.shape[2], cu_seqlens), Band(kernel_size, kernel_stride)
    num_blocks = -(-q.shape[1] // block_size)
    check_forward_room(q, geo, block_size, -(-num_blocks // 32), 0, False)
    q_n, k_n, v_n, gates_n = (flatten_tokens(x) for x in (q, k, v, gates))
    compressed = [flatten_keys(x) for x in (compressed_k, compressed_v)]
    starts = windows.starts(geo)
    out = torch.empty_like(q_n)
    _, lse = forward(q_n, *compressed, starts, geo, windows, scale, Share(gates_n, 0, out))
    words = select(
        q_n, compressed[0], lse, starts, geo, windows, num_blocks, block_size, topk, init_blocks, local_blocks,
        pooling == "max", scale,
    )  # fmt: skip
    attend(q_n, k_n, v_n, words, None, geo, block_size, scale, Share(gates_n, 1, out))
    if k_window is not None:
        band = Band(1, 1, window_size)
        keys = (flatten_keys(x) for x in (k_window, v_window))
        forward(q_n, *keys, band.starts(geo), geo, band, scale, Share(gates_n, 2, out))
    return out.view(q.shape), words.unflatten(1, q.shape[:2]).transpose(0, 1).contiguous()


@_forward_op.register_fake
def _(q, k, v, compressed_k, compressed_v, gates, k_window, v_window, cu_seqlens, kernel_size, kernel_stride, pooling,
      block_size, topk, init_blocks, local_blocks, window_size, scale):  # fmt: skip
    width = -(-q.shape[1] // (32 * block_size))
    return q.new_empty(q.shape), q.new_empty(q.shape[0], k.shape[2], q.shape[1], width, dtype=torch.int32)


def nsa_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    compressed_k: Tensor,
    compressed_v: Tensor,
    gates: Tensor,
    k_window: Tensor | None,
    v_window: Tensor | None,
    *,
    block_size: int,
    window_size: int,
    cu_seqlens: Tensor | None,
    **options,
) -> tuple[Tensor, Selection]:
    """``functional.nsa_attention`` and its selection, without gradients; sums are rounded after each branch.

    ``options``: kernel_size, kernel_stride, pooling, topk, init_blocks, local_blocks and scale.
    """
    check_kernels_fit(q, block_size)
    tensors = (q, k, v, compressed_k, compressed_v, gates, k_window, v_window)
    out, words = _forward_op(*tensors, cu_seqlens, block_size=block_size, window_size=window_size, **options)
    return out, Selection(words, block_size)
