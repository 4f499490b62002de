"""A batch, and the stream of batches that training and evaluation read."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from data.tokenizer import TextTokenizer

IGNORE = -100  # label of a position that is no target


@dataclass
class Batch:
    """Labels are already shifted: labels[b, t] is the target of position t, IGNORE (-100) where there is none."""

    input_ids: Tensor  # int64 [B, T]
    labels: Tensor  # int64 [B, T]
    position_ids: Tensor  # int64 [B, T], position in the document
    cu_seqlens: Tensor | None = None  # int32 [N + 1], the documents' boundaries when B == 1 holds packed documents
    max_seqlen: int | None = None  # tokens of the longest of these
    sources: tuple[str, ...] = ()  # of each row of text the corpus it comes from; none where rows are generated

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(
            self.input_ids.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            self.position_ids.to(device, non_blocking=True),
            None if self.cu_seqlens is None else self.cu_seqlens.to(device, non_blocking=True),
            self.max_seqlen,
            self.sources,
        )

    def pin_memory(self) -> "Batch":
        """In page-locked memory, from which ``to`` copies while the GPU computes."""
        cu_seqlens = None if self.cu_seqlens is None else self.cu_seqlens.pin_memory()
        tensors = (self.input_ids.pin_memory(), self.labels.pin_memory(), self.position_ids.pin_memory(), cu_seqlens)
        return Batch(*tensors, self.max_seqlen, self.sources)

    @property
    def num_tokens(self) -> int:
        return self.input_ids.numel()

    @property
    def num_targets(self) -> int:
        return int((self.labels != IGNORE).sum())


class BatchStream(ABC):
    """Batches of one rank. Training is infinite; validation is finite and starts over at each ``iter()``.

    ``state_dict()`` between two batches describes what has been handed out; a stream built alike continues after
    ``load_state_dict()`` with exactly the batches that would have followed. The state is the rank's own.
    """

    split: str
    vocab_size: int
    tokenizer: TextTokenizer | None = None

    def __iter__(self) -> Iterator[Batch]:
        if self.split == "validation":
            self.rewind()
        return self

    @abstractmethod
    def __next__(self) -> Batch: ...

    @abstractmethod
    def rewind(self) -> None:
        """Start over from the first batch."""

    @abstractmethod
    def state_dict(self) -> dict:
        """Plain JSON values."""

    @abstractmethod
    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError when ``state`` is of a stream with other data, seed or row length."""

    @abstractmethod
    def describe(self) -> dict:
        """What the stream reads, as plain JSON values, for the run directory."""

    def unigram_entropy(self) -> float | None:
        """Nats per target that the best context-free guess reaches on validation; None where it is not known."""
        return None


def check_state(state: dict, expected: dict) -> None:
    """Raise ValueError naming every key of ``expected`` whose value in a loaded ``state`` is another."""
    wrong = [
        f"{key} is {value!r}, the checkpoint's {state.get(key)!r}"
        for key, value in expected.items()
        if state.get(key) != value
    ]
    if wrong:
        raise ValueError(
            f"the data differ from those the checkpoint was trained on: {'; '.join(wrong)}. "
            "Restore them to resume, or start a new run from the checkpoint's weights"
        )


def check_placement(split: str, rows: int, rank: int, world_size: int, validation_rows: int | None = None) -> None:
    """Raise ValueError for a split, row count or rank that no stream can serve."""
    if split not in ("train", "validation"):
        raise ValueError(f"split={split!r} is unknown; choose train or validation")
    if rows < 1:
        raise ValueError(f"rows={rows} per micro-batch; give at least 1")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} is outside world_size={world_size}")
    if split == "validation" and validation_rows is not None and validation_rows < world_size:
        raise ValueError(
            f"{validation_rows} validation rows cannot be shared by {world_size} ranks; raise "
            "data.validation_rows (and, for text, data.validation_fraction or the corpus)"
        )
