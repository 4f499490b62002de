"""Tokenised documents on disk, in shards that appear whole and are checked as they are read.

A corpus has one or more parts (a split, or one length bucket of it); a shard holds a stretch of the corpus.

    shard-00003/shard.json      documents of the corpus it covers; documents, tokens and UTF-8 bytes of each part
    shard-00003/PART.tokens     raw uint16 or uint32, documents one after another, each with the tokens that begin and
                                end it
    shard-00003/PART.npz        ends: uint32 [documents], where each ends; targets: int64 [vocab_size], how often each
                                token is a target; checks: uint32 [blocks], CRC-32 of each 64 KiB of PART.tokens
"""

import io
import os
import shutil
import uuid
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data.cache import from_checked_json, to_checked_json

SHARD = "shard.json"
BLOCK = 2**16  # bytes
_COUNTS = ("documents", "tokens", "bytes")  # of a part


def shard_name(index: int) -> str:
    return f"shard-{index:05d}"


class DamagedShardError(ValueError):
    """A shard that does not hold what was written."""

    def __init__(self, shard: Path, problem: str) -> None:
        self.problem = problem
        super().__init__(
            f"{shard} is damaged ({problem}): `python -m experiments.training.prepare` with the arguments of the "
            "run finds all damaged shards and makes them again"
        )


