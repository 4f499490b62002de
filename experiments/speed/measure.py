"""How the speed benchmark times an operation, and what it has to get right before."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from experiments.files import ROOT
from experiments.speed.inputs import Problem
from experiments.speed.methods import SELECTED_BLOCKS, SELECTED_ROWS, SELECTION_TOLERANCE, Operation
from experiments.speed.rows import BOTH, FORWARD

# What a bfloat16 router rounds on the way to the chunk query (scores' gradients, those of the summaries), of rows that
# are decided (``Operation.decided``): .004 to .005 on a GPU, where no chunk was near the edge of the support.
CHUNK_QUERY_TOLERANCE = 0.02


def measure(call: Callable[[], object], warmup: int, repetitions: int) -> list[float]:
    """Milliseconds of each repetition on the current GPU, by CUDA events."""
    for _ in range(warmup):
        call()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repetitions)]
    torch.cuda.synchronize()
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def graph_times(call: Callable[[], object], warmup: int, repetitions: int) -> list[float]:
    """Milliseconds of the call replayed as a CUDA graph, which leave out the host's share.

    Raises:
        RuntimeError: the call waits for the device.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    times = measure(graph.replay, warmup, repetitions)
    del result
    return times


def call_ms(call: Callable[[], object], repetitions: int) -> float:
    """Median milliseconds from the call to its end by the host's clock, each alone: the host's share counts in full."""
    times = []
    for _ in range(repetitions):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def graph_ms(call: Callable[[], object], repetitions: int) -> float | None:
    """Median milliseconds of the call's replays; None if it waits inside."""
    try:
        return statistics.median(graph_times(call, 1, repetitions))
    except RuntimeError:
        return None


def extra_mib(call: Callable[[], object]) -> float:
    """Peak memory of a call beside what it began with and what it returns."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    kept = torch.cuda.memory_allocated() - before
    del result
    return (torch.cuda.max_memory_allocated() - before - kept) / 2**20


def passes(operation: Operation, problem: Problem) -> dict[str, Callable[[], object]]:
    """The call of each pass that the operation has."""

    def forward():
        with torch.no_grad():
            return operation.forward()

    def both():
        # the tuple keeps the output alive: it is a result, like the gradients
        out = operation.forward()
        return out, torch.autograd.grad(out, list(operation.leaves.values()), problem.grad)

    return {FORWARD: forward, BOTH: both} if operation.leaves else {FORWARD: forward}


def failed_check(errors: dict[str, float], name: str, tolerance: float) -> dict[str, str]:
    """Columns of a pass that errors beyond their bounds keep from being timed, else {}.

    A forward does not answer for gradients.
    """
    bounds = dict.fromkeys((SELECTED_ROWS, SELECTED_BLOCKS), SELECTION_TOLERANCE)
    bounds["chunk_query"] = CHUNK_QUERY_TOLERANCE
    found = [
        f"{what} off by {error:.2g}, allowed {bounds.get(what, tolerance):.2g}"
        for what, error in errors.items()
        if not error <= bounds.get(what, tolerance) and (name != FORWARD or what in ("out", SELECTED_ROWS))
    ]
    return {"status": "failed check", "detail": "; ".join(found)} if found else {}


def run_jax(options: dict, seconds: float) -> tuple[list[dict], str]:
    """What ``experiments.speed.jax_flash3`` printed before it ended, and how it failed ("" if it did not)."""
    command = [sys.executable, "-m", "experiments.speed.jax_flash3", json.dumps(options)]
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=max(1.0, seconds)
        )
        output, failure = done.stdout, ""
        if done.returncode:
            failure = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:300]
    except subprocess.TimeoutExpired as error:
        output = error.stdout or ""
        output, failure = output if isinstance(output, str) else output.decode(), "out of time"
    complete = output.split("\n")[:-1]
    return [json.loads(line) for line in complete if line.startswith("{")], failure


def summary(times: list[float]) -> dict[str, float]:
    return {"ms": statistics.median(times), "ms_min": min(times), "ms_max": max(times)}
