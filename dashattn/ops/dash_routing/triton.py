"""DashAttention's router on the GPU: ``reference.py``'s function with Triton kernels, as PyTorch custom operators.

It hands out the bias as a tensor [B, T, H, N], which ``ops/dash_attention`` need not build.

Shapes: B batch, T tokens, Hq query heads, H KV heads, D head size, N chunks of a row of which n are complete, W words
of 32 chunks. summaries [B, n, H, D]; alpha float32 [Hq]; words int32 [B, H, T, W]; peak and tau float32 [B, T, Hq].
"""

import torch
from torch import Tensor

from dashattn.ops.block_sparse.schedule import tile_lists
from dashattn.ops.block_sparse.triton import check_kernels_fit, flatten_words
from dashattn.ops.chunk_summary.triton import summary_starts
from dashattn.ops.dash_routing import triton_forward, triton_softmax
from dashattn.ops.dash_routing.reference import NEGLIGIBLE_SIGMA
from dashattn.ops.dash_routing.triton_backward import route_backward
from dashattn.ops.dash_routing.triton_forward import prior_bias, router_options
from dashattn.ops.operators import operator
from dashattn.ops.tiles import Geometry, flatten_tokens, geometry
from dashattn.selection import Selection


def has_forward_bias(prior: str, sigma: float, dtype: torch.dtype) -> bool:
    return prior == "raw" or (prior == "tempered" and (sigma < NEGLIGIBLE_SIGMA or dtype == torch.float32))


def temperature(prior: str, sigma: float) -> float | None:
    """As the router's kernels take it: None for the raw prior."""
    return sigma if prior == "tempered" else None


def alpha_of_heads(alpha: float | Tensor, q: Tensor) -> Tensor | None:
    """float32 [Hq], or None for 1.5."""
    heads = q.shape[2]
    if isinstance(alpha, Tensor):
        return alpha.float().expand(heads).contiguous()
    if alpha == 1.5:
        return None
    return torch.full((heads,), alpha, dtype=torch.float32, device=q.device)


def _flat_summaries(summaries: Tensor) -> Tensor:
    """[B, n, H, D] -> [B * n, H, D], at least one row: a descriptor cannot describe an empty tensor."""
    flat = flatten_tokens(summaries)
    return flat if len(flat) else flat.new_zeros(1, *flat.shape[1:])


def split_scale(router_scale: float | Tensor, head_scale: float) -> tuple[Tensor | None, float]:
    """``router_scale`` and ``score_scale`` of the operators: a scale that moves stays a tensor up to them."""
    return (router_scale, head_scale) if isinstance(router_scale, Tensor) else (None, router_scale * head_scale)


def joined_scale(router_scale: Tensor | None, score_scale: float) -> float:
    return score_scale if router_scale is None else router_scale.item() * score_scale


def selector_bound(selector: str, topk: int | Tensor, top_p: float | Tensor) -> Tensor | None:
    """k or p of the operators: a tensor, which may move, on the CPU; None for entmax."""
    if selector == "entmax":
        return None
    bound = topk if selector == "topk" else top_p
    return bound if isinstance(bound, Tensor) else torch.tensor(bound, dtype=torch.float64, device="cpu")


