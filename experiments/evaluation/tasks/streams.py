"""Tasks on the run's own validation split, in one pass for all of them and every length:

loss       nats per target; beside the mean those of each corpus of a mixture, and the sums of each row, so that two
           evaluations of the same rows can be compared row by row
position   nats per target by position in the document, in bins that double: does more context still help?
recall     share of MQAR queries answered right, of those that ask for their key the first time in the row: the
           answer to a repeated query also stands near by, after the earlier one
sparsity   causal sparsity of every layer and KV head, and active tokens by position
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Annotated

import torch
from torch import Tensor

from dashattn.fields import Checked, OneOf, PositiveInt, PositiveShare
from data import IGNORE, Batch, BatchStream, DataConfig, MQARDataConfig
from data.config import PLACEMENTS
from experiments.evaluation.tasks.base import Setting, SparsityTally, Task, count, halving, quantiles, row, scatter
from models import ModelOutput

STREAM_TASKS = ("loss", "position", "recall", "sparsity")


@dataclass
class MQARForm(Checked, at="mqar"):
    """Another form of MQAR than the run was trained on; null = as trained. Meanings: data/config.py."""

    pairs_min: PositiveInt | None = None  # fewest key-value pairs of a sample
    pairs_max: PositiveInt | None = None  # most key-value pairs of a sample
    placement: Annotated[str, OneOf(PLACEMENTS)] | None = None  # of the pairs in the first half
    query_density: PositiveShare | None = None  # share of the second half's two-token slots that hold a query
    show_answers: bool | None = None  # the answer follows its query

    def given(self) -> dict:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


def data_at(data: DataConfig, length: int, rows: int | None, form: MQARForm) -> DataConfig:
    """The run's data in rows of another length, and MQAR in another form. The number of its pairs stays."""
    return data.at_length(length, validation_rows=rows, **form.given())


class StreamTask(Task):
    """Scores of a validation split at one row length."""

    def __init__(self, names: Sequence[str], data: DataConfig, stream: BatchStream, form: MQARForm) -> None:
        self.names = tuple(names)
        self.stream = stream
        self.packed = data.is_packed
        self.columns = {"length": data.seq_len, "rows": data.validation_rows, "variant": None}
        if isinstance(data, MQARDataConfig):
            self.columns["variant"] = ", ".join(f"{k}={v}" for k, v in form.given().items()) or None

    def run(self, setting: Setting, names: Sequence[str]) -> Iterator[dict]:
        tally = measure(setting, self.stream, names, self.columns["rows"])
        for name in names:
            for scores in SCORES[name](tally):
                yield tally.sparsity.columns() | scores


