"""Configuration files of a user (``--config-dir``), looked at before Hydra, which tells what is wrong with one by its
own traceback, or by a key that nobody wrote."""

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import yaml

from experiments.files import CONFIGS

_HEADER = "# @package _global_"


def wrong_file(arguments: Sequence[str]) -> str | None:
    """What is wrong with the first file of a user that the arguments choose, in a line; None: nothing that shows."""
    folders = [Path(folder) for folder in _values(arguments, "-cd", "--config-dir")]
    chosen = [f"{name}.yaml" for name in _values(arguments, "-cn", "--config-name")]
    for argument in arguments:
        found = re.fullmatch(r"\+?([\w/-]+)=\[?([\w/,. -]+)\]?", argument)
        if found:
            chosen += [f"{found[1]}/{name.strip()}.yaml" for name in found[2].split(",")]
    paths = [(folder / name, name) for folder in folders for name in chosen]
    return next((wrong for path, name in paths if path.is_file() and (wrong := _wrong(path, name))), None)


def _values(arguments: Sequence[str], *options: str) -> list[str]:
    """What stands behind an option, as ``--option VALUE`` or ``--option=VALUE``."""
    behind = [value for option, value in pairwise(arguments) if option in options]
    joined = [argument.partition("=") for argument in arguments]
    return behind + [value for option, equals, value in joined if equals and option in options]


def _wrong(path: Path, name: str) -> str | None:
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        place = getattr(error, "problem_mark", None)
        said = getattr(error, "problem", None) or " ".join(str(error).split())
        return f"{path} is no YAML ({f'line {place.line + 1}: ' if place else ''}{said}): mend it"
    if node is not None and not isinstance(node, yaml.MappingNode):
        return f"{path} holds no keys with values: begin it like those in {Path(CONFIGS) / name.rpartition('/')[0]}"
    of_ours = next(iter(sorted((Path(CONFIGS) / name.rpartition("/")[0]).glob("*.yaml"))), None)
    if "/" in name and of_ours and of_ours.read_text().startswith(_HEADER) and "@package" not in text[:512]:
        return f"{path} must begin with the line {_HEADER}: its keys are those of the whole configuration"
    return None
