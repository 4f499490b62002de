"""Corpora as iterators of documents, in a fixed order, each document in one split for good."""

import contextlib
import functools
import glob
import hashlib
import itertools
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dashattn.fields import user_path
from data.cache import fingerprint
from data.config import CorpusConfig
from data.digests import file_digests
from data.files import DataSourceError, LeftOut, column, file_kind, file_texts, text_of
from data.hub import commit_of, open_hub
from data.recall import RECALL_VERSION, recall_document

# Source files outside these sizes (bytes) are stubs or generated tables.
SMALLEST_SOURCE, LARGEST_SOURCE = 256, 256 * 1024


class Document(NamedTuple):
    id: str
    text: str


def digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()


def split_of(text: str, validation_fraction: float) -> str:
    """``train`` or ``validation``, from the content alone: no copy of a document can be in both, in any order or
    corpus."""
    share = int.from_bytes(digest(text), "big") / 2**64
    return "validation" if share < validation_fraction else "train"


def iterate_documents(corpus: CorpusConfig, left_out: LeftOut | None = None) -> Iterator[Document]:
    """The corpus's documents, both splits, at most max_documents and no more once max_bytes are reached.

    Args:
        left_out: counts what of its files cannot be read.

    Raises:
        DataSourceError: the corpus cannot be read, or no further.
    """
    if corpus.source == "python_stdlib":
        documents = _python_sources()
    elif corpus.source == "recall":
        documents = (Document(str(index), row["text"]) for index, row in enumerate(_recall_rows(corpus)))
    elif corpus.source == "files":
        documents = _file_documents(corpus, left_out)
    else:
        documents = _dataset_documents(corpus)
    total_bytes = 0
    for document in itertools.islice(documents, corpus.max_documents):
        yield document
        total_bytes += len(document.text.encode("utf-8"))
        if corpus.max_bytes is not None and total_bytes >= corpus.max_bytes:
            return


def corpus_fingerprint(corpus: CorpusConfig, cache_dir: str | Path) -> str:
    """Changes with the documents or their order, and with nothing else: wherever the files lie and whenever they were
    written, their content counts. A hub data set is known by its commit.

    Args:
        cache_dir: keeps the digests of files, which are not read again while their size and times stay.
    """
    if corpus.source == "python_stdlib":
        contents = _python_digest(corpus.max_documents, corpus.max_bytes)
    elif corpus.source == "recall":
        contents = [RECALL_VERSION, corpus.recall_seed, corpus.facts_min, corpus.facts_max, corpus.hay_max]
    elif corpus.source == "files":
        paths = data_files(corpus)
        with source_errors(corpus):
            contents = [*file_digests(paths, cache_dir), corpus.text_column]
            kinds = [file_kind(path) for path in paths]
            if "text" in kinds:
                contents += [corpus.document_separator, corpus.document_bytes]
                if len(set(kinds)) > 1:  # under another name the same bytes are other documents
                    contents += kinds
    else:
        with source_errors(corpus):
            commit = commit_of(corpus.path, corpus.config_name, corpus.revision)
        contents = [corpus.path, corpus.config_name, corpus.hub_split, commit, corpus.text_column]
    return fingerprint(corpus.source, contents, corpus.max_documents, corpus.max_bytes)


@functools.cache
def _python_digest(max_documents: int | None, max_bytes: int | None) -> str:
    """Of the documents that are read of the Python sources on this machine, which a process takes to stay."""
    config = CorpusConfig(source="python_stdlib", max_documents=max_documents, max_bytes=max_bytes)
    total = hashlib.sha256()
    for document in iterate_documents(config):
        total.update(digest(document.text))
    return total.hexdigest()


def _recall_rows(corpus: CorpusConfig) -> Iterator[dict]:
    for index in range(corpus.max_documents):
        yield {"text": recall_document(corpus.recall_seed, index, corpus.facts_min, corpus.facts_max, corpus.hay_max)}


# Hugging Face datasets: hub and local files


def data_files(corpus: CorpusConfig) -> list[str]:
    """Absolute paths of all files that data.files names, in its order, sorted where a pattern matches several: so the
    order is the same wherever they lie. ValueError when a pattern matches nothing."""
    paths: dict[str, None] = {}
    for pattern in corpus.files:
        path = str(user_path(pattern))
        found = [path] if os.path.exists(path) else glob.glob(path, recursive=True)
        matches = [path for path in found if os.path.isfile(path)]
        if not matches:
            is_missing = not (glob.has_magic(path) or os.path.exists(path))
            raise ValueError(
                f"data.files has {pattern!r}, which {'does not exist' if is_missing else 'matches no file'}: name its "
                "place; what was moved is the same there, also to resume a run or, with data=local, to evaluate one"
            )
        paths |= dict.fromkeys(sorted(map(os.path.abspath, matches)))
    unknown = [path for path in paths if file_kind(path) is None]
    if unknown:
        raise ValueError(
            f"data.files has {unknown[0]}: names must end in .txt, .json, .jsonl, .ndjson or .parquet, and packed ones "
            "in .gz, .zst, .xz or .bz2 after that"
        )
    return list(paths)


