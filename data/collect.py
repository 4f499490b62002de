"""Gather text files into a corpus: clean them, drop what is no text and what is there twice, write one .jsonl.

    python -m data.collect corpora/linux_doc.jsonl linux-doc-6.1_*.deb --match '*/Documentation/*.rst.gz'
    python -m data.collect corpora/linux_source.jsonl linux-source-6.1_*.deb --match '*.c' '*.h'
    python -m data.collect corpora/notes.jsonl ~/notes 'books/**/*.txt'

A source is a file, a folder with all that is below it, a glob, a tar or zip archive, or a Debian package (`apt-get
download NAME` fetches one without installing it; reading it needs dpkg-deb). Archives inside archives are opened, .gz
files unpacked, HTML is reduced to its text. The result is a corpus for ``data.source=files``. What cannot be read, or
only too far, is left out, counted and named; the rest goes on.
"""

import argparse
import bz2
import fnmatch
import glob
import gzip
import io
import json
import lzma
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import BinaryIO

from dashattn.fields import user_path
from data.corpora import digest

TARS = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")
HTML = (".html", ".htm", ".xhtml")
# A document has so many bytes, and so many of its characters are letters or spaces: fewer are tables and dumps.
SMALLEST, LARGEST = 256, 1_000_000
LEAST_TEXT = 0.5
# Of a file so many bytes are read, unpacked, and of an archive so many in all, for each packed one and besides.
LARGEST_FILE = 4 * LARGEST
MOST_UNPACKED, MOST_RATIO = 2**28, 200
LARGEST_ZIP = 2**28  # inside another archive, where it is held in memory
_PENDING, _CHUNK, _REST = 2**20, 2**16, 2000  # characters of HTML: see ``html_text``
_BLOCKS = re.compile("p|div|br|li|tr|h[1-6]|pre|table|[uod]l|d[td]|section|article|blockquote")
_SILENT = re.compile("script|style|head|nav|footer")

Skip = Callable[[str, str], None]  # of what is left out: its name, and why


class TooLarge(OSError):
    """More than is read of one file."""


def read_sources(sources: Iterable[str], patterns: list[str], skip: Skip) -> Iterator[tuple[str, bytes]]:
    """(name, content) of every file below the sources whose name fits a pattern (all if there is none).

    Links that lead out of a folder are not followed.

    Raises:
        ValueError: a source does not exist.
    """
    for source in sources:
        given = str(user_path(source))
        paths = [given] if os.path.exists(given) else sorted(glob.glob(given, recursive=True))
        if not paths:
            raise ValueError(f"{source} {'matches no file' if glob.has_magic(given) else 'does not exist'}")
        for path in map(Path, paths):
            for file in _entries(path, skip) if path.is_dir() else [path]:
                with _leaving_out(str(file), skip):
                    if file.is_symlink() and file != path and not file.resolve().is_relative_to(path.resolve()):
                        skip(str(file), "a link that leads out of the folder")
                    elif file.is_file():
                        yield from _read_file(file, patterns, skip)


def _entries(folder: Path, skip: Skip) -> list[Path]:
    """All that is below a folder, sorted; links to folders are not followed."""
    found, folders = [], [folder]
    while folders:
        here = folders.pop()
        with _leaving_out(str(here), skip), os.scandir(here) as entries:
            for entry in entries:
                found.append(Path(entry.path))
                if entry.is_dir(follow_symlinks=False):
                    folders.append(found[-1])
    return sorted(found)


def _fits(name: str, patterns: list[str]) -> bool:
    return not patterns or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


@contextmanager
def _leaving_out(name: str, skip: Skip) -> Iterator[None]:
    """What cannot be read inside is told to ``skip``, and what follows goes on."""
    try:
        yield
    except Exception as error:  # decompression, archives and the file system: each has errors of its own
        skip(name, f"{type(error).__name__}: {error}")


