"""What a backend's router decided, for diagnostics: computed anew in PyTorch, never on the path of a forward pass."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dashattn.ops.block_scores.reference import pool_block_scores, topk_selection
from dashattn.ops.compression.reference import compressed_attention
from dashattn.selection import Selection


@dataclass(frozen=True)
class Routing:
    """Router of one call, on unpacked rows.

    Attributes:
        selection: blocks that are read, the token's own and all forced ones among them.
        probabilities: float32 [B, T, Hkv, N], what the router gives each candidate, on average over the group's heads;
            sums to 1 where there is one. DashAttention's candidates are the blocks before the token's own that are not
            forced. A top-k router's are all before it, and its probabilities their scores over the sum.
        logits: [B, T, Hq, N], scores before they are normalised, -inf where the block is no candidate; None where
            blocks are not scored directly.
    """

    selection: Selection
    probabilities: Tensor
    logits: Tensor | None = None


def past_blocks(length: int, num_blocks: int, block_size: int, device: torch.device) -> Tensor:
    """Bool [T, N]: the blocks before each token's own."""
    own = torch.arange(length, device=device) // block_size
    return torch.arange(num_blocks, device=device) < own[:, None]


def topk_routing(
    q: Tensor,
    compressed_k: Tensor,
    *,
    kernel_size: int,
    kernel_stride: int,
    pooling: str,
    block_size: int,
    topk: int,
    init_blocks: int,
    local_blocks: int,
) -> Routing:
    """Router of InfLLM v2 and NSA from q [B, T, Hq, D] and compressed keys [B, J, Hkv, D]."""
    windows = {"kernel_size": kernel_size, "kernel_stride": kernel_stride}
    num_blocks = -(-q.shape[1] // block_size)

    def consume(log_p_BHGTJ: Tensor) -> tuple[Selection, Tensor]:
        selection = topk_selection(
            log_p_BHGTJ,
            **windows,
            pooling=pooling,
            block_size=block_size,
            topk=topk,
            init_blocks=init_blocks,
            local_blocks=local_blocks,
        )
        p_BHTJ = log_p_BHGTJ.exp().sum(2)
        scores = pool_block_scores(p_BHTJ, num_blocks, **windows, block_size=block_size, pooling=pooling)
        return selection, scores.transpose(1, 2)

    scale = q.shape[-1] ** -0.5
    _, ((selection, scores_BTHN),) = compressed_attention(
        q, compressed_k, None, consume, **windows, scale=scale, cu_seqlens=None
    )
    past = past_blocks(q.shape[1], num_blocks, block_size, q.device)
    scores_BTHN = scores_BTHN.masked_fill(~past[:, None], 0)
    total = scores_BTHN.sum(-1, keepdim=True)
    return Routing(selection, scores_BTHN / total.masked_fill(total == 0, 1))
