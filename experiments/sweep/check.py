"""Whether the cells of a sweep can work, asked before they wait in a queue for hours."""

from collections.abc import Sequence
from dataclasses import replace

from hydra import compose
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.config import TrainConfig, to_train_config
from experiments.evaluation.config import register_evaluate_config
from experiments.evaluation.evaluate import check_request
from experiments.files import CONFIG
from experiments.origin import CHECKPOINT, LEFT_OPEN
from experiments.schema import to_config
from experiments.sweep.cells import Cell, composing
from experiments.training.check import check


def check_cells(found: Sequence[Cell], ranks: int) -> None:
    """Compose and check the training and the evaluations of every cell, as train.py and evaluate.py will.

    Args:
        ranks: of a training.

    Raises:
        ValueError: that names the first cell that cannot work.
    """
    register_evaluate_config()
    bases = {cell.name: cell for cell in found}
    with composing():
        for cell in found:
            try:
                train = _check_training(cell, bases.get(cell.base), ranks)
                _check_evaluations(cell, train)
            except (ValueError, HydraException, OmegaConfBaseException) as error:
                raise ValueError(f"cell {cell.name} cannot work: {error}") from None


def check_run(cell: Cell, config: TrainConfig, ranks: int) -> None:
    """``config``, which the command line of a single run has composed, and the evaluation after it.

    Raises:
        ValueError: one of them cannot work.
    """
    train = check_anywhere(config, ranks)
    register_evaluate_config()
    try:
        _check_evaluations(cell, train)
    except (ValueError, HydraException, OmegaConfBaseException) as error:
        raise ValueError(f"launcher.evaluate cannot work: {error}") from None


def check_anywhere(config: TrainConfig, ranks: int) -> TrainConfig:
    """``check`` for a run that will be elsewhere, on another device."""
    # What runs there need not run here: of device and precision the job itself judges.
    return check(replace(config, device="cpu", deepspeed=replace(config.deepspeed, precision="fp32")), ranks)


def _check_evaluations(cell: Cell, train: TrainConfig | None) -> None:
    """``train``: as of ``_check_training``."""
    for overrides in (cell.evaluate, cell.evaluate_turned):
        if overrides is not None:
            with composing():
                config = to_config(compose("evaluate", list(overrides)))
            if train is not None:
                check_request(config, train)


def _check_training(cell: Cell, base: Cell | None, ranks: int) -> TrainConfig | None:
    """The configuration that was checked; None where it takes the model of a base that is yet to be trained."""
    cfg = compose("train", list(cell.train))
    if base is not None and not (base.run_dir / CONFIG).exists():
        if _takes_from_origin(cfg):
            return None
        cfg.init_from = None
    return check_anywhere(to_train_config(cfg), ranks)


def _takes_from_origin(cfg: DictConfig) -> bool:
    model = OmegaConf.to_container(cfg.model, resolve=False)
    return LEFT_OPEN in str(model) or cfg.attention.get("name") == CHECKPOINT
