"""The protocol every attention backend follows. The transformer knows this and never a backend's name."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dashattn import checks
from dashattn.backends.options import AttentionConfig
from dashattn.backends.recompute import recompute, recompute_layout
from dashattn.cache import CacheField, CacheLayout, DecodeCache, LayerCache
from dashattn.checks import check
from dashattn.functional import Handing, Output
from dashattn.implementation import use_kernels
from dashattn.ops.block_sparse.dq_sums import sums_bytes
from dashattn.ops.decode import reference as decode_reference
from dashattn.routing import Routing
from dashattn.selection import Chosen, Selection


@dataclass(frozen=True)
class AttentionShape:
    """Sizes that a backend gets from the model around it."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def group_size(self) -> int:
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do; the model refuses at construction what it cannot.

    Attributes:
        packed: documents packed with cu_seqlens.
        decode: new tokens against a cache of its own; without one, every token is attended from anew for each that
            comes (``dashattn.backends.recompute``): right, and slow.
        train: more than evaluation.
        max_head_dim: largest head size.
        max_group_size: most query heads per KV head.
        hands_on: its selection to later layers (``return_selection``).
        in_pytorch: what runs in PyTorch on a GPU, too, for want of kernels; to be told to who trains there.
    """

    packed: bool = True
    decode: bool = True
    train: bool = True
    max_head_dim: int = 256
    max_group_size: int = 32
    hands_on: bool = False
    in_pytorch: str | None = None


class HeadShare:
    """Which of a layer's heads ``forward`` attends for: here all of them.

    Sequence parallelism brings a share of its own. q, k and v then hold some heads of all tokens, and ``hidden`` all of
    what this process has, which is some of the tokens.

    Attributes:
        query_heads, kv_heads: the layer's heads that q, and that k and v hold: whole groups.
        kv_weights: of each of these KV heads its weight in a mean over the layer's, such that those of all processes
            are 1 together; None: alike.
    """

    query_heads = kv_heads = slice(None)
    kv_weights: Sequence[float] | None = None

    def gather(self, x: Tensor) -> Tensor:
        """What a backend made of ``hidden`` for each query or each KV head [B, T', H, ...], of all tokens and for the
        heads of this share."""
        return x


ALL_HEADS = HeadShare()


@dataclass(frozen=True)
class AttentionFlops:
    """Operations per token of one layer's attention in the forward pass; a multiply-add is two.

    Attributes:
        attention: q k^T and weights times v over the active keys.
        routing: what is computed over summaries or compressed keys.
        projections: products with the backend's own parameters.
        backward: of all three; the gradient of a product is two products of its size.
    """

    attention: float
    routing: float
    projections: float
    backward: float

    @property
    def forward(self) -> float:
        return self.attention + self.routing + self.projections


class AttentionBackend(nn.Module):
    """Attention after the projections and RoPE: owns its own parameters, not those of the transformer.

    A backend says what it can do (``capabilities``), attends (``forward``), and shows what its router decided
    (``route``) and what it costs (``flops``). With ``Capabilities(decode=False)`` that is all. Otherwise ``decode`` is
    made of what it says about its cache, and is right if its outputs are those of ``forward`` over whole sequences,
    however the tokens come: a prompt first, several at a time, one by one, rows padded at their ends.

    ``block_size``, ``cache_layout``
        What a layer keeps of the tokens it has seen: keys and values, and beside them what would have to be made anew
        for every token, such as the summary of each chunk (``_layout`` takes these as fields).
    ``_write(k, v, cache, hidden, rope)``
        Puts new tokens there, and what they complete: keys and values by ``_append``, which takes the kernel for one
        token where there is one, summaries of windows that have come to their end by ``cache.write_windows``. By
        default it writes keys and values.
    ``_attend(q, cache, hidden, operations)``
        The attention of new tokens, written already, over all that is there, in terms of ``operations``: the module of
        the kernels or that of the reference, which have the same names. A row that is padded attends to what it may;
        nobody looks at it.
    ``_select(q, cache, hidden, operations)``
        In its place, where attention is a softmax over blocks: which ones these are. What ``hands_on`` has this.
    ``_step(q, k, v, cache, hidden, rope)``
        The two together. A backend overrides it if one kernel writes and attends.

    ``cache.lengths`` are the tokens *before* the new ones until ``DecodeCache.advance`` counts these, once for all
    layers: every layer of a step reads the same lengths, and a step that failed half-way has changed nothing that is
    read. A prompt into an empty cache is written and then attended to by ``forward``, which is what trains.
    """

    capabilities = Capabilities()
    source: int | None = None  # the layer whose selection it takes over
    uncompiled: tuple[str, ...] = ("decode",)  # methods that torch.compile calls as they are
    takes_max_seqlen = False  # forward is faster if it is told ``max_seqlen``, tokens of the longest packed document

    def __init__(self, config: AttentionConfig, shape: AttentionShape):
        super().__init__()
        self.config = config
        self.shape = shape

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        hidden: Tensor | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
        cu_seqlens: Tensor | None = None,
        return_stats: bool = False,
        share: HeadShare = ALL_HEADS,
    ) -> Output:
        """Attends causally.

        What ``hands_on`` its selection takes ``return_selection``, too, and returns then ``(result, Chosen)``.

        Args:
            q: post-RoPE [B, T, Hq, D].
            k, v: [B, T, Hkv, D], k post-RoPE.
            hidden: input of the attention block [B, T, hidden_size], for gates and projections of the backend's own.
            rope: (cos, sin) of every token, each [T, D] or [B, T, D], in the rotate-half layout.
            cu_seqlens: int32 [N + 1], packed documents.
            return_stats: also return ``AttentionStats``.
            share: which heads q, k and v hold, if not all of the layer's.

        Returns:
            [B, T, Hq, D] in q's dtype.
        """
        raise NotImplementedError

    def forward_with_loss(self, q: Tensor, k: Tensor, v: Tensor, **options) -> tuple[Handing, Tensor | None]:
        """What ``forward`` returns, and a loss of the backend's own, which training adds to the model's.

        The loss is float32 or float64 [], a mean over the tokens of q, and over KV heads by the ``kv_weights`` of a
        ``share``; None, as here, where there is none.
        """
        return self(q, k, v, **options), None

    def new_cache(self, batch: int, capacity: int, *, dtype: torch.dtype, device) -> DecodeCache:
        """An empty cache of this one layer, for ``batch`` sequences of up to ``capacity`` tokens."""
        return DecodeCache([self.cache_layout()], batch, capacity, dtype=dtype, device=device)

    @torch.no_grad()
    def decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: LayerCache,
        *,
        hidden: Tensor | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
        return_stats: bool = False,
        return_selection: bool = False,
        taken: Chosen | None = None,
    ) -> Handing:
        """Writes new tokens into the cache, behind the sequences there, and attends from them.

        The same outputs as ``forward`` over the whole sequences. Nothing is differentiable. The lengths stay: call
        ``DecodeCache.advance`` when all layers have decoded. Rows with fewer than T new tokens are padded at their end.

        Args:
            q, k, v, hidden: as in ``forward``, of T >= 1 new tokens.
            cache: a layer of a ``DecodeCache``.
            rope: (cos, sin) of the new tokens, each [T, D] or [B, T, D].
            return_stats: also return ``AttentionStats``, of tokens that are the first ones of their sequences.
            return_selection: also return the selection, as ``forward`` does; of what ``hands_on``.
            taken: what the layer ``source`` returned in the same step, if there is one.

        Returns:
            [B, T, Hq, D] in q's dtype; without meaning where a row is padded.

        Raises:
            ValueError: shapes, dtype or device do not fit the cache, or the cache has no room.
        """
        checks.check_qkv(q, k, v, None)
        keys = cache["k"]
        checks.check_shape("k", k, (keys.shape[0], k.shape[1], *keys.shape[2:]))
        checks.check_like("the cache", keys, q)
        cache.sequences.check_room(q.shape[1])
        if rope is not None:
            rope = tuple(table.expand(q.shape[0], -1, -1) for table in rope)
        assert cache.is_empty or not return_stats, "statistics are a prompt's"
        if not self.capabilities.decode:
            check(
                taken is None and not return_selection,
                f"attention={self.config.name} has no cache, and hands no selection on while it decodes: leave "
                "share_selection_from out of attention.layers",
            )
            return recompute(self, q, k, v, cache, hidden, rope, return_stats=return_stats)
        if cache.is_empty:  # a prompt from its beginning: what forward is for
            self._write(k, v, cache, hidden, rope)
            handing = {"return_selection": True} if return_selection else {}
            handing |= {} if taken is None else {"taken": taken}
            return self(q, k, v, hidden=hidden, rope=rope, return_stats=return_stats, **handing)
        if taken is None and not return_selection:
            return self._step(q, k, v, cache, hidden, rope)
        self._write(k, v, cache, hidden, rope)
        operations = self._decode_operations(q)
        chosen = self._select(q, cache, hidden, operations) if taken is None else taken
        out = self._attend_chosen(q, cache, chosen, operations)
        return (out, chosen) if return_selection else out

    @torch.no_grad()
    def write(self, k: Tensor, v: Tensor, cache: LayerCache, *, hidden=None, rope=None) -> None:
        """The half of ``decode`` that writes, for those who only fill a cache."""
        self._write(k, v, cache, hidden, rope)

    @torch.no_grad()
    def attend(self, q: Tensor, cache: LayerCache, *, hidden=None, operations=None) -> Tensor:
        """The half of ``decode`` that attends, from tokens that are written already, for those who compare.

        Args:
            operations: what has the functions of ``ops.decode.reference``; None = what ``decode`` takes.
        """
        return self._attend(q, cache, hidden, self._decode_operations(q) if operations is None else operations)

    def decodes_statically(self, cache: LayerCache) -> bool:
        """Whether ``decode`` with this cache never waits for the device, so that a CUDA graph can hold it."""
        return self.capabilities.decode

    @property
    def block_size(self) -> int:
        """Keys per block that decoding reads or leaves."""
        raise NotImplementedError

    def cache_layout(self) -> CacheLayout:
        """What a layer's cache holds: at least ``k`` and ``v``."""
        if not self.capabilities.decode:
            shape = self.shape
            return recompute_layout(shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.hidden_size)
        return self._layout()

    def _layout(self, **fields: CacheField) -> CacheLayout:
        """Keys, values and ``fields``."""
        tokens = CacheField(self.shape.num_kv_heads, self.shape.head_dim)
        return CacheLayout(self.block_size, {"k": tokens, "v": tokens, **fields})

    def _write(self, k: Tensor, v: Tensor, cache: LayerCache, hidden, rope) -> None:
        """Writes what ``cache_layout`` names for the new tokens."""
        self._append(k, v, cache)

    def _append(self, k: Tensor, v: Tensor, cache: LayerCache, **pooled) -> bool:
        """Writes keys and values; whether the kernel for one token did, and wrote what ``pooled`` asks for, too."""
        kernels = self._decode_kernels(k)
        if kernels is None or k.shape[1] > 1:
            cache.write(k=k, v=v)
            return False
        kernels.append(k, v, cache["k"], cache["v"], cache.lengths, **pooled)
        return True

    def _step(self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, hidden, rope) -> Tensor:
        """Writes new tokens behind those of the cache, and attends from them."""
        self._write(k, v, cache, hidden, rope)
        return self._attend(q, cache, hidden, self._decode_operations(q))

    def _attend(self, q: Tensor, cache: LayerCache, hidden, operations) -> Tensor:
        """Attention from the new tokens, written already, over the cache."""
        return self._attend_chosen(q, cache, self._select(q, cache, hidden, operations), operations)

    def _select(self, q: Tensor, cache: LayerCache, hidden, operations) -> Chosen:
        """The blocks that the new tokens attend to."""
        raise NotImplementedError

    def _attend_chosen(self, q: Tensor, cache: LayerCache, chosen: Chosen, operations) -> Tensor:
        selection = Selection(chosen.words, self.block_size)
        return operations.cached_attention(q, cache["k"], cache["v"], cache.lengths, selection, chosen.bias)

    def _decode_operations(self, x: Tensor):
        """The module of decode operations, kernels or reference, that takes tensors like ``x``."""
        return self._decode_kernels(x) or decode_reference

    def _decode_kernels(self, x: Tensor, unsupported: str | None = None):
        """The module of the decode kernels where they take tensors like ``x``, else None."""
        if not use_kernels(self.config.impl, x, self.block_size, unsupported):
            return None
        from dashattn.ops.decode import triton

        return triton

    def set_step(self, step: int) -> None:
        """Moves schedules to an optimiser step; a pure function of the step, which a resumed run repeats."""

    def set_knob(self, value: float) -> None:
        """Sets the sparsity knob, as at inference. ValueError where there is none or the value cannot be."""
        self.config = self.config.with_knob(value)

    def route(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        hidden: Tensor | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
        positions: Tensor | None = None,
    ) -> Routing | None:
        """What the router decides for these inputs of ``forward``, unpacked; None for a backend that has none.

        ``positions``: int64 [P], the tokens to say it of; None: all, whose scores of all blocks may be many.
        """
        return None

    def flops(self, active_tokens: float, routing_reads: float) -> AttentionFlops:
        """Operations per token, from the measured means per token and KV head (see ``AttentionStats``)."""
        channels = self.shape.num_heads * self.shape.head_dim
        attention, routing = 4 * channels * active_tokens, 2 * channels * routing_reads
        return AttentionFlops(attention, routing, projections=0.0, backward=2 * (attention + routing))

    def numbers_read(self, active_tokens: float, routing_reads: float) -> float:
        """Of keys, values, summaries and compressed tokens, what decoding a token has to fetch; arguments as ``flops``.
        Here each takes part in a multiply-add, two operations, for every query head of a group."""
        flops = self.flops(active_tokens, routing_reads)
        return (flops.attention + flops.routing) / (2 * self.shape.group_size)

    def summaries_scored(self, length: int) -> float:
        """Summaries, or windows, that a token scores on average in an unpacked row. Here, where there are blocks, those
        of as many keys as a block."""
        return 0.0 if self.config.blocks is None else (length + 1) / 2 / getattr(self.config, self.config.blocks)

    def kept_bytes(self, length: int, itemsize: int) -> float:
        """What the kernels keep of a token for the backward pass beside q, k, v and the output, in bytes, in an
        unpacked row of ``length`` tokens of a type of ``itemsize`` bytes: here a float32 number for each query head,
        and where there are blocks a bit for each of them and each KV head."""
        return 4 * self.shape.num_heads + 4 * self.shape.num_kv_heads * -(-self._num_blocks(length) // 32)

    def scratch_bytes(self, length: int, itemsize: int) -> float:
        """What the kernels take for a token in the backward pass beside gradients of their inputs, in bytes; arguments
        as ``kept_bytes``. Here the lists of the tokens that choose a block, which have room for all that may, and on
        Hopper, where this is largest, the sums of dq in float32."""
        shape = self.shape
        if self.config.blocks is None:
            return 0
        block_size = getattr(self.config, self.config.blocks)
        sums = sums_bytes(shape.num_heads, shape.num_kv_heads, shape.head_dim, block_size, itemsize)
        return 4 * shape.num_kv_heads * (self._num_blocks(length) + 1) / 2 + sums

    def _num_blocks(self, length: int) -> int:
        return 0 if self.config.blocks is None else -(-length // getattr(self.config, self.config.blocks))

    def metrics(self) -> dict[str, float]:
        """Scalars worth logging, such as the current alpha."""
        return {}


def check_model_shape(shape: AttentionShape, capabilities: Capabilities, name: str) -> None:
    """Refuses a model that the backend cannot serve."""
    checks.check_positive_int(**dataclasses.asdict(shape))
    check(
        shape.num_heads % shape.num_kv_heads == 0,
        f"num_heads must be a multiple of num_kv_heads; got {shape.num_heads} and {shape.num_kv_heads}",
    )
    check(
        shape.group_size <= capabilities.max_group_size,
        f"attention {name!r} serves up to {capabilities.max_group_size} query heads per KV head; "
        f"got {shape.group_size}: raise num_kv_heads",
    )
    check(
        shape.head_dim <= capabilities.max_head_dim and shape.head_dim % 2 == 0,
        f"attention {name!r} serves even head sizes up to {capabilities.max_head_dim}; got {shape.head_dim}",
    )
