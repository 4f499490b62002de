"""Files of a Hugging Face folder: JSON and safetensors, and what is wrong with those that cannot be read."""

import json
from pathlib import Path

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_POINTER = b"version https://git-lfs"


def read_json(path: Path) -> dict:
    """The object that a file holds.

    Raises:
        ValueError: there is none; the message names the file.
    """
    check_whole(path)
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # no UTF-8 is a ValueError, too
        raise ValueError(f"{path} is no JSON ({error}): copy the file again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object: copy the file again")
    return value


def check_whole(path: Path) -> None:
    """Refuse a file that is not there, cannot be read, is empty, or is the pointer that Git LFS leaves in its place.

    Raises:
        ValueError: with the file's size and the mend.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): copy the file again") from None
    if head.startswith(_POINTER):
        lines = head.decode(errors="replace").splitlines()
        real = next((line.split()[1] for line in lines if line.startswith("size ") and len(line.split()) == 2), "?")
        raise ValueError(
            f"{path} is the pointer of Git LFS ({size} bytes) to a file of {real} bytes: fetch that with `git lfs pull`"
        )
    if size == 0:
        raise ValueError(f"{path} is empty (0 bytes): copy the file again")
