"""Triton kernels of the router's backward: from the gradient of the bias to queries, chunk summaries and alpha.

Per (token, KV head) and chunk: b = gradient of the bias; raw prior: dL = b; tempered: dL = (b - mean of b over the
selected candidates) / sigma. With p the entmax probabilities, P their sum over the group and u = p ** (2 - alpha):
g = dL / P;  ds = u (g - sum(u g) / sum(u));  dq = score_scale sum_c ds k~;  dk~ = score_scale sum_i ds q.
With softmax u = p on all candidates, selected or not.

u / P is formed from z = p ** (alpha - 1) (``share_of_group``): near the edge of the support p underflows long before
z does. 1 / sigma is left to the very end, or half precision would lose ds.

Shapes as in ``triton_forward``: dq like q; row_mean and, before its sum over tokens, dalpha float32 [n, Hq]; bias_mean
float32 [n, H]; partial float32 [splits, n', H, D]; lists as in ``schedule.TileLists``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dashattn.ops.block_sparse.schedule import TileLists
from dashattn.ops.dash_routing.triton_entmax import (
    above_threshold,
    entropy_gap,
    fold,
    power,
    share_of_group,
    share_of_logs,
    softmax_slope,
    spread,
)
from dashattn.ops.dash_routing.triton_forward import LAUNCH, clamp_forced, load_tile, router_constants
from dashattn.ops.instructions import exp2, saturated
from dashattn.ops.tiles import Geometry, locate_tile, query_splits
from dashattn.ops.tuning import around, launch


@triton.jit
def _products(q, summaries_ptr, kv_head, first_summary, chunk, stop, peak, KV_HEADS: tl.constexpr,
              HEAD_DIM: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Summaries of the chunks of these numbers, and q . k~ - peak; -inf where they are not below ``stop``."""
    dim = tl.arange(0, DIM)
    offset = ((first_summary + chunk).to(tl.int64)[:, None] * KV_HEADS + kv_head) * HEAD_DIM + dim[None, :]
    in_stop = chunk < tl.max(stop, 0)
    k = tl.load(summaries_ptr + offset, mask=in_stop[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
    x = tl.dot(q, k.T, input_precision=PRECISION)
    return k, tl.where(chunk[None, :] < stop[:, None], x, float("-inf")) - peak[:, None]


@triton.jit
def _add_products(acc, ds, x):
    if x.dtype == tl.bfloat16:
        return tl.dot(ds.to(tl.bfloat16), x, acc)
    else:  # ds can leave float16's range
        return tl.dot(ds, x.to(tl.float32), acc, input_precision="tf32x3")


@triton.jit
def _listed_chunks(q, summaries_ptr, block_list, choice_list, bias_row, entry, num_blocks, kv_head, first_summary,
                   stop, token_stop, peak, tau, slope, exponent, KV_HEADS: tl.constexpr, TOKENS: tl.constexpr,
                   GROUP_P: tl.constexpr, CHUNKS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
                   SQUARE: tl.constexpr, SOFTMAX: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """CHUNKS entries of the tile's list: their summaries, z, u, u / P, and of each token what is selected and b."""
    place = entry + tl.arange(0, CHUNKS)
    chunk = tl.load(block_list + place, mask=place < num_blocks, other=2147483647)
    choice = tl.load(choice_list + place, mask=place < num_blocks, other=0)
    token = tl.arange(0, TOKENS)[:, None]
    word = choice.to(tl.int32)[None, :]
    if TOKENS > 32:  # shifts of 64 bits are made of several of 32
        word = tl.where(token < 32, word, (choice >> 32).to(tl.int32)[None, :])
    selected = ((word >> (token % 32)) & 1) != 0
    selected &= chunk[None, :] < token_stop[:, None]
    k, x = _products(q, summaries_ptr, kv_head, first_summary, chunk, stop, peak, KV_HEADS, HEAD_DIM, DIM, PRECISION)
    if SOFTMAX:
        log2_p = x * slope[:, None] - tau[:, None]
        z = exp2(log2_p)
        u = z
        share = share_of_logs(log2_p, selected, TOKENS, GROUP_P, CHUNKS, 1)
    else:
        z = above_threshold(x, slope, tau)
        _, u = power(z, exponent, SQUARE)
        share = share_of_group(z, exponent, selected, TOKENS, GROUP_P, CHUNKS, 1, SQUARE)
    b = tl.load(bias_row[:, None] + chunk[None, :], mask=selected, other=0.0)
    return k, z, u, share, selected, b


@triton.jit(do_not_specialize=["num_slots", "num_documents", "num_blocks", "list_width", "init_chunks", "local_chunks"])
def query_kernel(
    q_ptr, summaries_ptr, alpha_ptr, peak_ptr, tau_ptr, bias_grad_ptr, dq_ptr, row_mean_ptr, bias_mean_ptr, dalpha_ptr,
    documents, summary_starts, blocks, choices, counts, score_scale, inverse_sigma, num_slots, num_documents,
    num_blocks, list_width, init_chunks, local_chunks,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_P: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, SQUARE: tl.constexpr, TEMPERED: tl.constexpr,
    ALPHA_GRAD: tl.constexpr, SOFTMAX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the router's part to dq. Keeps sum(u g) / sum(u) and the mean of b, for the kernel of the summaries.

    Visits only the candidates that some token of the tile selected; of a softmax all of them, once more.
    """
    kv_head = tl.program_id(0) % KV_HEADS
    slot = num_slots - 1 - tl.program_id(0) // KV_HEADS
    document, start, end, index = locate_tile(documents, slot, num_documents, TOKENS)
    if start + index * TOKENS >= end:
        return
    first_summary = tl.load(summary_starts + document)
    ROWS: tl.constexpr = TOKENS * GROUP_P
    valid, flat_row, own, count, q, alpha, slope, exponent = load_tile(
        q_ptr, alpha_ptr, start, end, index, kv_head, score_scale, init_chunks, local_chunks, KV_HEADS, GROUP, GROUP_P,
        TOKENS, BLOCK, HEAD_DIM, DIM, SQUARE,
    )  # fmt: skip
    if SOFTMAX:
        slope = softmax_slope(slope, score_scale)
    stop = init_chunks + count
    peak = tl.load(peak_ptr + flat_row, mask=valid, other=0.0)
    tau = tl.load(tau_ptr + flat_row, mask=valid, other=0.0)
    tile_token = start + index * TOKENS + tl.arange(0, TOKENS)
    bias_row = bias_grad_ptr + (tile_token.to(tl.int64) * KV_HEADS + kv_head) * num_blocks
    in_document = tile_token < end
    token_stop = tl.where(in_document, (index * TOKENS + tl.arange(0, TOKENS)) // BLOCK - local_chunks, 0)
    list_row = kv_head.to(tl.int64) * num_slots + slot
    block_list = blocks + list_row * list_width
    choice_list = choices + list_row * list_width
    # The forced chunks stand at both ends of the list: the last token chose all of them.
    entries = tl.load(counts + list_row * 2 + 1) - (tl.max(own, 0) + 1 - tl.max(stop, 0))

    # One pass gives all sums of both terms of dL = b - mean(b); the mean itself is known after it.
    token_zero = tl.zeros([TOKENS, 8], tl.float32)
    zero = tl.zeros([ROWS, 8], tl.float32)
    b_sum = token_zero
    b_count = token_zero
    u_sum = zero
    ub_sum = zero
    u_share = zero
    u_gap = zero
    ub_gap = zero
    share_gap = zero
    for entry in range(init_chunks, entries, CHUNKS):
        _k, z, u, share, selected, b = _listed_chunks(
            q, summaries_ptr, block_list, choice_list, bias_row, entry, entries, kv_head, first_summary, stop,
            token_stop, peak, tau, slope, exponent, KV_HEADS, TOKENS, GROUP_P, CHUNKS, HEAD_DIM, DIM, SQUARE, SOFTMAX,
            PRECISION,
        )  # fmt: skip
        b_sum += fold(b)
        b_count += fold(tl.where(selected, 1.0, 0.0))
        b_share = share * spread(b, share, TOKENS, GROUP_P, CHUNKS, 1)
        u_sum += fold(u)
        ub_sum += fold(b_share)
        u_share += fold(share)
        if ALPHA_GRAD:
            gap = entropy_gap(z)
            u_gap += fold(u * gap)
            ub_gap += fold(b_share * gap)
            share_gap += fold(share * gap)
    mean = tl.zeros([TOKENS], tl.float32)
    if TEMPERED:
        mean = tl.sum(b_sum, 1) / tl.maximum(tl.sum(b_count, 1), 1.0)
    mean_row = tl.reshape(tl.broadcast_to(mean[:, None], (TOKENS, GROUP_P)), (ROWS,))
    u_total = tl.sum(u_sum, 1)
    if SOFTMAX:
        u_total = tl.full([ROWS], 1.0, tl.float32)
    row_mean = (tl.sum(ub_sum, 1) - mean_row * tl.sum(u_share, 1)) / tl.where(u_total > 0, u_total, 1.0)
    tl.store(row_mean_ptr + flat_row, row_mean, mask=valid)
    tl.store(bias_mean_ptr + tile_token.to(tl.int64) * KV_HEADS + kv_head, mean, mask=in_document)
    if ALPHA_GRAD:
        # Correia et al. 2019 (arXiv 1909.00015), equation 8, summed against g, in the form of ``entmax/reference.py``.
        ug_gap = tl.sum(ub_gap, 1) - mean_row * tl.sum(share_gap, 1)
        dalpha = (row_mean * tl.sum(u_gap, 1) - ug_gap) / ((alpha - 1.0) * (alpha - 1.0))
        tl.store(dalpha_ptr + flat_row, dalpha * inverse_sigma, mask=valid)

    acc = tl.zeros([ROWS, DIM], tl.float32)
    for entry in range(init_chunks, entries, CHUNKS):
        k, _z, u, share, selected, b = _listed_chunks(
            q, summaries_ptr, block_list, choice_list, bias_row, entry, entries, kv_head, first_summary, stop,
            token_stop, peak, tau, slope, exponent, KV_HEADS, TOKENS, GROUP_P, CHUNKS, HEAD_DIM, DIM, SQUARE, SOFTMAX,
            PRECISION,
        )  # fmt: skip
        ds = share * spread(b - mean[:, None], share, TOKENS, GROUP_P, CHUNKS, 1)
        if not SOFTMAX:
            ds -= u * row_mean[:, None]
        acc = _add_products(acc, ds, k)
    if SOFTMAX:
        for chunk in range(init_chunks, tl.max(stop, 0), CHUNKS):
            k, x = _products(
                q, summaries_ptr, kv_head, first_summary, chunk + tl.arange(0, CHUNKS), stop, peak, KV_HEADS, HEAD_DIM,
                DIM, PRECISION,
            )  # fmt: skip
            acc = _add_products(acc, exp2(x * slope[:, None] - tau[:, None]) * -row_mean[:, None], k)
    dim = tl.arange(0, DIM)
    in_tile = valid[:, None] & (dim < HEAD_DIM)[None, :]
    offset = flat_row[:, None] * HEAD_DIM + dim[None, :]
    dq = tl.load(dq_ptr + offset, mask=in_tile, other=0.0).to(tl.float32) + acc * (score_scale * inverse_sigma)
    tl.store(dq_ptr + offset, dq.to(dq_ptr.dtype.element_ty), mask=in_tile)


@triton.jit(
    do_not_specialize=[
        "num_tokens", "num_words", "num_summaries", "num_documents", "num_blocks", "splits", "init_chunks",
        "local_chunks",
    ]
)  # fmt: skip
def summary_kernel(
    q_ptr, summaries_ptr, alpha_ptr, peak_ptr, tau_ptr, bias_grad_ptr, row_mean_ptr, bias_mean_ptr, partial_ptr,
    words, documents, summary_starts, score_scale, num_tokens, num_words, num_summaries, num_documents, num_blocks,
    splits, init_chunks, local_chunks,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_P: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, SQUARE: tl.constexpr, SOFTMAX: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk~ / score_scale of CHUNKS summaries from every ``splits``-th tile of tokens. Scores stand as [chunk, row]."""
    kv_head = tl.program_id(0) % KV_HEADS
    slot = tl.program_id(0) // KV_HEADS
    split = tl.program_id(1)
    document, first_summary, end_summary, tile = locate_tile(summary_starts, slot, num_documents, CHUNKS)
    chunk = tile * CHUNKS + tl.arange(0, CHUNKS)
    summary = first_summary + chunk
    if first_summary + tile * CHUNKS >= end_summary:
        return
    start = tl.load(documents + document)
    end = tl.load(documents + document + 1)
    dim = tl.arange(0, DIM)
    in_chunks = (summary < end_summary)[:, None] & (dim < HEAD_DIM)[None, :]
    offset = (summary.to(tl.int64)[:, None] * KV_HEADS + kv_head) * HEAD_DIM + dim[None, :]
    k = tl.load(summaries_ptr + offset, mask=in_chunks, other=0.0)

    ROWS: tl.constexpr = TOKENS * GROUP_P
    row = tl.arange(0, ROWS)
    tile_lane = tl.arange(0, TOKENS)
    query_head = kv_head * GROUP + row % GROUP_P
    in_group = row % GROUP_P < GROUP
    if SQUARE:
        alpha = tl.full([ROWS], 1.5, tl.float32)
    else:
        alpha = tl.load(alpha_ptr + query_head, mask=in_group, other=1.5)
    slope = ((alpha - 1.0) * score_scale)[None, :]
    if SOFTMAX:
        slope = softmax_slope(slope, score_scale)
    exponent = ((2.0 - alpha) / (alpha - 1.0))[None, :]
    acc = tl.zeros([CHUNKS, DIM], tl.float32)
    tl.static_assert(CHUNKS <= 64)  # so that a token's bits of them lie in two words
    first_word = tile * CHUNKS // 32
    candidate = tl.where(chunk >= init_chunks, chunk, 2147483647)
    # The first token that has one of these chunks as a candidate stands just behind the local chunks that follow it.
    begin = tl.minimum(tl.maximum(tile * CHUNKS, init_chunks) + 1 + local_chunks, num_blocks) * BLOCK
    for first in range(begin + split * TOKENS, end - start, splits * TOKENS):
        position = first + row // GROUP_P
        valid = (start + position < end) & in_group
        flat_row = (start + position).to(tl.int64) * (KV_HEADS * GROUP) + query_head
        in_tile = valid[:, None] & (dim < HEAD_DIM)[None, :]
        q = tl.load(q_ptr + flat_row[:, None] * HEAD_DIM + dim[None, :], mask=in_tile, other=0.0)
        stop = tl.where(valid, position // BLOCK - local_chunks, 0)
        peak = tl.load(peak_ptr + flat_row, mask=valid, other=0.0)
        tau = tl.load(tau_ptr + flat_row, mask=valid, other=0.0)
        row_mean = tl.load(row_mean_ptr + flat_row, mask=valid, other=0.0)
        x = tl.dot(k, q.T, input_precision=PRECISION) - peak[None, :]
        x = tl.where(candidate[:, None] < stop[None, :], x, float("-inf"))
        token = start + first + tile_lane
        word_row = words + (kv_head.to(tl.int64) * num_tokens + token) * num_words + first_word
        word = tl.load(word_row, mask=(token < end) & (first_word < num_words), other=0)[None, :]
        if CHUNKS > 32:
            second = tl.load(word_row + 1, mask=(token < end) & (first_word + 1 < num_words), other=0)[None, :]
            word = tl.where((chunk // 32 == first_word)[:, None], word, second)
        selected = ((word >> (chunk % 32)[:, None]) & 1) != 0
        if SOFTMAX:
            log2_p = x * slope - tau[None, :]
            u = exp2(log2_p)
            share = share_of_logs(log2_p, selected, CHUNKS, TOKENS, GROUP_P, 2)
        else:
            z = saturated(x, slope, -tau[None, :])
            _, u = power(z, exponent, SQUARE)
            share = share_of_group(z, exponent, selected, CHUNKS, TOKENS, GROUP_P, 2, SQUARE)
        bias_row = bias_grad_ptr + (token.to(tl.int64) * KV_HEADS + kv_head) * num_blocks
        in_bias = (token < end)[None, :] & (chunk < num_blocks)[:, None]
        b = tl.load(bias_row[None, :] + chunk[:, None], mask=in_bias, other=0.0)
        b = tl.where(selected, b, 0.0)  # what is not selected was never written
        mean = tl.load(bias_mean_ptr + token.to(tl.int64) * KV_HEADS + kv_head, mask=token < end, other=0.0)
        ds = share * spread(b - mean[None, :], share, CHUNKS, TOKENS, GROUP_P, 2) - u * row_mean[None, :]
        acc = _add_products(acc, ds, q)
    partial_row = (split.to(tl.int64) * num_summaries + summary) * KV_HEADS + kv_head
    tl.store(partial_ptr + partial_row[:, None] * HEAD_DIM + dim[None, :], acc, mask=in_chunks)


# Entries of a tile's list that are visited at a time: lists are short, and their last visit is filled up.
LISTED_CHUNKS = 32
# Query heads of a KV head up to which the kernel of the summaries has smaller tiles. The fewer, the more tokens has a
# tile, each with a gradient of the bias, a word and a mean for every chunk: of 64 chunks they leave the registers.
SMALL_GROUP = 2
SUMMARY_LAUNCH = (*around(4, 1), dict(num_warps=4, num_stages=2))


def route_backward(
    q: Tensor, summaries: Tensor, alpha: Tensor | None, starts: Tensor, peak: Tensor, tau: Tensor, bias_grad: Tensor,
    dq: Tensor, words: Tensor, lists: TileLists, geo: Geometry, chunk_size: int, score_scale: float,
    forced: tuple[int, int], sigma: float | None, alpha_grad: bool, softmax: bool, options: dict[str, int],
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Gradients of the summaries [n', H, D] and of alpha, float32 [Hq]; adds the router's part to ``dq`` in place.

    Args:
        bias_grad: float32 [n, H, N]; entries that are not selected do not count.
        words: int32 [H, n, W]; what they select, and nothing else, has a gradient.
        lists: of the words, for the router's tiles.
        sigma: None for the raw prior.
    """
    rows = (geo.tokens, geo.heads)
    row_mean = torch.empty(rows, dtype=torch.float32, device=q.device)
    dalpha = torch.zeros(rows, dtype=torch.float32, device=q.device) if alpha_grad else None
    bias_mean = torch.empty(geo.tokens, geo.kv_heads, dtype=torch.float32, device=q.device)
    inverse_sigma = 1.0 if sigma is None else 1.0 / sigma
    constants = router_constants(geo, chunk_size, alpha is None, q.dtype, options)
    listed = constants | {"CHUNKS": LISTED_CHUNKS}
    # The three-part products of float32 keep two more copies of their operands.
    listed_launch = around(4, 1) if q.itemsize == 4 else LAUNCH
    slots = geo.slots(constants["TOKENS"])
    num_blocks = bias_grad.shape[-1]
    forced = clamp_forced(forced, num_blocks)
    launch(
        query_kernel, (slots * geo.kv_heads,),
        q, summaries, alpha, peak, tau, bias_grad, dq, row_mean, bias_mean, dalpha, geo.documents, starts, lists.blocks,
        lists.choices, lists.counts, score_scale, inverse_sigma, slots, geo.num_documents, num_blocks,
        lists.blocks.shape[-1], *forced,
        TEMPERED=sigma is not None, ALPHA_GRAD=alpha_grad, SOFTMAX=softmax, options=listed_launch, tokens=geo.tokens,
        restore=[dq], **listed,
    )  # fmt: skip

    if geo.padded_group <= SMALL_GROUP:
        constants["CHUNKS"] = min(constants["CHUNKS"], 32)
    chunk_slots = summaries.shape[0] // constants["CHUNKS"] + geo.num_documents
    splits = query_splits(chunk_slots * geo.kv_heads, geo.longest * geo.group)
    partial = torch.zeros(splits, *summaries.shape, dtype=torch.float32, device=q.device)
    launch(
        summary_kernel, (chunk_slots * geo.kv_heads, splits),
        q, summaries, alpha, peak, tau, bias_grad, row_mean, bias_mean, partial, words, geo.documents, starts,
        score_scale, geo.tokens, words.shape[-1], summaries.shape[0], geo.num_documents, num_blocks, splits,
        *forced, SOFTMAX=softmax, options=SUMMARY_LAUNCH, tokens=geo.tokens, **constants,
    )  # fmt: skip
    dsummaries = (partial.sum(0) * (score_scale * inverse_sigma)).to(summaries.dtype)
    return dsummaries, None if dalpha is None else dalpha.sum(0)
