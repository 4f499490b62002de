"""Triton kernels of routing by a softmax for decoding: from products with compressed keys to top-k or top-p blocks.

A program per query head normalises its softmax, programs that share the blocks pool the group's probabilities, and a
program per query and KV head holds all block scores in registers and takes the highest. For DashAttention's softmax
selectors a chunk is a window of its own.

Shapes: B sequences, T new tokens, Hq query heads, H KV heads, D head size, J windows, N blocks, W words of 32 blocks. q
[B, T, Hq, D]; compressed keys [B, J, H, D]; products float32 [B, T, Hq, J]; normalisers float32 [B, T, Hq]; scores
float32 [B, T, H, N]; words int32 [B, H, T, W].
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dashattn.ops.block_scores.triton_search import INFINITY_BITS, rank_of_bits
from dashattn.ops.block_scores.triton_select import wanted_mass
from dashattn.ops.dash_routing.triton_entmax import log2_sum
from dashattn.ops.dash_routing.triton_forward import clamp_forced
from dashattn.ops.decode.triton_attention import visible_count
from dashattn.ops.decode.triton_routing import NewToken, multiply, prior_bias
from dashattn.ops.tiles import LOG2E, overlapped_launch, power_of_2_from, wait_for_kernel_before


@triton.jit(do_not_specialize=["num_tokens", "num_windows", "first", "behind"])
def normaliser_kernel(
    product_ptr, normaliser_ptr, lengths, scale_log2, num_tokens, num_windows, first, behind,
    HEADS: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, WINDOWS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Base-2 logarithm of the sum of one query head's exponentials over its visible windows (at most WINDOWS), from
    ``first`` on and without the last ``behind``."""
    wait_for_kernel_before(PDL)
    flat_row = tl.program_id(0)
    query = flat_row // HEADS
    visible = visible_count(tl.load(lengths + query // num_tokens) + query % num_tokens, SIZE, STRIDE)
    window = tl.arange(0, WINDOWS)
    counts = (window >= first) & (window < visible - behind)
    product = tl.load(product_ptr + flat_row.to(tl.int64) * num_windows + window, mask=counts, other=float("-inf"))
    logits = product * scale_log2
    any_counts = visible - behind > first
    peak = tl.where(any_counts, tl.max(logits, 0), 0.0)
    total = tl.sum(tl.exp2(logits - peak), 0)
    tl.store(normaliser_ptr + flat_row, peak + tl.log2(tl.where(any_counts, total, 1.0)))


@triton.jit(do_not_specialize=["num_tokens", "num_windows", "num_blocks"])
def score_kernel(
    product_ptr, normaliser_ptr, score_ptr, lengths, scale_log2, num_tokens, num_windows, num_blocks,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_P: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, MAX: tl.constexpr, BY_LOGS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Scores of BLOCKS blocks up to the query's own, from the probabilities of the windows that touch them.

    BY_LOGS: their base-2 logarithms, as in ``block_scores.triton_select``.
    """
    wait_for_kernel_before(PDL)
    kv_head = tl.program_id(0) % KV_HEADS
    query = tl.program_id(0) // KV_HEADS
    position = tl.load(lengths + query // num_tokens) + query % num_tokens
    if tl.program_id(1) * BLOCKS > position // BLOCK:
        return
    visible = visible_count(position, SIZE, STRIDE)
    member = tl.arange(0, GROUP_P)
    in_group = member < GROUP
    flat_row = query.to(tl.int64) * (KV_HEADS * GROUP) + kv_head * GROUP + member
    normaliser = tl.load(normaliser_ptr + flat_row, mask=in_group, other=0.0)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    score = tl.full([BLOCKS], float("-inf") if BY_LOGS else 0.0, tl.float32)
    for offset in tl.static_range(1 - SIZE // STRIDE, BLOCK // STRIDE):
        window = block * (BLOCK // STRIDE) + offset
        seen = (window >= 0) & (window < visible)
        product = tl.load(
            product_ptr + flat_row[:, None] * num_windows + window[None, :],
            mask=in_group[:, None] & seen[None, :],
            other=float("-inf"),
        )
        log_p = product * scale_log2 - normaliser[:, None]
        if BY_LOGS:
            p, seen = log2_sum(log_p, 0)
            p = tl.where(seen, p, float("-inf"))
        else:
            p = tl.sum(tl.exp2(log_p), 0)
        if MAX:
            score = tl.maximum(score, p)
        else:
            shared = min(offset * STRIDE + SIZE, BLOCK) - max(offset * STRIDE, 0)
            score += p * (shared / STRIDE)
    row = score_ptr + (query.to(tl.int64) * KV_HEADS + kv_head) * num_blocks
    tl.store(row + block, score, mask=block < num_blocks)


@triton.jit(do_not_specialize=["num_tokens", "num_blocks", "num_words"])
def topk_kernel(
    score_ptr, words_ptr, lengths, num_tokens, num_blocks, num_words, topk, wanted_mass, init_blocks, local_blocks,
    KV_HEADS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, TOP_P: tl.constexpr, BY_LOGS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Selection words of the ``topk`` highest of at most BLOCKS scores, or of the forced blocks and of as many of the
    highest others as sum to ``wanted_mass``; ties go to the lower index."""
    wait_for_kernel_before(PDL)
    kv_head = tl.program_id(0) % KV_HEADS
    query = tl.program_id(0) // KV_HEADS
    own = (tl.load(lengths + query // num_tokens) + query % num_tokens) // BLOCK
    block = tl.arange(0, BLOCKS)
    row = score_ptr + (query.to(tl.int64) * KV_HEADS + kv_head) * num_blocks
    score = tl.load(row + block, mask=block <= own, other=0.0)
    # The bits of numbers that are not negative order as the numbers do.
    key = score.to(tl.int32, bitcast=True)
    if BY_LOGS:
        key = tl.minimum(rank_of_bits(key), INFINITY_BITS)
    forced = ((block < init_blocks) | (block > own - local_blocks)) & (block <= own)
    key = tl.where(forced, -1 if TOP_P else 0x7FFFFFFF, key)
    key = tl.where(block <= own, key, -1)
    # The highest key that ``topk`` of them reach, bit by bit; 0 if there are fewer. (Two bits at a time are slower.)
    bound = own * 0
    for bit in tl.static_range(30, -1, -1):
        higher = bound | (1 << bit)
        if TOP_P:
            reached = tl.sum(tl.where(key >= higher, score, 0.0), 0) >= wanted_mass
        else:
            reached = tl.sum((key >= higher).to(tl.int32), 0) >= topk
        bound = tl.where(reached, higher, bound)
    above = key > bound
    level = (key == bound).to(tl.int32)
    if TOP_P:
        tie = bound.to(tl.float32, bitcast=True)
        missing = wanted_mass - tl.sum(tl.where(above, score, 0.0), 0)
        missing = tl.where(tie > 0, missing / tl.where(tie > 0, tie, 1.0), 1e9)
        room = tl.maximum(tl.ceil(tl.minimum(missing, 1e9)).to(tl.int32), 1)
        above |= forced
    else:
        room = topk - tl.sum(above.to(tl.int32), 0)
    selected = (above | ((level != 0) & (tl.cumsum(level, 0) <= room))).to(tl.int32)
    words = tl.sum(tl.reshape(selected, (BLOCKS // 32, 32)) << tl.arange(0, 32)[None, :], 1)
    word = tl.arange(0, BLOCKS // 32)
    word_row = ((query // num_tokens * KV_HEADS + kv_head).to(tl.int64) * num_tokens + query % num_tokens) * num_words
    tl.store(words_ptr + word_row + word, words, mask=word < num_words)


def select(
    q: Tensor, compressed_k: Tensor, lengths: Tensor, *, kernel_size: int, kernel_stride: int, block_size: int,
    pooling: str, topk: int, init_blocks: int, local_blocks: int, scale: float,
) -> Tensor:  # fmt: skip
    """Selection words, int32 [B, H, T, W], of q [B, T, Hq, D], contiguous, with compressed keys [B, J, H, D]."""
    windows = (kernel_size, kernel_stride)
    products = multiply(q, compressed_k, lengths, windows)
    words, _ = _rank(
        q, compressed_k, products, lengths, windows, block_size, pooling, topk, None, init_blocks, local_blocks, (0, 0),
        scale,
    )  # fmt: skip
    return words


def route(
    q: Tensor, summaries: Tensor, lengths: Tensor, chunk_size: int, score_scale: float, topk: int, top_p: float | None,
    has_bias: bool, sigma: float | None, forced: tuple[int, int] = (0, 0), new: NewToken | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """As ``triton_routing.route``, by a softmax: words int32 [B, H, T, W]. ``topk`` counts where ``top_p`` is None."""
    windows = (chunk_size + 1, chunk_size)  # a query sees a chunk from the first token after it on
    forced = clamp_forced(forced, summaries.shape[1])
    products = multiply(q, summaries, lengths, windows, new)
    words, normalisers = _rank(
        q, summaries, products, lengths, windows, chunk_size, "max", min(topk, 4 * summaries.shape[1]), top_p,
        forced[0], forced[1] + 1, forced, score_scale,
    )  # fmt: skip
    if not has_bias:
        return words, None
    bias = prior_bias(
        q, summaries, products, lengths, None, None, normalisers, words, chunk_size, score_scale, sigma, forced
    )
    return words, bias


def _rank(
    q: Tensor, keys: Tensor, products: Tensor, lengths: Tensor, windows: tuple[int, int], block_size: int, pooling: str,
    topk: int, top_p: float | None, init_blocks: int, local_blocks: int, left_out: tuple[int, int], scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Words, and normalisers that leave out so many windows at the beginning and at the end."""
    batch, num_tokens, heads, _ = q.shape
    num_windows, kv_heads = keys.shape[1:3]
    queries, group = batch * num_tokens, heads // kv_heads
    num_blocks = num_windows * windows[1] // block_size
    sizes = dict(SIZE=windows[0], STRIDE=windows[1])
    normalisers = torch.empty(queries * heads, dtype=torch.float32, device=q.device)
    width = power_of_2_from(num_windows)
    normaliser_kernel[(queries * heads,)](
        products, normalisers, lengths, scale * LOG2E, num_tokens, num_windows, *left_out, HEADS=heads, WINDOWS=width,
        **sizes, num_warps=max(4, min(16, width // 512)), **overlapped_launch(q.device),
    )  # fmt: skip
    scores = torch.empty(queries * kv_heads, num_blocks, dtype=torch.float32, device=q.device)
    tile, by_logs = 32, pooling == "max" and top_p is None
    score_kernel[(queries * kv_heads, -(-num_blocks // tile))](
        products, normalisers, scores, lengths, scale * LOG2E, num_tokens, num_windows, num_blocks,
        KV_HEADS=kv_heads, GROUP=group, GROUP_P=power_of_2_from(group), BLOCK=block_size, BLOCKS=tile,
        MAX=pooling == "max", BY_LOGS=by_logs, **sizes, num_warps=4, **overlapped_launch(q.device),
    )  # fmt: skip
    words = torch.empty(batch, kv_heads, num_tokens, -(-num_blocks // 32), dtype=torch.int32, device=q.device)
    width = max(32, power_of_2_from(num_blocks))
    topk_kernel[(queries * kv_heads,)](
        scores, words, lengths, num_tokens, num_blocks, words.shape[-1], topk, wanted_mass(top_p, group), init_blocks,
        local_blocks, KV_HEADS=kv_heads, BLOCK=block_size, BLOCKS=width, TOP_P=top_p is not None, BY_LOGS=by_logs,
        num_warps=max(4, min(16, width // 512)), **overlapped_launch(q.device),
    )  # fmt: skip
    return words, normalisers