def sync(path: Path) -> None:
    """Force a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class _PartWriter:
    def __init__(self, path: Path, vocab_size: int) -> None:
        self.path = path
        self.file = open(path, "wb")  # noqa: SIM115 (closed by finish)
        self.lengths: list[np.ndarray] = []
        self.tokens = self.bytes = 0
        self.targets = np.zeros(vocab_size, np.int64)

    def add(self, tokens: np.ndarray, lengths: np.ndarray, num_bytes: int) -> None:
        self.file.write(tokens.tobytes())
        self.lengths.append(lengths)
        self.tokens += len(tokens)
        self.bytes += num_bytes
        # Every token is a target but the first of each document.
        firsts = tokens[np.cumsum(lengths) - lengths]
        for counted, sign in ((tokens, 1), (firsts, -1)):
            self.targets += sign * np.bincount(counted, minlength=len(self.targets))

    def finish(self) -> dict:
        self.file.close()
        ends = np.cumsum(np.concatenate(self.lengths), dtype=np.uint32)
        data = memoryview(np.memmap(self.path, np.uint8, mode="r"))
        checks = np.array([zlib.crc32(data[start : start + BLOCK]) for start in range(0, len(data), BLOCK)], np.uint32)
        np.savez(self.path.with_suffix(".npz"), ends=ends, targets=self.targets, checks=checks)
        return {"documents": len(ends), "tokens": self.tokens, "bytes": self.bytes}


class ShardWriter:
    """Writes one shard into a temporary folder of ``folder``; ``publish`` gives it its name in one step.

    Use as a context manager: what is not published by the end is removed.
    """

    def __init__(self, folder: Path, index: int, dtype: np.dtype, vocab_size: int) -> None:
        self.target = folder / shard_name(index)
        self.temporary = folder / f".{self.target.name}.{uuid.uuid4().hex}"
        self.temporary.mkdir()
        self.dtype, self.vocab_size = dtype, vocab_size
        self.parts: dict[str, _PartWriter] = {}

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_) -> None:
        for part in self.parts.values():
            part.file.close()
        shutil.rmtree(self.temporary, ignore_errors=True)

    @property
    def tokens(self) -> int:
        return sum(part.tokens for part in self.parts.values())

    def add(self, part: str, tokens: np.ndarray, lengths: np.ndarray, num_bytes: int) -> None:
        """Append documents: their tokens, one after another, the tokens of each (int64), and their bytes together."""
        if part not in self.parts:
            self.parts[part] = _PartWriter(self.temporary / f"{part}.tokens", self.vocab_size)
        self.parts[part].add(tokens.astype(self.dtype, copy=False), lengths, num_bytes)

    def publish(self, documents: int) -> None:
        """documents: how many of the corpus the shard covers, those that went into no part included."""
        summary = {name: writer.finish() for name, writer in sorted(self.parts.items())}
        (self.temporary / SHARD).write_text(to_checked_json({"documents": documents, "parts": summary}))
        for path in (*self.temporary.iterdir(), self.temporary):
            sync(path)
        try:
            os.replace(self.temporary, self.target)
        except OSError:
            if not (self.target / SHARD).exists():  # else another process has just published the same
                raise
        sync(self.target.parent)


def read_summary(shard: Path) -> dict:
    """What shard.json holds. Raises DamagedShardError if it cannot be read."""
    try:
        summary = from_checked_json((shard / SHARD).read_bytes())
        parts = {name: {key: int(part[key]) for key in _COUNTS} for name, part in summary["parts"].items()}
        return {"documents": int(summary["documents"]), "parts": parts}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedShardError(shard, f"{SHARD}: {error}") from None


@dataclass
class _PartOfShard:
    """One part of one shard, opened when it is first read; each block is checked when it is first read."""

    shard: Path
    part: str
    dtype: np.dtype
    documents: int
    size: int  # tokens
    tokens: np.ndarray | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        path = self.shard / f"{self.part}.tokens"
        expected, found = self.size * self.dtype.itemsize, path.stat().st_size if path.exists() else 0
        if found != expected:
            raise DamagedShardError(self.shard, f"{path.name} has {found} bytes instead of {expected}")

    def load(self, *names: str) -> list[np.ndarray]:
        """Arrays of PART.npz, whose own checksums are verified before they are parsed."""
        path = self.shard / f"{self.part}.npz"
        try:
            with zipfile.ZipFile(path) as archive:
                members = [io.BytesIO(archive.read(f"{name}.npy")) for name in names]
            return [np.lib.format.read_array(member, allow_pickle=False) for member in members]
        except Exception as error:  # zipfile, which is told what to read by the damaged file, has many kinds
            raise DamagedShardError(self.shard, f"{path.name}: {error}") from None

    def open(self) -> None:
        if self.tokens is None:
            self.ends, self.checks = self.load("ends", "checks")
            if len(self.ends) != self.documents or self.ends[-1] != self.size:
                raise DamagedShardError(self.shard, f"{self.part}.npz does not fit {SHARD}")
            self.tokens = np.memmap(self.shard / f"{self.part}.tokens", self.dtype, mode="r")
            self.bytes = memoryview(self.tokens.view(np.uint8))
            self.checked = np.zeros(len(self.checks), bool)

    def check(self, start: int, stop: int) -> None:
        """Verify the blocks that hold tokens [start, stop)."""
        size = self.dtype.itemsize
        for block in range(start * size // BLOCK, -(-stop * size // BLOCK)):
            if not self.checked[block]:
                first = block * BLOCK
                if zlib.crc32(self.bytes[first : first + BLOCK]) != self.checks[block]:
                    raise DamagedShardError(self.shard, f"{self.part}.tokens, the 64 KiB at byte {first}")
                self.checked[block] = True

    def window(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        self.open()
        self.check(start, stop)
        first, last = np.searchsorted(self.ends, [start, stop], side="right")
        return self.tokens[start:stop], self.ends[first:last].astype(np.int64) - start


class TokenizedPart:
    """All documents of one part of a corpus, one after another over the shards.

    Attributes:
        target_counts: int64 [vocab_size].
        num_documents, num_bytes: of the documents, in UTF-8.
    """

    def __init__(self, shards: list[Path], part: str, dtype: np.dtype, vocab_size: int) -> None:
        summaries = [(shard, read_summary(shard)["parts"].get(part)) for shard in shards]
        summaries = [(shard, summary) for shard, summary in summaries if summary is not None]
        self.num_documents = sum(summary["documents"] for _, summary in summaries)
        self.num_bytes = sum(summary["bytes"] for _, summary in summaries)
        self._shards = [_PartOfShard(shard, part, dtype, s["documents"], s["tokens"]) for shard, s in summaries]
        self._starts = np.cumsum([0, *(shard.size for shard in self._shards)])
        self._vocab_size = vocab_size

    def __len__(self) -> int:
        """Tokens."""
        return int(self._starts[-1])

    @property
    def target_counts(self) -> np.ndarray:
        return sum((shard.load("targets")[0] for shard in self._shards), np.zeros(self._vocab_size, np.int64))

    def window(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [start, stop), and the distances from start at which documents end in (start, stop], int64.

        Raises:
            DamagedShardError: those tokens are not what was written.
        """
        assert 0 <= start < stop <= len(self)
        first, last = np.searchsorted(self._starts, [start, stop - 1], side="right") - 1
        pieces = []
        for index in range(first, last + 1):
            shard, origin = self._shards[index], int(self._starts[index])
            tokens, ends = shard.window(max(start - origin, 0), min(stop - origin, shard.size))
            pieces.append((tokens, ends + max(origin - start, 0)))
        if len(pieces) == 1:
            return pieces[0]
        tokens, ends = zip(*pieces, strict=True)
        return np.concatenate(tokens), np.concatenate(ends)

    def verify(self) -> None:
        """Read and check everything. Raises DamagedShardError."""
        for shard in self._shards:
            shard.open()
            shard.check(0, shard.size)
            shard.load("targets")
