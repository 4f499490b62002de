"""Chunk summaries of DashAttention (arXiv 2605.18753): attention pooling of each chunk's keys by one learned query.

Shapes: B batch, T tokens, H KV heads, D head size, C chunk size, N complete chunks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dashattn.documents import per_document
from dashattn.ops.dtypes import upcast
from dashattn.rope import rotate_half


def chunk_summary(
    k: Tensor,
    chunk_query: Tensor,
    *,
    chunk_size: int,
    cu_seqlens: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """``sum_t a_t k_t`` with ``a = softmax_t(r . k_t / sqrt(D))`` over the tokens of each complete chunk.

    Args:
        k: keys after RoPE [B, T, H, D].
        chunk_query: r [H, D]; zeros give mean pooling.
        chunk_size: C; incomplete chunks have no summary.
        cu_seqlens: int32 [N + 1]; the complete chunks of the documents then follow one another.
        rope: (cos, sin), each [T, D] or [B, T, D]: r is rotated at every position of the chunk and averaged
            (``summary_rope: mean``), which makes the summary invariant to translation.

    Returns:
        [B, T // C, H, D] in k's dtype; computed in float32 (float64 for float64). With ``cu_seqlens`` the rows
        past the last complete chunk are zero.
    """
    if rope is not None:
        rope = tuple(table.expand(k.shape[0], -1, -1) for table in rope)

    def summarise(k_BTHD, cos_BTD=None, sin_BTD=None):
        num_chunks = k_BTHD.shape[1] // chunk_size
        complete = num_chunks * chunk_size
        k_BNCHD = upcast(k_BTHD[:, :complete]).unflatten(1, (num_chunks, chunk_size))
        query_HD = upcast(chunk_query)
        if cos_BTD is not None:
            cos, sin = (upcast(t[:, :complete]).unflatten(1, (num_chunks, chunk_size)) for t in (cos_BTD, sin_BTD))
            cos_BNHD, sin_BNHD = cos.mean(2)[:, :, None], sin.mean(2)[:, :, None]
            query = (query_HD * cos_BNHD + rotate_half(query_HD) * sin_BNHD)[:, :, None]
        else:
            query = query_HD
        scores_BNCH = (k_BNCHD * query).sum(-1) * k_BTHD.shape[-1] ** -0.5
        return torch.einsum("bnch,bnchd->bnhd", scores_BNCH.softmax(2), k_BNCHD)

    summaries = torch.cat(per_document(summarise, cu_seqlens, k, *(rope or (None, None))), dim=1)
    # Rounding here is part of the definition: the kernels feed these summaries to tensor cores in k's dtype.
    return F.pad(summaries, (0, 0, 0, 0, 0, k.shape[1] // chunk_size - summaries.shape[1])).to(k.dtype)