def _file_documents(corpus: CorpusConfig, left_out: LeftOut | None) -> Iterator[Document]:
    texts = file_texts(data_files(corpus), corpus, left_out)
    for index in itertools.count():
        with source_errors(corpus):
            text = next(texts, None)
        if text is None:
            return
        yield Document(str(index), text)


def _file_rows(corpus: CorpusConfig, paths: list[str]) -> Iterator[dict]:
    for text in file_texts(paths, corpus, are_all=False):
        yield {corpus.text_column: text}


def open_dataset(corpus: CorpusConfig, streaming: bool = True):
    """The ``datasets`` object behind a corpus that can stream.

    Raises:
        ValueError: it has no column data.text_column.
        DataSourceError: it cannot be opened.
    """
    import datasets  # takes seconds, and generated tasks do without

    if corpus.source == "recall":
        return datasets.IterableDataset.from_generator(_recall_rows, gen_kwargs={"corpus": corpus})
    if corpus.source == "files":  # a list is read in parts, so that a resumed run begins at a file, not at the first
        return datasets.IterableDataset.from_generator(
            _file_rows, gen_kwargs={"corpus": corpus, "paths": data_files(corpus)}
        )
    with source_errors(corpus):
        dataset = open_hub(corpus, streaming=streaming)
    columns = dataset.column_names
    if columns is not None and corpus.text_column not in columns:
        raise ValueError(f"data.text_column={corpus.text_column!r} is not among the columns {columns}")
    return dataset


@contextlib.contextmanager
def source_errors(corpus: CorpusConfig) -> Iterator[None]:
    """Turns whatever the libraries below say of a source they cannot read into a DataSourceError."""
    try:
        yield
    except DataSourceError:
        raise
    except Exception as error:  # network, file system, decompression and parsers: each has errors of its own
        name = f"data.path={corpus.path!r}" if corpus.source == "hub" else f"data.files={list(corpus.files)}"
        raise DataSourceError(
            f"{name} cannot be read ({type(error).__name__}: {error}): mend the source or the way to it and start "
            "again; what is prepared or saved stays"
        ) from error


def row_text(row: dict, corpus: CorpusConfig) -> str:
    """The document in one row of a data set; empty for a null. ValueError when it has no text column."""
    return text_of(column(row, corpus), corpus)


def _dataset_documents(corpus: CorpusConfig) -> Iterator[Document]:
    # Of a capped hub corpus only the head is downloaded. One that is read whole is downloaded as usual, so that a copy
    # already on this machine serves offline.
    rows = iter(open_dataset(corpus, streaming=corpus.capped))
    for index in itertools.count():
        with source_errors(corpus):
            row = next(rows, None)
        if row is None:
            return
        if text := row_text(row, corpus):
            yield Document(str(index), text)


# python_stdlib: the Python sources on this machine


@functools.cache
def _list_python_sources() -> list[tuple[str, str]]:
    """(path, name) of the .py files of the standard library and of site-packages, in the order of a hash of the name,
    so that the head of the list samples all packages alike."""
    paths = sysconfig.get_paths()
    sources = {}
    for root in dict.fromkeys((paths["stdlib"], paths["purelib"], paths["platlib"])):
        for folder, subfolders, names in os.walk(root):
            if root == paths["stdlib"]:  # the site-packages of the Python that a virtual environment stems from
                subfolders[:] = [name for name in subfolders if name not in ("site-packages", "dist-packages")]
            within = folder[len(root) + 1 :].replace(os.sep, "/") + "/" if folder != root else ""
            for name in names:
                if name.endswith(".py"):
                    sources.setdefault(within + name, os.path.join(folder, name))
    return sorted(((path, name) for name, path in sources.items()), key=lambda source: digest(source[1]))


def _python_sources() -> Iterator[Document]:
    seen = set()
    for path, name in _list_python_sources():
        try:
            if not SMALLEST_SOURCE <= os.path.getsize(path) <= LARGEST_SOURCE:
                continue
            text = Path(path).read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        key = digest(text)
        if key not in seen:  # packages vendor one another
            seen.add(key)
            yield Document(name, text)
