"""Documents of local files. Of a file only the text is parsed; what cannot be read is left out, counted and named."""

import bz2
import functools
import gzip
import io
import json
import lzma
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from data.config import CorpusConfig

COMPRESSED = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open, ".zst": None}  # None: PyArrow's decoder
_PIECE = 2**20  # characters of a text file that are read at a time
_SHOWN = 10  # of what is left out, by name


class DataSourceError(ValueError):
    """A corpus that the configuration may name rightly, but that cannot be read now."""


@functools.cache
def tell(text: str) -> None:
    """On stderr; once, however often a process reads a corpus."""
    print(text, file=sys.stderr)


class LeftOut:
    """Counts the rows and files of a corpus that cannot be read, and ends where they are too many.

    Attributes:
        count: how many there were.
        first: the first of them, and why.
    """

    def __init__(self, corpus: CorpusConfig) -> None:
        self.corpus, self.count, self.first = corpus, 0, ""

    def add(self, place: str, why: object) -> None:
        """Raises DataSourceError if that is one more than ``bad_rows``."""
        text = f"{place}: {' '.join(str(why).split())[:300]}"
        self.count += 1
        self.first = self.first or text
        check_bad_rows(self.count, f"the last of them {text}", self.corpus)
        if self.count <= _SHOWN:
            tell(f"left out: {text}")

    def end(self, found: bool) -> None:
        """Raises DataSourceError if nothing else was there."""
        if self.count and not found:
            raise DataSourceError(f"data.files has no document; {self.count} rows or files were left out: {self.first}")
        if self.count > _SHOWN:
            tell(f"left out: {self.count} rows and files in all, the first of them {self.first}")


def check_bad_rows(count: int, which: str, corpus: CorpusConfig) -> None:
    """Raises DataSourceError if so many rows and files are more than may be left out."""
    if count > corpus.bad_rows:
        raise DataSourceError(
            f"{count} rows or files of data.files cannot be read, more than data.bad_rows={corpus.bad_rows}, {which}; "
            "mend them, or raise data.bad_rows"
        )


def file_kind(path: str) -> str | None:
    """``text``, ``lines`` (of JSON), ``json`` or ``parquet``, by the name; None: of another kind."""
    stem, suffix = os.path.splitext(path.lower())
    suffix = os.path.splitext(stem)[1] if suffix in COMPRESSED else suffix
    return {".txt": "text", ".jsonl": "lines", ".ndjson": "lines", ".json": "json", ".parquet": "parquet"}.get(suffix)


def file_texts(
    paths: Sequence[str], corpus: CorpusConfig, left_out: LeftOut | None = None, *, are_all: bool = True
) -> Iterator[str]:
    """The documents of the files, one after the other, without empty ones.

    Args:
        left_out: counts what cannot be read.
        are_all: these are all files of the corpus, which must have a document.

    Raises:
        DataSourceError: too much of them is damaged, or all of it.
        OSError: a file is not there, or the disk does not give it: that may pass, and nothing is left out for it.
    """
    left_out, found = left_out or LeftOut(corpus), False
    is_cut = corpus.document_separator is None or "text" not in map(file_kind, paths)
    for path in paths:
        is_text = file_kind(path) == "text"
        try:
            for number, text in enumerate(_read(path, corpus, left_out)):
                is_cut |= is_text and number > 0
                if text:
                    found = True
                    yield text
        except DataSourceError:
            raise
        except Exception as error:  # decompression and parsers: each has errors of its own
            if getattr(error, "errno", None) is not None:
                raise
            left_out.add(path, f"{type(error).__name__}: {error}")
    left_out.end(found or not are_all)
    if are_all and not is_cut:
        told = f"data.document_separator={corpus.document_separator!r} is in no text file of data.files"
        tell(f"{told}: each of them is one document")


def _read(path: str, corpus: CorpusConfig, left_out: LeftOut) -> Iterator[str]:
    """The documents of one file; an empty one for a row that is null, and for white space between separators."""
    kind = file_kind(path)
    if kind == "parquet":
        yield from _texts(path, _parquet_values(path, corpus), lambda value: value.as_py(), corpus, left_out)
        return
    with _opened(path) as file:
        if kind == "text":
            pieces = split_text(io.TextIOWrapper(file, encoding="utf-8"), corpus)
            yield from (piece if piece.strip() else "" for piece in pieces)
        else:
            rows = _lines(file) if kind == "lines" else _json_rows(file)
            yield from _texts(path, rows, lambda row: _json_value(row, corpus), corpus, left_out)


