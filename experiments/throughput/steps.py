"""Training throughput: ``python -m experiments.throughput`` measures steps of train.py on one GPU.

First the settings (micro-batch, compilation, activation checkpointing) compete with dense attention at the first
length; with the fastest one that fits, every backend is then measured at every length. Weights are untrained, so the
sparsity is set: before its steps a backend's knob is turned to where the measured sparsity, averaged over the layers,
comes closest to ``sparsity``. Rows go to throughput.jsonl; ``experiments.throughput.report`` makes table and figure.
"""

import gc
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import hydra
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING
from torch import Tensor

from dashattn.backends import BACKENDS, TRAINABLE
from dashattn.fields import (
    Checked,
    Line,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Sparsity,
    Text,
    UserPath,
    user_path,
)
from data import Batch, build_data
from experiments.config import TrainConfig, register_configs, to_train_config
from experiments.files import THROUGHPUT, append_rows
from experiments.overrides import override
from experiments.provenance import now, provenance
from experiments.sparsity import find_knob, knob_span, turned_layers
from experiments.speed.inputs import NEIGHBOURS, PATTERNS
from experiments.speed.methods import explain
from experiments.throughput.report import CASE
from experiments.training.build import build
from experiments.training.check import check
from experiments.training.engine import forward
from experiments.training.metrics import attention_metrics, peak_memory_mib
from experiments.training.run import Run, read_step, take_step

LOADER_SECONDS = 2.0


@dataclass
class Setting(Checked, at="settings"):
    """How a step is computed."""

    micro_batch_tokens: PositiveInt = 32768  # of one forward pass
    compile: bool = True  # the layers and the loss
    activation_checkpointing: bool = False  # as of train.py


@dataclass
class ThroughputConfig(Checked):
    """One benchmark, of one process."""

    output_dir: UserPath = "outputs/throughput"  # of rows, table and figure
    train: list[Text] = MISSING  # overrides of train.py, for all runs
    lengths: list[PositiveInt] = field(default_factory=lambda: [8192, 16384, 32768])  # of rows, in tokens
    backends: list[Line] = field(default_factory=lambda: list(TRAINABLE))  # names of attention backends
    sparsity: Sparsity = 0.75  # causal, on average over the layers
    # Of sparse backends' inputs: shared | clustered | iid. Neighbours in a trained model choose similar chunks, and the
    # kernels serve neighbours together; untrained, each token would choose for itself, which is iid, the worst case.
    patterns: list[Line] = field(default_factory=lambda: ["clustered", "iid"])
    # The fastest that fits is taken for all.
    settings: list[Setting] = field(
        default_factory=lambda: [
            Setting(),
            Setting(compile=False),
            Setting(micro_batch_tokens=65536),
            Setting(micro_batch_tokens=65536, activation_checkpointing=True),
        ]
    )
    tokens_per_step: PositiveInt = 131072  # over all micro-batches; rounded up to whole ones
    warmup: NonNegativeInt = 1  # steps before the timed ones: compilation
    steps: PositiveInt = 3  # timed
    time_budget: PositiveFloat = 500.0  # seconds; what is left then gets a row that says so


def register_throughput_config() -> None:
    register_configs()  # every case is a training run
    ConfigStore.instance().store(name="throughput_schema", node=ThroughputConfig)


def check_throughput(config: ThroughputConfig) -> None:
    """Refuses what cannot be measured, before anything is.

    Raises:
        ValueError: with the mend.
    """
    for name, known in (("backends", TRAINABLE), ("patterns", PATTERNS)):
        wrong = [value for value in getattr(config, name) if value not in known]
        if wrong or not getattr(config, name):
            raise ValueError(f"{name} has {', '.join(wrong) or 'no entry'}: choose from {', '.join(known)}")
    if not config.lengths or not config.settings:
        raise ValueError("lengths and settings need one entry at least")
    if config.sparsity == 0:
        raise ValueError("sparsity=0 leaves nothing out: give a share of the keys above 0")
    for setting in config.settings:
        if setting.micro_batch_tokens < max(config.lengths):
            raise ValueError(
                f"micro_batch_tokens={setting.micro_batch_tokens} is less than a row of {max(config.lengths)}: raise it"
            )
    for backend in config.backends:
        compose_run(config, backend, min(config.lengths), config.settings[0], Path("unused"))