def _read_file(path: Path, patterns: list[str], skip: Skip) -> Iterator[tuple[str, bytes]]:
    with _leaving_out(str(path), skip):
        if path.suffix.lower() == ".deb":
            command = ["dpkg-deb", "--fsys-tarfile", str(path)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
                size = path.stat().st_size  # dpkg-deb unpacks it
                yield from _read_tar(process.stdout, str(path), patterns, skip, lambda: size)
        else:
            with path.open("rb") as file:
                yield from _read_opened(file, str(path), patterns, skip)


def _read_opened(file: BinaryIO, name: str, patterns: list[str], skip: Skip) -> Iterator[tuple[str, bytes]]:
    lower = name.lower()
    if lower.endswith(TARS):
        yield from _read_tar(file, name, patterns, skip)
    elif lower.endswith(".zip"):
        yield from _read_zip(file, name, patterns, skip)
    elif _fits(name, patterns):
        yield name, _read(gzip.GzipFile(fileobj=file) if lower.endswith(".gz") else file)


def _read(file: BinaryIO, most: int | None = None) -> bytes:
    """All of a file, up to a bound: what it unpacks to may be a million times what it is."""
    most = most or LARGEST_FILE
    content = file.read(most + 1)
    if len(content) > most:
        raise TooLarge(f"more than {most:,} bytes")
    return content


class _Bounded(io.RawIOBase):
    """What an archive unpacks to, as long as that is in proportion to what was read of it."""

    def __init__(self, unpacked: BinaryIO, packed: Callable[[], int]) -> None:
        self.unpacked, self.packed, self.count = unpacked, packed, 0

    def read(self, size: int = -1) -> bytes:
        content = self.unpacked.read(size)
        self.count += len(content)
        if self.count > MOST_UNPACKED + MOST_RATIO * self.packed():
            raise TooLarge(f"it unpacks to more than {self.count:,} bytes, {MOST_RATIO} times what it is")
        return content


class _Counted(io.RawIOBase):
    def __init__(self, file: BinaryIO) -> None:
        self.file, self.count = file, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        content = self.file.read(len(buffer))
        buffer[: len(content)] = content
        self.count += len(content)
        return len(content)


def _read_tar(
    file: BinaryIO, name: str, patterns: list[str], skip: Skip, packed: Callable[[], int] | None = None
) -> Iterator[tuple[str, bytes]]:
    counted = _Counted(file)
    buffered = io.BufferedReader(counted, _CHUNK)
    magic = buffered.peek(6)
    kinds = ((b"\x1f\x8b", gzip.open), (b"\xfd7zXZ\0", lzma.open), (b"BZh", bz2.open))
    opened = next((open_(buffered) for start, open_ in kinds if magic.startswith(start)), buffered)
    with tarfile.open(fileobj=_Bounded(opened, packed or (lambda: counted.count)), mode="r|") as archive:
        for member in archive:
            inside = f"{name}/{member.name.removeprefix('./')}"
            if member.isfile():
                with _leaving_out(inside, skip):
                    yield from _read_opened(archive.extractfile(member), inside, patterns, skip)


def _read_zip(file: BinaryIO, name: str, patterns: list[str], skip: Skip) -> Iterator[tuple[str, bytes]]:
    is_on_disk = isinstance(getattr(file, "raw", None), io.FileIO)
    seekable = file if is_on_disk else io.BytesIO(_read(file, LARGEST_ZIP))
    with zipfile.ZipFile(seekable) as archive:
        for member in archive.infolist():
            inside = f"{name}/{member.filename}"
            if not member.is_dir():
                with _leaving_out(inside, skip), archive.open(member) as opened:
                    yield from _read_opened(opened, inside, patterns, skip)


def clean(name: str, content: bytes) -> str | None:
    """The text of a file as a document; None if it is none: too short or long, binary, or hardly any words."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    if name.lower().removesuffix(".gz").endswith(HTML):
        text = html_text(text)
    text = "\n".join(line.rstrip(" \t\f\v") for line in text.replace("\r\n", "\n").split("\n"))
    text = re.sub(r"\n{4,}", "\n\n\n", text).strip("\n") + "\n"
    if "\0" in text or not SMALLEST <= len(text.encode()) <= LARGEST:
        return None
    words = re.sub(r"[^\w\s]+|[\d_]+", "", text)
    return text if len(words) >= LEAST_TEXT * len(text) else None


class _TextOfHTML(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self.silent: tuple[str, int] | None = None  # the element that is left out, how many of its kind are open
        self.literal = 0

    def handle_starttag(self, tag: str, attrs: list) -> None:
        about = dict(attrs)
        if self.silent:
            self.silent = (self.silent[0], self.silent[1] + (tag == self.silent[0]))
        elif (
            _SILENT.fullmatch(tag)
            or about.get("role") == "navigation"
            or about.get("class") in ("headerlink", "footer")
        ):
            self.silent = (tag, 1)
        self._at(tag, 1)

    def handle_endtag(self, tag: str) -> None:
        if self.silent and tag == self.silent[0]:
            self.silent = (tag, self.silent[1] - 1) if self.silent[1] > 1 else None
        self._at(tag, -1)

    def _at(self, tag: str, opens: int) -> None:
        if tag == "pre":
            self.literal = max(self.literal + opens, 0)
        if _BLOCKS.fullmatch(tag) and not self.silent:
            self.pieces.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.silent:
            if not self.literal:
                data = re.sub(r"\s+", " ", data)
                data = data.lstrip() if self.pieces and self.pieces[-1].endswith("\n") else data
            self.pieces.append(data)


def html_text(page: str) -> str:
    """What a reader of the page sees, without navigation; blocks on lines of their own, <pre> as it is.

    Where a tag is not closed the parser begins again at every one behind it, which takes hours for a page of a
    megabyte: so long a tag is no HTML, and what is left open at the end is left out.
    """
    parser = _TextOfHTML()
    for start in range(0, len(page), _CHUNK):
        parser.feed(page[start : start + _CHUNK])
        if len(parser.rawdata) > _PENDING:
            break
    if len(parser.rawdata) <= _REST:
        parser.close()
    return re.sub(r"\n(?: *\n)+", "\n\n", "".join(parser.pieces))


def collect(output: Path, sources: Iterable[str], patterns: list[str], skip: Skip = lambda name, why: None) -> Counter:
    """Write ``output`` in one step; returns how many files became documents, were dropped, or were there before.

    Args:
        skip: is told the name of what cannot be read, and why.
    """
    counts: Counter = Counter()
    seen: set[bytes] = set()

    def left_out(name: str, why: str) -> None:
        counts["unreadable"] += 1
        skip(_printable(name), why)

    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    own = {os.path.abspath(path) for path in (output, partial)}  # which may lie in a source
    try:
        with partial.open("w", encoding="utf-8") as file:
            for name, content in read_sources(sources, patterns, left_out):
                if os.path.abspath(name) in own:
                    continue
                text = clean(name, content)
                key = digest(text) if text else None
                fate = "no documents" if text is None else "duplicates" if key in seen else "documents"
                counts[fate] += 1
                if fate == "documents":
                    seen.add(key)
                    counts["bytes"] += len(text.encode())
                    file.write(json.dumps({"text": text, "name": _printable(name)}, ensure_ascii=False) + "\n")
        if not counts["documents"]:
            raise ValueError(
                f"no document among {sum(counts.values())} files, {counts['unreadable']} of which cannot be read: "
                "check the sources and --match"
            )
        os.replace(partial, output)
    finally:
        partial.unlink(missing_ok=True)
    return counts


def _printable(name: str) -> str:
    """A file's name may hold bytes that are no text, which Python keeps as lone surrogates."""
    return name.encode(errors="surrogateescape").decode(errors="replace")


def main() -> None:
    parser = argparse.ArgumentParser(
        "dashattn corpus", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="the .jsonl to write")
    parser.add_argument("sources", nargs="+", help="files, folders, globs, tar archives, .deb packages")
    parser.add_argument("--match", nargs="+", default=[], metavar="GLOB", help="take only files of such names")
    arguments = parser.parse_args()
    if arguments.output.suffix != ".jsonl":
        parser.error(f"{arguments.output} must end in .jsonl")

    def skip(name: str, why: str) -> None:
        print(f"left out: {name} ({why})", file=sys.stderr)

    try:
        arguments.output = user_path(arguments.output)
        counts = collect(arguments.output, arguments.sources, arguments.match, skip)
    except ValueError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {arguments.output} cannot be written ({error}): make room, or name another place")
    print(
        f"{arguments.output}: {counts['documents']:,} documents, {counts['bytes'] / 1e6:,.1f} MB; left out: "
        f"{counts['no documents']:,} files that are none, {counts['duplicates']:,} duplicates, "
        f"{counts['unreadable']:,} that cannot be read"
    )


if __name__ == "__main__":
    main()
