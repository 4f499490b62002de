"""The learned indexer's router (MSA, arXiv 2606.13392; SeerAttention, arXiv 2410.13276): small index queries, one to a
KV head, score the blocks of keys by index keys that all heads share.

Products of index queries and keys are as many as those of attention itself where a token's keys are not pooled: they
are held for a tile of queries at a time, and made again in the backward pass.

Shapes: B batch, T tokens, t tokens of a tile, H KV heads, I index size, C block size, J complete blocks of all
documents, l keys of a block that are scored (C, or 1 where they are pooled first), N blocks of a document.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dashattn.documents import document_positions
from dashattn.ops.compression.reference import compress_windows, mean_compress, visible_windows
from dashattn.ops.dash_routing.reference import candidate_chunks, chunk_probabilities
from dashattn.ops.dtypes import upcast
from dashattn.selection import Selection

POOLINGS = ("max", "mean")
TILE_PRODUCTS = 2**26  # of index queries and keys, in float32


@dataclass(frozen=True)
class Choice:
    """Which of its candidates, the complete past blocks that are not forced, a token reads.

    Attributes:
        selector: ``topk``, the ``wanted`` ones of the largest scores; ``topp``, the fewest whose softmax over the
            candidates reaches ``wanted``. Ties go to the lower index.
        init_blocks: first blocks, forced.
        local_blocks: blocks before the token's own, forced as that is.
    """

    selector: str
    wanted: float
    init_blocks: int
    local_blocks: int

    def candidates(self, own: Tensor, num_blocks: int) -> Tensor:
        """Bool [B, t, 1, N] for tokens whose own blocks are ``own`` [B, t]."""
        return candidate_chunks(own, num_blocks, self.init_blocks, self.local_blocks)[:, :, None]

    def __call__(self, scores: Tensor, own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From scores [B, t, H, N]: the mask of all that is read, that of the candidates among it, and the log softmax
        of the scores over the candidates, of no meaning where there is none; each like ``scores``."""
        candidates = self.candidates(own, scores.shape[-1])
        log_p, chosen = chunk_probabilities(
            scores.transpose(1, 2)[:, :, None],
            candidates.transpose(1, 2)[:, :, None],
            selector=self.selector,
            wanted=self.wanted,
        )
        log_p, chosen = (x.squeeze(2).transpose(1, 2) for x in (log_p, chosen))
        visible = (torch.arange(scores.shape[-1], device=own.device) <= own[..., None])[:, :, None]
        return chosen | (visible & ~candidates), chosen, log_p


def block_keys(index_k: Tensor, block_size: int, pooling: str, cu_seqlens: Tensor | None = None) -> Tensor:
    """What index queries are multiplied with, [B, J, l, I], of index keys [B, T, I]; ``J = T // block_size``, and with
    ``cu_seqlens`` those past the documents' last complete block are 0."""
    windows = {"kernel_size": block_size, "kernel_stride": block_size, "cu_seqlens": cu_seqlens}
    keys_BT1I = index_k[:, :, None]
    if pooling == "mean":
        return mean_compress(keys_BT1I, **windows)
    return compress_windows(lambda keys_BJlHI: keys_BJlHI.transpose(2, 3), keys_BT1I, **windows).squeeze(2)


def block_scores(index_q: Tensor, keys: Tensor, num_blocks: int, first: Tensor | None = None) -> Tensor:
    """``max_l q . k_l / sqrt(I)`` of each block, [B, t, H, N] in float32 or float64.

    Args:
        index_q: [B, t, H, I].
        keys: [B, J, l, I] from ``block_keys``.
        num_blocks: N; blocks that there are no keys for get 0.
        first: integers [B, t], the block that each query's document begins with; None: all begin with block 0.
    """
    count, size = keys.shape[1], index_q.shape[-1]
    if count == 0:
        return upcast(index_q).new_zeros(*index_q.shape[:3], num_blocks)
    products = torch.einsum("bthi,bjli->bthjl", upcast(index_q), upcast(keys)) * size**-0.5
    scores = products.amax(-1)
    if first is None:
        return F.pad(scores, (0, num_blocks - count))
    block = (first[..., None] + torch.arange(num_blocks, device=first.device)).clamp(max=count - 1)
    return scores.gather(-1, block[:, :, None].expand(-1, -1, scores.shape[2], -1))


