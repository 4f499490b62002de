"""Where the code lies, and files that a crash or another process cannot leave half written: text replaced in one step,
rows of JSON that several processes add to, and checksums."""

import contextlib
import csv
import errno
import fcntl
import hashlib
import io
import json
import math
import os
import secrets
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from filelock import FileLock

from experiments.columns import CELL_ROWS, METRIC_ROWS, RESULT_ROWS, are_commands

ROOT = Path(__file__).resolve().parents[1]
# For Hydra, which looks a relative path up beside the module that was started.
CONFIGS = str(ROOT / "configs")

# What more than one module writes or reads, by its name in its directory. Of a run:
CONFIG = "config.yaml"
START = "start.json"  # facts that the configuration alone does not tell
TOKENIZER = "tokenizer"  # folder: the tokenizer.json that the tokens were made with, and its settings
GIT = "git.json"
LOCK = ".lock"
REPLACED = ".replaced-"  # in the name of the directory of a run that another took the place of
SUBMITTED = "slurm"  # folder of what Slurm was given, and its logs; written before the run begins
METRICS = "metrics.jsonl"
ANOMALIES = "anomalies.jsonl"
RESULTS = "results.jsonl"
CALIBRATIONS = "calibrations.jsonl"  # knobs that an evaluation found for sparsities
EVALUATING = ".evaluating"  # folder of locks: what evaluations that go side by side have in hand
WEIGHTS = "model.safetensors"  # of a checkpoint
STATE = "state.json"  # of a checkpoint: step, tokens, data position of every rank, hash of the configuration
# Of a sweep:
CELL = "cell.json"  # in a run directory: the commands that completed
CELL_LOCK = ".cell.lock"  # there, too: of the sweep that runs the cell on its machine
PLAN = "cells.json"
CELLS = "cells.jsonl"  # collected: a row for each cell
# Of a benchmark:
SPEED = "speed.jsonl"
NUMERICS = "numerics.jsonl"
THROUGHPUT = "throughput.jsonl"
SCALING = "parallel.jsonl"
_ROWS = {METRICS: METRIC_ROWS, RESULTS: RESULT_ROWS, CELLS: CELL_ROWS}
# Of JSON objects, what the values of keys are where they have them:
_KINDS = {
    START: {"data": dict, "parameters": int, "tokenizer": str | None, "init_from": dict},
    GIT: {"sha": str | None},
    STATE: {"step": int, "tokens": int, "stage": int, "world_size": int, "config_hash": str, "data": list},
}
UNTRAINED = "untrained"  # ends the label of rows of weights that were trained elsewhere


def locked(path: Path) -> FileLock:
    """A context for one process at a time: around what reads ``path`` and writes it anew. Not to be nested."""
    return FileLock(path.with_name(f".{path.name}.lock"), poll_interval=0.01)


def hold(path: Path) -> FileLock:
    """The lock in this file, to be released. Who only looks whether it is held (``is_locked``) has it for a moment, and
    is waited for.

    Raises:
        Timeout: another process holds it.
    """
    lock = FileLock(path)
    lock.acquire(timeout=0.2, poll_interval=0.02)
    return lock


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock in this file, which this user may only be able to read."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def is_foreign(path: Path, *, follow_symlinks: bool = True) -> bool:
    """Whether another user than this process's owns a file."""
    return path.stat(follow_symlinks=follow_symlinks).st_uid != os.geteuid()


