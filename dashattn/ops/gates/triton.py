"""The gated sum of NSA's branches on the GPU: every tensor is read or written once, forward and backward.

Shapes: B batch, T tokens, Hq query heads, D head size. gates [B, T, Hq, 2 or 3]; branches and out [B, T, Hq, D]. A row
is one head of one token.
"""

import triton
import triton.language as tl
from torch import Tensor

from dashattn.ops.operators import operator
from dashattn.ops.tiles import power_of_2_from


@triton.jit
def _rows(num_rows, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr):
    """Row indices of a program, which of them are there, and offsets and mask of their elements."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, DIM)
    mask = (row < num_rows)[:, None] & (dim < HEAD_DIM)[None, :]
    return row, row < num_rows, row[:, None] * HEAD_DIM + dim[None, :], mask


@triton.jit
def _weighted(gate_ptr, branch_ptr, row, valid, offset, mask):
    gate = tl.load(gate_ptr + row, mask=valid, other=0.0).to(tl.float32)
    return gate[:, None] * tl.load(branch_ptr + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["num_rows"])
def gated_sum_kernel(
    gates, first, second, third, out, num_rows,
    BRANCHES: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row, valid, offset, mask = _rows(num_rows, HEAD_DIM, DIM, ROWS)
    total = _weighted(gates, first, row * BRANCHES, valid, offset, mask)
    total += _weighted(gates + 1, second, row * BRANCHES, valid, offset, mask)
    if BRANCHES == 3:
        total += _weighted(gates + 2, third, row * BRANCHES, valid, offset, mask)
    tl.store(out + offset, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _branch_grad(do, gate_ptr, branch_ptr, gate_grad_ptr, branch_grad_ptr, row, valid, offset, mask):
    gate = tl.load(gate_ptr + row, mask=valid, other=0.0).to(tl.float32)
    branch = tl.load(branch_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(gate_grad_ptr + row, tl.sum(do * branch, 1).to(gate_grad_ptr.dtype.element_ty), mask=valid)
    tl.store(branch_grad_ptr + offset, (gate[:, None] * do).to(branch_grad_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def gated_sum_grad_kernel(
    do_ptr, gates, first, second, third, dgates, dfirst, dsecond, dthird, num_rows,
    BRANCHES: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row, valid, offset, mask = _rows(num_rows, HEAD_DIM, DIM, ROWS)
    do = tl.load(do_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    _branch_grad(do, gates, first, dgates, dfirst, row * BRANCHES, valid, offset, mask)
    _branch_grad(do, gates + 1, second, dgates + 1, dsecond, row * BRANCHES, valid, offset, mask)
    if BRANCHES == 3:
        _branch_grad(do, gates + 2, third, dgates + 2, dthird, row * BRANCHES, valid, offset, mask)


def _constants(gates: Tensor, branch: Tensor) -> dict:
    head_dim = branch.shape[-1]
    return dict(BRANCHES=gates.shape[-1], HEAD_DIM=head_dim, DIM=power_of_2_from(head_dim), ROWS=16, num_warps=4)


@operator("gated_sum")
def _forward_op(gates: Tensor, first: Tensor, second: Tensor, third: Tensor | None) -> Tensor:
    out = first.new_empty(first.shape)
    rows = first[..., 0].numel()
    constants = _constants(gates, first)
    branches = (None if x is None else x.contiguous() for x in (first, second, third))
    gated_sum_kernel[(-(-rows // constants["ROWS"]),)](gates.contiguous(), *branches, out, rows, **constants)
    return out


@_forward_op.register_fake
def _(gates, first, second, third):
    return first.new_empty(first.shape)


@operator("gated_sum_backward")
def _backward_op(
    grad: Tensor, gates: Tensor, first: Tensor, second: Tensor, third: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the gates and of the branches; the last is empty without a third branch."""
    grads = [x.new_empty(x.shape) for x in (gates, first, second)]
    grads.append(first.new_empty((0,) if third is None else third.shape))
    rows = first[..., 0].numel()
    constants = _constants(gates, first)
    branches = (None if x is None else x.contiguous() for x in (first, second, third))
    gated_sum_grad_kernel[(-(-rows // constants["ROWS"]),)](
        grad.contiguous(), gates.contiguous(), *branches, *grads, rows, **constants
    )
    return tuple(grads)


@_backward_op.register_fake
def _(grad, gates, first, second, third):
    last = first.new_empty((0,) if third is None else third.shape)
    return *(x.new_empty(x.shape) for x in (gates, first, second)), last


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    saved = ctx.saved_tensors  # activation checkpointing gives them out once
    *grads, last = _backward_op(grad, *saved)
    return *grads, None if saved[3] is None else last


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def gated_sum(gates: Tensor, branches: list[Tensor]) -> Tensor:
    """As ``reference.gated_sum`` for two or three branches, in their dtype."""
    first, second, *third = branches
    return _forward_op(gates, first, second, *third or [None])
