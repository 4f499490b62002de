"""Where the backward for Hopper adds dq up in float32, and what these sums take: from shapes alone, without Triton."""

HEAD_DIMS = BLOCKS = (64, 128)  # that the kernel takes
MAX_GROUP = 64


def fused(group: int, head_dim: int) -> bool:
    """Whether forming dq by key is faster than by query tile: see ``hopper_backward.fused``."""
    return head_dim == 64 or group & (group - 1) != 0


def sums_bytes(heads: int, kv_heads: int, head_dim: int, block_size: int, itemsize: int) -> int:
    """Of a token, in a type of ``itemsize`` bytes; 0 where dq is formed by query tile."""
    group = heads // kv_heads
    taken = itemsize == 2 and head_dim in HEAD_DIMS and block_size in BLOCKS and group <= MAX_GROUP
    if not taken or not fused(group, head_dim):
        return 0
    rows = group if head_dim == 64 else 1 << (group - 1).bit_length()  # ``triton_backward.packs``
    return 4 * kv_heads * rows * head_dim
