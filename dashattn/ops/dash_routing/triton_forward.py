"""Triton kernels of DashAttention's router: entmax threshold, selection and prior (with softmax: ``triton_softmax``).

Scores are never written. A program owns a tile of neighbouring tokens x the heads of a KV group and multiplies it with
the chunk summaries again in each pass, on the tensor cores, which is several times cheaper than one trip of float32
scores through memory. What is kept per (token, query head) are two numbers: the highest product q . k~ and the
threshold tau relative to it. Relative, and the difference of products taken before it is scaled: the highest score is
then exactly 0, and a large router_scale costs the threshold no digits.

Candidates of a row are ``count`` chunks: those behind the first ``init_chunks`` of the document and before the
``local_chunks`` that precede its own one. In these kernels their numbers begin at 0. Chunks with other numbers, up
to the row's own, are forced: they are selected, and nothing else.

Shapes: n = B T tokens laid out flat, M documents, n' complete chunks of BLOCK tokens, Hq query heads, H KV heads, D
head size, N chunks of a row, W words of 32 chunks. q [n, Hq, D]; summaries [n', H, D]; starts, a document's first
summary, int32 [M + 1]; alpha float32 [Hq]; peak and tau float32 [n, Hq]; words int32 [H, n, W]; bias float32 [n, H, N].
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from dashattn.ops.block_sparse.triton_forward import key_descriptor, precision
from dashattn.ops.dash_routing.triton_entmax import (
    EDGE_LOG_P,
    MAX_PASSES,
    above_threshold,
    fold,
    hermite_root,
    is_positive,
    log_mean,
    log_mean_of_logs,
    narrow,
    power,
    probe,
    root_step,
    row_sums,
    softmax_slope,
    unsolved,
)
from dashattn.ops.tiles import Geometry, bitwise_or, locate_tile, query_rows
from dashattn.ops.tuning import around, launch


@triton.jit
def load_tile(q_ptr, alpha_ptr, start, end, index, kv_head, score_scale, init_chunks, local_chunks,
              KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_P: tl.constexpr, TOKENS: tl.constexpr,
              BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, SQUARE: tl.constexpr):  # fmt: skip
    """Rows of query tile ``index`` of the document ``start .. end``.

    Returns which rows stand for a query, their numbers in [n * Hq], their own chunk (-1: no query), the number
    of their candidates, q, alpha, and the factors that turn a product q . k~ into a score x and z into p (``power``).
    """
    position, query_head, valid, flat_row, offset, in_tile = query_rows(
        start, end, index * TOKENS, kv_head, KV_HEADS, GROUP, GROUP_P, TOKENS, TOKENS * GROUP_P, HEAD_DIM, DIM
    )
    q = tl.load(q_ptr + offset, mask=in_tile, other=0.0)
    own = tl.where(valid, position // BLOCK, -1)
    if SQUARE:
        alpha = tl.full([TOKENS * GROUP_P], 1.5, tl.float32)
    else:
        alpha = tl.load(alpha_ptr + query_head, mask=valid, other=1.5)
    slope = (alpha - 1.0) * score_scale
    exponent = ((2.0 - alpha) / (alpha - 1.0))[:, None]
    count = tl.maximum(own - local_chunks - init_chunks, 0)
    return valid, flat_row, own, count, q, alpha, slope, exponent


@triton.jit
def is_candidate(chunk, count, CHUNKS: tl.constexpr):
    """[R, CHUNKS]: which chunks from ``chunk`` on, a negative number perhaps, are candidates of each row."""
    column = (chunk + tl.arange(0, CHUNKS)).to(tl.uint32, bitcast=True)
    return column[None, :] < count.to(tl.uint32, bitcast=True)[:, None]


@triton.jit
def whole_tiles(index, init_chunks, local_chunks, TOKENS: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr):
    """CHUNKS chunks from a number below this one on are candidates of every row of query tile ``index``."""
    return tl.maximum(index * TOKENS // BLOCK - local_chunks - init_chunks - CHUNKS + 1, 0)


@triton.jit
def products(q, summary_desc, kv_head, first_candidate, chunk, whole, count, CHUNKS: tl.constexpr, DIM: tl.constexpr,
             PRECISION: tl.constexpr):  # fmt: skip
    """q . k~ for CHUNKS chunks from ``chunk`` on; -inf at chunks that are no candidates.

    ``first_candidate``: the summary of candidate 0; ``whole``: see ``whole_tiles``. The branch costs less than a second
    loop.
    """
    k = summary_desc.load([kv_head, first_candidate + chunk, 0]).reshape(CHUNKS, DIM)
    x = tl.dot(q, k.T, input_precision=PRECISION)
    if (chunk < 0) | (chunk >= whole):
        x = tl.where(is_candidate(chunk, count, CHUNKS), x, float("-inf"))
    return x


@triton.jit
def _measure(q, summary_desc, kv_head, first_candidate, chunk, whole, count, own, slope, peak, tau, exponent, sums,
             word_row, in_document, num_words, init_chunks, TOKENS: tl.constexpr, GROUP_P: tl.constexpr,
             CHUNKS: tl.constexpr, DIM: tl.constexpr, SQUARE: tl.constexpr, WORDS: tl.constexpr,
             PRECISION: tl.constexpr):  # fmt: skip
    """Adds CHUNKS chunks to the folded sums of z ** r, z ** (r - 1) and z > 0; WORDS: writes their selection words."""
    x = products(q, summary_desc, kv_head, first_candidate, chunk, whole, count, CHUNKS, DIM, PRECISION)
    z = above_threshold(x - peak[:, None], slope, tau)
    p, u = power(z, exponent, SQUARE)
    positive = is_positive(z)
    sums = (sums[0] + fold(p), sums[1] + fold(u), sums[2] + fold(positive))
    if WORDS:
        if (chunk < 0) | (chunk >= whole):
            up_to_own = (chunk + tl.arange(0, CHUNKS))[None, :] <= own[:, None]
            positive = tl.where(up_to_own & ~is_candidate(chunk, count, CHUNKS), 1.0, positive)
        # Sixteen bits as the exact sum of float powers of two, which is cheaper than shifting each.
        weight = (1 << (tl.arange(0, CHUNKS) % 16)).to(tl.float32)
        halves = tl.sum(tl.reshape(positive * weight[None, :], (TOKENS * GROUP_P, CHUNKS // 16, 16)), 2).to(tl.int32)
        halves = tl.reduce(tl.reshape(halves, (TOKENS, GROUP_P, CHUNKS // 16)), 1, bitwise_or)
        shift = 16 * tl.arange(0, 2)
        token_words = tl.sum(tl.reshape(halves, (TOKENS, CHUNKS // 32, 2)) << shift[None, None, :], 2)
        word = (init_chunks + chunk) // 32 + tl.arange(0, CHUNKS // 32)
        in_words = in_document[:, None] & (word < num_words)[None, :]
        tl.store(word_row[:, None] + word[None, :], token_words, mask=in_words)
    return sums


@triton.jit(do_not_specialize=["num_tokens", "num_words", "num_slots", "num_documents", "init_chunks", "local_chunks"])
def threshold_kernel(
    q_ptr, summary_desc, alpha_ptr, words, peak_ptr, tau_ptr, documents, summary_starts, score_scale,
    num_tokens, num_words, num_slots, num_documents, init_chunks, local_chunks,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_P: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, SQUARE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    kv_head = pid % KV_HEADS
    slot = num_slots - 1 - pid // KV_HEADS
    document, start, end, index = locate_tile(documents, slot, num_documents, TOKENS)
    if start + index * TOKENS >= end:
        return
    first_candidate = tl.load(summary_starts + document) + init_chunks

    ROWS: tl.constexpr = TOKENS * GROUP_P
    valid, flat_row, own, count, q, alpha, slope, exponent = load_tile(
        q_ptr, alpha_ptr, start, end, index, kv_head, score_scale, init_chunks, local_chunks, KV_HEADS, GROUP, GROUP_P,
        TOKENS, BLOCK, HEAD_DIM, DIM, SQUARE,
    )  # fmt: skip
    last = tl.max(count, 0)
    whole = whole_tiles(index, init_chunks, local_chunks, TOKENS, BLOCK, CHUNKS)
    zero = tl.zeros([ROWS, 8], tl.float32)
    peaks = zero + float("-inf")
    for chunk in range(0, last, CHUNKS):
        x = products(q, summary_desc, kv_head, first_candidate, chunk, whole, count, CHUNKS, DIM, PRECISION)
        peaks = tl.maximum(peaks, tl.max(tl.reshape(x, (ROWS, CHUNKS // 8, 8)), 1))
    # Rows that stand for nothing must not select any.
    peak = tl.where(count > 0, tl.max(peaks, 1), tl.where(valid, 0.0, 1e30))

    # One pass at four thresholds at once brackets the root closely enough for cubic interpolation. Relative to a peak
    # that is scaled first: what that costs in digits the steps that follow mend.
    level = slope * peak
    at_1 = (zero, zero)
    at_2 = (zero, zero)
    at_3 = (zero, zero)
    at_4 = (zero, zero)
    for chunk in range(0, last, CHUNKS):
        x = products(q, summary_desc, kv_head, first_candidate, chunk, whole, count, CHUNKS, DIM, PRECISION)
        at_1 = probe(x, slope, level - 1.0, at_1, exponent, SQUARE)
        at_2 = probe(x, slope, level - 0.75, at_2, exponent, SQUARE)
        at_3 = probe(x, slope, level - 0.5, at_3, exponent, SQUARE)
        at_4 = probe(x, slope, level - 0.25, at_4, exponent, SQUARE)
    # Towards tau = 0 only the highest score is above the threshold: h + 1 is -tau there.
    origin = tl.zeros([ROWS], tl.float32)
    bracket = (origin - 1.0, origin + 1.0, origin - 1.0, origin, origin, origin - 1.0)
    bracket = narrow(bracket, -1.0, at_1, alpha, SQUARE)
    bracket = narrow(bracket, -0.75, at_2, alpha, SQUARE)
    bracket = narrow(bracket, -0.5, at_3, alpha, SQUARE)
    bracket = narrow(bracket, -0.25, at_4, alpha, SQUARE)
    # No threshold lies right of the one for equal scores, n ** (1 - alpha) below the maximum.
    highest = -tl.exp2((1.0 - alpha) * tl.log2(tl.maximum(count, 1).to(tl.float32)))
    tau = tl.minimum(tl.maximum(hermite_root(bracket), -1.0), highest)

    tile_position = index * TOKENS + tl.arange(0, TOKENS)
    in_document = start + tile_position < end
    word_row = words + (kv_head.to(tl.int64) * num_tokens + start + tile_position) * num_words
    # One step from there solves a row, or nearly. What follows proves it, and writes the words as it does; the words of
    # a pass whose thresholds prove inexact are overwritten by the next.
    sums = (zero, zero, zero)
    for chunk in range(0, last, CHUNKS):
        sums = _measure(
            q, summary_desc, kv_head, first_candidate, chunk, whole, count, own, slope, peak, tau, exponent, sums,
            word_row, in_document, num_words, init_chunks, TOKENS, GROUP_P, CHUNKS, DIM, SQUARE, False, PRECISION,
        )  # fmt: skip
    tau = root_step(tau, row_sums(sums), alpha, highest, SQUARE)
    own -= init_chunks
    last_own = tl.max(own, 0)
    searching = True
    passes = 0
    while searching:
        sums = (zero, zero, zero)
        for chunk in range(-init_chunks, last_own + 1, CHUNKS):
            sums = _measure(
                q, summary_desc, kv_head, first_candidate, chunk, whole, count, own, slope, peak, tau, exponent, sums,
                word_row, in_document, num_words, init_chunks, TOKENS, GROUP_P, CHUNKS, DIM, SQUARE, True, PRECISION,
            )  # fmt: skip
        passes += 1
        totals = row_sums(sums)
        better = root_step(tau, totals, alpha, highest, SQUARE)
        open_rows = (count > 0) & unsolved(tau, better, totals[0], alpha)
        searching = (tl.max(open_rows.to(tl.int32), 0) > 0) & (passes < MAX_PASSES)
        if searching:
            tau = tl.where(open_rows, better, tau)  # a token's result does not depend on those beside it
    tl.store(peak_ptr + flat_row, peak, mask=valid)
    tl.store(tau_ptr + flat_row, tau, mask=valid)


@triton.jit
def _log_prior(q, summary_desc, kv_head, first_candidate, chunk, whole, count, peak, tau, slope, exponent,
               TOKENS: tl.constexpr, GROUP: tl.constexpr, GROUP_P: tl.constexpr, CHUNKS: tl.constexpr,
               DIM: tl.constexpr, SQUARE: tl.constexpr, SOFTMAX: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """log of the group's mean probability of CHUNKS chunks, [TOKENS, CHUNKS], and where it is positive."""
    x = products(q, summary_desc, kv_head, first_candidate, chunk, whole, count, CHUNKS, DIM, PRECISION)
    if SOFTMAX:
        log2_p = (x - peak[:, None]) * slope[:, None] - tau[:, None]
        return log_mean_of_logs(tl.reshape(log2_p, (TOKENS, GROUP_P, CHUNKS)), 1, GROUP)
    z = above_threshold(x - peak[:, None], slope, tau)
    exponent = tl.reshape(exponent, (TOKENS, GROUP_P, 1))
    return log_mean(tl.reshape(z, (TOKENS, GROUP_P, CHUNKS)), exponent, 1, GROUP, SQUARE)


