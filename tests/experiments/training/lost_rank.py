"""train.py, but once in the life of a run its rank 1 is killed, when it reads for its sixth step."""

import os
import signal

import train
from experiments.training import run as steps

read_batches, reads = steps.read_batches, []


def read_or_die(run):
    reads.append(None)
    lost = run.run_dir.path / "lost"
    if len(reads) == 6 and run.ranks.rank == 1 and not lost.exists():
        lost.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return read_batches(run)


steps.read_batches = read_or_die
train.main()
