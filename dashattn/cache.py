"""Decode caches: keys, values and what a method derives from them, for a batch of sequences of different lengths.

Everything is allocated once, at addresses that stay: a CUDA graph of a step can be replayed as long as the cache lives.
A step writes behind each sequence's length, which lies on the device, so that one graph and one compiled kernel serve
every length. What lies past a length is never read: sequences are shortened and restarted without touching the tensors,
and rows padded at their end write what the next step writes over. The host keeps a copy of the lengths, because to read
them would be to wait for the device, and refuses what does not fit before anything is written.

Shapes: B sequences, S tokens of capacity, T new tokens, H KV heads, D head size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dashattn.checks import check, check_positive_int
from dashattn.ops.compression.reference import visible_windows
from dashattn.ops.decode.reference import new_positions


@dataclass(frozen=True)
class CacheField:
    """One tensor of a layer's cache, [B, S / tokens_per_row, heads, dim]; in memory a head's rows lie together.

    ``table``: holds rotary tables, in float32 (float64 for float64) whatever the dtype of the cache.
    """

    heads: int
    dim: int
    tokens_per_row: int = 1
    table: bool = False


@dataclass(frozen=True)
class CacheLayout:
    """A layer's tensors; the capacity is rounded up to a multiple of ``block_size``."""

    block_size: int
    fields: dict[str, CacheField]


