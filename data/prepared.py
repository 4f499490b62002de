"""A corpus tokenised once and kept on disk, so that all runs of a sweep read the same tokens.

A cache entry is a folder with, for each split, NAME.tokens (raw uint16 or uint32), NAME.offsets.npy (int64
[documents + 1]) and NAME.targets.npy (int64 [vocab_size], how often each token is a target), and meta.json.
"""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.cache import build_once, fingerprint
from data.config import TextDataConfig
from data.corpora import corpus_fingerprint, iterate_documents, split_of
from data.tokenizer import TextTokenizer

FORMAT_VERSION = 1  # raise it when the files or the tokens in them change
ENCODE_BATCH = 256  # documents


@dataclass(frozen=True)
class TokenizedSplit:
    """The documents of one split, one after another, each ending with the end-of-document token."""

    fingerprint: str
    tokens: np.ndarray  # uint16 or uint32 [num_tokens], memory-mapped
    offsets: np.ndarray  # int64 [documents + 1]
    target_counts: np.ndarray  # int64 [vocab_size]
    num_bytes: int  # UTF-8 bytes of the documents


class _SplitWriter:
    def __init__(self, folder: Path, name: str, dtype: np.dtype, vocab_size: int) -> None:
        self.folder, self.name, self.dtype = folder, name, dtype
        self.file = open(folder / f"{name}.tokens", "wb")  # noqa: SIM115 (closed by finish)
        self.lengths: list[int] = []
        self.num_tokens = 0
        self.num_bytes = 0
        self.target_counts = np.zeros(vocab_size, np.int64)

    def add(self, ids: list[int], num_bytes: int) -> None:
        tokens = np.asarray(ids, dtype=self.dtype)
        self.file.write(tokens.tobytes())
        self.lengths.append(len(tokens))
        self.num_tokens += len(tokens)
        self.num_bytes += num_bytes
        np.add.at(self.target_counts, tokens[1:], 1)

    def finish(self) -> dict:
        self.file.close()
        np.save(self.folder / f"{self.name}.offsets.npy", np.cumsum([0, *self.lengths], dtype=np.int64))
        np.save(self.folder / f"{self.name}.targets.npy", self.target_counts)
        return {"num_tokens": self.num_tokens, "num_bytes": self.num_bytes}


def prepare(
    config: TextDataConfig,
    tokenizer: TextTokenizer,
    cache_dir: str | Path,
    *,
    splits: tuple[str, ...] = ("train", "validation"),
    max_tokens: int | None = None,
) -> dict[str, TokenizedSplit]:
    """Tokenise `splits` of the corpus, or find them in the cache. With max_tokens, stop once they hold as
    many.

    Raises ValueError when a split has no document.
    """

    def build(folder: Path) -> None:
        dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
        writers = {name: _SplitWriter(folder, name, dtype, tokenizer.vocab_size) for name in splits}
        documents = _split_documents(config, splits)
        while batch := list(itertools.islice(documents, ENCODE_BATCH)):
            encoded = tokenizer.encode_batch([text for _, text in batch])
            for (name, text), ids in zip(batch, encoded, strict=True):
                writers[name].add([*ids, tokenizer.eos_id], len(text.encode()))
            if max_tokens is not None and sum(writer.num_tokens for writer in writers.values()) >= max_tokens:
                break
        meta = {"dtype": dtype.name, "splits": {name: writer.finish() for name, writer in writers.items()}}
        for name, writer in writers.items():
            if writer.num_tokens == 0:
                raise ValueError(
                    f"the corpus has no {name} document; take more of it, or change "
                    f"data.validation_fraction={config.validation_fraction}"
                )
        (folder / "meta.json").write_text(json.dumps(meta, indent=1))

    key = fingerprint(FORMAT_VERSION, corpus_fingerprint(config), tokenizer.fingerprint(), splits, max_tokens)
    folder = build_once(Path(cache_dir) / "tokens" / key, build)
    meta = json.loads((folder / "meta.json").read_text())
    return {
        name: TokenizedSplit(
            fingerprint=key,
            tokens=np.memmap(folder / f"{name}.tokens", dtype=meta["dtype"], mode="r"),
            offsets=np.load(folder / f"{name}.offsets.npy"),
            target_counts=np.load(folder / f"{name}.targets.npy"),
            num_bytes=meta["splits"][name]["num_bytes"],
        )
        for name in splits
    }


def _split_documents(config: TextDataConfig, splits: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for document in iterate_documents(config):
        name = split_of(document.text, config.validation_fraction)
        if name in splits:
            yield name, document.text


def unigram_cross_entropy(train_counts: np.ndarray, validation_counts: np.ndarray) -> float:
    """Nats per validation target under the training targets' unigram distribution, add-one smoothed."""
    log_probabilities = np.log((train_counts + 1) / (train_counts.sum() + len(train_counts)))
    return float(-(validation_counts * log_probabilities).sum() / validation_counts.sum())
