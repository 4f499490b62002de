"""The interface of everything that is measured on a checkpoint."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models import Transformer


@dataclass(frozen=True)
class Setting:
    """The model at one value of its sparsity knob, and where it came from."""

    model: Transformer
    device: torch.device
    knob: float | None
    checkpoint: str
    run_dir: Path


class Task(ABC):
    """One pass over data of one length, from which one or several tasks are scored.

    Attributes:
        names: of the tasks, as rows call them.
        columns: what tells this pass from another that scores the same names; they stand in its rows. Their values
            are plain JSON.
    """

    names: tuple[str, ...]
    columns: dict

    @abstractmethod
    def run(self, setting: Setting, names: Sequence[str]) -> Iterator[dict]:
        """The rows of ``names``, without ``columns`` and what all rows of an evaluation share."""


class SparsityTally:
    """What the layers read, summed in float64 on the CPU."""

    def __init__(self) -> None:
        self.tokens = 0
        self.active_LH = self.dense_LH = self.reads_L = None
        self.paper: list[float] = []

    def add(self, stats: Sequence, packed: bool) -> None:
        """One forward pass's ``AttentionStats``, one a layer. ``packed``: its rows hold several documents."""
        self.tokens += stats[0].positions.numel()
        dense = (stats[0].positions.double() + 1).sum()
        sums = (
            torch.stack([layer.active_tokens.double().sum((0, 1)) for layer in stats]).cpu(),
            dense.expand(len(stats), stats[0].active_tokens.shape[-1]).cpu(),
            torch.stack([layer.routing_reads.double().sum() for layer in stats]).cpu(),
        )
        if self.active_LH is not None:
            sums = [old + new for old, new in zip((self.active_LH, self.dense_LH, self.reads_L), sums, strict=True)]
        self.active_LH, self.dense_LH, self.reads_L = sums
        if not packed:
            paper = torch.stack([layer.paper_sparsity() for layer in stats]).mean()
            if not paper.isnan():
                self.paper.append(float(paper))

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
            "routing_reads": float(self.reads_L.mean() / self.tokens),
        }


def row(task: str, metric: str, score: float, **columns) -> dict:
    """A result. ``position``: null, or the first and last position of the tokens it is about."""
    return {"task": task, "metric": metric, "score": score, "position": None, **columns}


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def quantiles(values: Tensor) -> tuple[float, float, float]:
    """10th percentile, median and 90th percentile; torch.quantile refuses more than 2**24 values."""
    ordered = values.flatten().sort().values
    low, median, high = (ordered[round(share * (len(ordered) - 1))].item() for share in (0.1, 0.5, 0.9))
    return low, median, high
