"""Attention mass of blocks, and their selection by it: the ceiling of every router.

Shapes: B batch, T queries, S keys, Hq query heads, H KV heads, G = Hq / H, D head size, N blocks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dashattn.documents import per_document
from dashattn.ops.block_sparse.reference import blocks_to_tokens, masked_softmax, query_tiles
from dashattn.ops.dtypes import upcast
from dashattn.selection import Selection


def forced_blocks(
    positions: Tensor, num_blocks: int, *, block_size: int, init_blocks: int, local_blocks: int
) -> tuple[Tensor, Tensor]:
    """Which blocks a query always reads, and which it can reach: two masks [B, T, N].

    Args:
        positions: integers [B, T], of the queries within their sequence.
        init_blocks: first blocks of the sequence.
        local_blocks: blocks before the query's own, which is always among the forced.
    """
    block = torch.arange(num_blocks, device=positions.device)
    own = (positions // block_size)[..., None]
    reachable = block <= own
    return ((block < init_blocks) | (block >= own - local_blocks)) & reachable, reachable


def mass_selection(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    *,
    block_size: int,
    init_blocks: int,
    local_blocks: int,
    topk: int | None = None,
    top_p: float | None = None,
    scale: float | None = None,
) -> Selection:
    """The blocks with the largest attention mass, on average over the G heads that share a KV head.

    The mass of a block is the sum of the dense causal softmax over its keys. Scores of one tile of queries are held at
    a time, [B, Hq, tile, S] in float32. Nothing is differentiable.

    Args:
        q: [B, T, Hq, D].
        k: [B, S, H, D]; what lies behind a query's position is not read.
        positions: integers [B, T].
        topk: so many blocks in all, forced ones (``forced_blocks``) included and first.
        top_p: the fewest blocks whose mass, that of the forced ones included, reaches it; one of the two is given.
        scale: default D ** -0.5.
    """
    assert (topk is None) != (top_p is None)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    keys, kv_heads = k.shape[1:3]
    num_blocks = -(-keys // block_size)
    key = torch.arange(keys, device=q.device)
    k_BHSD = upcast(k.detach()).transpose(1, 2)
    masks = []
    for tile in query_tiles(q.shape[1]):
        position_Bt = positions[:, tile]
        q_BHGtD = upcast(q[:, tile].detach()).unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4) * scale
        allowed = (key <= position_Bt[..., None])[:, None, None]
        mass_BHtN = _tile_masses(q_BHGtD, k_BHSD, allowed, block_size)
        sizes = {"block_size": block_size, "init_blocks": init_blocks, "local_blocks": local_blocks}
        forced, reachable = (mask[:, None] for mask in forced_blocks(position_Bt, num_blocks, **sizes))
        ranked = mass_BHtN.masked_fill(forced, torch.inf).masked_fill(~reachable, -torch.inf)
        order = ranked.sort(dim=-1, descending=True, stable=True).indices
        if topk is not None:
            taken = (torch.arange(num_blocks, device=q.device) < topk).expand_as(order)
        else:
            ordered = mass_BHtN.gather(-1, order)
            taken = ordered.cumsum(-1) - ordered < top_p  # what lies before a block does not reach it yet
        mask = torch.zeros_like(taken).scatter(-1, order, taken) & reachable | forced
        masks.append(mask.transpose(1, 2))
    return Selection.from_mask(torch.cat(masks, dim=1), block_size)


@torch.no_grad()
def block_masses(
    q: Tensor,
    k: Tensor,
    selection: Selection | None,
    *,
    block_size: int,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """What block-sparse attention without a bias gives each block, on average over the G heads that share a KV head.

    Args:
        q: [B, T, Hq, D].
        k: [B, T, H, D].
        selection: blocks per query and KV head; None: all of the past, as in dense attention.
        scale: default D ** -0.5.
        cu_seqlens: int32 [M + 1]; block indices count from the start of each document.

    Returns:
        Float32 (float64 for float64) [B, T, H, N] with N = ceil(T / block_size); 0 where not selected.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    num_blocks = -(-q.shape[1] // block_size)

    def masses(q_BTHD: Tensor, k_BTHD: Tensor, mask_BTHN: Tensor | None) -> Tensor:
        length, kv_heads = k_BTHD.shape[1:3]
        token = torch.arange(length, device=q.device)
        k_BHSD = upcast(k_BTHD).transpose(1, 2)
        tiles = []
        for tile in query_tiles(length):
            end = tile.stop
            q_BHGtD = upcast(q_BTHD[:, tile]).unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4) * scale
            allowed = token[:end] <= token[tile, None]
            if mask_BTHN is not None:
                chosen = blocks_to_tokens(mask_BTHN[:, tile], block_size, end)
                allowed = (allowed & chosen.transpose(1, 2))[:, :, None]
            mass_BHtN = _tile_masses(q_BHGtD, k_BHSD[:, :, :end], allowed, block_size)
            tiles.append(F.pad(mass_BHtN, (0, num_blocks - mass_BHtN.shape[-1])).transpose(1, 2))
        return torch.cat(tiles, dim=1)

    mask_BTHN = None if selection is None else selection.mask()
    return torch.cat(per_document(masses, cu_seqlens, q, k, mask_BTHN), dim=1)


def _tile_masses(q_BHGtD: Tensor, k_BHSD: Tensor, allowed: Tensor, block_size: int) -> Tensor:
    """[B, H, t, N] with N = ceil(S / block_size); ``allowed`` broadcasts to [B, H, G, t, S]."""
    p = masked_softmax(torch.einsum("bhgtd,bhsd->bhgts", q_BHGtD, k_BHSD), allowed).mean(2)
    return F.pad(p, (0, -p.shape[-1] % block_size)).unflatten(-1, (-1, block_size)).sum(-1)
