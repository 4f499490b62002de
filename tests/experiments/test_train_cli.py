"""train.py as the shell runs it: a process costs seconds, so there are few."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.files import read_rows
from experiments.metrics import METRICS
from train import train

ROOT = Path(__file__).parents[2]


def command(config_overrides, *launcher):
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    return subprocess.run(
        [*launcher, "train.py", *config_overrides],
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_two_ranks_train_as_one(make_config, tiny_overrides, tmp_path):
    options = ["attention=dash", "attention.chunk_size=16", "save_every=2", "eval_every=4"]
    alone = train(make_config("alone", *options))
    # Both stages in one launch: starting costs more than training.
    overrides, _ = tiny_overrides("zero${deepspeed.stage}", *options, f"hydra.sweep.dir={tmp_path}")
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = command(["-m", *overrides, "deepspeed=zero1,zero3"], *torchrun)
    assert done.returncode == 0, done.stderr
    for stage in (1, 3):
        run_dir = tmp_path / f"zero{stage}"
        for split in ("train", "validation"):
            runs = [[r["loss"] for r in read_rows(d / METRICS) if r["split"] == split] for d in (alone, run_dir)]
            assert runs[0] == pytest.approx(runs[1], rel=1e-5)
        assert (run_dir / "checkpoints" / "latest").read_text() == "step-00000004\n"


def test_a_typo_is_one_message(tiny_overrides):
    overrides, run_dir = tiny_overrides("typo", "optim.learning_rate=1")
    done = command(overrides, sys.executable)
    assert done.returncode == 1
    assert "Key 'learning_rate' not in 'OptimConfig'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not run_dir.exists()
