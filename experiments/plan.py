"""Memory on each GPU and time of a run or a sweep, before a job is queued: ``python -m experiments.plan``.

Takes the overrides of train.py, or with ``sweep=NAME`` those of a sweep, and a few of its own. Memory is that of
``training.memory``, by which train.py refuses a run; time that of ``rates``.
"""

from experiments.help import answer_help

if __name__ == "__main__":
    answer_help("plan")  # before PyTorch is imported

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore

from dashattn.fields import Checked, Line, PositiveFloat, PositiveInt, Sparsity
from experiments.config import TrainConfig, to_train_config
from experiments.errors import user_errors
from experiments.evaluation.config import register_evaluate_config
from experiments.files import CONFIGS
from experiments.rates import Rate, Row, estimate_rate, kind_of, rows
from experiments.schema import to_config
from experiments.sweep.cells import Cell, SweepConfig, cells, register_sweep_config
from experiments.sweep.check import check_evaluations, compose_training, refusing, told_but_for_seed
from experiments.training.check import check
from experiments.training.memory import (
    GIB,
    USABLE,
    Memory,
    estimate_memory,
    fits,
    meta_model,
    savings,
    vocabulary,
)
from models import Transformer
from models.flops import count_parameters

# GiB that PyTorch finds on a GPU of a kind.
MEMORY_GIB = {"H100": 79.2, "H200": 139.8, "A100": 79.2, "L40S": 44.4, "RTX 4090": 23.5, "B200": 178.4, "GB200": 184.0}
MEMORY_GIB |= {"H100 NVL": 93.1, "H200 NVL": 139.8, "H100 PCIe": 79.2}
NEW = "run_dir=plan-of-a-new-run"  # one that is there resumes its own configuration


@dataclass
class PlanConfig(Checked):
    """What is planned for."""

    gpus: PositiveInt | None = None  # that train together; null = as launcher or sweep says, else one
    gpu: Line | None = None  # kind, H100 or H200 say; null = this machine's, or H100
    memory_gib: PositiveFloat | None = None  # of one GPU; null = as such GPUs have
    # Causal, of sparse layers, assumed for the time; null = attention.target_sparsity, and without it that nothing is
    # left out, the slowest case.
    sparsity: Sparsity | None = None


@dataclass(frozen=True)
class Plan:
    """Of one run."""

    config: TrainConfig  # with the vocabulary's size
    model: Transformer  # on the meta device
    ranks: int
    device: str
    room: float  # bytes of a GPU
    memory: Memory
    other: Memory  # with activation checkpointing where it is without, and the other way round
    rate: Rate
    sparsity: float
    notes: tuple[str, ...] = ()  # on what is asked of it afterwards

    @property
    def tokens(self) -> int:
        return self.config.steps * self.config.rows_per_batch * self.config.data.seq_len

    @property
    def fits(self) -> bool:
        return self.memory.peak <= USABLE * self.room

    @property
    def hours(self) -> tuple[float, float, float]:
        """As expected, at least and at most."""
        rates = (self.rate.tokens_per_s, self.rate.most, self.rate.least)
        return tuple(self.tokens / rate / 3600 for rate in rates)


def plan_run(config: TrainConfig, options: PlanConfig, measured: Sequence[Row]) -> Plan:
    """Memory and time of a run.

    Raises:
        ValueError: it cannot work, whatever memory there is.
    """
    ranks = options.gpus or (1 if config.launcher is None else config.launcher.ranks)
    device = options.gpu or (torch.cuda.get_device_name() if torch.cuda.is_available() else "H100")
    kind, _ = kind_of(device)
    if options.memory_gib is not None:
        room = options.memory_gib * GIB
    elif options.gpu is None and torch.cuda.is_available():
        room = torch.cuda.get_device_properties(0).total_memory
    else:
        room = MEMORY_GIB[kind] * GIB
    precision = config.deepspeed.precision
    if precision == "auto":
        precision = "bf16"
    config = replace(config, device="cpu", deepspeed=replace(config.deepspeed, precision="bf16"))
    config = check(config, ranks)  # as a GPU's, on a machine that may have none
    config = replace(
        config,
        deepspeed=replace(config.deepspeed, precision=precision),
        model=replace(config.model, vocab_size=vocabulary(config)),
    )
    model = meta_model(config)
    other = replace(config, activation_checkpointing=not config.activation_checkpointing)
    sparsity = options.sparsity
    if sparsity is None:
        sparsity = config.attention.target_sparsity or 0.0
    return Plan(
        config,
        model,
        ranks,
        device,
        room,
        estimate_memory(config, ranks, model),
        estimate_memory(other, ranks, model),
        estimate_rate(config, model, ranks, device, sparsity, measured),
        sparsity,
    )


