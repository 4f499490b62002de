"""The cells of a sweep: which there are, and which are done.

A cell is (study, arm, trained knob, seed): a training run and its evaluation. Its commands are processes of their own:
one that dies, of a full GPU say, takes no other with it, and each is a command that a person can repeat. The cells
follow from the sweep's configuration alone, so that every call, on any machine, finds the same ones under the same
names; which are done is read off their directories.

    DIR/CELL/            run directory
    DIR/CELL/cell.json   the commands that completed
    DIR/cells.json       the cells of the sweep and their commands
    DIR/logs/CELL.log    what they said
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path

from filelock import FileLock, Timeout
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import MissingConfigException
from omegaconf import MISSING, OmegaConf

from dashattn.backends import AttentionConfig
from dashattn.fields import (
    Checked,
    Line,
    NonNegativeFloat,
    PositiveInt,
    Seed,
    Sparsity,
    Text,
    Threads,
    UserPath,
    user_path,
)
from experiments.columns import are_texts
from experiments.config import register_configs
from experiments.files import (
    CELL,
    CELL_LOCK,
    CONFIGS,
    LOCK,
    PLAN,
    check_exists,
    is_locked,
    locked,
    read_done,
    write_atomically,
)
from experiments.overrides import override, path_of
from slurm.launcher import LauncherConfig


@dataclass
class ArmConfig(Checked, at="studies.arms"):
    """One line of a frontier: a backend and its options."""

    train: list[Text] = MISSING  # overrides of train.py
    # A cell for each; empty = one, as ``train`` says.
    trained_knobs: list[NonNegativeFloat] = field(default_factory=list)
    knobs: list[NonNegativeFloat] | None = None  # evaluated at each; null = the one trained with
    sparsities: list[Sparsity] | None = None  # in place of knobs: those for which evaluate.py finds the knob
    turned: NonNegativeFloat | None = None  # of several trained knobs the one that is evaluated at these; null = each
    evaluate: list[Text] | None = None  # overrides of its only evaluate.py, in place of the study's; null = the study's


@dataclass
class StudyConfig(Checked, at="studies"):
    """A task, and the arms that are compared on it."""

    train: list[Text] = MISSING  # overrides of train.py for every cell
    base: list[Text] | None = None  # overrides of one more run per seed, from whose weights all arms continue
    evaluate: list[Text] = MISSING  # overrides of evaluate.py
    evaluate_turned: list[Text] | None = None  # of one more evaluate.py, which takes the arms' knobs; null = that one
    arms: dict[Line, ArmConfig] = MISSING  # by name


@dataclass
class SweepConfig(Checked):
    """Studies x arms x trained knobs x seeds."""

    name: Line = MISSING  # of the sweep
    output_dir: UserPath = "outputs/${name}"  # a run directory in it for each cell
    seeds: list[Seed] = field(default_factory=lambda: [0])  # a cell for each
    arms: list[Line] | None = None  # those of the studies that are run; null = all
    jobs: PositiveInt = 1  # cells at a time, dealt out to the GPUs of this machine
    gpus_per_cell: PositiveInt = 1  # that train it together, by torchrun; of a job it is launcher.gpus_per_node
    threads: Threads | None = None  # PyTorch's CPU threads of a cell; null = PyTorch's choice
    launcher: LauncherConfig | None = None  # null = here, slurm = one task of a job array for each cell
    studies: dict[Line, StudyConfig] = MISSING  # by name


def register_sweep_config() -> None:
    register_configs()  # a cell's arms are choices of a training run
    store = ConfigStore.instance()
    store.store(name="sweep_schema", node=SweepConfig)


@dataclass(frozen=True)
class Cell:
    """One training run and its evaluation."""

    name: str
    run_dir: Path
    train: tuple[str, ...]
    evaluate: tuple[str, ...] | None  # None: a base, which is only trained
    base: str | None  # name of the cell it continues from
    evaluate_turned: tuple[str, ...] | None = None  # one more evaluation, with the knob turned
    study: str = ""  # that it is a cell of

    @property
    def commands(self) -> list[list[str]]:
        commands = [["train.py", *self.train]]
        if self.evaluate is not None:
            commands.append(["evaluate.py", *self.evaluate])
        if self.evaluate_turned is not None:
            commands.append(["evaluate.py", *self.evaluate_turned])
        return commands

    def is_done(self) -> bool:
        """Whether these very commands have completed, here or where the sweep's directory lay then."""
        # A sweep that has changed since asks for other commands, and what it changed is done again. Where that is the
        # evaluation alone, train.py finds its run complete and ends at once.
        record = self.run_dir / CELL
        return record.exists() and _anywhere(read_done(self.run_dir)["commands"]) == _anywhere(self.commands)


