"""A directory of results that is built once, appears whole, and may be asked for by many processes at a time."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


def fingerprint(*parts: object) -> str:
    """16 hex digits that depend on the JSON text of ``parts``."""
    text = json.dumps(parts, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def to_checked_json(value: dict) -> str:
    """JSON that tells damage: with ``check``, the fingerprint of the rest."""
    return json.dumps({**value, "check": fingerprint(value)}, indent=1) + "\n"


def from_checked_json(text: bytes) -> dict:
    """The value that ``to_checked_json`` took; without ``check``, which files did not always have, it is believed.

    Raises:
        ValueError: it is another.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        value = None
    if not isinstance(value, dict):
        raise ValueError("it holds no JSON object")
    if "check" in value and value.pop("check") != fingerprint(value):
        raise ValueError("it has another checksum")
    return value


def build_once(directory: Path, build: Callable[[Path], None]) -> Path:
    """Return ``directory``, filled by ``build(folder)`` unless it exists.

    The lock lets one process build while the others wait. Where a file system ignores locks, two may build: each does
    so in a folder of its own and the first rename wins, so a reader never sees a half-written result.
    """
    if directory.exists():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(directory.with_name(directory.name + ".lock")):
        if directory.exists():
            return directory
        # Not mkdtemp's, which would shut colleagues out of a cache they share.
        folder = directory.with_name(f"{directory.name}.tmp-{os.getpid()}-{time.time_ns()}")
        folder.mkdir()
        try:
            build(folder)
            os.replace(folder, directory)
        except OSError as error:
            if not directory.exists():
                raise OSError(error.errno, error.strerror, str(directory)) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return directory
