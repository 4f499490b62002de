"""Chunk summaries on the GPU: ``reference.py``'s function with Triton kernels, as a PyTorch custom operator.

A program owns one complete chunk of one KV head; forward and backward read the keys once.

Shapes: n = B T tokens laid out flat, M documents, H KV heads, D head size, N summaries of chunks of BLOCK tokens. k
[n, H, D]; queries [1 or N, H, D]; summaries [N, H, D]; starts int32 [M + 1].
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dashattn.ops.operators import operator
from dashattn.ops.tiles import Geometry, flatten_tokens, geometry, locate_tile, multiples
from dashattn.rope import rotate_half


@triton.jit
def _chunk(documents, starts, slot, num_documents, BLOCK: tl.constexpr):
    """(first token, summary) of a chunk slot; the summary is -1 if there is no complete chunk there."""
    document, start, end, index = locate_tile(documents, slot, num_documents, BLOCK)
    first = start + index * BLOCK
    return first, tl.where(first + BLOCK <= end, tl.load(starts + document) + index, -1)


@triton.jit
def pooling_weights(k, query, softmax_scale):
    logits = tl.sum(k * query[None, :], 1) * softmax_scale
    weights = tl.exp(logits - tl.max(logits, 0))
    return weights / tl.sum(weights, 0)


@triton.jit(do_not_specialize=["num_documents", "query_stride"])
def summary_kernel(
    k_ptr, query_ptr, out_ptr, documents, starts, softmax_scale, num_documents, query_stride,
    KV_HEADS: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(1)
    first, summary = _chunk(documents, starts, tl.program_id(0), num_documents, BLOCK)
    if summary < 0:
        return
    dim = tl.arange(0, DIM)
    in_dim = dim < HEAD_DIM
    token = first + tl.arange(0, BLOCK)
    offset = (token.to(tl.int64)[:, None] * KV_HEADS + kv_head) * HEAD_DIM + dim[None, :]
    k = tl.load(k_ptr + offset, mask=in_dim[None, :], other=0.0).to(tl.float32)
    query_offset = summary.to(tl.int64) * query_stride + kv_head * HEAD_DIM + dim
    query = tl.load(query_ptr + query_offset, mask=in_dim, other=0.0).to(tl.float32)
    weights = pooling_weights(k, query, softmax_scale)
    out = tl.sum(weights[:, None] * k, 0)
    out_offset = (summary.to(tl.int64) * KV_HEADS + kv_head) * HEAD_DIM + dim
    tl.store(out_ptr + out_offset, out.to(out_ptr.dtype.element_ty), mask=in_dim)


@triton.jit(do_not_specialize=["num_documents", "query_stride"])
def summary_grad_kernel(
    k_ptr, query_ptr, grad_ptr, dk_ptr, dquery_ptr, documents, starts, softmax_scale, num_documents, query_stride,
    KV_HEADS: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Adds dk_t = a_t g + a_t (w_t - w) r / sqrt(D), with a the pooling weights, w_t = k_t . g and w = sum a w."""
    kv_head = tl.program_id(1)
    first, summary = _chunk(documents, starts, tl.program_id(0), num_documents, BLOCK)
    if summary < 0:
        return
    dim = tl.arange(0, DIM)
    in_dim = dim < HEAD_DIM
    token = first + tl.arange(0, BLOCK)
    offset = (token.to(tl.int64)[:, None] * KV_HEADS + kv_head) * HEAD_DIM + dim[None, :]
    k = tl.load(k_ptr + offset, mask=in_dim[None, :], other=0.0).to(tl.float32)
    query_offset = summary.to(tl.int64) * query_stride + kv_head * HEAD_DIM + dim
    query = tl.load(query_ptr + query_offset, mask=in_dim, other=0.0).to(tl.float32)
    weights = pooling_weights(k, query, softmax_scale)
    grad_offset = (summary.to(tl.int64) * KV_HEADS + kv_head) * HEAD_DIM + dim
    grad = tl.load(grad_ptr + grad_offset, mask=in_dim, other=0.0).to(tl.float32)
    w = tl.sum(k * grad[None, :], 1)
    dlogits = weights * (w - tl.sum(weights * w, 0)) * softmax_scale
    dk = tl.load(dk_ptr + offset, mask=in_dim[None, :], other=0.0).to(tl.float32)
    dk += weights[:, None] * grad[None, :] + dlogits[:, None] * query[None, :]
    tl.store(dk_ptr + offset, dk.to(dk_ptr.dtype.element_ty), mask=in_dim[None, :])
    tl.store(dquery_ptr + grad_offset, tl.sum(dlogits[:, None] * k, 0), mask=in_dim)