def check_writable(directory: Path, mend: str) -> None:
    """Refuse a directory, which need not be there yet, that this user cannot write to, or in which another one's links
    would lead what is written elsewhere.

    Raises:
        ValueError: with ``mend``.
    """
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is no directory: {mend}")
    existing = next(parent for parent in (directory, *directory.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"{directory} cannot be written: {existing} is not writable; {mend}")
    for path in directory.iterdir() if directory.exists() else ():
        if path.is_symlink() and is_foreign(path, follow_symlinks=False):
            raise ValueError(f"{path} is a link of another user to {path.resolve()}: remove it; {mend}")


def check_exists(path: Path, mend: str) -> None:
    """Refuse a path at which nothing is.

    Raises:
        ValueError: with ``mend``.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist: {mend}")


def files_below(root: Path, name: str) -> list[Path]:
    """The files of a name in a directory and below it, sorted, without those of runs that others took the place of."""
    return [path for path in sorted(root.rglob(name)) if REPLACED not in str(path.relative_to(root))]


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Around what writes ``path``: an OSError that names no file, of a full disk say, names it."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_atomically(path: Path, text: str | bytes) -> None:
    """Replace ``path``, so that a reader sees the old text or the new, and a crash or a full disk leaves one of them.

    Raises:
        OSError: it cannot be written; the error names ``path``.
    """
    if path.is_symlink():  # it stays one
        if is_foreign(path, follow_symlinks=False):
            raise OSError(errno.EPERM, "a link of another user", str(path))
        path = path.resolve()
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(text.encode() if isinstance(text, str) else text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error
    sync(path.parent)


def sync(path: Path) -> None:
    """Return when a file's bytes, or a directory's names, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Checksum of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class DamagedFileError(ValueError):
    """A file does not hold what it should.

    Attributes:
        why: what is wrong with it, to stand behind its name.
    """

    def __init__(self, path: Path, why: str, mend: str) -> None:
        super().__init__(f"{path} {why}: {mend}")
        self.why = why


def read_json(path: Path, mend: str = "restore it from a copy", keys: Sequence[str] = ()) -> dict:
    """The object that a file holds.

    Args:
        keys: that it must have.

    Raises:
        DamagedFileError: there is none, or it is damaged; with ``mend``.
    """
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise DamagedFileError(path, f"cannot be read ({error.strerror})", mend) from None
    except (ValueError, RecursionError) as error:  # no UTF-8 is a ValueError, too
        raise DamagedFileError(path, f"is damaged ({error})", mend) from None
    if not isinstance(value, dict):
        raise DamagedFileError(path, "is damaged (it holds no JSON object)", mend)
    lacking = [key for key in keys if key not in value]
    if lacking:
        raise DamagedFileError(path, f"is damaged (it does not say {', '.join(lacking)})", mend)
    kinds = _KINDS.get(path.name, {})
    wrong = [key for key, kind in kinds.items() if key in value and not isinstance(value[key], kind)]
    if wrong:
        raise DamagedFileError(path, f"is damaged (its {', '.join(wrong)} cannot be)", mend)
    return value


def read_done(run_dir: Path) -> dict:
    """What a sweep wrote of a run whose commands completed. Raises ValueError if it is damaged."""
    mend = "remove it; the cell's commands then look at what is there, and do what is missing"
    record = read_json(run_dir / CELL, mend, keys=("commands",))
    if not are_commands(record["commands"]):
        raise ValueError(f"{run_dir / CELL} is damaged (its commands cannot be): {mend}")
    return record


class Row(dict):
    """What was read of a line of a file, or a part of it: what is made of it, too, names the line where a column is
    asked for that it does not have."""

    def __init__(self, values: Mapping, place: str) -> None:
        super().__init__(values)
        self.place = place

    def __missing__(self, column: str) -> NoReturn:
        raise ValueError(f"{self.place} is damaged, or of another version (it does not say {column}): remove the line")

    def __or__(self, other: Mapping) -> "Row":
        return Row({**self, **other}, self.place)

    def __ror__(self, other: Mapping) -> "Row":
        return Row({**other, **self}, self.place)


def read_rows(path: Path) -> list[Row]:
    """Rows of a JSON-lines file; a last line cut short by a crash is left out. No file: no rows.

    Raises:
        ValueError: another line is no JSON object, or lacks what every row of such a file has.
    """
    if not path.exists():
        return []
    rows, columns = [], _ROWS.get(path.name)
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            rows.append(json.loads(line, object_hook=partial(Row, place=f"{path}, line {number}")))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number} is damaged ({error}): remove the line") from None
        if not isinstance(rows[-1], dict):
            raise ValueError(f"{path}, line {number} is damaged (it is no JSON object): remove the line")
        if columns is None:
            continue
        if lacking := columns.lacking(rows[-1]):
            raise ValueError(f"{path}, line {number} is damaged (it does not say {', '.join(lacking)}): remove it")
        if wrong := columns.misfits(rows[-1]):
            raise ValueError(f"{path}, line {number} is damaged (its {', '.join(wrong)} cannot be): remove the line")
    return rows


def append_rows(path: Path, rows: Iterable[dict], identity: Callable[[dict], Hashable] | None = None) -> list[dict]:
    """Add rows, all or none, which are on disk on return; half a line, left by a crash, makes way. Many processes may
    add to a file at once.

    Args:
        identity: of a row; rows with that of one the file has already are left out.

    Returns:
        The rows that were added.

    Raises:
        ValueError: a number in them is not finite, or the file is damaged.
        OSError: it cannot be written; the error names ``path``.
    """
    rows = list(rows)
    with locked(path):
        if identity is not None:
            known = {identity(row) for row in read_rows(path)}
            rows = [row for row in rows if identity(row) not in known]
        text = "".join(_line(path, row) for row in rows).encode()
        before = path.read_bytes() if path.exists() else b""
        write_atomically(path, before[: before.rfind(b"\n") + 1] + text)
    return rows


def columns_of(row: dict, names: Iterable[str]) -> str:
    """What a row says in some of its columns, as an identity; a column that it lacks is null."""
    return json.dumps([row.get(name) for name in names], sort_keys=True)


def not_finite(value: object, name: str = "") -> list[str]:
    """Dotted names of the numbers in a row that are NaN or infinite."""
    if isinstance(value, float):
        return [] if math.isfinite(value) else [f"{name} is {value}"]
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return [found for key, child in children for found in not_finite(child, f"{name}.{key}" if name else str(key))]


def _line(path: Path, row: dict) -> str:
    wrong = not_finite(row)
    if wrong:
        raise ValueError(f"{path} takes finite numbers, and of a new row {', '.join(wrong[:3])}")
    return json.dumps(row, allow_nan=False) + "\n"


def to_csv(rows: Iterable[dict]) -> str:
    """Rows as CSV; the columns in the order they first come in."""
    rows = list(rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
