"""Two GPUs over NCCL do what one does: pytest -s tests/gpu/test_two_gpus.py also prints what was measured."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
import torch

from experiments.files import read_rows
from experiments.metrics import METRICS

ROOT = Path(__file__).parents[2]
LOST_RANK = ROOT / "tests/experiments/lost_rank.py"
ATTENTION = ("full", "dash", "infllmv2", "nsa")
COMMON = ("logger=off", "data=python_stdlib", "log_every=1", "eval_every=0", "stats_every=0", "optim.warmup_steps=1")
SMALL = (
    *("experiment=debug", *COMMON, "attention=dash", "attention.chunk_size=16", "deepspeed.precision=fp32"),
    *("steps=8", "save_every=2", "keep_checkpoints=0", "device=cuda"),
)
REAL = ("model=350m", *COMMON, "data.pack=plain", "data.validation_rows=2", "device=cuda")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 CUDA GPUs"),
]


@pytest.fixture
def launch(tmp_path, tmp_path_factory):
    """launch(gpus, name, overrides): runs of train.py below tmp_path."""
    cache_dir = tmp_path_factory.getbasetemp() / "cache"

    def start(gpus, name, *overrides, script="train.py", torchrun=()):
        directories = (f"run_dir={tmp_path}/{name}", f"cache_dir={cache_dir}", f"hydra.sweep.dir={tmp_path}")
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus), *torchrun)
        done = subprocess.run(
            [sys.executable, *launcher, str(script), *overrides, "name=run", *directories],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
            capture_output=True,
            text=True,
            timeout=1200,
        )
        assert done.returncode == 0, done.stderr[-5000:]

    return start


def steps(run_dir):
    rows = read_rows(run_dir / METRICS)
    assert rows
    return rows


def losses(run_dir):
    return [row["loss"] for row in steps(run_dir)]


def rate(run_dir):
    """Tokens per second, compilation apart."""
    return median(row["tokens_per_s"] for row in steps(run_dir)[2:])


@pytest.mark.parametrize("attention", ATTENTION)
def test_every_stage_and_shared_rows_train_as_one_gpu(launch, tmp_path, attention):
    setting = (*REAL, f"attention={attention}", "data.seq_len=8192", "rows_per_batch=8", "rows_per_micro_batch=2")
    setting += ("steps=8", "optim.lr=3e-4")
    launch(1, "alone", *setting)
    modes = ("-m", "deepspeed.stage=1,2,3", "sequence_parallel=1,2")
    launch(2, "zero${deepspeed.stage}-sp${sequence_parallel}", *modes, *setting)
    alone = tmp_path / "alone"
    print(f"\n{attention}: one GPU {rate(alone):,.0f} tokens/s")
    for run_dir in sorted(tmp_path.glob("zero*")):
        difference = max(abs(a - b) for a, b in zip(losses(run_dir), losses(alone), strict=True))
        print(
            f"  {run_dir.name}: {rate(run_dir):,.0f} tokens/s, {rate(run_dir) / rate(alone) / 2:.1%} of twice that; "
            f"losses differ by {difference:.1e} at most"
        )
        assert difference < 0.02


@pytest.mark.parametrize("length", [65536, 131072])
@pytest.mark.parametrize("attention", ATTENTION)
def test_long_rows_shared_by_two_gpus_are_those_of_one(launch, tmp_path, attention, length):
    setting = (*REAL, f"attention={attention}", f"data.seq_len={length}", f"model.max_seq_len={length}")
    setting += ("rows_per_batch=1", "steps=4", "activation_checkpointing=true")
    print()
    for gpus in (1, 2):
        launch(gpus, f"{gpus}", *setting, f"sequence_parallel={gpus}")
        last = steps(tmp_path / f"{gpus}")[-1]
        time, memory = last["step_time"], last["peak_memory_mib"] / 1024
        print(f"  {attention}, {length} tokens, {gpus} GPU: {time:.2f} s a step, {memory:.1f} GiB at most")
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), abs=0.02)


def set_back(run_dir):
    """To its checkpoint at step 4."""
    (run_dir / "checkpoints" / "latest").write_text("step-00000004\n")
    for step in (6, 8):
        shutil.rmtree(run_dir / "checkpoints" / f"step-{step:08d}")


@pytest.mark.parametrize(("stage", "other_stage"), [(1, 2), (2, 1), (3, 3)])
def test_a_run_goes_on_with_another_number_of_gpus(launch, tmp_path, stage, other_stage):
    launch(1, "alone", *SMALL)
    expected = pytest.approx(losses(tmp_path / "alone"), rel=1e-3)
    for name, before, after in (("fewer", 2, 1), ("more", 1, 2)):
        launch(before, name, *SMALL, f"deepspeed.stage={stage}", f"sequence_parallel={before}")
        assert losses(tmp_path / name) == expected
        set_back(tmp_path / name)
        launch(after, name, *SMALL, f"deepspeed.stage={other_stage}")
        assert (tmp_path / name / "resumed/step-00000004").exists()
        assert losses(tmp_path / name) == expected


def test_a_lost_rank_ends_in_a_restart_from_the_last_checkpoint(launch, tmp_path):
    launch(2, "whole", *SMALL)
    launch(2, "lost", *SMALL, script=LOST_RANK, torchrun=("--max-restarts", "1"))
    assert [path.name for path in (tmp_path / "lost/resumed").iterdir()] == ["step-00000004"]
    assert losses(tmp_path / "lost") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
