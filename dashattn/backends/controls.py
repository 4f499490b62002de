"""Backends without a router of their own: the sink and a window, and the oracle."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from dashattn.backends.base import ALL_HEADS, AttentionBackend, Capabilities
from dashattn.backends.options import AttentionConfig, forced_keys
from dashattn.checks import SELECTS, check_forced, check_oracle
from dashattn.controls import mass_bound, oracle_attention, sink_window_attention, window_selection
from dashattn.fields import Line, NonNegativeInt, OneOf, PositiveInt, PositiveShare
from dashattn.ops.decode.reference import new_positions
from dashattn.ops.true_mass.reference import mass_selection


@dataclass
class SinkWindowConfig(AttentionConfig):
    """Options of ``sink_window_attention``."""

    name: Line = "sink_window"
    block_size: PositiveInt = 64  # keys per block
    init_blocks: NonNegativeInt = 1  # first blocks, always read
    local_blocks: NonNegativeInt = 16  # blocks before a token's own, always read

    knob: ClassVar[str | None] = "local_blocks"
    blocks: ClassVar[str | None] = "block_size"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_forced(**forced_sizes(self))

    def least_active(self, length):
        return forced_keys(length, self.block_size, self.init_blocks, 2)


class SinkWindowBackend(AttentionBackend):
    """No parameters, no routing."""

    def forward(self, q, k, v, *, hidden=None, rope=None, cu_seqlens=None, return_stats=False, share=ALL_HEADS):
        call = {"cu_seqlens": cu_seqlens, "impl": self.config.impl, "return_stats": return_stats}
        return sink_window_attention(q, k, v, **forced_sizes(self.config), **call)

    @property
    def block_size(self):
        return self.config.block_size

    def summaries_scored(self, length):
        return 0.0

    def _attend(self, q, cache, hidden, operations):
        keys, positions = cache["k"], new_positions(cache.lengths, q.shape[1])
        selection = window_selection(positions, keys.shape, **forced_sizes(self.config))
        return operations.cached_attention(q, keys, cache["v"], cache.lengths, selection)


@dataclass
class OracleConfig(AttentionConfig):
    """Options of ``oracle_attention``; the knob is the bound that ``select`` names."""

    name: Line = "oracle"
    block_size: PositiveInt = 64  # keys per block
    select: Annotated[str, OneOf(SELECTS)] = "topk"  # topk, or top_p: the fewest blocks whose mass reaches it
    topk: PositiveInt = 16  # blocks in all, forced ones included
    top_p: PositiveShare = 0.9  # share of the attention's mass that the blocks hold
    init_blocks: NonNegativeInt = 1  # first blocks, always read
    local_blocks: NonNegativeInt = 4  # blocks before a token's own, always read

    blocks: ClassVar[str | None] = "block_size"

    @property
    def knob(self) -> str:
        return self.select

    def __post_init__(self) -> None:
        super().__post_init__()
        check_oracle(self.select, self.topk, self.top_p, **forced_sizes(self))

    def knob_span(self, length):
        return super().knob_span(length) if self.select == "topk" else (1.0, 1e-3)

    def least_active(self, length):
        return forced_keys(length, self.block_size, self.init_blocks, self.local_blocks + 1)


class OracleBackend(AttentionBackend):
    """For evaluation: it reads all keys to know which ones to read."""

    capabilities = Capabilities(train=False)

    def forward(self, q, k, v, *, hidden=None, rope=None, cu_seqlens=None, return_stats=False, share=ALL_HEADS):
        config = self.config
        bounds = {"select": config.select, "topk": config.topk, "top_p": config.top_p}
        call = {"cu_seqlens": cu_seqlens, "impl": config.impl, "return_stats": return_stats}
        return oracle_attention(q, k, v, **forced_sizes(config), **bounds, **call)

    @property
    def block_size(self):
        return self.config.block_size

    def summaries_scored(self, length):
        return 0.0

    def _attend(self, q, cache, hidden, operations):
        config, keys, positions = self.config, cache["k"], new_positions(cache.lengths, q.shape[1])
        bound = mass_bound(config.select, config.topk, config.top_p)
        selection = mass_selection(q, keys, positions, **forced_sizes(config), **bound)
        return operations.cached_attention(q, keys, cache["v"], cache.lengths, selection)


def forced_sizes(config: SinkWindowConfig | OracleConfig) -> dict[str, int]:
    return {name: getattr(config, name) for name in ("block_size", "init_blocks", "local_blocks")}
