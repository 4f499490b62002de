"""Block-sparse attention in PyTorch: the core operation that every sparse method ends in.

Shapes: B batch, T tokens, Hq query heads, H KV heads, G = Hq / H, D head size, N blocks.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from dashattn.documents import per_document
from dashattn.ops.dtypes import upcast
from dashattn.selection import Selection

QUERY_TILE = 256


def query_tiles(length: int) -> Iterator[slice]:
    """Slices of the queries, in turns.

    Memory holds one tile's scores; where attention is causal these end at the tile's last token, so that a row never
    costs its future.
    """
    for start in range(0, length, QUERY_TILE):
        yield slice(start, min(start + QUERY_TILE, length))


def blocks_to_tokens(x: Tensor, block_size: int, length: int) -> Tensor:
    """Repeats every block's entry for each of its tokens: [..., N] -> [..., length]."""
    return x[..., None].expand(*x.shape, block_size).flatten(-2)[..., :length]


def masked_softmax(logits: Tensor, allowed: Tensor) -> Tensor:
    """Softmax over the last dimension where ``allowed``, finite throughout; rows that allow nothing are uniform."""
    return logits.masked_fill(~allowed, torch.finfo(logits.dtype).min).softmax(-1)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection,
    block_bias: Tensor | None = None,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """``softmax(q k^T scale + bias) v`` over the keys of the selected blocks, causal.

    Args:
        q: [B, T, Hq, D].
        k, v: [B, T, H, D].
        selection: blocks per query token and KV head, shared by the G heads of the group. A token with nothing
            selected gives 0.
        block_bias: [B, T, H, N] or [B, T, Hq, N], added to every logit of the block; -inf excludes it.
        scale: default D ** -0.5.
        cu_seqlens: int32 [N + 1]; block indices count from the start of each document.

    Returns:
        [B, T, Hq, D] in q's dtype; computed in float32 (float64 for float64).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    num_kv_heads = k.shape[2]
    size = selection.block_size

    def attend(q_BTHD, k_BSHD, v_BSHD, mask_BTHN, bias_BTHN):
        length = q_BTHD.shape[1]
        q_BHGTD = upcast(q_BTHD).unflatten(2, (num_kv_heads, -1)).permute(0, 2, 3, 1, 4)
        k_BHSD, v_BHSD = (upcast(x).transpose(1, 2) for x in (k_BSHD, v_BSHD))
        position = torch.arange(length, device=q.device)
        outs = []
        for tile in query_tiles(length):
            end = tile.stop
            blocks = -(-end // size)
            allowed = blocks_to_tokens(mask_BTHN[:, tile, :, :blocks], size, end).transpose(1, 2)
            allowed = (allowed & (position[:end] <= position[tile, None]))[:, :, None]  # [B, H, 1, t, S]
            logits = torch.einsum("bhgtd,bhsd->bhgts", q_BHGTD[:, :, :, tile] * scale, k_BHSD[:, :, :end])
            if bias_BTHN is not None:
                bias = upcast(bias_BTHN[:, tile, :, :blocks]).unflatten(2, (num_kv_heads, -1))
                bias = blocks_to_tokens(bias.permute(0, 2, 3, 1, 4), size, end)  # [B, H, G or 1, t, S]
                allowed = allowed & (bias > -torch.inf)
                logits = logits + bias
            out_BHGtD = torch.einsum("bhgts,bhsd->bhgtd", masked_softmax(logits, allowed), v_BHSD[:, :, :end])
            outs.append(out_BHGtD.masked_fill(~allowed.any(-1, keepdim=True), 0).permute(0, 3, 1, 2, 4))
        return torch.cat(outs, dim=1).flatten(2, 3)

    outs = per_document(attend, cu_seqlens, q, k, v, selection.mask(), block_bias)
    return torch.cat(outs, dim=1).to(q.dtype)
