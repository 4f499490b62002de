"""Texts on command lines, ours and a user's: overrides that Hydra reads as the text that was meant."""

import re
from functools import cache
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException


def override(key: str, value: str) -> str:
    """``key=value`` for a text of any characters, a path say; quoted only where Hydra would read something else."""
    plain = f"{key}={value}"
    return plain if "$" not in value and _read(plain) == value else f"{key}={_quoted(value)}"


def path_of(argument: str, *keys: str) -> Path | None:
    """The path that an override of one of these keys names; None: it is of another key, or names none."""
    value = _read(argument) if argument.partition("=")[0] in keys else None
    return Path(value) if isinstance(value, str) and value else None


def as_text(argument: str, key: str) -> str:
    """An argument of a user; of ``key`` such that its value is the text, whatever Hydra would read in it (``f(x):``,
    ``a, b``). null stays null, and a text that stands in quotes of Hydra's stays what it says there."""
    name, _, value = argument.partition("=")
    is_quoted = value[:1] in ("'", '"') and value[:1] == value[-1:] and isinstance(_read(argument), str)
    return argument if name != key or value == "null" or is_quoted else override(key, value)


def _quoted(value: str) -> str:
    # OmegaConf takes ${...} for another value, unless a backslash stands before it, which doubles those before that.
    value = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    # For Hydra, so does a quote; and what is before the closing one would escape it.
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value) + "'"


@cache
def _read(text: str) -> object:
    try:
        parsed = OverridesParser.create().parse_override(text)
    except HydraException:
        return None
    return None if parsed.is_sweep_override() else parsed.value()
