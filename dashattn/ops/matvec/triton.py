"""``reference``'s products on the GPU. A token's products do little but read weights, in kernels of a few microseconds.

Norm, rotation, SwiGLU and the sum of the residual stream are in the kernel of the product. Of a kernel that may begin
before the one before it has ended (``overlapped_launch``) the weights are there when its inputs come. Sums are float32.

Shapes: K inputs, N outputs, D head size. x and hidden [1, 1, K]; weights [N, K]; norm [K]; onto and out [1, 1, N]; cos
and sin [1, 1, D], float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dashattn.ops.matvec.reference import Norm
from dashattn.ops.operators import operator
from dashattn.ops.tiles import overlapped_launch, power_of_2_from, wait_for_kernel_before

TILE = 2**13  # weights of a program: 64 of a thread
WIDEST = 2**14  # inputs: a program has whole rows
SINGLE, HALVES, GATED = map(tl.constexpr, range(3))


@triton.jit
def _load_rows(w_ptr, row, num_rows, K: tl.constexpr, COLS: tl.constexpr, MASKED: tl.constexpr):
    column = tl.arange(0, COLS)
    place = w_ptr + row[:, None] * K + column[None, :]
    if MASKED:
        return tl.load(place, mask=(row < num_rows)[:, None] & (column < K)[None, :], other=0.0)
    return tl.load(place)


@triton.jit
def _multiply(w, x, factor):
    return tl.sum(w.to(tl.float32) * x[None, :], 1) * factor


@triton.jit
def matvec_kernel(
    x_ptr, norm_ptr, hidden_ptr, w_ptr, w1_ptr, w2_ptr, onto_ptr, cos_ptr, sin_ptr, out_ptr, eps, scale,
    ROWS0: tl.constexpr, ROWS1: tl.constexpr, ROWS2: tl.constexpr, K: tl.constexpr, COLS: tl.constexpr,
    ROWS: tl.constexpr, KIND: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, ONTO: tl.constexpr,
    ROPE: tl.constexpr, MASKED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """ROWS outputs of one of up to three weights; of HALVES, as many pairs of channels that turn together. Of GATED the
    second weight goes with the first row by row."""
    pid = tl.program_id(0)
    part, before, num_rows = 0, 0, ROWS0
    weight = w_ptr
    if KIND == HALVES:
        programs0: tl.constexpr = (ROWS0 // 2 + ROWS - 1) // ROWS
        programs1: tl.constexpr = (ROWS1 // 2 + ROWS - 1) // ROWS
        if pid >= programs0 + programs1:
            part, before, num_rows = 2, ROWS0 + ROWS1, ROWS2
            weight = w2_ptr
            pid -= programs0 + programs1
        elif pid >= programs0:
            part, before, num_rows = 1, ROWS0, ROWS1
            weight = w1_ptr
            pid -= programs0
    row = pid.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    if KIND == HALVES:
        channel = row % HALF
        row += row - channel  # of the head before: HALF channels each
    column = tl.arange(0, COLS)
    w = _load_rows(weight, row, num_rows, K, COLS, MASKED)  # before the wait, for no kernel writes weights
    if KIND == HALVES:
        other = _load_rows(weight, row + HALF, num_rows, K, COLS, MASKED)
    if KIND == GATED:
        other = _load_rows(w1_ptr, row, num_rows, K, COLS, MASKED)
    if NORM:
        norm = tl.load(norm_ptr + column, mask=column < K, other=0.0).to(tl.float32)

    wait_for_kernel_before(PDL)
    x = tl.load(x_ptr + column, mask=column < K, other=0.0).to(tl.float32)
    factor = 1.0
    if NORM:
        factor = tl.rsqrt(tl.sum(x * x, 0) / K + eps)
        x *= norm
        if KIND == HALVES and tl.program_id(0) == 0:
            tl.store(hidden_ptr + column, (x * factor).to(hidden_ptr.dtype.element_ty), mask=column < K)
    out = _multiply(w, x, factor)
    in_rows = row < num_rows
    if KIND == GATED:
        out = out * tl.sigmoid(out) * _multiply(other, x, factor)
    if KIND == HALVES:
        second = _multiply(other, x, factor)
        if ROPE and part < 2:
            cos, sin = tl.load(cos_ptr + channel), tl.load(sin_ptr + channel)
            other_cos, other_sin = tl.load(cos_ptr + HALF + channel), tl.load(sin_ptr + HALF + channel)
            first = out
            out = first * cos - second * sin
            second = second * other_cos + first * other_sin
        tl.store(out_ptr + before + row + HALF, second.to(out_ptr.dtype.element_ty), mask=in_rows)
    if KIND == SINGLE:
        out *= scale
    if ONTO:
        out += tl.load(onto_ptr + row, mask=in_rows, other=0.0).to(tl.float32)
    tl.store(out_ptr + before + row, out.to(out_ptr.dtype.element_ty), mask=in_rows)


def takes(x: Tensor) -> bool:
    """Whether these kernels are for a block's input on a GPU: one token, in 16 bits."""
    return x.itemsize == 2 and x.shape[0] * x.shape[1] == 1 and x.shape[-1] <= WIDEST


