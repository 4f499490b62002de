"""NSA (arXiv 2502.11089): compressed, selected and sliding-window attention under learned gates."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dashattn.backends.base import ALL_HEADS, AttentionBackend, AttentionFlops, HeadShare
from dashattn.backends.options import AttentionConfig, forced_keys
from dashattn.cache import CacheField
from dashattn.checks import check, check_nsa
from dashattn.fields import Line, NonNegativeInt, OneOf, PositiveInt
from dashattn.functional import nsa_attention
from dashattn.ops.compression.reference import compress_windows
from dashattn.ops.dtypes import upcast
from dashattn.rope import apply_rope
from dashattn.routing import topk_routing

VARIANTS = ("paper", "minicpm")


@dataclass
class NSAConfig(AttentionConfig):
    """Sizes as in ``nsa_attention``.

    Attributes:
        variant: ``paper``: three branches, gates from the hidden state. ``minicpm``: the baseline of DashAttention's
            authors, two branches (compressed and selected), gates from q, block scores by max-pooling; the window is
            ``local_blocks`` forced blocks, and ``window_size`` must be 0.
        shared_kv: the branches share the transformer's K and V; otherwise the compressed and the window branch have
            projections of their own, as in the paper.
    """

    name: Line = "nsa"
    variant: Annotated[str, OneOf(VARIANTS)] = "paper"
    shared_kv: bool = True
    block_size: PositiveInt = 64  # keys per selected block
    kernel_size: PositiveInt = 32  # tokens of a compressed window
    kernel_stride: PositiveInt = 16  # tokens between the beginnings of two windows
    topk: PositiveInt = 16  # selected blocks in all, forced ones included
    init_blocks: NonNegativeInt = 1  # first blocks, always selected
    local_blocks: PositiveInt = 2  # last blocks up to a token's own, always selected
    window_size: NonNegativeInt = 512  # keys of the sliding-window branch; 0 = no such branch

    knob: ClassVar[str | None] = "topk"
    blocks: ClassVar[str | None] = "block_size"

    @classmethod
    def samples(cls):
        return {"nsa": cls(block_size=32, kernel_size=16, kernel_stride=8, topk=8, window_size=64)}

    @property
    def pooling(self) -> str:
        return "max" if self.variant == "minicpm" else "weighted"

    @property
    def selection(self) -> dict:
        """What selects the blocks, as ``nsa_attention`` and ``topk_routing`` take it."""
        names = ("pooling", "block_size", "kernel_size", "kernel_stride", "topk", "init_blocks", "local_blocks")
        return {name: getattr(self, name) for name in names}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_nsa(**self.selection, window_size=self.window_size)
        if self.variant == "minicpm":
            check(
                self.window_size == 0 and self.shared_kv,
                "variant=minicpm has no window branch and no K/V of its own: set window_size=0, "
                "shared_kv=true, local_blocks to the window's blocks and topk above them; "
                f"got window_size={self.window_size}, shared_kv={self.shared_kv}",
            )
        else:
            check(self.window_size > 0, "variant=paper has a window branch: set window_size > 0; got 0")

    def least_active(self, length):
        return forced_keys(length, self.block_size, self.init_blocks, self.local_blocks, self.window_size)


def _matrix_size(module: nn.Module) -> int:
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


class MeanMLP(nn.Module):
    """The paper's compression: an MLP over a window's tokens, to which their position in the window is added.

    The paper leaves its shape open. Ours adds its output, zero at first, to the window's mean, so that a model which
    continues from dense weights starts from mean-pooled keys and values.
    """

    def __init__(self, kernel_size: int, head_dim: int):
        super().__init__()
        self.position = nn.Parameter(torch.zeros(kernel_size, head_dim))
        self.up = nn.Linear(kernel_size * head_dim, head_dim)
        self.down = nn.Linear(head_dim, head_dim)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, windows_BJlHD: Tensor) -> Tensor:
        mean = upcast(windows_BJlHD).mean(2).to(windows_BJlHD.dtype)
        tokens = (windows_BJlHD + self.position[:, None]).transpose(2, 3).flatten(3)  # [B, J, H, l * D]
        return mean + self.down(F.silu(self.up(tokens)))


class ChannelMLP(nn.Module):
    """The ``minicpm`` compression: a channel's keys and values of a window (2 l numbers) -> 128 -> ReLU -> (k, v)."""

    def __init__(self, kernel_size: int):
        super().__init__()
        self.up = nn.Linear(2 * kernel_size, 128)
        self.down = nn.Linear(128, 2)

    def forward(self, k_BJlHD: Tensor, v_BJlHD: Tensor) -> Tensor:
        tokens = torch.cat([k_BJlHD, v_BJlHD], dim=2).movedim(2, -1)  # [B, J, H, D, 2 l]
        return self.down(F.relu(self.up(tokens)))


