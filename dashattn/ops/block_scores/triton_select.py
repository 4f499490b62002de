"""Triton kernel that selects blocks by attention over compressed keys (InfLLM v2, NSA).

Given the log-normalisers of a first pass, a program forms the probabilities of a tile of tokens again (k q^T on the
tensor cores), sums them over the group, pools them to blocks and finds each token's best: no probability leaves the
chip. Block scores do, into a scratch of the program's own, which its tiles reuse and the L2 cache holds:
PROGRAMS * 4 bytes * tokens of a tile * blocks, at most 66 MiB at 64k tokens in blocks of 64, 132 MiB without groups.

At 32k tokens, 32 heads and a stride of 16 there are 1.1e9 causal (row, window) pairs: 0.27 TFLOP of products, as in the
first pass. A tile is tokens, COLUMNS / TOKENS heads of the group at a time: heads are summed by the thread that holds
them, whatever their number, and a tile of keys is read once for all of them.

The rows of a product are KEYS blocks, of which one step takes the first window, the next one the second: so a thread
pools what it holds. A window that reaches into the next block belongs to the row below; a tile of blocks begins with
the last block of the one before it.

Of block scores there are N a token and KV head, so that small groups search many: 1.3e8 with 16 KV heads. The search
narrows, in the float32 bit patterns (scores are not negative, so they are ordered as integers), an interval that holds
the k-th score, 5-fold a step and to the scores that are there, until what it holds is exactly what is wanted of it, or
a single value: the blocks of that value tie, and the lowest win. Max-pooling makes such ties common: neighbouring
blocks share a window. With TOP_P it is the score at which the sum of all that are as high reaches what is wanted.

Of sharp scores most probabilities are 0 in float32, and would tie. So tokens for which a block below FAINT was taken,
as a rule none, are ranked again, by the logarithm of what a group's probabilities sum to: BY_LOGITS. A maximum over one
query head is that of the products themselves: it is ranked so at once, with neither normalisers nor exponentials.
Weighted windows and masses are ranked by probabilities alone.

Shapes as in ``band/triton_forward``, with N blocks of BLOCK tokens and W words of 32 blocks: words int32 [H, n, W];
scratch int32 [programs, scratch_blocks > N, TOKENS]; faint int8 [H, n]: tokens to rank again.
"""

import math
from functools import cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dashattn.ops.band.triton_forward import Band, tile_keys, visible_keys
from dashattn.ops.block_scores.triton_search import (
    INFINITY_BITS,
    bounds,
    count,
    even_probes,
    first_ones,
    rank_of_bits,
    words_at_least,
)
from dashattn.ops.block_sparse.triton_forward import precision, stages_that_fit
from dashattn.ops.instructions import exp2, log2
from dashattn.ops.tiles import LOG2E, Geometry, locate_tile, ones_below
from dashattn.ops.tuning import around, launch

# Four for each multiprocessor of an H100 or H200. They take tiles until none is left: it matters not how many run.
PROGRAMS = 528
PROBES = 4
# Bits of 2 ** -96: what is lost of a sum that underflows in part, at most 2 ** -126 a head, counts for nothing.
FAINT = tl.constexpr(0x0F800000)


@triton.jit
def _load_queries(q_ptr, lse_ptr, start, end, first, kv_head, part, GROUP: tl.constexpr, KV_HEADS: tl.constexpr,
                  TOKENS: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):  # fmt: skip
    """The ``part``-th HEADS heads of the group, [HEADS * TOKENS, DIM], and their log-normalisers, if needed."""
    column = tl.arange(0, HEADS * TOKENS)
    head = part * HEADS + column // TOKENS
    token = start + first + column % TOKENS
    valid = (token < end) & (head < GROUP)
    flat_row = token.to(tl.int64) * (KV_HEADS * GROUP) + kv_head * GROUP + head
    dim = tl.arange(0, DIM)
    in_tile = valid[:, None] & (dim < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + flat_row[:, None] * HEAD_DIM + dim[None, :], mask=in_tile, other=0.0)
    lse = tl.zeros([HEADS * TOKENS], tl.float32)
    if lse_ptr is not None:  # of 1e30 a probability is 0, too, and differences of logarithms are finite
        lse = tl.minimum(tl.load(lse_ptr + flat_row, mask=valid, other=float("inf")), 1e30)
    return q, lse


