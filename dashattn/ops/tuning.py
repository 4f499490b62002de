"""Launch options (warps, pipeline stages, registers) of the heavy kernels: chosen once per device, and kept.

Every such kernel has a short list of them; the first is the fastest on an H100. Where neither the package's file nor
the user's, ``$DASHATTN_CACHE/tuning.jsonl``, knows what to take on this kind of device for this type and these
constants (the length is none of them), the list is timed on the call at hand, and the choice goes into the user's file.

Nothing is timed in short calls, while a CUDA graph is recorded, where torch is to be deterministic, or with
DASHATTN_AUTOTUNE=0: what is not known is then the first option that fits the device.

What is promised: on one kind of device, processes that find their choices in equal files launch the same kernels, whose
sums are the same. A process that times goes on with what it writes, so that its own resumption is one of them, unless
it is one of several that time the same call at once: of their choices the last written is kept.
"""

import json
import os
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from dashattn.fields import user_path

Options = dict[str, int]

ENABLED = os.environ.get("DASHATTN_AUTOTUNE", "1") != "0"
SHIPPED = Path(__file__).with_name("tuning.jsonl")
TIMED_TOKENS = 4096  # shorter calls do not tell the options apart
RUNS = 5
CLEARLY_FASTER = 0.98  # of the first option's time: what is less is noise
L2_BYTES = 2**28  # a few times the cache of any device

UNTELLING = ("KV_HEADS", "GROUP", "PER_TOKEN", "HEAD_DIM", "BRANCH", "BRANCHES")

_chosen: dict[tuple, Options] = {}
_untimed: dict[tuple, Options] = {}


@cache
def around(num_warps: int, num_stages: int, **registers: int) -> tuple[Options, ...]:
    """The given options, the other of 4 and 8 warps, one stage less, and the least shared memory."""
    pairs = [(num_warps, num_stages), (12 - num_warps, num_stages), (num_warps, max(1, num_stages - 1)), (num_warps, 1)]
    return tuple(dict(num_warps=warps, num_stages=stages, **registers) for warps, stages in dict.fromkeys(pairs))


def launch(
    kernel, grid: tuple, q: Tensor, *args, options: Sequence[Options], tokens: int, restore: Sequence[Tensor] = (),
    **constants,
) -> None:  # fmt: skip
    """``kernel[grid](q, *args, **constants)`` with one of ``options``.

    Args:
        tokens: of the call.
        restore: tensors that the kernel adds to or counts in, for they are put back after a timing.

    Raises:
        RuntimeError: no option fits the device.
    """
    key = (kernel.fn, q.device, q.dtype, *constants.values())
    choice = _chosen.get(key)
    if choice is None:
        timed = len(options) > 1 and tokens >= TIMED_TOKENS and _may_time(q)
        choice = None if timed else _untimed.get(key)
    if choice is not None:
        kernel[grid](q, *args, **constants, **choice)
        return

    def run(option: Options) -> None:
        kernel[grid](q, *args, **constants, **option)

    call = dict(
        device=_device_name(q.device), kernel=kernel.__name__, dtype=str(q.dtype), constants=_telling(constants)
    )
    best = _kept().get(_text(call))
    if best not in options:
        best = _fastest(run, options, restore, q.device) if timed else None
        best = best and _keep(call, best, options)
    choice = _launch_first_that_fits(run, [best, *options] if best else options, call)
    (_chosen if best or timed else _untimed)[key] = choice


def _may_time(q: Tensor) -> bool:
    return (
        ENABLED
        and q.is_cuda
        and not torch.are_deterministic_algorithms_enabled()
        and not torch.cuda.is_current_stream_capturing()
    )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _telling(constants: dict) -> dict:
    """Constants that make a difference to speed: of numbers of heads only whether there are any, and no gates."""
    constants = {name: value > 0 if name.endswith("HEADS") else value for name, value in constants.items()}
    return {name: value for name, value in constants.items() if name not in UNTELLING}


def _launch_first_that_fits(run: Callable[[Options], None], options: Sequence[Options], call: dict) -> Options:
    for option in options:
        try:
            run(option)
            return option
        except OutOfResources as error:
            reason = error
    raise RuntimeError(
        f"{call['kernel']} does not fit {call['device']} for {call['dtype']}, {call['constants']}: take smaller blocks,"
        " smaller heads or a 16-bit dtype"
    ) from reason


def _fastest(
    run: Callable[[Options], None], options: Sequence[Options], restore: Sequence[Tensor], device: torch.device
) -> Options | None:
    """None if there is no option that fits, or no memory to time with."""
    try:
        before = [x.clone() for x in restore]
        flush = torch.empty(L2_BYTES, dtype=torch.int8, device=device)
    except torch.OutOfMemoryError:
        return None
    medians = []
    for option in options:
        times = []
        try:
            for _ in range(1 + RUNS):  # the first one compiles
                times.append(_milliseconds(run, option, flush))
                for x, old in zip(restore, before, strict=True):
                    x.copy_(old)
        except OutOfResources:
            times = [float("inf")] * 2
        medians.append(median(times[1:]))
    best = min(medians)
    if best == float("inf"):
        return None
    return options[0 if best > CLEARLY_FASTER * medians[0] else medians.index(best)]


def _milliseconds(run: Callable[[Options], None], option: Options, flush: Tensor) -> float:
    """Device time with a cold cache. Emptying it keeps the device busy until the host has launched the kernel."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    start.record()
    run(option)
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _user_file() -> Path:
    return user_path(os.environ.get("DASHATTN_CACHE", "~/.cache/dashattn")) / "tuning.jsonl"


@cache
def _kept() -> dict[str, Options]:
    """What the files say; of several entries the last counts, so that the user's own outlast a new package."""
    kept: dict[str, Options] = {}
    for path in (SHIPPED, _user_file()):
        try:
            lines = path.read_text(errors="replace").splitlines()
        except FileNotFoundError:
            continue
        except OSError as error:
            warnings.warn(f"kernels are tuned anew: {error}", stacklevel=2)
            continue
        for line in lines:
            try:
                call = json.loads(line)
                choice = call.pop("choice")
            except (ValueError, KeyError, TypeError, AttributeError):
                warnings.warn(f"{path} has damaged lines, which are left out: delete it to tune anew", stacklevel=2)
            else:
                kept[_text(call)] = choice
    return kept


def _text(call: dict) -> str:
    return json.dumps(call, sort_keys=True)


def _keep(call: dict, choice: Options, options: Sequence[Options]) -> Options:
    """The choice, written down; or that of another process which has done so meanwhile."""
    _kept.cache_clear()
    kept = _kept()
    if kept.get(_text(call)) in options:
        return kept[_text(call)]
    kept[_text(call)] = choice
    path = _user_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:  # one short line is one write, which no other process cuts in two
            file.write(json.dumps(call | {"choice": choice}) + "\n")
    except OSError as error:
        warnings.warn(f"the choice of kernel options is not kept: {error}", stacklevel=2)
    return choice
