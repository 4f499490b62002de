"""The learned indexer: blocks chosen by index queries and keys of the backend's own."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from dashattn import checks
from dashattn.backends.base import ALL_HEADS, AttentionBackend, AttentionFlops, Capabilities, HeadShare
from dashattn.backends.options import AttentionConfig, forced_keys
from dashattn.cache import CacheField
from dashattn.checks import check
from dashattn.fields import Line, NonNegativeInt, OneOf, PositiveFloat, PositiveInt, PositiveShare
from dashattn.indexer import index_choice, indexer_attention
from dashattn.ops.compression.reference import mean_compress
from dashattn.ops.decode.reference import new_positions
from dashattn.ops.indexer.reference import Index, block_scores
from dashattn.routing import Routing, positions_of
from dashattn.selection import Chosen, Selection

KNOBS = {"topk": "topk", "topp": "top_p"}


@dataclass
class IndexerConfig(AttentionConfig):
    """Options of ``indexer_attention``, and of how the index learns. The sparsity knob is the selector's.

    Attributes:
        index_size: channels of an index query and of an index key.
        gradient: ``kl``: an auxiliary loss, the KL divergence of the index from the attention's block masses; it
            reaches the index alone, which takes the block's input detached. ``prior``: the model's loss, through a bias
            of the logits, in evaluation too.
        kl_weight: of the auxiliary loss, which is a sum over layers.
        warmup_steps: optimiser steps, from the first one on, in which training attends to everything, and the index
            learns from the masses of all blocks. An evaluation is sparse from the beginning. For ``gradient=kl``.
    """

    name: Line = "indexer"
    block_size: PositiveInt = 64  # keys per block
    index_size: PositiveInt = 64
    # Score of a block: of its best token, or of the mean of its index keys.
    index_pooling: Annotated[str, OneOf(checks.INDEX_POOLINGS)] = "max"
    # topk, or topp: the fewest blocks whose softmax reaches top_p.
    selector: Annotated[str, OneOf(tuple(KNOBS))] = "topk"
    topk: PositiveInt = 16  # blocks in all, forced ones included
    top_p: PositiveShare = 0.9  # of selector topp
    init_blocks: NonNegativeInt = 1  # first blocks, always read
    local_blocks: NonNegativeInt = 1  # blocks before a token's own, always read
    gradient: Annotated[str, OneOf(checks.INDEX_GRADIENTS)] = "kl"
    kl_weight: PositiveFloat = 1.0
    warmup_steps: NonNegativeInt = 0

    blocks: ClassVar[str | None] = "block_size"

    @property
    def knob(self) -> str | None:
        return KNOBS.get(self.selector)

    @classmethod
    def samples(cls):
        config = cls(block_size=32, topk=8)
        return {"indexer": config, "indexer, prior": cls(block_size=32, topk=8, gradient="prior")}

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.check_indexer(**self.sizes)
        check(
            self.gradient == "kl" or self.warmup_steps == 0,
            f"warmup_steps={self.warmup_steps} is of gradient=kl, whose masses need attention to everything: set "
            "warmup_steps=0",
        )

    @property
    def sizes(self) -> dict:
        """As ``indexer_attention`` takes them."""
        names = ("block_size", "index_pooling", "selector", "topk", "top_p", "init_blocks", "local_blocks", "gradient")
        return {name: getattr(self, name) for name in names}

    def knob_span(self, length):
        return (1.0, 1e-5) if self.selector == "topp" else super().knob_span(length)

    def least_active(self, length):
        """The forced blocks, and one that the index chooses, unless k can leave it none."""
        chosen = 0 if self.selector == "topk" else 1
        return forced_keys(length, self.block_size, self.init_blocks, self.local_blocks + 1 + chosen)

    def is_dense_at(self, step):
        return step < self.warmup_steps


class IndexerBackend(AttentionBackend):
    """Owns the projections of the block's input to an index query for each KV head, and to the index key that they
    share. They are not rotated: content alone chooses."""

    capabilities = Capabilities(
        hands_on=True,
        in_pytorch="index scores of KL, of index_pooling=max unless they only select the top k, and of decoding",
    )
    uncompiled = ("decode", "forward", "forward_with_loss")

    def __init__(self, config: IndexerConfig, shape):
        super().__init__(config, shape)
        self.index_query = nn.Linear(shape.hidden_size, shape.num_kv_heads * config.index_size, bias=False)
        self.index_key = nn.Linear(shape.hidden_size, config.index_size, bias=False)
        for projection in (self.index_query, self.index_key):
            nn.init.normal_(projection.weight, std=0.02)
        self.is_dense = False

    def set_step(self, step):
        self.is_dense = self.config.is_dense_at(step)

    def forward(self, q, k, v, **options):
        return self._attend_whole(q, k, v, **options)[0]

    def forward_with_loss(self, q, k, v, **options):
        result, kl = self._attend_whole(q, k, v, **options, return_kl=self.config.gradient == "kl")
        return result, None if kl is None else self.config.kl_weight * kl

    def _attend_whole(
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
        return_kl=False,
    ):
        config = self.config
        options = {"dense": self.training and self.is_dense, "impl": config.impl, "cu_seqlens": cu_seqlens}
        options |= {"return_stats": return_stats, "return_kl": return_kl, "head_weights": share.kv_weights}
        found = indexer_attention(q, k, v, *self._index(hidden, share), **config.sizes, **options)
        result = (found.out, found.stats) if return_stats else found.out
        return (result, found.chosen) if return_selection else result, found.kl

    def _index(self, hidden: Tensor | None, share: HeadShare = ALL_HEADS) -> tuple[Tensor, Tensor]:
        """Index queries [B, T, Hkv, I] and keys [B, T, I]."""
        check(hidden is not None, "attention=indexer makes its index of hidden: pass hidden")
        if self.config.gradient == "kl":
            hidden = hidden.detach()
        size = self.config.index_size
        queries = self.index_query(hidden).unflatten(-1, (-1, size))
        keys = self.index_key(hidden)[:, :, None].expand_as(queries)  # a share is of heads: each gets the key
        return share.gather(queries), share.gather(keys)[:, :, 0]

    def route(self, q, k, v, *, hidden=None, rope=None, positions=None):
        config, choice = self.config, index_choice(**self._choice)
        index_q, index_k = self._index(hidden)
        index = Index.make(index_q, index_k, config.block_size, config.index_pooling, None)
        positions = positions_of(q, positions)
        own_BP = index.own[:, positions]
        scores_BPHN = block_scores(index_q[:, positions], index.keys, index.num_blocks)
        mask, _, log_p = choice(scores_BPHN, own_BP)
        candidates = choice.candidates(own_BP, index.num_blocks)
        logits = scores_BPHN.masked_fill(~candidates, -torch.inf).repeat_interleave(self.shape.group_size, dim=2)
        selection = Selection.from_mask(mask, config.block_size)
        return Routing(selection, log_p.exp().masked_fill(~candidates, 0), logits)

    @property
    def _choice(self) -> dict:
        names = ("selector", "topk", "top_p", "init_blocks", "local_blocks")
        return {name: getattr(self.config, name) for name in names}

    @property
    def block_size(self):
        return self.config.block_size

    def cache_layout(self):
        config = self.config
        fields = {"index_k": CacheField(1, config.index_size)}
        if config.index_pooling == "mean":
            fields["index_means"] = CacheField(1, config.index_size, tokens_per_row=config.block_size)
        return self._layout(**fields)

    def _write(self, k, v, cache, hidden, rope):
        size = self.config.block_size
        self._append(k, v, cache)
        cache.write(index_k=self._index(hidden)[1][:, :, None])
        if self.config.index_pooling == "mean":
            pool = partial(mean_compress, kernel_size=size, kernel_stride=size)
            cache.write_windows(k.shape[1], size, size, lambda keys: (pool(keys),), ["index_k"], ["index_means"])

    def _select(self, q, cache, hidden, operations):
        config, choice = self.config, index_choice(**self._choice)
        if config.index_pooling == "mean":
            keys = cache["index_means"]
        else:
            keys = cache["index_k"].squeeze(2).unflatten(1, (-1, config.block_size))
        own = new_positions(cache.lengths, q.shape[1]) // config.block_size
        mask, chosen, log_p = choice(block_scores(self._index(hidden)[0], keys, keys.shape[1]), own)
        bias = log_p.masked_fill(~chosen, 0) if config.gradient == "prior" else None
        return Chosen(Selection.from_mask(mask, config.block_size).words, bias)

    def numbers_read(self, active_tokens, routing_reads):
        """An index key is fetched once for all heads."""
        keys_and_values = 2 * self.shape.num_kv_heads * self.shape.head_dim * active_tokens
        return keys_and_values + self.config.index_size * routing_reads

    def kept_bytes(self, length, itemsize):
        """Index queries and keys, too, and the scores of all blocks with their probabilities, in float32."""
        index = (self.shape.num_kv_heads + 1) * self.config.index_size * itemsize
        scores = 4 * self.shape.num_kv_heads * self._num_blocks(length)
        return super().kept_bytes(length, itemsize) + index + 2 * scores

    def flops(self, active_tokens, routing_reads):
        config, shape = self.config, self.shape
        attention = 4 * shape.num_heads * shape.head_dim * active_tokens
        routing = 2 * shape.num_kv_heads * config.index_size * routing_reads
        projections = 2 * sum(p.numel() for p in self.parameters())
        # KL's gradient ends at the projections, whose input is detached.
        into_input = projections if config.gradient == "prior" else 0
        return AttentionFlops(
            attention, routing, projections, backward=2 * (attention + routing) + projections + into_input
        )
