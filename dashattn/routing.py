"""What a backend's router decided, for diagnostics: computed anew in PyTorch, never on the path of a forward pass."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dashattn.ops.block_scores.reference import pool_block_scores, topk_selection
from dashattn.ops.compression.reference import attend_windows, visible_windows
from dashattn.selection import Selection


@dataclass(frozen=True)
class Routing:
    """Router of one call, on unpacked rows: of all T tokens, or of those that were asked for.

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


def past_blocks(positions: Tensor, num_blocks: int, block_size: int) -> Tensor:
    """Bool [P, N]: the blocks before the own one of each of the tokens ``positions`` [P]."""
    return torch.arange(num_blocks, device=positions.device) < (positions // block_size)[:, None]


def positions_of(q: Tensor, positions: Tensor | None) -> Tensor:
    """``positions`` or, if they are None, all of q [B, T, Hq, D]."""
    return torch.arange(q.shape[1], device=q.device) if positions is None else positions


def topk_routing(
    q: Tensor,
    compressed_k: Tensor,
    positions: Tensor | None,
    *,
    kernel_size: int,
    kernel_stride: int,
    pooling: str,
    block_size: int,
    topk: int,
    init_blocks: int,
    local_blocks: int,
) -> Routing:
    """Router of InfLLM v2 and NSA from q [B, T, Hq, D] and compressed keys [B, J, Hkv, D]; ``positions`` as in
    ``AttentionBackend.route``."""
    positions = positions_of(q, positions)
    windows = {"kernel_size": kernel_size, "kernel_stride": kernel_stride}
    num_blocks = -(-q.shape[1] // block_size)

    visible = visible_windows(positions[None], **windows)
    _, log_p_BHGPJ = attend_windows(q[:, positions], compressed_k, None, visible, q.shape[-1] ** -0.5)
    selection = topk_selection(
        log_p_BHGPJ,
        **windows,
        pooling=pooling,
        block_size=block_size,
        topk=topk,
        init_blocks=init_blocks,
        local_blocks=local_blocks,
        positions=positions[None],
        num_blocks=num_blocks,
    )
    p_BHPJ = log_p_BHGPJ.exp().sum(2)
    scores_BHPN = pool_block_scores(p_BHPJ, num_blocks, **windows, block_size=block_size, pooling=pooling)
    past_PN = past_blocks(positions, num_blocks, block_size)
    scores_BPHN = scores_BHPN.transpose(1, 2).masked_fill(~past_PN[:, None], 0)
    total = scores_BPHN.sum(-1, keepdim=True)
    return Routing(selection, scores_BPHN / total.masked_fill(total == 0, 1))
