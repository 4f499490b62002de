"""What goes wrong while a run trains: it stops or goes on, and nothing that was learned is lost."""

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import train as train_module
from data.shards import DamagedShardError
from data.text import PreparedTextStream
from experiments.errors import Preempted, Stopped, run_faults
from experiments.files import read_rows
from experiments.signals import STOP_SIGNALS
from experiments.training import build as build_module
from experiments.training import engine
from experiments.training import run as run_module
from experiments.training.anomalies import LossWatch
from experiments.training.engine import DataError
from train import train

ROOT = Path(__file__).parents[3]
KEEP_ALL = ("save_every=1", "keep_checkpoints=0")


def losses(run_dir):
    return {row["step"]: row["loss"] for row in read_rows(run_dir / "metrics.jsonl") if row["split"] == "train"}


def checkpoint(run_dir, step):
    return run_dir / "checkpoints" / f"step-{step:08d}"


def state(run_dir, step):
    return json.loads((checkpoint(run_dir, step) / "state.json").read_text())


@pytest.fixture
def at_step(monkeypatch):
    """at_step[k] = function(output) -> output: applied to the forward pass of the k-th step of this process."""
    actions, forward, count = {}, run_module.forward, iter(range(1, 1000))

    def disturbed(engine, *args, **kwargs):
        output = forward(engine, *args, **kwargs)
        return actions.get(next(count), lambda output: output)(output) if engine.module.training else output

    monkeypatch.setattr(run_module, "forward", disturbed)
    return actions


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_saves_at_the_next_step_and_the_same_command_goes_on(make_config, at_step, number):
    whole, before = train(make_config("whole")), signal.getsignal(number)

    def send(output):
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # at once: one request, as when Slurm and a parent both send it
        return output

    config = make_config("run", "steps=4")
    at_step[4 + 2] = send
    with pytest.raises(Preempted, match=f"stopped by {number.name} and saved at step 3"):
        train(config)
    assert Preempted.exit_code == 75
    assert (checkpoint(Path(config.run_dir), 3).parent / "latest").read_text() == "step-00000003\n"
    assert signal.getsignal(number) is before
    assert losses(train(config)) == losses(whole)


def test_a_signal_in_the_last_step_asks_for_no_other_start(make_config, at_step):
    def send(output):
        os.kill(os.getpid(), signal.SIGTERM)
        return output

    at_step[3] = send  # noticed when the fourth step, the last one, is read
    run_dir = train(make_config("run"))
    assert (run_dir / "checkpoints" / "latest").read_text() == "step-00000004\n"


def test_what_befalls_another_rank_stops_this_one_at_the_same_step(make_config, monkeypatch):
    config, read_step = make_config("run"), train_module.read_step
    for step, change, error, message in (
        (2, {"stops": 1}, Preempted, "stopped by a signal to another rank and saved at step 2"),
        (4, {"failures": 1}, Stopped, r"data source failed at step 4 \(on another rank\)"),
    ):

        def read(run, *, step=step, change=change, **options):
            found = read_step(run, **options)
            return found._replace(**change) if run.tokens == (step - 1) * 4 * 64 else found

        monkeypatch.setattr(train_module, "read_step", read)
        with pytest.raises(error, match=message):
            train(config)
    monkeypatch.undo()
    assert sorted(losses(train(config))) == [1, 2, 3, 4]


