"""A run that is killed with SIGKILL again and again at random moments: python crash.py WORKDIR KILLS SEED OVERRIDES...

A life of the run is a fork of this process, so that it costs no start of Python. When all kills are spent, one at
least of them while a checkpoint was written and one in a life that had resumed, the run is left to finish; prints the
number of lives that resumed from a checkpoint, and of those that were killed while saving.
"""

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"
# What every life would import, once for all of them.
import deepspeed  # noqa: F401
import torch._dynamo
import torch.distributed.fsdp  # noqa: F401
from hydra import compose, initialize_config_dir

from data import build_data
from experiments.files import METRICS, read_rows
from experiments.schema import to_config
from train import train

ROOT = Path(__file__).parents[3]


def live(config) -> int:
    """Start a life; returns its process."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            train(config)
            code = 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return process


def wait_for_rows(process: int, run_dir: Path, count: int) -> None:
    """Until the run has written so many rows, or is over."""
    while len(read_rows(run_dir / METRICS)) < count and not os.waitid(
        os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT
    ):
        time.sleep(0.002)


def main(run_dir: Path, kills: int, seed: int, overrides: list[str]) -> None:
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = to_config(compose("train", [*overrides, f"run_dir={run_dir}", "name=crash"]))
    build_data(config.data, split="train", seed=0, rows=1, cache_dir=config.cache_dir)  # lists the corpus, once
    randomness = random.Random(seed)
    process = live(config)  # undisturbed, to know how long a step takes
    wait_for_rows(process, run_dir, 1)
    start = time.monotonic()
    assert os.waitpid(process, 0)[1] == 0
    step_time = (time.monotonic() - start) / config.steps
    os.replace(run_dir, run_dir.with_name("whole"))
    resumed = saving = 0
    while kills > 0 or not (resumed and saving):
        before = len(read_rows(run_dir / METRICS))
        process = live(config)
        wait_for_rows(process, run_dir, before + randomness.randrange(4))
        time.sleep(randomness.uniform(0, 2 * step_time))
        os.kill(process, signal.SIGKILL)
        if os.waitpid(process, 0)[1] == 0:  # it was done before
            shutil.rmtree(run_dir)
            continue
        kills -= 1
        resumed += len(list(run_dir.glob("resumed/*"))) > 0
        saving += len(list(run_dir.glob("checkpoints/.*"))) > 0
    assert os.waitpid(live(config), 0)[1] == 0
    print(f"resumed {resumed} killed while saving {saving}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
