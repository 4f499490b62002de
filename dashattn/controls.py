"""Attention without a router to learn from: what a real one is compared with.

Layout, ``cu_seqlens``, ``impl`` and ``return_stats`` as in ``functional.py``. Blocks of the token's own document are
selected per token and KV head; the token's own block always is. No bias, and no gradient to the selection.
"""

from functools import partial

import torch
from torch import Tensor

from dashattn import checks
from dashattn.documents import document_positions, per_document
from dashattn.functional import Output
from dashattn.implementation import without_autocast
from dashattn.ops.true_mass.reference import forced_blocks, mass_selection
from dashattn.selected import selected_attention
from dashattn.selection import Selection


@without_autocast
def sink_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int = 64,
    init_blocks: int = 1,
    local_blocks: int = 16,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    impl: str = "auto",
    return_stats: bool = False,
) -> Output:
    """First blocks and a sliding window of blocks, whatever the tokens are (StreamingLLM, arXiv 2309.17453).

    Args:
        init_blocks: first blocks, where dense models keep their attention sink.
        local_blocks: blocks before the token's own; the sparsity knob.

    Raises:
        ValueError: shapes, dtypes, devices or sizes do not fit.
    """
    checks.check_qkv(q, k, v, cu_seqlens)
    checks.check_forced(block_size, init_blocks, local_blocks)

    def select(q_BTHD, k_BTHD):
        position = torch.arange(q_BTHD.shape[1], device=q.device)[None]
        return window_selection(position, k_BTHD.shape, block_size, init_blocks, local_blocks)

    selection = Selection.concatenate(per_document(select, cu_seqlens, q, k))
    call = {"scale": scale, "cu_seqlens": cu_seqlens, "impl": impl, "return_stats": return_stats}
    return selected_attention(q, k, v, selection, **call)


@without_autocast
def oracle_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int = 64,
    select: str = "topk",
    topk: int = 16,
    top_p: float = 0.9,
    init_blocks: int = 1,
    local_blocks: int = 4,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    impl: str = "auto",
    return_stats: bool = False,
) -> Output:
    """The blocks that dense attention itself gives most mass: the ceiling of every router; as dear as dense attention.

    Args:
        select: ``topk``: a fixed number of blocks; ``top_p``: the fewest whose mass reaches ``top_p``.
        topk: blocks in all, forced ones included.
        top_p: mass in (0, 1], that of the forced blocks included.
        init_blocks: first blocks, forced.
        local_blocks: blocks before the token's own, forced.

    Raises:
        ValueError: shapes, dtypes, devices or sizes do not fit.
    """
    checks.check_qkv(q, k, v, cu_seqlens)
    checks.check_oracle(select, topk, top_p, block_size, init_blocks, local_blocks)
    sizes = {"block_size": block_size, "init_blocks": init_blocks, "local_blocks": local_blocks, "scale": scale}
    choose = partial(mass_selection, **sizes, **mass_bound(select, topk, top_p))

    def select_blocks(q_BTHD, k_BTHD):
        return choose(q_BTHD, k_BTHD, torch.arange(q_BTHD.shape[1], device=q.device).expand(q.shape[0], -1))

    reads = document_positions(cu_seqlens, *q.shape[:2], q.device) + 1  # it scores every key
    selection = Selection.concatenate(per_document(select_blocks, cu_seqlens, q, k))
    call = {"scale": scale, "cu_seqlens": cu_seqlens, "impl": impl, "return_stats": return_stats}
    return selected_attention(q, k, v, selection, routing_reads=reads, **call)


def window_selection(
    positions: Tensor, kv_shape: tuple[int, ...], block_size: int, init_blocks: int, local_blocks: int
) -> Selection:
    """The forced blocks of queries at ``positions`` [B or 1, T] over keys of the shape [B, S, Hkv, D]."""
    batch, keys, kv_heads = kv_shape[:3]
    sizes = {"block_size": block_size, "init_blocks": init_blocks, "local_blocks": local_blocks}
    mask_BTN, _ = forced_blocks(positions, -(-keys // block_size), **sizes)
    words = Selection.from_mask(mask_BTN[:, :, None], block_size).words
    return Selection(words.expand(batch, kv_heads, -1, -1), block_size)


def mass_bound(select: str, topk: int, top_p: float) -> dict:
    """The one of the two that ``select`` names, as ``mass_selection`` takes it."""
    return {"topk": topk} if select == "topk" else {"top_p": top_p}
