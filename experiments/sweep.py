"""Sweeps: every cell of a study is a training run and its evaluation; only what is missing is done.

A cell is (study, arm, trained knob, seed). Cells are processes of their own, so that one that fails stops no other;
its last words stand in the table at the end and all it said in ``logs/``. A cell that another continues from (the
study's ``base``) is done first.

    outputs/NAME/CELL/            run directory
    outputs/NAME/CELL/cell.json   the commands that completed
    outputs/NAME/logs/CELL.log
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig
from rich.console import Console
from rich.table import Table

from experiments.config import to_config
from experiments.errors import user_errors
from experiments.files import write_atomically

ROOT = Path(__file__).resolve().parents[1]
CELL = "cell.json"


@dataclass
class ArmConfig:
    """One line of a frontier: a backend and its options."""

    train: list[str] = MISSING  # overrides of train.py
    trained_knobs: list[float] = field(default_factory=list)  # a cell for each; empty = one, as `train` says
    knobs: list[float] | None = None  # evaluated at each; null = the one trained with


@dataclass
class StudyConfig:
    """A task, and the arms that are compared on it."""

    train: list[str] = MISSING  # overrides of train.py for every cell
    base: list[str] | None = None  # overrides of one more run per seed, from whose weights all arms continue
    evaluate: list[str] = MISSING  # overrides of evaluate.py
    arms: dict[str, ArmConfig] = MISSING


@dataclass
class SweepConfig:
    """Studies x arms x trained knobs x seeds."""

    name: str = MISSING
    output_dir: str = "outputs/${name}"
    seeds: list[int] = field(default_factory=lambda: [0])
    jobs: int = 1  # cells at a time
    threads: int | None = None  # PyTorch's CPU threads of a cell; null = PyTorch's choice
    studies: dict[str, StudyConfig] = MISSING


def register_sweep_config() -> None:
    ConfigStore.instance().store(name="sweep_schema", node=SweepConfig)


@dataclass(frozen=True)
class Cell:
    """One training run and its evaluation."""

    name: str
    run_dir: Path
    train: tuple[str, ...]
    evaluate: tuple[str, ...] | None  # None: a base, which is only trained
    base: str | None  # name of the cell it continues from

    @property
    def commands(self) -> list[list[str]]:
        commands = [["train.py", *self.train]]
        if self.evaluate is not None:
            commands.append(["evaluate.py", *self.evaluate])
        return commands

    def is_done(self) -> bool:
        """Whether these very commands have completed."""
        record = self.run_dir / CELL
        return record.exists() and json.loads(record.read_text())["commands"] == self.commands


def cells(config: SweepConfig) -> list[Cell]:
    """The cells of a sweep, bases before what continues from them.

    Raises:
        ValueError: no cells, or values that cannot be.
    """
    if not config.studies or not config.seeds or any(not study.arms for study in config.studies.values()):
        raise ValueError("a sweep needs at least one study, one arm in each and one seed")
    if len(set(config.seeds)) != len(config.seeds):
        raise ValueError(f"seeds={list(config.seeds)} names a seed twice")
    if config.jobs < 1:
        raise ValueError(f"jobs={config.jobs}: at least 1 is needed")
    found = [
        cell
        for name, study in config.studies.items()
        for seed in config.seeds
        for cell in _study_cells(config, name, study, seed)
    ]
    names = [cell.name for cell in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"two cells are called {', '.join(twice)}: rename an arm (`base` is taken where a study has a base) or a "
            "study, or name each of trained_knobs once"
        )
    return found


def _study_cells(config: SweepConfig, study_name: str, study: StudyConfig, seed: int) -> Iterator[Cell]:
    threads = [] if config.threads is None else [f"threads={config.threads}"]

    def cell(label: str, train: list[str], evaluate: list[str] | None, base: Cell | None, suffix: str = "") -> Cell:
        name = f"{study_name}-{label}{suffix}-seed{seed}"
        run_dir = Path(config.output_dir) / name
        overrides = [*study.train, *train, f"seed={seed}", f"name={name}", f"run_dir={run_dir}", *threads]
        if base is not None:
            overrides.append(f"init_from={base.run_dir}")
        if evaluate is not None:
            evaluate = (f"run={run_dir}", f"label={label}", *study.evaluate, *evaluate, *threads)
        return Cell(name, run_dir, tuple(overrides), evaluate, None if base is None else base.name)

    base = None
    if study.base is not None:
        base = cell("base", study.base, None, None)
        yield base
    for label, arm in study.arms.items():
        knobs = [] if arm.knobs is None else [f"knobs=[{','.join(f'{knob:g}' for knob in arm.knobs)}]"]
        if not arm.trained_knobs:
            yield cell(label, arm.train, knobs, base)
        for knob in arm.trained_knobs:
            # Which field the knob is, the backend's config says.
            yield cell(label, [*arm.train, f"{_knob_key(arm.train)}={knob:g}"], knobs, base, suffix=f"-knob{knob:g}")


def _knob_key(train: list[str]) -> str:
    from dashattn.backends import BACKENDS

    name = next((o.removeprefix("attention=") for o in train if o.startswith("attention=")), None)
    knob = BACKENDS[name][0].knob if name in BACKENDS else None
    if knob is None:
        raise ValueError(f"trained_knobs needs attention=... with a sparsity knob among the arm's overrides {train}")
    return f"attention.{knob}"


@dataclass(frozen=True)
class Outcome:
    """How a cell ended: ``done``, ``was done``, ``failed`` or ``skipped``."""

    status: str
    seconds: float = 0.0
    message: str = ""


def run_cell(cell: Cell, log_dir: Path) -> Outcome:
    """Runs the cell's commands in processes of their own."""
    start = time.perf_counter()
    log_dir.mkdir(parents=True, exist_ok=True)
    log_path = log_dir / f"{cell.name}.log"
    for command in cell.commands:
        with log_path.open("ab") as log:
            log.write(f"$ {' '.join(command)}\n".encode())
            log.flush()
            code = subprocess.run(
                [sys.executable, str(ROOT / command[0]), *command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
            ).returncode
        if code != 0:
            return Outcome("failed", time.perf_counter() - start, f"{_last_words(log_path)} (see {log_path})")
    write_atomically(cell.run_dir / CELL, json.dumps({"commands": cell.commands}, indent=1) + "\n")
    return Outcome("done", time.perf_counter() - start)


def _last_words(log_path: Path) -> str:
    """The line that says why a process failed: the last one that names an error, else the last."""
    lines = [line.strip() for line in log_path.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"error:|Error\b", line)]
    return (errors or lines or ["no output"])[-1]


