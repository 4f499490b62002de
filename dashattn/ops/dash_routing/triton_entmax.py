"""The entmax threshold of many rows at once, as Triton functions.

With x = (alpha - 1) (s - max s) <= 0 for scores s, r = 1 / (alpha - 1) and z = max(x - tau, 0), entmax is p = z ** r
with sum p = 1. The root is sought on h(tau) = (sum z ** r) ** (1 / r) - 1, a convex function and nearly a straight
line: bracketed by its values at four fixed points, interpolated, then stepped to.

The support is where z > 0. At small alpha p = z ** r underflows on much of it: what is taken of p there, its logarithm
and shares of a group's sum, comes from z.

Shapes: R rows (a query head of a token each), C chunks at a time. x and z [R, C]; tau, alpha and slope [R]; exponent
[R, 1]; folded sums [R, 8]. Where a group is summed its heads are an axis: [A, B, C] stands for what a dimension of the
tile is split into.
"""

import triton
import triton.language as tl

from dashattn.ops.instructions import exp2, log2, saturated

SMALLEST_EXPONENT = tl.constexpr(1e-7)
MAX_PASSES = tl.constexpr(40)
LN_2 = tl.constexpr(0.6931471805599453)
# log p of what was selected although z, formed anew, is 0: at the support's edge the last bit of a product decides.
EDGE_LOG_P = tl.constexpr(-35.0)


@triton.jit
def above_threshold(x, slope, tau):
    """z = max(slope x - tau, 0) for x <= 0, which no tau >= -1 lets rise above 1."""
    return saturated(x, slope[:, None], -tau[:, None])


@triton.jit
def is_positive(z):
    """1.0 where z > 0, else 0.0. What is left of a difference of numbers near 1 is never as small as 1e-30."""
    return saturated(z, 1e30, 0.0)


