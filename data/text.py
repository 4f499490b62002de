"""Streams of packed text: from the tokenised cache, or tokenised while training."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.batch import Batch, BatchStream, check_placement, check_state
from data.cache import fingerprint
from data.config import CorpusConfig, PackedDataConfig
from data.corpora import corpus_fingerprint, open_dataset, row_text, source_errors, split_of
from data.mixing import Schedule
from data.packing import Row, collate, cut_row
from data.prepared import PreparedCorpus, unigram_cross_entropy
from data.shards import TokenizedPart
from data.tokenizer import TextTokenizer

READ_DOCUMENTS = 64  # of a stream at a time: what a resumed run reads again, at most


class TextStream(BatchStream):
    """Rows of text, numbered over all ranks: a global micro-batch is the next world_size * rows of them, and a rank
    takes its share of those. Which component a row comes from (a corpus, a length bucket of it) is a function of the
    seed and the row's number. The state is therefore the same on every rank, and serves any number of ranks and rows.
    """

    def __init__(
        self,
        config: PackedDataConfig,
        tokenizer: TextTokenizer,
        names: Sequence[str],  # of the components: the corpus each belongs to
        weights: Sequence[float],
        *,
        split: str,
        seed: int,
        rows: int,
        rank: int,
        world_size: int,
    ) -> None:
        check_placement(split, rows, rank, world_size)
        self.config, self.tokenizer, self.split = config, tokenizer, split
        self.seed = seed if split == "train" else 0  # validation reads the same rows for every seed
        self.rows, self.rank, self.world_size = rows, rank, world_size
        self.vocab_size = tokenizer.vocab_size
        self.names = tuple(names)
        self.schedule = Schedule(weights, self.seed)
        self.consumed = 0  # rows handed out by all ranks

    def _batch(self, rows: int) -> Batch:
        """This rank's part of the next world_size * rows rows."""
        first = self.consumed + self.rank * rows
        batch = collate(list(self._read(first, rows)), self.config.pack)
        batch.sources = tuple(self.names[self.schedule.place(number)[0]] for number in range(first, first + rows))
        self.consumed += rows * self.world_size
        return batch

    @abstractmethod
    def _read(self, first: int, rows: int) -> Iterator[Row]:
        """Rows first ... first + rows - 1."""

    @abstractmethod
    def _identity(self) -> dict:
        """What a checkpoint must agree on."""

    def describe(self) -> dict:
        return {
            "source": {name: corpus.source for name, (corpus, _) in self.config.parts.items()},
            "split": self.split,
            "shares": [round(float(share), 6) for share in self.schedule.shares],
            "seq_len": self.config.seq_len,
            "vocab_size": self.vocab_size,
        }


