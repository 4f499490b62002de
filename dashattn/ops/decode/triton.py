"""Decoding on the GPU: ``reference.py``'s functions with Triton kernels. Nothing here waits for the device.

Shapes: B sequences, T new tokens, S tokens of capacity, Hq query heads, H KV heads, D head size, as in ``reference``.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dashattn.ops.block_sparse.reference import query_tiles
from dashattn.ops.chunk_summary.triton import chunk_summary
from dashattn.ops.dash_routing.triton import check_prior_heads, has_forward_bias, temperature
from dashattn.ops.decode.triton_attention import append, attend
from dashattn.ops.decode.triton_compression import compress_window
from dashattn.ops.decode.triton_routing import NewToken, route
from dashattn.ops.decode.triton_selection import route as route_by_softmax
from dashattn.ops.decode.triton_selection import select
from dashattn.ops.gates.triton import gated_sum
from dashattn.selection import Selection

DENSE_BLOCK = 64  # keys read at a time where there is no selection

__all__ = [
    "NewToken",
    "append",
    "cached_attention",
    "cached_dash_routing",
    "cached_window_routing",
    "chunk_summary",
    "compress_window",
    "gated_sum",
    "route",
    "routed_attention",
]


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
    """As ``reference.cached_attention`` with a finite bias of the group, [B, T, H, N], or none; k and v have the layout
    of ``DecodeCache``."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    words, block_size = None, DENSE_BLOCK
    if selection is not None:
        words, block_size = selection.words.contiguous(), selection.block_size
    bias = None if block_bias is None else block_bias.float().contiguous()
    return attend(q, k, v, lengths, words, bias, block_size, window_size, scale)


def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    summaries: Tensor,
    lengths: Tensor,
    *,
    chunk_size: int,
    scale: float | None = None,
    new: NewToken | None = None,
    router_q: Tensor | None = None,
    **options,
) -> Tensor:
    """``reference.cached_dash_routing`` and ``cached_attention`` in one, for ``prior_heads`` group.

    ``new``: the one token that q is of, where ``append`` has not written it yet. ``router_q``: what the router scores
    in place of q. As in prefill, 16-bit types leave out a tempered prior that is smaller than their rounding.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    outs = []
    routed = _route(q if router_q is None else router_q, summaries, lengths, new, chunk_size=chunk_size, **options)
    for (tile, before), (words, bias) in zip(_tiles(q, lengths), routed, strict=True):
        outs.append(attend(tile, k, v, before, words, bias, chunk_size, None, scale, after_routing=True))
    return _joined(outs, dim=1)


def cached_dash_routing(
    q: Tensor, summaries: Tensor, lengths: Tensor, *, chunk_size: int, prior_heads: str = "group", **options
) -> tuple[Selection, Tensor | None]:
    """As ``reference.cached_dash_routing``, for ``prior_heads`` group; entmax's words are of every query head,
    [B, Hq, T, W]. 16-bit types leave out a tempered prior as ``routed_attention`` does."""
    check_prior_heads(prior_heads)
    words, biases = zip(*_route(q, summaries, lengths, chunk_size=chunk_size, **options), strict=True)
    bias = None if biases[0] is None else _joined(biases, dim=1)
    return Selection(_joined(words, dim=2), chunk_size), bias


def _route(
    q: Tensor,
    summaries: Tensor,
    lengths: Tensor,
    new: NewToken | None = None,
    *,
    chunk_size: int,
    router_scale: float,
    prior: str,
    sigma: float,
    selector: str = "entmax",
    alpha: float | Tensor = 1.5,
    topk: int = 16,
    top_p: float = 0.9,
    init_chunks: int = 0,
    local_chunks: int = 0,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Words and prior of every tile of the queries."""
    heads, head_dim = q.shape[2:]
    if isinstance(alpha, Tensor):
        alpha = alpha.float().expand(heads).contiguous()
    else:
        alpha = None if alpha == 1.5 else q.new_full((heads,), alpha, dtype=torch.float32)
    score_scale = router_scale * head_dim**-0.5
    kind = has_forward_bias(prior, sigma, q.dtype), temperature(prior, sigma), (init_chunks, local_chunks), new
    for tile, before in _tiles(q, lengths):
        if selector == "entmax":
            yield route(tile, summaries, before, alpha, chunk_size, score_scale, *kind)
        else:
            bound = top_p if selector == "topp" else None
            yield route_by_softmax(tile, summaries, before, chunk_size, score_scale, topk, bound, *kind)


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
    """As ``reference.cached_window_routing``; the output in q's dtype."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    sizes = dict(kernel_size=kernel_size, kernel_stride=kernel_stride, block_size=block_size)
    words = [select(tile, compressed_k, before, **sizes, scale=scale, **options) for tile, before in _tiles(q, lengths)]
    selection = Selection(_joined(words, dim=2), block_size)
    if compressed_v is None:
        return None, selection
    windows = (kernel_size, kernel_stride)
    return attend(q, compressed_k, compressed_v, lengths, None, None, DENSE_BLOCK, None, scale, windows), selection


def _joined(tiles: Sequence[Tensor], dim: int) -> Tensor:
    return tiles[0] if len(tiles) == 1 else torch.cat(tiles, dim=dim)


def _tiles(q: Tensor, lengths: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Queries in turns, and what lies before them."""
    for tile in query_tiles(q.shape[1]):
        yield q[:, tile].contiguous(), lengths + tile.start if tile.start else lengths
