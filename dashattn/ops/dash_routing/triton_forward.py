"""Triton kernels of DashAttention's router: entmax threshold, selection and prior.

Scores are never written. A program owns a tile of neighbouring tokens x the heads of a KV group and multiplies it with
the chunk summaries again in each pass, on the tensor cores, which is several times cheaper than one trip of float32
scores through memory. What is kept per (token, query head) are two numbers: the highest product q . k~ and the
threshold tau relative to it. Relative, and the difference of products taken before it is scaled: the highest score is
then exactly 0, and a large router_scale costs the threshold no digits.

With s = score_scale q . k~, x = (alpha - 1) (s - max s), r = 1 / (alpha - 1) and z = max(x - tau, 0), entmax is
p = z ** r with sum p = 1. The root is sought on h(tau) = (sum z ** r) ** (1 / r) - 1, a convex function and nearly a
straight line.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dashattn.ops.block_sparse.triton_forward import precision
from dashattn.ops.tiles import Geometry, locate_tile

# On |sum p - 1|; float32 sums over 16384 chunks still reach it.
TOLERANCE = tl.constexpr(5e-6)
MAX_PASSES = tl.constexpr(40)


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def power(z, exponent, SQUARE: tl.constexpr):
    """(z ** r, z ** (r - 1)) with ``exponent`` = r - 1 per row; both 0 where z is 0."""
    if SQUARE:
        return z * z, z
    else:
        low = tl.where(z > 0, tl.exp2(tl.log2(tl.where(z > 0, z, 1.0)) * exponent), 0.0)
        return low * z, low


@triton.jit
def load_tile(q_ptr, alpha_ptr, start, end, index, kv_head, score_scale, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
              GROUP_P: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
              DIM: tl.constexpr, SQUARE: tl.constexpr):  # fmt: skip
    """Rows of query tile ``index`` of the document ``start .. end``.

    Returns which rows stand for a query, their numbers in [n * Hq], their own chunk (-1: no query), q, alpha, and the
    factors that turn a product q . k~ into a score x and z into p (``power``).
    """
    row = tl.arange(0, TOKENS * GROUP_P)
    position = index * TOKENS + row // GROUP_P
    query_head = kv_head * GROUP + row % GROUP_P
    valid = (start + position < end) & (row % GROUP_P < GROUP)
    flat_row = (start + position).to(tl.int64) * (KV_HEADS * GROUP) + query_head
    dim = tl.arange(0, DIM)
    in_tile = valid[:, None] & (dim < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + flat_row[:, None] * HEAD_DIM + dim[None, :], mask=in_tile, other=0.0)
    own = tl.where(valid, position // BLOCK, -1)
    if SQUARE:
        alpha = tl.full([TOKENS * GROUP_P], 1.5, tl.float32)
    else:
        alpha = tl.load(alpha_ptr + query_head, mask=valid, other=1.5)
    slope = (alpha - 1.0) * score_scale
    exponent = ((2.0 - alpha) / (alpha - 1.0))[:, None]
    return valid, flat_row, own, q, alpha, slope, exponent


@triton.jit
def products(q, summary_desc, kv_head, first_summary, chunk, past, CHUNKS: tl.constexpr, DIM: tl.constexpr,
             MASKED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """q . k~ for CHUNKS chunks from ``chunk`` on; MASKED: -inf at chunks that are no candidates."""
    k = summary_desc.load([kv_head, first_summary + chunk, 0]).reshape(CHUNKS, DIM)
    x = tl.dot(q, k.T, input_precision=PRECISION)
    if MASKED:
        x = tl.where((chunk + tl.arange(0, CHUNKS))[None, :] < past[:, None], x, float("-inf"))
    return x


@triton.jit
def scores(q, summary_desc, kv_head, first_summary, chunk, past, slope, peak, CHUNKS: tl.constexpr, DIM: tl.constexpr,
           MASKED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """x of CHUNKS chunks from ``chunk`` on."""
    x = products(q, summary_desc, kv_head, first_summary, chunk, past, CHUNKS, DIM, MASKED, PRECISION)
    return (x - peak[:, None]) * slope[:, None]


@triton.jit
def tangent_root(tau, power_sum, slope_sum, alpha, SQUARE: tl.constexpr):
    """Newton's step on h: at or left of the root, from either side. ``slope_sum`` is sum z ** (r - 1)."""
    if SQUARE:
        step = power_sum - tl.sqrt(power_sum)
    else:
        step = power_sum - tl.exp2((2.0 - alpha) * tl.log2(tl.maximum(power_sum, 1e-37)))
    return tau + tl.where(slope_sum > 0, step / tl.where(slope_sum > 0, slope_sum, 1.0), 0.0)


