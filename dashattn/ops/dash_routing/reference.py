"""DashAttention's router (arXiv 2605.18753): entmax over chunk summaries gives the selection and its prior.

Beside entmax, the controls that select a fixed number of chunks, or a fixed probability, by a softmax of the same
scores, whose logarithm is then the prior (top-k: "SAS", arXiv 2609.13141).

Shapes: B batch, T tokens, Hq query heads, H KV heads, G = Hq / H, D head size, n complete chunks, N chunks.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dashattn.documents import per_document
from dashattn.ops.dtypes import upcast
from dashattn.ops.entmax.reference import entmax
from dashattn.selection import Selection

SELECTORS = ("entmax", "topk", "topp")
PRIORS = ("raw", "tempered", "mass", "none")
PRIOR_HEADS = ("group", "head")
# From this sigma on a tempered prior (|log p| < 100) changes a weight by less than 1e-4 of itself, a twentieth of
# bfloat16's rounding: the kernels' 16-bit forwards leave it out. Its gradient is always there.
NEGLIGIBLE_SIGMA = 1e6


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
    """Selects chunks and returns the prior as an additive bias of the attention logits.

    A token's own chunk is always selected, and so are the forced ones: the first ``init_chunks`` of its document and
    the ``local_chunks`` before its own. Their bias is 0. Candidates are the other past chunks, and p is the mean of the
    group's probabilities over them. ``selector`` says of what kind these are and which chunks it selects by p:

    ``entmax``: alpha-entmax; all whose p is positive, however small (at small alpha it is often below float32's range;
    its logarithm is not). ``topk``: softmax; so many with the largest p that there are ``topk`` chunks with the forced
    ones. ``topp``: softmax; the fewest with the largest p that together reach ``top_p``. Ties go to the lower index.

    ``raw`` is log p, ``tempered`` is (log p - mean over the selected candidates) / sigma. ``mass`` gives the scores of
    every query head in place of a bias, of which ``mass.mass_bias`` makes one.

    Args:
        q: queries after RoPE [B, T, Hq, D].
        summaries: [B, T // chunk_size, H, D] from ``chunk_summary``.
        selector: entmax | topk | topp.
        alpha: of entmax; float, or tensor [Hq] or [], in [1.01, 2].
        router_scale: gamma, a float or a tensor []; larger selects fewer chunks, or as many from sharper probabilities.
        topk: chunks in all, forced ones included; a number or a tensor [].
        top_p: in (0, 1]; a number or a tensor []. 1 selects all candidates.
        prior: raw | tempered | mass | none.
        prior_heads: ``group``: one prior from the group's mean probability. ``head``: each query head its own.
        init_chunks, local_chunks: forced chunks; at least 0.

    Returns:
        The selection, and the bias [B, T, H, N] (``prior_heads`` group), [B, T, Hq, N] (head, or prior mass) or None
        (prior none), float32 (float64 for float64), with N = ceil(longest document / chunk_size). Entries that are not
        selected hold 0; with raw head priors -inf marks selected chunks off the head's own support.
    """
    options = dict(selector=selector, alpha=alpha, router_scale=router_scale, topk=topk, top_p=top_p)
    options |= dict(prior=prior, sigma=sigma, prior_heads=prior_heads)
    options |= dict(init_chunks=init_chunks, local_chunks=local_chunks)
    offset = 0  # of this document's first summary

    def route(q_BTHD):
        nonlocal offset
        length = q_BTHD.shape[1]
        complete = length // chunk_size
        summaries_BnHD = summaries[:, offset : offset + complete]
        offset += complete
        own_chunk = torch.arange(length, device=q.device)[None] // chunk_size
        selected, bias = select_chunks(q_BTHD, summaries_BnHD, own_chunk, -(-length // chunk_size), **options)
        return Selection.from_mask(selected, chunk_size), bias

    selections, biases = zip(*per_document(route, cu_seqlens, q), strict=True)
    if prior == "none":
        return Selection.concatenate(selections), None
    longest = max(b.shape[-1] for b in biases)
    bias = torch.cat([F.pad(b, (0, longest - b.shape[-1])) for b in biases], dim=1)
    return Selection.concatenate(selections), bias


def select_chunks(
    q: Tensor,
    summaries: Tensor,
    own_chunk: Tensor,
    num_chunks: int,
    *,
    prior: str,
    sigma: float,
    prior_heads: str,
    **choice,
) -> tuple[Tensor, Tensor | None]:
    """``dash_routing`` of queries anywhere in their sequences: a mask [B, T, H, N] in place of the selection.

    The other arguments are those of ``choose_chunks``.
    """
    selected, scores, log_p, support = choose_chunks(q, summaries, own_chunk, num_chunks, **choice)
    if prior == "none":
        return selected, None
    if prior == "mass":
        bias = scores.masked_fill(~support.any(2, keepdim=True), 0)
    else:
        bias = _prior(log_p, support, prior, sigma, prior_heads)
    return selected, F.pad(bias, (0, num_chunks - summaries.shape[1])).flatten(1, 2).transpose(1, 2)


def choose_chunks(
    q: Tensor,
    summaries: Tensor,
    own_chunk: Tensor,
    num_chunks: int,
    *,
    router_scale: float | Tensor,
    selector: str = "entmax",
    alpha: float | Tensor = 1.5,
    topk: int | Tensor = 16,
    top_p: float | Tensor = 0.9,
    init_chunks: int = 0,
    local_chunks: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The selection of ``dash_routing`` of queries anywhere in their sequences, and what decided it.

    Args:
        q: [B, T, Hq, D].
        summaries: [B, n, H, D], of which a query may choose candidates before its own chunk.
        own_chunk: integers that broadcast to [B, T].
        num_chunks: N >= n.

    Returns:
        A mask [B, T, H, N], and each [B, H, G, T, n] ``chunk_scores``, and the two of ``chunk_probabilities``.
    """
    candidates_BTN = candidate_chunks(own_chunk, num_chunks, init_chunks, local_chunks)
    scores = chunk_scores(q, summaries, router_scale)
    log_p, support = chunk_probabilities(
        scores,
        candidates_BTN[:, None, None, :, : summaries.shape[1]],
        selector=selector,
        alpha=alpha,
        wanted=int(topk) - init_chunks - local_chunks - 1 if selector == "topk" else float(top_p),
    )
    chosen_BTHN = F.pad(support.any(2), (0, num_chunks - summaries.shape[1])).transpose(1, 2)
    visible_BTN = torch.arange(num_chunks, device=q.device) <= own_chunk[..., None]
    return chosen_BTHN | (visible_BTN & ~candidates_BTN)[:, :, None], scores, log_p, support


def chunk_scores(q: Tensor, summaries: Tensor, router_scale: float | Tensor) -> Tensor:
    """``router_scale * q . k~ / sqrt(D)``, [B, H, G, T, n], of q [B, T, Hq, D] and summaries [B, n, H, D]."""
    q_BTHGD = upcast(q).unflatten(2, (summaries.shape[2], -1))
    return torch.einsum("bthgd,bnhd->bhgtn", q_BTHGD, upcast(summaries)) * (float(router_scale) * q.shape[-1] ** -0.5)


def chunk_probabilities(
    scores: Tensor, candidates: Tensor, *, selector: str, alpha: float | Tensor = 1.5, wanted: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log probabilities of the candidates, and which of them a query head has that are selected.

    Args:
        scores: [B, H, G, T, n].
        candidates: bool, broadcasts to ``scores``.
        alpha: of entmax, as in ``dash_routing``.
        wanted: candidates that topk selects, or probability that those of topp reach.

    Returns:
        Two tensors like ``scores``: the logarithms, of no meaning where there is no candidate, and a mask. With entmax
        each head has a mask of its own, its support, and their union is selected.
    """
    if selector == "entmax":
        if isinstance(alpha, Tensor):
            heads, group = scores.shape[1:3]
            alpha = alpha.to(scores.dtype).expand(heads * group).reshape(heads, group, 1, 1)
        _, log_p = entmax(scores, alpha, candidates)
        return log_p, log_p > -torch.inf
    log_p = scores.masked_fill(~candidates, torch.finfo(scores.dtype).min).log_softmax(-1)
    # By logarithms: of sharp scores most probabilities are 0 in float32, and would tie.
    ranked = log_p.detach().logsumexp(2, keepdim=True).masked_fill(~candidates, -torch.inf)
    order = ranked.sort(dim=-1, descending=True, stable=True).indices
    if selector == "topk":
        taken = torch.arange(order.shape[-1], device=order.device) < wanted
    else:  # what lies before a chunk does not reach it yet
        p = log_p.detach().exp().mean(2, keepdim=True).masked_fill(~candidates, 0).gather(-1, order)
        taken = (p.cumsum(-1) - p < wanted) | (wanted >= 1)
    chosen = torch.zeros_like(ranked, dtype=torch.bool).scatter_(-1, order, taken.expand_as(order)) & candidates
    return log_p, chosen.expand_as(log_p)


def candidate_chunks(own_chunk: Tensor, num_chunks: int, init_chunks: int, local_chunks: int) -> Tensor:
    """Bool [..., N]: the chunks among which the router chooses for tokens whose own chunks are ``own_chunk``."""
    chunk = torch.arange(num_chunks, device=own_chunk.device)
    return (chunk >= init_chunks) & (chunk < own_chunk[..., None] - local_chunks)


def _prior(log_p: Tensor, support: Tensor, prior: str, sigma: float, prior_heads: str) -> Tensor:
    """Bias of the candidates [B, H, G or 1, T, n] from ``chunk_probabilities``, each [B, H, G, T, n]."""
    group = log_p.shape[2]
    selected = support.any(2, keepdim=True)
    if prior_heads == "group":
        # log of the mean over heads, from log p: dividing by p-bar itself would overflow at the support's edge
        log_p = log_p.masked_fill(~selected, 0).logsumexp(2, keepdim=True) - math.log(group)
        support = selected
    log_p = log_p.masked_fill(~support, 0)
    if prior == "raw":
        return log_p.masked_fill(selected & ~support, -torch.inf).masked_fill(~selected, 0)
    mean = log_p.sum(-1, keepdim=True) / support.sum(-1, keepdim=True).clamp_min(1)
    return ((log_p - mean) / sigma).masked_fill(~selected, 0)
