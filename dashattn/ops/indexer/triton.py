"""Selection of the best blocks by an index on the GPU: the kernel that selects by compressed keys, given other inputs.

A KV head's index query is a group of one, and a token's index key a window of one token: the largest probability among
a block's tokens is that of the largest product.

Shapes: B batch, T tokens, H KV heads, I index size.
"""

from torch import Tensor

from dashattn.ops.band.triton_forward import tile_keys
from dashattn.ops.block_scores.triton import select_blocks
from dashattn.ops.block_sparse.triton import check_kernels_fit
from dashattn.ops.compression.reference import mean_compress
from dashattn.selection import Selection


def unsupported(index_q: Tensor, block_size: int, pooling: str) -> str | None:
    """What keeps the kernel from index queries [B, T, H, I], if anything does."""
    try:
        check_kernels_fit(index_q, block_size)
    except ValueError as error:
        return str(error)
    if pooling == "max" and block_size > tile_keys(index_q.itemsize):
        return f"the kernel takes blocks of at most {tile_keys(index_q.itemsize)} index keys of this type"
    return None


def select(
    index_q: Tensor,
    index_k: Tensor,
    *,
    block_size: int,
    pooling: str,
    topk: int,
    init_blocks: int,
    local_blocks: int,
    cu_seqlens: Tensor | None,
) -> Selection:
    """As ``reference.index_routing`` with a ``Choice`` of topk and no prior; ``topk`` counts the forced blocks too.

    Scores that lie 87 or more below a row's largest one count as equal: their probabilities are 0 in float32.

    Args:
        index_q: [B, T, H, I].
        index_k: [B, T, I].
    """
    keys, size = index_k.detach()[:, :, None], 1
    if pooling == "mean":
        size = block_size
        keys = mean_compress(keys, size, size, cu_seqlens)
    return select_blocks(
        index_q.detach(),
        keys.expand(-1, -1, index_q.shape[2], -1),
        kernel_size=size,
        kernel_stride=size,
        pooling="max",
        block_size=block_size,
        topk=topk,
        init_blocks=init_blocks,
        local_blocks=local_blocks + 1,
        scale=index_q.shape[-1] ** -0.5,
        cu_seqlens=cu_seqlens,
    )
