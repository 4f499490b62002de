"""HiLS (arXiv 2607.02980): a chosen chunk weighs what the router says, and its keys share that among themselves.

A softmax gives a chunk the weight ``exp(lse)``, where lse is the log-sum-exp of the logits of its keys. With the bias
``s - lse`` it gives the chunk ``exp(s)`` instead, and each of its keys the same share of that as before. So the output
is the mean of attention within each chosen chunk and of attention over the forced ones together, weighted by the
softmax over the chosen chunks' s and the forced ones' lse. Here ``s = score + log(chunk size)``: where the keys of each
chunk are all alike, that is its lse, and the whole is plain block-sparse attention.

The logits of all past chunks are made here, a tile of queries at a time and again in the backward pass, and those of
the chosen ones by the attention. A kernel would do with the chosen ones: forward a sum of exponentials for each chunk,
and backward, of the gradient ds of its score, ``-ds p`` to the logit of every key, p its share of the chunk.

Shapes: B batch, T tokens, t of a tile, Hq query heads, H KV heads, G = Hq / H, D head size, S keys, N chunks.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dashattn.documents import document_positions, per_document
from dashattn.ops.block_sparse.reference import query_tiles
from dashattn.ops.dash_routing.reference import candidate_chunks
from dashattn.ops.dtypes import upcast
from dashattn.selection import Selection


def mass_bias(
    q: Tensor,
    k: Tensor,
    scores: Tensor,
    selection: Selection,
    *,
    init_chunks: int,
    local_chunks: int,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The bias of the selected chunks that are not forced, [B, T, Hq, N] in float32 (float64 for float64); 0 elsewhere.

    Args:
        q: [B, T, Hq, D].
        k: [B, T, H, D].
        scores: [B, T, Hq, N], from ``dash_routing`` with ``prior`` mass.
        selection: of the same call.
        init_chunks, local_chunks: forced chunks.
        scale: of the logits, default D ** -0.5.
        cu_seqlens: int32 [M + 1]; chunks count from the start of each document.
    """
    scale, size = q.shape[-1] ** -0.5 if scale is None else scale, selection.block_size
    own = document_positions(cu_seqlens, *q.shape[:2], q.device) // size
    chosen = _chosen(selection, own, scores.shape[-1], init_chunks, local_chunks)

    def bias(q_BTHD, k_BTHD, scores_BTHN, chosen_BTHN):
        tiles = []
        for tile in query_tiles(q_BTHD.shape[1]):
            keys = (tile.stop - 1) // size * size  # of the complete chunks before the last query's
            inputs = (q_BTHD[:, tile], k_BTHD[:, :keys], scores_BTHN[:, tile], chosen_BTHN[:, tile], size, scale)
            if torch.is_grad_enabled():
                tiles.append(checkpoint(_tile_bias, *inputs, use_reentrant=False, preserve_rng_state=False))
            else:
                tiles.append(_tile_bias(*inputs))
        return torch.cat(tiles, dim=1)

    return torch.cat(per_document(bias, cu_seqlens, q, k, scores, chosen), dim=1)


def cached_mass_bias(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    scores: Tensor,
    selection: Selection,
    *,
    init_chunks: int,
    local_chunks: int,
) -> Tensor:
    """``mass_bias`` of new tokens at ``positions``, int64 [B, T], over the keys [B, S, H, D] of a cache."""
    size, scale = selection.block_size, q.shape[-1] ** -0.5
    chosen = _chosen(selection, positions // size, scores.shape[-1], init_chunks, local_chunks)
    tiles = [
        _tile_bias(q[:, tile], k, scores[:, tile], chosen[:, tile], size, scale) for tile in query_tiles(q.shape[1])
    ]
    return torch.cat(tiles, dim=1)


def _chosen(selection: Selection, own: Tensor, num_chunks: int, init_chunks: int, local_chunks: int) -> Tensor:
    """Bool [B, T, H, N]."""
    candidates_BTN = candidate_chunks(own, num_chunks, init_chunks, local_chunks)
    return selection.mask()[..., :num_chunks] & candidates_BTN[:, :, None]


def _tile_bias(q: Tensor, k: Tensor, scores: Tensor, chosen: Tensor, size: int, scale: float) -> Tensor:
    """[B, t, Hq, N] of keys of whole chunks, the first ones. What is not chosen may be NaN."""
    kv_heads, chunks = k.shape[2], k.shape[1] // size
    q_BHGtD = upcast(q).unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4) * scale
    logits = torch.einsum("bhgtd,bshd->bhgts", q_BHGtD, upcast(k))
    lse_BtHn = logits.unflatten(-1, (chunks, size)).logsumexp(-1).flatten(1, 2).transpose(1, 2)
    lse_BtHN = F.pad(lse_BtHn, (0, scores.shape[-1] - chunks))
    group = q.shape[2] // kv_heads
    return (scores + math.log(size) - lse_BtHN).masked_fill(~chosen.repeat_interleave(group, dim=2), 0)
