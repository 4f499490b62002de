"""Triton kernel that selects blocks by attention over compressed keys (InfLLM v2, NSA).

Given the log-normalisers of a first pass, a program forms the probabilities of a tile of tokens again (k q^T on the
tensor cores), sums them over the group, pools them to blocks and finds each token's best: no probability leaves the
chip. Block scores do, into a scratch of the program's own, which its tiles reuse and the L2 cache holds:
PROGRAMS * 8 bytes * tokens of a tile * blocks, at most 132 MiB at 64k tokens in blocks of 64.

At 32k tokens, 32 heads and a stride of 16 there are 1.1e9 causal (row, window) pairs: 0.27 TFLOP of products, as in the
first pass. A tile is tokens, COLUMNS / TOKENS heads of the group at a time: heads are summed by the thread that holds
them, whatever their number, and a tile of keys is read once for all of them.

Of block scores there are N a token and KV head, so that small groups search many: 1.3e8 with 16 KV heads. Tokens lie
side by side in the scratch, so that a thread counts the scores of its own tokens, and threads exchange their counts
once a pass. The search narrows, in the float32 bit patterns (scores are not negative, so they are ordered as integers),
an interval that holds the k-th score, 9-fold a step and to the scores that are there, until what it holds is exactly
what is wanted of it, or a single value: the blocks of that value tie, and the lowest win. Max-pooling makes such ties
common: neighbouring blocks share a window. With TOP_P it is the score at which the sum of all that are as high reaches
what is wanted.

Shapes as in ``band/triton_forward``, with N blocks of BLOCK tokens and W words of 32 blocks: words int32 [H, n, W];
scratch int32 [programs, 2, scratch_blocks >= N, TOKENS]. The windows that begin in a block give to it, in the first
plane, and to the block after it, in the second; then the first plane has the bits of the sum or maximum of both.
"""

import math
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from dashattn.ops.band.triton_forward import Band, tile_keys, visible_keys
from dashattn.ops.block_sparse.triton_forward import key_descriptor, precision, stages_that_fit
from dashattn.ops.tiles import LOG2E, Geometry, locate_tile
from dashattn.ops.tuning import around, launch

INFINITY_BITS = tl.constexpr(0x7F800000)
# Four for each multiprocessor of an H100 or H200. They take tiles until none is left: it matters not how many run.
PROGRAMS = 528
PROBES = 8


@triton.jit
def _load_queries(q_ptr, lse_ptr, start, end, first, kv_head, part, GROUP: tl.constexpr, KV_HEADS: tl.constexpr,
                  TOKENS: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):  # fmt: skip
    """The ``part``-th HEADS heads of the group, [HEADS * TOKENS, DIM], and their log-normalisers."""
    column = tl.arange(0, HEADS * TOKENS)
    head = part * HEADS + column // TOKENS
    token = start + first + column % TOKENS
    valid = (token < end) & (head < GROUP)
    flat_row = token.to(tl.int64) * (KV_HEADS * GROUP) + kv_head * GROUP + head
    dim = tl.arange(0, DIM)
    in_tile = valid[:, None] & (dim < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + flat_row[:, None] * HEAD_DIM + dim[None, :], mask=in_tile, other=0.0)
    return q, tl.load(lse_ptr + flat_row, mask=valid, other=float("inf"))