class NSABackend(AttentionBackend):
    """Owns the compression MLPs, the gates and, unless shared, the K/V projections of two branches."""

    def __init__(self, config: NSAConfig, shape):
        super().__init__(config, shape)
        if config.variant == "minicpm":
            self.compress = ChannelMLP(config.kernel_size)
            self.gate = nn.Linear(shape.head_dim, 2)
        else:
            self.compress_k = MeanMLP(config.kernel_size, shape.head_dim)
            self.compress_v = MeanMLP(config.kernel_size, shape.head_dim)
            self.gate = nn.Linear(shape.hidden_size, 3 * shape.num_heads)
        nn.init.zeros_(self.gate.bias)
        self.branch_kv = None
        if not config.shared_kv:
            width = 4 * shape.num_kv_heads * shape.head_dim
            self.branch_kv = nn.Linear(shape.hidden_size, width, bias=False)
            nn.init.normal_(self.branch_kv.weight, std=0.02)

    def forward(self, q, k, v, *, hidden=None, rope=None, cu_seqlens=None, return_stats=False, share=ALL_HEADS):
        config = self.config
        gates = self._gates(q, hidden, share)
        compress_from, window = (k, v), (None, None)
        if self.branch_kv is not None:
            compress_from, window = self._own_kv(hidden, rope, share)
        compressed_k, compressed_v = self._compress(*compress_from, cu_seqlens)
        return nsa_attention(
            q,
            k,
            v,
            compressed_k,
            compressed_v,
            gates,
            k_window=window[0],
            v_window=window[1],
            **config.selection,
            window_size=config.window_size,
            cu_seqlens=cu_seqlens,
            impl=config.impl,
            return_stats=return_stats,
        )

    def _gates(self, q: Tensor, hidden: Tensor | None, share: HeadShare = ALL_HEADS) -> Tensor:
        """In [0, 1], one per branch: [B, T, Hq, 2 or 3]."""
        if self.config.variant == "minicpm":
            return self.gate(q).sigmoid()
        check(hidden is not None, "variant=paper computes its gates from hidden: pass hidden")
        return share.gather(self.gate(hidden).unflatten(-1, (-1, 3))).sigmoid()

    @property
    def block_size(self):
        return self.config.block_size

    def cache_layout(self):
        # Beside keys and values: for every window, a row each stride of tokens, what the compressed branch attends to
        # and what scores the blocks; and, where branches have projections of their own, their keys and values, those of
        # the compressed branch too: a window is compressed when its last token comes, from tokens of earlier steps.
        config, shape = self.config, self.shape
        tokens = CacheField(shape.num_kv_heads, shape.head_dim)
        windows = CacheField(shape.num_kv_heads, shape.head_dim, tokens_per_row=config.kernel_stride)
        fields = {"compressed_k": windows, "compressed_v": windows}
        if self.branch_kv is not None:
            fields |= dict.fromkeys(("k_compress", "v_compress", "k_window", "v_window"), tokens)
        return self._layout(**fields)

    def _write(self, k, v, cache, hidden, rope):
        # What windows are made of must lie in the cache before they are made.
        sources = ("k", "v")
        if self.branch_kv is not None:
            sources = ("k_compress", "v_compress")
            own = self._own_kv(hidden, rope)
            cache.write(**dict(zip((*sources, "k_window", "v_window"), (*own[0], *own[1]), strict=True)))
        one_token = self._append(k, v, cache)
        windows, targets = (self.config.kernel_size, self.config.kernel_stride), ("compressed_k", "compressed_v")
        # One token completes at most one window, often none: a kernel that looks whether it does, instead of some forty
        # of PyTorch at every step. It computes the paper's MLP, with weights in the type of the cache.
        if one_token and self.config.variant == "paper" and self.compress_k.position.dtype == k.dtype:
            caches, outs = ([cache[name] for name in names] for names in (sources, targets))
            compressions = (self.compress_k, self.compress_v)
            self._decode_kernels(k).compress_window(caches, compressions, outs, cache.lengths, *windows)
            return
        cache.write_windows(k.shape[1], *windows, partial(self._compress, cu_seqlens=None), sources, targets)

    def _attend(self, q, cache, hidden, operations):
        config = self.config
        out_compressed, selection = operations.cached_window_routing(
            q,
            cache["compressed_k"],
            cache["compressed_v"],
            cache.lengths,
            **config.selection,
        )
        branches = [out_compressed, operations.cached_attention(q, cache["k"], cache["v"], cache.lengths, selection)]
        if config.window_size:
            names = ("k", "v") if self.branch_kv is None else ("k_window", "v_window")
            keys, values = (cache[name] for name in names)
            window = operations.cached_attention(q, keys, values, cache.lengths, window_size=config.window_size)
            branches.append(window)
        return operations.gated_sum(self._gates(q, hidden), branches).to(q.dtype)

    def kept_bytes(self, length, itemsize):
        """The outputs of the branches, each with its sums and its gates before and after the sigmoid, and the tokens of
        every window, of keys and of values, as the compression reads them, with its hidden units."""
        config, shape = self.config, self.shape
        branches = 3 if config.window_size else 2
        outputs = branches * shape.num_heads * (itemsize * shape.head_dim + 4 + 2 * itemsize)
        per_window = 2 * shape.num_kv_heads * shape.head_dim * itemsize
        units = self.compress.up.out_features / 2 if config.variant == "minicpm" else 0  # of a channel, keys and values
        windows = per_window * (config.kernel_size + units + 4) / config.kernel_stride
        own = 0 if self.branch_kv is None else 2 * per_window
        return super().kept_bytes(length, itemsize) - 4 * shape.num_heads + outputs + windows + own

    def summaries_scored(self, length):
        return (length + 1) / 2 / self.config.kernel_stride

    def flops(self, active_tokens, routing_reads):
        """Keys that the selected and the window branch both read count once, as they do in the sparsity."""
        config, shape = self.config, self.shape
        channels = shape.num_heads * shape.head_dim
        attention, compressed = 4 * channels * active_tokens, 4 * channels * routing_reads
        if config.variant == "minicpm":
            per_window = shape.num_kv_heads * shape.head_dim * _matrix_size(self.compress)
            projections = shape.num_heads * _matrix_size(self.gate)
        else:
            per_window = shape.num_kv_heads * (_matrix_size(self.compress_k) + _matrix_size(self.compress_v))
            projections = _matrix_size(self.gate)
        projections += per_window / config.kernel_stride
        if self.branch_kv is not None:
            projections += _matrix_size(self.branch_kv)
        forward = attention + compressed + 2 * projections
        return AttentionFlops(attention, compressed, 2 * projections, backward=2 * forward)

    def route(self, q, k, v, *, hidden=None, rope=None, positions=None):
        config = self.config
        if self.branch_kv is not None:
            (k, v), _ = self._own_kv(hidden, rope)
        return topk_routing(
            q,
            self._compress(k, v, None)[0],
            positions,
            **config.selection,
        )

    def _compress(self, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        """Compressed keys and values, each [B, J, Hkv, D]."""
        windows = partial(
            compress_windows,
            kernel_size=self.config.kernel_size,
            kernel_stride=self.config.kernel_stride,
            cu_seqlens=cu_seqlens,
        )
        if self.config.variant == "minicpm":
            return windows(self.compress, k, v).unbind(-1)
        return windows(self.compress_k, k), windows(self.compress_v, v)

    def _own_kv(
        self, hidden: Tensor, rope, share: HeadShare = ALL_HEADS
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(k, v) of the compressed and of the window branch, keys rotated."""
        check(rope is not None, "shared_kv=false rotates keys of its own: pass rope=(cos, sin)")
        branches = self.branch_kv(hidden).unflatten(-1, (4, -1, self.shape.head_dim)).movedim(2, 3)
        k_c, v_c, k_w, v_w = share.gather(branches).unbind(3)
        return (apply_rope(k_c, *rope), v_c), (apply_rope(k_w, *rope), v_w)
