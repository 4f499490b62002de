"""Triton kernel that selects blocks by attention over compressed keys (InfLLM v2, NSA).

Given the log-normalisers of a first pass, a program forms the probabilities of a tile of tokens again (q k^T on the
tensor cores), sums them over the group, pools them to blocks and finds each token's best: no probability leaves the
chip. Block scores do, into a scratch of the program's own, which its tiles reuse and the L2 cache holds:
PROGRAMS * 8 bytes * tokens of a tile * blocks, 17 MiB at 64k tokens with groups of 16.

At 32k tokens, 32 heads and a stride of 16 there are 1.1e9 causal (row, window) pairs: 0.27 TFLOP of products, as in the
first pass. Their pooled scores are a 64th of that, so a search that reads those a handful of times is cheap. It
narrows, in the float32 bit patterns (scores are not negative, so they are ordered as integers), an interval that holds
the k-th score, 9-fold a step, until what it holds is exactly what is wanted of it, or a single value: the blocks of
that value tie, and the lowest win. Max-pooling makes such ties common: neighbouring blocks share a window. With TOP_P
it is the score at which the sum of all that are as high reaches what is wanted.

Shapes as in ``band/triton_forward``, with N blocks of BLOCK tokens and W words of 32 blocks: words int32 [H, n, W];
scratch float32 [programs, 2, tokens of a tile, row_stride >= N]. The windows that begin in a block give to it, in the
first plane, and to the block after it, in the second.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from dashattn.ops.band.triton_forward import Band, band_constants, visible_keys
from dashattn.ops.block_sparse.triton_forward import key_descriptor, stages_that_fit
from dashattn.ops.tiles import LOG2E, Geometry, locate_tile, query_rows
from dashattn.ops.tuning import around, launch

PROBES = tl.constexpr(8)
INFINITY_BITS = tl.constexpr(0x7F800000)
# The first probes lie three octaves apart from 2 ** -16 on: in most cases one interval of them holds the k-th score.
FIRST_PROBE = tl.constexpr((127 - 16) << 23)
FIRST_STEP = tl.constexpr(3 << 23)
# Four for each multiprocessor of an H100 or H200. They take tiles until none is left: it matters not how many run.
PROGRAMS = 528


@triton.jit
def _pool(k_desc, q, lse, stop, kv_head, first_key, key, scale_log2, scratch, plane, row_stride,
          TOKENS: tl.constexpr, GROUP_P: tl.constexpr, KEYS: tl.constexpr, RATIO: tl.constexpr,
          OVERLAP: tl.constexpr, MAX_POOLING: tl.constexpr, DIM: tl.constexpr, MASKED: tl.constexpr,
          PRECISION: tl.constexpr):  # fmt: skip
    """Block scores of KEYS windows: of the block that a window begins in, and, apart, of the one it ends in."""
    BLOCKS: tl.constexpr = KEYS // RATIO
    k = k_desc.load([kv_head, first_key + key, 0]).reshape(KEYS, DIM)
    logits = tl.dot(k, q.T, input_precision=PRECISION)
    p = tl.exp2(logits * scale_log2 - lse[None, :])
    if MASKED:
        p = tl.where((key + tl.arange(0, KEYS))[:, None] < stop[None, :], p, 0.0)
    p = tl.sum(tl.reshape(p, (KEYS, TOKENS, GROUP_P)), 2)
    p = tl.reshape(p, (BLOCKS, RATIO, TOKENS))
    # A window covers OVERLAP strides, a block RATIO.
    place = tl.arange(0, RATIO)
    beyond = tl.maximum(place + OVERLAP - RATIO, 0)
    if MAX_POOLING:
        own = tl.max(p, 1)
        following = tl.max(tl.where((beyond > 0)[None, :, None], p, 0.0), 1)
    else:
        own = tl.sum(p * (OVERLAP - beyond).to(tl.float32)[None, :, None], 1)
        following = tl.sum(p * beyond.to(tl.float32)[None, :, None], 1)
    place = tl.arange(0, TOKENS)[None, :] * row_stride + (key // RATIO + tl.arange(0, BLOCKS))[:, None]
    tl.store(scratch + place, own)
    tl.store(scratch + plane + place, following)


@triton.jit
def _score_bits(scratch, plane, row_stride, block, own, init_blocks, local_blocks, ranked, TOKENS: tl.constexpr,
                MAX_POOLING: tl.constexpr):  # fmt: skip
    """Bit patterns of the scores of some blocks [TOKENS, blocks]; -1 where a block does not compete."""
    place = scratch + tl.arange(0, TOKENS)[:, None] * row_stride + block[None, :]
    competes = (block >= init_blocks)[None, :] & (block[None, :] <= (own - local_blocks)[:, None]) & ranked[:, None]
    score = tl.load(place, mask=competes, other=0.0)
    before = tl.load(place + plane - 1, mask=competes & (block > 0)[None, :], other=0.0)
    score = tl.maximum(score, before) if MAX_POOLING else score + before
    return tl.where(competes, score.to(tl.int32, bitcast=True), -1)


@triton.jit
def _select_tile(
    tile, q_ptr, k_desc, lse_ptr, words, scratch, documents, key_starts, scale_log2, num_tokens, num_words, num_slots,
    num_documents, row_stride, topk, wanted_mass, init_blocks, local_blocks,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_P: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
    KEYS: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, MAX_POOLING: tl.constexpr, TOP_P: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr, SEARCHED: tl.constexpr,
):  # fmt: skip
    # Late tiles have most to do and go first.
    kv_head = tile % KV_HEADS
    document, start, end, index = locate_tile(documents, num_slots - 1 - tile // KV_HEADS, num_documents, TOKENS)
    first_key = tl.load(key_starts + document)
    plane = TOKENS * row_stride
    RATIO: tl.constexpr = BLOCK // STRIDE

    token_position = index * TOKENS + tl.arange(0, TOKENS)
    in_document = start + token_position < end
    own = tl.where(in_document, token_position // BLOCK, -1)
    last_own = tl.max(own, 0)
    # Where there are no more blocks than topk, all are taken. Elsewhere the forced ones leave ``free`` to compete for.
    if TOP_P:
        topk = init_blocks + local_blocks
        free = 1
    else:
        free = topk - init_blocks - local_blocks
    ranked = (own >= topk) & (free > 0)
    unsolved = (last_own >= topk) & (free > 0)

    if unsolved:
        position, _, valid, flat_row, offset, in_tile = query_rows(
            start, end, index * TOKENS, kv_head, KV_HEADS, GROUP, GROUP_P, TOKENS, HEAD_DIM, DIM
        )
        q = tl.load(q_ptr + offset, mask=in_tile, other=0.0)
        lse = tl.load(lse_ptr + flat_row, mask=valid, other=float("inf"))
        stop = visible_keys(position, SIZE, STRIDE)
        keys = (last_own - local_blocks + 1) * RATIO
        whole = tl.minimum(keys, visible_keys(index * TOKENS, SIZE, STRIDE)) // KEYS * KEYS
        for key in range(0, whole, KEYS):
            _pool(
                k_desc, q, lse, stop, kv_head, first_key, key, scale_log2, scratch, plane, row_stride, TOKENS, GROUP_P,
                KEYS, RATIO, SIZE // STRIDE, MAX_POOLING, DIM, False, PRECISION,
            )  # fmt: skip
        for key in range(whole, keys, KEYS):
            _pool(
                k_desc, q, lse, stop, kv_head, first_key, key, scale_log2, scratch, plane, row_stride, TOKENS, GROUP_P,
                KEYS, RATIO, SIZE // STRIDE, MAX_POOLING, DIM, True, PRECISION,
            )  # fmt: skip
        tl.debug_barrier()  # the scores of one thread are read by others

    # ``wanted`` blocks compete successfully. At least that many score ``low`` or more (``count_low``), fewer than that
    # ``high`` or more (``count_high``).
    wanted = tl.where(ranked, free, 0)
    low = tl.zeros([TOKENS], tl.int32)
    high = tl.full([TOKENS], INFINITY_BITS, tl.int32)
    count_low = tl.where(ranked, own - local_blocks + 1 - init_blocks, 0)
    count_high = tl.zeros([TOKENS], tl.int32)
    mass_high = tl.zeros([TOKENS], tl.float32)
    base = tl.full([TOKENS], FIRST_PROBE, tl.int32)
    step = tl.full([TOKENS], FIRST_STEP, tl.int32)
    while unsolved:
        probe = base[:, None] + step[:, None] * tl.arange(0, PROBES)[None, :]
        count = tl.zeros([TOKENS, PROBES], tl.int32)
        mass = tl.zeros([TOKENS, PROBES], tl.float32)
        for first in range(0, last_own - local_blocks + 1, SEARCHED):
            block = first + tl.arange(0, SEARCHED)
            bits = _score_bits(
                scratch, plane, row_stride, block, own, init_blocks, local_blocks, ranked, TOKENS, MAX_POOLING
            )
            reached = bits[:, :, None] >= probe[:, None, :]
            count += tl.sum(reached.to(tl.int32), 1)
            if TOP_P:
                score = tl.where(bits >= 0, bits, 0).to(tl.float32, bitcast=True)
                mass += tl.sum(tl.where(reached, score[:, :, None], 0.0), 1)
        if TOP_P:
            enough = mass >= wanted_mass
            mass_high = tl.maximum(mass_high, tl.max(tl.where(enough, 0.0, mass), 1))
        else:
            enough = count >= wanted[:, None]
        passed = tl.sum(enough.to(tl.int32), 1)
        count_low = tl.minimum(count_low, tl.min(tl.where(enough, count, 0x7FFFFFFF), 1))
        count_high = tl.maximum(count_high, tl.max(tl.where(enough, 0, count), 1))
        low = tl.where(passed > 0, base + (passed - 1) * step, low)
        high = tl.where(passed < PROBES, tl.minimum(high, base + passed * step), high)
        surplus = count_low - count_high > 1 if TOP_P else count_low > wanted
        unsolved = tl.max((surplus & (high - low > 1)).to(tl.int32), 0) > 0
        step = (high - low + PROBES) // (PROBES + 1)
        base = low + step

    if TOP_P:
        # One block alone is between, or blocks of one score: as many of them as it takes.
        tie = low.to(tl.float32, bitcast=True)
        missing = tl.where(tie > 0, (wanted_mass - mass_high) / tl.where(tie > 0, tie, 1.0), 1e9)
        missing = tl.ceil(tl.minimum(missing, 1e9)).to(tl.int32)
        wanted = count_high + tl.where(high - low > 1, 1, tl.maximum(missing, 1))

    token = (start + token_position).to(tl.int64)
    word_row = words + (kv_head.to(tl.int64) * num_tokens + token) * num_words
    taken = tl.zeros([TOKENS], tl.int32)
    for first in range(0, last_own + 1, SEARCHED):
        block = first + tl.arange(0, SEARCHED)
        bits = _score_bits(
            scratch, plane, row_stride, block, own, init_blocks, local_blocks, ranked, TOKENS, MAX_POOLING
        )
        tied = ((bits >= low[:, None]) & (bits < high[:, None])).to(tl.int32)
        place = taken[:, None] + tl.cumsum(tied, 1)
        taken += tl.sum(tied, 1)
        forced = (
            (block < init_blocks)[None, :] | (block[None, :] > (own - local_blocks)[:, None]) | (own < topk)[:, None]
        )
        chosen = (bits >= high[:, None]) | ((tied != 0) & (place <= (wanted - count_high)[:, None])) | forced
        chosen &= block[None, :] <= own[:, None]
        chosen = tl.reshape(chosen.to(tl.int32), (TOKENS, SEARCHED // 32, 32)) << tl.arange(0, 32)[None, None, :]
        word = first // 32 + tl.arange(0, SEARCHED // 32)
        in_words = in_document[:, None] & (word < num_words)[None, :]
        tl.store(word_row[:, None] + word[None, :], tl.sum(chosen, 2), mask=in_words)
    tl.debug_barrier()  # the next tile overwrites the scratch


@triton.jit(
    do_not_specialize=[
        "num_tokens", "num_words", "num_slots", "num_documents", "row_stride", "topk", "init_blocks", "local_blocks",
    ]
)  # fmt: skip
def select_kernel(
    q_ptr, k_desc, lse_ptr, words, scratch, next_tile, documents, key_starts, scale_log2, num_tokens, num_words,
    num_slots, num_documents, row_stride, topk, wanted_mass, init_blocks, local_blocks,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_P: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
    KEYS: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, MAX_POOLING: tl.constexpr, TOP_P: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr, SEARCHED: tl.constexpr,
):  # fmt: skip
    scratch += tl.program_id(0).to(tl.int64) * (2 * TOKENS * row_stride)
    tile = tl.atomic_add(next_tile, 1)
    while tile < num_slots * KV_HEADS:
        _select_tile(
            tile, q_ptr, k_desc, lse_ptr, words, scratch, documents, key_starts, scale_log2, num_tokens, num_words,
            num_slots, num_documents, row_stride, topk, wanted_mass, init_blocks, local_blocks, KV_HEADS, GROUP,
            GROUP_P, TOKENS, BLOCK, KEYS, SIZE, STRIDE, MAX_POOLING, TOP_P, HEAD_DIM, DIM, PRECISION, SEARCHED,
        )  # fmt: skip
        tile = tl.atomic_add(next_tile, 1)


@cache
def select_options(dim: int, itemsize: int) -> dict:
    """Rows of a tile, and launch options: three programs fit a multiprocessor with heads of 128."""
    if itemsize == 4:
        return dict(rows=32, launch=around(4, 1))
    return dict(rows=64, launch=around(4, stages_that_fit(64 * dim * itemsize, 64 * dim * itemsize, 2)))


def wanted_mass(top_p: float | None, group: int) -> float:
    """What the scores of a group's selected blocks are to sum to; more than they can where all are wanted."""
    return 1e30 if top_p == 1 else group * (top_p or 0.0)