@triton.jit
def _pool(k_desc, queries, stop, kv_head, first_key, key, scale_log2, scratch, plane, TOKENS: tl.constexpr,
          HEADS: tl.constexpr, PARTS: tl.constexpr, KEYS: tl.constexpr, RATIO: tl.constexpr, OVERLAP: tl.constexpr,
          MAX_POOLING: tl.constexpr, DIM: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Block scores of KEYS windows: of the block that a window begins in, and, apart, of the one it ends in."""
    BLOCKS: tl.constexpr = KEYS // RATIO
    k = k_desc.load([kv_head, first_key + key, 0]).reshape(KEYS, DIM)
    total = tl.zeros([KEYS, TOKENS], tl.float32)
    for part in tl.static_range(PARTS):
        logits = tl.dot(k, queries[2 * part].T, input_precision=PRECISION)
        p = tl.exp2(logits * scale_log2 - queries[2 * part + 1][None, :])
        if HEADS > 1:
            p = tl.sum(tl.reshape(p, (KEYS, HEADS, TOKENS)), 1)
        total += p
    if MASKED:
        total = tl.where((key + tl.arange(0, KEYS))[:, None] < stop[None, :], total, 0.0)
    total = tl.reshape(total, (BLOCKS, RATIO, TOKENS))
    # A window covers OVERLAP strides, a block RATIO.
    place = tl.arange(0, RATIO)
    beyond = tl.maximum(place + OVERLAP - RATIO, 0)
    if MAX_POOLING:
        own = tl.max(total, 1)
        following = tl.max(tl.where((beyond > 0)[None, :, None], total, 0.0), 1)
    else:
        own = tl.sum(total * (OVERLAP - beyond).to(tl.float32)[None, :, None], 1)
        following = tl.sum(total * beyond.to(tl.float32)[None, :, None], 1)
    place = (key // RATIO + tl.arange(0, BLOCKS))[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
    tl.store(scratch + place, own.to(tl.int32, bitcast=True))
    tl.store(scratch + plane + place, following.to(tl.int32, bitcast=True))


@triton.jit
def _competing_bits(scratch, plane, block, own, init_blocks, local_blocks, ranked, TOKENS: tl.constexpr,
                    MAX_POOLING: tl.constexpr):  # fmt: skip
    """Bit patterns of the scores of some blocks [blocks, TOKENS]; -1 where a block does not compete."""
    place = scratch + block[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
    competes = (block >= init_blocks)[:, None] & (block[:, None] <= (own - local_blocks)[None, :]) & ranked[None, :]
    score = tl.load(place, mask=competes, other=0).to(tl.float32, bitcast=True)
    before = tl.load(place + plane - TOKENS, mask=competes & (block > 0)[:, None], other=0)
    before = before.to(tl.float32, bitcast=True)
    score = tl.maximum(score, before) if MAX_POOLING else score + before
    bits = score.to(tl.int32, bitcast=True)
    # NaN too has a place in the order.
    return tl.where(competes, tl.minimum(tl.maximum(bits, 0), INFINITY_BITS), -1)


@triton.jit
def _count(scratch, num_blocks, low, high, probes, TOKENS: tl.constexpr, SEARCHED: tl.constexpr, STEP: tl.constexpr,
           PROBES: tl.constexpr, TOP_P: tl.constexpr):  # fmt: skip
    """How many of the first ``num_blocks`` bit patterns are at or above each probe, with TOP_P the sums of their scores
    too, and the least and the highest of those from ``low`` to below ``high``."""
    below = ()
    sums = ()
    for _ in tl.static_range(PROBES):
        below += (tl.zeros([STEP, TOKENS], tl.int32),)
        if TOP_P:
            sums += (tl.zeros([STEP, TOKENS], tl.float32),)
    # As unsigned numbers, in which what lies outside is larger than all within.
    above_low = tl.full([STEP, TOKENS], 0xFFFFFFFF, tl.uint32)
    under_high = tl.full([STEP, TOKENS], 0xFFFFFFFF, tl.uint32)
    place = scratch + tl.arange(0, STEP)[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
    for first in range(0, num_blocks, SEARCHED):
        loaded = ()
        for step in tl.static_range(SEARCHED // STEP):
            loaded += (tl.load(place + (first + step * STEP) * TOKENS),)
        for step in tl.static_range(SEARCHED // STEP):
            bits = loaded[step]
            more = ()
            for i in tl.static_range(PROBES):
                # -1 where the difference is negative: two instructions, a comparison that is added takes three.
                more += (below[i] + ((bits - probes[i][None, :]) >> 31),)
            below = more
            if TOP_P:
                score = tl.maximum(bits, 0).to(tl.float32, bitcast=True)
                more = ()
                for i in tl.static_range(PROBES):
                    more += (sums[i] + tl.where(bits >= probes[i][None, :], score, 0.0),)
                sums = more
            above_low = tl.minimum(above_low, (bits - low[None, :]).to(tl.uint32, bitcast=True))
            under_high = tl.minimum(under_high, (high[None, :] - 1 - bits).to(tl.uint32, bitcast=True))
    searched = tl.cdiv(num_blocks, SEARCHED) * SEARCHED
    counts = ()
    masses = ()
    for i in tl.static_range(PROBES):
        counts += (searched + tl.sum(below[i], 0),)
        masses += (tl.sum(sums[i], 0) if TOP_P else counts[i],)
    least = low + tl.min(above_low, 0).to(tl.int32, bitcast=True)
    most = high - 1 - tl.min(under_high, 0).to(tl.int32, bitcast=True)
    return counts, masses, least, most


@triton.jit
def _word(bits, at_least, weight):
    """Bit b of a token's word: whether the b-th of 32 patterns, [32, TOKENS], is at least so large."""
    return tl.sum(tl.where(bits >= at_least[None, :], weight[:, None], 0), 0)


@triton.jit
def _first_ones(word, most):
    """The lowest ``most`` ones of a word, and how many more could have been taken."""
    taken = tl.zeros_like(word)
    word = tl.where(most > 0, word, 0)
    while tl.max((word != 0).to(tl.int32), 0) > 0:
        lowest = word & -word
        taken |= lowest
        most -= (lowest != 0).to(tl.int32)
        word = tl.where(most > 0, word ^ lowest, 0)
    return taken, most


@triton.jit
def _ones_below(count):
    """A word whose lowest ``count`` bits, none or all perhaps, are ones."""
    return tl.where(count >= 32, -1, (1 << tl.minimum(tl.maximum(count, 0), 31)) - 1)


@triton.jit
def _select_tile(
    tile, q_ptr, k_desc, lse_ptr, words, scratch, documents, key_starts, scale_log2, num_tokens, num_words, num_slots,
    num_documents, scratch_blocks, topk, wanted_mass, init_blocks, local_blocks,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, PARTS: tl.constexpr,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, MAX_POOLING: tl.constexpr,
    TOP_P: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr, SEARCHED: tl.constexpr,
    STEP: tl.constexpr, PROBES: tl.constexpr,
):  # fmt: skip
    # Late tiles have most to do and go first.
    kv_head = tile % KV_HEADS
    document, start, end, index = locate_tile(documents, num_slots - 1 - tile // KV_HEADS, num_documents, TOKENS)
    first_key = tl.load(key_starts + document)
    plane = TOKENS * scratch_blocks
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
    scored = tl.where(unsolved, last_own - local_blocks + 1, 0)  # blocks, of which some may compete

    # ``wanted`` blocks compete successfully. At least that many score ``low`` or more (``count_low``), fewer than that
    # ``high`` or more (``count_high``).
    wanted = tl.where(ranked, free, 0)
    count_low = tl.where(ranked, own - local_blocks + 1 - init_blocks, 0)
    count_high = tl.zeros([TOKENS], tl.int32)
    mass_high = tl.zeros([TOKENS], tl.float32)
    low = tl.zeros([TOKENS], tl.int32)
    high = tl.full([TOKENS], INFINITY_BITS + 1, tl.int32)
    if unsolved:
        queries = ()
        for part in tl.static_range(PARTS):
            queries += _load_queries(
                q_ptr, lse_ptr, start, end, index * TOKENS, kv_head, part, GROUP, KV_HEADS, TOKENS, HEADS, HEAD_DIM, DIM
            )
        stop = tl.where(in_document, visible_keys(token_position, SIZE, STRIDE), 0)
        keys = scored * RATIO
        whole = tl.minimum(keys, visible_keys(index * TOKENS, SIZE, STRIDE)) // KEYS * KEYS
        for key in range(0, whole, KEYS):
            _pool(
                k_desc, queries, stop, kv_head, first_key, key, scale_log2, scratch, plane, TOKENS, HEADS, PARTS, KEYS,
                RATIO, SIZE // STRIDE, MAX_POOLING, DIM, False, PRECISION,
            )  # fmt: skip
        for key in range(whole, keys, KEYS):
            _pool(
                k_desc, queries, stop, kv_head, first_key, key, scale_log2, scratch, plane, TOKENS, HEADS, PARTS, KEYS,
                RATIO, SIZE // STRIDE, MAX_POOLING, DIM, True, PRECISION,
            )  # fmt: skip
        tl.debug_barrier()  # the scores of one thread are read by others

        least = tl.full([SEARCHED, TOKENS], INFINITY_BITS, tl.int32)
        most = tl.full([SEARCHED, TOKENS], -1, tl.int32)
        for first in range(0, scored, SEARCHED):
            block = first + tl.arange(0, SEARCHED)
            bits = _competing_bits(scratch, plane, block, own, init_blocks, local_blocks, ranked, TOKENS, MAX_POOLING)
            tl.store(scratch + block[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :], bits)
            least = tl.minimum(least, tl.where(bits >= 0, bits, INFINITY_BITS))
            most = tl.maximum(most, bits)
        low = tl.min(least, 0)
        high = tl.max(most, 0) + 1
        tl.debug_barrier()

    searching = unsolved
    while searching:
        step = (high - low + PROBES) // (PROBES + 1)
        probes = ()
        for i in tl.static_range(PROBES):
            probes += (low + (i + 1) * step,)
        counts, masses, least, most = _count(scratch, scored, low, high, probes, TOKENS, SEARCHED, STEP, PROBES, TOP_P)
        new_low = tl.maximum(low, least)
        new_high = tl.minimum(high, most + 1)
        for i in tl.static_range(PROBES):
            # Probes ascend and counts descend: the last one with enough and the first one with too few are kept.
            if TOP_P:
                enough = masses[i] >= wanted_mass
                mass_high = tl.where(enough, mass_high, tl.maximum(mass_high, masses[i]))
            else:
                enough = counts[i] >= wanted
            new_low = tl.where(enough, tl.maximum(new_low, probes[i]), new_low)
            count_low = tl.where(enough, tl.minimum(count_low, counts[i]), count_low)
            new_high = tl.where(enough, new_high, tl.minimum(new_high, probes[i]))
            count_high = tl.where(enough, count_high, tl.maximum(count_high, counts[i]))
        low = tl.where(ranked, new_low, low)
        high = tl.where(ranked, new_high, high)
        surplus = count_low - count_high > 1 if TOP_P else count_low > wanted
        searching = tl.max((surplus & (high - low > 1)).to(tl.int32), 0) > 0

    if TOP_P:
        # One block alone is between, or blocks of one score: as many of them as it takes.
        tie = low.to(tl.float32, bitcast=True)
        missing = tl.where(tie > 0, (wanted_mass - mass_high) / tl.where(tie > 0, tie, 1.0), 1e9)
        missing = tl.ceil(tl.minimum(missing, 1e9)).to(tl.int32)
        wanted = count_high + tl.where(high - low > 1, 1, tl.maximum(missing, 1))
    # Where all that tie are wanted none has to be left out.
    left = tl.where(count_low > wanted, wanted - count_high, 0)
    high = tl.where(count_low > wanted, high, low)
    token = (start + token_position).to(tl.int64)
    word_row = words + (kv_head.to(tl.int64) * num_tokens + token) * num_words
    lane = tl.arange(0, 32)
    for first in range(0, last_own + 1, 32):
        place = scratch + (first + lane)[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
        bits = tl.load(place, mask=(first + lane < scored)[:, None] & ranked[None, :], other=-1)
        chosen = _word(bits, high, 1 << lane)
        tied = _word(bits, low, 1 << lane) & ~chosen
        tied, left = _first_ones(tied, left)
        chosen |= tied
        not_forced = _ones_below(own - local_blocks + 1 - first) & ~_ones_below(init_blocks - first)
        chosen |= ~tl.where(own < topk, 0, not_forced)
        chosen &= _ones_below(own + 1 - first)
        tl.store(word_row + first // 32, chosen, mask=in_document & (first // 32 < num_words))
    tl.debug_barrier()  # the next tile overwrites the scratch


@triton.jit(
    do_not_specialize=[
        "num_tokens", "num_words", "num_slots", "num_documents", "scratch_blocks", "topk", "init_blocks",
        "local_blocks",
    ]
)  # fmt: skip
def select_kernel(
    q_ptr, k_desc, lse_ptr, words, scratch, next_tile, documents, key_starts, scale_log2, num_tokens, num_words,
    num_slots, num_documents, scratch_blocks, topk, wanted_mass, init_blocks, local_blocks,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, PARTS: tl.constexpr,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, MAX_POOLING: tl.constexpr,
    TOP_P: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr, SEARCHED: tl.constexpr,
    STEP: tl.constexpr, PROBES: tl.constexpr,
):  # fmt: skip
    scratch += tl.program_id(0).to(tl.int64) * (2 * TOKENS * scratch_blocks)
    tile = tl.atomic_add(next_tile, 1)
    while tile < num_slots * KV_HEADS:
        _select_tile(
            tile, q_ptr, k_desc, lse_ptr, words, scratch, documents, key_starts, scale_log2, num_tokens, num_words,
            num_slots, num_documents, scratch_blocks, topk, wanted_mass, init_blocks, local_blocks, KV_HEADS, GROUP,
            TOKENS, HEADS, PARTS, BLOCK, KEYS, SIZE, STRIDE, MAX_POOLING, TOP_P, HEAD_DIM, DIM, PRECISION, SEARCHED,
            STEP, PROBES,
        )  # fmt: skip
        tile = tl.atomic_add(next_tile, 1)


QUERY_BYTES = 2**16  # of the queries of a tile, all heads of the group: two programs fit a multiprocessor
MOST_TOKENS = 32  # of a tile: the L2 cache holds the scratch of all programs


@cache
def select_tile(group: int, dim: int, itemsize: int) -> dict[str, int]:
    """Tokens of a tile, heads of the group multiplied at once, and how often."""
    tokens = max(1, min(MOST_TOKENS, QUERY_BYTES // (group * dim * itemsize)))
    tokens = 1 << (tokens.bit_length() - 1)
    columns = 32 if itemsize == 4 else 64
    # Idle heads cost what heads cost, narrow products little: as many as divide the group, from 32 columns on.
    heads = max(math.gcd(group, columns // tokens), 32 // tokens)
    return dict(TOKENS=tokens, HEADS=heads, PARTS=-(-group // heads))


@cache
def select_options(dim: int, parts: int, itemsize: int) -> tuple:
    """Launch options."""
    if itemsize == 4:
        return around(4, 1)
    stages = stages_that_fit(parts * 64 * dim * itemsize, 64 * dim * itemsize, 2)
    # Searching waits for the L2 cache: fewer registers make room for a third program, or a fourth.
    few = tuple(dict(num_warps=4, num_stages=stages, maxnreg=registers) for registers in (168, 128))
    return (*around(4, stages), *few)


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
    tile = select_tile(geo.group, geo.padded_dim, q.itemsize)
    keys, tokens = tile_keys(q.itemsize), tile["TOKENS"]
    step = max(1, 512 // tokens)  # four scores for each of 128 threads
    searched = max(32, 4 * step)
    slots = geo.slots(tokens)
    programs = min(PROGRAMS, slots * geo.kv_heads)
    # A tile of windows ends where the next begins, and the search looks at whole steps, past the last block.
    multiple = max(128, searched)
    scratch_blocks = -(-num_blocks // multiple) * multiple
    scratch = torch.empty(programs, 2, scratch_blocks, tokens, dtype=torch.int32, device=q.device)
    next_tile = torch.zeros(1, dtype=torch.int32, device=q.device)
    launch(
        select_kernel, (programs,),
        q, key_descriptor(k, geo, keys), lse, words, scratch, next_tile, geo.documents, starts, scale * LOG2E,
        geo.tokens, words.shape[-1], slots, geo.num_documents, scratch_blocks, topk, wanted_mass(top_p, geo.group),
        init_blocks, local_blocks,
        KV_HEADS=geo.kv_heads, GROUP=geo.group, **tile, BLOCK=block_size, KEYS=keys, SIZE=band.size,
        STRIDE=band.stride, MAX_POOLING=max_pooling, TOP_P=top_p is not None, HEAD_DIM=geo.head_dim,
        DIM=geo.padded_dim, PRECISION=precision(q.dtype), SEARCHED=searched, STEP=step, PROBES=PROBES,
        options=select_options(geo.padded_dim, tile["PARTS"], q.itemsize), tokens=geo.tokens, restore=[next_tile],
    )  # fmt: skip
    return words
