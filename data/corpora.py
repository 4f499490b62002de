"""Corpora as iterators of documents, in a fixed order, each document in one split for good."""

import functools
import glob
import hashlib
import itertools
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data.cache import fingerprint
from data.config import TextDataConfig

BUILDERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
COMPRESSED = (".gz", ".zst", ".xz", ".bz2")

# Source files outside these sizes (bytes) are stubs or generated tables.
SMALLEST_SOURCE, LARGEST_SOURCE = 256, 256 * 1024


class Document(NamedTuple):
    id: str
    text: str


def digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()


def split_of(text: str, validation_fraction: float) -> str:
    """`train` or `validation`, from the content alone: no copy of a document can be in both, in any order or
    corpus."""
    share = int.from_bytes(digest(text), "big") / 2**64
    return "validation" if share < validation_fraction else "train"


def iterate_documents(config: TextDataConfig) -> Iterator[Document]:
    """The corpus's documents, both splits, at most max_documents and no more once max_bytes are reached."""
    documents = _python_sources() if config.source == "python_stdlib" else _dataset_documents(config)
    total_bytes = 0
    for document in itertools.islice(documents, config.max_documents):
        yield document
        total_bytes += len(document.text.encode("utf-8"))
        if config.max_bytes is not None and total_bytes >= config.max_bytes:
            return


def corpus_fingerprint(config: TextDataConfig) -> str:
    """Changes with the documents, their order or their split, as far as can be told without reading them: Python
    sources by name and size, files by size and time too, a hub data set by its revision only."""
    if config.source == "python_stdlib":
        contents = [(name, size) for _, name, size in _list_python_sources()]
    elif config.source == "files":
        stats = [(path, os.stat(path)) for path in data_files(config)]
        contents = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats] + [config.text_column]
    else:
        contents = [config.path, config.config_name, config.hub_split, config.revision, config.text_column]
    return fingerprint(config.source, contents, config.max_documents, config.max_bytes, config.validation_fraction)


# Hugging Face datasets: hub and local files


def data_files(config: TextDataConfig) -> list[str]:
    """Absolute paths of all files that data.files names, sorted. ValueError when a pattern matches
    nothing."""
    paths: set[str] = set()
    for pattern in config.files:
        matches = [path for path in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(path)]
        if not matches:
            raise ValueError(f"data.files has {pattern!r}, which matches no file")
        paths.update(os.path.abspath(path) for path in matches)
    return sorted(paths)


def _builder(paths: list[str]) -> str:
    """The `datasets` builder for files of one kind."""
    kinds = set()
    for path in paths:
        stem, suffix = os.path.splitext(path)
        kinds.add(os.path.splitext(stem)[1] if suffix in COMPRESSED else suffix)
    builders = {BUILDERS.get(kind) for kind in kinds}
    if len(builders) != 1 or None in builders:
        raise ValueError(f"data.files must be of one kind out of {', '.join(BUILDERS)}; found {sorted(kinds)}")
    return builders.pop()


def open_dataset(config: TextDataConfig, streaming: bool = True):
    """The `datasets` object behind a hub or files corpus. ValueError when it has no column
    data.text_column."""
    import datasets  # takes seconds, and generated tasks do without

    if config.source == "hub":
        dataset = datasets.load_dataset(
            config.path,
            config.config_name,
            split=config.hub_split,
            revision=config.revision,
            streaming=streaming,
        )
    else:
        paths = data_files(config)
        builder = _builder(paths)
        options = {"sample_by": "document"} if builder == "text" else {}
        dataset = datasets.load_dataset(builder, data_files=paths, split="train", streaming=streaming, **options)
    columns = dataset.column_names
    if columns is not None and config.text_column not in columns:
        raise ValueError(f"data.text_column={config.text_column!r} is not among the columns {columns}")
    return dataset


def row_text(row: dict, config: TextDataConfig) -> str:
    """The document in one row of a data set; empty for a null. ValueError when it has no text column."""
    if config.text_column not in row:
        raise ValueError(f"data.text_column={config.text_column!r} is not among the columns {sorted(row)}")
    text = row[config.text_column]
    if text is not None and not isinstance(text, str):
        raise ValueError(f"data.text_column={config.text_column!r} holds {type(text).__name__}, not text")
    return text or ""


def _dataset_documents(config: TextDataConfig) -> Iterator[Document]:
    # Local files need no second copy as Arrow tables, and of a capped hub corpus only the head is downloaded.
    # A hub corpus that is read whole is downloaded as usual, so that a copy already on this machine serves
    # offline.
    capped = config.max_documents is not None or config.max_bytes is not None
    streaming = config.source == "files" or config.streaming or capped
    for index, row in enumerate(open_dataset(config, streaming)):
        if text := row_text(row, config):
            yield Document(str(index), text)


# python_stdlib: the Python sources on this machine


@functools.cache
def _list_python_sources() -> list[tuple[Path, str, int]]:
    """(path, name, bytes) of the .py files of the standard library and of site-packages, in the order of a
    hash of the name, so that the head of the list samples all packages alike."""
    paths = sysconfig.get_paths()
    sources = {}
    for root in (paths["stdlib"], paths["purelib"], paths["platlib"]):
        for folder, subfolders, names in os.walk(root):
            if root == paths["stdlib"]:  # the site-packages of the Python that a virtual environment stems from
                subfolders[:] = [name for name in subfolders if name not in ("site-packages", "dist-packages")]
            for name in names:
                if name.endswith(".py"):
                    path = Path(folder, name)
                    relative = path.relative_to(root).as_posix()
                    size = path.stat().st_size if path.exists() else 0
                    if SMALLEST_SOURCE <= size <= LARGEST_SOURCE:
                        sources.setdefault(relative, (path, relative, size))
    return sorted(sources.values(), key=lambda source: digest(source[1]))


def _python_sources() -> Iterator[Document]:
    seen = set()
    for path, name, _ in _list_python_sources():
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        key = digest(text)
        if key not in seen:  # packages vendor one another
            seen.add(key)
            yield Document(name, text)
