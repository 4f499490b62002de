"""InfLLM v2 (arXiv 2509.24663): the weights of dense attention, blocks chosen by top-k."""

from dataclasses import dataclass, replace
from typing import ClassVar

from dashattn.backends.base import ALL_HEADS, AttentionBackend, Capabilities
from dashattn.backends.options import AttentionConfig, forced_keys
from dashattn.cache import CacheField
from dashattn.checks import check_infllmv2
from dashattn.fields import Line, NonNegativeInt, PositiveInt
from dashattn.functional import infllmv2_attention
from dashattn.ops.compression.reference import mean_compress
from dashattn.routing import topk_routing
from dashattn.selection import Chosen


@dataclass
class InfLLMv2Config(AttentionConfig):
    """Sizes as in ``infllmv2_attention``."""

    name: Line = "infllmv2"
    block_size: PositiveInt = 64  # keys per selected block
    kernel_size: PositiveInt = 32  # tokens of a window whose mean key scores blocks
    kernel_stride: PositiveInt = 16  # tokens between the beginnings of two windows
    topk: PositiveInt = 64  # blocks in all, forced ones included
    init_blocks: NonNegativeInt = 1  # first blocks, always selected
    window_size: NonNegativeInt = 1024  # tokens before a token's own block that are always selected, whole blocks

    knob: ClassVar[str | None] = "topk"
    blocks: ClassVar[str | None] = "block_size"

    @classmethod
    def at_block_size(cls, size):
        """The window as long as the default one, in whole blocks."""
        return cls(block_size=size, window_size=cls.window_size // size * size)

    @classmethod
    def samples(cls):
        return {"infllmv2": cls(block_size=32, kernel_size=16, kernel_stride=8, topk=8, window_size=64)}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_infllmv2(**self.sizes)

    @property
    def sizes(self) -> dict[str, int]:
        """As ``infllmv2_attention`` takes them."""
        names = ("block_size", "kernel_size", "kernel_stride", "topk", "init_blocks", "window_size")
        return {name: getattr(self, name) for name in names}

    @property
    def selection(self) -> dict:
        """What selects the blocks, as ``topk_routing`` takes it."""
        forced = {"init_blocks": self.init_blocks, "local_blocks": self.local_blocks}
        windows = {"kernel_size": self.kernel_size, "kernel_stride": self.kernel_stride}
        return {"pooling": "max", "block_size": self.block_size, "topk": self.topk} | windows | forced

    @property
    def local_blocks(self) -> int:
        """Those of the window, and a token's own."""
        return self.window_size // self.block_size + 1

    def least_active(self, length):
        return forced_keys(length, self.block_size, self.init_blocks, self.local_blocks)


class InfLLMv2Backend(AttentionBackend):
    """No parameters: the selection carries no gradient."""

    capabilities = Capabilities(hands_on=True)

    def summaries_scored(self, length):
        return (length + 1) / 2 / self.config.kernel_stride

    def flops(self, active_tokens, routing_reads):
        flops = super().flops(active_tokens, routing_reads)
        return replace(flops, backward=2 * flops.attention)

    def route(self, q, k, v, *, hidden=None, rope=None, positions=None):
        config = self.config
        return topk_routing(
            q,
            mean_compress(k, config.kernel_size, config.kernel_stride),
            positions,
            **config.selection,
        )

    def forward(
        self,
        q,
        k,
        v,
        *,
        hidden=None,
        rope=None,
        cu_seqlens=None,
        return_stats=False,
        return_selection=False,
        share=ALL_HEADS,
    ):
        config = self.config
        return infllmv2_attention(
            q,
            k,
            v,
            **config.sizes,
            cu_seqlens=cu_seqlens,
            impl=config.impl,
            return_stats=return_stats,
            return_selection=return_selection,
        )

    @property
    def block_size(self):
        return self.config.block_size

    def cache_layout(self):
        config, shape = self.config, self.shape
        windows = CacheField(shape.num_kv_heads, shape.head_dim, tokens_per_row=config.kernel_stride)
        return self._layout(compressed_k=windows)

    def _write(self, k, v, cache, hidden, rope):
        # Windows are pooled as they are completed. Their means only score blocks, so they have no values.
        size, stride = self.config.kernel_size, self.config.kernel_stride
        if self._append(k, v, cache, pooled=cache["compressed_k"], window=(size, stride)):
            return

        def compress(keys):
            return (mean_compress(keys, size, stride),)

        cache.write_windows(k.shape[1], size, stride, compress, ["k"], ["compressed_k"])

    def _select(self, q, cache, hidden, operations):
        _, selection = operations.cached_window_routing(
            q,
            cache["compressed_k"],
            None,
            cache.lengths,
            **self.config.selection,
        )
        return Chosen(selection.words, None)
