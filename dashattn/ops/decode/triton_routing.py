"""Triton kernels of DashAttention's routing for decoding.

With few queries the summaries are what costs, so that unlike in prefill (``dash_routing``) the scores are written:
once, by programs that share the chunks. Then a program per query head holds all of its scores in registers and solves
for the threshold. Definitions and names are those of ``dash_routing/triton_entmax.py``.

Shapes: B sequences, T new tokens, Hq query heads, H KV heads, D head size, N chunks, W words of 32 chunks. q
[B, T, Hq, D]; summaries [B, N, H, D]; products float32 [B, T, Hq, N], unwritten where a chunk is not visible; peak and
tau float32 [B, T, Hq]; words int32 [B, Hq, T, W]; bias float32 [B, T, H, N].
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dashattn.ops.block_sparse.triton_forward import precision
from dashattn.ops.dash_routing.triton_entmax import (
    EDGE_LOG_P,
    MAX_PASSES,
    above_threshold,
    is_positive,
    log_mean,
    log_mean_of_logs,
    power,
    root_step,
    softmax_slope,
    unsolved,
)
from dashattn.ops.dash_routing.triton_forward import clamp_forced
from dashattn.ops.decode.triton_attention import load_group, processors, visible_count, write_token
from dashattn.ops.instructions import any_thread
from dashattn.ops.tiles import overlapped_launch, power_of_2_from, wait_for_kernel_before


@triton.jit
def _multiply_tile(
    tile, q_ptr, summary_ptr, product_ptr, lengths, sequence_stride, summary_stride, head_stride, num_tokens,
    num_chunks, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,
    STRIDE: tl.constexpr, CHUNKS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q . k~ of CHUNKS chunks, for the heads of a group; chunks that are not visible are left unwritten."""
    kv_head = tl.program_id(0) % KV_HEADS
    query = tl.program_id(0) // KV_HEADS
    sequence = query // num_tokens
    dim = tl.arange(0, DIM)
    in_dim = dim < HEAD_DIM
    q, flat_row, in_group = load_group(q_ptr, query, kv_head, dim, in_dim, KV_HEADS, GROUP, ROWS, HEAD_DIM)
    visible = visible_count(tl.load(lengths + sequence) + query % num_tokens, SIZE, STRIDE)
    if tile * CHUNKS < visible:
        chunk = tile * CHUNKS + tl.arange(0, CHUNKS)
        past = chunk < visible
        offset = sequence.to(tl.int64) * sequence_stride + kv_head.to(tl.int64) * head_stride
        offset += chunk.to(tl.int64)[:, None] * summary_stride + dim[None, :]
        k = tl.load(summary_ptr + offset, mask=past[:, None] & in_dim[None, :], other=0.0)
        products = tl.dot(q, k.T, input_precision=PRECISION)
        target = product_ptr + flat_row[:, None] * num_chunks + chunk[None, :]
        tl.store(target, products, mask=in_group[:, None] & past[None, :])


