"""What files hold, as digests that are computed once.

A file whose size and times are those of the last look is not read again. That is a shortcut only: what is compared is
the content, so that a file that was touched, or copied to another place, is the same.
"""

import hashlib
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

from data.cache import fingerprint, from_checked_json, to_checked_json

_SETTLED_SECONDS = 2  # a file that changed so lately may change again without another time; file systems round


def file_digests(paths: Sequence[str], cache_dir: str | Path) -> list[str]:
    """SHA-256 of the content of each file, in hexadecimal; known ones are kept below ``cache_dir``.

    Args:
        paths: absolute.
    """
    found: dict[str, str] = {}
    for folder in sorted({os.path.dirname(path) for path in paths}):
        names = [os.path.basename(path) for path in paths if os.path.dirname(path) == folder]
        digests = _of_folder(folder, names, Path(cache_dir) / "digests" / f"{fingerprint(folder)}.json")
        found |= {os.path.join(folder, name): digest for name, digest in digests.items()}
    return [found[path] for path in paths]


def _of_folder(folder: str, names: Sequence[str], index: Path) -> dict[str, str]:
    known = _known(folder, names, _read(index))
    if len(known) < len(names):
        with suppress(OSError):  # a colleague's cache, which only its owner may write, serves all the same
            index.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(index.with_suffix(".lock")):  # one process reads the files, the others wait for it
                entries = _read(index)
                known = _known(folder, names, entries)
                for name in names:
                    if name not in known:
                        known[name], entries[name] = _look(os.path.join(folder, name))
                entries = {name: entry for name, entry in entries.items() if entry is not None}
                temporary = index.with_suffix(f".{os.getpid()}.tmp")
                try:
                    temporary.write_text(to_checked_json(entries))
                    os.replace(temporary, index)
                finally:
                    temporary.unlink(missing_ok=True)
    return {name: known.get(name) or _look(os.path.join(folder, name))[0] for name in names}


def _read(index: Path) -> dict[str, list]:
    """File name -> its size, times and digest; nothing known without the index, or if it is damaged."""
    try:
        entries = from_checked_json(index.read_bytes())
    except (OSError, ValueError):
        return {}
    return {name: entry for name, entry in entries.items() if isinstance(entry, list) and len(entry) == 4}


def _known(folder: str, names: Sequence[str], entries: dict[str, list]) -> dict[str, str]:
    stats = {name: os.stat(os.path.join(folder, name)) for name in names if name in entries}
    return {name: entries[name][-1] for name, stat in stats.items() if entries[name][:-1] == _state(stat)}


def _state(stat: os.stat_result) -> list[int]:
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _look(path: str) -> tuple[str, list | None]:
    """(digest, the entry to keep: None where a later change might not show in it)."""
    stat = os.stat(path)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    age = time.time() - max(stat.st_mtime, stat.st_ctime)
    is_settled = age > _SETTLED_SECONDS and _state(os.stat(path)) == _state(stat)
    return digest, [*_state(stat), digest] if is_settled else None
