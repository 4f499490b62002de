"""The interface of everything that is measured on a checkpoint."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dashattn.stats import AttentionStats
from experiments.errors import out_of_memory
from experiments.intervals import filled, ratio_stderr
from models import Transformer
from models.generate import generate

T, R = TypeVar("T"), TypeVar("R")


@dataclass(frozen=True)
class Setting:
    """The model at one value of its sparsity knob, and where it came from.

    Attributes:
        checkpoint: tells it from all others that ``run_dir`` keeps something of.
        advance: to be called with the share of a pass that is done, 0 to 1.
    """

    model: Transformer
    device: torch.device
    knob: float | None
    checkpoint: str
    run_dir: Path
    advance: Callable[[float], None] = lambda share: None


class Task(ABC):
    """One pass over data of one length, from which one or several tasks are scored.

    Attributes:
        names: of the tasks, as rows call them.
        columns: what tells this pass from another that scores the same names; they stand in its rows. Their values
            are plain JSON.
        packed: its rows hold several documents each.
    """

    names: tuple[str, ...]
    columns: dict
    packed = False

    @abstractmethod
    def run(self, setting: Setting, names: Sequence[str]) -> Iterator[dict]:
        """The rows of ``names``, without ``columns`` and what all rows of an evaluation share."""


class SparsityTally:
    """What the layers read, summed in float64 on the CPU."""

    def __init__(self) -> None:
        self.tokens = 0
        self.active_LH = self.dense_LH = self.reads_L = None
        self.paper: list[float] = []

    def add(self, stats: Sequence[AttentionStats], packed: bool) -> None:
        """One forward pass's, one a layer. ``packed``: its rows hold several documents. Whole or,
        where memory does not suffice, not at all."""
        new = SparsityTally()
        new.tokens = stats[0].positions.numel()
        new.active_LH = torch.stack([layer.active_tokens.double().sum((0, 1)) for layer in stats]).cpu()
        new.dense_LH = (stats[0].positions.double() + 1).sum().cpu().expand_as(new.active_LH)
        new.reads_L = torch.stack([layer.routing_reads.double().sum() for layer in stats]).cpu()
        if not packed:  # for each row, since how many a batch holds must not weigh
            paper = torch.stack([layer.paper_sparsity() for layer in stats]).mean()
            new.paper = [] if paper.isnan() else [float(paper)] * len(stats[0].positions)
        self.merge(new)

    @classmethod
    def of_rows(cls, stats: Sequence[AttentionStats], lengths: Iterable[int]) -> "list[SparsityTally]":
        """Of each row of a forward pass whose rows were padded at their ends."""
        tallies = []
        for i, length in enumerate(lengths):
            own = (slice(i, i + 1), slice(length))
            parts = [(s.active_tokens[own], s.positions[own], s.routing_reads[own]) for s in stats]
            tally = cls()
            tally.add([AttentionStats(*part) for part in parts], packed=False)
            tallies.append(tally)
        return tallies

    def merge(self, *others: "SparsityTally") -> None:
        """Adds what others have seen."""
        for other in others:
            if self.active_LH is None:
                self.active_LH, self.dense_LH, self.reads_L = other.active_LH, other.dense_LH, other.reads_L
            else:
                self.active_LH = self.active_LH + other.active_LH
                self.dense_LH = self.dense_LH + other.dense_LH
                self.reads_L = self.reads_L + other.reads_L
            self.tokens += other.tokens
            self.paper = self.paper + other.paper

    def record(self) -> dict:
        """The sums as plain JSON."""
        active, dense, reads = (x.tolist() for x in (self.active_LH, self.dense_LH, self.reads_L))
        return {"tokens": self.tokens, "active": active, "dense": dense, "reads": reads, "paper": self.paper}

    @classmethod
    def of(cls, records: Iterable[dict]) -> "SparsityTally":
        """The sum of several records."""
        records = list(records)
        tally = cls()
        tally.tokens = sum(record["tokens"] for record in records)
        tally.active_LH, tally.dense_LH, tally.reads_L = (
            torch.tensor([record[key] for record in records], dtype=torch.float64).sum(0)
            for key in ("active", "dense", "reads")
        )
        tally.paper = [value for record in records for value in record["paper"]]
        return tally

    def per_head(self) -> Tensor:
        """Causal sparsity of each layer and KV head [L, H]."""
        return 1 - self.active_LH / self.dense_LH

    def columns(self) -> dict:
        """Measured sparsity; ``paper_sparsity`` is null where no unpacked row is longer than its first 4096."""
        return {
            "causal_sparsity": float(1 - self.active_LH.sum() / self.dense_LH.sum()),
            "causal_sparsity_per_layer": self.per_head().mean(1).tolist(),
            "paper_sparsity": sum(self.paper) / len(self.paper) if self.paper else None,
            "active_tokens": float(self.active_LH.mean() / self.tokens),
            "active_tokens_per_layer": (self.active_LH.mean(1) / self.tokens).tolist(),
            "routing_reads": float(self.reads_L.mean() / self.tokens),
            "routing_reads_per_layer": (self.reads_L / self.tokens).tolist(),
        }


def generate_measured(
    model: Transformer, prompts: list[list[int]], **options
) -> tuple[list[list[int]], list[SparsityTally]]:
    """What ``models.generate.generate`` continues prompts with, and the sparsity of each prompt as it read it."""
    sparsity = []

    def measure(stats: list[AttentionStats]) -> None:
        sparsity.extend(SparsityTally.of_rows(stats, map(len, prompts)))

    return generate(model, prompts, **options, on_stats=measure), sparsity


def row(task: str, metric: str, score: float, **columns) -> dict:
    """A result.

    Attributes of it beside its arguments: ``position`` is null, or the first and last position of the tokens it is
    about; ``stderr`` the score's standard error over ``samples``, both null where that means nothing or is not known.
    """
    unknown = {"position": None, "stderr": None, "samples": None}
    return {"task": task, "metric": metric, "score": score, **unknown, **columns}


def scatter(sums: Sequence[float], counts: Sequence[float]) -> dict:
    """``stderr`` and ``samples`` of a mean over what samples hold, from sum and count of each."""
    return {"stderr": ratio_stderr(sums, counts), "samples": filled(counts)}


def halving(work: Callable[[int], R], rows: int) -> tuple[R, int]:
    """``work(rows)``, or where memory does not suffice, of half as many, and so on, which stderr says.

    ``work`` begins anew each time: what it returns is as if the smaller number had been asked for.

    Returns:
        The result, and for how many rows there was memory.

    Raises:
        ValueError: there is not even for one.
    """
    while True:
        try:
            return work(rows), rows
        except (RuntimeError, MemoryError) as error:
            if (told := out_of_memory(error)) is None:
                raise
            if rows == 1:
                mend = "take shorter ones (lengths, max_length or max_new_tokens), or free memory"
                raise ValueError(f"{told}. One row at once is too much: {mend}") from error
        # The error is gone here, and with it the tensors that its frames held.
        torch.cuda.empty_cache()
        rows //= 2
        print(f"out of memory: going on with {rows} rows at once", file=sys.stderr)


def in_parts(items: Sequence[T], size: int, work: Callable[[Sequence[T]], R]) -> Iterator[tuple[Sequence[T], R]]:
    """Each part of ``size`` items with ``work`` of it; ``halving`` the size from there on where memory ends."""
    start = 0
    while start < len(items):
        result, size = halving(lambda n: work(items[start : start + n]), min(size, len(items) - start))  # noqa: B023
        yield items[start : start + size], result
        start += size


def count(values: Tensor, counts: Tensor | None = None) -> Tensor:
    """How often each number from 0 up occurs, int64 on the CPU, added to ``counts``; ``values`` are whole numbers."""
    new = values.flatten().long().bincount().cpu()
    if counts is None:
        return new
    longer, shorter = (new, counts) if len(new) > len(counts) else (counts, new)
    return longer + F.pad(shorter, (0, len(longer) - len(shorter)))


def quantiles(counts: Tensor) -> tuple[float, float, float]:
    """10th percentile, median and 90th percentile of the numbers that ``count`` has counted."""
    ranks = counts.cumsum(0)
    total = int(ranks[-1])
    low, median, high = (
        float(torch.searchsorted(ranks, round(share * (total - 1)), right=True)) for share in (0.1, 0.5, 0.9)
    )
    return low, median, high
