"""Tokenizers: a byte-level BPE trained on the corpus, a tokenizer.json, or one from the Hugging Face hub."""

import os
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data.cache import build_once, fingerprint
from data.config import PackedDataConfig
from data.corpora import corpus_fingerprint, iterate_documents, split_of

TRAINER_VERSION = 1  # raise it when train_bpe gives other tokenizers than before


class TextTokenizer:
    """Text to token ids and back. Special tokens spelled out in a text are encoded as the text they are.

    Attributes:
        name: the tokenizer.json, or the name on the hub, that it was loaded from.
    """

    def __init__(self, backend: Tokenizer, eos_token: str, name: str | None = None) -> None:
        eos_id = backend.token_to_id(eos_token)
        if eos_id is None:
            raise ValueError(
                f"the tokenizer has no token {eos_token!r}; name its end-of-document token in data.eos_token"
            )
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True
        self.backend = backend
        self.name = name
        self.eos_token = eos_token
        self.eos_id: int = eos_id
        # Ids may have gaps, so the largest one counts, not the number of tokens.
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_markup(self, text: str) -> list[int]:
        """Of text of our own, such as a chat template: special tokens spelled out in it are those tokens."""
        self.backend.encode_special_tokens = False
        try:
            return self.encode(text)
        finally:
            self.backend.encode_special_tokens = True

    def decode(self, ids: list[int]) -> str:
        return self.backend.decode(ids, skip_special_tokens=False)

    def fingerprint(self) -> str:
        return fingerprint(self.backend.to_str(), self.eos_token)

    def save(self, path: str | Path) -> None:
        """Write a tokenizer.json, atomically."""
        partial = f"{path}.{os.getpid()}.tmp"
        self.backend.save(partial)
        os.replace(partial, path)

    @classmethod
    def load(cls, name: str, eos_token: str) -> "TextTokenizer":
        """From a tokenizer.json or a hub name. ValueError when there is none, or it lacks ``eos_token``."""
        if Path(name).is_file():
            return cls(Tokenizer.from_file(name), eos_token, name)
        if name.endswith(".json"):
            raise ValueError(f"data.tokenizer={name!r} is no file")
        try:
            return cls(Tokenizer.from_pretrained(name), eos_token, name)
        except ValueError:
            raise
        except Exception as error:  # the Rust side raises bare Exceptions
            raise ValueError(f"data.tokenizer={name!r} is neither a file nor on the hub: {error}") from error


def train_bpe(texts: Iterator[str], vocab_size: int, eos_token: str) -> Tokenizer:
    """A byte-level BPE (as GPT-2's): all 256 bytes are tokens, so any text survives encode and decode unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[eos_token],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def build_tokenizer(config: PackedDataConfig, cache_dir: str | Path) -> TextTokenizer:
    """The corpora's tokenizer; a trained one comes from the cache when corpora and settings are the same."""
    if config.tokenizer is not None:
        return TextTokenizer.load(config.tokenizer, config.eos_token)

    def build(folder: Path) -> None:
        texts = _training_texts(config)
        train_bpe(texts, config.vocab_size, config.eos_token).save(str(folder / "tokenizer.json"))

    settings = [config.vocab_size, config.tokenizer_bytes, config.eos_token, config.validation_fraction]
    corpora = [(corpus_fingerprint(corpus), weight) for corpus, weight in config.parts.values()]
    key = fingerprint(TRAINER_VERSION, corpora, settings)
    folder = build_once(Path(cache_dir) / "tokenizers" / key, build)
    return TextTokenizer.load(str(folder / "tokenizer.json"), config.eos_token)


def _training_texts(config: PackedDataConfig) -> Iterator[str]:
    """Each corpus's first training documents, tokenizer_bytes of text in all, shared out by weight."""
    total = sum(weight for _, weight in config.parts.values())
    for name, (corpus, weight) in config.parts.items():
        read = 0
        for document in iterate_documents(corpus):
            if split_of(document.text, config.validation_fraction) == "train":
                yield document.text
                read += len(document.text.encode("utf-8"))
                if read >= config.tokenizer_bytes * weight / total:
                    break
        if read == 0:
            raise ValueError(f"corpus {name} has no training document; check its files or path and its caps")
