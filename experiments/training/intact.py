"""Before a run goes on: whether its checkpoint, and what stands beside it, are as the run wrote them."""

import shlex
from collections.abc import Callable

from experiments.config import TrainConfig
from experiments.files import CONFIG, GIT, START, TOKENIZER, WEIGHTS
from experiments.training.checkpoint import damage, foreign_code
from experiments.training.run_dir import RunDir, find_run_dir


def verify_checkpoint(run: RunDir, config: TrainConfig, ranks) -> RunDir:
    """``run`` with a checkpoint whose every checksum is right; all ranks must call it, and share the work.

    Raises:
        ValueError: the checkpoint would run code that no run of ours has written, or what says beside it what the run
            is was damaged.
    """

    def problems_of(look: Callable[..., list[str]]) -> list[str]:
        own = look(run.checkpoint, rank=ranks.rank, world_size=ranks.world_size)
        return sorted({problem for share in ranks.gather(own) for problem in share})

    while run.checkpoint is not None and (problems := problems_of(damage)):
        run = find_run_dir(config, {**run.damaged, run.checkpoint.name: "; ".join(problems)})
    if run.checkpoint is not None:
        problems = problems_of(foreign_code)
        if problems:
            raise ValueError(
                f"{run.checkpoint} was not written by a run of this project: resuming it would run code that came with "
                f"it ({'; '.join(problems)}). Take its weights alone, init_from={run.checkpoint / WEIGHTS}"
            )
        if not run.is_branch:
            _check_identity(run)
    return run


def _check_identity(run: RunDir) -> None:
    """Refuses a run directory whose own word on the run is not that of its checkpoint, which has checksums: the next
    checkpoint would be sealed with it."""
    for kept in (*(run.checkpoint / name for name in (CONFIG, START, GIT)), *(run.checkpoint / TOKENIZER).glob("*")):
        own = run.path / kept.relative_to(run.checkpoint)
        if kept.is_file() and not (own.is_file() and own.read_bytes() == kept.read_bytes()):
            raise ValueError(
                f"{own} is not as the run wrote it: restore it from its checkpoint, "
                f"cp {shlex.quote(str(kept))} {shlex.quote(str(own))}"
            )
