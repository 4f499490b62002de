"""Gather text files into a corpus: clean them, drop what is no text and what is there twice, write one .jsonl.

    python -m data.collect corpora/linux_doc.jsonl linux-doc-6.1_*.deb --match '*/Documentation/*.rst.gz'
    python -m data.collect corpora/linux_source.jsonl linux-source-6.1_*.deb --match '*.c' '*.h'
    python -m data.collect corpora/notes.jsonl ~/notes 'books/**/*.txt'

A source is a file, a folder with all that is below it, a glob, a tar archive, or a Debian package (`apt-get download
NAME` fetches one without installing it; reading it needs dpkg-deb). Archives inside archives are opened, .gz files
unpacked, HTML is reduced to its text. The result is a corpus for ``data.source=files``.
"""

import argparse
import fnmatch
import glob
import gzip
import io
import json
import os
import re
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path

from data.corpora import digest

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")
HTML = (".html", ".htm", ".xhtml")
# A document has so many bytes, and so many of its characters are letters or spaces: fewer are tables and dumps.
SMALLEST, LARGEST = 256, 1_000_000
LEAST_TEXT = 0.5
_BLOCKS = re.compile("p|div|br|li|tr|h[1-6]|pre|table|[uod]l|d[td]|section|article|blockquote")
_SILENT = re.compile("script|style|head|nav|footer")


def read_sources(sources: Iterable[str], patterns: list[str]) -> Iterator[tuple[str, bytes]]:
    """(name, content) of every file below the sources whose name fits a pattern (all if there is none).

    Raises:
        ValueError: a source does not exist, or is no archive although it is called one.
    """
    for source in sources:
        paths = sorted(glob.glob(os.path.expanduser(source), recursive=True))
        if not paths:
            raise ValueError(f"{source} matches no file")
        for path in map(Path, paths):
            files = sorted(path.rglob("*")) if path.is_dir() else [path]
            for file in files:
                if file.is_file():
                    yield from _read_file(file, patterns)


def _fits(name: str, patterns: list[str]) -> bool:
    return not patterns or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _read_file(path: Path, patterns: list[str]) -> Iterator[tuple[str, bytes]]:
    try:
        if path.suffix == ".deb":
            with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(path)], stdout=subprocess.PIPE) as process:
                yield from _read_archive(process.stdout, str(path), patterns)
        elif path.name.endswith(ARCHIVES):
            with path.open("rb") as file:
                yield from _read_archive(file, str(path), patterns)
        elif _fits(str(path), patterns):
            yield str(path), path.read_bytes()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _read_archive(file: io.BufferedIOBase, name: str, patterns: list[str]) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=file, mode="r|*") as archive:
        for member in archive:
            inside = f"{name}/{member.name.removeprefix('./')}"
            if not member.isfile():
                continue
            if member.name.endswith(ARCHIVES):
                yield from _read_archive(archive.extractfile(member), inside, patterns)
            elif _fits(inside, patterns):
                yield inside, archive.extractfile(member).read()


def clean(name: str, content: bytes) -> str | None:
    """The text of a file as a document; None if it is none: too short or long, binary, or hardly any words."""
    if name.endswith(".gz"):
        name, content = name.removesuffix(".gz"), gzip.decompress(content)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    if name.endswith(HTML):
        text = html_text(text)
    text = re.sub(r"[ \t\f\v]+\n", "\n", text.replace("\r\n", "\n") + "\n")
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
    """What a reader of the page sees, without navigation; blocks on lines of their own, <pre> as it is."""
    parser = _TextOfHTML()
    parser.feed(page)
    parser.close()
    return re.sub(r"\n(?: *\n)+", "\n\n", "".join(parser.pieces))


def collect(output: Path, sources: Iterable[str], patterns: list[str]) -> Counter:
    """Write ``output`` in one step; returns how many files became documents, were dropped, or were there before."""
    counts: Counter = Counter()
    seen: set[bytes] = set()
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        with partial.open("w", encoding="utf-8") as file:
            for name, content in read_sources(sources, patterns):
                text = clean(name, content)
                key = digest(text) if text else None
                fate = "no documents" if text is None else "duplicates" if key in seen else "documents"
                counts[fate] += 1
                if fate == "documents":
                    seen.add(key)
                    counts["bytes"] += len(text.encode())
                    file.write(json.dumps({"text": text, "name": name}, ensure_ascii=False) + "\n")
        if not counts["documents"]:
            raise ValueError(f"no document among {sum(counts.values())} files: check the sources and --match")
        os.replace(partial, output)
    finally:
        partial.unlink(missing_ok=True)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="the .jsonl to write")
    parser.add_argument("sources", nargs="+", help="files, folders, globs, tar archives, .deb packages")
    parser.add_argument("--match", nargs="+", default=[], metavar="GLOB", help="take only files of such names")
    arguments = parser.parse_args()
    if arguments.output.suffix != ".jsonl":
        parser.error(f"{arguments.output} must end in .jsonl")
    try:
        counts = collect(arguments.output, arguments.sources, arguments.match)
    except ValueError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {arguments.output} cannot be written ({error}): make room, or name another place")
    print(
        f"{arguments.output}: {counts['documents']:,} documents, {counts['bytes'] / 1e6:,.1f} MB; left out: "
        f"{counts['no documents']:,} files that are none, {counts['duplicates']:,} duplicates"
    )


if __name__ == "__main__":
    main()
