"""Speed against length: ``python -m experiments.speed`` times the kernels on a GPU, behind a correctness gate.

Every method is first compared with the PyTorch reference (output and gradients, given the method's own selection) at
``check_length``; what fails is not timed. Decoding is in ``experiments.speed.decode``. Rows go to speed.jsonl, one for
each length, input, method and pass; table and figure are made from these rows alone (``experiments.speed.report``),
which also works without a GPU.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from importlib.util import find_spec
from pathlib import Path

import hydra
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from experiments.errors import user_errors
from experiments.files import CONFIGS, SPEED, append_rows
from experiments.provenance import provenance
from experiments.speed.decode import Decoding, Result
from experiments.speed.inputs import PATTERNS, Problem, Shape, make_problem
from experiments.speed.measure import extra_mib, failed_check, graph_ms, measure, passes, run_jax, summary
from experiments.speed.methods import BACKENDS, Method, UnavailableError, explain
from experiments.speed.peers import BASELINES
from experiments.speed.report import write_report
from experiments.speed.rows import DENSE, FLASH_3, PASSES
from models.config import ModelConfig

# Longer calls hide what the host does for the next one: they are not measured as CUDA graphs.
GRAPHS_BELOW_MS = 5.0
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class SpeedConfig:
    """One benchmark; causal, batch 1 except where sequences are decoded."""

    output_dir: str = "outputs/speed"
    lengths: list[int] = field(default_factory=lambda: [2**i for i in range(10, 18)])
    sparsities: list[float] = field(default_factory=lambda: [0.75, 0.9])  # causal
    patterns: list[str] = field(default_factory=lambda: list(PATTERNS))  # shared | clustered | iid
    backends: list[str] = field(default_factory=lambda: list(BACKENDS))
    baselines: list[str] = field(default_factory=lambda: list(BASELINES))
    heads: int = 32
    kv_heads: int = 2
    head_dim: int = 128
    chunk_size: int = 64
    dtype: str = "bf16"  # bf16 | fp16
    seed: int = 0
    check_length: int = 2500  # of the comparison with the reference, whose memory grows with its square
    tolerance: float = 0.005  # relative RMS error of output and gradients
    baseline_tolerance: float = 0.02  # of others' kernels: some sum a group's gradients in 16 bits
    warmup: int = 3  # calls before the timed ones
    repetitions: int = 12  # timed calls; their median counts
    # [tokens, sequences] of one token's step in a layer, and in a whole model with random weights; [] leaves it out
    decode: list[list[int]] = field(default_factory=lambda: [[2**15, 1], [2**17, 1], [2**19, 1], [2**15, 16]])
    decode_model: list[list[int]] = field(default_factory=lambda: [[2**15, 1], [2**17, 1]])
    model: ModelConfig | None = None  # of decode_model
    time_budget: float = 1500.0  # seconds; what is left then gets a row that says so


def register_speed_config() -> None:
    store = ConfigStore.instance()
    store.store(name="speed_schema", node=SpeedConfig)
    store.store(group="model", name="model_schema", node=ModelConfig)


def check(config: SpeedConfig) -> None:
    """Refuses what cannot be measured, before anything is.

    Raises:
        ValueError: with the mend.
    """
    unknown = sorted(set(vars(config)) - {f.name for f in fields(config)})
    if unknown:
        raise ValueError(f"unknown key {', '.join(unknown)}: `--cfg job` shows the known ones")
    for name, known in (("patterns", PATTERNS), ("backends", BACKENDS), ("baselines", BASELINES)):
        wrong = [value for value in getattr(config, name) if value not in known]
        if wrong:
            raise ValueError(f"{name} has {', '.join(wrong)}: choose from {', '.join(known)}")
    if config.dtype not in DTYPES:
        raise ValueError(f"dtype={config.dtype}: choose one of {', '.join(DTYPES)}")
    sizes = ("heads", "kv_heads", "head_dim", "chunk_size", "check_length", "warmup", "repetitions")
    for name, value in [*((n, getattr(config, n)) for n in sizes), *(("lengths", n) for n in config.lengths)]:
        if value < 1:
            raise ValueError(f"{name} has {value}: at least 1 is needed")
    if not all(0 < s < 1 for s in config.sparsities):
        raise ValueError(f"sparsities lie between 0 and 1; got {config.sparsities}")
    if not (config.lengths or config.decode or config.decode_model):
        raise ValueError("nothing to measure: lengths, decode or decode_model needs an entry")
    for name in ("decode", "decode_model"):
        for case in getattr(config, name):
            if len(case) != 2 or case[0] < config.chunk_size or case[1] < 1:
                raise ValueError(f"{name} has {case}: [tokens, sequences] are needed, with at least a chunk of tokens")
    if config.decode_model and config.model is None:
        raise ValueError("decode_model needs a model: name one, as in model=1b, or set decode_model=[]")
    if config.heads % config.kv_heads:
        raise ValueError(f"heads={config.heads} is no multiple of kv_heads={config.kv_heads}")


class Benchmark:
    """Yields the rows of one configuration."""

    def __init__(self, config: SpeedConfig, device: str):
        self.config = config
        self.device = device
        self.shape = Shape(config.heads, config.kv_heads, config.head_dim, config.chunk_size, DTYPES[config.dtype])
        self.deadline = time.monotonic() + config.time_budget
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
            row |= {"causal_sparsity": sparsity, "router_scale": problem.router_scale, "errors": errors}
            ours = any(method in methods for methods in BACKENDS.values())  # others may wait inside: no graphs
            failed = failed_check(errors, name, self.config.tolerance if ours else self.config.baseline_tolerance)
            if name not in calls:
                yield row | {"status": "no backward"}
            elif failed:
                yield row | failed
            else:
                try:
                    times = measure(calls[name], self.config.warmup, self.config.repetitions)
                    extra = extra_mib(calls[name])
                    short = ours and statistics.median(times) < GRAPHS_BELOW_MS
                    replayed = graph_ms(calls[name], self.config.repetitions) if short else None
                except torch.OutOfMemoryError:
                    yield row | {"status": "out of memory"}
                    continue
                yield row | {"status": "ok", "extra_mib": extra, "graph_ms": replayed} | summary(times)

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
            "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
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
            "graph_ms": None,
            "extra_mib": None,
            "errors": {},
        }

    def unmeasured(self, method, pattern, length, sparsity, status: str, detail: str) -> Iterator[dict]:
        for name in PASSES:
            yield self.row(method, pattern, length, sparsity, name) | {"status": status, "detail": detail}

    def flash_attention_3_through_jax(self, lengths: list[int]) -> Iterator[dict]:
        """The wheel of FlashAttention-3 for JAX, in a process of its own; its memory is not measured."""
        config = self.config
        (method,) = BASELINES["flash_attention_3"]
        if find_spec("flash_attn3_jax") is None or find_spec("jax") is None:
            detail = "neither flash_attn_interface nor flash_attn3_jax is installed"
            for length in lengths:
                yield from self.unmeasured(method, "iid", length, None, "not installed", detail)
            return
        names = ("heads", "kv_heads", "head_dim", "dtype", "seed", "warmup", "repetitions")
        options = {name: getattr(config, name) for name in names}
        options |= {"lengths": lengths, "check_length": min(config.check_length, max(lengths))}
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
                    detail = f"flash_attn3_jax {replies[0]['package']}, JAX {replies[0]['jax']}"
                    times = {key: reply[key] for key in ("ms", "ms_min", "ms_max")}
                    yield row | {"status": "ok", "detail": detail} | times

    def free(self) -> None:
        if self.device == "cuda":
            torch.cuda.empty_cache()


def run(config: SpeedConfig, device: str, say: Callable[[str], None] = print) -> None:
    """Measures, and writes every row as soon as it is there."""
    path = Path(config.output_dir) / SPEED
    path.parent.mkdir(parents=True, exist_ok=True)
    for row in Benchmark(config, device).rows():
        # JSON has no NaN, which is what a broken kernel's error can be; the check has already failed it.
        row["errors"] = {what: error if math.isfinite(error) else None for what, error in row["errors"].items()}
        append_rows(path, [row])
        inputs = "dense" if row["sparsity"] is None else f"{row['pattern']} {row['sparsity']:.0%}"
        what = f"{row['ms']:.4g} ms" if row["status"] == "ok" else f"{row['status']} {row['detail']}"
        what += f" x {row['batch']}" if row.get("batch", 1) > 1 else ""
        say(f"{row['length']:7d}  {inputs:14}  {row['stage']:9}  {row['method']:22}  {row['pass']:16}  {what}")


register_speed_config()


@hydra.main(config_path=CONFIGS, config_name="speed", version_base="1.3")
def main(cfg: DictConfig) -> None:
    with user_errors():
        config = OmegaConf.to_object(cfg)
        check(config)
        if not torch.cuda.is_available():
            raise ValueError(
                "speed is measured on a CUDA GPU and PyTorch sees none; table and figure of rows that are there: "
                f"python -m experiments.speed.report {config.output_dir}"
            )
        config = replace(config, output_dir=str(Path(config.output_dir).expanduser()))
        run(config, "cuda", lambda line: print(line, flush=True))
        print(write_report(Path(config.output_dir)))


if __name__ == "__main__":
    main()