@triton.jit
def halley_root(tau, power_sum, slope_sum, support):
    """Halley's step on h for alpha = 1.5, where h = sqrt(sum z^2) and ``support`` counts z > 0."""
    h = tl.sqrt(tl.maximum(power_sum, 1e-37))
    first = -slope_sum / h
    second = (support - first * first) / h
    # The bound on the denominator keeps the step within two of Newton's while h is far from its root.
    below = tl.maximum(2.0 * first * first - (h - 1.0) * second, first * first)
    return tau - 2.0 * (h - 1.0) * first / tl.where(below > 0, below, 1.0)


@triton.jit
def _probe(x, point, sums, exponent, SQUARE: tl.constexpr):
    p, u = power(tl.maximum(x - point, 0.0), exponent, SQUARE)
    return sums[0] + tl.sum(p, 1), sums[1] + tl.sum(u, 1)


@triton.jit
def _narrow(bracket, point, sums, alpha, SQUARE: tl.constexpr):
    """Moves an end of the bracket (left tau, value and slope of h + 1 there; right likewise) to ``point``.

    Points come in ascending order; right tau is 0 as long as none was right of the root.
    """
    left, left_h, left_slope, right, right_h, right_slope = bracket
    power_sum = tl.maximum(sums[0], 1e-30)
    if SQUARE:
        h = tl.sqrt(power_sum)
    else:
        h = tl.exp2((alpha - 1.0) * tl.log2(power_sum))
    slope = -h / power_sum * sums[1]
    is_left = h >= 1.0
    is_right = (h < 1.0) & (right == 0.0) & (sums[0] > 1e-30)
    return (
        tl.where(is_left, point, left),
        tl.where(is_left, h, left_h),
        tl.where(is_left, slope, left_slope),
        tl.where(is_right, point, right),
        tl.where(is_right, h, right_h),
        tl.where(is_right, slope, right_slope),
    )


@triton.jit
def _hermite_root(bracket):
    """Cubic interpolation of tau as a function of h, within what convexity allows: tangents below, secant above."""
    left, left_h, left_slope, right, right_h, right_slope = bracket
    width = right_h - left_h
    s = (1.0 - left_h) / width
    t = 1.0 - s
    root = (1.0 + 2.0 * s) * t * t * left + s * s * (3.0 - 2.0 * s) * right
    root += width * s * t * (t / left_slope - s / right_slope)
    below = tl.maximum(left + (1.0 - left_h) / left_slope, right + (1.0 - right_h) / right_slope)
    return tl.minimum(tl.maximum(root, below), left + (right - left) * s)


