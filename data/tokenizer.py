"""Tokenizers: a byte-level BPE trained on the corpus, a tokenizer.json, or one from the Hugging Face hub."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from dashattn.fields import user_path
from data.cache import build_once, fingerprint
from data.config import NO_TOKEN, PackedDataConfig
from data.corpora import corpus_fingerprint, iterate_documents, split_of

DEFAULT_EOS = "<|endoftext|>"
TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"
# Of a folder's settings, what is kept beside the tokenizer.
_KEPT = ("bos_token", "eos_token", "add_bos_token", "add_eos_token", "chat_template")
# What ``save_folder`` adds: the tokens that begin and end documents, which need not be those that the folder calls
# bos_token and eos_token (the end of a turn in a chat, say); and what the tokenizer was when it was saved.
_BEGIN, _END, _FINGERPRINT = "begin_of_document", "end_of_document", "fingerprint"
LARGEST_ID = 2**24
TRAINER_VERSION = 1  # raise it when train_bpe gives other tokenizers than before


class TextTokenizer:
    """Text to token ids and back. Special tokens spelled out in a text are encoded as the text they are.

    Attributes:
        name: the file, the folder or the name on the hub that it was loaded from.
        bos_token, bos_id: begin every document and prompt; None: nothing does.
        eos_token, eos_id: end every document.
        settings: what its folder says besides: ``bos_token`` and ``chat_template``, where there are any.
    """

    def __init__(
        self,
        backend: Tokenizer,
        eos_token: str,
        name: str | None = None,
        settings: dict | None = None,
        bos_token: str | None = None,
    ) -> None:
        eos_id = backend.token_to_id(eos_token)
        if eos_id is None:
            raise ValueError(
                f"the tokenizer has no token {eos_token!r}; name its end-of-document token in data.eos_token"
            )
        bos_id = None if bos_token is None else backend.token_to_id(bos_token)
        if bos_token is not None and bos_id is None:
            raise ValueError(
                f"the tokenizer has no token {bos_token!r}; name the one that begins its documents in data.bos_token, "
                f"or {NO_TOKEN}"
            )
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True
        self.backend = backend
        self.name = name
        self.bos_token, self.eos_token = bos_token, eos_token
        self.settings = settings or {}
        self.bos_id: int | None = bos_id
        self.eos_id: int = eos_id
        # Ids may have gaps, so the largest one counts, not the number of tokens.
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def named_bos_id(self) -> int | None:
        """The token that begins documents, or the one that the tokenizer calls so though it puts it before none."""
        named = self.settings.get("bos_token")
        return self.bos_id if self.bos_id is not None or named is None else self.backend.token_to_id(named)

    def encode(self, text: str) -> list[int]:
        """Of a piece of text, without what begins or ends a document."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, text: str) -> list[int]:
        """Of text that a model continues: the beginning of a document."""
        return self.begin(self.encode(text))

    def encode_documents(self, texts: list[str]) -> list[list[int]]:
        """Whole documents, each from the token that begins it to the one that ends it."""
        begin = [] if self.bos_id is None else [self.bos_id]
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [[*begin, *encoding.ids, self.eos_id] for encoding in encodings]

    def begin(self, ids: list[int]) -> list[int]:
        """``ids`` behind the token that begins a document, if there is one; once, where they begin with it already."""
        return ids if self.bos_id is None or ids[:1] == [self.bos_id] else [self.bos_id, *ids]

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
        """Differs with the tokens of any document."""
        begin = [] if self.bos_token is None else [self.bos_token]
        return fingerprint(self.backend.to_str(), self.eos_token, *begin)

    def has_tokens_of(self, other: "TextTokenizer") -> bool:
        """Whether every token is the same here and there, whichever of them begin and end documents."""

        def tokens(tokenizer: TextTokenizer) -> dict:
            # How an encoding is framed is read off elsewhere.
            return json.loads(tokenizer.backend.to_str()) | {"post_processor": None}

        return tokens(self) == tokens(other)

    def framing(self) -> "TextTokenizer":
        """The same tokenizer for those who let it put before a text what begins a document, as transformers does."""
        backend = Tokenizer.from_str(self.backend.to_str())
        if _put_before(backend) == ([] if self.bos_token is None else [self.bos_token]):
            return self
        begin = [] if self.bos_token is None else [(self.bos_token, self.bos_id)]
        single = " ".join([*(token for token, _ in begin), "$A"])
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=begin)
        return TextTokenizer(backend, self.eos_token, self.name, self.settings, self.bos_token)

    def save(self, path: str | Path) -> None:
        """Write a tokenizer.json, atomically."""
        partial = Path(f"{path}.{os.getpid()}.tmp")
        try:
            _write(self.backend, partial)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def save_folder(self, folder: Path) -> None:
        """Write what ``load`` and transformers read, a tokenizer.json and its settings; the folder appears whole."""
        partial = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            self.write_files(partial)
            os.replace(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def write_files(self, folder: Path) -> None:
        """The files of ``save_folder``, into a folder that exists."""
        _write(self.backend, folder / TOKENIZER)
        # What the folder called its end may be that of a turn in a chat, not of a document: it stays.
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.eos_token, **self.settings}
        settings |= {_BEGIN: self.bos_token or NO_TOKEN, _END: self.eos_token, _FINGERPRINT: self.fingerprint()}
        (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")

    @classmethod
    def load(cls, name: str, eos_token: str | None = None, bos_token: str | None = None) -> "TextTokenizer":
        """From a tokenizer.json, a folder that holds one, or a hub name.

        Args:
            eos_token: None = what the folder names, else ``DEFAULT_EOS``.
            bos_token: ``NO_TOKEN`` = nothing begins a document; None = what the tokenizer itself puts before a text.

        Raises:
            ValueError: there is none, it is damaged, it is another than the one that was saved there, or it lacks the
                token that begins or ends a document.
        """
        path = user_path(name)
        if path.is_dir():
            path = path / TOKENIZER
            if not path.exists():
                raise ValueError(
                    f"{name} has no {TOKENIZER}: let transformers make it, AutoTokenizer.from_pretrained(...)"
                    ".save_pretrained(...), or name another in data.tokenizer"
                )
        if path.exists():
            backend, settings, folder = _read_tokenizer(path), _read_settings(path.parent), path.parent
        elif name.endswith(".json"):
            raise ValueError(f"data.tokenizer={name!r} does not exist")
        else:
            backend, settings, folder = _from_hub(name), {}, None
        backend.no_padding()
        backend.no_truncation()
        saved = settings.pop(_FINGERPRINT, None)
        own_end = settings.pop(_END, None) or settings.get("eos_token")
        own_end = own_end or (folder and _eos_by_id(folder, backend)) or DEFAULT_EOS
        own_begin = None if bos_token is not None and saved is None else _own_bos(backend, settings)
        if saved is not None and cls(backend, own_end, name, settings, own_begin).fingerprint() != saved:
            raise ValueError(
                f"{name} is another tokenizer than was saved there (its fingerprint in {SETTINGS} is {saved}): restore "
                f"it, or remove that entry if it is meant"
            )
        settings.pop(_BEGIN, None)
        begin = own_begin if bos_token is None else None if bos_token == NO_TOKEN else bos_token
        return cls(backend, eos_token or own_end, name, settings, begin)


def _write(backend: Tokenizer, path: Path) -> None:
    """Not by its own ``save``, which tells a full disk by an Exception of no kind."""
    path.write_text(backend.to_str(pretty=True), encoding="utf-8")


def _from_hub(name: str) -> Tokenizer:
    try:
        return Tokenizer.from_pretrained(name)
    except Exception as error:  # the Rust side raises bare Exceptions
        raise ValueError(f"data.tokenizer={name!r} is neither a file nor on the hub: {error}") from error


def _read_tokenizer(path: Path) -> Tokenizer:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): copy the file again") from None
    if content.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is the pointer of Git LFS ({len(content)} bytes): fetch the file with `git lfs pull`")
    try:
        backend = Tokenizer.from_str(content.decode())
        largest = max(backend.get_vocab(with_added_tokens=True).values(), default=0)
        if largest > LARGEST_ID:  # it counts up to there, for every word that is asked of it
            raise ValueError(f"it has a token with the number {largest}")
        return backend
    except BaseException as error:  # the Rust side raises bare Exceptions, and panics past them
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise ValueError(f"{path} is no tokenizer ({len(content)} bytes; {error}): copy the file again") from None


