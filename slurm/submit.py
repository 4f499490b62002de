"""Submits a function's calls to Slurm, one task of an array for each, to run from a copy of the code."""

import math
import shlex
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from slurm.code import check
from slurm.job import run_task
from slurm.launcher import LauncherConfig

# Of the task alone: an array has the id of one of its tasks.
_TASK = '"${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"'
# In the name of a folder: Slurm and submitit put job numbers in place of %j, and PYTHONPATH ends a path at a colon.
_NOT_IN_FOLDERS = "%\\:\n"


def submit(
    work: Callable[..., int],
    calls: Sequence[tuple],
    launcher: LauncherConfig,
    *,
    name: str,
    folder: Path,
    code: Path,
    again: int,
    after: str | None = None,
    behind: Sequence[str] = (),
) -> list[str]:
    """Submit ``work(*call, rank)`` for every call, as one array. Returns the ids of its tasks.

    Args:
        work: a module's function, which every rank calls; its result is the exit code, see ``job.run_task``.
        calls: no more than ``max_array_size``.
        name: of the job.
        folder: for what Slurm and submitit say.
        code: folder of the modules that the job imports, in place of what lies in the directory of the command; called
            as ``slurm.code.check`` says.
        again: exit code of ``work`` that asks for the task to be queued again.
        after: id of a job that must have succeeded before.
        behind: ids of jobs that must have ended before.

    Raises:
        ValueError: Slurm will not take the job.
    """
    from submitit import SlurmExecutor

    wrong = sorted(set(_NOT_IN_FOLDERS) & set(str(folder)))
    if wrong:
        raise ValueError(f"Slurm cannot write to {folder}, whose name has {' '.join(map(repr, wrong))}: take another")
    needs = [] if after is None else [f"afterok:{after}"]
    needs += [f"afterany:{job}" for job in behind]
    try:
        executor = SlurmExecutor(folder, python=launcher.python)
        executor.update_parameters(**_parameters(launcher, name, folder, code, again, needs))
        jobs = executor.map_array(run_task, [work] * len(calls), *zip(*calls, strict=True))
        for job in jobs:  # what a job unpickles is its user's to write, whatever the umask
            job.paths.submitted_pickle.chmod(job.paths.submitted_pickle.stat().st_mode & ~0o022)
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        for left in set(folder.glob("*.pkl")) - set(folder.glob("*_submitted.pkl")):  # calls of no job
            left.unlink()
        said = " ".join(str(error).split())
        raise ValueError(f"Slurm does not take the job ({said}): see the launcher's values") from error
    return [job.job_id for job in jobs]


def has_call(folder: Path, job: str) -> bool:
    """Whether a job of ``submit`` was given what it calls, which comes after Slurm has it; without, it ends in vain."""
    return (folder / f"{job}_submitted.pkl").exists()


def _parameters(
    launcher: LauncherConfig, name: str, folder: Path, code: Path, again: int, needs: Sequence[str]
) -> dict:
    """submitit's, for a job of ``launcher`` that runs ``code``."""
    more = {"requeue": True, **launcher.sbatch_args}
    if needs:
        more |= {"dependency": ",".join(needs), "kill-on-invalid-dep": "yes"}
    parameters = {
        "job_name": name,
        "time": launcher.minutes,
        "nodes": launcher.nodes,
        "ntasks_per_node": max(launcher.gpus_per_node, 1),
        "cpus_per_task": launcher.cpus_per_task,
        "gpus_per_node": launcher.gpus_per_node or None,
        "mem": None if launcher.mem_gb is None else f"{math.ceil(launcher.mem_gb * 1024)}M",
        "partition": launcher.partition,
        "account": launcher.account,
        "qos": launcher.qos,
        "signal_delay_s": launcher.signal_s,
        "array_parallelism": launcher.jobs,
        "additional_parameters": more,
        # A rank that is lost takes the others along: they would wait for it.
        "srun_args": ["--kill-on-bad-exit=1", *launcher.srun_args],
        # The copy of the code, and not what lies in the directory where the command was given.
        "setup": [
            *launcher.setup,
            *check(code, f"{shlex.quote(str(folder))}/{_TASK}_submitted.pkl"),
            f"export PYTHONPATH={shlex.quote(str(code))}",
            "export PYTHONSAFEPATH=1",
        ],
        "teardown": ["code=$?", f"[ $code != {again} ] || scontrol requeue {_TASK}", "exit $code"],
    }
    return {key: value for key, value in parameters.items() if value is not None}
