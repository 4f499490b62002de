"""Attention to blocks that a small learned index chooses: MSA (arXiv 2606.13392), SeerAttention (arXiv 2410.13276).

Layout, ``cu_seqlens``, ``impl`` and ``return_stats`` as in ``functional.py``.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dashattn import checks
from dashattn.checks import check
from dashattn.implementation import use_kernels, without_autocast
from dashattn.ops.block_sparse.reference import block_sparse_attention
from dashattn.ops.indexer.reference import Choice, Index, index_kl, index_routing
from dashattn.ops.true_mass.reference import block_masses
from dashattn.selection import WORD_BITS, Chosen, Selection
from dashattn.stats import AttentionStats, selection_stats


class IndexerOutput(NamedTuple):
    """What ``indexer_attention`` returns.

    Attributes:
        out: [B, T, Hq, D] in q's dtype.
        stats: if asked for.
        kl: float32 or float64 [], if asked for: what ``index_kl`` says of the index, in nats, a mean over tokens and KV
            heads. Differentiable by index queries and keys alone.
        chosen: for ``selected_attention`` of another layer.
    """

    out: Tensor
    stats: AttentionStats | None
    kl: Tensor | None
    chosen: Chosen


@without_autocast
def indexer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    *,
    block_size: int = 64,
    index_pooling: str = "max",
    selector: str = "topk",
    topk: int = 16,
    top_p: float = 0.9,
    init_blocks: int = 1,
    local_blocks: int = 1,
    gradient: str = "kl",
    dense: bool = False,
    head_weights: Sequence[float] | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    impl: str = "auto",
    return_stats: bool = False,
    return_kl: bool = False,
) -> IndexerOutput:
    """Attends to the blocks whose index scores are highest, per token and KV head.

    A block's score is the product of the token's index query with the index keys of the block's tokens, times
    ``I ** -0.5``: the largest one (``max``), or that with their mean. Candidates are the past blocks that are not
    forced. On a GPU attention, masses and the router run in kernels; but in PyTorch, a tile of queries at a time, the
    scores of ``max``, unless they only select the top k, and those of ``kl``.

    Args:
        index_q: [B, T, Hkv, I], an index query for each KV head.
        index_k: [B, T, I], an index key that all heads share.
        index_pooling: ``max`` or ``mean``.
        selector: ``topk`` or ``topp``: the fewest candidates whose softmax reaches ``top_p``.
        topk: blocks in all, forced ones included; the sparsity knob of topk.
        top_p: in (0, 1]; that of topp.
        init_blocks: first blocks, forced.
        local_blocks: blocks before the token's own, forced as that is.
        gradient: ``prior``: a candidate's logits have the logarithm of its softmax over all candidates as a bias,
            through which index queries and keys learn (SAS, arXiv 2609.13141). ``kl``: no bias, and no gradient to
            them but ``kl``'s, whose masses are those of this attention, without gradient.
        dense: attend to everything, so that the masses of all blocks are known.
        head_weights: of each of the Hkv heads in ``kl``; default 1 / Hkv.

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit.
    """
    checks.check_qkv(q, k, v, cu_seqlens)
    forced = {"init_blocks": init_blocks, "local_blocks": local_blocks}
    checks.check_indexer(block_size, index_pooling, selector, topk, top_p, **forced, gradient=gradient)
    checks.check_shape("index_q", index_q, (*k.shape[:3], *index_q.shape[3:]))
    checks.check_shape("index_k", index_k, (*k.shape[:2], *index_q.shape[3:]))
    for name, x in (("index_q", index_q), ("index_k", index_k)):
        checks.check_like(name, x, q)
    with_prior = gradient == "prior"
    check(not (with_prior and (dense or return_kl)), "gradient='prior' has no KL divergence: use gradient='kl'")

    options = {"scale": q.shape[-1] ** -0.5 if scale is None else scale, "cu_seqlens": cu_seqlens}
    choice = index_choice(selector, topk, top_p, **forced)
    index = Index.make(index_q, index_k, block_size, index_pooling, cu_seqlens)
    is_kernel, bias = use_kernels(impl, q, block_size), None
    if dense:
        width = -(-index.num_blocks // WORD_BITS)
        selection = Selection(q.new_full((*k.shape[::2], q.shape[1], width), -1, dtype=torch.int32), block_size)
    elif is_kernel and _kernels_route(index_q, block_size, index_pooling, selector, with_prior):
        from dashattn.ops.indexer import triton as router

        chosen = {"block_size": block_size, "pooling": index_pooling, "selector": selector, "topk": topk}
        chosen |= {"top_p": top_p, **forced, "prior": with_prior, "cu_seqlens": cu_seqlens}
        selection, bias = router.index_routing(index_q, index_k, **chosen)
    else:
        selection, bias = index_routing(index, choice, prior=with_prior)
    kl = masses = None
    if is_kernel:
        from dashattn.ops.block_sparse.triton import attention_and_normalisers
        from dashattn.ops.true_mass import triton as kernels

        out, lse = attention_and_normalisers(q, k, v, selection, bias, **options)
        if return_kl:
            masses = kernels.block_masses(q, k, selection, lse, **options)
    else:
        out = block_sparse_attention(q, k, v, selection, bias, **options)
        if return_kl:
            masses = block_masses(q, k, None if dense else selection, block_size=block_size, **options)
    if return_kl:
        # In the masses' type: a third in bfloat16 is 0.2 % too much. Filled, since a copy would wait for the device.
        each = [1 / k.shape[2]] * k.shape[2] if head_weights is None else head_weights
        weights = torch.stack([masses.new_full((), weight) for weight in each])
        kl = index_kl(index, choice, masses, None if dense else selection, weights)
    stats = None
    if return_stats:
        candidates = (index.own - local_blocks - init_blocks).clamp_min(0)
        reads = candidates * (block_size if index_pooling == "max" else 1)
        stats = selection_stats(selection, reads, cu_seqlens)
    return IndexerOutput(out, stats, kl, Chosen(selection.words, bias))


def index_choice(selector: str, topk: int, top_p: float, init_blocks: int, local_blocks: int) -> Choice:
    """What ``indexer_attention`` chooses with these options."""
    wanted = topk - init_blocks - local_blocks - 1 if selector == "topk" else top_p
    return Choice(selector, wanted, init_blocks, local_blocks)


def _kernels_route(index_q: Tensor, block_size: int, pooling: str, selector: str, prior: bool) -> bool:
    """Whether the kernels of other routers take index queries like these."""
    from dashattn.ops.indexer.triton import unsupported

    return unsupported(index_q, block_size, pooling, selector, prior=prior) is None