def _read_settings(folder: Path) -> dict:
    """What a folder's files say of special tokens and chats; where they differ, tokenizer_config.json counts."""
    settings = {}
    for name in ("special_tokens_map.json", SETTINGS):
        given = _read_object(folder / name)
        for key in (*_KEPT, _BEGIN, _END, _FINGERPRINT):
            value = given.get(key)
            if isinstance(value, dict):  # a token with options of how it is matched
                value = value.get("content")
            kind = bool if key.startswith("add_") else str
            if isinstance(value, kind) or (key == "chat_template" and isinstance(value, list)):
                settings[key] = value
    if (folder / "chat_template.jinja").is_file():
        settings["chat_template"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    return settings


def _own_bos(backend: Tokenizer, settings: dict) -> str | None:
    """The token that begins documents where nothing else is said. Raises ValueError if a tokenizer has several."""
    if _BEGIN in settings:
        return None if settings[_BEGIN] == NO_TOKEN else settings[_BEGIN]
    before = _put_before(backend)
    if len(before) > 1:
        raise ValueError(f"the tokenizer puts {before} before a text: name one in data.bos_token, or {NO_TOKEN}")
    return before[0] if before else None


def _put_before(backend: Tokenizer) -> list[str]:
    """What the tokenizer's own file puts before a text; transformers, too, asks no other where there is the file."""
    alone, framed = (backend.encode("a", add_special_tokens=framed).tokens for framed in (False, True))
    return framed[: next((n for n in range(len(framed)) if framed[n : n + len(alone)] == alone), 0)]


def _eos_by_id(folder: Path, backend: Tokenizer) -> str | None:
    """The token whose number a checkpoint's configuration gives."""
    eos_id = _read_object(folder / "config.json").get("eos_token_id")
    if isinstance(eos_id, list):
        eos_id = next(iter(eos_id), None)
    is_number = isinstance(eos_id, int) and not isinstance(eos_id, bool)
    return backend.id_to_token(eos_id) if is_number and 0 <= eos_id <= LARGEST_ID else None


def _read_object(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}): copy the file again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object: copy the file again")
    return value


