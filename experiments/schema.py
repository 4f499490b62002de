"""From what Hydra composed to dataclasses, whichever they are; and values that all of them spell alike."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

# By the names that configurations and rows have for them.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def read_values(path: Path) -> DictConfig:
    """What the config.yaml of a run says. It holds values, for which nothing is looked up.

    Raises:
        ValueError: it is damaged, or refers to something else, an environment variable say.
    """
    try:
        values = OmegaConf.load(path)
        refers = "${" in path.read_text(encoding="utf-8")
    except (OSError, ValueError, YAMLError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({' '.join(str(error).split())}): restore it from a copy") from None
    groups = ("model", "attention", "data")
    lacking = [
        key for key in groups if not isinstance(values, DictConfig) or not isinstance(values.get(key), DictConfig)
    ]
    if lacking:
        raise ValueError(f"{path} is damaged (it has no {', '.join(lacking)}): restore it from a copy")
    if refers:
        raise ValueError(f"{path} refers to other values with ${{...}}, which no run writes: do not trust it")
    return values


@contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Around what puts the values of a config.yaml into dataclasses. Raises ValueError, of one line, where they do not
    fit."""
    try:
        yield
    except OmegaConfBaseException as error:
        said = " ".join(str(error).split())
        raise ValueError(
            f"{path} is damaged, or of a version with other keys ({said}): restore it from a copy"
        ) from None


def to_config(cfg: DictConfig) -> Any:
    """The dataclasses of a composed configuration, of whichever schema it has.

    Raises:
        ValueError: that names values left open, or keys that a ``+key=value`` forced in.
    """
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ValueError(f"no value for {', '.join(missing)}: give one, as in {missing[0]}=...")
    config = OmegaConf.to_object(cfg)
    assert is_dataclass(config)
    unknown = _unknown_keys(config)
    if unknown:
        raise ValueError(f"unknown key {', '.join(unknown)}: `--cfg job` shows the known ones")
    return config


def flat(values: dict, prefix: str = "") -> dict:
    """Nested dictionaries as one, with dotted keys."""
    result = {}
    for key, value in values.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return result


def _unknown_keys(node: object, prefix: str = "") -> list[str]:
    """Dotted names of attributes that are no fields of their dataclass, in ``node`` and below it."""
    if isinstance(node, dict):
        children, unknown = node, []
    elif is_dataclass(node):
        children = {f.name: getattr(node, f.name) for f in fields(node)}
        unknown = [prefix + key for key in vars(node) if key not in children]
    else:
        return []
    for key, child in children.items():
        unknown += _unknown_keys(child, f"{prefix}{key}.")
    return unknown