def compose_run(config: ThroughputConfig, backend: str, length: int, setting: Setting, run_dir: Path) -> TrainConfig:
    """The configuration of train.py for one case."""
    rows = setting.micro_batch_tokens // length
    batches = math.ceil(config.tokens_per_step / (rows * length))
    overrides = [
        *config.train,
        *(
            f"attention={backend}",
            f"data.seq_len={length}",
            f"model.max_seq_len={length}",
            override("run_dir", str(run_dir)),
        ),
        *(f"rows_per_micro_batch={rows}", f"rows_per_batch={rows * batches}", f"compile={setting.compile}"),
        *(f"activation_checkpointing={setting.activation_checkpointing}", f"steps={config.warmup + config.steps}"),
        *("optim.warmup_steps=0", "check_memory=false"),  # whether it fits is what is measured
    ]
    return check(to_train_config(hydra.compose("train", overrides)))


def resemble(pattern: str) -> Callable[..., Tensor]:
    """Forward hook of an embedding: neighbours get as much in common as the queries of ``speed.inputs`` have."""
    rho = PATTERNS[pattern]

    def hook(_, inputs: tuple, out_BTE: Tensor) -> Tensor:
        shared_BTE = out_BTE[:, ::NEIGHBOURS].repeat_interleave(NEIGHBOURS, 1)[:, : out_BTE.shape[1]]
        return rho * shared_BTE + (1 - rho**2) ** 0.5 * out_BTE

    return hook


@torch.no_grad()
def turn_knob(run: Run, batch: Batch, target: float) -> float:
    """Set the backend's knob to where the layers' mean causal sparsity is closest to ``target``; returns the knob.

    A top-k has a least value, with which short rows may stay denser than asked for.
    """
    config, model = run.config, run.engine.module

    def sparsity(knob: float) -> float:
        model.set_knob(knob)
        stats = forward(run.engine, batch, run.ranks.device, return_stats=True).stats
        return attention_metrics(stats)["causal_sparsity"]

    span = knob_span(turned_layers(config.attention, config.model.num_layers), config.data.seq_len)
    start = getattr(config.attention, config.attention.knob)
    with torch.compiler.set_stance("force_eager"):
        found = find_knob(sparsity, target, span, start)
    model.set_knob(found.knob)
    return found.knob


def measure(run: Run, config: ThroughputConfig, pattern: str | None) -> dict:
    """What the timed steps took, and what the attention read in the last one."""
    found: dict = {}
    if pattern is not None:
        run.engine.module.embedding.register_forward_hook(resemble(pattern))
        found["knob"] = turn_knob(run, read_step(run).batches[0], config.sparsity)
    return found | time_steps(run, config.warmup, config.steps)


def time_steps(run: Run, warmup: int, steps: int) -> dict:
    """The losses of ``warmup + steps`` steps, what the later ones took, and what the attention read in the last one.

    All ranks must call it; what it returns is of all of them, memory of the one that took most.
    """
    ranks, losses = run.ranks, []
    for step in range(1, warmup + steps + 1):
        if step == warmup + 1:
            wait_for(run)
            run.clock.restart()
        read = read_step(run)
        if read.error is not None:
            raise read.error
        done = take_step(run, step, read)
        losses.append(done.loss)
        if done.grad_norm is None:
            raise ValueError(f"the gradient of step {step} is not finite")
    wait_for(run)
    found = run.clock.read() | {"peak_memory_mib": max(ranks.gather(peak_memory_mib(ranks.device)))}
    found |= {"parameters": parameters_of(run), "loss": losses[-1], "losses": losses}
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        stats = forward(run.engine, read.batches[0], ranks.device, return_stats=True).stats
    run.utilisation.measure(stats)
    return found | run.utilisation.read(read.batches, found["tokens_per_s"]) | attention_metrics(stats)


