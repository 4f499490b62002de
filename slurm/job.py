"""What one task of a Slurm job does: it is a rank of a run, or of a cell of a sweep, and asks to be queued again."""

import os
import signal
from pathlib import Path

from submitit import JobEnvironment
from submitit.helpers import TorchDistributedEnvironment

from experiments.errors import REQUEUE
from experiments.signals import Children
from experiments.sweep.cells import Cell, run_cell

_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def run_task(cell: Cell, log_dir: Path) -> None:
    """Train as this task's rank; the first rank evaluates then.

    Slurm sends SIGUSR2 before the time is up: the run saves, and the exit code asks the batch script, outside of any
    container, to queue the job again. SIGTERM saves too, but a job that is preempted or cancelled is Slurm's to queue.

    Raises:
        SystemExit: the cell did not get done.
    """
    task = JobEnvironment()
    for name in _RANK_VARIABLES:  # sbatch hands on those of the process that submitted
        os.environ.pop(name, None)
    if task.num_tasks > 1:
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        # srun starts on the first node, where the first rank is; its name need not be known to a resolver.
        os.environ["MASTER_ADDR"] = os.environ.get("SLURM_LAUNCH_NODE_IPADDR", os.environ["MASTER_ADDR"])
    with Children() as children:
        outcome = run_cell(cell, log_dir, children, rank=task.global_rank)
        if outcome.status == "stopped":
            # Without a word to submitit, which would take the job for finished. The other ranks' exit must not look
            # like a failure, for which Slurm would end this one too early.
            asks = children.received in (signal.SIGUSR1, signal.SIGUSR2)
            os._exit(0 if task.global_rank else REQUEUE if asks else 128 + signal.SIGTERM)
        if outcome.status != "done":
            raise SystemExit(outcome.message)
