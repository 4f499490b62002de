"""Training on several GPUs against one: as many processes as a launch has measure their steps of train.py.

    python -m experiments.throughput.scaling                                                       one GPU
    torchrun --standalone --nproc-per-node 2 --max-restarts 3 -m experiments.throughput.scaling    two
    python -m experiments.throughput.scaling_report outputs/parallel                               the table again

Every backend in every mode; one process alone does each mode at ZeRO stage 1, since there the stages do not differ. A
row goes to parallel.jsonl as soon as it is measured, and what has a row there, failed or not, is not measured again.
Where several ranks work and one fails, it writes a row that says so and ends: torchrun starts all of them again.
"""

from experiments.help import answer_help

if __name__ == "__main__":
    answer_help("scaling")  # before PyTorch is imported

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated

import hydra
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig

from dashattn.backends import TRAINABLE
from dashattn.fields import Checked, Line, NonNegativeInt, OneOf, PositiveInt, Text, UserPath, user_path
from experiments.config import TrainConfig, register_configs, to_train_config
from experiments.errors import user_errors
from experiments.files import CONFIGS, SCALING, append_rows, read_rows
from experiments.overrides import override
from experiments.provenance import now, provenance
from experiments.schema import to_config
from experiments.throughput.scaling_report import case_of, write_report
from experiments.throughput.steps import attempt, time_steps
from experiments.training.check import check
from experiments.training.ranks import Ranks, init_ranks, world_size


@dataclass
class Mode(Checked, at="modes"):
    """How the ranks divide the work of a step, which is the same for any number of them."""

    length: PositiveInt = 8192  # tokens of a row
    stage: Annotated[int, OneOf((0, 1, 2, 3))] = 1  # ZeRO stage
    shares_rows: bool = False  # each row is of all ranks, as sequence_parallel says; else ranks read different ones
    compile: bool = True  # the layers and the loss
    activation_checkpointing: bool = False  # as of train.py
    tokens_per_step: PositiveInt = 131072  # over all ranks
    tokens_per_micro_batch: PositiveInt = 32768  # of one forward pass on one rank
    warmup: NonNegativeInt = 2  # steps before the timed ones: compilation
    steps: PositiveInt = 5  # timed


@dataclass
class ParallelConfig(Checked):
    """One benchmark, of all processes of a launch."""

    output_dir: UserPath = "outputs/parallel"  # of rows and table
    train: list[Text] = MISSING  # overrides of train.py, for all runs
    backends: list[Line] = field(default_factory=lambda: list(TRAINABLE))  # names of attention backends
    modes: dict[Line, Mode] = MISSING  # by name


def register_parallel_config() -> None:
    register_configs()  # every case is a training run
    ConfigStore.instance().store(name="parallel_schema", node=ParallelConfig)


def cases(config: ParallelConfig, ranks: int) -> list[tuple[str, Mode]]:
    """(backend, mode) of all that so many ranks measure, first what comes first of every backend."""
    modes = list(config.modes.values())
    if ranks == 1:
        modes = [replace(mode, stage=1, shares_rows=False) for mode in modes]
        modes = [mode for index, mode in enumerate(modes) if mode not in modes[:index]]
    return [(backend, mode) for mode in modes for backend in config.backends]


def compose_run(config: ParallelConfig, backend: str, mode: Mode, ranks: int, run_dir: Path) -> TrainConfig:
    """The configuration of train.py for one case.

    Raises:
        ValueError: what it says cannot be trained.
    """
    for whole, part in (("tokens_per_step", "tokens_per_micro_batch"), ("tokens_per_micro_batch", "length")):
        if getattr(mode, whole) % getattr(mode, part):
            raise ValueError(
                f"{whole}={getattr(mode, whole)} is no multiple of {part}={getattr(mode, part)}: change one of them"
            )
    rows, micro_batch_rows = mode.tokens_per_step // mode.length, mode.tokens_per_micro_batch // mode.length
    overrides = [
        *config.train,
        *(f"attention={backend}", f"data.seq_len={mode.length}", f"model.max_seq_len={mode.length}"),
        *(f"rows_per_batch={rows}", f"rows_per_micro_batch={micro_batch_rows}", f"compile={mode.compile}"),
        *(f"activation_checkpointing={mode.activation_checkpointing}", f"deepspeed.stage={mode.stage}"),
        *(f"sequence_parallel={ranks if mode.shares_rows else 1}", f"steps={mode.warmup + mode.steps}"),
        *("optim.warmup_steps=0", "check_memory=false", override("run_dir", str(run_dir))),
    ]
    return check(to_train_config(hydra.compose("train", overrides)), ranks)


def check_parallel(config: ParallelConfig, ranks: int) -> None:
    """Refuses what cannot be measured, before anything is.

    Raises:
        ValueError: with the mend.
    """
    wrong = [backend for backend in config.backends if backend not in TRAINABLE]
    if wrong or not config.backends:
        raise ValueError(f"backends has {', '.join(wrong) or 'no entry'}: choose from {', '.join(TRAINABLE)}")
    if not config.modes:
        raise ValueError("modes has no entry: at least one is needed")
    for backend, mode in cases(config, ranks):
        compose_run(config, backend, mode, ranks, Path("unused"))


def measure(config: ParallelConfig, ranks: Ranks, path: Path) -> Iterator[dict]:
    """Yields the rows that were missing, the failed ones on the rank that failed.

    Raises:
        SystemExit: one of several ranks failed. The others wait for it, so that the launcher must end them.
    """
    device = ranks.device.type
    common = provenance(device) | {"train": list(config.train), "ranks": ranks.world_size}
    known = {case_of(row) for row in read_rows(path)}
    ranks.barrier()  # every rank knows the same rows before one of them adds to them
    for backend, mode in cases(config, ranks.world_size):
        row = common | {"date": now(), "backend": backend} | asdict(mode)
        if case_of(row) in known:
            continue
        torch.compiler.reset()  # else what was compiled for one case counts against another's limit
        row |= {"detail": None} | attempt(
            lambda run_dir, case=(backend, mode): compose_run(config, *case, ranks.world_size, run_dir),
            device,
            lambda run, mode=mode: time_steps(run, mode.warmup, mode.steps),
        )
        failed = row["status"] != "ok"
        if ranks.is_main or failed:
            yield from append_rows(path, [row], case_of)  # launches may go side by side
        if failed and ranks.world_size > 1:
            raise SystemExit(1)


register_parallel_config()


@hydra.main(config_path=CONFIGS, config_name="scaling", version_base="1.3")
def main(cfg: DictConfig) -> None:
    with user_errors():
        config = to_config(cfg)
        check_parallel(config, world_size())
        path = user_path(config.output_dir) / SCALING
        path.parent.mkdir(parents=True, exist_ok=True)
        ranks = init_ranks("cuda" if torch.cuda.is_available() else "cpu")
        start = time.monotonic()
        for row in measure(config, ranks, path):
            rate = f"{row['tokens_per_s']:,.0f} tokens/s" if row["status"] == "ok" else row["detail"]
            case = f"{row['ranks']} x {row['backend']}  {row['length']}  stage {row['stage']}"
            print(f"[{time.monotonic() - start:.0f} s] {case}  {row['status']}  {rate}", flush=True)
        if ranks.is_main:
            print(write_report(path.parent))


if __name__ == "__main__":
    main()
