"""Selection of blocks by the mass that dense attention gives them: the ceiling of every router.

Shapes: B batch, T queries, S keys, Hq query heads, H KV heads, G = Hq / H, D head size, N blocks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dashattn.ops.block_sparse.reference import masked_softmax, query_tiles
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
        p = masked_softmax(torch.einsum("bhgtd,bhsd->bhgts", q_BHGtD, k_BHSD), allowed).mean(2)
        mass_BHtN = F.pad(p, (0, num_blocks * block_size - keys)).unflatten(-1, (num_blocks, block_size)).sum(-1)
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
