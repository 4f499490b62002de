"""DashAttention (arXiv 2605.18753): chunks chosen by a learned, adaptively sparse router."""

import math
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dashattn import checks
from dashattn.backends.base import ALL_HEADS, AttentionBackend, Capabilities, HeadShare
from dashattn.backends.options import AttentionConfig, forced_keys
from dashattn.cache import CacheField, LayerCache
from dashattn.checks import check
from dashattn.fields import Line, NonNegativeInt, OneOf, PositiveFloat, PositiveInt, PositiveShare, Range
from dashattn.functional import dash_attention, unsupported_priors
from dashattn.ops.chunk_summary.reference import chunk_summary
from dashattn.ops.dash_routing.mass import cached_mass_bias
from dashattn.ops.dash_routing.reference import (
    NEGLIGIBLE_SIGMA,
    PRIOR_HEADS,
    PRIORS,
    candidate_chunks,
    choose_chunks,
)
from dashattn.ops.decode.reference import new_positions
from dashattn.ops.dtypes import upcast
from dashattn.ops.entmax.reference import MAX_ALPHA, MIN_ALPHA
from dashattn.rope import undo_rope
from dashattn.routing import Routing, positions_of
from dashattn.selection import Chosen, Selection

KNOBS = {"entmax": "router_scale", "topk": "topk", "topp": "top_p"}
ALPHA_MODES = ("fixed", "scheduled", "learnable")
SUMMARY_KEYS = ("rotated", "unrotated")
SUMMARY_ROPES = ("none", "mean")
Alpha = Annotated[float, Range(float, MIN_ALPHA, MAX_ALPHA, f"in [{MIN_ALPHA}, {MAX_ALPHA}]")]


