"""Decoder-only transformer: RMSNorm, SwiGLU, RoPE, grouped-query attention through an attention backend.

Shape suffixes: B batch, T tokens, E hidden size, H query or KV heads, D head size, V vocabulary.
"""

import math
from collections.abc import Sequence
from types import MethodType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dashattn.backends import ALL_HEADS, AttentionBackend, AttentionConfig, AttentionShape, build_backends
from dashattn.cache import LayerCache
from dashattn.checks import check
from dashattn.documents import document_positions
from dashattn.rope import apply_rope
from dashattn.selection import Chosen
from dashattn.stats import AttentionStats
from models import one_token
from models.cache import ModelCache
from models.config import ModelConfig
from models.loss import IGNORE, chunk_loss, cross_entropy
from models.modules import RMSNorm, SwiGLU, scaled
from models.rope import no_rotation, rope_tables
from models.sequence_parallel import SequenceParallel


class ModelOutput(NamedTuple):
    """What ``Transformer.forward`` returns."""

    logits: Tensor | None  # [B, T, V], None when labels are given
    loss: Tensor | None  # float32 scalar, the mean over valid labels (0 when there is none)
    token_losses: Tensor | None  # float32 [B, T] in nats without gradient, 0 where the label is -100
    is_likeliest: Tensor | None  # bool [B, T], whether the label is; without labels, or where gradients are taken: None
    stats: list[AttentionStats] | None  # one a layer
    # Scalar, the sum of the losses that attention backends have of their own; None without labels or gradients, and
    # where there is none. No part of ``loss``.
    auxiliary_loss: Tensor | None = None