def first_queries(input_ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
    """Of the positions that have a target, those whose input token had none at an earlier position of the row."""
    length = input_ids_BT.shape[1]
    position_T = torch.arange(length, device=input_ids_BT.device)
    first_BV = position_T.new_full((len(input_ids_BT), int(input_ids_BT.max()) + 1), length)
    first_BV.scatter_reduce_(1, input_ids_BT, position_T.where(targets_BT, length), "amin")
    return targets_BT & (first_BV.gather(1, input_ids_BT) == position_T)


def position_bins(positions: Tensor) -> Tensor:
    """The bin of each position: 0, 1, 2-3, 4-7, ..., that is, its number of binary digits."""
    return torch.frexp(positions.double()).exponent


def bin_span(index: int) -> list[int]:
    return [2**index // 2, 2**index - 1]


class Tally:
    """Sums over a validation split, kept in float64 on the CPU."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.sparsity = SparsityTally()
        self.loss = self.targets = 0.0
        self.by_row: list[tuple[str | None, float, int]] = []  # corpus, nats and targets of each row
        self.read = hashlib.sha256()  # of all targets: rows of other text, or of another tokenizer, may hold as many
        self.recalled: list[tuple[int, int]] = []  # queries answered right, and all, of each row
        self.by_bin: dict[int, list[tuple[float, int]]] = {}  # nats and targets in the bin, of each row with some
        self.bin_active: dict[int, Tensor] = {}  # counts of active tokens of every layer, KV head and token in the bin

    def add(self, batch: Batch, output: ModelOutput) -> None:
        targets_BT, stats = batch.labels != IGNORE, output.stats
        losses_BT = output.token_losses.double()
        self.read.update(batch.labels.cpu().numpy().tobytes())
        self.loss += losses_BT.sum().item()
        self.targets += targets_BT.sum().item()
        rows = len(batch.sources) or len(targets_BT)  # text may be packed into one long row
        sums = (losses_BT.view(rows, -1).sum(1).tolist(), targets_BT.view(rows, -1).sum(1).tolist())
        self.by_row += zip(batch.sources or [None] * rows, *sums, strict=True)
        if "recall" in self.names:
            first_BT = first_queries(batch.input_ids, targets_BT)
            right_BT = output.is_likeliest & first_BT
            self.recalled += zip(right_BT.sum(1).tolist(), first_BT.sum(1).tolist(), strict=True)
        bins = position_bins(batch.position_ids).expand_as(targets_BT)
        for index in bins[targets_BT].unique().tolist():
            inside = (bins == index) & targets_BT
            sums = (losses_BT.where(inside, 0).view(rows, -1).sum(1).tolist(), inside.view(rows, -1).sum(1).tolist())
            held = [pair for pair in zip(*sums, strict=True) if pair[1]]
            self.by_bin[index] = self.by_bin.get(index, []) + held
        self.sparsity.add(stats, packed=batch.cu_seqlens is not None)
        if "sparsity" in self.names:
            bins = position_bins(stats[0].positions)
            active_BTLH = torch.stack([layer.active_tokens for layer in stats], dim=2)
            for index in bins.unique().tolist():
                self.bin_active[index] = count(active_BTLH[bins == index], self.bin_active.get(index))


def measure(setting: Setting, stream: BatchStream, names: Sequence[str], num_rows: int | None = None) -> Tally:
    """One pass over a validation stream; where memory does not suffice, again with half its rows at once.

    Args:
        num_rows: of the stream, if known, to tell how far the pass is.
    """

    def one_pass(rows: int) -> Tally:
        stream.rows = rows
        return _measure(setting, stream, names, num_rows)

    return halving(one_pass, stream.rows)[0]


@torch.inference_mode()
def _measure(setting: Setting, stream: BatchStream, names: Sequence[str], num_rows: int | None) -> Tally:
    tally = Tally(names)
    for batch in stream:
        batch = batch.to(setting.device)
        documents = {"position_ids": batch.position_ids, "cu_seqlens": batch.cu_seqlens, "max_seqlen": batch.max_seqlen}
        tally.add(batch, setting.model(batch.input_ids, labels=batch.labels, **documents, return_stats=True))
        if num_rows is not None:
            setting.advance(len(tally.by_row) / num_rows)
    return tally


def _loss_rows(tally: Tally) -> Iterator[dict]:
    corpora, nats, targets = (list(column) for column in zip(*tally.by_row, strict=True))
    by_corpus = {}
    for name in sorted({name for name in corpora if name is not None}):
        own = [index for index, corpus in enumerate(corpora) if corpus == name]
        by_corpus[name] = sum(nats[index] for index in own) / sum(targets[index] for index in own)
    by_row = {"corpus": corpora, "nats": nats, "targets": targets, "read": tally.read.hexdigest()[:16]}
    known = scatter(nats, targets)
    yield row("loss", "nats", tally.loss / tally.targets, by_corpus=by_corpus, by_row=by_row, **known)


def _position_rows(tally: Tally) -> Iterator[dict]:
    for index, held in sorted(tally.by_bin.items()):
        nats, targets = zip(*held, strict=True)
        yield row(
            "position", "nats", math.fsum(nats) / sum(targets), position=bin_span(index), **scatter(nats, targets)
        )


def _recall_rows(tally: Tally) -> Iterator[dict]:
    right, asked = zip(*tally.recalled, strict=True)
    yield row("recall", "accuracy", sum(right) / sum(asked), **scatter(right, asked))


def _sparsity_rows(tally: Tally) -> Iterator[dict]:
    per_head = tally.sparsity.per_head()
    yield row("sparsity", "causal_sparsity", tally.sparsity.columns()["causal_sparsity"], per_head=per_head.tolist())
    for index in sorted(tally.bin_active):
        low, median, high = quantiles(tally.bin_active[index])
        yield row("sparsity", "active_tokens", median, p10=low, p90=high, position=bin_span(index))


SCORES = {"loss": _loss_rows, "position": _position_rows, "recall": _recall_rows, "sparsity": _sparsity_rows}