def missing(found: Sequence[Cell]) -> list[Cell]:
    """Those that are not done, in their order. A base is only there for others to continue from: where they are all
    done (their rows restored, say, without any weights) nobody trains it again."""
    left = [cell for cell in found if not cell.is_done()]
    wanted = {cell.base for cell in left}
    return [cell for cell in left if cell.evaluate is not None or cell.name in wanted]


def _anywhere(commands: list[list[str]]) -> list[list[str]]:
    """Commands of a cell, in which what lies in the sweep's directory has its name alone."""
    homes = [path.parent for argument in commands[0] if (path := path_of(argument, "run_dir"))] if commands else []

    def shortened(argument: str) -> str:
        key, path = argument.partition("=")[0], path_of(argument, "run_dir", "run", "init_from")
        return argument if path is None or path.parent not in homes[-1:] else f"{key}={path.name}"

    return [[shortened(argument) for argument in command] for command in commands]


def is_in_hand(cell: Cell) -> bool:
    """Whether a process runs it on this machine, or trains it anywhere."""
    return is_locked(cell.run_dir / CELL_LOCK) or is_locked(cell.run_dir / LOCK)


def take(cell: Cell) -> FileLock | None:
    """The lock on a cell, to be released when it is run; None: another process runs it.

    Raises:
        OSError: its run directory cannot be written.
    """
    cell.run_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(cell.run_dir / CELL_LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    if is_locked(cell.run_dir / LOCK):  # by a job, by hand, or by a sweep that was killed
        lock.release()
        return None
    return lock


def record_done(run_dir: Path, commands: list[list[str]]) -> None:
    """What ``Cell.is_done`` looks for."""
    write_atomically(run_dir / CELL, json.dumps({"commands": commands}, indent=1) + "\n")


def cells(config: SweepConfig) -> list[Cell]:
    """The cells of a sweep, bases before what continues from them.

    Raises:
        ValueError: no cells, or values that cannot be.
    """
    if not config.studies or not config.seeds or any(not study.arms for study in config.studies.values()):
        raise ValueError("a sweep needs at least one study, one arm in each and one seed")
    if len(set(config.seeds)) != len(config.seeds):
        raise ValueError(f"seeds={list(config.seeds)} names a seed twice: name it once")
    known = dict.fromkeys(arm for study in config.studies.values() for arm in study.arms)
    if config.arms is not None and not (config.arms and known.keys() >= set(config.arms)):
        raise ValueError(f"arms={list(config.arms)}: name some of {', '.join(known)}, or null for all")
    found = [
        cell
        for name, study in config.studies.items()
        for seed in config.seeds
        for cell in _study_cells(config, name, study, seed)
    ]
    names = [cell.name for cell in found]
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{name} would be a cell's name, and no directory's: leave `/` out of studies and arms")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"two cells are called {', '.join(twice)}: rename an arm (`base` is taken where a study has a base) or a "
            "study, or name each of trained_knobs once"
        )
    return found


def _study_cells(config: SweepConfig, study_name: str, study: StudyConfig, seed: int) -> Iterator[Cell]:
    threads = [] if config.threads is None else [f"threads={config.threads}"]

    def trained(label: str, train: Sequence[str], base: Cell | None = None, suffix: str = "") -> Cell:
        name = f"{study_name}-{label}{suffix}-seed{seed}"
        run_dir = user_path(config.output_dir) / name
        # Of two values for one key the later holds: an arm may differ from its study, but no cell from its own name.
        own_name, own_dir = override("name", name), override("run_dir", str(run_dir))
        overrides = [*study.train, *train, f"seed={seed}", own_name, own_dir, *threads]
        if base is None:
            return Cell(name, run_dir, tuple(overrides), evaluate=None, base=None, study=study_name)
        overrides.append(override("init_from", str(base.run_dir)))
        return Cell(name, run_dir, tuple(overrides), evaluate=None, base=base.name, study=study_name)

    def evaluated(cell: Cell, label: str, knobs: Sequence[str], own: Sequence[str] | None) -> Cell:
        # The label is the arm's, not the cell's: the rows of all its seeds and knobs make one line of a figure.
        common = (override("run", str(cell.run_dir)), override("label", label))
        evaluate, turned = (*common, *(study.evaluate if own is None else own), *knobs, *threads), None
        # With a second evaluation the first one asks for everything, dear tasks too, at the knob trained with; the
        # second turns the knob for the few tasks that a frontier is drawn from.
        if own is None and study.evaluate_turned is not None:
            evaluate = (*common, *study.evaluate, *threads)
            turned = (*common, *study.evaluate_turned, *knobs, *threads) if knobs else None
        return replace(cell, evaluate=evaluate, evaluate_turned=turned)

    arms = {label: arm for label, arm in study.arms.items() if config.arms is None or label in config.arms}
    base = None
    if study.base is not None and arms:
        base = trained("base", study.base)
        yield base
    for label, arm in arms.items():
        if arm.knobs is not None and arm.sparsities is not None:
            raise ValueError(f"arm {label} has knobs and sparsities: give one of them")
        asked = {"knobs": arm.knobs, "sparsities": arm.sparsities}
        knobs = [f"{key}=[{','.join(map(_exact, values))}]" for key, values in asked.items() if values is not None]
        if arm.turned is not None and arm.turned not in arm.trained_knobs:
            raise ValueError(
                f"turned={arm.turned:g} of arm {label} is none of trained_knobs={list(arm.trained_knobs)}: take one"
            )
        if not arm.trained_knobs:
            yield evaluated(trained(label, arm.train, base), label, knobs, arm.evaluate)
        for knob in arm.trained_knobs:
            # Which field the knob is, the backend's config says. Where the arm names one of its checkpoints to be
            # turned, the others are evaluated as trained: one point each.
            value = _exact(knob)
            cell = trained(label, [*arm.train, f"{_knob_key(arm.train)}={value}"], base, suffix=f"-knob{value}")
            yield evaluated(cell, label, knobs if arm.turned in (None, knob) else [], arm.evaluate)