class Transformer(nn.Module):
    """Language model of the shape ``config``, its attention as ``attention`` and its ``layers`` say.

    Under one seed, parameters outside the backends get the same initial values whichever backend is chosen.
    Raises ValueError when the vocabulary is not set or the backend cannot be built for this shape.
    """

    chunk_loss = staticmethod(chunk_loss)  # of models.loss, or what it was compiled to

    def __init__(self, config: ModelConfig, attention: AttentionConfig):
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("model.vocab_size is null: set it to the vocabulary size of the data's tokenizer")
        self.config = config
        self.attention = attention
        self.checkpoint_activations = False  # keep each layer's input only, and run the layer again in the backward
        self.sequence: SequenceParallel | None = None
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(TransformerBlock(config, index) for index in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = None
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._init_parameters()
        # Backends draw their own initial values, so they come after all that is shared between them.
        shape = AttentionShape(config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim)
        backends = build_backends(attention, shape, config.num_layers)
        sources = {backend.source for backend in backends}
        for index, (layer, backend) in enumerate(zip(self.layers, backends, strict=True)):
            layer.attention.backend = backend
            layer.attention.hands_on = index in sources

    @torch.no_grad()
    def _init_parameters(self) -> None:
        """Normal(0, init_std), projections into the residual stream divided by sqrt(2 * num_layers)."""
        std = self.config.init_std
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.embedding_init_std or std)
            elif isinstance(module, nn.Linear):
                into_residual = name.endswith(("o_proj", "down_proj"))
                depth = math.sqrt(2 * self.config.num_layers) if into_residual else 1.0
                nn.init.normal_(module.weight, std=std / depth)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(
        self,
        input_ids_BT: Tensor,
        *,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        lengths: Tensor | None = None,
        return_stats: bool = False,
    ) -> ModelOutput:
        """Logits, or with ``labels`` the loss, for which only a chunk of the logits is held at a time.

        After ``share_sequences`` every process of the group must be given the same rows, whole. Logits and token
        losses are then those of its own tokens, and its loss is its share: the shares' sum is the mean. So is its
        auxiliary loss.

        Args:
            input_ids_BT: int64.
            labels: int64 [B, T], the target of each position (already shifted); -100 is ignored.
            position_ids: integer [T] or [B, T], position in the document; by default counted from ``cu_seqlens``.
            cu_seqlens: int32 [N + 1], boundaries of packed documents, with B = 1; None = every row is one document.
            max_seqlen: tokens of the longest of these, for dense attention to be faster; None = not known.
            lengths: integer [B], tokens of each row where rows are padded at their end with any token. What stands at a
                row's own tokens is then what it would be alone.
            return_stats: fill ``ModelOutput.stats``.
        """
        options = {"position_ids": position_ids, "cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen, "lengths": lengths}
        hidden_BTE, stats, auxiliary_loss = self.hidden_states(input_ids_BT, **options, return_stats=return_stats)
        head = self.embedding.weight if self.lm_head is None else self.lm_head.weight
        if labels is None:
            return ModelOutput(F.linear(hidden_BTE, head), None, None, None, stats)
        targets = (labels != IGNORE).sum()
        losses = cross_entropy(hidden_BTE, head, self._own(labels), targets, chunk_loss=self.chunk_loss)
        return ModelOutput(None, *losses, stats, auxiliary_loss)

    def hidden_states(
        self,
        input_ids_BT: Tensor,
        *,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        lengths: Tensor | None = None,
        return_stats: bool = False,
    ) -> tuple[Tensor, list[AttentionStats] | None, Tensor | None]:
        """What the output head reads, [B, T, E], the stats and the auxiliary loss. Arguments as in ``forward``, which
        adds the head: for what needs no logits, whose size is that of the vocabulary."""
        if cu_seqlens is not None and input_ids_BT.shape[0] != 1:
            raise ValueError(
                f"cu_seqlens needs a batch of one row, got {input_ids_BT.shape[0]}: flatten the documents into one row"
            )
        if position_ids is None:
            position_ids = document_positions(cu_seqlens, 1, input_ids_BT.shape[1], input_ids_BT.device)[0]
        rope = rope_tables(self.config, position_ids, cu_seqlens, lengths=lengths)
        hidden_BTE = scaled(self.embedding(self._own(input_ids_BT)), self.config.embedding_scale)
        stats, losses = [] if return_stats else None, []
        selections: dict[int | None, Chosen | None] = {}  # of layers from which others take them over
        for index, layer in enumerate(self.layers):
            taken = selections.get(layer.attention.backend.source)
            inputs = (hidden_BTE, rope, cu_seqlens, return_stats, None, taken, max_seqlen)
            if self.checkpoint_activations and torch.is_grad_enabled():
                # No layer draws random numbers.
                outputs = checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                outputs = layer(*inputs)
            hidden_BTE, layer_stats, layer_loss, selections[index] = outputs
            if return_stats:
                stats.append(layer_stats)
            if layer_loss is not None:
                losses.append(layer_loss)
        auxiliary_loss = torch.stack(losses).sum() if losses else None
        return scaled(self.norm(hidden_BTE), self.config.logit_scale), stats, auxiliary_loss

    def share_sequences(self, group: torch.distributed.ProcessGroup) -> None:
        """Let each process of ``group`` hold its part of every row; see models.sequence_parallel. For training.

        Raises:
            ValueError: the group's size does not divide the query heads.
        """
        self.sequence = SequenceParallel(group, self.config.num_heads, self.config.num_kv_heads)
        for layer in self.layers:
            layer.attention.sequence = self.sequence

    def _own(self, x_BT: Tensor) -> Tensor:
        """Of whole rows, what this process holds."""
        return x_BT if self.sequence is None else self.sequence.part(x_BT)

    def new_cache(self, batch: int, capacity: int) -> ModelCache:
        """An empty cache for ``batch`` sequences of up to ``capacity`` tokens, in the model's dtype, on its device."""
        assert self.sequence is None, "a cache holds whole sequences"
        layouts = [backend.cache_layout() for backend in self.backends]
        weight = self.embedding.weight
        return ModelCache(self.config, layouts, batch, capacity, dtype=weight.dtype, device=weight.device)

    @torch.no_grad()
    def decode(
        self,
        input_ids_BT: Tensor,
        cache: ModelCache,
        *,
        new_tokens: Sequence[int] | None = None,
        return_stats: bool = False,
    ) -> Tensor | tuple[Tensor, list[AttentionStats]]:
        """Logits [B, T, V] of new tokens behind the sequences of ``cache``; the same as ``forward``'s over the whole.

        Writes into the cache and leaves its lengths: ``cache.advance`` makes the tokens part of the sequences. Shapes
        do not depend on the lengths and nothing waits for the device, so that a step can be captured in a CUDA graph.

        Args:
            input_ids_BT: int64.
            new_tokens: how many tokens, 1 to T, each row has, where rows are padded at their end with any token. The
                result is then [B, 1, V], behind the last of them.
            return_stats: also return what each layer's attention read, where the cache is empty.

        Raises:
            ValueError: the cache has no room, or a sequence would outgrow its rotation; see ``ModelCache``.
        """
        num_tokens = input_ids_BT.shape[1]
        counts = [num_tokens] * len(input_ids_BT) if new_tokens is None else new_tokens
        check(
            len(counts) == len(input_ids_BT) and all(1 <= count <= num_tokens for count in counts),
            f"new_tokens must be a number from 1 to {num_tokens} for each of {len(input_ids_BT)} rows: {counts}",
        )
        cache.check_room(num_tokens)
        cache.check_rotation(num_tokens if new_tokens is None else new_tokens)
        counts_B = None
        if new_tokens is not None:
            counts_B = torch.tensor(list(new_tokens), dtype=torch.int32, device=input_ids_BT.device)
        rope = cache.rope(num_tokens, counts_B)
        hidden_BTE = scaled(self.embedding(input_ids_BT), self.config.embedding_scale)
        stats, selections = [], {}
        for index, (layer, layer_cache) in enumerate(zip(self.layers, cache.layers, strict=True)):
            taken = selections.get(layer.attention.backend.source)
            outputs = layer(hidden_BTE, rope, None, return_stats, layer_cache, taken)
            hidden_BTE, layer_stats, _, selections[index] = outputs
            stats.append(layer_stats)
        if counts_B is not None:
            hidden_BTE = hidden_BTE.take_along_dim(counts_B.long()[:, None, None] - 1, 1)
        head = self.embedding.weight if self.lm_head is None else self.lm_head.weight
        if not return_stats and one_token.takes(hidden_BTE):
            return one_token.logits(hidden_BTE, head, self.norm, self.config.logit_scale)
        logits_BTV = F.linear(scaled(self.norm(hidden_BTE), self.config.logit_scale), head)
        return (logits_BTV, stats) if return_stats else logits_BTV

    @property
    def backends(self) -> list[AttentionBackend]:
        return [layer.attention.backend for layer in self.layers]

    def compile_layers(self, **options) -> None:
        """Compile every layer (``torch.compile`` with ``options``), once for all batch sizes and lengths, and the loss.

        Of ``decode`` that is what stands around the attention, which itself stays as it is: it reads lengths on the
        host, for which the layer would be compiled again and again. So does what else a backend names ``uncompiled``.
        """
        for layer in self.layers:
            backend = layer.attention.backend
            for name in backend.uncompiled:
                setattr(backend, name, MethodType(torch.compiler.disable(getattr(type(backend), name)), backend))
            layer.compile(dynamic=True, **options)
        # Mostly all chunks are of one size; a second one makes the number of tokens a symbol, the vocabulary stays.
        self.chunk_loss = torch.compile(chunk_loss, **options)

    def __getstate__(self) -> dict:
        """Without the compiled loss, as nn.Module leaves out its own compiled call: it cannot be pickled."""
        state = super().__getstate__()
        state.pop("chunk_loss", None)
        return state

    def set_step(self, step: int) -> None:
        """Tell every backend the training step, for its schedules."""
        for backend in self.backends:
            backend.set_step(step)

    @property
    def turned(self) -> list[AttentionBackend]:
        """The backends that the sparsity knob turns: those of the chosen attention, not what ``layers`` puts between.
        Of an attention without a knob there are none."""
        chosen = self.attention
        return [b for b in self.backends if b.config.name == chosen.name and chosen.knob is not None]

    def set_knob(self, value) -> None:
        """Turn the sparsity knob. Raises ValueError where there is none or the value is impossible."""
        self.attention.with_knob(value)
        for backend in self.turned:
            backend.set_knob(value)


class TransformerBlock(nn.Module):
    """Attention and SwiGLU, each added to the residual stream after ``residual_scale``.

    The norm of each is before it, or after it and before the addition (``norm_position: post``, OLMo 2, arXiv
    2501.00656, section 2.1).
    """

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        self.residual_scale = config.residual_scale
        self.post_norm = config.norm_position == "post"
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config, index)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        x_BTE,
        rope,
        cu_seqlens,
        return_stats,
        cache: LayerCache | None = None,
        taken: Chosen | None = None,
        max_seqlen: int | None = None,
    ) -> tuple[Tensor, AttentionStats | None, Tensor | None, Chosen | None]:
        """The outputs beside the first are those of ``Attention``."""
        if cache is not None and not return_stats and one_token.takes(x_BTE):
            out_BTE, chosen = one_token.decode(self, x_BTE, rope, cache, taken)
            return out_BTE, None, None, chosen
        into_BTE = x_BTE if self.post_norm else self.attention_norm(x_BTE)
        out_BTE, stats, loss, chosen = self.attention(
            into_BTE, rope, cu_seqlens, return_stats, cache, taken, max_seqlen
        )
        if self.post_norm:
            out_BTE = self.attention_norm(out_BTE)
        x_BTE = torch.add(x_BTE, out_BTE, alpha=self.residual_scale)
        out_BTE = self.mlp_norm(self.mlp(x_BTE)) if self.post_norm else self.mlp(self.mlp_norm(x_BTE))
        return torch.add(x_BTE, out_BTE, alpha=self.residual_scale), stats, loss, chosen