@triton.jit(do_not_specialize=["num_tokens", "num_chunks"])
def product_kernel(
    q_ptr, summary_ptr, product_ptr, lengths, sequence_stride, summary_stride, head_stride, num_tokens, num_chunks,
    new_k_ptr, new_v_ptr, k_ptr, v_ptr, chunk_query_ptr, softmax_scale, cache_sequence_stride, token_stride,
    cache_head_stride,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr,
    CHUNKS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr, NEW: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """NEW: the last program of a sequence and KV head writes its new token, and the summary of a chunk of STRIDE tokens
    that it completes. Nothing else here reads these: a summary is visible from the token after its chunk on."""
    wait_for_kernel_before(PDL)
    if NEW and tl.program_id(1) == tl.num_programs(1) - 1:
        write_token(
            tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS, new_k_ptr, new_v_ptr, k_ptr, v_ptr, lengths,
            summary_ptr, chunk_query_ptr, softmax_scale, cache_sequence_stride, token_stride, cache_head_stride,
            sequence_stride, summary_stride, head_stride, KV_HEADS, HEAD_DIM, DIM, STRIDE, STRIDE, STRIDE, False,
        )  # fmt: skip
    else:
        _multiply_tile(
            tl.program_id(1), q_ptr, summary_ptr, product_ptr, lengths, sequence_stride, summary_stride, head_stride,
            num_tokens, num_chunks, KV_HEADS, GROUP, ROWS, SIZE, STRIDE, CHUNKS, HEAD_DIM, DIM, PRECISION,
        )  # fmt: skip


@triton.jit
def _add(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def _measure(x, slope, tau, exponent, SQUARE: tl.constexpr):
    """z, and the sums for ``root_step``: in one reduction, since the warps' exchange is what a pass costs."""
    z = above_threshold(x, slope, tau)
    p, u = power(z, exponent, SQUARE)
    return z, tl.reduce((p, u, is_positive(z)), 1, _add)


@triton.jit(do_not_specialize=["num_tokens", "num_chunks", "num_words", "init_chunks", "local_chunks"])
def threshold_kernel(
    product_ptr, alpha_ptr, words_ptr, peak_ptr, tau_ptr, lengths, score_scale, num_tokens, num_chunks, num_words,
    init_chunks, local_chunks,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, SQUARE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Threshold and selection words of one query head, all of its chunks (at most CHUNKS) at once.

    To be compiled without fused multiply-adds. Where a thread holds one chunk, a square would be fused into its sum
    with the neighbour's rounded one: threads of a warp would then hold sums, and thresholds, that differ in the last
    digit. The loop ends for all of them at once even so.
    """
    wait_for_kernel_before(PDL)
    flat_row = tl.program_id(0)
    head = flat_row % HEADS
    query = flat_row // HEADS
    sequence = query // num_tokens
    own = (tl.load(lengths + sequence) + query % num_tokens) // BLOCK
    chunk = tl.arange(0, CHUNKS)[None, :]
    alpha = tl.full([1], 1.5, tl.float32)
    if not SQUARE:
        alpha = tl.load(alpha_ptr + head + tl.arange(0, 1))
    slope = (alpha - 1.0) * score_scale
    exponent = ((2.0 - alpha) / (alpha - 1.0))[:, None]
    row = product_ptr + flat_row.to(tl.int64) * num_chunks
    # Loaded before it is known which are candidates: what lies behind these has no meaning.
    product = tl.load(row + chunk, mask=chunk < num_chunks, other=float("-inf"))
    candidate = (chunk >= init_chunks) & (chunk < own - local_chunks)
    forced = ((chunk < init_chunks) | (chunk >= own - local_chunks)) & (chunk <= own)
    count = tl.maximum(own - local_chunks - init_chunks, 0)
    product = tl.where(candidate, product, float("-inf"))
    peak = tl.where(count > 0, tl.max(product, 1), 0.0)
    x = product - peak[:, None]

    # The steps start at the left end of the bracket. No threshold lies right of the one for equal scores.
    highest = -tl.exp2((1.0 - alpha) * tl.log2(tl.maximum(count, 1).to(tl.float32)))
    tau = tl.full([1], -1.0, tl.float32)
    z, sums = _measure(x, slope, tau, exponent, SQUARE)
    better = root_step(tau, sums, alpha, highest, SQUARE)
    passes = 0
    while any_thread((count > 0) & (tl.max(unsolved(tau, better, sums[0], alpha).to(tl.int32), 0) > 0)) & (
        passes < MAX_PASSES
    ):
        tau = better
        z, sums = _measure(x, slope, tau, exponent, SQUARE)
        better = root_step(tau, sums, alpha, highest, SQUARE)
        passes += 1

    selected = (((z > 0) & candidate) | forced).to(tl.int32)
    words = tl.sum(tl.reshape(selected, (CHUNKS // 32, 32)) << tl.arange(0, 32)[None, :], 1)
    word = tl.arange(0, CHUNKS // 32)
    word_row = ((sequence * HEADS + head).to(tl.int64) * num_tokens + query % num_tokens) * num_words
    tl.store(words_ptr + word_row + word, words, mask=word < num_words)
    tl.store(peak_ptr + flat_row + tl.arange(0, 1), peak)
    tl.store(tau_ptr + flat_row + tl.arange(0, 1), tau)


@triton.jit
def _log_prior(product_ptr, flat_row, in_group, chunk, first, stop, num_chunks, peak, tau, slope, exponent,
               GROUP: tl.constexpr, SQUARE: tl.constexpr, SOFTMAX: tl.constexpr):  # fmt: skip
    """log of the group's mean probability of some chunks, and where it is positive: candidates from ``first`` to
    ``stop``."""
    candidate = (chunk >= first) & (chunk < stop)
    products = tl.load(
        product_ptr + flat_row[:, None] * num_chunks + chunk[None, :],
        mask=in_group[:, None] & candidate[None, :],
        other=float("-inf"),
    )
    if SOFTMAX:
        return log_mean_of_logs(products * slope[:, None] - tau[:, None], 0, GROUP)
    else:
        return log_mean(above_threshold(products - peak[:, None], slope, tau), exponent[:, None], 0, GROUP, SQUARE)


@triton.jit(do_not_specialize=["num_tokens", "num_chunks", "num_words", "init_chunks", "local_chunks"])
def prior_kernel(
    product_ptr, alpha_ptr, peak_ptr, tau_ptr, words_ptr, bias_ptr, lengths, score_scale, inverse_sigma, num_tokens,
    num_chunks, num_words, init_chunks, local_chunks,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_P: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
    SQUARE: tl.constexpr, TEMPERED: tl.constexpr, SOFTMAX: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The group's prior of CHUNKS chunks up to the query's own, of use where they are selected; that of its own and of
    forced ones is 0.

    SOFTMAX: tau are base-2 log-normalisers, there is no peak, and the words [B, H, T, W] say what is selected.
    """
    wait_for_kernel_before(PDL)
    kv_head = tl.program_id(0) % KV_HEADS
    query = tl.program_id(0) // KV_HEADS
    own = (tl.load(lengths + query // num_tokens) + query % num_tokens) // BLOCK
    if tl.program_id(1) * CHUNKS > own:
        return
    member = tl.arange(0, GROUP_P)
    in_group = member < GROUP
    flat_row = query.to(tl.int64) * (KV_HEADS * GROUP) + kv_head * GROUP + member
    alpha = tl.full([GROUP_P], 1.5, tl.float32)
    if not SQUARE:
        alpha = tl.load(alpha_ptr + kv_head * GROUP + member, mask=in_group, other=1.5)
    slope = (alpha - 1.0) * score_scale
    exponent = (2.0 - alpha) / (alpha - 1.0)
    tau = tl.load(tau_ptr + flat_row, mask=in_group, other=0.0)
    if SOFTMAX:
        slope = softmax_slope(slope, score_scale)
        peak = tau
    else:
        peak = tl.load(peak_ptr + flat_row, mask=in_group, other=0.0)
    lane = tl.arange(0, CHUNKS)
    mean = 0.0
    if TEMPERED:
        log_sum = tl.zeros([CHUNKS], tl.float32)
        count = tl.zeros([CHUNKS], tl.float32)
        for start in range(init_chunks, own - local_chunks, CHUNKS):
            log_p, selected = _log_prior(
                product_ptr, flat_row, in_group, start + lane, init_chunks, own - local_chunks, num_chunks, peak, tau,
                slope, exponent, GROUP, SQUARE, SOFTMAX,
            )  # fmt: skip
            if SOFTMAX:  # all of a softmax is positive
                word_row = query // num_tokens * KV_HEADS + kv_head
                word_row = (word_row.to(tl.int64) * num_tokens + query % num_tokens) * num_words
                word = tl.load(words_ptr + word_row + (start + lane) // 32, mask=selected, other=0)
                selected &= ((word >> ((start + lane) % 32)) & 1) != 0
                log_p = tl.where(selected, log_p, 0.0)
            log_sum += log_p
            count += selected.to(tl.float32)
        mean = tl.sum(log_sum, 0) / tl.maximum(tl.sum(count, 0), 1.0)
    chunk = tl.program_id(1) * CHUNKS + lane
    log_p, selected = _log_prior(
        product_ptr, flat_row, in_group, chunk, init_chunks, own - local_chunks, num_chunks, peak, tau, slope, exponent,
        GROUP, SQUARE, SOFTMAX,
    )  # fmt: skip
    log_p = (tl.where(selected, log_p, EDGE_LOG_P) - mean) * inverse_sigma
    log_p = tl.where((chunk >= init_chunks) & (chunk < own - local_chunks), log_p, 0.0)
    row = bias_ptr + (query.to(tl.int64) * KV_HEADS + kv_head) * num_chunks
    tl.store(row + chunk, log_p, mask=chunk <= own)


@dataclass(frozen=True)
class NewToken:
    """A token that is to be written while another kernel works.

    Attributes:
        k, v: [B, 1, H, D].
        cache_k, cache_v: [B, S, H, D], where they go, behind every length.
        chunk_query: [H, D], pools the chunks that it completes.
    """

    k: Tensor
    v: Tensor
    cache_k: Tensor
    cache_v: Tensor
    chunk_query: Tensor


def multiply(
    q: Tensor, keys: Tensor, lengths: Tensor, tokens_per_key: tuple[int, int], new: NewToken | None = None
) -> Tensor:
    """Products, float32 [B * T * Hq, J], of q [B, T, Hq, D], contiguous, with the visible keys [B, J, H, D].

    ``new``: the token that q is of, to be written besides; the keys are the summaries of chunks of a power of 2.
    """
    batch, num_tokens, heads, head_dim = q.shape
    num_keys, kv_heads = keys.shape[1:3]
    products = torch.empty(batch * num_tokens * heads, num_keys, dtype=torch.float32, device=q.device)
    rows = batch * num_tokens * kv_heads
    tile = 32 if rows * num_keys >= 32 * processors(q.device) else 16  # some for every multiprocessor
    token = (None,) * 6 + (0,) * 3
    if new is not None:
        parts = new.k.contiguous(), new.v.contiguous(), new.cache_k, new.cache_v, new.chunk_query.contiguous()
        token = *parts, head_dim**-0.5, *new.cache_k.stride()[:3]
    product_kernel[(rows, -(-num_keys // tile) + (new is not None))](
        q, keys, products, lengths, *keys.stride()[:3], num_tokens, num_keys, *token,
        KV_HEADS=kv_heads, GROUP=heads // kv_heads, ROWS=max(16, power_of_2_from(heads // kv_heads)),
        SIZE=tokens_per_key[0], STRIDE=tokens_per_key[1], CHUNKS=tile, HEAD_DIM=head_dim,
        DIM=max(16, power_of_2_from(head_dim)), PRECISION=precision(q.dtype), NEW=new is not None,
        num_warps=4, **overlapped_launch(q.device),
    )  # fmt: skip
    return products


def route(
    q: Tensor, summaries: Tensor, lengths: Tensor, alpha: Tensor | None, chunk_size: int, score_scale: float,
    has_bias: bool, sigma: float | None, forced: tuple[int, int] = (0, 0), new: NewToken | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Selection words of every query head, int32 [B, Hq, T, W], and with ``has_bias`` the prior, float32 [B, T, H, N].

    Args:
        q: [B, T, Hq, D], contiguous.
        summaries: [B, N, H, D] of the cache.
        alpha: float32 [Hq], or None for 1.5 everywhere.
        sigma: None for the raw prior.
        forced: ``init_chunks`` and ``local_chunks``.
        new: as in ``multiply``.
    """
    batch, num_tokens, heads, _ = q.shape
    num_chunks = summaries.shape[1]
    queries = batch * num_tokens
    forced = clamp_forced(forced, num_chunks)
    # A query sees a chunk from the first token after it on.
    products = multiply(q, summaries, lengths, (chunk_size + 1, chunk_size), new)
    peak, tau = torch.empty(2, queries * heads, dtype=torch.float32, device=q.device)
    words = torch.empty(batch, heads, num_tokens, -(-num_chunks // 32), dtype=torch.int32, device=q.device)
    chunks = max(32, power_of_2_from(num_chunks))
    # 16 chunks a thread: less, and the warps' waiting for each other costs more than it saves.
    threshold_kernel[(queries * heads,)](
        products, alpha, words, peak, tau, lengths, score_scale, num_tokens, num_chunks, words.shape[-1], *forced,
        HEADS=heads, BLOCK=chunk_size, CHUNKS=chunks, SQUARE=alpha is None, num_warps=max(1, min(16, chunks // 512)),
        enable_fp_fusion=False, **overlapped_launch(q.device),
    )  # fmt: skip
    if not has_bias:
        return words, None
    bias = prior_bias(q, summaries, products, lengths, alpha, peak, tau, None, chunk_size, score_scale, sigma, forced)
    return words, bias


def prior_bias(
    q: Tensor, summaries: Tensor, products: Tensor, lengths: Tensor, alpha: Tensor | None, peak: Tensor | None,
    tau: Tensor, words: Tensor | None, chunk_size: int, score_scale: float, sigma: float | None,
    forced: tuple[int, int],
) -> Tensor:  # fmt: skip
    """The prior, float32 [B, T, H, N], of the products of ``multiply``.

    Args:
        peak, tau: of every row of the products; of a softmax no peak, and the base-2 log-normaliser.
        words: of a softmax, int32 [B, H, T, W].
    """
    batch, num_tokens, heads, _ = q.shape
    num_chunks, kv_heads = summaries.shape[1:3]
    bias = torch.empty(batch, num_tokens, kv_heads, num_chunks, dtype=torch.float32, device=q.device)
    tile, group = 128, heads // kv_heads
    prior_kernel[(batch * num_tokens * kv_heads, -(-num_chunks // tile))](
        products, alpha, peak, tau, words, bias, lengths, score_scale, 1.0 if sigma is None else 1.0 / sigma,
        num_tokens, num_chunks, 0 if words is None else words.shape[-1], *forced, KV_HEADS=kv_heads, GROUP=group,
        GROUP_P=power_of_2_from(group), BLOCK=chunk_size, CHUNKS=tile, SQUARE=alpha is None,
        TEMPERED=sigma is not None, SOFTMAX=words is not None, num_warps=4, **overlapped_launch(q.device),
    )  # fmt: skip
    return bias
