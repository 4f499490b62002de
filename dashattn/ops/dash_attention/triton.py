"""DashAttention on the GPU: summaries, router and attention in one differentiable PyTorch operator.

Where the prior is tempered by a large sigma the forward never builds a bias.

Shapes: B batch, T tokens, n = B T of them laid out flat (suffix ``_nHD``), Hq query heads, H KV heads, D head size, N
chunks of a row, W words of 32 chunks. summaries [complete chunks, H, D]; queries [1 or complete chunks, H, D]; alpha
float32 [Hq]; words int32 [B, H, T, W]; lse, peak and tau float32 [B, T, Hq]; the bias and its gradient
float32 [n, H, N].
"""

import torch
from torch import Tensor

from dashattn.ops.block_sparse.schedule import tile_lists
from dashattn.ops.block_sparse.triton import (
    attend,
    check_backward_room,
    check_forward_room,
    check_kernels_fit,
    flatten_words,
    gradients,
)
from dashattn.ops.chunk_summary.triton import (
    pooling_queries,
    summarise,
    summarise_backward,
    summary_starts,
)
from dashattn.ops.dash_routing.triton import (
    alpha_of_heads,
    check_prior_heads,
    has_forward_bias,
    joined_scale,
    num_blocks,
    route,
    selector_bound,
    split_scale,
    temperature,
)
from dashattn.ops.dash_routing.triton_backward import route_backward
from dashattn.ops.dash_routing.triton_forward import prior_bias, router_options
from dashattn.ops.operators import operator
from dashattn.ops.tiles import flatten_tokens, geometry
from dashattn.selection import Selection


def _forward_bias(
    q_nHD, summaries, alpha, starts, words, peak, tau, geo, chunk_size, blocks, score_scale, forced, prior, sigma,
    softmax, router,
):  # fmt: skip
    """The bias [n, H, N] where the attention needs one, else None; the backward makes it again."""
    if not has_forward_bias(prior, sigma, q_nHD.dtype):
        return None
    return prior_bias(
        q_nHD, summaries, alpha, starts, words, peak, tau, geo, chunk_size, blocks, score_scale, forced,
        temperature(prior, sigma), softmax, router,
    )  # fmt: skip


@operator("dash_attention_forward")
def _forward_op(
    q: Tensor, k: Tensor, v: Tensor, queries: Tensor, alpha: Tensor | None, cu_seqlens: Tensor | None,
    router_scale: Tensor | None, bound: Tensor | None, chunk_size: int, score_scale: float, forced: list[int],
    scale: float, selector: str, prior: str, sigma: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Output [B, T, Hq, D], words [B, H, T, W], and what the backward needs.

    That is per row the log-normaliser, the highest product q . k~ and the threshold, and the summaries.
    ``router_scale``: float64 [] on the CPU, a factor of ``score_scale``. ``bound``: see ``selector_bound``. ``forced``:
    ``init_chunks`` and ``local_chunks``.
    """
    score_scale = joined_scale(router_scale, score_scale)
    geo = geometry(q, k.shape[2], cu_seqlens)
    blocks = num_blocks(q, chunk_size)
    bias_blocks = blocks if has_forward_bias(prior, sigma, q.dtype) else 0
    check_forward_room(q, geo, chunk_size, -(-blocks // 32), bias_blocks, bias_blocks > 0)
    q_nHD, k_nHD, v_nHD = (flatten_tokens(x) for x in (q, k, v))
    starts = summary_starts(geo, chunk_size)
    router = router_options(geo.padded_dim, q.itemsize)
    summaries = summarise(k_nHD, queries, starts, geo, chunk_size, _num_summaries(k, chunk_size))
    words, peak, tau = route(
        q_nHD, summaries, alpha, starts, geo, chunk_size, blocks, score_scale, forced, selector, bound, router
    )
    bias = _forward_bias(
        q_nHD, summaries, alpha, starts, words, peak, tau, geo, chunk_size, blocks, score_scale, forced, prior, sigma,
        bound is not None, router,
    )  # fmt: skip
    out, lse = attend(q_nHD, k_nHD, v_nHD, words, bias, geo, chunk_size, scale)
    words = words.unflatten(1, q.shape[:2]).transpose(0, 1).contiguous()
    return out.view(q.shape), words, *(x.view(q.shape[:3]) for x in (lse, peak, tau)), summaries


def _num_summaries(k: Tensor, chunk_size: int) -> int:
    return k.shape[0] * (k.shape[1] // chunk_size)


@_forward_op.register_fake
def _(q, k, v, queries, alpha, cu_seqlens, router_scale, bound, chunk_size, score_scale, forced, scale, selector, prior,
      sigma):  # fmt: skip
    batch, length, heads, _ = q.shape
    width = -(-num_blocks(q, chunk_size) // 32)
    words = q.new_empty(batch, k.shape[2], length, width, dtype=torch.int32)
    rows = [q.new_empty(batch, length, heads, dtype=torch.float32) for _ in range(3)]
    # a row at least: a descriptor cannot describe an empty tensor
    summaries = k.new_empty(torch.sym_max(1, _num_summaries(k, chunk_size)), *k.shape[2:])
    return q.new_empty(q.shape), words, *rows, summaries


@operator("dash_attention_backward")
def _backward_op(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, queries: Tensor, alpha: Tensor | None, cu_seqlens: Tensor | None,
    router_scale: Tensor | None, out: Tensor, words: Tensor, lse: Tensor, peak: Tensor, tau: Tensor, summaries: Tensor,
    chunk_size: int, score_scale: float, forced: list[int], scale: float, selector: str, prior: str, sigma: float,
    alpha_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, the gradient of the queries in float32, and dalpha (empty unless asked for)."""
    score_scale = joined_scale(router_scale, score_scale)
    geo = geometry(q, k.shape[2], cu_seqlens)
    blocks = num_blocks(q, chunk_size)
    bias_blocks = blocks if has_forward_bias(prior, sigma, q.dtype) else 0
    grad_heads = 0 if prior == "none" else geo.kv_heads
    check_backward_room(q, geo, chunk_size, words.shape[-1], bias_blocks, grad_heads, blocks)
    q_nHD, k_nHD, v_nHD, do_nHD, out_nHD = (flatten_tokens(x) for x in (q, k, v, grad, out))
    lse, peak, tau = (x.flatten(0, 1).contiguous() for x in (lse, peak, tau))
    flat_words = flatten_words(words)
    starts = summary_starts(geo, chunk_size)
    router = router_options(geo.padded_dim, q.itemsize)
    softmax = selector != "entmax"
    bias = _forward_bias(
        q_nHD, summaries, alpha, starts, flat_words, peak, tau, geo, chunk_size, blocks, score_scale, forced, prior,
        sigma, softmax, router,
    )  # fmt: skip
    # Only selected entries are written, and only they are read.
    shape = (geo.tokens, geo.kv_heads, blocks)
    bias_grad = None if prior == "none" else torch.empty(shape, dtype=torch.float32, device=q.device)
    dq, dk, dv, lists = gradients(
        q_nHD, k_nHD, v_nHD, flat_words, bias, do_nHD, out_nHD, lse, geo, chunk_size, scale, bias_grad
    )
    if bias_grad is None:
        dqueries, dalpha = torch.zeros(queries.shape, dtype=torch.float32, device=q.device), None
    else:
        router_tokens = geo.padded_tile_tokens(router["rows"])
        if lists is None or lists.tokens != router_tokens:
            lists = tile_lists(flat_words, geo, chunk_size, router_tokens)
        dsummaries, dalpha = route_backward(
            q_nHD, summaries, alpha, starts, peak, tau, bias_grad, dq, flat_words, lists, geo, chunk_size,
            score_scale, forced, temperature(prior, sigma), alpha_grad, softmax, router,
        )  # fmt: skip
        dqueries = summarise_backward(
            dsummaries, k_nHD, queries, dk, starts, geo, chunk_size, _num_summaries(k, chunk_size)
        )
    if dalpha is None:
        dalpha = q.new_zeros(geo.heads if alpha_grad else 0, dtype=torch.float32)
    return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape), dqueries, dalpha