@triton.jit
def _measure(q, summary_desc, kv_head, first_summary, chunk, past, own, slope, peak, tau, exponent, sums, word_row,
             in_document, num_words, TOKENS: tl.constexpr, GROUP_P: tl.constexpr, CHUNKS: tl.constexpr,
             DIM: tl.constexpr, SQUARE: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Adds CHUNKS chunks to the sums of z ** r, z ** (r - 1) and z > 0, and writes their selection words."""
    x = scores(q, summary_desc, kv_head, first_summary, chunk, past, slope, peak, CHUNKS, DIM, MASKED, PRECISION)
    p, u = power(tl.maximum(x - tau[:, None], 0.0), exponent, SQUARE)
    selected = p > 0
    support = tl.sum(selected.to(tl.float32), 1)
    if MASKED:
        selected = selected | ((chunk + tl.arange(0, CHUNKS))[None, :] == own[:, None])
    bits = tl.reshape(selected.to(tl.int32), (TOKENS * GROUP_P, CHUNKS // 32, 32)) << tl.arange(0, 32)[None, None, :]
    token_words = tl.reduce(tl.reshape(tl.sum(bits, 2), (TOKENS, GROUP_P, CHUNKS // 32)), 1, _or)
    word = chunk // 32 + tl.arange(0, CHUNKS // 32)
    in_words = in_document[:, None] & (word < num_words)[None, :]
    tl.store(word_row[:, None] + word[None, :], token_words, mask=in_words)
    return sums[0] + tl.sum(p, 1), sums[1] + tl.sum(u, 1), sums[2] + support


@triton.jit(do_not_specialize=["num_tokens", "num_words", "num_slots", "num_documents"])
def threshold_kernel(
    q_ptr, summary_desc, alpha_ptr, words, peak_ptr, tau_ptr, documents, summary_starts, score_scale,
    num_tokens, num_words, num_slots, num_documents,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_P: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, SQUARE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    kv_head = pid % KV_HEADS
    slot = num_slots - 1 - pid // KV_HEADS
    document, start, end, index = locate_tile(documents, slot, num_documents, TOKENS)
    if start + index * TOKENS >= end:
        return
    first_summary = tl.load(summary_starts + document)

    ROWS: tl.constexpr = TOKENS * GROUP_P
    valid, flat_row, own, q, alpha, slope, exponent = load_tile(
        q_ptr, alpha_ptr, start, end, index, kv_head, score_scale, KV_HEADS, GROUP, GROUP_P, TOKENS, BLOCK, HEAD_DIM,
        DIM, SQUARE,
    )  # fmt: skip
    past = tl.maximum(own, 0)
    last = tl.max(own, 0)

    # Chunks before ``whole`` are candidates of every row. Rows that stand for nothing must not select any.
    whole = index * TOKENS // BLOCK // CHUNKS * CHUNKS
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    zero = tl.zeros([ROWS], tl.float32)
    for chunk in range(0, whole, CHUNKS):
        x = products(q, summary_desc, kv_head, first_summary, chunk, past, CHUNKS, DIM, False, PRECISION)
        peak = tl.maximum(peak, tl.max(x, 1))
    for chunk in range(whole, last, CHUNKS):
        x = products(q, summary_desc, kv_head, first_summary, chunk, past, CHUNKS, DIM, True, PRECISION)
        peak = tl.maximum(peak, tl.max(x, 1))
    peak = tl.where(past > 0, peak, tl.where(valid, 0.0, 1e30))

    # One pass at four thresholds at once brackets the root closely enough for cubic interpolation.
    at_1 = (zero, zero)
    at_2 = (zero, zero)
    at_3 = (zero, zero)
    at_4 = (zero, zero)
    for chunk in range(0, whole, CHUNKS):
        x = scores(q, summary_desc, kv_head, first_summary, chunk, past, slope, peak, CHUNKS, DIM, False, PRECISION)
        at_1 = _probe(x, -1.0, at_1, exponent, SQUARE)
        at_2 = _probe(x, -0.75, at_2, exponent, SQUARE)
        at_3 = _probe(x, -0.5, at_3, exponent, SQUARE)
        at_4 = _probe(x, -0.25, at_4, exponent, SQUARE)
    for chunk in range(whole, last, CHUNKS):
        x = scores(q, summary_desc, kv_head, first_summary, chunk, past, slope, peak, CHUNKS, DIM, True, PRECISION)
        at_1 = _probe(x, -1.0, at_1, exponent, SQUARE)
        at_2 = _probe(x, -0.75, at_2, exponent, SQUARE)
        at_3 = _probe(x, -0.5, at_3, exponent, SQUARE)
        at_4 = _probe(x, -0.25, at_4, exponent, SQUARE)
    # Towards tau = 0 only the highest score is above the threshold: h + 1 is -tau there.
    bracket = (zero - 1.0, zero + 1.0, zero - 1.0, zero, zero, zero - 1.0)
    bracket = _narrow(bracket, -1.0, at_1, alpha, SQUARE)
    bracket = _narrow(bracket, -0.75, at_2, alpha, SQUARE)
    bracket = _narrow(bracket, -0.5, at_3, alpha, SQUARE)
    bracket = _narrow(bracket, -0.25, at_4, alpha, SQUARE)
    # No threshold lies right of the one for equal scores, n ** (1 - alpha) below the maximum.
    highest = -tl.exp2((1.0 - alpha) * tl.log2(tl.maximum(past, 1).to(tl.float32)))
    tau = tl.minimum(tl.maximum(_hermite_root(bracket), -1.0), highest)

    tile_position = index * TOKENS + tl.arange(0, TOKENS)
    in_document = start + tile_position < end
    word_row = words + (kv_head.to(tl.int64) * num_tokens + start + tile_position) * num_words
    unsolved = True
    passes = 0
    while unsolved:
        # The words of a pass whose thresholds prove inexact are overwritten by the next.
        sums = (zero, zero, zero)
        for chunk in range(0, whole, CHUNKS):
            sums = _measure(
                q, summary_desc, kv_head, first_summary, chunk, past, own, slope, peak, tau, exponent, sums, word_row,
                in_document, num_words, TOKENS, GROUP_P, CHUNKS, DIM, SQUARE, False, PRECISION,
            )  # fmt: skip
        for chunk in range(whole, last + 1, CHUNKS):
            sums = _measure(
                q, summary_desc, kv_head, first_summary, chunk, past, own, slope, peak, tau, exponent, sums, word_row,
                in_document, num_words, TOKENS, GROUP_P, CHUNKS, DIM, SQUARE, True, PRECISION,
            )  # fmt: skip
        passes += 1
        error = tl.max(tl.where(past > 0, tl.abs(sums[0] - 1.0), 0.0), 0)
        unsolved = (error > TOLERANCE) & (passes < MAX_PASSES)
        if unsolved:
            if SQUARE:
                better = halley_root(tau, sums[0], sums[1], sums[2])
            else:
                better = tangent_root(tau, sums[0], sums[1], alpha, SQUARE)
            tau = tl.minimum(tl.maximum(better, -1.0), highest)
    tl.store(peak_ptr + flat_row, peak, mask=valid)
    tl.store(tau_ptr + flat_row, tau, mask=valid)


@triton.jit
def group_sum(x, TOKENS: tl.constexpr, GROUP_P: tl.constexpr, CHUNKS: tl.constexpr):
    """Sum over the heads of a token: [TOKENS * GROUP_P, CHUNKS] -> [TOKENS, CHUNKS]."""
    return tl.sum(tl.reshape(x, (TOKENS, GROUP_P, CHUNKS)), 1)


@triton.jit(do_not_specialize=["num_slots", "num_documents", "num_blocks"])
def prior_kernel(
    q_ptr, summary_desc, alpha_ptr, peak_ptr, tau_ptr, bias_ptr, documents, summary_starts, score_scale, inverse_sigma,
    num_slots, num_documents, num_blocks,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_P: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, SQUARE: tl.constexpr, TEMPERED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes the group's prior of the selected past chunks; all other entries of the bias stay as they are."""
    kv_head = tl.program_id(0) % KV_HEADS
    slot = num_slots - 1 - tl.program_id(0) // KV_HEADS
    document, start, end, index = locate_tile(documents, slot, num_documents, TOKENS)
    if start + index * TOKENS >= end:
        return
    first_summary = tl.load(summary_starts + document)
    valid, flat_row, own, q, _, slope, exponent = load_tile(
        q_ptr, alpha_ptr, start, end, index, kv_head, score_scale, KV_HEADS, GROUP, GROUP_P, TOKENS, BLOCK, HEAD_DIM,
        DIM, SQUARE,
    )  # fmt: skip
    past = tl.maximum(own, 0)
    last = tl.max(past, 0)
    peak = tl.load(peak_ptr + flat_row, mask=valid, other=0.0)
    tau = tl.load(tau_ptr + flat_row, mask=valid, other=0.0)

    token = start + index * TOKENS + tl.arange(0, TOKENS)
    bias_row = bias_ptr + (token.to(tl.int64) * KV_HEADS + kv_head) * num_blocks
    log_sum = tl.zeros([TOKENS], tl.float32)
    selected_count = tl.zeros([TOKENS], tl.float32)
    if TEMPERED:
        for chunk in range(0, last, CHUNKS):
            x = scores(q, summary_desc, kv_head, first_summary, chunk, past, slope, peak, CHUNKS, DIM, True, PRECISION)
            p, _ = power(tl.maximum(x - tau[:, None], 0.0), exponent, SQUARE)
            p = group_sum(p, TOKENS, GROUP_P, CHUNKS)
            log_sum += tl.sum(tl.log(tl.where(p > 0, p / GROUP, 1.0)), 1)
            selected_count += tl.sum((p > 0).to(tl.float32), 1)
    mean = log_sum / tl.maximum(selected_count, 1.0)
    for chunk in range(0, last, CHUNKS):
        x = scores(q, summary_desc, kv_head, first_summary, chunk, past, slope, peak, CHUNKS, DIM, True, PRECISION)
        p, _ = power(tl.maximum(x - tau[:, None], 0.0), exponent, SQUARE)
        p = group_sum(p, TOKENS, GROUP_P, CHUNKS)
        log_p = (tl.log(tl.where(p > 0, p / GROUP, 1.0)) - mean[:, None]) * inverse_sigma
        tl.store(bias_row[:, None] + (chunk + tl.arange(0, CHUNKS))[None, :], log_p, mask=p > 0)


def summary_descriptor(summaries: Tensor, geo: Geometry, chunks: int) -> TensorDescriptor:
    return TensorDescriptor(
        summaries,
        shape=[geo.kv_heads, summaries.shape[0], geo.head_dim],
        strides=[geo.head_dim, geo.kv_heads * geo.head_dim, 1],
        block_shape=[1, chunks, geo.padded_dim],
    )


def router_options(dim: int, itemsize: int) -> dict[str, int]:
    """Rows and chunks of a tile, warps and pipeline stages: the fastest of five on an H200."""
    if itemsize == 4 or dim > 128:
        return dict(rows=64, chunks=32, num_warps=4, num_stages=2)
    return dict(rows=64, chunks=64, num_warps=4, num_stages=2)


def router_constants(geo: Geometry, chunk_size: int, square: bool, dtype: torch.dtype, options: dict[str, int]) -> dict:
    return dict(
        KV_HEADS=geo.kv_heads, GROUP=geo.group, GROUP_P=geo.padded_group, TOKENS=geo.tile_tokens(options["rows"]),
        BLOCK=chunk_size, CHUNKS=options["chunks"], HEAD_DIM=geo.head_dim, DIM=geo.padded_dim, SQUARE=square,
        PRECISION=precision(dtype), num_warps=options["num_warps"], num_stages=options["num_stages"],
    )  # fmt: skip


def route(
    q: Tensor, summaries: Tensor, alpha: Tensor | None, starts: Tensor, geo: Geometry, chunk_size: int, num_blocks: int,
    score_scale: float, options: dict[str, int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Selection words int32 [H, n, W], and per (token, query head) the highest product q . k~ and the threshold tau.

    ``alpha``: float32 [Hq], or None for 1.5 everywhere, which needs no powers.
    """
    words = torch.zeros(geo.kv_heads, geo.tokens, -(-num_blocks // 32), dtype=torch.int32, device=q.device)
    peak, tau = (torch.empty(geo.tokens, geo.heads, dtype=torch.float32, device=q.device) for _ in range(2))
    constants = router_constants(geo, chunk_size, alpha is None, q.dtype, options)
    slots = geo.slots(constants["TOKENS"])
    threshold_kernel[(slots * geo.kv_heads,)](
        q, summary_descriptor(summaries, geo, options["chunks"]), alpha, words, peak, tau, geo.documents, starts,
        score_scale, geo.tokens, words.shape[-1], slots, geo.num_documents, **constants,
    )  # fmt: skip
    return words, peak, tau


def prior_bias(
    q: Tensor, summaries: Tensor, alpha: Tensor | None, starts: Tensor, peak: Tensor, tau: Tensor, geo: Geometry,
    chunk_size: int, num_blocks: int, score_scale: float, sigma: float | None, options: dict[str, int],
) -> Tensor:  # fmt: skip
    """The prior as a bias, float32 [n, H, N]; 0 where not selected. ``sigma``: None for the raw prior."""
    bias = torch.zeros(geo.tokens, geo.kv_heads, num_blocks, dtype=torch.float32, device=q.device)
    constants = router_constants(geo, chunk_size, alpha is None, q.dtype, options)
    slots = geo.slots(constants["TOKENS"])
    prior_kernel[(slots * geo.kv_heads,)](
        q, summary_descriptor(summaries, geo, options["chunks"]), alpha, peak, tau, bias, geo.documents, starts,
        score_scale, 1.0 if sigma is None else 1.0 / sigma, slots, geo.num_documents, num_blocks,
        TEMPERED=sigma is not None, **constants,
    )  # fmt: skip
    return bias
