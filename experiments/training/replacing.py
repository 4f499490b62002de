"""``overwrite=true``: a run begins anew in a directory that holds one, which is moved aside; nothing is deleted."""

import os
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from filelock import Timeout

from dashattn.fields import user_path
from experiments.config import TrainConfig
from experiments.files import LOCK, REPLACED, hold
from experiments.origin import is_own, with_commits
from experiments.training.ranks import Ranks
from experiments.training.run import owes_validation
from experiments.training.run_dir import find_run_dir


def makes_way(config: TrainConfig) -> bool:
    """Whether ``config.run_dir`` holds a run that ``overwrite`` replaces: any, but for one that was itself begun with
    it, is of this configuration and not complete. So the same command goes on after it was killed."""
    path = user_path(config.run_dir)
    if not config.overwrite or not is_own(path, overwrite=False):
        return False
    if not is_own(path, overwrite=True):
        return True
    try:
        config = replace(config, data=with_commits(config.data, config.run_dir, config.branch_from))
        found = find_run_dir(config)
        return found.step >= config.steps and not owes_validation(config, found)
    except ValueError:  # of another configuration
        return True


def set_aside(config: TrainConfig) -> Path | None:
    """Move the run that makes way to a directory beside it, and say where; None if none does.

    Raises:
        ValueError: another process trains there, or it cannot be moved.
    """
    if not makes_way(config):
        return None
    path = user_path(config.run_dir)
    aside = path.with_name(f"{path.name}{REPLACED}{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**9:09d}")
    try:
        lock = hold(path / LOCK)
        try:
            os.rename(path, aside)
        finally:
            lock.release()
    except Timeout:
        raise ValueError(f"another process is training in {path}: wait for it, or give another run_dir=...") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be moved aside ({error}): give another run_dir=...") from None
    print(f"overwrite=true: what was in {path} is in {aside}")
    return aside


def make_way(config: TrainConfig, ranks: Ranks, resources: ExitStack) -> None:
    """``set_aside`` by the first rank, for all; it is moved back if the new run does not come to begin."""
    aside = ranks.first(lambda: set_aside(config))
    if aside is not None:
        resources.callback(_move_back, aside, user_path(config.run_dir))


def _move_back(aside: Path, path: Path) -> None:
    if not path.exists():
        os.rename(aside, path)
