"""What Slurm says of jobs: what it takes, which are in its queue, and how those ended that are there no more."""

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

_ARRAY_SIZE = 1001  # Slurm's own default
# In the words of accounting, and of slurmstepd when it ends a job.
_ENDS = {
    "TIMEOUT": "timed out",
    "NODE_FAIL": "node failed",
    "BOOT_FAIL": "node failed",
    "OUT_OF_MEMORY": "out of memory",
}
_SAID = {"": "cancelled", "TIME LIMIT": "timed out", "PREEMPTION": "preempted", "NODE FAILURE": "node failed"}


def max_array_size() -> int:
    """How many tasks one array of this cluster may have."""
    try:
        shown = _ask("scontrol", "show", "config")
    except ValueError:
        return _ARRAY_SIZE
    found = re.search(r"MaxArraySize\s*=\s*(\d+)", shown)
    return int(found[1]) if found else _ARRAY_SIZE


def queue(name: str) -> dict[str, tuple[str, str]]:
    """Id -> (state, why it waits in Slurm's words) of the jobs of a name in the queue, whoever submitted them.

    Raises:
        ValueError: Slurm does not answer.
    """
    lines = _ask("squeue", "--array", "--noheader", f"--name={name}", "--format=%i|%T|%r").splitlines()
    return {job: (state, reason) for job, state, reason in (line.split("|", 2) for line in lines)}


def cancel(jobs: Sequence[str]) -> None:
    """Take jobs out of the queue, or end them.

    Raises:
        ValueError: Slurm does not answer.
    """
    if jobs:
        _ask("scancel", *jobs)


def ended(folder: Path, jobs: Sequence[str]) -> dict[str, str]:
    """Id -> how a job ended, of jobs that are in the queue no more, as far as that can be known: ``timed out``,
    ``preempted``, ``cancelled``, ``killed by signal 9``, ``out of memory``, ``node failed``, ``failed``, ``completed``.

    Slurm's accounting tells it; on a cluster without one the jobs that Slurm still remembers, and what it wrote into
    ``folder``.
    """
    if not jobs:
        return {}
    try:
        asked = ["--noheader", "--parsable2", "--allocations", "--format=JobID,State,ExitCode"]
        lines = _ask("sacct", "--array", f"--jobs={','.join(jobs)}", *asked).splitlines()
        found = {job: _end(state, code) for job, state, code in (line.split("|") for line in lines)}
    except ValueError:  # also of lines that are none
        found = _remembered()
    found = {job: found.get(job) or _written(folder / f"{job}_0_log.err") for job in jobs}
    return {job: end for job, end in found.items() if end is not None}


def _remembered() -> dict[str, str]:
    """Of the jobs that ended in the last minutes."""
    try:
        lines = _ask("scontrol", "--oneliner", "show", "jobs").splitlines()
    except ValueError:
        return {}
    found = {}
    for line in lines:
        fields = dict(re.findall(r"\b(JobId|ArrayJobId|ArrayTaskId|JobState|ExitCode)=(\S+)", line))
        if {"JobId", "JobState", "ExitCode"} <= fields.keys():
            job = f"{fields['ArrayJobId']}_{fields['ArrayTaskId']}" if "ArrayJobId" in fields else fields["JobId"]
            found[job] = _end(fields["JobState"], fields["ExitCode"])
    return found


def _written(path: Path) -> str | None:
    """What was written into a job's log when it was ended."""
    said = path.read_text(errors="replace") if path.is_file() else ""
    ends = re.findall(r"CANCELLED AT \S+ (?:DUE TO ([A-Z ]+) )?\*\*\*|task \d+: (Killed)$", said, re.MULTILINE)
    end = None
    for why, is_killed in ends:  # what is cancelled may be killed then
        end = end or "killed by signal 9" if is_killed else _SAID.get(why)
    return end


def _end(state: str, exit_code: str) -> str:
    state = state.split()[0]  # CANCELLED by 1000
    code, signal = map(int, exit_code.split(":"))
    signal = signal or max(code - 128, 0)  # as a shell tells it
    if state == "FAILED" and signal:
        return f"killed by signal {signal}"
    return _ENDS.get(state, state.lower())


def _ask(*command: str) -> str:
    """What one of Slurm's commands prints. Raises ValueError if Slurm does not answer."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        raise ValueError(f"Slurm does not answer ({' '.join(said.split())}): try again") from None