def _launch(
    x: Tensor, weights: list[Tensor], kind: tl.constexpr, norm: Tensor | None, eps: float, *,
    hidden: Tensor | None = None, half: int = 1, rope: tuple[Tensor, Tensor] | None = None,
    onto: Tensor | None = None, scale: float = 1.0,
) -> Tensor:  # fmt: skip
    sizes = [weight.shape[0] for weight in weights]
    columns = power_of_2_from(x.shape[-1])
    rows = max(1, TILE // columns // (1 if kind == SINGLE else 2))
    units = [size // 2 for size in sizes] if kind == HALVES else sizes[:1]
    out = x.new_empty(1, 1, sum(sizes) if kind == HALVES else sizes[0])
    weights = [weight.contiguous() for weight in weights] + [None] * (3 - len(weights))
    cos, sin = (None, None) if rope is None else (table.contiguous() for table in rope)
    programs = sum(-(-unit // rows) for unit in units)
    matvec_kernel[(programs,)](
        x.contiguous(), norm, hidden, *weights, None if onto is None else onto.contiguous(), cos, sin, out, eps, scale,
        *sizes, *[0] * (3 - len(sizes)), K=x.shape[-1], COLS=columns, ROWS=rows, KIND=kind.value, HALF=half,
        NORM=norm is not None, ONTO=onto is not None, ROPE=rope is not None,
        MASKED=columns != x.shape[-1] or any(unit % rows for unit in units),
        num_warps=4, **overlapped_launch(x.device),
    )  # fmt: skip
    return out


@operator("token_heads")
def _heads_op(
    x: Tensor, q: Tensor, k: Tensor, v: Tensor, head_dim: int, norm: Tensor | None, eps: float, cos: Tensor | None,
    sin: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    hidden = torch.empty_like(x)
    rope = None if cos is None else (cos, sin)
    return _launch(x, [q, k, v], HALVES, norm, eps, hidden=hidden, half=head_dim // 2, rope=rope), hidden


@_heads_op.register_fake
def _(x, q, k, v, head_dim, norm, eps, cos, sin):
    return x.new_empty(1, 1, len(q) + len(k) + len(v)), torch.empty_like(x)


@operator("token_swiglu")
def _swiglu_op(x: Tensor, gate: Tensor, up: Tensor, norm: Tensor | None, eps: float) -> Tensor:
    return _launch(x, [gate, up], GATED, norm, eps)


@_swiglu_op.register_fake
def _(x, gate, up, norm, eps):
    return x.new_empty(1, 1, len(gate))


@operator("token_product")
def _product_op(
    x: Tensor, weight: Tensor, norm: Tensor | None, eps: float, onto: Tensor | None, scale: float
) -> Tensor:
    return _launch(x, [weight], SINGLE, norm, eps, onto=onto, scale=scale)


@_product_op.register_fake
def _(x, weight, norm, eps, onto, scale):
    return x.new_empty(1, 1, len(weight))


def heads(
    x: Tensor, weights: list[Tensor], head_dim: int, norm: Norm, rope: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``reference.heads``, for an even head size."""
    out, hidden = _heads_op(x, *weights, head_dim, *(norm or (None, 0.0)), *(rope or (None, None)))
    q, k, v = out.split([len(weight) for weight in weights], -1)
    return *(part.unflatten(-1, (-1, head_dim)) for part in (q, k, v)), x if norm is None else hidden


def swiglu(x: Tensor, gate: Tensor, up: Tensor, norm: Norm) -> Tensor:
    """As ``reference.swiglu``."""
    return _swiglu_op(x, gate, up, *(norm or (None, 0.0)))


def product(x: Tensor, weight: Tensor, norm: Norm = None, onto: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """As ``reference.product``."""
    return _product_op(x, weight, *(norm or (None, 0.0)), onto, scale)
