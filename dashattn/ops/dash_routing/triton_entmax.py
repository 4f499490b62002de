"""The entmax threshold of many rows at once, as Triton functions.

With x = (alpha - 1) (s - max s) <= 0 for scores s, r = 1 / (alpha - 1) and z = max(x - tau, 0), entmax is p = z ** r
with sum p = 1. The root is sought on h(tau) = (sum z ** r) ** (1 / r) - 1, a convex function and nearly a straight
line: bracketed by its values at four fixed points, interpolated, then stepped to.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
SMALLEST_EXPONENT = tl.constexpr(1e-7)
MAX_PASSES = tl.constexpr(40)


@triton.jit
def saturated(x, slope, shift):
    """x * slope + shift, cut to [0, 1]: one instruction where a maximum with 0 alone would cost two."""
    if INTERPRETED:
        return tl.minimum(tl.maximum(x * slope + shift, 0.0), 1.0)
    else:
        return tl.inline_asm_elementwise(
            "fma.rn.sat.f32 $0, $1, $2, $3;", "=f,f,f,f", [x, slope, shift], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def above_threshold(x, slope, tau):
    """z = max(slope x - tau, 0) for x <= 0, which no tau >= -1 lets rise above 1."""
    return saturated(x, slope[:, None], -tau[:, None])


@triton.jit
def is_positive(p, SQUARE: tl.constexpr):
    """1.0 where p > 0, else 0.0. A square is never as small as 1e-30, which saves an instruction; a high power is."""
    if SQUARE:
        return saturated(p, 1e30, 0.0)
    else:
        return tl.where(p > 0, 1.0, 0.0)


@triton.jit
def fold(x):
    """Sums the columns that a thread holds, [R, C] -> [R, 8]: threads exchange their sums once, after the loop."""
    return tl.sum(tl.reshape(x, (x.shape[0], x.shape[1] // 8, 8)), 1)


@triton.jit
def to_the_power(z, exponent):
    """z ** exponent for 0 <= z <= 1 and exponent >= 0, to 1e-6 of itself: two instructions of the special unit.

    0 where z is 0, for exponent 0 too.
    """
    exponent = tl.maximum(exponent, SMALLEST_EXPONENT)
    if INTERPRETED:
        return tl.where(z > 0, tl.exp2(tl.log2(tl.where(z > 0, z, 1.0)) * exponent), 0.0)
    else:
        log2 = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [z], dtype=tl.float32, is_pure=True, pack=1
        )
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [log2 * exponent], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def power(z, exponent, SQUARE: tl.constexpr):
    """(z ** r, z ** (r - 1)) with ``exponent`` = r - 1 per row; both 0 where z is 0."""
    if SQUARE:
        return z * z, z
    else:
        low = to_the_power(z, exponent)
        return low * z, low


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
