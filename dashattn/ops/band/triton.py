"""Attention over a band of keys on the GPU: NSA's compressed and window branches, as PyTorch custom operators.

Shapes: B batch, T tokens, J keys, Hq query heads, H KV heads, D head size.
"""

import torch
from torch import Tensor

from dashattn.ops.band.triton_backward import backward
from dashattn.ops.band.triton_forward import Band, forward
from dashattn.ops.operators import operator
from dashattn.ops.tiles import flatten_tokens, geometry


def flatten_keys(x: Tensor) -> Tensor:
    """[B, J, H, D] -> [B * J, H, D], at least one row: a descriptor cannot describe an empty tensor."""
    flat = flatten_tokens(x)
    return flat if len(flat) else flat.new_zeros(1, *flat.shape[1:])


@operator("band_forward")
def _forward_op(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, size: int, stride: int, span: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Output [B, T, Hq, D] and base-2 log-normalisers, float32 [B, T, Hq]."""
    geo, band = geometry(q, k.shape[2], cu_seqlens), Band(size, stride, span)
    out, lse = forward(flatten_tokens(q), flatten_keys(k), flatten_keys(v), band.starts(geo), geo, band, scale)
    return out.view(q.shape), lse.view(q.shape[:3])


@_forward_op.register_fake
def _(q, k, v, cu_seqlens, size, stride, span, scale):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@operator("band_backward")
def _backward_op(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, out: Tensor, lse: Tensor, size: int,
    stride: int, span: int | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    geo, band = geometry(q, k.shape[2], cu_seqlens), Band(size, stride, span)
    dq, dk, dv = backward(
        flatten_tokens(q), flatten_keys(k), flatten_keys(v), flatten_tokens(grad), flatten_tokens(out),
        lse.flatten(0, 1).contiguous(), band.starts(geo), geo, band, scale,
    )  # fmt: skip
    rows = k.shape[0] * k.shape[1]
    return dq.view(q.shape), dk[:rows].view(k.shape), dv[:rows].view(v.shape)


@_backward_op.register_fake
def _(grad, q, k, v, cu_seqlens, out, lse, size, stride, span, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.size, ctx.stride, ctx.span, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, grad, _grad_lse):
    grads = _backward_op(grad, *ctx.saved_tensors, ctx.size, ctx.stride, ctx.span, ctx.scale)
    return *grads, *(None,) * 5


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def compressed_attention(
    q: Tensor,
    compressed_k: Tensor,
    compressed_v: Tensor,
    *,
    kernel_size: int,
    kernel_stride: int,
    scale: float,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As ``compression.reference.compressed_attention``, in q's dtype, and the base-2 log-normalisers.

    The normalisers, float32 [B, T, Hq], are infinite where no window is visible; they carry no gradient.
    """
    out, lse = _forward_op(q, compressed_k, compressed_v, cu_seqlens, kernel_size, kernel_stride, None, scale)
    return out, lse.detach()


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window_size: int, scale: float, cu_seqlens: Tensor | None = None
) -> Tensor:
    """As ``window.reference.window_attention``."""
    return _forward_op(q, k, v, cu_seqlens, 1, 1, window_size, scale)[0]
