"""From attention over compressed windows to a top-k selection of blocks (InfLLM v2 and NSA).

Shapes: B batch, T tokens, H KV heads, J windows, N blocks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dashattn.selection import Selection

POOLINGS = ("weighted", "max")


def pool_block_scores(
    p_BHTJ: Tensor, num_blocks: int, *, kernel_size: int, kernel_stride: int, block_size: int, pooling: str,
    outside: float = 0.0,
) -> Tensor:  # fmt: skip
    """Block scores [B, H, T, N] from window probabilities.

    ``max``: the highest of the windows that touch the block (InfLLM v2). ``weighted``: their sum, weighted by the keys
    they share with the block in units of the stride (NSA, equation 9): with windows of 32 every 16 and blocks of 64
    a block meets windows 4b-1 .. 4b+3 with weights 1, 2, 2, 2, 1. ``outside``: of a window that does not exist; -inf
    where ``max`` is of logarithms.
    """
    inside = block_size // kernel_stride  # windows that start in the block
    before = kernel_size // kernel_stride - 1  # and those that reach into it
    missing = num_blocks * inside - p_BHTJ.shape[-1]
    padded = F.pad(p_BHTJ, (before, missing), value=outside)
    touching = padded.unfold(-1, before + inside, inside)  # [B, H, T, N, windows]
    if pooling == "max":
        return touching.amax(-1)
    start = torch.arange(-before, inside, device=p_BHTJ.device) * kernel_stride
    shared = (start + kernel_size).clamp(max=block_size) - start.clamp(min=0)
    return touching @ (shared / kernel_stride).to(p_BHTJ)


def topk_selection(
    log_p_BHGTJ: Tensor,
    *,
    kernel_size: int,
    kernel_stride: int,
    pooling: str,
    block_size: int,
    topk: int,
    init_blocks: int,
    local_blocks: int,
    positions: Tensor | None = None,
    num_blocks: int | None = None,
) -> Selection:
    """Scores blocks with the log probabilities [B, H, G, T, J] of one document's windows and selects ``topk`` of them.

    Forced, and counted in ``topk``, are the first ``init_blocks`` and the last ``local_blocks`` (the token's own among
    them). Ties go to the lower index. The group shares the selection; no gradient passes. ``positions`` (int [B, T])
    and ``num_blocks`` are those of the T tokens of one document unless given.
    """
    if positions is None:
        length = log_p_BHGTJ.shape[-2]
        positions = torch.arange(length, device=log_p_BHGTJ.device)[None]
        num_blocks = -(-length // block_size)
    # Of sharp scores most probabilities are 0 in float32, and would tie.
    by_logs = pooling == "max"
    log_p_BHGTJ = log_p_BHGTJ.detach()
    scores_BHTN = pool_block_scores(
        log_p_BHGTJ.logsumexp(2) if by_logs else log_p_BHGTJ.exp().sum(2),
        num_blocks,
        kernel_size=kernel_size,
        kernel_stride=kernel_stride,
        block_size=block_size,
        pooling=pooling,
        outside=-torch.inf if by_logs else 0.0,
    )

    block = torch.arange(num_blocks, device=scores_BHTN.device)
    own = (positions // block_size)[:, None, :, None]
    reachable = block <= own
    forced = (block < init_blocks) | (block > own - local_blocks)
    ranked = scores_BHTN.masked_fill(forced, torch.inf).masked_fill(~reachable, -torch.inf)
    order = ranked.sort(dim=-1, descending=True, stable=True).indices[..., :topk]
    mask = torch.zeros_like(ranked, dtype=torch.bool).scatter_(-1, order, True) & reachable
    return Selection.from_mask(mask.transpose(1, 2), block_size)
