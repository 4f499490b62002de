"""Whether the cells of a sweep can work, asked before one is trained, or waits in a queue for hours."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

from hydra import compose
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from dashattn.fields import user_path
from experiments.config import TrainConfig, to_train_config
from experiments.evaluation.check import check_ahead
from experiments.evaluation.config import EvaluateConfig, register_evaluate_config
from experiments.evaluation.target import check_device
from experiments.files import CONFIG, check_writable
from experiments.origin import take_from_origin
from experiments.schema import to_config
from experiments.sweep.cells import Cell, composing
from experiments.training.check import check
from models.hf import check_continues


def check_cells(found: Sequence[Cell], ranks: int, *, elsewhere: bool) -> list[str]:
    """Compose and check the training and the evaluations of every cell, as train.py and evaluate.py will. Returns what
    only the trained weights decide, in a line each.

    Args:
        ranks: of a training.
        elsewhere: they will run on another machine, with another device.

    Raises:
        ValueError: that names the first cell that cannot work, or whose rows no figure could tell from another study's.
    """
    register_evaluate_config()
    bases = {cell.name: cell for cell in found}
    known, notes = set(), []
    studies: dict[tuple, str] = {}
    with composing():
        for cell in found:
            base = bases.get(cell.base)
            told = cell.study, *((told_but_for_seed(one), _is_begun(one)) for one in (cell, base) if one is not None)
            if told in known:
                continue
            known.add(told)
            with refusing(f"cell {cell.name}"):
                train = compose_training(cell, base)
                train = check_anywhere(train, ranks) if elsewhere else check(train, ranks)
                notes += check_evaluations(cell, train, elsewhere=elsewhere)
                if cell.evaluate is not None:
                    rows = (*cell.evaluate[1:], train.data.name, train.data.seq_len)  # all but the run
                    other = studies.setdefault(rows, cell.study)
                    if other != cell.study:
                        raise ValueError(
                            f"no figure can tell its rows from those of study {other}, which has an arm of this name "
                            f"on the same {train.data.name}: rename the arm, or give one of the studies a data.name"
                        )
    return notes


def check_run(cell: Cell, config: TrainConfig, ranks: int) -> list[str]:
    """``config``, which the command line of a single run has composed, and the evaluation after it. Returns as
    ``check_cells``.

    Raises:
        ValueError: one of them cannot work.
    """
    train = check_anywhere(config, ranks)
    register_evaluate_config()
    with composing(), refusing("launcher.evaluate"):
        return check_evaluations(cell, train, elsewhere=True)


def check_anywhere(config: TrainConfig, ranks: int) -> TrainConfig:
    """``check`` for a run that will be elsewhere, on another device."""
    # What runs there need not run here: of device and precision the job itself judges.
    return check(replace(config, device="cpu", deepspeed=replace(config.deepspeed, precision="fp32")), ranks)


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Says of an error in a configuration what it is of."""
    try:
        yield
    except (ValueError, HydraException, OmegaConfBaseException) as error:
        raise ValueError(f"{what} cannot work: {error}") from None


def told_but_for_seed(cell: Cell) -> tuple:
    """What tells it from other cells than those of the same arm with other seeds."""
    own = ("name=", "run_dir=", "seed=") + ("init_from=",) * (cell.base is not None)
    train = tuple(argument for argument in cell.train if not argument.startswith(own))
    return train, *map(_of_evaluation, (cell.evaluate, cell.evaluate_turned))


def compose_training(cell: Cell, base: Cell | None) -> TrainConfig:
    """What a cell trains; of a base that is still to be trained, with the model that it will have.

    Raises:
        ValueError: it leaves open what its origin does not say, or would change its base's model.
    """
    cfg = compose("train", list(cell.train))
    if base is None or _is_begun(base):
        return to_train_config(cfg)
    base_cfg = take_from_origin(compose("train", list(base.train)))
    cfg = take_from_origin(cfg, base_cfg)
    cfg.init_from = None
    config, base_model = to_train_config(cfg), to_train_config(base_cfg).model
    check_continues(replace(config.model, vocab_size=base_model.vocab_size), base_model, base.run_dir)
    return config


def check_evaluations(cell: Cell, train: TrainConfig, *, elsewhere: bool) -> list[str]:
    """Those of a cell that trains ``train``. Returns what only its weights decide. Raises ValueError if evaluate.py
    would end without their rows."""
    notes = []
    for overrides in map(_of_evaluation, (cell.evaluate, cell.evaluate_turned)):
        if overrides is not None:
            config = _compose_evaluation(overrides)
            if not elsewhere:
                check_device(config.device)
                if config.output is not None:
                    check_writable(user_path(config.output), "evaluate.py keeps its rows in output=...")
            notes += [f"cell {cell.name}: {said}" for said in check_ahead(config, train)]
    return notes


def _is_begun(cell: Cell) -> bool:
    """Whether its run says itself what it is."""
    return (cell.run_dir / CONFIG).exists()


def _of_evaluation(overrides: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """Without what names the run."""
    return None if overrides is None else tuple(o for o in overrides if not o.startswith(("run=", "label=")))


@cache
def _compose_evaluation(overrides: tuple[str, ...]) -> EvaluateConfig:
    """Many cells have the same."""
    return to_config(compose("evaluate", ["run=x", *overrides]))