@dataclass
class DashConfig(AttentionConfig):
    """Options of ``dash_attention`` and of alpha. The sparsity knob is the selector's.

    Attributes:
        alpha: entmax's alpha; of a schedule its last value, of a learnable alpha its first.
        alpha_mode: ``fixed``; ``scheduled``: linear from ``alpha_start`` to ``alpha`` over ``alpha_steps`` optimiser
            steps; ``learnable``: one per query head, a sigmoid between 1.01 and 2.
        init_chunks: first chunks of a sequence that every token reads: where a model that was dense keeps its
            attention sink.
        local_chunks: chunks before its own that a token always reads.
        summary_keys: ``rotated``, or ``unrotated``: the router scores the query before RoPE with the pooled keys before
            RoPE, so that content alone chooses. A row of tables per token is kept to decode. Channels that the tables
            turn by no angle (HoPE, partial RoPE) are content in both.
        summary_rope: ``none``, or ``mean``: the chunk query is rotated at every position of the chunk and averaged.
        learn_summary: false leaves the chunk queries at zero, and summaries mean-pooled keys; so does ``prior`` none,
            from which no gradient comes to them.
        prior: ``raw``, ``tempered``, ``none``: the logarithm of the router's probability as a bias of the logits, a
            part of it or nothing; ``mass``: the router's score in place of what a chunk's keys weigh together.
    """

    name: Line = "dash"
    chunk_size: PositiveInt = 64  # keys per chunk
    # entmax, topk, or topp: the fewest chunks whose softmax reaches top_p.
    selector: Annotated[str, OneOf(tuple(KNOBS))] = "entmax"
    alpha: Alpha = 1.5
    alpha_mode: Annotated[str, OneOf(ALPHA_MODES)] = "fixed"
    alpha_start: Alpha = 1.25  # of a schedule, its first value
    alpha_steps: NonNegativeInt = 0  # of a schedule, in optimiser steps
    router_scale: PositiveFloat = 1.0  # factor of the scores; larger = sparser, of topk and topp sharper
    topk: PositiveInt = 16  # of selector topk: chunks in all, forced ones included
    top_p: PositiveShare = 0.9  # of selector topp
    # Of the attention's logits, made of the router's probabilities.
    prior: Annotated[str, OneOf(PRIORS)] = "tempered"
    sigma: PositiveFloat = 1e6  # temperature of the tempered prior
    prior_heads: Annotated[str, OneOf(PRIOR_HEADS)] = "group"  # a prior for each group of heads, or for each query head
    init_chunks: NonNegativeInt = 0
    local_chunks: NonNegativeInt = 0
    summary_keys: Annotated[str, OneOf(SUMMARY_KEYS)] = "rotated"
    summary_rope: Annotated[str, OneOf(SUMMARY_ROPES)] = "none"
    learn_summary: bool = True

    blocks: ClassVar[str | None] = "chunk_size"

    @property
    def knob(self) -> str | None:
        return KNOBS.get(self.selector)

    @classmethod
    def variants(cls, block_size):
        """With the attention sink always read, too, the other selectors, and HiLS and MoBA."""
        sink = cls(chunk_size=block_size, init_chunks=1)
        controls = {f"dash_{name}": cls(chunk_size=block_size, selector=name, prior="raw") for name in ("topk", "topp")}
        topk = controls["dash_topk"]
        others = {
            "hils": replace(topk, prior="mass", local_chunks=1),
            "moba": replace(topk, prior="none", learn_summary=False),
        }
        return {"dash": cls(chunk_size=block_size), "dash_sink": sink} | controls | others

    @classmethod
    def samples(cls):
        priors = ("tempered", "raw")
        samples = {f"dash, {prior}": cls(chunk_size=32, router_scale=4.0, prior=prior) for prior in priors}
        sink = cls(chunk_size=32, router_scale=4.0, prior="raw", init_chunks=1, local_chunks=1)
        controls = {f"dash, {name}": replace(sink, selector=name, topk=8, top_p=0.7) for name in ("topk", "topp")}
        return samples | {"dash, sink": sink, "hils": replace(sink, selector="topk", topk=8, prior="mass")} | controls

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.check_dash(
            *(self.chunk_size, self.selector, self.router_scale, self.topk, self.top_p),
            *(self.prior, self.sigma, self.prior_heads, self.init_chunks, self.local_chunks),
        )
        check(
            self.summary_keys == "rotated" or self.summary_rope == "none",
            "summary_rope=mean rotates the chunk query for rotated keys: set summary_rope=none or summary_keys=rotated",
        )
        check(
            self.selector == "entmax" or self.alpha_mode == "fixed",
            f"alpha_mode={self.alpha_mode} moves entmax's alpha, which selector={self.selector} does not have: set "
            "alpha_mode=fixed",
        )
        if self.alpha_mode == "scheduled":
            check(
                self.alpha_steps > 0,
                f"alpha_mode=scheduled needs alpha_steps > 0 (from alpha_start to alpha); got {self.alpha_steps}",
            )
        if self.alpha_mode == "learnable":
            check(self.prior != "none", "alpha_mode=learnable learns through the prior: set prior=raw or tempered")
            check(
                MIN_ALPHA < self.alpha < MAX_ALPHA,
                f"alpha_mode=learnable starts strictly between 1.01 and 2, where its sigmoid ends; got {self.alpha}",
            )

    def check_rows(self, length):
        super().check_rows(length)
        forced = self.init_chunks + self.local_chunks
        check(
            not forced or (forced + 1) * self.chunk_size < length,
            f"attention.init_chunks={self.init_chunks} and attention.local_chunks={self.local_chunks} leave nothing to "
            f"select in rows of {length} tokens: force fewer chunks, lower attention.chunk_size or take longer rows "
            "(data.seq_len)",
        )

    def knob_span(self, length):
        return (1.0, 1e-5) if self.selector == "topp" else super().knob_span(length)

    def least_active(self, length):
        """The forced chunks, the token's own one, and one that the router chooses, unless k can leave it none."""
        return self._active(length, chosen=0 if self.selector == "topk" else 1)

    def sparsest_active(self, length, group):
        """With entmax each query head chooses for itself, and its group reads what any of them has chosen."""
        return self._active(length, chosen=group) if self.selector == "entmax" else self.least_active(length)

    def _active(self, length: int, chosen: int) -> Tensor:
        return forced_keys(length, self.chunk_size, self.init_chunks, self.local_chunks + 1 + chosen)