@dataclass(frozen=True)
class Index:
    """Index queries and keys of whole sequences; ``scores`` of a tile.

    Attributes:
        q: [B, T, H, I].
        keys: [B, J, l, I] from ``block_keys``.
        own: int32 [B, T], the block of each token within its document.
        first: int [B, T], as in ``block_scores``.
        block_size: C.
    """

    q: Tensor
    keys: Tensor
    own: Tensor
    first: Tensor | None
    block_size: int

    @classmethod
    def make(cls, q: Tensor, k: Tensor, block_size: int, pooling: str, cu_seqlens: Tensor | None) -> "Index":
        """``q`` [B, T, H, I] and ``k`` [B, T, I]. Nothing waits for the device."""
        batch, length = q.shape[:2]
        own = document_positions(cu_seqlens, batch, length, q.device) // block_size
        first = None
        if cu_seqlens is not None:
            complete = visible_windows(cu_seqlens.diff() - 1, block_size, block_size)
            document = torch.searchsorted(cu_seqlens, torch.arange(length, device=q.device), right=True) - 1
            first = (complete.cumsum(0) - complete)[document][None]
        return cls(q, block_keys(k, block_size, pooling, cu_seqlens), own, first, block_size)

    @property
    def num_blocks(self) -> int:
        """N."""
        return -(-self.q.shape[1] // self.block_size)

    def tiles(self) -> Iterator[tuple[slice, int]]:
        """Queries in turns, and how many blocks of all documents may lie in their past."""
        batch, length, heads, _ = self.q.shape
        size = max(1, TILE_PRODUCTS // max(1, batch * heads * self.keys.shape[1] * self.keys.shape[2]))
        for start in range(0, length, size):
            stop = min(start + size, length)
            yield slice(start, stop), stop // self.block_size

    def scores(self, tile: slice, q: Tensor, keys: Tensor) -> Tensor:
        """Of the queries of a tile, ``q`` of these, over the first ``keys``: [B, t, H, N]."""
        first = None if self.first is None else self.first[:, tile]
        return block_scores(q, keys, self.num_blocks, first)


def index_routing(index: Index, choice: Choice, *, prior: bool) -> tuple[Selection, Tensor | None]:
    """The blocks that every token reads, and with ``prior`` their bias, float32 or float64 [B, T, H, N].

    The bias is the logarithm of a candidate's softmax probability (SAS, arXiv 2609.13141), differentiable by index
    queries and keys; 0 of forced blocks, and where nothing is selected.
    """
    words, biases = [], []

    def route(q, keys, tile):
        mask, chosen, log_p = choice(index.scores(tile, q, keys), index.own[:, tile])
        selected = Selection.from_mask(mask, index.block_size).words
        return selected, log_p.masked_fill(~chosen, 0) if prior else None

    for tile, count in index.tiles():
        inputs = (index.q[:, tile], index.keys[:, :count], tile)
        if prior and torch.is_grad_enabled():
            selected, bias = checkpoint(route, *inputs, use_reentrant=False, preserve_rng_state=False)
        else:
            with torch.no_grad():
                selected, bias = route(*inputs)
        words.append(selected)
        biases.append(bias)
    selection = Selection(torch.cat(words, dim=2), index.block_size)
    return selection, torch.cat(biases, dim=1) if prior else None


def index_kl(index: Index, choice: Choice, masses: Tensor, selection: Selection | None, head_weights: Tensor) -> Tensor:
    """KL divergence of the index from the attention: its sum over heads, each by its weight, on average over tokens.

    Of a token and KV head it is ``sum_c m_c log(m_c / u_c)`` over the candidates c that are selected: m their attention
    masses over the sum of these, u the softmax of their scores. Its gradient by a score is ``u_c - m_c``. Where nothing
    is a candidate, or none of them has any mass, it is 0.

    Args:
        choice: whose candidates are meant.
        masses: [B, T, H, N], not negative; no gradient passes to them.
        selection: the blocks that were read; None: all of the past.
        head_weights: [H].

    Returns:
        Float32 or float64 [], differentiable by index queries and keys.
    """
    return _IndexKL.apply(index.q, index.keys, index, choice, masses.detach(), selection, head_weights)


def _tile_kl(scores: Tensor, masses: Tensor, chosen: Tensor) -> Tensor:
    """Of every token and head [B, t, H], all of them [B, t, H, N]."""
    m = masses.masked_fill(~chosen, 0)
    m = m / m.sum(-1, keepdim=True).clamp_min(torch.finfo(m.dtype).tiny)
    log_u = scores.masked_fill(~chosen, torch.finfo(scores.dtype).min).log_softmax(-1)
    return (torch.xlogy(m, m) - m * log_u.masked_fill(~chosen, 0)).sum(-1)


class _IndexKL(torch.autograd.Function):
    """The gradient of a tile is taken while its products exist: nothing of the size of the scores is kept."""

    @staticmethod
    def forward(ctx, q, keys, index, choice, masses, selection, head_weights):
        q, keys = upcast(q), upcast(keys)
        total, grad_q, grad_keys = q.new_zeros(()), torch.zeros_like(q), torch.zeros_like(keys)
        tokens = q.shape[0] * q.shape[1]
        for tile, count in index.tiles():
            own = index.own[:, tile]
            chosen = choice.candidates(own, index.num_blocks)
            if selection is not None:
                words = Selection(selection.words[:, :, tile], selection.block_size)
                chosen = chosen & words.mask()[..., : index.num_blocks]
            with torch.enable_grad():
                leaves = [x.detach().requires_grad_() for x in (q[:, tile], keys[:, :count])]
                kl = _tile_kl(index.scores(tile, *leaves), masses[:, tile].to(q.dtype), chosen)
                kl = (kl * head_weights.to(kl)).sum() / tokens
            total += kl.detach()
            if count:
                grad_q[:, tile], grad = torch.autograd.grad(kl, leaves)
                grad_keys[:, :count] += grad
        ctx.save_for_backward(grad_q, grad_keys)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return *(grad * saved for saved in ctx.saved_tensors), None, None, None, None, None
