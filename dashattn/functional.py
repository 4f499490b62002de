"""The public attention functions: they check their arguments and choose the implementation.

Layout everywhere: q [B, T, Hq, D], k and v [B, T, Hkv, D], post-RoPE; output [B, T, Hq, D] in q's dtype. Query head h
reads KV head ``h // (Hq // Hkv)``. Attention is causal. ``cu_seqlens`` (int32 [N + 1], B = 1) packs documents: each is
its own sequence, with its own grid of chunks and blocks.

``impl``: ``auto`` (on a GPU the Triton kernels, where they take the arguments; the reference elsewhere), ``triton``
(the kernels, or a ValueError that says what they do not take), ``reference``. With ``return_stats=True`` a function
returns ``(out, AttentionStats)``. With ``return_selection=True``, where there is that, it returns ``(result, Chosen)``,
for ``selected_attention`` of another layer.
"""

from functools import partial

import torch
from torch import Tensor

from dashattn import checks
from dashattn.checks import check
from dashattn.documents import document_positions
from dashattn.implementation import IMPLS, use_kernels, without_autocast
from dashattn.ops.block_scores.reference import topk_selection
from dashattn.ops.block_sparse.reference import block_sparse_attention
from dashattn.ops.chunk_summary.reference import chunk_summary
from dashattn.ops.compression.reference import (
    compressed_attention,
    mean_compress,
    num_windows,
    visible_windows,
)
from dashattn.ops.dash_routing.mass import mass_bias
from dashattn.ops.dash_routing.reference import dash_routing
from dashattn.ops.full.reference import sdpa_attention
from dashattn.ops.gates.reference import gated_sum
from dashattn.ops.window.reference import window_attention
from dashattn.selection import Chosen, Selection
from dashattn.stats import AttentionStats, dense_stats, selection_stats

Output = Tensor | tuple[Tensor, AttentionStats]
Handing = Output | tuple[Output, Chosen]  # the second with ``return_selection``


