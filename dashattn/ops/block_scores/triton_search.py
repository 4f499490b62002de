"""The search for the k-th best score of every token: parts of the kernel in ``triton_select``.

Scores of a tile of tokens lie in memory as integers that are ordered as they are, [blocks, TOKENS], -1 where a block
does not compete. Tokens lie side by side, and a thread holds one score of each of STEP blocks: it counts those of one
token, which takes few registers, and threads exchange their counts once a pass.

Shapes: N blocks, T tokens of a tile; of a token are the interval low to high, its probes, counts and words, all [T].
"""

import triton
import triton.language as tl

INFINITY_BITS = tl.constexpr(0x7F800000)


@triton.jit
def rank_of_bits(bits):
    """Of a float's bits a number in the order of the floats, but for their last bit, and never negative."""
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> 1) + 0x40000000


@triton.jit
def logit_of_rank(rank):
    """The float of a rank, at least -1e30: differences are finite."""
    bits = (rank - 0x40000000) << 1
    bits ^= (bits >> 31) & 0x7FFFFFFF
    return tl.maximum(bits.to(tl.float32, bitcast=True), -1e30)


@triton.jit
def _sums(x):
    """Sums of four tensors along their first dimension: together, since threads meet for each."""
    left, right = tl.split(tl.sum(tl.join(tl.join(x[0], x[1]), tl.join(x[2], x[3])), 0))
    a, b = tl.split(left)
    c, d = tl.split(right)
    return a, b, c, d


@triton.jit
def bounds(scratch, num_blocks, TOKENS: tl.constexpr, SEARCHED: tl.constexpr, STEP: tl.constexpr):
    """The least of the patterns that are not -1, and one more than the highest."""
    least = tl.full([STEP, TOKENS], 0xFFFFFFFF, tl.uint32)  # to which -1 is more than any other
    most = tl.full([STEP, TOKENS], -1, tl.int32)
    place = scratch + tl.arange(0, STEP)[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
    for first in range(0, num_blocks, SEARCHED):
        for step in tl.static_range(SEARCHED // STEP):
            bits = tl.load(place + (first + step * STEP) * TOKENS)
            least = tl.minimum(least, bits.to(tl.uint32, bitcast=True))
            most = tl.maximum(most, bits)
    return tl.min(least, 0).to(tl.int32, bitcast=True), tl.max(most, 0) + 1


@triton.jit
def count(scratch, num_blocks, low, high, probes, TOKENS: tl.constexpr, SEARCHED: tl.constexpr, STEP: tl.constexpr,
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
    below = _sums(below)
    masses = _sums(sums) if TOP_P else below
    counts = ()
    for i in tl.static_range(PROBES):
        counts += (searched + below[i],)
    above_low, under_high = tl.split(tl.min(tl.join(above_low, under_high), 0))
    least = low + above_low.to(tl.int32, bitcast=True)
    most = high - 1 - under_high.to(tl.int32, bitcast=True)
    return counts, masses, least, most


@triton.jit
def even_probes(low, high, PROBES: tl.constexpr, BY_LOGITS: tl.constexpr):
    """Even steps from ``low`` to ``high``: of bit patterns, which are nearly logarithms, or of logarithms."""
    probes = ()
    if BY_LOGITS:
        bottom = logit_of_rank(low)
        step = (logit_of_rank(high) - bottom) * (1.0 / (PROBES + 1))
        for i in tl.static_range(PROBES):
            probe = rank_of_bits((bottom + (i + 1) * step).to(tl.int32, bitcast=True))
            probes += (tl.minimum(tl.maximum(probe, low + 1), high - 1),)  # the interval shrinks, however they round
    else:
        step = (high - low + PROBES) // (PROBES + 1)
        for i in tl.static_range(PROBES):
            probes += (low + (i + 1) * step,)
    return probes


@triton.jit
def words_at_least(scratch, first, scored, high, low, TOKENS: tl.constexpr, STEP: tl.constexpr):
    """Two words a token: which of 32 patterns from the ``first``-th on are at least ``high``, and ``low``."""
    row = tl.arange(0, STEP)
    above = tl.zeros([STEP, TOKENS], tl.int32)
    at_least = tl.zeros([STEP, TOKENS], tl.int32)
    for part in tl.static_range(32 // STEP):
        block = first + part * STEP + row
        place = scratch + block[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
        bits = tl.load(place, mask=(block < scored)[:, None], other=-1)
        bit = (1 << (part * STEP + row))[:, None]
        above |= tl.where(bits >= high[None, :], bit, 0)
        at_least |= tl.where(bits >= low[None, :], bit, 0)
    return tl.split(tl.sum(tl.join(above, at_least), 0))


@triton.jit
def first_ones(word, most):
    """The lowest ``most`` ones of a word, and how many more could have been taken."""
    taken = tl.zeros_like(word)
    word = tl.where(most > 0, word, 0)
    while tl.max((word != 0).to(tl.int32), 0) > 0:
        lowest = word & -word
        taken |= lowest
        most -= (lowest != 0).to(tl.int32)
        word = tl.where(most > 0, word ^ lowest, 0)
    return taken, most