@triton.jit(
    do_not_specialize=[
        "num_tokens", "num_words", "num_slots", "num_documents", "num_blocks", "init_chunks", "local_chunks",
    ]
)  # fmt: skip
def prior_kernel(
    q_ptr, summary_desc, alpha_ptr, words, peak_ptr, tau_ptr, bias_ptr, documents, summary_starts, score_scale,
    inverse_sigma, num_tokens, num_words, num_slots, num_documents, num_blocks, init_chunks, local_chunks,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_P: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, SQUARE: tl.constexpr, TEMPERED: tl.constexpr,
    SOFTMAX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes the group's prior of candidates, and 0 for forced chunks; past a token's own one nothing.

    Of candidates that were not selected too, for which of them that are the words say alone: they are not to be read.
    """
    kv_head = tl.program_id(0) % KV_HEADS
    slot = num_slots - 1 - tl.program_id(0) // KV_HEADS
    document, start, end, index = locate_tile(documents, slot, num_documents, TOKENS)
    if start + index * TOKENS >= end:
        return
    first_candidate = tl.load(summary_starts + document) + init_chunks
    valid, flat_row, _own, count, q, _alpha, slope, exponent = load_tile(
        q_ptr, alpha_ptr, start, end, index, kv_head, score_scale, init_chunks, local_chunks, KV_HEADS, GROUP, GROUP_P,
        TOKENS, BLOCK, HEAD_DIM, DIM, SQUARE,
    )  # fmt: skip
    last = tl.max(count, 0)
    whole = whole_tiles(index, init_chunks, local_chunks, TOKENS, BLOCK, CHUNKS)
    peak = tl.load(peak_ptr + flat_row, mask=valid, other=0.0)
    if SOFTMAX:
        slope = softmax_slope(slope, score_scale)
        tau = tl.load(tau_ptr + flat_row, mask=valid, other=float("inf"))  # rows that stand for nothing have no p
    else:
        tau = tl.load(tau_ptr + flat_row, mask=valid, other=0.0)

    position = index * TOKENS + tl.arange(0, TOKENS)
    token = start + position
    token_count = tl.where(token < end, position // BLOCK - local_chunks - init_chunks, 0)
    bias_row = bias_ptr + (token.to(tl.int64) * KV_HEADS + kv_head) * num_blocks + init_chunks
    log_sum = tl.zeros([TOKENS], tl.float32)
    selected_count = tl.zeros([TOKENS], tl.float32)
    if TEMPERED:
        for chunk in range(0, last, CHUNKS):
            log_p, selected = _log_prior(
                q, summary_desc, kv_head, first_candidate, chunk, whole, count, peak, tau, slope, exponent, TOKENS,
                GROUP, GROUP_P, CHUNKS, DIM, SQUARE, SOFTMAX, PRECISION,
            )  # fmt: skip
            if SOFTMAX:  # all of a softmax is positive
                column = (init_chunks + chunk + tl.arange(0, CHUNKS))[None, :]
                word_row = words + (kv_head.to(tl.int64) * num_tokens + token) * num_words
                in_words = (column - init_chunks < token_count[:, None]) & (column // 32 < num_words)
                word = tl.load(word_row[:, None] + column // 32, mask=in_words, other=0)
                selected = ((word >> (column % 32)) & 1) != 0
                log_p = tl.where(selected, log_p, 0.0)
            log_sum += tl.sum(log_p, 1)
            selected_count += tl.sum(selected.to(tl.float32), 1)
    mean = log_sum / tl.maximum(selected_count, 1.0)
    for chunk in range(0, last, CHUNKS):
        log_p, selected = _log_prior(
            q, summary_desc, kv_head, first_candidate, chunk, whole, count, peak, tau, slope, exponent, TOKENS, GROUP,
            GROUP_P, CHUNKS, DIM, SQUARE, SOFTMAX, PRECISION,
        )  # fmt: skip
        log_p = tl.where(selected, log_p, EDGE_LOG_P)
        column = (chunk + tl.arange(0, CHUNKS))[None, :]
        in_candidates = column < token_count[:, None]
        tl.store(bias_row[:, None] + column, (log_p - mean[:, None]) * inverse_sigma, mask=in_candidates)
    own = position // BLOCK - init_chunks
    for forced in range(0, init_chunks + local_chunks + 1):
        column = tl.where(forced < init_chunks, forced - init_chunks, own + init_chunks - forced)
        tl.store(bias_row + column, 0.0, mask=(token < end) & (column >= -init_chunks) & (column <= own))


@cache
def router_options(dim: int, itemsize: int) -> dict[str, int]:
    """Rows and chunks of a tile: the fastest of several on an H100 and an H200."""
    return dict(rows=64, chunks=32 if itemsize == 4 or dim > 128 else 64)


def router_constants(geo: Geometry, chunk_size: int, square: bool, dtype: torch.dtype, options: dict[str, int]) -> dict:
    tokens = geo.padded_tile_tokens(options["rows"])
    return dict(
        KV_HEADS=geo.kv_heads, GROUP=geo.group, GROUP_P=geo.padded_group, TOKENS=tokens,
        BLOCK=chunk_size, CHUNKS=options["chunks"], HEAD_DIM=geo.head_dim, DIM=geo.padded_dim, SQUARE=square,
        PRECISION=precision(dtype),
    )  # fmt: skip


LAUNCH = around(4, 2)
LAUNCH_THRESHOLD = (*around(4, 2, maxnreg=128), dict(num_warps=4, num_stages=2))


def clamp_forced(forced: tuple[int, int], num_blocks: int) -> tuple[int, int]:
    """``init_chunks`` and ``local_chunks`` as the kernels take them, in 32 bits: there are no more to force."""
    return min(forced[0], num_blocks), min(forced[1], num_blocks)


def route(
    q: Tensor, summaries: Tensor, alpha: Tensor | None, starts: Tensor, geo: Geometry, chunk_size: int, num_blocks: int,
    score_scale: float, forced: tuple[int, int], options: dict[str, int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Selection words int32 [H, n, W], and per (token, query head) the highest product q . k~ and the threshold tau.

    ``alpha``: float32 [Hq], or None for 1.5 everywhere, which needs no powers. ``forced``: ``init_chunks`` and
    ``local_chunks``.
    """
    words = torch.zeros(geo.kv_heads, geo.tokens, -(-num_blocks // 32), dtype=torch.int32, device=q.device)
    peak, tau = (torch.empty(geo.tokens, geo.heads, dtype=torch.float32, device=q.device) for _ in range(2))
    constants = router_constants(geo, chunk_size, alpha is None, q.dtype, options)
    slots = geo.slots(constants["TOKENS"])
    few_registers = constants["SQUARE"] and q.itemsize == 2 and geo.padded_dim <= 128
    launch(
        threshold_kernel, (slots * geo.kv_heads,),
        q, key_descriptor(summaries, geo, options["chunks"]), alpha, words, peak, tau, geo.documents, starts,
        score_scale, geo.tokens, words.shape[-1], slots, geo.num_documents, *clamp_forced(forced, num_blocks),
        options=LAUNCH_THRESHOLD if few_registers else LAUNCH, tokens=geo.tokens, **constants,
    )  # fmt: skip
    return words, peak, tau


def prior_bias(
    q: Tensor, summaries: Tensor, alpha: Tensor | None, starts: Tensor, words: Tensor, peak: Tensor, tau: Tensor,
    geo: Geometry, chunk_size: int, num_blocks: int, score_scale: float, forced: tuple[int, int], sigma: float | None,
    softmax: bool, options: dict[str, int],
) -> Tensor:  # fmt: skip
    """The prior as a bias, float32 [n, H, N]; of no meaning where not selected.

    ``words`` int32 [H, n, W], read where ``softmax``; ``sigma``: None for the raw prior.
    """
    bias = torch.empty(geo.tokens, geo.kv_heads, num_blocks, dtype=torch.float32, device=q.device)
    constants = router_constants(geo, chunk_size, alpha is None, q.dtype, options)
    slots = geo.slots(constants["TOKENS"])
    launch(
        prior_kernel, (slots * geo.kv_heads,),
        q, key_descriptor(summaries, geo, options["chunks"]), alpha, words, peak, tau, bias, geo.documents, starts,
        score_scale, 1.0 if sigma is None else 1.0 / sigma, geo.tokens, words.shape[-1], slots, geo.num_documents,
        num_blocks, *clamp_forced(forced, num_blocks),
        TEMPERED=sigma is not None, SOFTMAX=softmax, options=LAUNCH, tokens=geo.tokens, **constants,
    )  # fmt: skip
    return bias