def summary_starts(geo: Geometry, chunk_size: int) -> Tensor:
    """First summary of every document and their total, int32 [M + 1]: only complete chunks have one."""
    if geo.uniform is not None:
        return multiples(geo.uniform // chunk_size, geo.num_documents, geo.documents.device)
    complete = geo.documents.diff() // chunk_size
    return torch.nn.functional.pad(complete.cumsum(0, dtype=torch.int32), (1, 0))


def _launch_options(queries: Tensor, geo: Geometry, chunk_size: int) -> tuple[int, dict]:
    """Stride between the queries of two chunks, and the kernels' constants."""
    stride = queries.stride(0) if len(queries) > 1 else 0
    return stride, dict(KV_HEADS=geo.kv_heads, BLOCK=chunk_size, HEAD_DIM=geo.head_dim, DIM=geo.padded_dim, num_warps=4)


def summarise(k: Tensor, queries: Tensor, starts: Tensor, geo: Geometry, chunk_size: int, count: int) -> Tensor:
    """``count`` summaries and at least one row, [count, H, D], of keys [n, H, D]; rows that no chunk fills are 0.

    ``queries``: [1 or count, H, D], one for all chunks or one for each.
    """
    allocate = k.new_empty if geo.uniform is not None and count else k.new_zeros
    out = allocate(max(1, count), *k.shape[1:])
    if count:
        stride, constants = _launch_options(queries, geo, chunk_size)
        summary_kernel[(geo.slots(chunk_size), geo.kv_heads)](
            k, queries, out, geo.documents, starts, geo.head_dim**-0.5, geo.num_documents, stride, **constants
        )
    return out


def summarise_backward(
    grad: Tensor, k: Tensor, queries: Tensor, dk: Tensor, starts: Tensor, geo: Geometry, chunk_size: int, count: int
) -> Tensor:
    """Adds the gradient of the keys to ``dk`` in place; returns that of the queries, float32 in their shape."""
    dquery = torch.zeros(count, *k.shape[1:], dtype=torch.float32, device=k.device)
    if count:
        stride, constants = _launch_options(queries, geo, chunk_size)
        summary_grad_kernel[(geo.slots(chunk_size), geo.kv_heads)](
            k, queries, grad, dk, dquery, geo.documents, starts, geo.head_dim**-0.5, geo.num_documents, stride,
            **constants,
        )  # fmt: skip
    return dquery.sum(0, keepdim=True) if len(queries) == 1 else dquery


@operator("chunk_summary_forward")
def _forward_op(k: Tensor, queries: Tensor, cu_seqlens: Tensor | None, chunk_size: int) -> Tensor:
    """``queries``: [1 or B * (T // chunk_size), H, D], one for all chunks or one for each."""
    batch, length, *rest = k.shape
    geo = geometry(k, k.shape[2], cu_seqlens)
    count = batch * (length // chunk_size)
    out = summarise(flatten_tokens(k), queries, summary_starts(geo, chunk_size), geo, chunk_size, count)
    return out[:count].view(batch, length // chunk_size, *rest)


@_forward_op.register_fake
def _(k, queries, cu_seqlens, chunk_size):
    return k.new_empty(k.shape[0], k.shape[1] // chunk_size, *k.shape[2:])


@operator("chunk_summary_backward")
def _backward_op(
    grad: Tensor, k: Tensor, queries: Tensor, cu_seqlens: Tensor | None, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """dk, and the gradient of the queries, float32."""
    geo = geometry(k, k.shape[2], cu_seqlens)
    dk = torch.zeros_like(k, memory_format=torch.contiguous_format)
    dquery = summarise_backward(
        grad.contiguous(), flatten_tokens(k), queries, dk.flatten(0, 1), summary_starts(geo, chunk_size), geo,
        chunk_size, grad.shape[0] * grad.shape[1],
    )  # fmt: skip
    return dk, dquery


@_backward_op.register_fake
def _(grad, k, queries, cu_seqlens, chunk_size):
    return k.new_empty(k.shape), queries.new_empty(queries.shape, dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    k, queries, cu_seqlens, ctx.chunk_size = inputs
    ctx.save_for_backward(k, queries, cu_seqlens)


def _backward(ctx, grad):
    k, queries, cu_seqlens = ctx.saved_tensors
    dk, dquery = _backward_op(grad, k, queries, cu_seqlens, ctx.chunk_size)
    return dk, dquery.to(queries.dtype), None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def chunk_summary(
    k: Tensor,
    chunk_query: Tensor,
    *,
    chunk_size: int,
    cu_seqlens: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """As ``reference.chunk_summary``; chunk sizes that are powers of two, no float64."""
    return _forward_op(k, pooling_queries(k, chunk_query, chunk_size, cu_seqlens, rope), cu_seqlens, chunk_size)


def pooling_queries(
    k: Tensor, chunk_query: Tensor, chunk_size: int, cu_seqlens: Tensor | None, rope: tuple[Tensor, Tensor] | None
) -> Tensor:
    """The chunk query [1, H, D], or with ``rope`` every chunk's mean of the rotated one, float32 [B * (T // C), H, D].

    The mean over a chunk of a rotation of one vector is the mean rotation of it, so averaging the tables suffices.
    """
    if rope is None:
        return chunk_query[None].contiguous()
    batch, length = k.shape[:2]
    per_row = length // chunk_size
    geo = geometry(k, k.shape[2], cu_seqlens)
    starts = summary_starts(geo, chunk_size).long()
    summary = torch.arange(batch * per_row, device=k.device)
    document = (torch.searchsorted(starts, summary, right=True) - 1).clamp(max=geo.num_documents - 1)
    first = geo.documents.long()[document] + (summary - starts[document]) * chunk_size
    token = first[:, None] + torch.arange(chunk_size, device=k.device)
    token = token.clamp(max=geo.tokens - 1)  # rows past the last summary are read by nobody
    cos, sin = (t.expand(batch, -1, -1).flatten(0, 1)[token].float().mean(1)[:, None] for t in rope)
    query = chunk_query.float()
    return (query * cos + rotate_half(query) * sin).contiguous()
