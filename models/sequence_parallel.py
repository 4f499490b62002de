"""Sequence parallelism in the style of DeepSpeed-Ulysses (arXiv 2309.14509): P processes share every row.

Each process holds T / P tokens of a row, and whatever is computed token by token. Before attention an all-to-all turns
tokens into heads, [B, T / P, H, D] -> [B, T, heads of the process, D], and after it one turns heads into tokens.

A selection is made for a KV head and all query heads of its group, so a process attends for whole groups: those that
its H / P query heads belong to. Where P does not divide the KV heads, a group is computed by several processes, of
which each passes on the outputs of its own query heads; a copied head's gradient is the sum of its copies'. This is
where DeepSpeed's layer (deepspeed.sequence.layer), which wants a KV head for every process and splits groups, will
not do.
"""

from dataclasses import replace

import torch
import torch.distributed
from torch import Tensor

from dashattn.backends import HeadShare
from dashattn.stats import AttentionStats


class SequenceParallel(HeadShare):
    """This process's tokens and heads among those of ``group``, whose processes must all make each call here.

    Raises:
        ValueError: the query heads cannot be shared equally.
    """

    def __init__(self, group: torch.distributed.ProcessGroup, num_heads: int, num_kv_heads: int):
        self._group, self._size, self._rank = group, group.size(), group.rank()
        if num_heads % self._size:
            raise ValueError(
                f"model.num_heads={num_heads} cannot be shared by sequence_parallel={self._size} processes: "
                "take a divisor of it"
            )
        own, self._group_size = num_heads // self._size, num_heads // num_kv_heads
        self._num_kv_heads = num_kv_heads
        first, last = (range(at, num_heads, own) for at in (0, own - 1))  # query head of every process
        self._kv_heads = [
            slice(a // self._group_size, b // self._group_size + 1) for a, b in zip(first, last, strict=True)
        ]
        self._query_heads = [slice(s.start * self._group_size, s.stop * self._group_size) for s in self._kv_heads]
        self.kv_heads, self.query_heads = self._kv_heads[self._rank], self._query_heads[self._rank]
        start = first[self._rank] - self.query_heads.start
        self._own = slice(start, start + own)  # of the query heads attended for
        heads = range(start, start + own)
        groups = range(0, self.query_heads.stop - self.query_heads.start, self._group_size)
        self.kv_weights = [sum(head in heads for head in range(g, g + self._group_size)) / num_heads for g in groups]
        # Not for torch.compile to look into: it has lost the gradient of a collective inside an autograd function (see
        # deepspeed.sequence.layer). As decorators they would make this module import the compiler.
        self.gather, self.scatter, self.all_heads = map(
            torch.compiler.disable, (self.gather, self.scatter, self.all_heads)
        )

    def part(self, x: Tensor) -> Tensor:
        """The tokens of this process [B, T / P, ...] of a whole row [B, T, ...]. Raises ValueError if P does not
        divide T."""
        if x.shape[1] % self._size:
            raise ValueError(f"{x.shape[1]} tokens cannot be shared by sequence_parallel={self._size}: take a multiple")
        return x.chunk(self._size, dim=1)[self._rank]

    def gather(self, x: Tensor) -> Tensor:
        """[B, T / P, H, ...] of this process's tokens, H the query or the KV heads -> [B, T, heads, ...]."""
        shares = self._kv_heads if x.shape[2] == self._num_kv_heads else self._query_heads
        sent = [share.stop - share.start for share in shares]
        received = [sent[self._rank]] * self._size
        heads_first = x.movedim(2, 0)
        x = _AllToAll.apply(torch.cat([heads_first[share] for share in shares]), sent, received, self._group)
        # [P * heads, B, T / P, ...]
        return x.unflatten(0, (self._size, -1)).movedim((2, 0), (0, 1)).movedim(2, 3).flatten(1, 2)

    def scatter(self, out: Tensor) -> Tensor:
        """[B, T, heads, D] of this process's query heads -> [B, T / P, H, D] of its tokens."""
        tokens_first = out[:, :, self._own].unflatten(1, (self._size, -1)).movedim(1, 0)
        out = _AllToAll.apply(tokens_first, [1] * self._size, [1] * self._size, self._group)
        return out.movedim(0, 2).flatten(2, 3)  # [P, B, T / P, H / P, D] before

    def all_heads(self, stats: AttentionStats) -> AttentionStats:
        """Stats of all KV heads, from those of each process's."""
        own = stats.active_tokens.repeat_interleave(self._group_size, dim=-1)[..., self._own].contiguous()
        shares = [torch.empty_like(own) for _ in range(self._size)]
        torch.distributed.all_gather(shares, own, group=self._group)
        return replace(stats, active_tokens=torch.cat(shares, dim=-1)[..., :: self._group_size])


class _AllToAll(torch.autograd.Function):
    """Rows of dimension 0, ``sent[i]`` of them to process i and ``received[i]`` from it; the gradient goes back."""

    @staticmethod
    def forward(ctx, x, sent: list[int], received: list[int], group):
        ctx.way_back = (received, sent, group)
        out = x.new_empty(sum(received), *x.shape[1:])
        torch.distributed.all_to_all_single(out, x.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx, grad):
        return _AllToAll.apply(grad, *ctx.way_back), None, None, None