def _texts(
    path: str, rows: Iterable, value_of: Callable[[Any], Any], corpus: CorpusConfig, left_out: LeftOut
) -> Iterator[str]:
    for number, row in enumerate(rows, start=1):
        try:
            text = text_of(value_of(row), corpus)
        except (ValueError, RecursionError) as error:
            left_out.add(f"{path}, row {number}", error)
        else:
            yield text


def _json_value(row: Any, corpus: CorpusConfig) -> Any:
    if row == b"":  # a line with nothing in it
        return None
    row = json.loads(row) if isinstance(row, bytes) else row
    if not isinstance(row, dict):
        raise ValueError(f"it is {type(row).__name__}, no JSON object")
    return column(row, corpus)


def column(row: dict, corpus: CorpusConfig) -> Any:
    """What a row has as its text. ValueError without the column."""
    if corpus.text_column not in row:
        raise ValueError(f"data.text_column={corpus.text_column!r} is not among the columns {sorted(row)}")
    return row[corpus.text_column]


def text_of(value: Any, corpus: CorpusConfig) -> str:
    """A value as a document; empty for null. ValueError if it is no text."""
    if isinstance(value, bytes):
        value = value.decode()
    if value is not None and not isinstance(value, str):
        raise ValueError(f"data.text_column={corpus.text_column!r} holds {type(value).__name__}, not text")
    (value or "").encode()  # lone surrogates are a UnicodeEncodeError, which is a ValueError
    return value or ""


def _opened(path: str) -> BinaryIO:
    suffix = Path(path).suffix.lower()
    if suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"))
    return COMPRESSED.get(suffix, open)(path, "rb")


def _lines(file: BinaryIO) -> Iterator[bytes]:
    for line in file:
        yield line.removeprefix(b"\xef\xbb\xbf").strip()


def _json_rows(file: BinaryIO) -> Iterator[Any]:
    """A list of rows, a row on each line, or rows that take several lines."""
    lines, head = _lines(file), []
    for line in lines:
        head.append(line)
        if line:
            break
    try:
        is_a_row = bool(head) and isinstance(json.loads(head[-1]), dict)
    except ValueError:
        is_a_row = False
    if is_a_row:
        yield from head
        yield from lines
        return
    rest, decoder = b"\n".join([*head, *lines]).decode().strip(), json.JSONDecoder()
    while rest:
        value, end = decoder.raw_decode(rest)
        yield from value if isinstance(value, list) else [value]
        rest = rest[end:].strip()


def _parquet_values(path: str, corpus: CorpusConfig) -> Iterator[Any]:
    import pyarrow.parquet as parquet

    with parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if corpus.text_column not in names:
            raise ValueError(f"data.text_column={corpus.text_column!r} is not among the columns {sorted(names)}")
        for batch in file.iter_batches(columns=[corpus.text_column]):
            yield from batch.column(0)


def split_text(file: io.TextIOBase, corpus: CorpusConfig) -> Iterator[str]:
    """A text file as documents: cut at each separator, or where it is longer than ``document_bytes``, at the end of a
    paragraph, else of a line, in the second half of that."""
    separator, most = corpus.document_separator, corpus.document_bytes
    rest = ""
    while piece := file.read(_PIECE):
        begin, seen = 0, max(len(rest) - len(separator or "") + 1, 0)  # one may end in this piece
        rest += piece
        if separator is not None:
            while (end := rest.find(separator, max(begin, seen))) >= 0:
                yield rest[begin:end]
                begin = end + len(separator)
            rest = rest[begin:]
        elif most is not None:
            while len(rest) > most:
                ends = (rest.rfind(end, most // 2, most) + len(end) for end in ("\n\n", "\n", " "))
                cut = next((end for end in ends if end > most // 2), most)
                yield rest[:cut]
                rest = rest[cut:]
    yield rest
