"""Two GPUs over NCCL do what one does: pytest -n 4 tests/gpu/test_two_gpus.py; -rP also shows how long launches took.

How fast, and at real sizes: experiments/throughput/scaling.py.
"""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from experiments.files import METRICS, read_rows
from tests.experiments.training.test_train_cli import LOST_RANK, deepspeed, torchrun

ROOT = Path(__file__).parents[2]
STEPS = 8
SMALL = (
    *("experiment=debug", "logger=off", "attention=dash", "attention.chunk_size=16", "deepspeed.precision=fp32"),
    *(f"steps={STEPS}", "save_every=2", "keep_checkpoints=0", "log_every=1", "eval_every=0", "stats_every=0"),
    *("optim.warmup_steps=1", "device=cuda"),
)
STAGES = "deepspeed.stage=1,2,3"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 CUDA GPUs"),
]


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A directory of all workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if base.name.startswith("popen-") else base


@pytest.fixture(scope="session")
def launch(shared):
    """launch(launcher, run_dir, overrides): a run of train.py; returns its exit code and what it said of errors."""

    def start(launcher, run_dir, *overrides, script="train.py"):
        options = ["-m", f"hydra.sweep.dir={run_dir.parent}"] if STAGES in overrides else []
        options += [*SMALL, *overrides, "name=run", f"run_dir={run_dir}", f"cache_dir={shared}/cache"]
        began = time.monotonic()
        done = subprocess.run(
            # Unlike the timeout of subprocess.run it lets the launcher end its ranks.
            ["timeout", "-k", "20", "200", *launcher, str(script), *options],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
            capture_output=True,
            text=True,
        )
        print(f"{run_dir.name}: {time.monotonic() - began:.0f} s, exit code {done.returncode}")
        return done.returncode, done.stderr[-10000:]

    return start


def losses(run_dir):
    found = [row["loss"] for row in read_rows(run_dir / METRICS)]
    assert len(found) == STEPS
    return found


@pytest.fixture(scope="session")
def alone(launch, shared):
    """Losses of one GPU; the first worker that asks trains it."""
    with FileLock(shared / "alone.lock"):
        if not (shared / "alone" / METRICS).exists():
            code, errors = launch(torchrun(1), shared / "alone")
            assert code == 0, errors
    return pytest.approx(losses(shared / "alone"), rel=1e-3)


def set_back(run_dir):
    """To its checkpoint at step 4."""
    (run_dir / "checkpoints" / "latest").write_text("step-00000004\n")
    for step in (6, 8):
        shutil.rmtree(run_dir / "checkpoints" / f"step-{step:08d}")


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_gpus_and_stage(launch, alone, tmp_path, before, after):
    every = tmp_path / "stage${deepspeed.stage}"
    runs = [tmp_path / f"stage{stage}" for stage in (1, 2, 3)]
    code, errors = launch(torchrun(before), every, STAGES, f"sequence_parallel={before}")
    assert code == 0, errors
    for run_dir in runs:
        assert losses(run_dir) == alone
        set_back(run_dir)
    for old, new in (("stage1", "other"), ("stage2", "stage1"), ("other", "stage2")):
        (tmp_path / old).rename(tmp_path / new)
    code, errors = launch(torchrun(after), every, STAGES)
    assert code == 0, errors
    for run_dir in runs:
        assert (run_dir / "resumed/step-00000004").exists()
        assert losses(run_dir) == alone
    if after == 2:
        set_back(runs[0])
        code, errors = launch(torchrun(after), runs[0], "deepspeed.stage=3")
        assert code != 0
        assert "cannot be resumed at 3" in errors


def test_torchrun_and_deepspeed_start_the_same_run(launch, alone, tmp_path):
    for name, launcher in (("torchrun", torchrun(2)), ("deepspeed", deepspeed(2))):
        code, errors = launch(launcher, tmp_path / name)
        assert code == 0, errors
        assert losses(tmp_path / name) == alone
    assert losses(tmp_path / "deepspeed") == pytest.approx(losses(tmp_path / "torchrun"), rel=1e-4)


def test_a_lost_rank_ends_in_a_restart_from_the_last_checkpoint(launch, alone, tmp_path):
    code, errors = launch(torchrun(2, "--max-restarts", "1"), tmp_path / "lost", script=LOST_RANK)
    assert code == 0, errors
    assert [path.name for path in (tmp_path / "lost/resumed").iterdir()] == ["step-00000004"]
    assert losses(tmp_path / "lost") == alone
