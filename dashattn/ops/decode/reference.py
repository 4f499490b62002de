"""Attention and routing of new tokens against a cache, in PyTorch: the definition of decoding.

Shapes: B sequences, T new tokens, S tokens of capacity, Hq query heads, H KV heads, G = Hq / H, D head size,
N = S / block size. ``lengths`` (int32 [B]) counts the tokens before the new ones, so that query t of sequence b stands
at position ``lengths[b] + t``; what the cache holds past it is not read. Shapes never depend on the lengths.
"""

import torch
from torch import Tensor

from dashattn.ops.block_scores.reference import topk_selection
from dashattn.ops.block_sparse.reference import blocks_to_tokens, masked_softmax, query_tiles
from dashattn.ops.compression.reference import attend_windows, visible_windows
from dashattn.ops.dash_routing.reference import select_chunks
from dashattn.ops.dtypes import upcast
from dashattn.ops.gates.reference import gated_sum
from dashattn.selection import Selection

__all__ = ["cached_attention", "cached_dash_routing", "cached_window_routing", "gated_sum", "new_positions"]


def new_positions(lengths: Tensor, num_tokens: int) -> Tensor:
    """Positions of ``num_tokens`` new tokens, int64 [B, T]."""
    return lengths.long()[:, None] + torch.arange(num_tokens, device=lengths.device)


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    selection: Selection | None = None,
    block_bias: Tensor | None = None,
    *,
    window_size: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """``softmax(q k^T scale + bias) v`` over the keys of the selected blocks, or of a sliding window, or over all.

    Args:
        q: [B, T, Hq, D].
        k, v: [B, S, H, D].
        selection: blocks per query and KV head; None: all of them.
        block_bias: [B, T, H or Hq, N], added to every logit of the block; -inf excludes it.
        window_size: last keys that a query reads, its own included; None: no bound.
        scale: default D ** -0.5.

    Returns:
        [B, T, Hq, D] in q's dtype; computed in float32 (float64 for float64).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    capacity, kv_heads = k.shape[1:3]
    positions = new_positions(lengths, q.shape[1])
    key = torch.arange(capacity, device=q.device)
    q_BHGTD = upcast(q).unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4) * scale
    k_BHSD, v_BHSD = (upcast(x).transpose(1, 2) for x in (k, _silence(v, positions[:, -1:] + 1)))
    outs = []
    for tile in query_tiles(q.shape[1]):
        age_BtS = positions[:, tile, None] - key
        allowed = (age_BtS >= 0 if window_size is None else (age_BtS >= 0) & (age_BtS < window_size))[:, None, None]
        if selection is not None:
            mask_BtHN = Selection(selection.words[:, :, tile], selection.block_size).mask()
            chosen = blocks_to_tokens(mask_BtHN, selection.block_size, capacity)
            allowed = allowed & chosen.transpose(1, 2)[:, :, None]  # [B, H, 1, t, S]
        logits = torch.einsum("bhgtd,bhsd->bhgts", q_BHGTD[:, :, :, tile], k_BHSD)
        if block_bias is not None:
            bias = upcast(block_bias[:, tile]).unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)
            bias = blocks_to_tokens(bias, selection.block_size, capacity)  # [B, H, G or 1, t, S]
            allowed = allowed & (bias > -torch.inf)
            logits = logits + bias
        outs.append(torch.einsum("bhgts,bhsd->bthgd", masked_softmax(logits, allowed), v_BHSD))
    return torch.cat(outs, dim=1).flatten(2, 3).to(q.dtype)


def cached_dash_routing(
    q: Tensor, summaries: Tensor, lengths: Tensor, *, chunk_size: int, **options
) -> tuple[Selection, Tensor | None]:
    """``dash_routing`` over the summaries [B, N, H, D] of a cache; ``options`` as there."""
    own_chunk = new_positions(lengths, q.shape[1]) // chunk_size
    mask, bias = select_chunks(q, summaries, own_chunk, summaries.shape[1], **options)
    return Selection.from_mask(mask, chunk_size), bias


def cached_window_routing(
    q: Tensor,
    compressed_k: Tensor,
    compressed_v: Tensor | None,
    lengths: Tensor,
    *,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    scale: float | None = None,
    **options,
) -> tuple[Tensor | None, Selection]:
    """Attention over the compressed keys [B, S / stride, H, D] of a cache, and the blocks its probabilities select.

    ``options`` as in ``topk_selection``; the output is as in ``attend_windows``.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    positions = new_positions(lengths, q.shape[1])
    visible = visible_windows(positions, kernel_size, kernel_stride)
    if compressed_v is not None:
        compressed_v = _silence(compressed_v, visible[:, -1:])
    out, log_p = attend_windows(q, compressed_k, compressed_v, visible, scale)
    selection = topk_selection(
        log_p,
        kernel_size=kernel_size,
        kernel_stride=kernel_stride,
        block_size=block_size,
        positions=positions,
        num_blocks=compressed_k.shape[1] * kernel_stride // block_size,
        **options,
    )
    return out, selection


def _silence(values: Tensor, count: Tensor) -> Tensor:
    """Values [B, S, H, D] with 0 from row ``count`` [B, 1] on: what lies there may be NaN, whatever its weight."""
    row = torch.arange(values.shape[1], device=values.device)
    return values.masked_fill((row >= count)[:, :, None, None], 0)