class Attention(nn.Module):
    """Projections, optional QK-norm and RoPE around an attention backend, which ``Transformer`` sets.

    A layer without RoPE takes tables that turn nothing, so that a backend which rotates keys or summaries of its own
    does not turn those either.
    """

    backend: AttentionBackend
    hands_on: bool = False  # its selection, from which later layers take theirs
    sequence: SequenceParallel | None = None

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        self.head_dim = config.head_dim
        self.qk_norm = config.qk_norm
        self.turns = index not in config.no_rope_layers
        query_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)
        if self.qk_norm != "none":
            sizes = (query_size, kv_size) if self.qk_norm == "width" else (config.head_dim, config.head_dim)
            self.q_norm, self.k_norm = (RMSNorm(size, config.norm_eps) for size in sizes)

    def forward(
        self,
        x_BTE,
        rope,
        cu_seqlens,
        return_stats,
        cache: LayerCache | None = None,
        taken: Chosen | None = None,
        max_seqlen: int | None = None,
    ) -> tuple[Tensor, AttentionStats | None, Tensor | None, Chosen | None]:
        """The output, the stats, the backend's auxiliary loss, None without gradients, and what it ``hands_on``.

        ``taken``: what the layer has handed on from which this one takes its selection.
        """
        share = self.sequence or ALL_HEADS
        rope = rope if self.turns else no_rotation(rope)
        qkv = self.heads(*(layer(x_BTE) for layer in (self.q_proj, self.k_proj, self.v_proj)), rope, share)
        options, loss = self.options(x_BTE, rope, taken) | {"return_stats": return_stats}, None
        if cache is not None:
            out = self.backend.decode(*qkv, cache, **options)
        else:
            options |= {"cu_seqlens": cu_seqlens, "share": share}
            options |= {"max_seqlen": max_seqlen} if self.backend.takes_max_seqlen else {}
            if torch.is_grad_enabled():
                out, loss = self.backend.forward_with_loss(*qkv, **options)
            else:
                out = self.backend(*qkv, **options)
        out, chosen = out if self.hands_on else (out, None)
        out_BTHD, stats = out if return_stats else (out, None)
        if self.sequence is not None:
            out_BTHD = self.sequence.scatter(out_BTHD)
            stats = stats and self.sequence.all_heads(stats)
        return self.o_proj(out_BTHD.flatten(-2)), stats, loss, chosen

    def heads(self, q, k, v, rope, share) -> tuple[Tensor, Tensor, Tensor]:
        """What the backend is given, [B, T, H, D], of what the projections give."""
        if self.qk_norm == "width":  # here, where a process that shares the sequence has all heads of its tokens
            q, k = self.q_norm(q), self.k_norm(k)
        q_BTHD, k_BTHD, v_BTHD = (share.gather(x.unflatten(-1, (-1, self.head_dim))) for x in (q, k, v))
        if self.qk_norm == "head":
            q_BTHD, k_BTHD = self.q_norm(q_BTHD), self.k_norm(k_BTHD)
        return apply_rope(q_BTHD, *rope), apply_rope(k_BTHD, *rope), v_BTHD

    def options(self, hidden, rope, taken) -> dict:
        """What the backend is told beside them."""
        options = {"rope": rope, "hidden": hidden}
        options |= {"return_selection": True} if self.hands_on else {}
        return options | ({} if taken is None else {"taken": taken})
