"""Attention to blocks that another layer, or nobody's router, has chosen.

Layout, ``cu_seqlens``, ``impl`` and ``return_stats`` as in ``functional.py``.
"""

import torch
from torch import Tensor

from dashattn import checks
from dashattn.checks import check
from dashattn.functional import Output
from dashattn.implementation import use_kernels, without_autocast
from dashattn.ops.block_sparse.reference import block_sparse_attention
from dashattn.selection import Selection
from dashattn.stats import selection_stats


@without_autocast
def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection,
    bias: Tensor | None = None,
    *,
    routing_reads: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    impl: str = "auto",
    return_stats: bool = False,
) -> Output:
    """Causal softmax over the keys of the selected blocks, whose logits have ``bias`` added.

    Args:
        selection: words [B, Hkv, T, W] of blocks up to the token's own.
        bias: [B, T, Hkv or Hq, N], differentiable; None: nothing is added.
        routing_reads: for the stats, int32 [B, T], what the choice has cost; default nothing.
        scale: of the logits, default D ** -0.5.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    checks.check_qkv(q, k, v, cu_seqlens)
    words = selection.words
    checks.check_shape("the selection's words", words, (*k.shape[::2], q.shape[1], *words.shape[3:]))
    check(words.device == q.device, f"the selection is on {words.device}, q on {q.device}; move them to one device")
    if bias is not None:
        check(bias.ndim == 4, f"bias must have 4 dimensions [B, T, heads, N]; got shape {tuple(bias.shape)}")
        heads = q.shape[2] if bias.shape[2] == q.shape[2] else k.shape[2]
        checks.check_shape("bias", bias, (*q.shape[:2], heads, *bias.shape[3:]))
        check(bias.device == q.device, f"bias is on {bias.device}, q on {q.device}; move them to one device")
    attend = block_sparse_attention
    if use_kernels(impl, q, selection.block_size):
        from dashattn.ops.block_sparse.triton import block_sparse_attention as attend
    out = attend(q, k, v, selection, bias, scale=scale, cu_seqlens=cu_seqlens)
    if not return_stats:
        return out
    if routing_reads is None:
        routing_reads = torch.zeros(q.shape[:2], dtype=torch.int32, device=q.device)
    return out, selection_stats(selection, routing_reads, cu_seqlens)