def train_bpe(texts: Iterator[str], vocab_size: int, *special_tokens: str) -> Tokenizer:
    """A byte-level BPE (as GPT-2's): all 256 bytes are tokens, so any text survives encode and decode unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def build_tokenizer(config: PackedDataConfig, cache_dir: str | Path) -> TextTokenizer:
    """The corpora's tokenizer; a trained one comes from the cache when corpora and settings are the same."""
    if config.tokenizer is not None:
        return TextTokenizer.load(config.tokenizer, config.eos_token, config.bos_token)
    eos_token = config.eos_token or DEFAULT_EOS
    bos_token = None if config.bos_token == NO_TOKEN else config.bos_token
    special_tokens = [token for token in (eos_token, bos_token) if token is not None]

    def build(folder: Path) -> None:
        backend = train_bpe(_training_texts(config), config.vocab_size, *special_tokens)
        TextTokenizer(backend, eos_token, bos_token=bos_token).write_files(folder)

    settings = [config.vocab_size, config.tokenizer_bytes, *special_tokens, config.validation_fraction]
    corpora = [(corpus_fingerprint(corpus, cache_dir), weight) for corpus, weight in config.parts.values()]
    key = fingerprint(TRAINER_VERSION, corpora, settings)
    folder = build_once(Path(cache_dir) / "tokenizers" / key, build)
    try:
        return TextTokenizer.load(str(folder), eos_token, config.bos_token)
    except ValueError as error:
        raise ValueError(f"{error}; or remove {folder}: the same tokenizer is trained again") from None


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