@triton.jit
def _add_logs(peak, total, other_peak, other_total):
    """total 2 ** peak + other_total 2 ** other_peak in the same form."""
    ratio = exp2(-tl.abs(peak - other_peak))
    total = tl.where(peak > other_peak, total + other_total * ratio, total * ratio + other_total)
    return tl.maximum(peak, other_peak), total


@triton.jit
def _lowest(BY_LOGITS: tl.constexpr):
    """Less than any score, or as little."""
    if BY_LOGITS:
        return float("-inf")
    else:
        return 0.0


@triton.jit
def _pool(
    k_desc, queries, stop, kv_head, first_key, first_tile, end_tile, init_blocks, competing_end, scale_log2, scratch,
    own, following, TOKENS: tl.constexpr, HEADS: tl.constexpr, PARTS: tl.constexpr, KEYS: tl.constexpr,
    RATIO: tl.constexpr, OVERLAP: tl.constexpr, MAX_POOLING: tl.constexpr, BY_LOGITS: tl.constexpr, DIM: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Stores the bit patterns of the scores of some tiles of KEYS blocks, in RATIO steps each: -1 where a block does
    not compete. Where windows reach into the next block, a tile begins with the last block of the one before it.

    ``own`` and ``following``: scores of the tile at hand from windows that begin in a block, and from those that end in
    the next one, [KEYS, TOKENS].
    """
    lowest = _lowest(BY_LOGITS)
    AGAIN: tl.constexpr = 1 if OVERLAP > 1 else 0
    row = tl.arange(0, KEYS)
    for step in range(first_tile * RATIO, end_tile * RATIO):
        place = step % RATIO
        first_block = step // RATIO * (KEYS - AGAIN) - AGAIN
        key = first_key + place
        k = k_desc.load([kv_head, key % RATIO, first_block + key // RATIO, 0]).reshape(KEYS, DIM)
        total = tl.zeros([KEYS, TOKENS], tl.float32)
        peak = total - 1e30
        for part in tl.static_range(PARTS):
            p = tl.dot(k, queries[2 * part].T, input_precision=PRECISION) * scale_log2
            if BY_LOGITS and PARTS * HEADS > 1:
                log_p = tl.reshape(p - queries[2 * part + 1][None, :], (KEYS, HEADS, TOKENS))
                more = tl.reduce((log_p, tl.full([KEYS, HEADS, TOKENS], 1.0, tl.float32)), 1, _add_logs)
                peak, total = _add_logs(peak, total, more[0], more[1])
            else:
                if not BY_LOGITS:
                    p = tl.exp2(p - queries[2 * part + 1][None, :])
                if HEADS > 1:
                    p = tl.sum(tl.reshape(p, (KEYS, HEADS, TOKENS)), 1)
                total += p
        if BY_LOGITS and PARTS * HEADS > 1:
            total = peak + log2(total)
        if MASKED:
            window = (first_block + row) * RATIO + place
            total = tl.where(window[:, None] < stop[None, :], total, lowest)
        # A window covers OVERLAP strides, a block RATIO.
        beyond = tl.maximum(place + OVERLAP - RATIO, 0)
        if MAX_POOLING:
            own = tl.maximum(own, total)
        else:
            own += total * (OVERLAP - beyond).to(tl.float32)
        if OVERLAP > 2:
            if MAX_POOLING:
                following = tl.maximum(following, tl.where(beyond > 0, total, lowest))
            else:
                following += total * beyond.to(tl.float32)
        if place == RATIO - 1:
            block = first_block + row
            if OVERLAP > 1:
                before = tl.maximum(row - 1, 0)[:, None] + tl.zeros([KEYS, TOKENS], tl.int32)
                before = tl.gather(total if OVERLAP == 2 else following, before, 0)
                before = tl.where((block > 0)[:, None], before, lowest)
                own = tl.maximum(own, before) if MAX_POOLING else own + before
            bits = own.to(tl.int32, bitcast=True)
            if BY_LOGITS:
                bits = rank_of_bits(bits)
            # NaN too has a place in the order.
            bits = tl.minimum(tl.maximum(bits, 0), INFINITY_BITS)
            competes = (block >= init_blocks)[:, None] & (block[:, None] < competing_end[None, :])
            bits = tl.where(competes, bits, -1)
            to = scratch + block[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
            tl.store(to, bits, mask=(row >= AGAIN)[:, None])
            own = tl.zeros([KEYS, TOKENS], tl.float32) + lowest
            if OVERLAP > 2:
                following = own
    return own, following


@triton.jit
def _select_tile(
    tile, q_ptr, k_desc, lse_ptr, words, faint, any_faint, scratch, documents, key_starts, scale_log2, num_tokens,
    num_words, num_slots, num_documents, topk, wanted_mass, init_blocks, local_blocks,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, PARTS: tl.constexpr,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, MAX_POOLING: tl.constexpr,
    BY_LOGITS: tl.constexpr, TOP_P: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr,
    SEARCHED: tl.constexpr, STEP: tl.constexpr, PROBES: tl.constexpr,
):  # fmt: skip
    # Late tiles have most to do and go first.
    kv_head = tile % KV_HEADS
    document, start, end, index = locate_tile(documents, num_slots - 1 - tile // KV_HEADS, num_documents, TOKENS)
    first_key = tl.load(key_starts + document)
    RATIO: tl.constexpr = BLOCK // STRIDE

    token_position = index * TOKENS + tl.arange(0, TOKENS)
    in_document = start + token_position < end
    if faint is not None and BY_LOGITS:
        token = (start + token_position).to(tl.int64)
        in_document &= tl.load(faint + kv_head.to(tl.int64) * num_tokens + token, mask=in_document, other=0) != 0
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
                q_ptr, lse_ptr, start, end, index * TOKENS, kv_head, part, GROUP, KV_HEADS, TOKENS, HEADS, HEAD_DIM,
                DIM,
            )  # fmt: skip
        stop = tl.where(in_document, visible_keys(token_position, SIZE, STRIDE), 0)
        competing_end = tl.where(ranked, own - local_blocks + 1, 0)
        pooled = tl.zeros([KEYS, TOKENS], tl.float32) + _lowest(BY_LOGITS)
        NEW: tl.constexpr = KEYS - 1 if SIZE > STRIDE else KEYS  # blocks of a tile
        whole = tl.minimum(scored, visible_keys(index * TOKENS, SIZE, STRIDE) // RATIO) // NEW
        tiles = tl.cdiv(scored, NEW)
        pooled, following = _pool(
            k_desc, queries, stop, kv_head, first_key, 0, whole, init_blocks, competing_end, scale_log2, scratch,
            pooled, pooled, TOKENS, HEADS, PARTS, KEYS, RATIO, SIZE // STRIDE, MAX_POOLING, BY_LOGITS, DIM, False,
            PRECISION,
        )  # fmt: skip
        _pool(
            k_desc, queries, stop, kv_head, first_key, whole, tiles, init_blocks, competing_end, scale_log2, scratch,
            pooled, following, TOKENS, HEADS, PARTS, KEYS, RATIO, SIZE // STRIDE, MAX_POOLING, BY_LOGITS, DIM, True,
            PRECISION,
        )  # fmt: skip
        # The search looks at SEARCHED patterns at a time.
        place = tl.arange(0, SEARCHED)[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
        nothing = tl.full([SEARCHED, TOKENS], -1, tl.int32)
        tl.store(scratch + tiles.to(tl.int64) * (NEW * TOKENS) + place, nothing)
        tl.debug_barrier()  # the patterns of one thread are read by others
        low, high = bounds(scratch, scored, TOKENS, SEARCHED, STEP)

    searching = unsolved
    while searching:
        probes = even_probes(low, high, PROBES, BY_LOGITS)
        counts, masses, least, most = count(scratch, scored, low, high, probes, TOKENS, SEARCHED, STEP, PROBES, TOP_P)
        new_low = tl.maximum(low, least)
        new_high = tl.minimum(high, most + 1)
        for i in tl.static_range(PROBES):
            # The highest probe with enough and the lowest one with too few are kept.
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

    token = (start + token_position).to(tl.int64)
    if faint is not None and not BY_LOGITS:
        is_faint = ranked & (low < FAINT)
        tl.store(faint + kv_head.to(tl.int64) * num_tokens + token, is_faint.to(tl.int8), mask=in_document)
        tl.store(any_faint, 1, mask=tl.max(is_faint.to(tl.int32), 0) > 0)
    if TOP_P:
        # One block alone is between, or blocks of one score: as many of them as it takes.
        tie = low.to(tl.float32, bitcast=True)
        missing = tl.where(tie > 0, (wanted_mass - mass_high) / tl.where(tie > 0, tie, 1.0), 1e9)
        missing = tl.ceil(tl.minimum(missing, 1e9)).to(tl.int32)
        wanted = count_high + tl.where(high - low > 1, 1, tl.maximum(missing, 1))
    # Where all that tie are wanted none has to be left out.
    left = tl.where(count_low > wanted, wanted - count_high, 0)
    high = tl.where(count_low > wanted, high, low)
    word_row = words + (kv_head.to(tl.int64) * num_tokens + token) * num_words
    low = tl.where(ranked, low, INFINITY_BITS + 1)
    high = tl.where(ranked, high, INFINITY_BITS + 1)
    for first in range(0, last_own + 1, 32):
        chosen, at_least_low = words_at_least(scratch, first, scored, high, low, TOKENS, min(STEP, 32))
        tied, left = first_ones(at_least_low & ~chosen, left)
        chosen |= tied
        not_forced = ones_below(own - local_blocks + 1 - first) & ~ones_below(init_blocks - first)
        chosen |= ~tl.where(own < topk, 0, not_forced)
        chosen &= ones_below(own + 1 - first)
        tl.store(word_row + first // 32, chosen, mask=in_document & (first // 32 < num_words))
    tl.debug_barrier()  # the next tile overwrites the scratch


@triton.jit(
    do_not_specialize=[
        "num_tokens", "num_words", "num_slots", "num_documents", "scratch_blocks", "topk", "init_blocks",
        "local_blocks",
    ]
)  # fmt: skip
def select_kernel(
    q_ptr, k_desc, lse_ptr, words, faint, any_faint, scratch, next_tile, documents, key_starts, scale_log2, num_tokens,
    num_words, num_slots, num_documents, scratch_blocks, topk, wanted_mass, init_blocks, local_blocks,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, PARTS: tl.constexpr,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, MAX_POOLING: tl.constexpr,
    BY_LOGITS: tl.constexpr, TOP_P: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr,
    SEARCHED: tl.constexpr, STEP: tl.constexpr, PROBES: tl.constexpr,
):  # fmt: skip
    if faint is not None and BY_LOGITS:
        num_slots = tl.where(tl.load(any_faint) != 0, num_slots, 0)
    scratch += tl.program_id(0).to(tl.int64) * (TOKENS * scratch_blocks)
    tile = tl.atomic_add(next_tile, 1)
    while tile < num_slots * KV_HEADS:
        _select_tile(
            tile, q_ptr, k_desc, lse_ptr, words, faint, any_faint, scratch, documents, key_starts, scale_log2,
            num_tokens, num_words, num_slots, num_documents, topk, wanted_mass, init_blocks,
            local_blocks, KV_HEADS, GROUP, TOKENS, HEADS, PARTS, BLOCK, KEYS, SIZE, STRIDE, MAX_POOLING, BY_LOGITS,
            TOP_P, HEAD_DIM, DIM, PRECISION, SEARCHED, STEP, PROBES,
        )  # fmt: skip
        tile = tl.atomic_add(next_tile, 1)


QUERY_BYTES = 2**16  # of the queries of a tile, all heads of the group: two programs fit a multiprocessor


@cache
def select_tile(group: int, dim: int, itemsize: int, by_logits: bool) -> dict[str, int]:
    """Tokens of a tile, heads of the group multiplied at once, and how often.

    The L2 cache holds the scratch of all programs. Without exponentials keys are what it passes: twice the tokens share
    them.
    """
    tokens = max(1, min(64 if by_logits else 32, QUERY_BYTES // (group * dim * itemsize)))
    tokens = 1 << (tokens.bit_length() - 1)
    columns = 32 if itemsize == 4 else 64
    # Idle heads cost what heads cost, narrow products little: as many as divide the group, from 32 columns on.
    heads = max(math.gcd(group, columns // tokens), 32 // tokens)
    return dict(TOKENS=tokens, HEADS=heads, PARTS=-(-group // heads))


@cache
def select_options(dim: int, parts: int, itemsize: int, max_pooling: bool) -> tuple:
    """Launch options.

    Three programs of 168 registers a multiprocessor wait less for the L2 cache than two. Many heads spill instead, and
    with weights three were not measured.
    """
    if itemsize == 4:
        return around(4, 1)
    stages = stages_that_fit(parts * 64 * dim * itemsize, 64 * dim * itemsize, 2)
    three, four = (dict(num_warps=4, num_stages=stages, maxnreg=registers) for registers in (168, 128))
    if parts <= 2 and max_pooling:
        return three, *around(4, stages), four
    return *around(4, stages), three, four


def window_descriptor(k: Tensor, geo: Geometry, ratio: int, blocks: int) -> TensorDescriptor:
    """Of [J, H, D] every ``ratio``-th window, ``blocks`` of them: [H, ratio, J / ratio, D], with J padded."""
    if k.shape[0] % ratio:
        k = F.pad(k, (0, 0, 0, 0, 0, -k.shape[0] % ratio))
    return TensorDescriptor(
        k,
        shape=[geo.kv_heads, ratio, k.shape[0] // ratio, geo.head_dim],
        strides=[geo.head_dim, k.stride(0), ratio * k.stride(0), 1],
        block_shape=[1, 1, blocks, geo.padded_dim],
    )


def ranks_by_logits(geo: Geometry, max_pooling: bool, top_p: float | None = None) -> bool:
    """Whether top-k needs no normalisers: the largest probability of one query head is that of the largest product."""
    return max_pooling and geo.group == 1 and top_p is None


def wanted_mass(top_p: float | None, group: int) -> float:
    """What the scores of a group's selected blocks are to sum to; more than they can where all are wanted."""
    return 1e30 if top_p == 1 else group * (top_p or 0.0)


def select(
    q: Tensor, k: Tensor, lse: Tensor | None, starts: Tensor, geo: Geometry, band: Band, num_blocks: int,
    block_size: int, topk: int, init_blocks: int, local_blocks: int, max_pooling: bool, scale: float,
    top_p: float | None = None,
) -> Tensor:  # fmt: skip
    """Selection words int32 [H, n, W].

    Args:
        lse: base-2 log-normalisers, float32 [n, Hq], of the same products; not read where ``ranks_by_logits``.
        top_p: in place of ``topk``: the fewest blocks beside the forced ones whose scores, on average over the heads of
            a group, sum to it; 1 takes all.
    """
    words = torch.zeros(geo.kv_heads, geo.tokens, -(-num_blocks // 32), dtype=torch.int32, device=q.device)
    by_logits = ranks_by_logits(geo, max_pooling, top_p)
    tile = select_tile(geo.group, geo.padded_dim, q.itemsize, by_logits)
    keys, tokens = tile_keys(q.itemsize), tile["TOKENS"]
    step = max(1, 128 // tokens)  # a score for each of 128 threads
    searched = max(32, 16 * step)
    slots = geo.slots(tokens)
    programs = min(PROGRAMS, slots * geo.kv_heads)
    # The last tile of blocks may go past the last block, and then the search takes a step.
    scratch_blocks = num_blocks + keys + searched
    scratch = torch.empty(programs, scratch_blocks, tokens, dtype=torch.int32, device=q.device)
    windows = window_descriptor(k, geo, block_size // band.stride, keys)
    options = select_options(geo.padded_dim, tile["PARTS"], q.itemsize, max_pooling)
    faint, any_faint, passes = None, None, (by_logits,)
    if max_pooling and top_p is None and not by_logits:
        faint = torch.empty(geo.kv_heads, geo.tokens, dtype=torch.int8, device=q.device)
        any_faint, passes = torch.zeros(1, dtype=torch.int32, device=q.device), (False, True)
    for logits in passes:
        next_tile = torch.zeros(1, dtype=torch.int32, device=q.device)
        launch(
            select_kernel, (programs,),
            q, windows, None if by_logits else lse, words, faint, any_faint, scratch, next_tile, geo.documents, starts,
            scale * LOG2E, geo.tokens, words.shape[-1], slots, geo.num_documents, scratch_blocks, topk,
            wanted_mass(top_p, geo.group), init_blocks, local_blocks,
            KV_HEADS=geo.kv_heads, GROUP=geo.group, **tile, BLOCK=block_size, KEYS=keys, SIZE=band.size,
            STRIDE=band.stride, MAX_POOLING=max_pooling, BY_LOGITS=logits, TOP_P=top_p is not None,
            HEAD_DIM=geo.head_dim, DIM=geo.padded_dim, PRECISION=precision(q.dtype), SEARCHED=searched, STEP=step,
            PROBES=PROBES, options=options, restore=[next_tile],
            tokens=0 if faint is not None and logits else geo.tokens,  # hardly any: none is timed
        )  # fmt: skip
    return words
