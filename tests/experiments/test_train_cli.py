"""train.py as the shell runs it: a process costs seconds, so there are few."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.files import read_rows
from experiments.metrics import METRICS
from train import train

ROOT = Path(__file__).parents[2]


def command(config_overrides, *launcher, script="train.py"):
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    return subprocess.run(
        [*launcher, str(script), *config_overrides],
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def losses(run_dir):
    return {(row["split"], row["step"]): row["loss"] for row in read_rows(run_dir / METRICS)}


RESHARDED = ("attention=dash", "attention.chunk_size=16", "save_every=2", "eval_every=4", "keep_checkpoints=0")


def set_back(run_dir):
    """To its checkpoint at step 2."""
    (run_dir / "checkpoints" / "latest").write_text("step-00000002\n")
    shutil.rmtree(run_dir / "checkpoints" / "step-00000004")


def launch_two_ranks(tiny_overrides, tmp_path, name, stages):
    """All stages in one launch: starting costs more than training."""
    overrides, _ = tiny_overrides(name + "${deepspeed.stage}", *RESHARDED, f"hydra.sweep.dir={tmp_path}")
    done = command(["-m", *overrides, f"deepspeed.stage={','.join(map(str, stages))}"], *TORCHRUN)
    assert done.returncode == 0, done.stderr


def test_two_ranks_train_as_one_and_one_goes_on_from_their_checkpoint(make_config, tiny_overrides, tmp_path):
    alone = train(make_config("alone", *RESHARDED))
    launch_two_ranks(tiny_overrides, tmp_path, "together", (1, 3))
    for old, new in ((1, 2), (3, 3)):
        together = tmp_path / f"together{old}"
        expected = pytest.approx(losses(alone), rel=1e-5)
        assert losses(together) == expected
        set_back(together)
        train(make_config(f"together{old}", f"deepspeed.stage={new}", *RESHARDED))
        assert (together / "resumed/step-00000002").exists()
        assert losses(together) == expected
        assert not list((together / "checkpoints").glob(".*"))


@pytest.mark.slow
def test_two_ranks_go_on_from_the_checkpoint_of_one(make_config, tiny_overrides, tmp_path):
    stages = (0, 2, 3)
    expected = {}
    for stage in stages:
        alone = train(make_config(f"alone{stage}", f"deepspeed.stage={stage}", *RESHARDED))
        expected[stage] = pytest.approx(losses(alone), rel=1e-5)
        set_back(alone)
    launch_two_ranks(tiny_overrides, tmp_path, "alone", stages)
    for stage in stages:
        assert (tmp_path / f"alone{stage}" / "resumed/step-00000002").exists()
        assert losses(tmp_path / f"alone{stage}") == expected[stage]


@pytest.mark.slow
def test_torchrun_starts_a_run_again_that_lost_a_rank(make_config, tiny_overrides, tmp_path):
    options = ["steps=8", "save_every=2"]
    alone = train(make_config("alone", *options))
    script = tmp_path / "lost_rank.py"
    script.write_text(
        "import os, signal, train\n"
        "read, steps = train.read_batches, []\n"
        "def read_or_die(run):\n"
        "    steps.append(None)\n"
        "    if len(steps) == 6 and os.environ['TORCHELASTIC_RESTART_COUNT'] + os.environ['RANK'] == '01':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return read(run)\n"
        "train.read_batches = read_or_die\n"
        "train.main()\n"
    )
    overrides, run_dir = tiny_overrides("run", *options)
    done = command(overrides, *TORCHRUN, "--max-restarts", "1", script=script)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (run_dir / "resumed").iterdir()] == ["step-00000004"]
    assert losses(run_dir) == pytest.approx(losses(alone), rel=1e-5)


def test_a_typo_is_one_message(tiny_overrides):
    overrides, run_dir = tiny_overrides("typo", "optim.learning_rate=1")
    done = command(overrides, sys.executable)
    assert done.returncode == 1
    assert "Key 'learning_rate' not in 'OptimConfig'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not run_dir.exists()
