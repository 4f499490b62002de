"""Where the code lies, and files that a crash cannot leave half written: text replaced in one step, rows of JSON, and
checksums."""

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# For Hydra, which looks a relative path up beside the module that was started.
CONFIGS = str(ROOT / "configs")

# What more than one module writes or reads, by its name in its directory. Of a run:
CONFIG = "config.yaml"
START = "start.json"  # facts that the configuration alone does not tell
TOKENIZER = "tokenizer"  # folder: the tokenizer.json that the tokens were made with, and its settings
GIT = "git.json"
LOCK = ".lock"
SUBMITTED = "slurm"  # folder of what Slurm was given, and its logs; written before the run begins
METRICS = "metrics.jsonl"
ANOMALIES = "anomalies.jsonl"
RESULTS = "results.jsonl"
CALIBRATIONS = "calibrations.jsonl"  # knobs that an evaluation found for sparsities
WEIGHTS = "model.safetensors"  # of a checkpoint
# Of a sweep:
CELL = "cell.json"  # in a run directory: the commands that completed
PLAN = "cells.json"
CELLS = "cells.jsonl"  # collected: a row for each cell
# Of a benchmark:
SPEED = "speed.jsonl"
NUMERICS = "numerics.jsonl"
THROUGHPUT = "throughput.jsonl"
SCALING = "parallel.jsonl"


def write_atomically(path: Path, text: str) -> None:
    """Replace ``path``, so that a reader sees the old text or the new, and a crash leaves one of them."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
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


def read_rows(path: Path) -> list[dict]:
    """Rows of a JSON-lines file; a last line cut short by a crash is left out. No file: no rows.

    Raises:
        ValueError: another line is no JSON.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text().split("\n")[:-1], start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is damaged ({error}): remove the line") from None
    return rows


def append_rows(path: Path, rows: Iterable[dict]) -> None:
    """Add rows in one write that is on disk on return; half a line, left by a crash, makes way."""
    text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    with path.open("ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def to_csv(rows: Iterable[dict]) -> str:
    """Rows as CSV; the columns in the order they first come in."""
    rows = list(rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