def select(
    q: Tensor, k: Tensor, lse: Tensor, starts: Tensor, geo: Geometry, band: Band, num_blocks: int, block_size: int,
    topk: int, init_blocks: int, local_blocks: int, max_pooling: bool, scale: float, top_p: float | None = None,
) -> Tensor:  # fmt: skip
    """Selection words int32 [H, n, W].

    Args:
        lse: base-2 log-normalisers, float32 [n, Hq], of the same products.
        top_p: in place of ``topk``: the fewest blocks beside the forced ones whose scores, on average over the heads of
            a group, sum to it; 1 takes all.
    """
    words = torch.zeros(geo.kv_heads, geo.tokens, -(-num_blocks // 32), dtype=torch.int32, device=q.device)
    options = select_options(geo.padded_dim, q.itemsize)
    constants = band_constants(geo, band, q.dtype, options["rows"])
    slots = geo.slots(constants["TOKENS"])
    programs = min(PROGRAMS, slots * geo.kv_heads)
    row_stride = -(-num_blocks // 128) * 128  # a tile of windows ends where the next begins, past the last block
    scratch = torch.empty(programs, 2, constants["TOKENS"], row_stride, dtype=torch.float32, device=q.device)
    next_tile = torch.zeros(1, dtype=torch.int32, device=q.device)
    launch(
        select_kernel, (programs,),
        q, key_descriptor(k, geo, constants["KEYS"]), lse, words, scratch, next_tile, geo.documents, starts,
        scale * LOG2E, geo.tokens, words.shape[-1], slots, geo.num_documents, row_stride, topk,
        wanted_mass(top_p, geo.group), init_blocks, local_blocks, BLOCK=block_size, MAX_POOLING=max_pooling,
        TOP_P=top_p is not None, SEARCHED=max(32, 1024 // constants["TOKENS"]),
        options=options["launch"], tokens=geo.tokens, restore=[next_tile], **constants,
    )  # fmt: skip
    return words