class PreparedTextStream(TextStream):
    """Rows of tokenised corpora. Training walks through all rows of a component in an order of its own in each epoch
    of it, a function of (seed, epoch, component). Validation ends before a row would repeat."""

    def __init__(
        self,
        config: PackedDataConfig,
        corpora: dict[str, PreparedCorpus],
        tokenizer: TextTokenizer,
        *,
        split: str,
        **placement: int,  # seed, rows, rank, world_size
    ) -> None:
        self.corpora = corpora
        self.components = _training(config, corpora) if split == "train" else _validation(config, corpora)
        names, weights = [c.corpus for c in self.components], [c.weight for c in self.components]
        super().__init__(config, tokenizer, names, weights, split=split, **placement)
        self.num_rows = [-(-len(c.part) // config.seq_len) for c in self.components]  # the last one filled up
        self.fingerprint = _combined([corpus.fingerprint for corpus in corpora.values()], config)
        if split == "validation":
            self.validation_rows = self.schedule.rows_served(
                self.num_rows, min(sum(self.num_rows), config.validation_rows or sum(self.num_rows))
            )
            check_placement(split, self.rows, self.rank, self.world_size, self.validation_rows)
        self._orders: dict[int, tuple[int, np.ndarray]] = {}  # component -> (epoch, its rows in the epoch's order)

    def rewind(self) -> None:
        self.consumed = 0

    def _row_index(self, component: int, number: int) -> int:
        """The row of a component that comes number-th, counted over its epochs."""
        epoch, place = divmod(number, self.num_rows[component])
        cached = self._orders.get(component)
        if cached is None or cached[0] != epoch:
            generator = np.random.default_rng([self.seed, epoch, component])
            cached = self._orders[component] = (epoch, generator.permutation(self.num_rows[component]))
        return int(cached[1][place])

    def _read(self, first: int, rows: int) -> Iterator[Row]:
        seq_len = self.config.seq_len
        for number in range(first, first + rows):
            component, index = self.schedule.place(number)
            part = self.components[component].part
            start = self._row_index(component, index) * seq_len
            tokens, ends = part.window(start, min(start + seq_len + 1, len(part)))
            yield cut_row(tokens, ends, seq_len, self.tokenizer.eos_id)

    def __next__(self) -> Batch:
        rows = self.rows
        if self.split == "validation":  # all ranks hand out as many, the last batch may be smaller
            rows = min(rows, (self.validation_rows - self.consumed) // self.world_size)
            if rows <= 0:
                raise StopIteration
        return self._batch(rows)

    def _identity(self) -> dict:
        return {"tokens": self.fingerprint, "seq_len": self.config.seq_len, "seed": self.seed}

    def state_dict(self) -> dict:
        return {**self._identity(), "rows": self.consumed}

    def load_state_dict(self, state: dict) -> None:
        check_state(state, self._identity())
        self.consumed = state["rows"]

    def describe(self) -> dict:
        parts = [component.part for component in self.components]
        return super().describe() | {
            "tokens_fingerprint": self.fingerprint,
            "documents": sum(part.num_documents for part in parts),
            "tokens": sum(len(part) for part in parts),
            "bytes": sum(part.num_bytes for part in parts),
            "rows": sum(self.num_rows) if self.split == "train" else self.validation_rows,
        }

    def unigram_entropy(self) -> float | None:
        """Nats per target of the whole validation split under the training split's unigram distribution."""
        training, validation = _training(self.config, self.corpora), _validation(self.config, self.corpora)
        if not training:
            return None
        return unigram_cross_entropy(_target_counts(training), _target_counts(validation))


class Component(NamedTuple):
    """What rows are drawn from: a corpus, or a length bucket of one."""

    corpus: str
    part: TokenizedPart
    weight: float


def _training(config: PackedDataConfig, corpora: dict[str, PreparedCorpus]) -> list[Component]:
    """The length buckets of all corpora, each with its weight. Empty if only the validation split is prepared."""
    components = []
    bucket_weights = list(config.length_weights) or [1.0] * (len(config.length_buckets) + 1)
    for name, (_, corpus_weight) in config.parts.items():
        buckets = [(part, bucket_weights[bucket] * len(part)) for bucket, part in corpora[name].training.items()]
        total = sum(weight for _, weight in buckets)
        if buckets and not total:
            raise ValueError(f"data.length_weights={bucket_weights} leave nothing of corpus {name} to read")
        components += [Component(name, part, corpus_weight * weight / total) for part, weight in buckets if weight]
    return components


def _validation(config: PackedDataConfig, corpora: dict[str, PreparedCorpus]) -> list[Component]:
    return [Component(name, corpora[name].validation, weight) for name, (_, weight) in config.parts.items()]


def _target_counts(components: list[Component]) -> np.ndarray:
    """How often each token is a target, the components weighted as they are mixed; the total is the tokens'."""
    counts = [component.part.target_counts for component in components]
    if len(counts) == 1:
        return counts[0]
    weights = np.array([component.weight for component in components])
    shares = [count / count.sum() * weight for count, weight in zip(counts, weights / weights.sum(), strict=True)]
    return sum(shares) * sum(count.sum() for count in counts)


def _combined(fingerprints: list[str], config: PackedDataConfig) -> str:
    """One fingerprint of what is mixed, and how."""
    if len(fingerprints) == 1 and not config.length_weights:
        return fingerprints[0]
    return fingerprint(fingerprints, [weight for _, weight in config.parts.values()], list(config.length_weights))


class StreamedTextStream(TextStream):
    """Training documents tokenised as they arrive, in stored order, epoch after epoch.

    Every rank reads and tokenises all documents and keeps its own rows: the order of rows then needs no agreement
    between ranks, and no number of ranks is special. Where that is too slow, prepare the corpus.
    """

    def __init__(
        self, config: PackedDataConfig, tokenizer: TextTokenizer, cache_dir: str | Path, **placement: int
    ) -> None:
        weights = [weight for _, weight in config.parts.values()]
        super().__init__(config, tokenizer, list(config.parts), weights, split="train", **placement)
        self.fingerprint = _combined(
            [
                fingerprint(corpus_fingerprint(corpus, cache_dir), config.validation_fraction, tokenizer.fingerprint())
                for corpus, _ in config.parts.values()
            ],
            config,
        )
        self.rewind()

    def rewind(self) -> None:
        self.consumed = 0
        self._readers = [_Reader(corpus, self.config, self.tokenizer) for corpus, _ in self.config.parts.values()]

    def _read(self, first: int, rows: int) -> Iterator[Row]:
        seq_len = self.config.seq_len
        for number in range(self.consumed, self.consumed + rows * self.world_size):
            component, _ = self.schedule.place(number)
            window = self._readers[component].next_window()
            if first <= number < first + rows:
                yield cut_row(*window, seq_len, self.tokenizer.eos_id)

    def __next__(self) -> Batch:
        return self._batch(self.rows)

    def _identity(self) -> dict:
        return {"stream": self.fingerprint, "seq_len": self.config.seq_len, "seed": self.seed}

    def state_dict(self) -> dict:
        return {**self._identity(), "rows": self.consumed, "readers": [reader.state_dict() for reader in self._readers]}

    def load_state_dict(self, state: dict) -> None:
        check_state(state, self._identity())
        self.consumed = state["rows"]
        for reader, position in zip(self._readers, state["readers"], strict=True):
            reader.load_state_dict(position)

    def describe(self) -> dict:
        return super().describe() | {"stream_fingerprint": self.fingerprint}


class _Reader:
    """The training documents of one corpus as one endless stream of tokens, handed out seq_len at a time.

    Documents are read and tokenised READ_DOCUMENTS at a time. The state is the data set's own before the documents
    that are not yet handed out, and how many of their tokens are.
    """

    def __init__(self, corpus: CorpusConfig, config: PackedDataConfig, tokenizer: TextTokenizer) -> None:
        self.corpus, self.tokenizer = corpus, tokenizer
        self.validation_fraction, self.seq_len = config.validation_fraction, config.seq_len
        # Opened once: files that come or go later do not change the corpus in the middle of a run.
        self._dataset = open_dataset(corpus)
        self.load_state_dict({"epoch": 0, "dataset": None, "offset": 0})

    def state_dict(self) -> dict:
        position = self._pending[0][0] if self._pending else self._position
        return {**position, "offset": self._offset}

    def load_state_dict(self, state: dict) -> None:
        self._position = {"epoch": state["epoch"], "dataset": state["dataset"]}
        self._rows = None  # opened when it is read
        self._pending: list[tuple[dict, int]] = []  # what is read: (position before it, tokens)
        self._tokens = self._ends = np.zeros(0, np.int64)  # of all that is pending
        self._offset = state["offset"]  # tokens of it that are handed out

    def next_window(self) -> tuple[np.ndarray, np.ndarray]:
        """The next seq_len tokens and the one that follows, and where documents end among them, as cut_row takes
        them. The one that follows lacks where a document ends before it."""
        while len(self._tokens) - self._offset < self.seq_len:
            self._read_documents()
        start = self._offset
        tokens, ends = self._tokens[start : start + self.seq_len + 1], self._ends
        first, last = np.searchsorted(ends, [start, start + self.seq_len], side="right")
        window = tokens, ends[first:last] - start
        self._offset += self.seq_len
        while self._pending and self._offset >= self._pending[0][1]:
            _, size = self._pending.pop(0)
            self._tokens, self._ends = self._tokens[size:], self._ends[self._ends > size] - size
            self._offset -= size
        return window

    def _read_documents(self) -> None:
        """Append the next training documents to the pending ones."""
        before = self._position
        texts = self._next_texts()
        documents = self.tokenizer.encode_documents(texts)
        tokens = np.concatenate([np.zeros(0, np.int64), *documents])
        ends = len(self._tokens) + np.cumsum([len(document) for document in documents], dtype=np.int64)
        self._tokens = np.concatenate([self._tokens, tokens])
        self._ends = np.concatenate([self._ends, ends])
        self._pending.append((before, len(tokens)))

    def _next_texts(self) -> list[str]:
        """The training documents among the next ones; at least one, and all of one epoch."""
        texts: list[str] = []
        epochs_begun = 0
        while not texts:
            self._open()
            for _ in range(READ_DOCUMENTS):
                with source_errors(self.corpus):
                    row = next(self._rows, None)
                if row is None:
                    break
                text = row_text(row, self.corpus)
                if text and split_of(text, self.validation_fraction) == "train":
                    texts.append(text)
            if row is None:
                self._position = {"epoch": self._position["epoch"] + 1, "dataset": None}
                self._rows = None
                epochs_begun += 1
                if epochs_begun == 2:
                    raise ValueError("a corpus has no training document; check its files or path")
            else:
                self._position = {"epoch": self._position["epoch"], "dataset": self._dataset.state_dict()}
        return texts

    def _open(self) -> None:
        if self._rows is None:
            self._dataset.set_epoch(self._position["epoch"])  # an epoch begins at the first document ...
            if self._position["dataset"] is not None:
                self._dataset.load_state_dict(self._position["dataset"])  # ... unless it goes on here
            self._rows = iter(self._dataset)