def route(
    q: Tensor, summaries: Tensor, alpha: Tensor | None, starts: Tensor, geo: Geometry, chunk_size: int, num_blocks: int,
    score_scale: float, forced: tuple[int, int], selector: str, bound: Tensor | None, options: dict[str, int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``triton_forward.route`` or ``triton_softmax.route``."""
    if bound is None:
        return triton_forward.route(
            q, summaries, alpha, starts, geo, chunk_size, num_blocks, score_scale, forced, options
        )
    return triton_softmax.route(
        q, summaries, starts, geo, chunk_size, num_blocks, score_scale, forced, selector, bound.item(), options
    )


def num_blocks(q: Tensor, chunk_size: int) -> int:
    return -(-q.shape[1] // chunk_size)


@operator("dash_route")
def _route_op(
    q: Tensor, summaries: Tensor, alpha: Tensor | None, cu_seqlens: Tensor | None, router_scale: Tensor | None,
    bound: Tensor | None, chunk_size: int, score_scale: float, forced: list[int], selector: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Words int32 [B, H, T, W]; highest product q . k~ and threshold, float32 [B, T, Hq].

    Here and below ``router_scale`` is float64 [] on the CPU, a factor of ``score_scale`` (``split_scale``), ``bound``
    that of ``selector_bound``, and ``forced`` are ``init_chunks`` and ``local_chunks``.
    """
    score_scale = joined_scale(router_scale, score_scale)
    geo = geometry(q, summaries.shape[2], cu_seqlens)
    words, peak, tau = route(
        flatten_tokens(q), _flat_summaries(summaries), alpha, summary_starts(geo, chunk_size), geo, chunk_size,
        num_blocks(q, chunk_size), score_scale, forced, selector, bound, router_options(geo.padded_dim, q.itemsize),
    )  # fmt: skip
    words = words.unflatten(1, q.shape[:2]).transpose(0, 1)
    return words.contiguous(), peak.view(q.shape[:3]), tau.view(q.shape[:3])


@_route_op.register_fake
def _(q, summaries, alpha, cu_seqlens, router_scale, bound, chunk_size, score_scale, forced, selector):
    batch, length, heads, _ = q.shape
    width = -(-num_blocks(q, chunk_size) // 32)
    words = q.new_empty(batch, summaries.shape[2], length, width, dtype=torch.int32)
    return words, *(q.new_empty(batch, length, heads, dtype=torch.float32) for _ in range(2))


@operator("dash_prior")
def _prior_op(
    q: Tensor, summaries: Tensor, alpha: Tensor | None, words: Tensor, peak: Tensor, tau: Tensor,
    cu_seqlens: Tensor | None, router_scale: Tensor | None, chunk_size: int, score_scale: float, forced: list[int],
    softmax: bool, sigma: float | None,
) -> Tensor:  # fmt: skip
    """Bias float32 [B, T, H, N]."""
    score_scale = joined_scale(router_scale, score_scale)
    geo = geometry(q, summaries.shape[2], cu_seqlens)
    bias = prior_bias(
        flatten_tokens(q), _flat_summaries(summaries), alpha, summary_starts(geo, chunk_size), flatten_words(words),
        peak.flatten(0, 1), tau.flatten(0, 1), geo, chunk_size, num_blocks(q, chunk_size), score_scale, forced, sigma,
        softmax, router_options(geo.padded_dim, q.itemsize),
    )  # fmt: skip
    selected = Selection(words, chunk_size).mask()[..., : bias.shape[-1]]
    return bias.unflatten(0, q.shape[:2]).masked_fill(~selected, 0)


@_prior_op.register_fake
def _(q, summaries, alpha, words, peak, tau, cu_seqlens, router_scale, chunk_size, score_scale, forced, softmax,
      sigma):  # fmt: skip
    return q.new_empty(*q.shape[:2], summaries.shape[2], num_blocks(q, chunk_size), dtype=torch.float32)


@operator("dash_prior_backward")
def _prior_backward_op(
    grad: Tensor, q: Tensor, summaries: Tensor, alpha: Tensor | None, words: Tensor, peak: Tensor, tau: Tensor,
    cu_seqlens: Tensor | None, router_scale: Tensor | None, chunk_size: int, score_scale: float, forced: list[int],
    softmax: bool, sigma: float | None, alpha_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dsummaries and dalpha (empty unless asked for)."""
    score_scale = joined_scale(router_scale, score_scale)
    geo = geometry(q, summaries.shape[2], cu_seqlens)
    dq = torch.zeros_like(q, memory_format=torch.contiguous_format)
    router = router_options(geo.padded_dim, q.itemsize)
    flat_words = flatten_words(words)
    lists = tile_lists(flat_words, geo, chunk_size, geo.padded_tile_tokens(router["rows"]))
    dsummaries, dalpha = route_backward(
        flatten_tokens(q), _flat_summaries(summaries), alpha, summary_starts(geo, chunk_size), peak.flatten(0, 1),
        tau.flatten(0, 1), grad.flatten(0, 1).float().contiguous(), dq.flatten(0, 1), flat_words, lists, geo,
        chunk_size, score_scale, forced, sigma, alpha_grad, softmax, router,
    )  # fmt: skip
    return dq, _like_summaries(dsummaries, summaries), q.new_empty(0) if dalpha is None else dalpha


def _like_summaries(flat: Tensor, summaries: Tensor) -> Tensor:
    return flat[: summaries.shape[0] * summaries.shape[1]].view(summaries.shape)


@_prior_backward_op.register_fake
def _(grad, q, summaries, alpha, words, peak, tau, cu_seqlens, router_scale, chunk_size, score_scale, forced, softmax,
      sigma, alpha_grad):  # fmt: skip
    dalpha = q.new_empty(q.shape[2], dtype=torch.float32) if alpha_grad else q.new_empty(0)
    return torch.empty_like(q), torch.empty_like(summaries), dalpha


def _prior_setup(ctx, inputs, output):
    *tensors, ctx.chunk_size, ctx.score_scale, ctx.forced, ctx.softmax, ctx.sigma = inputs
    ctx.save_for_backward(*tensors)


def _prior_backward(ctx, grad):
    alpha_grad = ctx.needs_input_grad[2]
    dq, dsummaries, dalpha = _prior_backward_op(
        grad, *ctx.saved_tensors, ctx.chunk_size, ctx.score_scale, ctx.forced, ctx.softmax, ctx.sigma, alpha_grad
    )
    return dq, dsummaries, dalpha if alpha_grad else None, *(None,) * 10


_prior_op.register_autograd(_prior_backward, setup_context=_prior_setup)


def dash_routing(
    q: Tensor,
    summaries: Tensor,
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
    cu_seqlens: Tensor | None = None,
) -> tuple[Selection, Tensor | None]:
    """As ``reference.dash_routing``, for ``prior_heads`` group; the bias has ceil(T / chunk_size) columns."""
    check_prior_heads(prior_heads)
    check_kernels_fit(q, chunk_size)
    factor, score_scale = split_scale(router_scale, q.shape[-1] ** -0.5)
    settings = chunk_size, score_scale, [init_chunks, local_chunks]
    bound = selector_bound(selector, topk, top_p)
    alpha = alpha_of_heads(alpha, q) if bound is None else None
    with torch.no_grad():  # the bias alone carries gradient
        words, peak, tau = _route_op(q, summaries, alpha, cu_seqlens, factor, bound, *settings, selector)
    selection = Selection(words, chunk_size)
    if prior == "none":
        return selection, None
    kind = bound is not None, temperature(prior, sigma)
    return selection, _prior_op(q, summaries, alpha, words, peak, tau, cu_seqlens, factor, *settings, *kind)


def check_prior_heads(prior_heads: str) -> None:
    if prior_heads != "group":
        raise ValueError(f'the Triton router has prior_heads "group" only, not "{prior_heads}": use impl="reference"')
