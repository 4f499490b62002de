"""Which KV blocks each query token reads: the one interface between the sparse methods and the block-sparse core."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

WORD_BITS = 32


@dataclass(frozen=True)
class Selection:
    """Selected KV blocks per query token and KV head, as bit masks.

    Attributes:
        words: int32 [B, Hkv, T, W]. Bit ``c % 32`` of word ``c // 32`` is set iff the token reads block ``c``.
            Blocks are counted from the start of the token's own document.
        block_size: keys per block.
    """

    words: Tensor
    block_size: int

    @classmethod
    def from_mask(cls, mask_BTHN: Tensor, block_size: int) -> "Selection":
        """Packs a boolean mask [B, T, Hkv, N]."""
        num_blocks = mask_BTHN.shape[-1]
        padded = F.pad(mask_BTHN, (0, -num_blocks % WORD_BITS)).unflatten(-1, (-1, WORD_BITS))
        weights = 1 << torch.arange(WORD_BITS, device=mask_BTHN.device)
        words = (padded * weights).sum(-1).to(torch.int32)  # bit 31 wraps to the sign, as intended
        return cls(words.transpose(1, 2).contiguous(), block_size)

    @classmethod
    def concatenate(cls, documents: Sequence["Selection"]) -> "Selection":
        """Joins the selections of consecutive documents along the token axis."""
        width = max(d.words.shape[-1] for d in documents)
        words = [F.pad(d.words, (0, width - d.words.shape[-1])) for d in documents]
        return cls(torch.cat(words, dim=2), documents[0].block_size)

    def mask(self) -> Tensor:
        """The selection as a boolean tensor [B, T, Hkv, 32 * W]."""
        bits = torch.arange(WORD_BITS, device=self.words.device, dtype=torch.int32)
        mask_BHTWb = (self.words[..., None] >> bits) & 1
        return mask_BHTWb.flatten(-2).bool().transpose(1, 2)


class Chosen(NamedTuple):
    """What a layer attended to, for later layers to take over. Tensors alone, as they pass from module to module.

    Attributes:
        words: those of a ``Selection``, int32 [B, Hkv, T, W]; where kernels decode perhaps [B, Hq, T, W], of which a
            group's are united.
        bias: [B, T, Hkv or Hq, N], the router's prior, which was added to the logits of each block; None: nothing was.
            Differentiable by what the router was given.
    """

    words: Tensor
    bias: Tensor | None