class DecodeCache:
    """The sequences of a batch, in all layers.

    ``decode`` writes new tokens behind the lengths; ``advance`` then makes them part of the sequences. The two are
    apart because all layers of a model write at the same lengths.

    Attributes:
        lengths: int32 [B] on the device, tokens of each sequence.
        host_lengths: the same numbers on the host.
        layers: what a backend's ``decode`` takes, one a layer.
    """

    def __init__(self, layouts: Sequence[CacheLayout], batch: int, capacity: int, *, dtype: torch.dtype, device):
        check_positive_int(batch=batch, capacity=capacity)
        self.capacity = capacity
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.host_lengths = [0] * batch
        self.layers = []
        for layout in layouts:
            tokens = -(-capacity // layout.block_size) * layout.block_size
            tensors = {}
            for name, field in layout.fields.items():
                kind = torch.promote_types(dtype, torch.float32) if field.table else dtype
                # Heads choose blocks of their own, which should be read in one piece.
                shape = (batch, field.heads, tokens // field.tokens_per_row, field.dim)
                tensors[name] = torch.zeros(shape, dtype=kind, device=device).transpose(1, 2)
            self.layers.append(LayerCache(self, tensors))

    def check_room(self, num_tokens: int) -> None:
        """Raises ValueError unless every sequence has room for ``num_tokens`` more, padding included."""
        longest = max(self.host_lengths)
        check(
            longest + num_tokens <= self.capacity,
            f"{num_tokens} new tokens do not fit behind a sequence of {longest}: the cache holds {self.capacity} "
            "tokens a sequence; build it with a larger capacity, or truncate or reset the sequence",
        )

    def advance(self, new_tokens: int | Sequence[int] = 1) -> None:
        """Makes tokens that ``decode`` has written part of the sequences.

        Args:
            new_tokens: one number for all, or one each where the rows given to ``decode`` were padded at their end.
        """
        counts = [new_tokens] * len(self.host_lengths) if isinstance(new_tokens, int) else list(new_tokens)
        self._check_rows("new_tokens", counts)
        lengths = [length + count for length, count in zip(self.host_lengths, counts, strict=True)]
        check(
            min(counts) >= 0 and max(lengths) <= self.capacity,
            f"new_tokens must not be negative, nor lead past the capacity of {self.capacity}; got {counts} "
            f"for lengths {self.host_lengths}",
        )
        if isinstance(new_tokens, int):  # the step of every token: nothing is copied to the device
            self.lengths += new_tokens
            self.host_lengths = lengths
        else:
            self._set_lengths(lengths)

    def truncate(self, lengths: Sequence[int]) -> None:
        """Shortens every sequence to its entry of ``lengths``. ValueError where that is longer than it is."""
        self._check_rows("lengths", lengths)
        check(
            all(0 <= new <= old for new, old in zip(lengths, self.host_lengths, strict=True)),
            f"truncate shortens: each length must lie between 0 and the sequence's own; got {list(lengths)} "
            f"for {self.host_lengths}",
        )
        self._set_lengths(list(lengths))

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Empties the sequences ``rows``, or all, for others to begin in their place."""
        emptied = range(len(self.host_lengths)) if rows is None else rows
        self._check_indices(emptied)
        self._set_lengths([0 if row in emptied else length for row, length in enumerate(self.host_lengths)])

    def reorder(self, rows: Sequence[int]) -> None:
        """Row i becomes the sequence that row ``rows[i]`` was; in place, as beam search wants it."""
        self._check_rows("rows", rows)
        index = self._check_indices(rows)
        # Whole capacities are copied: to copy up to the lengths, which differ, would take a launch for each sequence.
        for layer in self.layers:
            for tensor in layer.tensors.values():
                tensor.copy_(tensor[index])
        self._set_lengths([self.host_lengths[row] for row in rows])

    def select(self, rows: Sequence[int]) -> "DecodeCache":
        """A new cache of copies of ``rows``, in any number: drops sequences, or lets several share a prefix."""
        check(len(rows) > 0, "rows must name at least one sequence")
        index = self._check_indices(rows)
        # Without __init__, which would allocate; what a subclass adds (a model's rotary tables) belongs to no sequence
        # and is shared.
        selected = object.__new__(type(self))
        selected.__dict__.update(self.__dict__)
        selected.layers = [
            LayerCache(selected, {name: x.transpose(1, 2)[index].transpose(1, 2) for name, x in layer.tensors.items()})
            for layer in self.layers
        ]
        selected.lengths = self.lengths[index]
        selected.host_lengths = [self.host_lengths[row] for row in rows]
        return selected

    def _set_lengths(self, lengths: list[int]) -> None:
        self.lengths.copy_(torch.tensor(lengths, dtype=torch.int32, device="cpu"))
        self.host_lengths = lengths

    def _check_rows(self, name: str, values: Sequence[int]) -> None:
        batch = len(self.host_lengths)
        check(len(values) == batch, f"{name} must have one entry per sequence ({batch}); got {len(values)}")

    def _check_indices(self, rows: Sequence[int]) -> Tensor:
        batch = len(self.host_lengths)
        check(
            all(0 <= row < batch for row in rows), f"rows must name sequences from 0 to {batch - 1}; got {list(rows)}"
        )
        return torch.tensor(list(rows), device=self.lengths.device)


class LayerCache:
    """One layer's tensors, and the lengths it shares with the others."""

    def __init__(self, sequences: DecodeCache, tensors: dict[str, Tensor]):
        self.sequences = sequences
        self.tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @property
    def lengths(self) -> Tensor:
        return self.sequences.lengths

    @property
    def is_empty(self) -> bool:
        """Whether no sequence has begun, as the host knows."""
        return not any(self.sequences.host_lengths)

    def write(self, **new: Tensor) -> None:
        """Writes [B, T, heads, dim] tensors behind the lengths."""
        for name, x in new.items():
            _put(self.tensors[name], new_positions(self.lengths, x.shape[1]), x)

    def write_windows(
        self,
        num_tokens: int,
        kernel_size: int,
        kernel_stride: int,
        compute: Callable[..., tuple[Tensor, ...]],
        sources: Sequence[str],
        targets: Sequence[str],
    ) -> None:
        """Computes the windows of tokens that ``num_tokens`` tokens just written may have completed.

        A window is computed when its last token comes, from keys and values that never change again: a step costs the
        windows that it completes, however long the sequence. Their number is taken to be the most there can be, so that
        shapes never depend on the lengths. Those that are still incomplete hold nothing of use: nobody sees them, and
        they are written again when they are complete.

        Args:
            compute: takes the tokens of n windows, one [B, (n - 1) * stride + size, heads, dim] tensor per entry of
                ``sources``, and returns one [B, n, heads, dim] tensor per entry of ``targets``.
        """
        # The windows complete before the new tokens; the lengths do not count those yet. [B, 1]
        first = visible_windows(self.lengths.long() - 1, kernel_size, kernel_stride)[:, None]
        count = -(-num_tokens // kernel_stride)
        span = torch.arange((count - 1) * kernel_stride + kernel_size, device=self.lengths.device)
        # An incomplete window may reach past the capacity; whatever it reads there instead, nobody sees.
        token = (first * kernel_stride + span).clamp(max=self.tensors[sources[0]].shape[1] - 1)
        row = torch.arange(token.shape[0], device=token.device)[:, None]
        results = compute(*(self.tensors[name][row, token] for name in sources))
        for name, x in zip(targets, results, strict=True):
            _put(self.tensors[name], first + torch.arange(count, device=token.device), x)


def _put(target: Tensor, index: Tensor, x: Tensor) -> None:
    """target[b, index[b, i]] = x[b, i]."""
    row = torch.arange(index.shape[0], device=index.device)[:, None]
    target[row, index] = x.to(target.dtype)