def describe(plan: Plan) -> str:
    """The plan of a run for the reader of the terminal."""
    config, memory, rate = plan.config, plan.memory, plan.rate
    count = count_parameters(plan.model)
    compiled = ", compiled" if config.compile else ""
    lines = [
        f"{count:,} parameters, attention={config.attention.name}, rows of {config.data.seq_len}",
        f"{plan.ranks} x {plan.device}, ZeRO stage {config.deepspeed.stage}, {config.deepspeed.precision}{compiled}",
        "",
        "memory on each GPU, GiB",
    ]
    with_checkpointing, without = plan.other, memory
    if config.activation_checkpointing:
        with_checkpointing, without = memory, plan.other
    for name, value in (
        ("weights", memory.weights),
        ("gradients", memory.gradients),
        ("optimizer", memory.optimizer),
        ("activations", without.activations),
        ("  with activation checkpointing", with_checkpointing.activations),
        ("  of them lists of the sparse kernels", memory.lists),
        ("logits", memory.logits),
        ("peak", without.peak),
        ("  with activation checkpointing", with_checkpointing.peak),
    ):
        lines.append(f"  {name:40} {value / GIB:8.2f}")
    verdict = "fits" if plan.fits else "does not fit"
    lines.append(f"  as configured {memory.peak / GIB:.2f} of {plan.room / GIB:.1f}: {verdict}")
    if not plan.fits:
        lines.append(f"  {_mend(plan)}")
    lines.append(f"  to generate, the cache of {config.data.seq_len} tokens takes {memory.cache / GIB:.2f}")
    expected, least, most = plan.hours
    seen = f"at a sparsity of {plan.sparsity:.0%}" if config.attention.knob else "dense"
    if config.attention.knob and not plan.sparsity:
        seen += ", the slowest case (sparsity=0.75 assumes another)"
    lines += [
        "",
        f"time, {seen}",
        f"  {rate.tokens_per_s:,.0f} tokens/s ({rate.least:,.0f} to {rate.most:,.0f}, as rows lie about the fit)",
        f"  {plan.tokens:,} tokens in {_duration(expected)} ({_duration(least)} to {_duration(most)}), beside "
        "compilation, validation and checkpoints",
        *(f"  note: {note}" for note in rate.notes),
    ]
    parts = {backend.capabilities.in_pytorch for backend in plan.model.backends} - {None}
    if config.attention.impl == "reference" or getattr(config.attention, "prior_heads", "group") == "head":
        parts.add("the whole attention")
    lines += [f"  note: in PyTorch, which takes more memory and time than this: {part}" for part in sorted(parts)]
    return "\n".join(lines)


def _mend(plan: Plan) -> str:
    for overrides, smaller in savings(plan.config, plan.ranks):
        if fits(smaller, plan.ranks, plan.room, plan.model):
            needed = estimate_memory(smaller, plan.ranks, plan.model).peak
            return f"with {' '.join(overrides)} it takes {needed / GIB:.2f}, and fits"
    return "take more GPUs, a smaller model or shorter rows"


def _duration(hours: float) -> str:
    return f"{hours / 24:.1f} days" if hours >= 48 else f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"


def as_new(cell: Cell) -> Cell:
    return replace(cell, train=(*cell.train, NEW))


def plan_sweep(config: SweepConfig, options: PlanConfig, measured: Sequence[Row]) -> Iterator[tuple[Cell, Plan]]:
    """Of each training run of a sweep, whose evaluation can be made; cells that differ by their seed alone are planned
    once.

    Raises:
        ValueError: a cell cannot work.
    """
    if options.gpus is None and config.launcher is None:
        options = replace(options, gpus=config.gpus_per_cell)
    elif options.gpus is None:
        options = replace(options, gpus=config.launcher.ranks)
    register_evaluate_config()
    found = cells(config)
    bases, known = {cell.name: cell for cell in found}, {}
    for cell in found:
        told = told_but_for_seed(cell)
        if told not in known:
            with refusing(f"cell {cell.name}"):
                plan = plan_run(compose_training(as_new(cell), bases.get(cell.base)), options, measured)
                known[told] = replace(plan, notes=tuple(check_evaluations(cell, plan.config, elsewhere=True)))
        yield cell, known[told]


def describe_sweep(config: SweepConfig, planned: Sequence[tuple[Cell, Plan]]) -> str:
    width = max(len(cell.name) for cell, _ in planned)
    lines = [f"{'cell':{width}}  GiB/GPU  fits  tokens/s     time"]
    for cell, plan in planned:
        rate = f"{plan.rate.tokens_per_s:,.0f}"
        fits = "yes" if plan.fits else "no"
        lines.append(
            f"{cell.name:{width}}  {plan.memory.peak / GIB:7.2f}  {fits:4}  {rate:>8}  {_duration(plan.hours[0]):>9}"
        )
    totals = [sum(plan.hours[i] for _, plan in planned) for i in range(3)]
    expected, least, most = map(_duration, totals)
    ranks = planned[0][1].ranks
    lines.append(
        f"{len(planned)} runs, one after the other {expected} ({least} to {most}) on {ranks} x {planned[0][1].device}; "
        f"jobs={config.jobs} at a time with {config.jobs * ranks} GPUs to themselves; evaluations are not counted"
    )
    notes = dict.fromkeys(note for _, plan in planned for note in (*plan.rate.notes, *plan.notes))
    lines += [f"note: {note}" for note in notes]
    return "\n".join(lines)


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The overrides of a plan, and those of what is planned."""
    names = {field.name for field in fields(PlanConfig)}
    own = [argument for argument in arguments if argument.partition("=")[0] in names]
    return own, [argument for argument in arguments if argument not in own]


def run_plan(arguments: Sequence[str]) -> str:
    """What ``dashattn plan`` says.

    Raises:
        ValueError: as ``plan_run``.
    """
    own, planned = split(arguments)
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        options = to_config(compose("plan", own))
        if any(argument.startswith("sweep=") for argument in planned):
            config = to_config(compose("sweep", planned))
            return describe_sweep(config, list(plan_sweep(config, options, rows())))
        config = to_train_config(compose("train", [*planned, NEW]))
        return describe(plan_run(config, options, rows()))


ConfigStore.instance().store(name="plan_schema", node=PlanConfig)
register_sweep_config()  # and what a run is told


if __name__ == "__main__":
    with user_errors():
        print(run_plan(sys.argv[1:]))
