"""From attention over compressed windows to a top-k selection of blocks (InfLLM v2 and NSA).

Shapes: B batch, T tokens, H KV heads, J windows, N blocks.
"""

import torch
from torch import Tensor

from dashattn.selection import Selection

POOLINGS = ("weighted", "max")


def window_overlap(num_windows: int, num_blocks: int, kernel_size: int, kernel_stride: int, block_size: int) -> Tensor:
    """Keys that each window shares with each block, in units of the stride: float32 [J, N].

    With windows of 32 every 16 and blocks of 64 a block meets windows 4b-1 .. 4b+3 with weights 1, 2, 2, 2, 1.
    """
    start_J = torch.arange(num_windows)[:, None] * kernel_stride
    start_N = torch.arange(num_blocks) * block_size
    shared = torch.minimum(start_J + kernel_size, start_N + block_size) - torch.maximum(start_J, start_N)
    return shared.clamp_min(0) / kernel_stride


def pool_block_scores(p_BHTJ: Tensor, overlap_JN: Tensor, pooling: str) -> Tensor:
    """Block scores [B, H, T, N] from window probabilities.

    ``max``: the highest of the windows that touch the block (InfLLM v2). ``weighted``: their sum weighted by the
    overlap (NSA, equation 9).
    """
    if pooling == "weighted":
        return p_BHTJ @ overlap_JN.to(p_BHTJ)
    scores = p_BHTJ.new_zeros(*p_BHTJ.shape[:-1], overlap_JN.shape[1])
    for block, column in enumerate(overlap_JN.T):
        windows = column.nonzero().flatten()
        if len(windows):
            scores[..., block] = p_BHTJ[..., windows[0] : windows[-1] + 1].amax(-1)
    return scores


def topk_selection(
    p_BHGTJ: Tensor,
    *,
    kernel_size: int,
    kernel_stride: int,
    pooling: str,
    block_size: int,
    topk: int,
    init_blocks: int,
    local_blocks: int,
) -> Selection:
    """Scores blocks with the probabilities [B, H, G, T, J] of one document's windows and selects ``topk`` of them.

    Forced, and counted in ``topk``, are the first ``init_blocks`` and the last ``local_blocks`` (the token's own
    among them). Ties go to the lower index. The group shares the selection; no gradient passes.
    """
    length, num_windows = p_BHGTJ.shape[-2:]
    num_blocks = -(-length // block_size)
    overlap = window_overlap(num_windows, num_blocks, kernel_size, kernel_stride, block_size)
    scores_BHTN = pool_block_scores(p_BHGTJ.detach().sum(2), overlap, pooling)

    block = torch.arange(num_blocks, device=scores_BHTN.device)
    own = (torch.arange(length, device=scores_BHTN.device) // block_size)[:, None]
    reachable_TN = block <= own
    forced_TN = (block < init_blocks) | (block > own - local_blocks)
    ranked = scores_BHTN.masked_fill(forced_TN, torch.inf).masked_fill(~reachable_TN, -torch.inf)
    order = ranked.sort(dim=-1, descending=True, stable=True).indices[..., :topk]
    mask = torch.zeros_like(ranked, dtype=torch.bool).scatter_(-1, order, True) & reachable_TN
    return Selection.from_mask(mask.transpose(1, 2), block_size)
