"""train.py as the shell and launchers run it."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments.files import METRICS, START, read_rows
from experiments.training import checkpoint
from experiments.training.checkpoint import read_state
from tests import forked
from train import train

ROOT = Path(__file__).parents[3]


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


def torchrun(ranks=2, *options):
    return (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *options)


def deepspeed(ranks=2):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    options = ("--no_local_rank", "--num_gpus", str(ranks), "--master_port", port)
    return (sys.executable, "-m", "deepspeed.launcher.runner", *options)


def losses(run_dir):
    return {(row["split"], row["step"]): row["loss"] for row in read_rows(run_dir / METRICS)}


RESHARDED = (
    *("attention=dash", "attention.chunk_size=16", "attention.prior=raw"),
    *("save_every=2", "eval_every=4", "stats_every=2", "keep_checkpoints=0"),
)


TARGET = "attention.target_sparsity=0.15"


def set_back(run_dir):
    """To its checkpoint at step 2."""
    (run_dir / "checkpoints" / "latest").write_text("step-00000002\n")
    shutil.rmtree(run_dir / "checkpoints" / "step-00000004")


def launch(tiny_overrides, tmp_path, name, stages, *options, ranks=2):
    """All stages in one launch: starting costs more than training."""
    overrides, _ = tiny_overrides(name + "${deepspeed.stage}", *RESHARDED, f"hydra.sweep.dir={tmp_path}", *options)
    stage = f"deepspeed.stage={','.join(map(str, stages))}"
    done = forked.run("train.py", "-m", *overrides, stage, processes=ranks)
    assert done.returncode == 0, done.stderr


def knobs(run_dir):
    """The one found on the rows of all ranks, and the one that was made of what they all measured."""
    state = read_state(run_dir / "checkpoints/step-00000004")
    return [json.loads((run_dir / START).read_text())["sparsity"]["knob"], state["sparsity"]["knob"]]


def measured(run_dir):
    """What a step says beside its loss."""
    keys = ("grad_norm", "grad_norm_router", "causal_sparsity", "routing_reads", "tokens")
    return [[row[key] for key in keys] for row in read_rows(run_dir / METRICS) if "causal_sparsity" in row]


@pytest.mark.long
def test_two_ranks_train_as_one_and_one_goes_on_from_their_checkpoint(
    make_config, tiny_overrides, tmp_path, monkeypatch
):
    forked_run = SimpleNamespace(run=lambda command, **_: forked.run(*command[1:]))
    monkeypatch.setattr(checkpoint, "subprocess", forked_run)  # DeepSpeed's conversion
    alone = train(make_config("alone", *RESHARDED, TARGET))
    launch(tiny_overrides, tmp_path, "sp${sequence_parallel}-", (1, 3), "sequence_parallel=1,2", TARGET)
    expected = pytest.approx(losses(alone), rel=1e-5)
    for name in ("sp1-1", "sp1-3", "sp2-1", "sp2-3"):
        assert losses(tmp_path / name) == expected
        assert knobs(tmp_path / name) == pytest.approx(knobs(alone), rel=1e-4)
    for name in ("sp2-1", "sp2-3"):  # ranks that share rows see all there is of them
        for row, row_alone in zip(measured(tmp_path / name), measured(alone), strict=True):
            assert row == pytest.approx(row_alone, rel=1e-4)
    for name, new in (("sp1-1", 2), ("sp2-3", 3)):
        together = tmp_path / name
        set_back(together)
        train(make_config(name, f"deepspeed.stage={new}", *RESHARDED, TARGET))
        assert (together / "resumed/step-00000002").exists()
        assert losses(together) == expected
        assert not list((together / "checkpoints").glob(".*"))


@pytest.mark.slow
def test_a_model_that_goes_on_sparsely_ends_within_half_a_point(tmp_path, cache_dir):
    """Of the target, on average over the last 32 steps: steps of 2048 tokens scatter by 0.8 points themselves."""
    debug = ("experiment=debug", f"cache_dir={cache_dir}", "threads=1", "device=cpu", "eval_every=0", "save_every=0")
    dash = ("attention=dash", "attention.chunk_size=8", "attention.target_sparsity=0.75")
    logged = ("log_every=1", "stats_every=1")
    for name, *options in (
        ("dense", "steps=50"),
        ("sparse", "steps=64", "optim.lr=3e-4", f"init_from={tmp_path}/dense", *dash, *logged),
    ):
        done = command([*debug, f"run_dir={tmp_path}/{name}", *options], sys.executable)
        assert done.returncode == 0, done.stderr
    rows = [row for row in read_rows(tmp_path / "sparse" / METRICS) if row["split"] == "train"]
    assert len({row["knob"] for row in rows}) == 16
    assert sum(row["causal_sparsity"] for row in rows[-32:]) / 32 == pytest.approx(0.75, abs=0.005)


@pytest.mark.slow
def test_ranks_may_share_rows_in_one_launch_and_not_in_the_next(make_config, tiny_overrides, tmp_path):
    stages = (0, 1, 2, 3)
    expected = pytest.approx(losses(train(make_config("alone", *RESHARDED))), rel=1e-5)
    for shared in (2, 1, 2):
        launch(tiny_overrides, tmp_path, "run", stages, f"sequence_parallel={shared}")
        for stage in stages:
            assert losses(tmp_path / f"run{stage}") == expected
            set_back(tmp_path / f"run{stage}")
    assert (tmp_path / "run0/resumed/step-00000002").exists()


@pytest.mark.slow
def test_two_pairs_of_ranks_share_rows(make_config, tiny_overrides, tmp_path):
    alone = train(make_config("alone", *RESHARDED))
    options = ("sequence_parallel=2", "rows_per_micro_batch=1")
    launch(tiny_overrides, tmp_path, "pairs", (1, 3), *options, ranks=4)
    for stage in (1, 3):
        assert losses(tmp_path / f"pairs{stage}") == pytest.approx(losses(alone), rel=1e-5)


@pytest.mark.slow
def test_two_ranks_go_on_from_the_checkpoint_of_one(make_config, tiny_overrides, tmp_path):
    stages = (0, 2, 3)
    expected = {}
    for stage in stages:
        alone = train(make_config(f"alone{stage}", f"deepspeed.stage={stage}", *RESHARDED))
        expected[stage] = pytest.approx(losses(alone), rel=1e-5)
        set_back(alone)
    launch(tiny_overrides, tmp_path, "alone", stages)
    for stage in stages:
        assert (tmp_path / f"alone{stage}" / "resumed/step-00000002").exists()
        assert losses(tmp_path / f"alone{stage}") == expected[stage]


LOST_RANK = ROOT / "tests/experiments/training/lost_rank.py"


def assert_resumed_from_step_4(run_dir, alone):
    assert [path.name for path in (run_dir / "resumed").iterdir()] == ["step-00000004"]
    assert losses(run_dir) == pytest.approx(losses(alone), rel=1e-5)


@pytest.mark.slow
def test_torchrun_starts_a_run_again_that_lost_a_rank(make_config, tiny_overrides):
    options = ["steps=8", "save_every=2"]
    alone = train(make_config("alone", *options))
    overrides, run_dir = tiny_overrides("run", *options)
    done = command(overrides, *torchrun(2, "--max-restarts", "1"), script=LOST_RANK)
    assert done.returncode == 0, done.stderr
    assert_resumed_from_step_4(run_dir, alone)


@pytest.mark.slow
def test_deepspeed_starts_the_same_run_and_again_when_it_lost_a_rank(make_config, tiny_overrides):
    options = ["steps=8", "save_every=2"]
    alone = train(make_config("alone", *options))
    overrides, run_dir = tiny_overrides("run", *options, "sequence_parallel=2")
    launcher = deepspeed()
    done = command(overrides, *launcher, script=LOST_RANK)
    assert done.returncode != 0
    assert len(losses(run_dir)) == 5
    done = command(overrides, *launcher, script=LOST_RANK)
    assert done.returncode == 0, done.stderr
    assert_resumed_from_step_4(run_dir, alone)


def test_a_typo_is_one_message(tiny_overrides):
    overrides, run_dir = tiny_overrides("typo", "optim.learning_rate=1")
    done = forked.run("train.py", *overrides)
    assert done.returncode == 1
    assert done.stderr == "error: optim.learning_rate does not exist: did you mean optim.lr or branch_from?\n"
    assert not run_dir.exists()