@_backward_op.register_fake
def _(grad, q, k, v, queries, alpha, cu_seqlens, router_scale, out, words, lse, peak, tau, summaries, chunk_size,
      score_scale, forced, scale, selector, prior, sigma, alpha_grad):  # fmt: skip
    dqueries = queries.new_empty(queries.shape, dtype=torch.float32)
    dalpha = q.new_empty(q.shape[2] if alpha_grad else 0, dtype=torch.float32)
    return *(x.new_empty(x.shape) for x in (q, k, v)), dqueries, dalpha


def _setup_context(ctx, inputs, output):
    q, k, v, queries, alpha, cu_seqlens, router_scale, _bound, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, queries, alpha, cu_seqlens, router_scale, *output)


def _backward(ctx, grad, *_):
    alpha_grad = ctx.needs_input_grad[4]
    saved = ctx.saved_tensors
    dq, dk, dv, dqueries, dalpha = _backward_op(grad, *saved, *ctx.settings, alpha_grad)
    return dq, dk, dv, dqueries.to(saved[3].dtype), dalpha if alpha_grad else None, *(None,) * 10


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def dash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_query: Tensor,
    *,
    chunk_size: int,
    selector: str = "entmax",
    alpha: float | Tensor = 1.5,
    router_scale: float | Tensor = 1.0,
    topk: int | Tensor = 16,
    top_p: float | Tensor = 0.9,
    prior: str = "tempered",
    sigma: float = 1e6,
    prior_heads: str = "group",
    init_chunks: int = 0,
    local_chunks: int = 0,
    summary_rope: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Selection]:
    """The references of summaries, router and attention in one: the output [B, T, Hq, D] and the selection."""
    check_prior_heads(prior_heads)
    check_kernels_fit(q, chunk_size)
    head_scale = q.shape[-1] ** -0.5
    queries = pooling_queries(k, chunk_query, chunk_size, cu_seqlens, summary_rope)
    factor, score_scale = split_scale(router_scale, head_scale)
    bound = selector_bound(selector, topk, top_p)
    out, words, *_ = _forward_op(
        q, k, v, queries, alpha_of_heads(alpha, q) if bound is None else None, cu_seqlens, factor, bound, chunk_size,
        score_scale, [init_chunks, local_chunks], head_scale if scale is None else scale, selector, prior, sigma,
    )  # fmt: skip
    return out, Selection(words, chunk_size)
