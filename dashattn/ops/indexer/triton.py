"""The learned indexer's router on the GPU: the kernels of other routers, given other inputs.

A KV head's index query is a group of one. The mean of a block's index keys is a chunk's summary, and DashAttention's
router has the selectors and the prior. A token's index key is a window of one token: the kernel of compressed keys
selects the top k by the largest product among a block's tokens.

Shapes: B batch, T tokens, H KV heads, I index size, N blocks.
"""

from torch import Tensor

from dashattn.ops.band.triton_forward import tile_keys
from dashattn.ops.block_scores.triton import select_blocks
from dashattn.ops.block_sparse.triton import check_kernels_fit
from dashattn.ops.compression.reference import mean_compress
from dashattn.ops.dash_routing.triton import dash_routing
from dashattn.selection import Selection


def unsupported(index_q: Tensor, block_size: int, pooling: str, selector: str, *, prior: bool) -> str | None:
    """What keeps the kernels from index queries [B, T, H, I], if anything does."""
    try:
        check_kernels_fit(index_q, block_size)
    except ValueError as error:
        return str(error)
    if pooling == "mean":
        return None
    if selector != "topk" or prior:
        return "of the best token of a block the kernels have the selection of topk alone"
    if block_size > tile_keys(index_q.itemsize):
        return f"the kernels take blocks of at most {tile_keys(index_q.itemsize)} index keys of this type"
    return None


def index_routing(
    index_q: Tensor,
    index_k: Tensor,
    *,
    block_size: int,
    pooling: str,
    selector: str,
    topk: int,
    top_p: float,
    init_blocks: int,
    local_blocks: int,
    prior: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Selection, Tensor | None]:
    """As ``reference.index_routing``, where ``unsupported`` has no objection; the bias is float32 [B, T, H, N].

    Args:
        index_q: [B, T, H, I].
        index_k: [B, T, I].
        topk: blocks in all, forced ones included.
    """
    keys, heads = index_k[:, :, None], index_q.shape[2]
    if pooling == "mean":
        means = mean_compress(keys, block_size, block_size, cu_seqlens)
        return dash_routing(
            index_q,
            means.expand(-1, -1, heads, -1),
            chunk_size=block_size,
            selector=selector,
            topk=topk,
            top_p=top_p,
            prior="raw" if prior else "none",
            init_chunks=init_blocks,
            local_chunks=local_blocks,
            cu_seqlens=cu_seqlens,
        )
    selection = select_blocks(
        index_q,
        keys.expand(-1, -1, heads, -1),
        kernel_size=1,
        kernel_stride=1,
        pooling="max",
        block_size=block_size,
        topk=topk,
        init_blocks=init_blocks,
        local_blocks=local_blocks + 1,
        scale=index_q.shape[-1] ** -0.5,
        cu_seqlens=cu_seqlens,
    )
    return selection, None
