"""Errors a user causes end in one message, errors of ours in a traceback."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from omegaconf.errors import OmegaConfBaseException


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn a ValueError of the wrapped checks into one message and exit code 1; HYDRA_FULL_ERROR=1 shows it whole."""
    try:
        yield
    except (ValueError, OmegaConfBaseException) as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        print(f"error: {error}\n(HYDRA_FULL_ERROR=1 shows the traceback)", file=sys.stderr)
        raise SystemExit(1) from None
