"""Streams of packed text: from the tokenised cache, or tokenised while training."""

import numpy as np

from data.batch import Batch, BatchStream, check_placement, check_state
from data.cache import fingerprint
from data.config import TextDataConfig
from data.corpora import corpus_fingerprint, open_dataset, row_text, split_of
from data.packing import Row, collate, cut_row
from data.prepared import TokenizedSplit, unigram_cross_entropy
from data.tokenizer import TextTokenizer


class PreparedTextStream(BatchStream):
    """Rows of a tokenised split. Training walks through all rows in an order of its own in each epoch, a
    function of (seed, epoch); a global micro-batch is the next world_size * rows of them, and a rank takes
    its share of those. The state counts rows over all ranks, so it also serves another number of ranks or
    rows. Validation reads the same rows for every seed."""

    def __init__(
        self,
        config: TextDataConfig,
        splits: dict[str, TokenizedSplit],
        tokenizer: TextTokenizer,
        *,
        split: str,
        seed: int,
        rows: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.config, self.splits, self.tokenizer = config, splits, tokenizer
        self.split, self.seed = split, seed if split == "train" else 0
        self.rows, self.rank, self.world_size = rows, rank, world_size
        self.vocab_size = tokenizer.vocab_size
        self.source = splits[split]
        self.num_rows = -(-len(self.source.tokens) // config.seq_len)  # the last one filled up
        self.validation_rows = min(self.num_rows, config.validation_rows or self.num_rows)
        check_placement(split, rows, rank, world_size, self.validation_rows)
        self._order: tuple[int, np.ndarray] | None = None
        self.rewind()

    def rewind(self) -> None:
        self.consumed = 0  # rows handed out by all ranks

    def _row_index(self, number: int) -> int:
        """The row that comes number-th in training, counted over the epochs."""
        epoch, place = divmod(number, self.num_rows)
        if self._order is None or self._order[0] != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.num_rows)
            self._order = (epoch, order)
        return int(self._order[1][place])

    def _row(self, number: int) -> Row:
        start = self._row_index(number) * self.config.seq_len
        return cut_row(self.source.tokens, self.source.offsets, start, self.config.seq_len, self.tokenizer.eos_id)

    def __next__(self) -> Batch:
        rows = self.rows
        if self.split == "validation":  # all ranks hand out as many, the last batch may be smaller
            rows = min(rows, (self.validation_rows - self.consumed) // self.world_size)
            if rows <= 0:
                raise StopIteration
        first = self.consumed + self.rank * rows
        batch = collate([self._row(number) for number in range(first, first + rows)], self.config.pack)
        self.consumed += rows * self.world_size
        return batch

    def _identity(self) -> dict:
        return {"tokens": self.source.fingerprint, "seq_len": self.config.seq_len, "seed": self.seed}

    def state_dict(self) -> dict:
        return {**self._identity(), "rows": self.consumed}

    def load_state_dict(self, state: dict) -> None:
        check_state(state, self._identity())
        self.consumed = state["rows"]

    def describe(self) -> dict:
        return {
            "source": self.config.source,
            "split": self.split,
            "tokens_fingerprint": self.source.fingerprint,
            "documents": len(self.source.offsets) - 1,
            "tokens": len(self.source.tokens),
            "bytes": self.source.num_bytes,
            "rows": self.num_rows if self.split == "train" else self.validation_rows,
            "seq_len": self.config.seq_len,
            "vocab_size": self.vocab_size,
        }

    def unigram_entropy(self) -> float | None:
        """Nats per target of the whole validation split under the training split's unigram distribution."""
        if "train" not in self.splits:
            return None
        return unigram_cross_entropy(self.splits["train"].target_counts, self.splits["validation"].target_counts)


class StreamedTextStream(BatchStream):
    """Training documents tokenised as they arrive, in stored order, epoch after epoch; each rank reads its
    own.

    A row begins where the last one ended, inside a document perhaps. The state is therefore the data set's
    own state before that document, and the tokens of the document that are already in rows: resuming repeats
    no more than reading one document. It belongs to one rank of a fixed number of ranks.
    """

    def __init__(
        self,
        config: TextDataConfig,
        tokenizer: TextTokenizer,
        *,
        rows: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        check_placement("train", rows, rank, world_size)
        self.config, self.tokenizer, self.split = config, tokenizer, "train"
        self.rows, self.rank, self.world_size = rows, rank, world_size
        self.vocab_size = tokenizer.vocab_size
        self.fingerprint = fingerprint(corpus_fingerprint(config), tokenizer.fingerprint())
        self.rewind()

    def rewind(self) -> None:
        self._restart({"epoch": 0, "documents": 0, "dataset": None}, offset=0)

    def _restart(self, before: dict, offset: int) -> None:
        """Go to the token `offset` of the document that follows the reader's position `before`."""
        self._epoch, self._documents = before["epoch"], before["documents"]
        self._open(before["dataset"])
        self._pending: list[tuple[dict, np.ndarray]] = []  # (position before the document, its tokens)
        self._offset = offset  # tokens of the first pending document that are already in rows

    def _open(self, dataset_state: dict | None) -> None:
        from datasets.distributed import split_dataset_by_node

        dataset = open_dataset(self.config)
        self._dataset = split_dataset_by_node(dataset, rank=self.rank, world_size=self.world_size)
        self._dataset_state = dataset_state
        if dataset_state is not None:
            self._dataset.load_state_dict(dataset_state)
        self._iterator = iter(self._dataset)

    def _position(self) -> dict:
        return {"epoch": self._epoch, "documents": self._documents, "dataset": self._dataset_state}

    def _read_document(self) -> None:
        """Append the next training document to the pending ones."""
        epochs_begun = 0
        while True:
            before = self._position()
            row = next(self._iterator, None)
            if row is None:
                epochs_begun += 1
                if epochs_begun == 2:
                    raise ValueError(f"rank {self.rank} of {self.world_size} finds no training document in the corpus")
                self._epoch += 1
                self._open(None)
                continue
            self._dataset_state = self._dataset.state_dict()
            self._documents += 1
            text = row_text(row, self.config)
            if text and split_of(text, self.config.validation_fraction) == "train":
                tokens = np.asarray([*self.tokenizer.encode(text), self.tokenizer.eos_id], dtype=np.int64)
                self._pending.append((before, tokens))
                return

    def _next_row(self) -> Row:
        seq_len = self.config.seq_len
        while sum(len(tokens) for _, tokens in self._pending) - self._offset < seq_len:
            self._read_document()
        tokens = np.concatenate([tokens for _, tokens in self._pending])
        offsets = np.cumsum([0, *(len(tokens) for _, tokens in self._pending)], dtype=np.int64)
        row = cut_row(tokens, offsets, self._offset, seq_len, self.tokenizer.eos_id)
        self._offset += seq_len
        while self._pending and self._offset >= len(self._pending[0][1]):
            self._offset -= len(self._pending.pop(0)[1])
        return row

    def __next__(self) -> Batch:
        return collate([self._next_row() for _ in range(self.rows)], self.config.pack)

    def _identity(self) -> dict:
        return {
            "stream": self.fingerprint,
            "seq_len": self.config.seq_len,
            "rank": self.rank,
            "world_size": self.world_size,
        }

    def state_dict(self) -> dict:
        before = self._pending[0][0] if self._pending else self._position()
        return {**self._identity(), **before, "offset": self._offset}

    def load_state_dict(self, state: dict) -> None:
        check_state(state, self._identity())
        self._restart({key: state[key] for key in ("epoch", "documents", "dataset")}, offset=state["offset"])

    def describe(self) -> dict:
        return {
            "source": self.config.source,
            "split": self.split,
            "stream_fingerprint": self.fingerprint,
            "seq_len": self.config.seq_len,
            "vocab_size": self.vocab_size,
        }