def run_sweep(config: SweepConfig, console: Console) -> dict[str, Outcome]:
    """Does what is missing, ``config.jobs`` cells at a time."""
    waiting = cells(config)
    outcomes: dict[str, Outcome] = {}
    for cell in waiting:
        if cell.is_done():
            outcomes[cell.name] = Outcome("was done")
    waiting = [cell for cell in waiting if cell.name not in outcomes]
    console.print(f"{config.name}: {len(waiting)} cells to do, {len(outcomes)} done before", highlight=False)

    log_dir = Path(config.output_dir) / "logs"
    running: dict[Future, Cell] = {}
    with ThreadPoolExecutor(config.jobs) as pool:
        while waiting or running:
            for cell in list(waiting):
                base = Outcome("done") if cell.base is None else outcomes.get(cell.base)
                if base is None or len(running) >= config.jobs:
                    continue
                waiting.remove(cell)
                if base.status in ("failed", "skipped"):
                    outcomes[cell.name] = Outcome("skipped", message=f"{cell.base} {base.status}")
                    continue
                console.print(f"  start  {cell.name}", highlight=False)
                running[pool.submit(run_cell, cell, log_dir)] = cell
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell = running.pop(future)
                outcome = outcomes[cell.name] = future.result()
                console.print(
                    f"  {outcome.status:6} {cell.name}  {outcome.seconds:.0f} s  {outcome.message}",
                    highlight=False,
                    markup=False,
                )
    return outcomes


def print_outcomes(outcomes: dict[str, Outcome], console: Console) -> None:
    table = Table("cell", "status", "seconds", "why")
    for name, outcome in outcomes.items():
        table.add_row(name, outcome.status, f"{outcome.seconds:.0f}" if outcome.seconds else "", outcome.message)
    console.print(table)


register_sweep_config()


@hydra.main(config_path="../configs", config_name="sweep", version_base="1.3")
def main(cfg: DictConfig) -> None:
    with user_errors():
        config = to_config(cfg)
        config.output_dir = str(Path(config.output_dir).expanduser())
        console = Console()
        outcomes = run_sweep(config, console)
    print_outcomes(outcomes, console)
    if any(outcome.status in ("failed", "skipped") for outcome in outcomes.values()):
        raise SystemExit("some cells failed; the others are kept, and the same command tries again what is missing")


if __name__ == "__main__":
    main()