class DashBackend(AttentionBackend):
    """Owns the chunk queries (zero: summaries start as mean-pooled keys) and, if learnable, alpha."""

    capabilities = Capabilities(hands_on=True)

    def __init__(self, config: DashConfig, shape):
        super().__init__(config, shape)
        if config.prior == "mass":
            what = "the router and the sums of every chunk's exponentials, and all of decoding"
            self.capabilities = replace(self.capabilities, hands_on=False, in_pytorch=what)
            self.uncompiled = ("decode", "forward", "forward_with_loss")
        queries = torch.zeros(shape.num_kv_heads, shape.head_dim)
        learns = config.learn_summary and config.prior != "none"  # no gradient comes to a choice without a prior
        self.chunk_query = nn.Parameter(queries, requires_grad=learns)
        self.alpha_logit = None
        if config.alpha_mode == "learnable":
            share = (config.alpha - MIN_ALPHA) / (MAX_ALPHA - MIN_ALPHA)
            logit = math.log(share) - math.log(1 - share)
            self.alpha_logit = nn.Parameter(torch.full((shape.num_heads,), logit))
        self.set_knob(getattr(config, config.knob))
        self.set_step(0)

    def set_knob(self, value):
        super().set_knob(value)
        config = self.config
        self.numbers = {name: getattr(config, name) for name in KNOBS.values()}
        self.knobs = dict(self.numbers)  # as training takes them
        if config.holds_sparsity:
            # A tensor: for a number torch.compile would compile anew at each value. On the host, where kernels are
            # given it, so that nothing waits for the device.
            self.knobs[config.knob] = torch.tensor(value, dtype=torch.float64, device="cpu")

    def set_step(self, step: int) -> None:
        config = self.config
        self.scheduled_alpha = config.alpha
        if config.alpha_mode == "scheduled" and step < config.alpha_steps:
            alpha = config.alpha_start + (config.alpha - config.alpha_start) * step / config.alpha_steps
            # A tensor: for a number torch.compile would compile anew at each step.
            self.scheduled_alpha = torch.full((), alpha, dtype=torch.float64, device=self.chunk_query.device)

    def alpha(self, share: HeadShare = ALL_HEADS) -> float | Tensor:
        """The current alpha: a float, [] while a schedule moves it, [Hq] when it is learned."""
        if self.alpha_logit is None:
            alpha = self.scheduled_alpha
            return alpha.to(self.chunk_query.device) if isinstance(alpha, Tensor) else alpha
        return MIN_ALPHA + (MAX_ALPHA - MIN_ALPHA) * upcast(self.alpha_logit[share.query_heads]).sigmoid()

    def flops(self, active_tokens, routing_reads):
        flops = super().flops(active_tokens, routing_reads)
        return flops if self.config.prior != "none" else replace(flops, backward=2 * flops.attention)

    def kept_bytes(self, length, itemsize):
        """Of each query head its highest score and its threshold, too, and of each chunk its summary. With prior=mass,
        in PyTorch, instead: of each query head and chunk three numbers of float32, their masks, and q in float32."""
        if self.config.prior == "mass":
            heads, kv_heads, dim = self.shape.num_heads, self.shape.num_kv_heads, self.shape.head_dim
            each_chunk = 12 * heads + 2 * kv_heads + 1
            whole = 4 * heads * dim + 4 * kv_heads * dim / self.config.chunk_size
            return super().kept_bytes(length, itemsize) + each_chunk * self._num_blocks(length) + whole
        summary = self.shape.num_kv_heads * self.shape.head_dim * itemsize / self.config.chunk_size
        return super().kept_bytes(length, itemsize) + 8 * self.shape.num_heads + summary

    def scratch_bytes(self, length, itemsize):
        """The gradient of the prior's logarithm, too, for every chunk, and itself where it is a bias."""
        config = self.config
        if config.prior == "mass":
            return super().scratch_bytes(length, itemsize) + 8 * self.shape.num_heads * self._num_blocks(length)
        priors = 0 if config.prior == "none" else 1 + (config.prior == "raw" or config.sigma < NEGLIGIBLE_SIGMA)
        lists = super().scratch_bytes(length, itemsize)
        return lists + 4 * priors * self.shape.num_kv_heads * self._num_blocks(length)

    def metrics(self) -> dict[str, float]:
        if self.config.selector != "entmax":
            return {}
        alpha = self.alpha()
        return {"alpha": alpha.mean().item() if isinstance(alpha, Tensor) else alpha}

    def route(self, q, k, v, *, hidden=None, rope=None, positions=None):
        config, num_chunks = self.config, self._num_blocks(q.shape[1])
        q, k = self._router_qk(q, k, rope) or (q, k)
        rope = self._summary_rope(rope)
        summaries = chunk_summary(k, self.chunk_query, chunk_size=config.chunk_size, rope=rope)
        positions = positions_of(q, positions)
        q, own_chunk = q[:, positions], positions // config.chunk_size
        forced = {"init_chunks": config.init_chunks, "local_chunks": config.local_chunks}
        options = {"selector": config.selector, "alpha": self.alpha(), **self.numbers, **forced}
        mask, scores, log_p, _ = choose_chunks(q, summaries, own_chunk[None], num_chunks, **options)
        candidates_PN = candidate_chunks(own_chunk, num_chunks, **forced)
        scores, log_p = (F.pad(x, (0, num_chunks - summaries.shape[1])) for x in (scores, log_p))
        p_BPHN = log_p.exp().masked_fill(~candidates_PN, 0).mean(2).transpose(1, 2)
        logits = scores.masked_fill(~candidates_PN, -torch.inf).flatten(1, 2).transpose(1, 2)
        return Routing(Selection.from_mask(mask, config.chunk_size), p_BPHN, logits)

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
        return dash_attention(
            q,
            k,
            v,
            self.chunk_query[share.kv_heads],
            **self._routing_options(self.alpha(share), self.knobs),
            prior_heads=config.prior_heads,
            router_qk=self._router_qk(q, k, rope),
            summary_rope=self._summary_rope(rope),
            cu_seqlens=cu_seqlens,
            impl=config.impl,
            return_stats=return_stats,
            return_selection=return_selection,
        )

    def _routing_options(self, alpha: float | Tensor, knobs: dict[str, float | Tensor]) -> dict:
        """What prefill and decoding, kernels and references take alike."""
        names = ("chunk_size", "selector", "prior", "sigma", "init_chunks", "local_chunks")
        return {name: getattr(self.config, name) for name in names} | {"alpha": alpha} | knobs

    @property
    def _needs_tables(self) -> bool:
        return self.config.summary_rope == "mean" or self.config.summary_keys == "unrotated"

    def _tables(self, rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        names = "summary_rope=mean and summary_keys=unrotated"
        check(rope is not None, f"{names} need the rotary tables: pass rope=(cos, sin)")
        return rope

    def _summary_rope(self, rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
        return self._tables(rope) if self.config.summary_rope == "mean" else None

    def _router_qk(self, q: Tensor, k: Tensor, rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
        """What the router takes for q and k, if others."""
        if self.config.summary_keys == "rotated":
            return None
        return undo_rope(q, *self._tables(rope)), undo_rope(k, *rope)

    def decodes_statically(self, cache):
        # In PyTorch the search for entmax's threshold looks whether it has ended.
        return self.config.selector != "entmax" or self._decode_kernels(cache["k"]) is not None

    @property
    def block_size(self):
        return self.config.chunk_size

    def cache_layout(self):
        config, shape = self.config, self.shape
        fields = {"summaries": CacheField(shape.num_kv_heads, shape.head_dim, tokens_per_row=config.chunk_size)}
        if self._needs_tables:
            # Every token of a chunk is turned when the chunk's last one comes, in a later step.
            fields |= dict.fromkeys(("cos", "sin"), CacheField(1, shape.head_dim, table=True))
        return self._layout(**fields)

    def _write(self, k, v, cache, hidden, rope):
        # A chunk's summary is made once, when its last token comes: before, no query may choose the chunk.
        size, sources = self.config.chunk_size, ["k"]
        if not self._needs_tables:
            pooled = dict(pooled=cache["summaries"], window=(size, size), chunk_query=self.chunk_query)
            if self._append(k, v, cache, **pooled):
                return
        else:
            rope = self._tables(rope)
            self._append(k, v, cache)
            cache.write(cos=rope[0][:, :, None], sin=rope[1][:, :, None])
            sources += ["cos", "sin"]
        kernels = self._decode_kernels(k)
        pool = chunk_summary if kernels is None else kernels.chunk_summary

        def summarise(keys, *tables):
            rope = tuple(table.squeeze(2) for table in tables) or None
            if self.config.summary_keys == "unrotated":
                keys, rope = undo_rope(keys, *rope), None
            return (pool(keys, self.chunk_query, chunk_size=size, rope=rope),)

        cache.write_windows(k.shape[1], size, size, summarise, sources, ["summaries"])

    def _step(self, q, k, v, cache, hidden, rope):
        kernels = self._decode_kernels(q)
        if kernels is None or q.shape[1] > 1 or self._needs_tables:
            return super()._step(q, k, v, cache, hidden, rope)
        # The router's first kernel writes the token beside its products, which saves a launch: what it reads cannot
        # depend on that token, since a summary is visible from the token after its chunk on.
        new = kernels.NewToken(k, v, cache["k"], cache["v"], self.chunk_query)
        return self._attend(q, cache, hidden, kernels, new)

    def _attend(self, q, cache, hidden, operations, new=None):
        """``new``: the token, where it is not written yet."""
        if not hasattr(operations, "routed_attention"):
            return super()._attend(q, cache, hidden, operations)
        # The kernels route and attend in one.
        options = self._routing_options(self.alpha(), self.numbers)
        caches = cache["k"], cache["v"], cache["summaries"]
        router_q = self._cached_router_q(q, cache)
        return operations.routed_attention(q, *caches, cache.lengths, **options, new=new, router_q=router_q)

    def _select(self, q, cache, hidden, operations):
        options = self._routing_options(self.alpha(), self.numbers) | {"prior_heads": self.config.prior_heads}
        router_q = self._cached_router_q(q, cache)
        selection, bias = operations.cached_dash_routing(router_q, cache["summaries"], cache.lengths, **options)
        if self.config.prior == "mass":
            forced = {name: options[name] for name in ("init_chunks", "local_chunks")}
            positions = new_positions(cache.lengths, q.shape[1])
            bias = cached_mass_bias(q, cache["k"], positions, bias, selection, **forced)
        return Chosen(selection.words, bias)

    def _cached_router_q(self, q: Tensor, cache: LayerCache) -> Tensor:
        """What the router takes for the q of new tokens."""
        if self.config.summary_keys == "rotated":
            return q
        row = torch.arange(q.shape[0], device=q.device)[:, None]
        position = new_positions(cache.lengths, q.shape[1])
        return undo_rope(q, *(cache[name][row, position, 0] for name in ("cos", "sin")))

    def _decode_kernels(self, x, unsupported=None):
        unsupported = unsupported_priors(self.config.prior_heads)
        if self.config.prior == "mass":
            unsupported = "the kernels decode without prior='mass'"
        return super()._decode_kernels(x, unsupported)
