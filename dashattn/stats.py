"""The one count of sparsity, for every backend.

A token's *active* tokens are the distinct keys it attends to one by one: selected blocks cut at the diagonal,
forced blocks and windows included, each key once. What routing reads beside them (chunk summaries, compressed
keys) is counted apart.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dashattn.documents import document_positions
from dashattn.selection import WORD_BITS, Selection

SPARSITY_COUNTS = ("causal", "paper")
PAPER_SKIP = 4096  # first tokens, which the DashAttention authors do not count
CHUNK_BLOCKS = 2**26  # of tokens, each with all of its blocks, counted at once: some ten bytes each


@dataclass(frozen=True)
class AttentionStats:
    """What one call of an attention backend read.

    Attributes:
        active_tokens: int32 [B, T, Hkv], keys attended to token by token.
        positions: int32 [B, T], position within the document; dense attention reads ``positions + 1`` keys.
        routing_reads: int32 [B, T], summaries or compressed keys scored per KV head.
    """

    active_tokens: Tensor
    positions: Tensor
    routing_reads: Tensor

    def causal_sparsity(self) -> Tensor:
        return causal_sparsity(self.active_tokens, self.positions)

    def paper_sparsity(self, skip: int = PAPER_SKIP) -> Tensor:
        return paper_sparsity(self.active_tokens, skip=skip)

    def counts(self, count: str) -> Tensor:
        """Active keys, and the keys that they are counted against: 1 minus their ratio is the sparsity of that name,
        ``causal`` or ``paper``, and sums over several calls have one too. Float64 [2]."""
        if count == "paper":
            return torch.stack(paper_counts(self.active_tokens))
        return torch.stack(causal_counts(self.active_tokens, self.positions))


def causal_sparsity(active_tokens: Tensor, positions: Tensor) -> Tensor:
    """1 - active keys / keys of dense causal attention: 0 for dense. Float32 scalar tensor.

    Args:
        active_tokens: int [B, T, Hkv].
        positions: int [B, T], position of each token within its document.
    """
    active, dense = causal_counts(active_tokens, positions)
    return 1 - (active / dense).float()


def causal_counts(active_tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Active keys and keys of dense causal attention, float64 scalar tensors."""
    dense = (positions.long() + 1).sum() * active_tokens.shape[-1]
    return active_tokens.long().sum().double(), dense.double()


def paper_sparsity(active_tokens: Tensor, skip: int = PAPER_SKIP) -> Tensor:
    """1 - mean over t >= skip of active / N, as the DashAttention authors count. Float32 scalar tensor.

    Dense causal attention does not score 0 under it (37 % at N = 16384): only for tables beside the paper's.
    NaN where no token lies past ``skip``; defined for unpacked sequences only.
    """
    active, counted = paper_counts(active_tokens, skip)
    return 1 - (active / counted).float()


def paper_counts(active_tokens: Tensor, skip: int = PAPER_SKIP) -> tuple[Tensor, Tensor]:
    """Active keys of the tokens from ``skip`` on, and N for each of them, float64 scalar tensors."""
    active = active_tokens[:, skip:].long().sum().double()
    return active, torch.full_like(active, active_tokens[:, skip:].numel() * active_tokens.shape[1])


def dense_stats(batch: int, length: int, num_kv_heads: int, device: torch.device, cu_seqlens=None) -> AttentionStats:
    """Stats of dense causal attention."""
    positions = document_positions(cu_seqlens, batch, length, device)
    active = (positions + 1)[..., None].expand(-1, -1, num_kv_heads)
    return AttentionStats(active, positions, torch.zeros_like(positions))


def selection_stats(
    selection: Selection, routing_reads: Tensor, cu_seqlens: Tensor | None, window_size: int = 0
) -> AttentionStats:
    """Stats of block-sparse attention over ``selection``, joined with a sliding window of the last keys.

    Args:
        selection: blocks per token; may only name blocks up to the token's own.
        routing_reads: int32 [B, T].
        cu_seqlens: int32 [N + 1] or None.
        window_size: keys of the sliding window, the token itself included; 0 for none.
    """
    batch, kv_heads, length, width = selection.words.shape
    positions = document_positions(cu_seqlens, batch, length, selection.words.device)
    window = (positions + 1).clamp(max=window_size)
    # Compiled, nothing of this is in memory, and how often a loop goes round would be a constant.
    size = length if torch.compiler.is_compiling() else max(1, CHUNK_BLOCKS // (batch * kv_heads * WORD_BITS * width))
    parts = zip(
        selection.words.split(size, dim=2), positions.split(size, dim=1), window.split(size, dim=1), strict=True
    )
    active = torch.cat([_active_tokens(Selection(words, selection.block_size), *own) for words, *own in parts], dim=1)
    return AttentionStats(active, positions, routing_reads)


def _active_tokens(selection: Selection, positions_BT: Tensor, window_BT: Tensor) -> Tensor:
    # A block counts with those of its keys that are neither in the future nor already in the window.
    mask_BTHN = selection.mask()
    size = selection.block_size
    block_start = torch.arange(mask_BTHN.shape[-1], device=positions_BT.device, dtype=torch.int32) * size
    keys_BTN = (positions_BT[..., None] + 1 - window_BT[..., None] - block_start).clamp(0, size)
    return (mask_BTHN * keys_BTN[:, :, None]).sum(-1, dtype=torch.int32) + window_BT[..., None]
