"""What one task of a Slurm job does: it is a rank, calls what the job is for, and ends as that says."""

import os
from collections.abc import Callable

_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def run_task(work: Callable[..., int], *arguments) -> None:
    """Calls ``work(*arguments, rank)`` and ends the process with the code it returns, 0 = done.

    Raises:
        SystemExit: as ``work`` does, with a message; then the job has failed.
    """
    from submitit import JobEnvironment
    from submitit.helpers import TorchDistributedEnvironment

    task = JobEnvironment()
    for name in _RANK_VARIABLES:  # sbatch hands on those of the process that submitted
        os.environ.pop(name, None)
    if task.num_tasks > 1:
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        # srun starts on the first node, where the first rank is; its name need not be known to a resolver.
        os.environ["MASTER_ADDR"] = os.environ.get("SLURM_LAUNCH_NODE_IPADDR", os.environ["MASTER_ADDR"])
    code = work(*arguments, task.global_rank)
    if code:
        # Without a word to submitit, which would take the job for finished. The other ranks' exit must not look like a
        # failure, for which Slurm would end this one too early.
        os._exit(0 if task.global_rank else code)
