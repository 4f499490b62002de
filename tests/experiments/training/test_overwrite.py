"""``overwrite=true`` begins anew and loses nothing; default names of runs hold the model."""

import fcntl
import json
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from filelock import FileLock
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig

from experiments.config import TrainConfig
from experiments.errors import Stopped
from experiments.files import CONFIGS, files_below, read_rows
from experiments.sweep import submit
from experiments.training import replacing
from experiments.training.check import check
from experiments.training.ranks import Ranks
from experiments.training.replacing import make_way, makes_way, set_aside
from experiments.training.run import save
from slurm.launcher import LauncherConfig
from train import train


@pytest.fixture
def config(make_config) -> TrainConfig:
    return make_config("run", "model.vocab_size=300", "steps=2", "save_every=1")


def replaced(tmp_path):
    return sorted(tmp_path.glob("run.replaced-*"))


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_begins_anew_and_the_old_one_is_kept(config, tmp_path, capsys):
    run = train(config)
    before = contents(run)
    other = replace(config, seed=1, overwrite=True)
    assert train(other) == run
    (aside,) = replaced(tmp_path)
    assert contents(aside) == before
    assert files_below(tmp_path, "metrics.jsonl") == [run / "metrics.jsonl"]  # of two, whose rows may not be told apart
    assert files_below(aside, "metrics.jsonl") == [aside / "metrics.jsonl"]
    assert f"what was in {run} is in {aside}" in capsys.readouterr().out
    assert [row["step"] for row in read_rows(run / "metrics.jsonl") if row["split"] == "train"] == [1, 2]
    # It is complete: the next one makes it way in turn. One that is not goes on, as after a kill.
    assert makes_way(check(other))
    longer = replace(check(other), steps=4)
    assert makes_way(longer), "of another configuration"
    train(replace(longer, seed=2, steps=2))
    assert len(replaced(tmp_path)) == 2


def test_one_that_was_killed_goes_on_by_the_same_command(config, tmp_path, monkeypatch):
    def save_first(run, step):
        if step == 2:
            raise KeyboardInterrupt
        save(run, step)

    again = replace(config, overwrite=True, eval_every=2)
    train(config)
    monkeypatch.setattr("train.save", save_first)
    with pytest.raises(KeyboardInterrupt):
        train(again)
    monkeypatch.undo()
    assert not makes_way(check(again))
    # A branch on the hub stands for the commit that the run began with.
    moved = replace(again, data=replace(again.data, max_documents=7))
    assert makes_way(check(moved))
    with monkeypatch.context() as patch:
        patch.setattr(replacing, "with_commits", lambda data, *run: again.data if data == moved.data else None)
        assert not makes_way(check(moved))
    train(again)
    assert len(replaced(tmp_path)) == 1
    assert (tmp_path / "run" / "resumed" / "step-00000001").is_dir()
    # Killed behind the last step, too: its validation is still to come.
    metrics = tmp_path / "run" / "metrics.jsonl"
    rows = [row for row in read_rows(metrics) if row["split"] != "validation"]
    assert makes_way(check(again))
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert not makes_way(check(again))


def test_what_does_not_come_to_begin_leaves_all_as_it_was(config, tmp_path):
    run = train(config)
    before = contents(run)
    with pytest.raises(ValueError, match="nowhere does not exist"):
        train(replace(config, overwrite=True, init_from=str(tmp_path / "nowhere"), any_tokenizer=True))
    assert contents(run) == before
    assert replaced(tmp_path) == []


def test_refusals(config, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "thesis.tex").touch()
    with pytest.raises(ValueError, match="no run directory"):
        train(replace(config, overwrite=True))
    assert (folder / "thesis.tex").exists()
    (folder / "thesis.tex").unlink()
    train(config)
    with FileLock(folder / ".lock"), pytest.raises(ValueError, match="another process is training in"):
        set_aside(replace(config, overwrite=True))
    monkeypatch.setattr(Ranks, "gather", lambda _, value: [("another process is training", 75), value])
    with pytest.raises(Stopped, match="another process is training") as told, ExitStack() as resources:
        make_way(replace(config, overwrite=True), Ranks(1, 2, torch.device("cpu")), resources)
    assert told.value.exit_code == 75


def test_who_only_looks_at_the_lock_is_waited_for(config, tmp_path, monkeypatch):
    run = train(config)
    with (run / ".lock").open("rb") as looks:
        fcntl.flock(looks, fcntl.LOCK_SH)
        monkeypatch.setattr("time.sleep", lambda seconds: fcntl.flock(looks, fcntl.LOCK_UN))
        assert set_aside(replace(config, overwrite=True)) == replaced(tmp_path)[0]


def test_a_job_makes_way_when_it_is_submitted(config, tmp_path, monkeypatch):
    """And not when it is queued again."""
    given = []
    monkeypatch.setattr(submit, "_submit", lambda cells, *_: given.extend(cells) or {cells[0].name: "7"})
    monkeypatch.setattr(submit, "_in_queue", lambda run_dir: {})
    train(config)
    job = replace(check(config), overwrite=True, launcher=LauncherConfig(gpus_per_node=0))
    assert submit.submit_run(job, ["overwrite=true", "launcher=slurm", "steps=2"]) == "7"
    assert len(replaced(tmp_path)) == 1
    assert not any(override.startswith("overwrite") for override in given[0].train)
    monkeypatch.setattr(submit, "_in_queue", lambda run_dir: {config.name: "7"})
    with pytest.raises(ValueError, match="waits or runs as job 7"):
        submit.submit_run(job, ["overwrite=true"])


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["model=60m"], "python_stdlib-60m-full-seed0"),
        (["model=checkpoint", "init_from=/models/smollm2/"], "python_stdlib-smollm2-full-seed0"),
        (["experiment=recall", "model=10m"], "recall-10m-full-seed0"),
    ],
)
def test_default_names_hold_the_model(overrides, name):
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        config = compose("train", overrides, return_hydra_config=True)
    try:
        HydraConfig.instance().set_config(config)  # as ``hydra.main`` does
        assert (config.name, config.run_dir) == (name, f"outputs/{name}")
    finally:
        HydraConfig.instance().cfg = None
