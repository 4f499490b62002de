"""Values on command lines that we write: overrides that Hydra reads as the text that was meant."""

import re
from functools import cache

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException


def override(key: str, value: str) -> str:
    """``key=value`` for a text of any characters, a path say; quoted only where Hydra would read something else."""
    plain = f"{key}={value}"
    return plain if "$" not in value and _read(plain) == value else f"{key}={_quoted(value)}"


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
