"""The decode cache of a model: a ``DecodeCache`` with the rotary tables.

Shapes: B sequences, S tokens of capacity, T new tokens, D head size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dashattn.cache import DecodeCache
from dashattn.checks import check
from dashattn.ops.decode.reference import new_positions
from models.config import ModelConfig
from models.rope import rope_tables


class ModelCache(DecodeCache):
    """A ``DecodeCache`` of all layers, with the rotary tables of every position.

    Longrope turns all tokens of a sequence by its length: up to ``original_max_seq_len`` by the short factors, beyond
    by the long ones. So does a cache, for each sequence by its own tokens, whatever its neighbours and its capacity
    are. What is cached cannot be turned again, in deeper layers not even computed from it: a sequence that would pass
    that length is refused until it is reset and decoded whole (``outgrows_rotation``), as ``generate`` does.
    """

    def __init__(self, config: ModelConfig, layouts, batch: int, capacity: int, *, dtype: torch.dtype, device):
        super().__init__(layouts, batch, capacity, dtype=dtype, device=device)
        positions = torch.arange(capacity, device=device)
        self.tables = rope_tables(config, positions)
        self.short_length = None
        if config.rope.scaling == "longrope":
            self.short_length = config.rope.original_max_seq_len
            lengths = torch.tensor([self.short_length, self.short_length + 1], device=device)
            self.tables = rope_tables(config, positions, lengths=lengths)  # [2, S, D]: short, long

    def rope(self, num_tokens: int, counts_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(cos, sin), [B, T, D], of the ``num_tokens`` positions behind each sequence, of which its own are
        ``counts_B``, or all."""
        positions_BT = new_positions(self.lengths, num_tokens)
        if self.short_length is None:
            return tuple(table[positions_BT] for table in self.tables)
        lengths_B = self.lengths + (num_tokens if counts_B is None else counts_B)
        kind_B1 = (lengths_B > self.short_length).long()[:, None]
        return tuple(table[kind_B1, positions_BT] for table in self.tables)

    def outgrows_rotation(self, new_tokens: int | Sequence[int]) -> bool:
        """Whether, with one number of new tokens for all or one each, what is cached of a sequence would not hold."""
        if self.short_length is None:
            return False
        counts = [new_tokens] * len(self.host_lengths) if isinstance(new_tokens, int) else new_tokens
        pairs = zip(self.host_lengths, counts, strict=True)
        return any(0 < length <= self.short_length < length + count for length, count in pairs)

    def check_rotation(self, new_tokens: int | Sequence[int]) -> None:
        """Raises ValueError if ``outgrows_rotation``."""
        check(
            not self.outgrows_rotation(new_tokens),
            f"longrope turns sequences of more than {self.short_length} tokens by other factors than those cached: "
            "reset the sequences that pass that length and decode them from their beginning",
        )

    def truncate(self, lengths: Sequence[int]) -> None:
        """As ``DecodeCache.truncate``; ValueError also where longrope's factors for the new length are others."""
        pairs = zip(lengths, self.host_lengths)  # noqa: B905, their number is checked below
        check(
            self.short_length is None or not any(0 < new <= self.short_length < old for new, old in pairs),
            f"longrope turns sequences of up to {self.short_length} tokens by other factors than those cached: "
            "reset them and decode them from their beginning",
        )
        super().truncate(lengths)
