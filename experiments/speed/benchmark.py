"""Speed against length: ``python -m experiments.speed`` times the kernels on a GPU, behind a correctness gate.

Every method is first compared with the PyTorch reference (output and gradients, given the method's own selection, or
where the reference selects the same) at ``check_length``; what fails is not timed. Decoding is in
``experiments.speed.decode``. Rows go to speed.jsonl, one for each length, input, method and pass; table and figure are
made from these rows alone (``experiments.speed.report``), which also works without a GPU.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec

import torch

from dashattn.fields import user_path
from experiments.files import SPEED, append_rows
from experiments.provenance import now, provenance
from experiments.schema import DTYPES
from experiments.speed.config import SpeedConfig
from experiments.speed.decode import Decoding, Result
from experiments.speed.inputs import Problem, Shape, make_problem
from experiments.speed.measure import call_ms, extra_mib, failed_check, graph_ms, measure, passes, run_jax, summary
from experiments.speed.methods import BACKENDS, Method, UnavailableError, explain
from experiments.speed.peers import BASELINES, SDPA_FLASH
from experiments.speed.rows import CUDNN, DENSE, FLASH_3, PASSES

# In longer calls the host's share is nothing: they are not measured alone or as CUDA graphs.
SHORT_MS = 50.0


class Benchmark:
    """Yields the rows of one configuration."""

    def __init__(self, config: SpeedConfig, device: str, deadline: float | None = None):
        self.config = config
        self.device = device
        self.shape = Shape(config.heads, config.kv_heads, config.head_dim, config.chunk_size, DTYPES[config.dtype])
        self.deadline = time.monotonic() + config.time_budget if deadline is None else deadline
        self.common = provenance(device) | {
            name: getattr(config, name)
            for name in ("heads", "kv_heads", "head_dim", "chunk_size", "dtype", "seed", "repetitions")
        }
        self.checked: dict[tuple, dict[str, float] | tuple[str, str]] = {}

    def rows(self) -> Iterator[dict]:
        config = self.config
        dense, sparse = [], []
        for name in config.baselines:
            for method in BASELINES[name]:
                (dense if method.stage == DENSE else sparse).append(method)
        sparse += [method for name in config.backends for method in BACKENDS[name]]
        lengths = sorted(set(config.lengths))
        if lengths and "flash_attention_3" in config.baselines and find_spec("flash_attn_interface") is None:
            dense = [method for method in dense if method.name != FLASH_3]
            yield from self.flash_attention_3_through_jax(lengths)
        for length in lengths:
            yield from self.case(dense, "iid", length, None)
            for pattern in config.patterns:
                for sparsity in config.sparsities:
                    yield from self.case(sparse, pattern, length, sparsity)
        yield from self.decoding()

    def decoding(self) -> Iterator[dict]:
        for found in Decoding(self.config, self.shape, self.device, self.deadline).results():
            row = self.row(found, "clustered", found.length, found.target, found.pass_)
            yield row | {"batch": found.batch} | found.values

    def case(self, methods: list[Method], pattern: str, length: int, sparsity: float | None) -> Iterator[dict]:
        """All methods on one set of inputs."""
        problem = None
        for method in methods:
            if time.monotonic() > self.deadline:
                yield from self.unmeasured(method, pattern, length, sparsity, "out of time", "raise time_budget")
                continue
            try:
                errors = self.errors(method, pattern, sparsity)
                if problem is None:
                    problem = self.problem(pattern, length, sparsity)
                yield from self.timed(method, problem, pattern, errors)
            except Exception as error:  # what breaks must not take the others' measurements with it
                status, detail = explain(error)
                yield from self.unmeasured(method, pattern, length, sparsity, status, detail)
            self.free()

    def timed(self, method: Method, problem: Problem, pattern: str, errors: dict[str, float]) -> Iterator[dict]:
        """A row for each pass: measured, or why it was not."""
        operation = method.prepare(problem)
        calls = passes(operation, problem)
        sparsity = problem.causal_sparsity if operation.causal_sparsity is None else operation.causal_sparsity
        for name in PASSES:
            row = self.row(method, pattern, problem.length, problem.target, name)
            scale = problem.router_scale if operation.router_scale is None else operation.router_scale
            row |= {"causal_sparsity": sparsity, "router_scale": scale, "errors": errors}
            ours = any(method in methods for methods in BACKENDS.values())
            graphs = ours or method.name in (CUDNN, SDPA_FLASH)  # others may wait inside
            failed = failed_check(errors, name, self.config.tolerance if ours else self.config.baseline_tolerance)
            if name not in calls:
                yield row | {"status": "no backward"}
            elif failed:
                yield row | failed
            else:
                try:
                    times = measure(calls[name], self.config.warmup, self.config.repetitions)
                    extra = extra_mib(calls[name])
                    short = statistics.median(times) < SHORT_MS
                    called = call_ms(calls[name], self.config.repetitions) if short else None
                    replayed = graph_ms(calls[name], self.config.repetitions) if short and graphs else None
                except torch.OutOfMemoryError:
                    yield row | {"status": "out of memory"}
                    continue
                alone = {"call_ms": called, "graph_ms": replayed}
                yield row | {"status": "ok", "extra_mib": extra} | alone | summary(times)

    def errors(self, method: Method, pattern: str, sparsity: float | None) -> dict[str, float]:
        """The errors at the length of the check, computed once; what was raised there is raised again."""
        key = (method, pattern, sparsity)
        if key not in self.checked:
            problem = self.problem(pattern, min(self.config.check_length, max(self.config.lengths)), sparsity)
            try:
                self.checked[key] = method.prepare(problem).errors(problem.grad)
            except Exception as error:  # kept as words: its traceback would keep the tensors alive
                self.checked[key] = explain(error)
            self.free()
        if isinstance(self.checked[key], tuple):
            raise UnavailableError(*self.checked[key])
        return self.checked[key]

    def problem(self, pattern: str, length: int, sparsity: float | None) -> Problem:
        return make_problem(pattern, length, sparsity, self.shape, seed=self.config.seed, device=self.device)

    def row(self, method: Method | Result, pattern: str, length: int, sparsity: float | None, name: str) -> dict:
        return self.common | {
            "date": now(),
            "length": length,
            "pattern": None if sparsity is None else pattern,
            "sparsity": sparsity,
            "causal_sparsity": None,
            "router_scale": None,
            "stage": method.stage,
            "method": method.name,
            "pass": name,
            "status": "",
            "detail": "",
            "ms": None,
            "ms_min": None,
            "ms_max": None,
            "call_ms": None,
            "graph_ms": None,
            "extra_mib": None,
            "errors": {},
        }

    def unmeasured(self, method, pattern, length, sparsity, status: str, detail: str) -> Iterator[dict]:
        for name in PASSES:
            yield self.row(method, pattern, length, sparsity, name) | {"status": status, "detail": detail}

    def flash_attention_3_through_jax(self, lengths: list[int]) -> Iterator[dict]:
        """A wheel of FlashAttention-3 for JAX, in a process of its own; its memory is not measured."""
        config = self.config
        (method,) = BASELINES["flash_attention_3"]
        ports = ["dew_flash_attn"]
        if config.head_dim == 128:  # it has no other heads
            ports.insert(0, "flash_attn3_jax")
        installed = [port for port in ports if find_spec(port) is not None]
        if not installed or find_spec("jax") is None:
            detail = f"neither flash_attn_interface nor JAX with {' or '.join(ports)} is installed"
            for length in lengths:
                yield from self.unmeasured(method, "iid", length, None, "not installed", detail)
            return
        names = ("heads", "kv_heads", "head_dim", "dtype", "seed", "warmup", "repetitions")
        options = {name: getattr(config, name) for name in names}
        options |= {"lengths": lengths, "check_length": min(config.check_length, max(lengths)), "package": installed[0]}
        replies, failure = run_jax(options, self.deadline - time.monotonic())
        found = {(r["length"], r["pass"]): r for r in replies[1:]}
        for length in lengths:
            for name in PASSES:
                reply = found.get((length, name), {"error": failure or "no answer"})
                row = self.row(method, "iid", length, None, name)
                row["errors"] = replies[0]["errors"] if replies else {}
                failed = failed_check(row["errors"], name, config.baseline_tolerance)
                if failed:
                    yield row | failed
                elif "error" in reply:
                    yield row | {"status": "error", "detail": reply["error"]}
                else:
                    detail = f"{installed[0]} {replies[0]['package']}, JAX {replies[0]['jax']}"
                    times = {key: reply[key] for key in ("ms", "ms_min", "ms_max")}
                    yield row | {"status": "ok", "detail": detail} | times

    def free(self) -> None:
        if self.device == "cuda":
            torch.cuda.empty_cache()


def measured(config: SpeedConfig, device: str) -> Iterator[dict]:
    """The rows of every shape."""
    deadline = time.monotonic() + config.time_budget
    for shape in config.shapes or [(config.heads, config.kv_heads, config.head_dim)]:
        sizes = dict(zip(("heads", "kv_heads", "head_dim"), shape, strict=True))
        yield from Benchmark(replace(config, **sizes), device, deadline).rows()


def run(config: SpeedConfig, device: str, say: Callable[[str], None] = print) -> None:
    """Measures, and writes every row as soon as it is there."""
    path = user_path(config.output_dir) / SPEED
    path.parent.mkdir(parents=True, exist_ok=True)
    for row in measured(config, device):
        # JSON has no NaN, which is what a broken kernel's error can be; the check has already failed it.
        row["errors"] = {what: error if math.isfinite(error) else None for what, error in row["errors"].items()}
        append_rows(path, [row])
        inputs = "dense" if row["sparsity"] is None else f"{row['pattern']} {row['sparsity']:.0%}"
        what = f"{row['ms']:.4g} ms" if row["status"] == "ok" else f"{row['status']} {row['detail']}"
        what += f" x {row['batch']}" if row.get("batch", 1) > 1 else ""
        say(f"{row['length']:7d}  {inputs:14}  {row['stage']:9}  {row['method']:22}  {row['pass']:16}  {what}")