def test_a_second_signal_exits_at_once():
    code = """
import os, signal, time
from experiments.signals import StopRequest
with StopRequest() as request:
    os.kill(os.getpid(), signal.SIGUSR1)
    assert request.received is signal.SIGUSR1
    time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGUSR2)  # still of the same request
    time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=30).returncode == 128 + signal.SIGTERM


def not_a_number(output):
    return output._replace(loss=output.loss * float("nan"))


@pytest.mark.parametrize(
    "options",
    [
        ["deepspeed=zero0"],
        ["deepspeed=zero1"],
        ["deepspeed=zero2", "rows_per_micro_batch=2"],
        ["deepspeed=zero3"],
        ["deepspeed=zero1", "deepspeed.precision=bf16"],
        ["deepspeed=zero2", "deepspeed.precision=bf16"],
        ["deepspeed=zero3", "deepspeed.precision=bf16"],
    ],
)
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(make_config, at_step, options):
    passes = 2 if "rows_per_micro_batch=2" in options else 1
    at_step[2 * passes + 1] = not_a_number
    run_dir = train(make_config("run", *options, *KEEP_ALL))
    weights = [load_file(checkpoint(run_dir, step) / "model.safetensors") for step in (2, 3, 4)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(not torch.equal(weights[1][name], weights[2][name]) for name in weights[0])
    assert sorted(losses(run_dir)) == [1, 2, 4]
    assert [state(run_dir, step)["skipped_steps"] for step in (2, 3, 4)] == [0, 1, 1]
    (row,) = read_rows(run_dir / "anomalies.jsonl")
    assert (row["step"], row["kind"], row["loss"]) == (3, "skipped", "nan")
    assert row["data"] == state(run_dir, 2)["data"]


def test_an_infinite_gradient_of_a_finite_loss_is_skipped_too(make_config, at_step, capsys):
    def blow_up(output):
        output.loss.register_hook(lambda gradient: gradient * float("inf"))
        return output

    at_step[3] = blow_up
    run_dir = train(make_config("run", *KEEP_ALL))
    (row,) = read_rows(run_dir / "anomalies.jsonl")
    assert (row["step"], row["kind"], row["grad_norm"]) == (3, "skipped", "inf")
    assert f"WARNING: step 3 skipped: loss {row['loss']:.4g}, grad_norm inf\n" in capsys.readouterr().out
    assert sorted(losses(run_dir)) == [1, 2, 4]


def test_a_step_that_is_not_finite_moves_no_knob(make_config, at_step):
    """Of steps 4 and 8, which are measured, the second one counts."""
    options = ("data.seq_len=128", "data.pack=plain", "attention=dash", "attention.chunk_size=8")
    at_step[4] = not_a_number
    run_dir = train(make_config("run", *options, "attention.target_sparsity=0.6", "steps=9"))
    knobs = {row["step"]: row["knob"] for row in read_rows(run_dir / "metrics.jsonl") if row["split"] == "train"}
    assert knobs[8] == knobs[5] == knobs[1] != knobs[9]


def test_too_many_in_a_row_stop_the_run_with_its_state_kept(make_config, at_step):
    config = make_config("run", "max_skipped_steps=2", "save_every=1", "steps=8")
    at_step.update({2: not_a_number, 4: not_a_number, 5: not_a_number})
    with pytest.raises(Stopped, match=r"2 steps in a row, up to step 5.*Lower optim.*stopped-step-00000005"):
        train(config)
    kept = Path(config.run_dir) / "checkpoints"
    assert (kept / "latest").read_text() == "step-00000004\n"
    assert json.loads((kept / "stopped-step-00000005" / "state.json").read_text())["skipped_steps"] == 3
    at_step.clear()
    assert train(make_config("new", f"init_from={kept / 'stopped-step-00000005'}"))
    train(config)  # the same command goes on from the latest
    assert [row["step"] for row in read_rows(kept.parent / "anomalies.jsonl")] == [2, 4]
    assert state(kept.parent, 8)["skipped_steps"] == 2


def test_a_diverged_run_overwrites_no_checkpoint(make_config):
    config = make_config("run", "steps=9", "optim.lr=1e30", "optim.warmup_steps=0", "max_skipped_steps=2")
    with pytest.raises(Stopped, match="Lower optim"):
        train(config)
    assert [path.name[:13] for path in (Path(config.run_dir) / "checkpoints").iterdir()] == ["stopped-step-"]


@pytest.mark.parametrize("options", [[], ["optim.lr=1e30", "optim.warmup_steps=0"]])
def test_a_run_that_was_never_finite_does_not_end_well_however_short_it_is(make_config, at_step, options):
    config = make_config("run", *options)
    at_step.update({} if options else {step: not_a_number for step in (1, 2, 3, 4)})
    with pytest.raises(Stopped, match=r"up to step 4.*Lower optim"):
        train(config)
    assert [path.name[:13] for path in (Path(config.run_dir) / "checkpoints").iterdir()] == ["stopped-step-"]


def test_a_last_step_that_is_skipped_ends_a_run_whose_weights_are_finite(make_config, at_step):
    at_step[4] = not_a_number
    assert state(train(make_config("run")), 4)["skipped_steps"] == 1


def test_a_spike_is_seen_and_a_noisy_slope_is_not(tmp_path):
    watch = LossWatch(tmp_path / "anomalies.jsonl", skipped=0, limit=3)
    noise = torch.rand(400, generator=torch.Generator().manual_seed(0))
    slope = [6 * 0.99**step + 0.3 * float(noise[step]) for step in range(400)]
    assert not any(watch.judge(loss, is_finite=True) for loss in slope)
    assert watch.judge(slope[-1] + 2, is_finite=True) == "spike"
    assert watch.judge(slope[-1], is_finite=True) is None
    assert watch.judge(slope[-1], is_finite=False) == "skipped"
    assert watch.judge(float("nan"), is_finite=True) == "skipped"
    watch.record("spike", 7, 2.5, float("inf"), [{"rows": 3}])
    expected = {"step": 7, "kind": "spike", "loss": 2.5, "grad_norm": "inf", "data": [{"rows": 3}]}
    assert read_rows(tmp_path / "anomalies.jsonl") == [expected]


@pytest.mark.parametrize(
    ("before", "loss", "judged"),
    [
        ([1.0, 3.0] * 8, 8.01, "spike"),  # six standard deviations of 1 above the mean of 2
        ([1.0, 3.0] * 8, 7.99, None),
        ([1.0, 3.0] * 7 + [1.0], 99.0, None),  # of 15 losses
        ([99.0] * 36 + [1.0, 3.0] * 32, 8.01, "spike"),  # 64 losses are remembered
        ([99.0] + [1.0, 3.0] * 31 + [1.0], 8.01, None),
        ([1.0, 3.0] * 7 + [math.nan] * 8 + [1.0, 3.0], 8.01, "spike"),  # those of skipped steps are not
        ([1.0, 3.0] * 8 + [9.0], 9.0, None),  # a spike is
    ],
)
def test_a_spike_is_six_standard_deviations_above_the_last_64_losses(tmp_path, before, loss, judged):
    watch = LossWatch(tmp_path / "anomalies.jsonl", skipped=0, limit=99)
    for value in before:
        watch.judge(value, is_finite=True)
    assert watch.judge(loss, is_finite=True) == judged


@pytest.mark.parametrize(
    ("options", "rows", "step"),
    [
        ([], 2 * 4, 3),
        (["save_every=2", "rows_per_micro_batch=2"], 3 * 4 + 2, 4),  # the second micro-batch, one step after a save
    ],
)
def test_a_dead_data_source_loses_no_step(make_config, monkeypatch, options, rows, step):
    whole = train(make_config("whole", *options))
    config, written = make_config("run", *options), set()
    read = PreparedTextStream.__next__

    def failing(stream):
        if stream.split == "train" and stream.consumed >= rows:
            raise ConnectionError("the corpus is gone")
        return read(stream)

    with monkeypatch.context() as patch:
        patch.setattr(PreparedTextStream, "__next__", failing)
        for _ in range(2):  # the second time nothing was learned, and nothing is written
            with pytest.raises(Stopped, match=rf"failed at step {step} \(the corpus is gone\).*are saved"):
                train(config)
            written.add(checkpoint(Path(config.run_dir), step - 1).stat().st_ctime_ns)
    assert len(written) == 1
    assert (Path(config.run_dir) / "checkpoints" / "latest").read_text() == f"step-{step - 1:08d}\n"
    assert losses(train(config)) == losses(whole)


@pytest.mark.parametrize(("steps", "options"), [(2, ["save_every=3"]), (4, []), (4, ["save_every=1"])])
def test_validation_data_that_cannot_be_read_lose_no_step(make_config, monkeypatch, steps, options):
    """In the middle of a run and at its end, where a checkpoint is due and where none is."""
    options = ["eval_every=2" if steps == 2 else "eval_every=4", *options]
    rows = read_rows(train(make_config("whole", *options)) / "metrics.jsonl")
    config, read = make_config("run", *options), PreparedTextStream.__next__

    def failing(stream):
        if stream.split == "validation":
            raise DamagedShardError(Path("shard-00000"), "validation.tokens, the 64 KiB at byte 0")
        return read(stream)

    with monkeypatch.context() as patch:
        patch.setattr(PreparedTextStream, "__next__", failing)
        for _ in range(2):  # the second time nothing was learned
            message = rf"validation data failed at step {steps} \(shard-00000 is damaged.*prepare.*All steps are saved"
            with pytest.raises(Stopped, match=message):
                train(config)
    run_dir = Path(config.run_dir)
    assert (run_dir / "checkpoints" / "latest").read_text() == f"step-{steps:08d}\n"
    train(config)
    keys = ("step", "split", "loss")
    assert [[row[key] for key in keys] for row in read_rows(run_dir / "metrics.jsonl")] == [
        [row[key] for key in keys] for row in rows
    ]
    count = len(read_rows(run_dir / "metrics.jsonl"))
    train(config)
    assert len(read_rows(run_dir / "metrics.jsonl")) == count


def test_validation_ends_on_all_ranks_where_one_cannot_read():
    one_failed = SimpleNamespace(sum=lambda *values: [1.0])
    with pytest.raises(DataError, match="on another rank"):
        next(engine._read_together(iter(["a batch"]), one_failed))


def test_a_run_killed_between_a_save_and_its_validation_makes_up_for_it(make_config, monkeypatch):
    config = make_config("run", "eval_every=2", "save_every=2")
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "validation_loss", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(config)
    train(config)
    validated = [row["step"] for row in read_rows(Path(config.run_dir) / "metrics.jsonl") if row["split"] != "train"]
    assert validated == [2, 4]


def test_a_gpu_without_memory_says_what_to_change(make_config, at_step, capsys):
    def exhausted(output):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    at_step[2] = exhausted
    with pytest.raises(SystemExit, match="1"), run_faults():
        train(make_config("run"))
    message = capsys.readouterr().err
    assert message.startswith("error: CUDA out of memory. Tried to allocate 2.00 GiB.\nlower rows_per_micro_batch")
    assert "Traceback" not in message


def test_a_run_that_fails_before_its_first_step_leaves_nothing_open(make_config, monkeypatch):
    def exhausted(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    config = make_config("run")
    with monkeypatch.context() as patch:
        patch.setattr(build_module, "build_engine", exhausted)
        with pytest.raises(torch.OutOfMemoryError) as failure:
            train(config)
    train(config)  # while the failure holds all that was built
    del failure


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_gives_way_to_the_one_before_loudly(make_config, capsys):
    config = make_config("run", *KEEP_ALL)
    run_dir = train(config)
    whole = losses(run_dir)
    shutil.rmtree(checkpoint(run_dir, 4))
    (run_dir / "checkpoints" / "latest").write_text("step-00000003\n")
    flip_a_bit(next(checkpoint(run_dir, 3).glob("deepspeed/*optim_states.pt")))
    train(config)
    out = capsys.readouterr().out
    assert "WARNING: step-00000003 is damaged (deepspeed/zero_pp_rank_0_mp_rank_00_optim_states.pt has" in out
    assert "at step 2" in out
    assert losses(run_dir) == whole
    start = json.loads((run_dir / "resumed/step-00000002/start.json").read_text())
    assert list(start["damaged_checkpoints"]) == ["step-00000003"]


def test_a_full_disk_stops_the_run_and_leaves_what_was_there(make_config, small_disk):
    whole = train(make_config("whole", *KEEP_ALL))
    config = make_config("run", *KEEP_ALL, f"run_dir={small_disk / 'run'}")
    with pytest.raises(Stopped, match=r"could not be written.*has space"):
        train(config)
    left = sorted(path.name for path in (small_disk / "run" / "checkpoints").iterdir())
    assert left[0] == "latest"
    assert left[1] == "step-00000001"
    assert not [name for name in left if "tmp" in name]
    subprocess.run(["mount", "-o", "remount,size=100m", str(small_disk)], check=True)
    assert losses(train(config)) == losses(whole)


def test_a_disk_that_fills_up_between_checkpoints_ends_in_one_message(make_config, at_step, small_disk, capsys):
    """Where a row of metrics.jsonl is written; started again, where the run directory is opened."""
    options = ("steps=40", "save_every=0")  # rows of more than the one page that the file has already
    whole = train(make_config("whole", *options))
    config = make_config("run", *options, f"run_dir={small_disk / 'run'}")
    filler = small_disk / "filler"

    def fill(output):
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        return output

    at_step[40 + 2] = fill
    for _ in range(2):
        with pytest.raises(SystemExit, match="1"), run_faults():
            train(config)
        message = capsys.readouterr().err
        assert "No space left on device: " in message
        assert "make room" in message
        assert "Traceback" not in message
    filler.unlink()
    assert losses(train(config)) == losses(whole)
