"""Sliding-window attention. Shapes: B batch, T tokens, Hq query heads, H KV heads, D head size."""

import torch
from torch import Tensor

from dashattn.documents import per_document
from dashattn.ops.block_sparse.reference import masked_softmax, query_tiles
from dashattn.ops.dtypes import upcast


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window_size: int, scale: float, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Causal softmax attention over the last ``window_size`` tokens, the query's own included.

    Args:
        q: [B, T, Hq, D].
        k, v: [B, T, H, D].

    Returns:
        [B, T, Hq, D] in q's dtype; computed in float32 (float64 for float64).
    """

    def attend(q_BTHD, k_BSHD, v_BSHD):
        length = q_BTHD.shape[1]
        q_BTHGD = upcast(q_BTHD).unflatten(2, (k_BSHD.shape[2], -1)) * scale
        k_BSHD, v_BSHD = upcast(k_BSHD), upcast(v_BSHD)
        position = torch.arange(length, device=q.device)
        outs = []
        for tile in query_tiles(length):
            first, end = max(0, tile.start - window_size + 1), tile.stop
            age = position[tile, None] - position[first:end]
            logits = torch.einsum("bthgd,bshd->bhgts", q_BTHGD[:, tile], k_BSHD[:, first:end])
            p = masked_softmax(logits, (age >= 0) & (age < window_size))
            outs.append(torch.einsum("bhgts,bshd->bthgd", p, v_BSHD[:, first:end]))
        return torch.cat(outs, dim=1).flatten(2, 3)

    return torch.cat(per_document(attend, cu_seqlens, q, k, v), dim=1).to(q.dtype)
