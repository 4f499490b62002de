"""Single instructions of a GPU, where Triton's own functions take more; in its interpreter what comes to the same.

Shapes: number by number; arguments and results are tiles of one shape, or broadcast to it. float32.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


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
def log2(z):
    """One instruction of the special unit; -inf for 0."""
    if INTERPRETED:
        return tl.where(z > 0, tl.log2(tl.where(z > 0, z, 1.0)), float("-inf"))
    else:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [z], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def exp2(x):
    """One instruction of the special unit; 0 for -inf."""
    if INTERPRETED:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def any_thread(condition):
    """Whether a condition holds as any thread of the program sees it: one answer for all, so that a loop may end by it.

    A sum of floats may differ in its last bit between threads that hold it, a comparison of it then altogether.
    """
    if INTERPRETED:
        return condition
    else:
        anywhere = tl.inline_asm_elementwise(
            """{
            .reg .pred mine, anywhere;
            setp.ne.s32 mine, $1, 0;
            bar.red.or.pred anywhere, 0, mine;
            selp.s32 $0, 1, 0, anywhere;
            }""",
            "=r,r", [condition.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
        return anywhere != 0
