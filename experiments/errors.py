"""Errors a user causes or can mend end in one message, errors of ours in a traceback."""

import errno
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from experiments.signals import interruptible

# What is wrong with a disk or with rights to it, not with us; and the mend.
_DISK = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room there"),
    **dict.fromkeys(
        (errno.EROFS, errno.EACCES, errno.EPERM), "see that it may be read and written, or name another place"
    ),
    **dict.fromkeys((errno.EIO, errno.ESTALE), "see to the disk"),
    **dict.fromkeys((errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR), "name another place"),
}
# How PyTorch's collectives tell that another process is gone.
_LOST = re.compile(r"gloo|nccl|connection (closed|reset|was closed)|broken pipe|socket timeout", re.IGNORECASE)
REQUEUE = 75  # exit code of a run that was asked to stop and wants to be started again; EX_TEMPFAIL of sysexits.h


class Stopped(Exception):
    """A run ends before its last step. The message says why, what is kept, and how to go on."""

    exit_code = 1


class Preempted(Stopped):
    """A run that was asked to stop, and has saved what it did."""

    exit_code = REQUEUE


class Occupied(Stopped):
    """A job that was queued again, as when its node was given up, while the process it had there lives on."""

    exit_code = REQUEUE


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn a ValueError of the checks, Hydra's error, a fault of a disk or memory that does not suffice into one
    message and exit code 1; HYDRA_FULL_ERROR=1 shows it whole."""
    with _one_message(ValueError, OmegaConfBaseException, HydraException):
        try:
            yield
        except OSError as error:
            if error.errno not in _DISK:
                raise
            raise ValueError(
                f"{error}: {_DISK[error.errno]}; what is complete stays, and the same command goes on"
            ) from error
        except (RuntimeError, MemoryError) as error:
            if (told := out_of_memory(error)) is None:
                raise
            raise ValueError(f"{told}: take a smaller model, fewer or shorter rows, or free memory") from error


@contextmanager
def run_faults() -> Iterator[None]:
    """Turn what stops a run, but is no bug, into one message and an exit code; HYDRA_FULL_ERROR=1 shows it whole."""
    with _one_message(Stopped):
        try:
            yield
        except OSError as error:
            if error.errno not in _DISK:
                raise
            raise Stopped(
                f"{error}: {_DISK[error.errno]} (run_dir and cache_dir). The latest checkpoint is intact, and the same "
                "command goes on from it"
            ) from error
        except (RuntimeError, MemoryError) as error:
            if (told := out_of_memory(error)) is not None:
                raise Stopped(
                    f"{told}.\nlower rows_per_micro_batch (the same step in more passes), raise deepspeed.stage, use "
                    "more GPUs, or lower data.seq_len. The latest checkpoint is kept; what changes only the placement "
                    "(rows_per_micro_batch, the stage, the number of GPUs) may change on resume"
                ) from error
            if not is_lost_rank(error):
                raise
            raise Stopped(
                f"another rank was lost ({str(error).splitlines()[0]}): what that one said last is the cause. The "
                "latest checkpoint is intact, and the same command goes on from it"
            ) from error


def out_of_memory(error: BaseException) -> str | None:
    """What an error says of memory, a GPU's or the machine's, that did not suffice; None for any other error. On a CPU
    PyTorch raises a plain RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError):
        return str(error).splitlines()[0].rstrip(".")
    refused = re.search(r"DefaultCPUAllocator: .*allocate (\d+) bytes", str(error))
    if isinstance(error, RuntimeError) and refused:
        return f"out of memory: this machine has no {int(refused[1]) / 2**30:.2f} GiB more for this process"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "bad_alloc" in str(error)):
        return "out of memory: this machine has no more for this process"
    return None


def is_lost_rank(error: BaseException) -> bool:
    """Whether a collective failed because another process is gone."""
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None
    )


@contextmanager
def _one_message(*kinds: type[Exception]) -> Iterator[None]:
    is_first = os.environ.get("RANK", "0") == "0"
    try:
        with interruptible():
            yield
    except KeyboardInterrupt:
        if is_first:
            print("interrupted: what is complete stays, and the same command goes on", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    except Preempted as error:  # no fault, and of all ranks alike
        if is_first:
            print(error, file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except kinds as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        print(f"error: {error}\n(HYDRA_FULL_ERROR=1 shows the traceback)", file=sys.stderr)
        raise SystemExit(getattr(error, "exit_code", 1)) from None