@without_autocast
def full_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    impl: str = "auto",
    return_stats: bool = False,
) -> Output:
    """Exact causal softmax attention through PyTorch's ``scaled_dot_product_attention``.

    Args:
        max_seqlen: tokens of the longest packed document, or more. FlashAttention launches as many blocks of threads
            for each document, so that without it many short documents in a long row take several times as long.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    checks.check_qkv(q, k, v, cu_seqlens)
    checks.check_choice("impl", impl, IMPLS)
    check(impl != "triton", "full_attention has no Triton kernels, it is PyTorch's SDPA: use impl='auto'")
    if max_seqlen is not None:
        checks.check_max_seqlen(max_seqlen, cu_seqlens)
    out = sdpa_attention(q, k, v, scale=scale, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
    if not return_stats:
        return out
    return out, dense_stats(*k.shape[:3], k.device, cu_seqlens)


@without_autocast
def dash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_query: Tensor,
    *,
    chunk_size: int = 64,
    selector: str = "entmax",
    alpha: float | Tensor = 1.5,
    router_scale: float | Tensor = 1.0,
    topk: int | Tensor = 16,
    top_p: float | Tensor = 0.9,
    prior: str = "tempered",
    sigma: float = 1e6,
    prior_heads: str = "group",
    summary_rope: tuple[Tensor, Tensor] | None = None,
    init_chunks: int = 0,
    local_chunks: int = 0,
    router_qk: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    impl: str = "auto",
    return_stats: bool = False,
    return_selection: bool = False,
) -> Handing:
    """DashAttention (arXiv 2605.18753): alpha-entmax over chunk summaries selects chunks and biases the softmax.

    Args:
        chunk_query: r [Hkv, D], the query that pools each chunk's keys; zeros give mean pooling.
        chunk_size: tokens per chunk.
        selector: ``entmax``, or the controls ``topk`` and ``topp``, which select by a softmax of the same scores; see
            ``dash_routing``.
        alpha: of entmax, in [1.01, 2]; a float, or a tensor [Hq] or [] (differentiable). A tensor on a GPU is checked
            there, so that nobody waits for it: values outside stop the process with a CUDA assertion that names the
            range.
        router_scale: gamma, entmax's sparsity knob; larger is sparser. This and the other two knobs are numbers, or
            float64 tensors [] on the CPU, which torch.compile takes at every value without compiling anew.
        topk: of selector topk: chunks per token in all, the forced ones included; its sparsity knob.
        top_p: of selector topp: in (0, 1], probability that the selected candidates reach; its sparsity knob.
        prior: ``raw``, ``tempered``, ``mass`` or ``none``; see ``dash_routing``. With ``mass`` (HiLS, arXiv 2607.02980)
            keys are normalised within their chunk, and chunks mixed by the router's softmax; see
            ``ops.dash_routing.mass``, which is PyTorch on a GPU, too, as the router then is.
        sigma: temperature of the tempered prior.
        prior_heads: ``group`` or ``head``.
        summary_rope: (cos, sin), each [T, D] or [B, T, D], makes the summaries translation-invariant.
        init_chunks: first chunks of the sequence (of each document), which every token reads; a pretrained model keeps
            its attention sink there.
        local_chunks: chunks before a token's own that it always reads.
        router_qk: (q, k) as q and k are, which the router scores and pools in their place: before RoPE, say.
        scale: of the attention logits, default D ** -0.5. The router always uses D ** -0.5.

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit.
    """
    checks.check_qkv(q, k, v, cu_seqlens)
    checks.check_dash(
        *(chunk_size, selector, router_scale, topk, top_p, prior, sigma, prior_heads, init_chunks, local_chunks)
    )
    checks.check_alpha(alpha, q.shape[2])
    checks.check_shape("chunk_query", chunk_query, tuple(k.shape[2:]))
    check(chunk_query.device == q.device, f"chunk_query is on {chunk_query.device}, q on {q.device}")
    if summary_rope is not None:
        for name, table in zip(("cos", "sin"), summary_rope, strict=True):
            batch, *rest = table.shape if table.ndim == 3 else (1, *table.shape)
            check(
                tuple(rest) == tuple(q.shape[1::2]) and (batch == 1 or batch == q.shape[0]),
                f"summary_rope {name} must be [T, D] or [B, T, D]; got {tuple(table.shape)} for q {tuple(q.shape)}",
            )
    if router_qk is not None:
        for name, x, like in zip(("q", "k"), router_qk, (q, k), strict=True):
            checks.check_shape(f"router_qk {name}", x, tuple(like.shape))
            checks.check_like(f"router_qk {name}", x, like)
    route = {"selector": selector, "alpha": alpha, "router_scale": router_scale, "topk": topk, "top_p": top_p}
    route |= {"prior": prior, "sigma": sigma, "init_chunks": init_chunks, "local_chunks": local_chunks}
    route |= {"cu_seqlens": cu_seqlens}
    is_kernel = use_kernels(impl, q, chunk_size, unsupported_priors(prior_heads))
    by_mass = prior == "mass"
    check(
        not (by_mass and return_selection),
        "prior='mass' weighs chunks by the layer's own keys, which no other layer can take over: use another prior",
    )
    if is_kernel and not by_mass and router_qk is None and not return_selection:
        # All in one, which has one q and k, and hides the bias.
        from dashattn.ops.dash_attention.triton import dash_attention as attend_whole

        sizes = {"chunk_size": chunk_size, "scale": scale}
        out, selection = attend_whole(q, k, v, chunk_query, summary_rope=summary_rope, **sizes, **route)
    else:
        pool, choose, attend = chunk_summary, dash_routing, block_sparse_attention
        if is_kernel:
            from dashattn.ops.block_sparse.triton import block_sparse_attention as attend
            from dashattn.ops.chunk_summary.triton import chunk_summary as pool
        if is_kernel and not by_mass:
            from dashattn.ops.dash_routing.triton import dash_routing as choose

        router_q, router_k = router_qk or (q, k)
        summaries = pool(router_k, chunk_query, chunk_size=chunk_size, cu_seqlens=cu_seqlens, rope=summary_rope)
        selection, bias = choose(router_q, summaries, chunk_size=chunk_size, prior_heads=prior_heads, **route)
        if by_mass:
            forced = {"init_chunks": init_chunks, "local_chunks": local_chunks}
            bias = mass_bias(q, k, bias, selection, **forced, scale=scale, cu_seqlens=cu_seqlens)
        out = attend(q, k, v, selection, bias, scale=scale, cu_seqlens=cu_seqlens)
    if return_stats:
        own_chunk = document_positions(cu_seqlens, *q.shape[:2], q.device) // chunk_size
        candidates = (own_chunk - local_chunks - init_chunks).clamp_min(0)
        out = out, selection_stats(selection, candidates, cu_seqlens)
    return (out, Chosen(selection.words, bias)) if return_selection else out


@without_autocast
def infllmv2_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int = 64,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    topk: int = 64,
    init_blocks: int = 1,
    window_size: int = 1024,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    impl: str = "auto",
    return_stats: bool = False,
    return_selection: bool = False,
) -> Handing:
    """InfLLM v2 (arXiv 2509.24663): top-k blocks by attention over mean-pooled keys; no new parameters.

    Args:
        block_size: keys per selected block.
        kernel_size, kernel_stride: windows of the mean-pooled keys.
        topk: blocks per token in all, the forced ones included; the sparsity knob.
        init_blocks: first blocks, always selected.
        window_size: tokens before the token's own block that are always selected; a multiple of ``block_size``.
        scale: of all attention logits, the scoring ones too; default D ** -0.5.

    Raises:
        ValueError: shapes, dtypes, devices or sizes do not fit.
    """
    checks.check_qkv(q, k, v, cu_seqlens)
    checks.check_infllmv2(block_size, kernel_size, kernel_stride, topk, init_blocks, window_size)
    windows = {"kernel_size": kernel_size, "kernel_stride": kernel_stride}
    is_kernel = use_kernels(impl, q, block_size, _unsupported_windows(**windows, block_size=block_size))

    options = {"scale": q.shape[-1] ** -0.5 if scale is None else scale, "cu_seqlens": cu_seqlens}
    blocks = {
        "pooling": "max",
        "block_size": block_size,
        "topk": topk,
        "init_blocks": init_blocks,
        "local_blocks": window_size // block_size + 1,
    }
    compressed_k = mean_compress(k.detach(), **windows, cu_seqlens=cu_seqlens)
    if is_kernel:
        from dashattn.ops.block_scores.triton import select_blocks
        from dashattn.ops.block_sparse.triton import block_sparse_attention as attend

        selection = select_blocks(q, compressed_k, **windows, **blocks, **options)
    else:
        attend = block_sparse_attention
        _, selection = _attend_windows_and_select(q.detach(), compressed_k, None, windows, blocks, **options)
    out = attend(q, k, v, selection, **options)
    if return_stats:
        out = out, _stats_with_windows(q, selection, windows, cu_seqlens)
    return (out, Chosen(selection.words, None)) if return_selection else out


@without_autocast
def nsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    compressed_k: Tensor,
    compressed_v: Tensor,
    gates: Tensor,
    *,
    k_window: Tensor | None = None,
    v_window: Tensor | None = None,
    pooling: str = "weighted",
    block_size: int = 64,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    topk: int = 16,
    init_blocks: int = 1,
    local_blocks: int = 2,
    window_size: int = 512,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    impl: str = "auto",
    return_stats: bool = False,
) -> Output:
    """NSA (arXiv 2502.11089): gated sum of compressed, selected and sliding-window attention.

    Args:
        k, v: of the selected branch.
        compressed_k, compressed_v: [B, J, Hkv, D], J windows as ``compress_windows`` lays them out.
        gates: in [0, 1], [B, T, Hq, 3] for (compressed, selected, window), or [B, T, Hq, 2] with ``window_size`` 0.
        k_window, v_window: of the window branch; default k and v.
        pooling: block scores from window probabilities: ``weighted`` by overlap (NSA) or ``max`` (as InfLLM v2).
        topk: selected blocks in all, ``init_blocks`` first ones and ``local_blocks`` last ones (the token's own
            among them) included; the sparsity knob.
        window_size: tokens of the sliding window, the token's own included; 0 leaves the branch out.
        scale: of all attention logits; default D ** -0.5.

    Raises:
        ValueError: shapes, dtypes, devices or sizes do not fit.
    """
    checks.check_qkv(q, k, v, cu_seqlens)
    checks.check_nsa(pooling, block_size, kernel_size, kernel_stride, topk, init_blocks, local_blocks, window_size)
    compressed_shape = (k.shape[0], num_windows(k.shape[1], kernel_size, kernel_stride), *k.shape[2:])
    for name, x in (("compressed_k", compressed_k), ("compressed_v", compressed_v)):
        checks.check_shape(name, x, compressed_shape)
        checks.check_like(name, x, q)
    checks.check_shape("gates", gates, (*q.shape[:3], 3 if window_size else 2))
    check(gates.device == q.device, f"gates is on {gates.device}, q on {q.device}")
    check((k_window is None) == (v_window is None), "give both k_window and v_window, or neither")
    if k_window is not None:
        check(window_size > 0, "k_window and v_window need window_size > 0; got 0")
        for name, x in (("k_window", k_window), ("v_window", v_window)):
            checks.check_shape(name, x, tuple(k.shape))
            checks.check_like(name, x, q)
    windows = {"kernel_size": kernel_size, "kernel_stride": kernel_stride}
    is_kernel = use_kernels(impl, q, block_size, _unsupported_windows(**windows, block_size=block_size))

    options = {"scale": q.shape[-1] ** -0.5 if scale is None else scale, "cu_seqlens": cu_seqlens}
    blocks = {
        "pooling": pooling,
        "block_size": block_size,
        "topk": topk,
        "init_blocks": init_blocks,
        "local_blocks": local_blocks,
    }
    if window_size and k_window is None:
        k_window, v_window = k, v
    if is_kernel and not _needs_grad(q, k, v, compressed_k, compressed_v, gates, k_window, v_window):
        from dashattn.ops.nsa_attention.triton import nsa_forward

        tensors = (q, k, v, compressed_k, compressed_v, gates, k_window, v_window)
        out, selection = nsa_forward(*tensors, **windows, **blocks, window_size=window_size, **options)
        return (out, _stats_with_windows(q, selection, windows, cu_seqlens, window_size)) if return_stats else out
    if is_kernel:
        from dashattn.ops.band.triton import compressed_attention as attend_compressed
        from dashattn.ops.band.triton import window_attention as attend_window
        from dashattn.ops.block_scores.triton import select_blocks
        from dashattn.ops.block_sparse.triton import block_sparse_attention as attend
        from dashattn.ops.gates.triton import gated_sum as combine

        out_compressed, lse = attend_compressed(q, compressed_k, compressed_v, **windows, **options)
        selection = select_blocks(q, compressed_k, lse, **windows, **blocks, **options)
    else:
        attend, attend_window, combine = block_sparse_attention, window_attention, gated_sum
        out_compressed, selection = _attend_windows_and_select(
            q, compressed_k, compressed_v, windows, blocks, **options
        )
    branches = [out_compressed, attend(q, k, v, selection, **options)]
    if window_size:
        branches.append(attend_window(q, k_window, v_window, window_size=window_size, **options))
    out = combine(gates, branches).to(q.dtype)
    if not return_stats:
        return out
    return out, _stats_with_windows(q, selection, windows, cu_seqlens, window_size)


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _attend_windows_and_select(
    q: Tensor, compressed_k: Tensor, compressed_v: Tensor | None, windows: dict[str, int], blocks: dict, **options
) -> tuple[Tensor | None, Selection]:
    """Attention over the compressed keys, and the blocks its probabilities select (``blocks``: ``topk_selection``)."""
    select = partial(topk_selection, **windows, **blocks)
    out, selections = compressed_attention(q, compressed_k, compressed_v, select, **windows, **options)
    return out, Selection.concatenate(selections)


def _unsupported_windows(kernel_size: int, kernel_stride: int, block_size: int) -> str | None:
    """What keeps the selection kernel from these sizes, if anything does."""
    if block_size // kernel_stride > 32:
        return f"the kernels take blocks of at most 32 strides, not of {block_size // kernel_stride}"
    if kernel_size > block_size + kernel_stride:
        return (
            f"the kernels take windows that touch two blocks at most, not {kernel_size} keys at blocks of {block_size}"
        )
    return None


def _stats_with_windows(
    q: Tensor, selection: Selection, windows: dict[str, int], cu_seqlens: Tensor | None, window_size: int = 0
) -> AttentionStats:
    """Stats of a method that scores the compressed keys a token can see."""
    reads = visible_windows(document_positions(cu_seqlens, *q.shape[:2], q.device), **windows)
    return selection_stats(selection, reads, cu_seqlens, window_size)


def unsupported_priors(prior_heads: str) -> str | None:
    """What keeps DashAttention's kernels from these priors, if anything does."""
    return None if prior_heads == "group" else "the kernels have prior_heads='group' only"