def _exact(value: float) -> str:
    """As short as tells it from all other numbers; an integer without a point, which a knob of blocks has to be."""
    return str(int(value)) if value == int(value) else repr(value)


def _knob_key(train: list[str]) -> str:
    """The configuration key of the sparsity knob that an arm's overrides choose."""
    chosen = tuple(argument for argument in train if argument.startswith(("attention=", "attention.")))
    knob = _attention(chosen).knob if any(argument.startswith("attention=") for argument in chosen) else None
    if knob is None:
        raise ValueError(f"trained_knobs needs attention=... with a sparsity knob among the arm's overrides {train}")
    if _attention(chosen).controls_sparsity:
        raise ValueError("trained_knobs and attention.target_sparsity both set the knob of an arm: give one of them")
    return f"attention.{knob}"


def composing() -> AbstractContextManager:
    """Where configurations can be composed."""
    if GlobalHydra.instance().is_initialized():  # this command's own line has done it
        return nullcontext()
    return initialize_config_dir(CONFIGS, version_base="1.3")


@cache
def _attention(overrides: tuple[str, ...]) -> AttentionConfig:
    """What these overrides of train.py make of its attention: the files of configs/attention may have any name."""
    with composing():
        try:
            return OmegaConf.to_object(compose("train", list(overrides)).attention)
        except MissingConfigException as error:
            raise ValueError(f"{', '.join(overrides)}: {str(error).splitlines()[0]}") from None


def write_plan(output_dir: Path, found: list[Cell]) -> None:
    """Record which cells a sweep has, for those who only look at its directory. What another call recorded there, which
    may do another part of it on another GPU, stays."""
    output_dir.mkdir(parents=True, exist_ok=True)
    path, names = output_dir / PLAN, {cell.name for cell in found}
    with locked(path):
        others = [cell for cell in read_plan(output_dir) if cell.name not in names] if path.exists() else []
        plan = [asdict(cell) | {"run_dir": str(cell.run_dir)} for cell in [*others, *found]]
        write_atomically(path, json.dumps(plan, indent=1) + "\n")


def read_plan(output_dir: Path) -> list[Cell]:
    """The cells that ``write_plan`` recorded. Raises ValueError if the directory is no sweep's."""
    check_exists(output_dir, "give the sweep's output_dir")
    path = output_dir / PLAN
    if not path.exists():
        raise ValueError(f"{output_dir} is no sweep's directory (it has no {PLAN}): give the sweep's output_dir")
    try:
        plans = json.loads(path.read_bytes())
        if not isinstance(plans, list) or not plans:
            raise ValueError("it names no cell")
        return [_from_json(plan) for plan in plans]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it; the sweep's command writes it anew") from None


_TEXTS, _MAY_BE_NULL = ("name", "run_dir", "base", "study"), ("base", "evaluate", "evaluate_turned")


def _from_json(plan: dict) -> Cell:
    for key, value in plan.items():
        is_right = isinstance(value, str) if key in _TEXTS else are_texts(value)
        if not is_right and not (value is None and key in _MAY_BE_NULL):
            raise ValueError(f"a cell's {key} cannot be {value!r}")
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in plan.items()}
    return Cell(**fields | {"run_dir": Path(plan["run_dir"])})