@triton.jit
def fold(x):
    """Sums the columns that a thread holds, [R, C] -> [R, 8]: threads exchange their sums once, after the loop."""
    return tl.sum(tl.reshape(x, (x.shape[0], x.shape[1] // 8, 8)), 1)


@triton.jit
def entropy_gap(z):
    """1 - z + z log z for z in [0, 1], to relative precision also near 1, where it is (1 - z) ** 2 / 2."""
    t = 1.0 - z
    series = 1 / 56 + t * (1 / 72 + t * (1 / 90))
    series = 1 / 20 + t * (1 / 30 + t * (1 / 42 + t * series))
    series = 0.5 + t * (1 / 6 + t * (1 / 12 + t * series))
    return tl.where(t < 0.25, t * t * series, t + z * (log2(tl.where(z > 0, z, 1.0)) * LN_2))


@triton.jit
def power(z, exponent, SQUARE: tl.constexpr):
    """(z ** r, z ** (r - 1)) with ``exponent`` = r - 1 per row; both 0 where z is 0, for exponent 0 too."""
    if SQUARE:
        return z * z, z
    else:
        low = exp2(log2(z) * tl.maximum(exponent, SMALLEST_EXPONENT))
        return low * z, low


@triton.jit
def softmax_slope(slope, score_scale):
    """For softmax in place of entmax's slope: what turns a product into the base-2 logarithm of a weight."""
    return tl.zeros_like(slope) + score_scale / LN_2


@triton.jit
def log2_sum(log_p, AXIS: tl.constexpr):
    """log2 of the sum of 2 ** log_p, and where it is positive; 0 where it is not."""
    highest = tl.max(log_p, AXIS)
    positive = highest > float("-inf")
    highest = tl.where(positive, highest, 0.0)
    total = tl.sum(exp2(log_p - tl.expand_dims(highest, AXIS)), AXIS)
    return highest + log2(tl.where(positive, total, 1.0)), positive


@triton.jit
def log_mean(z, exponent, AXIS: tl.constexpr, GROUP: tl.constexpr, SQUARE: tl.constexpr):
    """log of the sum of p over the group's heads / GROUP, and where it is positive; 0 where it is not.

    ``exponent`` broadcasts against z.
    """
    if SQUARE:
        total = tl.sum(z * z, AXIS)
        positive = total > 0
        return tl.log(tl.where(positive, total / GROUP, 1.0)), positive
    else:
        return log_mean_of_logs(log2(z) * (exponent + 1.0), AXIS, GROUP)


@triton.jit
def log_mean_of_logs(log_p, AXIS: tl.constexpr, GROUP: tl.constexpr):
    """``log_mean`` of p that are given by their base-2 logarithms."""
    total, positive = log2_sum(log_p, AXIS)
    return tl.where(positive, total * LN_2 - tl.log(tl.full([], GROUP, tl.float32)), 0.0), positive


@triton.jit
def share_of_group(z, exponent, selected, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, AXIS: tl.constexpr,
                   SQUARE: tl.constexpr):  # fmt: skip
    """u / P with u = p ** (2 - alpha) = p / z and P the sum of p over the group's heads; 0 off ``selected``.

    The heads are dimension ``AXIS`` of z when it is reshaped to [A, B, C], which ``selected`` lacks; ``exponent``
    broadcasts against z as it is. z is formed anew, perhaps by other instructions: at the edge of the support, where
    u / P has no bound, it cannot tell what was selected.
    """
    if SQUARE:
        total = tl.sum(tl.reshape(z * z, (A, B, C)), AXIS)
        reciprocal = tl.where(selected, 1.0 / tl.where(total > 0, total, 1.0), 0.0)
        return z * spread(reciprocal, z, A, B, C, AXIS)
    else:
        share = share_of_logs(log2(z) * (exponent + 1.0), selected, A, B, C, AXIS)
        return share / tl.where(z > 0, z, 1.0)


@triton.jit
def share_of_logs(log_p, selected, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, AXIS: tl.constexpr):
    """p / P of p that are given by their base-2 logarithms; see ``share_of_group``."""
    total, _ = log2_sum(tl.reshape(log_p, (A, B, C)), AXIS)
    total = tl.where(selected, total, float("inf"))
    return exp2(log_p - spread(total, log_p, A, B, C, AXIS))


@triton.jit
def spread(x, like, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, AXIS: tl.constexpr):
    """Repeats x, [A, B, C] without ``AXIS``, along it; in the shape of ``like``."""
    return tl.reshape(tl.broadcast_to(tl.expand_dims(x, AXIS), (A, B, C)), like.shape)


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
def row_sums(sums):
    return tl.sum(sums[0], 1), tl.sum(sums[1], 1), tl.sum(sums[2], 1)


@triton.jit
def root_step(tau, sums, alpha, highest, SQUARE: tl.constexpr):
    """A better threshold from the rows' sums of z ** r, z ** (r - 1) and z > 0 at ``tau``."""
    if SQUARE:
        better = halley_root(tau, sums[0], sums[1], sums[2])
    else:
        better = tangent_root(tau, sums[0], sums[1], alpha, SQUARE)
    return tl.minimum(tl.maximum(better, -1.0), highest)


@triton.jit
def unsolved(tau, better, power_sum, alpha):
    """Rows whose probabilities do not sum to 1 yet and whose threshold a step still changes by more than rounding.

    Above alpha = 1.5 the logarithm of a prior is steepest at the edge of the support, where the error of tau counts.
    """
    tolerance = tl.where(alpha > 1.5, 1e-6, 5e-6)
    return (tl.abs(power_sum - 1.0) > tolerance) & (tl.abs(better - tau) > 1.2e-7 * tl.abs(tau))


@triton.jit
def probe(x, slope, point, sums, exponent, SQUARE: tl.constexpr):
    """Adds z ** r and z ** (r - 1) with z = slope x - ``point`` to the folded sums; ``point`` is one per row."""
    p, u = power(saturated(x, slope[:, None], -point[:, None]), exponent, SQUARE)
    return sums[0] + fold(p), sums[1] + fold(u)


@triton.jit
def narrow(bracket, point, sums, alpha, SQUARE: tl.constexpr):
    """Moves an end of the bracket (left tau, value and slope of h + 1 there; right likewise) to ``point``.

    Points come in ascending order; right tau is 0 as long as none was right of the root.
    """
    left, left_h, left_slope, right, right_h, right_slope = bracket
    power_sum = tl.sum(sums[0], 1)
    has_support = power_sum > 1e-30
    power_sum = tl.maximum(power_sum, 1e-30)
    if SQUARE:
        h = tl.sqrt(power_sum)
    else:
        h = tl.exp2((alpha - 1.0) * tl.log2(power_sum))
    slope = -h / power_sum * tl.sum(sums[1], 1)
    is_left = h >= 1.0
    is_right = (h < 1.0) & (right == 0.0) & has_support
    return (
        tl.where(is_left, point, left),
        tl.where(is_left, h, left_h),
        tl.where(is_left, slope, left_slope),
        tl.where(is_right, point, right),
        tl.where(is_right, h, right_h),
        tl.where(is_right, slope, right_slope),
    )


@triton.jit
def hermite_root(bracket):
    """Cubic interpolation of tau as a function of h, within what convexity allows: tangents below, secant above."""
    left, left_h, left_slope, right, right_h, right_slope = bracket
    width = right_h - left_h
    s = (1.0 - left_h) / width
    t = 1.0 - s
    root = (1.0 + 2.0 * s) * t * t * left + s * s * (3.0 - 2.0 * s) * right
    root += width * s * t * (t / left_slope - s / right_slope)
    below = tl.maximum(left + (1.0 - left_h) / left_slope, right + (1.0 - right_h) / right_slope)
    return tl.minimum(tl.maximum(root, below), left + (right - left) * s)
