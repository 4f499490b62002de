"""Triton kernel of the selectors that rank by a softmax: top-k and top-p in place of entmax.

Scores are never written. What is kept per (token, query head) are the highest product q . k~ and, as tau, the base-2
logarithm of the sum of exponentials relative to it: log2 p = score_scale log2(e) (q . k~ - peak) - tau. Blocks are
ranked by ``block_scores``' kernel, for which a chunk is a window as long as a block.

Shapes and names as in ``triton_forward``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dashattn.ops.band.triton_forward import Band
from dashattn.ops.block_scores.triton_select import select
from dashattn.ops.block_sparse.triton_forward import NO_PEAK, key_descriptor
from dashattn.ops.dash_routing.triton_entmax import softmax_slope
from dashattn.ops.dash_routing.triton_forward import (
    LAUNCH,
    clamp_forced,
    load_tile,
    products,
    router_constants,
    whole_tiles,
)
from dashattn.ops.instructions import exp2
from dashattn.ops.tiles import Geometry, locate_tile
from dashattn.ops.tuning import launch


@triton.jit(do_not_specialize=["num_slots", "num_documents", "init_chunks", "local_chunks"])
def softmax_kernel(
    q_ptr, summary_desc, peak_ptr, tau_ptr, lse_ptr, documents, summary_starts, score_scale, num_slots, num_documents,
    init_chunks, local_chunks,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_P: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, SQUARE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(0) % KV_HEADS
    slot = num_slots - 1 - tl.program_id(0) // KV_HEADS
    document, start, end, index = locate_tile(documents, slot, num_documents, TOKENS)
    if start + index * TOKENS >= end:
        return
    first_candidate = tl.load(summary_starts + document) + init_chunks
    valid, flat_row, _own, count, q, _alpha, slope, _exponent = load_tile(
        q_ptr, q_ptr, start, end, index, kv_head, score_scale, init_chunks, local_chunks, KV_HEADS, GROUP, GROUP_P,
        TOKENS, BLOCK, HEAD_DIM, DIM, SQUARE,
    )  # fmt: skip
    slope = softmax_slope(slope, score_scale)
    whole = whole_tiles(index, init_chunks, local_chunks, TOKENS, BLOCK, CHUNKS)
    peak = tl.full([TOKENS * GROUP_P], NO_PEAK, tl.float32)
    total = tl.zeros([TOKENS * GROUP_P], tl.float32)
    for chunk in range(0, tl.max(count, 0), CHUNKS):
        x = products(q, summary_desc, kv_head, first_candidate, chunk, whole, count, CHUNKS, DIM, PRECISION)
        higher = tl.maximum(peak, tl.max(x, 1))
        total = total * exp2((peak - higher) * slope) + tl.sum(exp2((x - higher[:, None]) * slope[:, None]), 1)
        peak = higher
    peak = tl.where(count > 0, peak, 0.0)
    tau = tl.where(count > 0, tl.log2(tl.where(count > 0, total, 1.0)), 0.0)
    tl.store(peak_ptr + flat_row, peak, mask=valid)
    tl.store(tau_ptr + flat_row, tau, mask=valid)
    # An infinite normaliser makes every probability of an empty row 0 wherever it is formed again.
    tl.store(lse_ptr + flat_row, tl.where(count > 0, peak * slope + tau, float("inf")), mask=valid)


def route(
    q: Tensor, summaries: Tensor, starts: Tensor, geo: Geometry, chunk_size: int, num_blocks: int, score_scale: float,
    forced: tuple[int, int], selector: str, bound: float, options: dict[str, int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As ``triton_forward.route``, with what was kept of the softmax for peak and tau.

    ``bound``: chunks in all of ``selector`` topk, probability of topp.
    """
    peak, tau, lse = (torch.empty(geo.tokens, geo.heads, dtype=torch.float32, device=q.device) for _ in range(3))
    constants = router_constants(geo, chunk_size, True, q.dtype, options)
    slots = geo.slots(constants["TOKENS"])
    forced = clamp_forced(forced, num_blocks)
    launch(
        softmax_kernel, (slots * geo.kv_heads,),
        q, key_descriptor(summaries, geo, options["chunks"]), peak, tau, lse, geo.documents, starts, score_scale, slots,
        geo.num_documents, *forced, options=LAUNCH, tokens=geo.tokens, **constants,
    )  # fmt: skip
    topk, top_p = (min(int(bound), 4 * num_blocks), None) if selector == "topk" else (0, bound)
    words = select(
        q, summaries, lse, starts, geo, Band(chunk_size, chunk_size), num_blocks, chunk_size, topk, forced[0],
        forced[1] + 1, True, score_scale, top_p,
    )  # fmt: skip
    return words, peak, tau