def parameters_of(run: Run) -> int:
    """Their number; ZeRO stage 3 leaves an empty tensor of each, which knows what it was."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in run.engine.module.parameters())


def wait_for(run: Run) -> None:
    if run.ranks.device.type == "cuda":
        torch.cuda.synchronize(run.ranks.device)


def attempt(compose: Callable[[Path], TrainConfig], device: str, work: Callable[[Run], dict]) -> dict:
    """What ``work`` finds with a run of the configuration that ``compose`` makes for a run directory, and its status;
    or why it could not. The run is freed in any case."""
    held = 0
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()  # DeepSpeed has kept an engine's states after its end: no case's own
    run, found = None, {}
    try:
        with tempfile.TemporaryDirectory() as directory, ExitStack() as resources:
            composed = compose(Path(directory) / "run")
            with torch.device(device):  # draws the weights there: on a CPU that takes longer than the steps
                run = build(composed, (), resources)
            found = {"status": "ok"} | work(run)
            if held:
                found["peak_memory_mib"] -= held / 2**20
    except Exception as error:  # what breaks must not take the others' measurements with it
        status, detail = explain(error)
        found = {"status": status, "detail": detail}
    if run is not None:
        run.engine.destroy()
    del run
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return found


class Benchmark:
    """Yields the rows of one configuration."""

    def __init__(self, config: ThroughputConfig, device: str):
        self.config, self.device = config, device
        self.deadline = time.monotonic() + config.time_budget
        self.common = provenance(device) | {"train": list(config.train)}

    def rows(self) -> Iterator[dict]:
        config = self.config
        lengths = sorted(set(config.lengths))
        tried = {}
        for number, setting in enumerate(config.settings):
            tried[number] = self.case("full", lengths[0], setting, None)
            yield tried[number]
        order = sorted(tried, key=lambda number: -(tried[number]["tokens_per_s"] or 0))
        ranked = [config.settings[number] for number in order if tried[number]["status"] == "ok"]
        for backend in config.backends:
            torch.compiler.reset()  # else what was compiled for one backend counts against another's limit
            for length in lengths:
                for pattern in config.patterns if BACKENDS[backend][0]().knob else [None]:
                    if (backend, length) == ("full", lengths[0]):
                        continue
                    for setting in ranked:
                        row = self.case(backend, length, setting, pattern)
                        yield row
                        if row["status"] != "out of memory":
                            break
        yield self.loader(lengths[0])

    def case(self, backend: str, length: int, setting: Setting, pattern: str | None) -> dict:
        """A row: measured, or why it was not."""
        asked = None if pattern is None else self.config.sparsity
        row = self.row(backend=backend, length=length, pattern=pattern, sparsity=asked, **asdict(setting))
        if time.monotonic() > self.deadline:
            return row | {"status": "out of time", "detail": "raise time_budget"}
        return row | attempt(
            lambda run_dir: compose_run(self.config, backend, length, setting, run_dir),
            self.device,
            lambda run: measure(run, self.config, pattern),
        )

    def loader(self, length: int) -> dict:
        """How fast the data alone come, packed documents, in this process and thread."""
        run = compose_run(self.config, "full", length, self.config.settings[0], Path("unused"))
        stream = build_data(
            replace(run.data, pack="documents"),
            split="train",
            seed=run.seed,
            rows=run.rows_per_micro_batch,
            cache_dir=user_path(run.cache_dir),
        )
        tokens, start = 0, time.perf_counter()
        while time.perf_counter() < start + LOADER_SECONDS:
            tokens += next(stream).num_tokens
        rate = tokens / (time.perf_counter() - start)
        return self.row(backend="loader", length=length) | {"status": "ok", "tokens_per_s": rate}

    def row(self, **case) -> dict:
        empty = dict.fromkeys((*CASE, "knob", "tokens_per_s", "detail"))
        return self.common | {"date": now()} | empty | case


def run_benchmark(config: ThroughputConfig, device: str, say: Callable[[str], None] = print) -> None:
    """Measures, and writes every row as soon as it is there."""
    path = user_path(config.output_dir) / THROUGHPUT
    path.parent.mkdir(parents=True, exist_ok=True)
    for row in Benchmark(config, device).rows():
        append_rows(path, [row])
        case = "  ".join(str(row[name]) for name in CASE if row[name] is not None)
        rate = f"{row['tokens_per_s']:,.0f} tokens/s" if row["tokens_per_s"] else ""
        say(f"{case}  {row['status']}  {row['detail'] or rate}")
