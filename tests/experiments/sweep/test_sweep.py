"""Which cells a sweep has, and what it does when some are done and some fail."""

import io
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from rich.console import Console

from experiments import signals
from experiments.errors import REQUEUE
from experiments.files import CELL, CELL_LOCK, read_done, read_rows
from experiments.signals import Children
from experiments.sweep import __main__ as sweep
from experiments.sweep import status as status_module
from experiments.sweep.__main__ import gpu_lanes, run_sweep, visible_gpus
from experiments.sweep.cells import (
    ArmConfig,
    StudyConfig,
    SweepConfig,
    cells,
    missing,
    read_plan,
    record_done,
    write_plan,
)
from experiments.sweep.collect import collect, restore
from experiments.sweep.collect import main as main_of_collect
from experiments.sweep.run_cell import Outcome
from experiments.sweep.run_cell import run_cell as run_one_cell
from experiments.sweep.status import status
from tests import forked


def make_config(tmp_path, **changes):
    arms = {
        "full": ArmConfig(train=["attention=full"]),
        "dash": ArmConfig(train=["attention=dash"], trained_knobs=[1.0, 4.0], knobs=[0.5, 8.0]),
    }
    study = StudyConfig(train=["experiment=debug"], base=["attention=full"], evaluate=["tasks=[loss]"], arms=arms)
    values = {"name": "s", "output_dir": str(tmp_path), "studies": {"text": study}, "seeds": [0, 1]} | changes
    return SweepConfig(**values)


def test_cells_are_backends_times_knobs_times_seeds(tmp_path):
    found = {cell.name: cell for cell in cells(make_config(tmp_path, threads=1))}
    arms = ["base", "full", "dash-knob1", "dash-knob4"]
    assert list(found) == [f"text-{arm}-seed{seed}" for seed in (0, 1) for arm in arms]
    cell = found["text-dash-knob4-seed1"]
    assert cell.train == (
        "experiment=debug",
        "attention=dash",
        "attention.router_scale=4",
        "seed=1",
        "name=text-dash-knob4-seed1",
        f"run_dir={tmp_path}/text-dash-knob4-seed1",
        "threads=1",
        f"init_from={tmp_path}/text-base-seed1",
    )
    assert cell.evaluate == (
        f"run={tmp_path}/text-dash-knob4-seed1",
        "label=dash",
        "tasks=[loss]",
        "knobs=[0.5,8]",
        "threads=1",
    )
    run_dir = f"run_dir={tmp_path}/text-base-seed0"
    train = ("experiment=debug", "attention=full", "seed=0", "name=text-base-seed0", run_dir, "threads=1")
    assert found["text-base-seed0"].train == train
    assert found["text-base-seed0"].evaluate is None


def test_an_arm_may_name_sparsities_in_place_of_knobs(tmp_path):
    config = make_config(tmp_path, seeds=[0])
    config.studies["text"].arms = {"dash": ArmConfig(train=["attention=dash"], sparsities=[0.5, 0.9375])}
    (cell,) = [cell for cell in cells(config) if cell.evaluate]
    assert cell.evaluate == (f"run={cell.run_dir}", "label=dash", "tasks=[loss]", "sparsities=[0.5,0.9375]")
    config.studies["text"].arms["dash"].knobs = [1.0]
    with pytest.raises(ValueError, match="arm dash has knobs and sparsities"):
        cells(config)


def test_knobs_keep_all_their_digits(tmp_path):
    config = make_config(tmp_path, seeds=[0])
    arm = ArmConfig(train=["attention=dash"], trained_knobs=[3.14159265, 2_000_000.0], sparsities=[0.9999999])
    config.studies["text"].arms = {"dash": arm}
    found = [cell for cell in cells(config) if cell.evaluate]
    assert [cell.train[2] for cell in found] == ["attention.router_scale=3.14159265", "attention.router_scale=2000000"]
    assert [cell.name for cell in found] == ["text-dash-knob3.14159265-seed0", "text-dash-knob2000000-seed0"]
    assert all("sparsities=[0.9999999]" in cell.evaluate for cell in found)


def test_turned_knobs_may_have_an_evaluation_of_their_own(tmp_path):
    config = make_config(tmp_path, seeds=[0])
    config.studies["text"].evaluate_turned = ["tasks=[json_kv]"]
    found = {cell.name: cell for cell in cells(config)}
    common = [f"run={tmp_path}/text-dash-knob4-seed0", "label=dash"]
    assert found["text-dash-knob4-seed0"].commands[1:] == [
        ["evaluate.py", *common, "tasks=[loss]"],
        ["evaluate.py", *common, "tasks=[json_kv]", "knobs=[0.5,8]"],
    ]
    assert [len(found[f"text-{arm}-seed0"].commands) for arm in ("base", "full")] == [1, 2]
    write_plan(tmp_path, list(found.values()))
    assert read_plan(tmp_path) == list(found.values())


def test_two_parts_of_a_sweep_share_a_plan(tmp_path):
    found = cells(make_config(tmp_path, seeds=[0, 1]))
    write_plan(tmp_path / "new", found[:3])
    write_plan(tmp_path / "new", found[2:])
    assert sorted(cell.name for cell in read_plan(tmp_path / "new")) == sorted(cell.name for cell in found)


def test_an_arm_may_have_an_evaluation_of_its_own(tmp_path):
    config = make_config(tmp_path, seeds=[0])
    config.studies["text"].evaluate_turned = ["tasks=[json_kv]"]
    config.studies["text"].arms["dash"].evaluate = ["tasks=[niah]"]
    found = {cell.name: cell for cell in cells(config)}
    assert found["text-dash-knob4-seed0"].commands[1:] == [
        ["evaluate.py", f"run={tmp_path}/text-dash-knob4-seed0", "label=dash", "tasks=[niah]", "knobs=[0.5,8]"]
    ]
    assert found["text-full-seed0"].evaluate[-1] == "tasks=[loss]"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [0, 0]}, "names a seed twice: name it once"),
        ({"seeds": []}, "at least one study"),
        ({"jobs": 0}, "jobs must be a positive integer"),
        ({"arms": []}, r"arms=\[\]: name some of .*dash"),
        ({"arms": ["dash", "dahs"]}, r"arms=\['dash', 'dahs'\]: name some of .*dash.*, or null for all"),
    ],
)
def test_refusals(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        cells(make_config(tmp_path, **changes))


def test_some_arms_are_their_cells_and_the_bases_of_their_studies(tmp_path):
    whole = cells(make_config(tmp_path))
    arms = {cell.name: cell for cell in whole if not cell.name.startswith(("text-dash", "recall-dash"))}
    assert len(arms) < len(whole)
    named = {arm for study in make_config(tmp_path).studies.values() for arm in study.arms} - {"dash"}
    assert {cell.name: cell for cell in cells(make_config(tmp_path, arms=sorted(named)))} == arms
    config = make_config(tmp_path, arms=["lr:1e-3"])
    config.studies["other"] = StudyConfig(arms={"lr:1e-3": ArmConfig(train=["optim.lr=1e-3"])})
    assert [cell.name for cell in cells(config)] == [f"other-lr:1e-3-seed{seed}" for seed in config.seeds]


def test_two_cells_of_one_name_are_refused(tmp_path):
    config = make_config(tmp_path)
    arms = config.studies["text"].arms
    arms["dash"].trained_knobs = [1.0, 1.0]
    with pytest.raises(ValueError, match="two cells are called text-dash-knob1-seed0"):
        cells(config)
    config.studies["text"].arms = {"base": arms["full"]}
    with pytest.raises(ValueError, match="two cells are called text-base-seed0"):
        cells(config)


def test_trained_knobs_need_a_backend_with_a_knob(tmp_path):
    config = make_config(tmp_path)
    config.studies["text"].arms = {"full": ArmConfig(train=["attention=full"], trained_knobs=[1.0])}
    with pytest.raises(ValueError, match="sparsity knob"):
        cells(config)
    both = ["attention=dash", "attention.target_sparsity=0.75"]
    config.studies["text"].arms = {"dash": ArmConfig(train=both, trained_knobs=[1.0])}
    with pytest.raises(ValueError, match=r"trained_knobs and attention\.target_sparsity both"):
        cells(config)


@pytest.fixture
def ran(monkeypatch):
    """Cells 'run' by recording their names and failing when told to."""
    names, failing = [], set()

    def run_cell(cell, log_dir, children, gpus):
        names.append(cell.name)
        if cell.name in failing:
            return Outcome("failed", 1.0, "boom")
        cell.run_dir.mkdir(parents=True, exist_ok=True)
        (cell.run_dir / CELL).write_text(json.dumps({"commands": cell.commands}))
        return Outcome("done", 1.0)

    monkeypatch.setattr(sweep, "run_cell", run_cell)
    monkeypatch.setattr(sweep, "check_cells", lambda *_, **__: [])  # test_check.py
    return names, failing


def status_of(config):
    write_plan(Path(config.output_dir), cells(config))
    return status(Path(config.output_dir))


def run(config):
    return {name: outcome.status for name, outcome in run_sweep(config, Console(file=io.StringIO())).items()}


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_second_call_does_only_what_is_missing(tmp_path, ran, jobs):
    names, failing = ran
    config = make_config(tmp_path, jobs=jobs)
    failing.add("text-dash-knob1-seed0")
    first = run_sweep(config, Console(file=(said := io.StringIO())))
    assert first.pop("text-dash-knob1-seed0") == Outcome("failed", 1.0, "boom")
    assert set(first.values()) == {Outcome("done", 1.0)}
    assert len(names) == 8
    told = said.getvalue().splitlines()
    assert told[0] == "s: 8 cells to do, 0 done before"
    assert {"  start  text-base-seed0", "  done   text-base-seed0  1 s  "} <= set(told)
    assert "  failed text-dash-knob1-seed0  1 s  boom" in told

    names.clear()
    failing.clear()
    assert run(config)["text-dash-knob1-seed0"] == "done"
    assert names == ["text-dash-knob1-seed0"]

    names.clear()
    outcomes = run_sweep(config, Console(file=(said := io.StringIO())))
    assert set(outcomes.values()) == {Outcome("was done", seconds=0.0, message="")}
    assert said.getvalue() == "s: 0 cells to do, 8 done before\n"
    assert names == []


@pytest.mark.parametrize("jobs", [1, 2])
def test_no_cell_is_taken_before_its_turn(tmp_path, ran, monkeypatch, jobs):
    """Until then another process may do it."""
    take, run_cell, taken, done, ahead = sweep.take, sweep.run_cell, [], [], []

    def slow(cell, *arguments, **options):
        time.sleep(0.02)  # for what would be taken meanwhile
        ahead.append(len(taken) - len(done))
        outcome = run_cell(cell, *arguments, **options)
        done.append(cell.name)
        return outcome

    monkeypatch.setattr(sweep, "take", lambda cell: taken.append(cell.name) or take(cell))
    monkeypatch.setattr(sweep, "run_cell", slow)
    run(make_config(tmp_path, jobs=jobs))
    assert len(taken) == len(done) == 8
    assert max(ahead) == jobs


def test_a_study_continues_where_only_its_rows_are_left(tmp_path, ran):
    names, failing = ran
    config = make_config(tmp_path / "runs")
    failing.add("text-dash-knob4-seed1")
    run(config)
    for cell in cells(config):
        if cell.is_done():
            (cell.run_dir / "metrics.jsonl").write_text('{"step": 1, "split": "train"}\n')
    collect(tmp_path / "runs", tmp_path / "kept")
    kept = (tmp_path / "kept" / "metrics.jsonl").read_text()
    (tmp_path / "kept" / "metrics.jsonl").write_text(kept + '{"step": 1, "split": "train"}\n')
    before = {path: path.read_bytes() for path in (tmp_path / "kept").glob("*.jsonl")}
    with pytest.raises(ValueError, match=r"metrics\.jsonl has rows that say of no run: name another directory"):
        collect(tmp_path / "runs", tmp_path / "kept")
    assert before == {path: path.read_bytes() for path in (tmp_path / "kept").glob("*.jsonl")}
    (tmp_path / "kept" / "metrics.jsonl").write_text(kept)
    shutil.rmtree(tmp_path / "runs")
    (tmp_path / "runs" / "text-full-seed0").mkdir(parents=True)
    (tmp_path / "runs" / "text-full-seed0" / CELL_LOCK).touch()  # of a sweep that was stopped at once
    assert restore(tmp_path / "kept", tmp_path / "runs") == 5
    names.clear()
    failing.clear()
    (tmp_path / "runs").rename(tmp_path / f"moved {ODD}")  # they are done wherever they lie
    config.output_dir = str(tmp_path / f"moved {ODD}")
    assert [cell.name for cell in missing(cells(config))] == ["text-base-seed1", "text-dash-knob4-seed1"]
    (tmp_path / f"moved {ODD}").rename(tmp_path / "runs")
    config.output_dir = str(tmp_path / "runs")
    assert set(run(config).values()) == {"done", "was done"}
    assert names == ["text-base-seed1", "text-dash-knob4-seed1"]  # seed 0 is complete, and needs no base
    assert restore(tmp_path / "kept", tmp_path / "runs") == 0
    with pytest.raises(ValueError, match="names no cell"):
        restore(tmp_path, tmp_path / "runs")
    for name in ("..", "../elsewhere", str(tmp_path / "elsewhere")):
        (tmp_path / "kept" / "cells.jsonl").write_text(json.dumps({"run": name, "commands": [["a"], ["b"]]}) + "\n")
        with pytest.raises(ValueError, match="which is no directory's name: do not trust it"):
            restore(tmp_path / "kept", tmp_path / "runs")


RESULT = {"knob": None, "trained_knob": None, "causal_sparsity": 0.0, "data": "text"}
RESULT |= {"task": "loss", "metric": "nats", "rows": 1, "label": "full", "length": 64}


def test_collected_rows_take_the_place_of_the_runs_own_and_others_stay(tmp_path, capsys):
    kept = tmp_path / "new" / "kept"

    def write(run, steps, scores=()):
        run.mkdir(parents=True, exist_ok=True)
        (run / "metrics.jsonl").write_text("".join(f'{{"step": {step}, "split": "train"}}\n' for step in steps))
        if scores:
            rows = [RESULT | {"score": score} for score in scores]
            (run / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            record_done(run, [["train.py"], ["evaluate.py"]])

    write(tmp_path / "a" / "one", [1, 2], [3.5])
    write(tmp_path / "a" / "deep" / "two", [1])
    assert collect(tmp_path / "a", kept) == {"results.jsonl": 1, "metrics.jsonl": 3, "cells.jsonl": 1}
    write(tmp_path / "b" / "three", [7])
    write(tmp_path / "b" / "one", [9])
    main_of_collect([str(tmp_path / "b"), str(kept)])
    assert capsys.readouterr().out == (
        f"1 rows in {kept}/results.jsonl, 3 rows in {kept}/metrics.jsonl, 1 rows in {kept}/cells.jsonl\n"
    )
    assert [(row["run"], row["step"]) for row in read_rows(kept / "metrics.jsonl")] == [
        ("two", 1),
        ("one", 9),
        ("three", 7),
    ]
    assert [(row["run"], row["score"]) for row in read_rows(kept / "results.jsonl")] == [("one", 3.5)]
    assert read_rows(kept / "cells.jsonl") == [{"run": "one", "commands": [["train.py"], ["evaluate.py"]]}]
    main_of_collect(["--restore", str(kept), str(tmp_path / "c")])
    assert capsys.readouterr().out == f"1 cells of {kept} count as done in {tmp_path / 'c'}\n"
    assert read_done(tmp_path / "c" / "one")["commands"] == [["train.py"], ["evaluate.py"]]
    for source, target, message in (
        (tmp_path / "a", tmp_path / "a" / "deep", "whose rows it would count twice: name another directory"),
        (tmp_path / "a", tmp_path / "a", "whose rows it would count twice"),
        (tmp_path / "nowhere", kept, "nowhere does not exist: name the directory of a sweep or of a run"),
        (tmp_path / "c", kept, "no rows below .*: name the directory of a sweep or of a run"),
        (tmp_path, tmp_path.parent / "kept", "several runs below .* are called one, .*/a/one among them: rename"),
    ):
        with pytest.raises(ValueError, match=message):
            collect(source, target)


def test_one_trained_knob_may_be_the_one_that_is_turned(tmp_path):
    config = make_config(tmp_path)
    config.studies["text"].arms["dash"].turned = 4.0
    evaluated = {cell.name: cell.evaluate for cell in cells(config) if cell.name.endswith("seed0")}
    assert "knobs=[0.5,8]" in evaluated["text-dash-knob4-seed0"]
    assert not any("knobs" in override for override in evaluated["text-dash-knob1-seed0"])
    config.studies["text"].arms["dash"].turned = 2.0
    with pytest.raises(ValueError, match="turned=2"):
        cells(config)


def test_a_failed_base_skips_its_arms_and_no_others(tmp_path, ran):
    names, failing = ran
    failing.add("text-base-seed0")
    statuses = run(make_config(tmp_path))
    assert statuses["text-full-seed0"] == statuses["text-dash-knob4-seed0"] == "skipped"
    assert statuses["text-full-seed1"] == "done"
    assert "text-full-seed0" not in names


def test_changed_commands_are_not_taken_for_done(tmp_path, ran):
    names, _ = ran
    run(make_config(tmp_path))
    names.clear()
    changed = make_config(tmp_path)
    changed.studies["text"].arms["dash"].knobs = [0.5, 8.0, 16.0]
    run(changed)
    assert sorted(names) == sorted(f"text-dash-knob{k}-seed{s}" for k in (1, 4) for s in (0, 1))


ODD = "o= ,()[]{}'\"&#!~;^<>`*?|$äß漢字"


def test_directories_and_arms_may_have_any_name(tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "subprocess", SimpleNamespace(Popen=forked.Process))
    train = ["experiment=pareto_recall", "device=cpu", "steps=2", "optim.warmup_steps=1", "eval_every=0", "logger=off"]
    train += ["data.seq_len=64", "data.pairs_max=8", "data.validation_rows=4", "model.hidden_size=32"]
    arms = {f"lr=0.1 {ODD}": ArmConfig(train=["attention=full"])}
    study = StudyConfig(train=train, base=["attention=full"], evaluate=["tasks=[loss]", "device=cpu"], arms=arms)
    config = make_config(tmp_path / ODD, studies={"mqar": study}, seeds=[0], threads=1)
    assert run(config) == {"mqar-base-seed0": "done", f"mqar-lr=0.1 {ODD}-seed0": "done"}
    (row,) = read_rows(cells(config)[1].run_dir / "results.jsonl")
    assert row["label"] == f"lr=0.1 {ODD}"
    collect(tmp_path / ODD, tmp_path / f"kept {ODD}")
    shutil.rmtree(tmp_path / ODD)
    restore(tmp_path / f"kept {ODD}", tmp_path / ODD)
    assert set(run(config).values()) == {"was done"}


def test_a_cell_has_the_name_of_a_directory(tmp_path):
    config = make_config(tmp_path)
    config.studies["text"].arms = {"a/b": ArmConfig(train=["attention=full"])}
    with pytest.raises(ValueError, match=r"text-a/b-seed0 .*leave `/` out"):
        cells(config)


def test_cells_share_the_gpus_out_among_them(tmp_path, monkeypatch):
    """As many side by side as jobs say, each on the GPU with the fewest others; several train by torchrun."""
    started, lock, both = [], threading.Lock(), threading.Barrier(2, timeout=30)

    def start(self, command, env, **_):
        with lock:
            started.append((command, env.get("CUDA_VISIBLE_DEVICES")))
        if any(word.endswith("train.py") for word in command):
            both.wait()
        return 0

    monkeypatch.setattr(Children, "run", start)
    monkeypatch.setattr("experiments.sweep.run_cell.record_done", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5,7")
    config = make_config(tmp_path, seeds=[0, 1], jobs=2, gpus_per_cell=2)
    config.studies["text"] = StudyConfig(
        train=["experiment=debug"], evaluate=["tasks=[loss]"], arms={"full": ArmConfig(train=["attention=full"])}
    )
    outcomes = run_sweep(config, Console(file=io.StringIO()))
    assert [outcome.status for outcome in outcomes.values()] == ["done"] * 2
    trained = [(command, gpus) for command, gpus in started if any(word.endswith("train.py") for word in command)]
    assert sorted(gpus for _, gpus in trained) == ["2,3", "5,7"]
    assert all("torch.distributed.run" in command and "--nproc-per-node" in command for command, _ in trained)
    evaluated = [(command, gpus) for command, gpus in started if (command, gpus) not in trained]
    assert sorted(gpus for _, gpus in evaluated) == ["2,3", "5,7"]
    assert not any("torch.distributed.run" in command for command, _ in evaluated)

    with pytest.raises(ValueError, match="gpus_per_cell=8, and this machine shows 4 GPUs"):
        run_sweep(make_config(tmp_path, gpus_per_cell=8), Console(file=io.StringIO()))
    assert [gpu_lanes(gpus, 2) for gpus in (["2", "3"], list("abcde"))] == [[("2", "3")], [("a", "b"), ("c", "d")]]
    assert [gpu_lanes(gpus, 1) for gpus in ([], ["a", "b"])] == [[()], [("a",), ("b",)]]
    for named, seen in ((None, ["0", "1", "2", "3"]), ("", ["0", "1", "2", "3"]), ("a,b,,c,d,e", ["a", "b", "c", "d"])):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES") if named is None else monkeypatch.setenv(
            "CUDA_VISIBLE_DEVICES", named
        )
        assert visible_gpus() == seen


# Of a sweep whose cells do nothing for a while: the commands of real ones cost half a minute.
PRETENDING = """
import sys
from pathlib import Path
from experiments.sweep import run_cell
from experiments.sweep.__main__ import main
run_cell.ROOT = Path({root!r})
main()
"""


def test_the_same_sweep_twice_at_once_does_each_cell_once(tmp_path):
    for script in ("train.py", "evaluate.py"):
        (tmp_path / script).write_text("import sys, time; time.sleep(0.5); print(sys.argv[0], 'ran')")
    command = [sys.executable, "-c", PRETENDING.format(root=str(tmp_path)), "sweep=smoke", "studies.recall.base=null"]
    command += [f"output_dir={tmp_path / 'smoke'}", "~studies.recall.arms.infllmv2", "~studies.recall.arms.nsa"]
    running = [forked.Process(command, stdout=(tmp_path / f"said{i}").open("w")) for i in range(2)]
    assert [process.wait(300) for process in running] == [0, 0]
    said = [(tmp_path / f"said{i}").read_text() for i in range(2)]
    names = [f"recall-{arm}-seed0" for arm in ("full", "dash")]
    assert any(f"waits  {names[0]}  is run by another process" in text for text in said)
    for name in names:
        assert sum(f"start  {name}" in text for text in said) == 1, said
        log = (tmp_path / "smoke" / "logs" / f"{name}.log").read_text().splitlines()
        assert [line.split()[0] for line in log] == ["$", f"{tmp_path}/train.py", "$", f"{tmp_path}/evaluate.py"]
    assert all("failed" not in text and text.count("done") >= len(names) for text in said)
    assert {row[1] for row in status(tmp_path / "smoke")} == {"done"}


@pytest.mark.parametrize(("name", "does"), [(".cell.lock", False), (".lock", False), (".cell.lock", True)])
def test_what_another_process_does_not_get_done_is_done_here(tmp_path, ran, monkeypatch, name, does):
    """It may be a sweep, or a run that one left behind when it was killed."""
    names, _ = ran
    monkeypatch.setattr(sweep, "LOOK_SECONDS", 0.01)
    config = make_config(tmp_path, seeds=[0])
    busy, (base, *arms) = tmp_path / "text-full-seed0", [cell.name for cell in cells(config)]
    busy.mkdir()
    lock, said = FileLock(busy / name, thread_local=False), io.StringIO()
    lock.acquire()
    assert {row[0]: row[1] for row in status_of(config)}[busy.name] == "running"

    def release():
        while len(names) < 3:
            time.sleep(0.01)
        if does:
            record_done(busy, next(cell for cell in cells(config) if cell.name == busy.name).commands)
        lock.release()

    other = threading.Thread(target=release)
    other.start()
    outcomes = run_sweep(config, Console(file=said, width=200))
    other.join()
    assert outcomes.pop(busy.name) == (Outcome("was done", 0.0, "by another process") if does else Outcome("done", 1.0))
    assert {outcome.status for outcome in outcomes.values()} == {"done"}
    assert names == [base, *(arm for arm in arms if arm != busy.name), *([] if does else [busy.name])]
    assert said.getvalue().count("waits  text-full-seed0  is run by another process") == 1


def test_a_sweep_that_waits_for_another_process_can_be_stopped(tmp_path, ran, monkeypatch):
    monkeypatch.setattr(sweep, "LOOK_SECONDS", 0.01)
    config = make_config(tmp_path, seeds=[0])
    (tmp_path / "text-base-seed0").mkdir()
    said = io.StringIO()

    def stop():
        while "waits" not in said.getvalue():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    stopper = threading.Thread(target=stop)
    with FileLock(tmp_path / "text-base-seed0" / CELL_LOCK):
        stopper.start()
        outcomes = run_sweep(config, Console(file=said))
    stopper.join()
    assert outcomes["text-base-seed0"].status == "stopped"
    assert {outcome.status for outcome in outcomes.values()} == {"stopped", "skipped"}


def test_a_failing_process_is_reported_with_its_last_words(tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "subprocess", SimpleNamespace(Popen=forked.Process))
    config = make_config(tmp_path, seeds=[0])
    study = config.studies["text"]
    study.base = None
    study.arms = {"full": ArmConfig(train=["attention=full", "data=local", f"data.files=[{tmp_path}/none.txt]"])}
    (outcome,) = run_sweep(config, Console(file=io.StringIO())).values()
    assert outcome.status == "failed"
    assert "none.txt" in outcome.message
    assert "text-full-seed0.log" in outcome.message


@pytest.mark.parametrize(
    ("code", "received", "status"),
    [
        (1, None, "failed"),
        (1, signal.SIGTERM, "stopped"),
        (REQUEUE, None, "stopped"),
        (None, signal.SIGTERM, "stopped"),
    ],
)
def test_what_ends_when_it_is_asked_to_has_not_failed(tmp_path, code, received, status):
    cell = cells(make_config(tmp_path, seeds=[0]))[0]
    children = SimpleNamespace(received=received, run=lambda *_, **__: code)
    assert run_one_cell(cell, tmp_path / "logs", children).status == status


def test_a_cell_that_was_killed_says_so_and_not_what_it_said_last(tmp_path, monkeypatch):
    script = "import os; print('step 7/9  loss 5.1', flush=True); os.kill(os.getpid(), 9)"
    run = Children.run
    monkeypatch.setattr(
        Children, "run", lambda self, command, **options: run(self, [sys.executable, "-c", script], **options)
    )
    config = make_config(tmp_path, seeds=[0])
    config.studies["text"].base = None
    outcomes = run_sweep(config, Console(file=io.StringIO()))
    assert {outcome.status for outcome in outcomes.values()} == {"failed"}
    message = "error: killed by signal 9 (SIGKILL), as by the kernel where memory ran out"
    assert all(outcome.message.startswith(message) for outcome in outcomes.values())
    assert {row[1:] for row in status(tmp_path)} == {("failed", "", message)}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_running_cell_and_no_other_starts(tmp_path, monkeypatch, number):
    """The sweep waits for the cell to save and to exit."""
    script = (
        "import pathlib, signal, sys, time\n"
        "def save(*_):\n"
        "    time.sleep(0.5)\n"
        "    pathlib.Path(sys.argv[1], 'saved').touch()\n"
        "    sys.exit(75)\n"
        f"signal.signal({number:d}, save)\n"
        "pathlib.Path(sys.argv[1], 'started').touch()\n"
        "time.sleep(60)\n"
    )
    run = Children.run
    monkeypatch.setattr(
        Children, "run", lambda self, command, **options: run(self, [sys.executable, "-c", script, tmp_path], **options)
    )

    def send():
        while not (tmp_path / "started").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    before, sender = signal.getsignal(number), threading.Thread(target=send)
    sender.start()
    said = io.StringIO()
    outcomes = run_sweep(make_config(tmp_path, seeds=[0, 1]), Console(file=said))
    sender.join()
    assert (tmp_path / "saved").exists()
    assert [line.split()[1] for line in said.getvalue().splitlines() if "start" in line] == ["text-base-seed0"]
    arms, seeds = ("full", "dash-knob1", "dash-knob4"), (0, 1)
    assert {name: outcome.status for name, outcome in outcomes.items()} == {
        f"text-base-seed{seed}": "stopped" for seed in seeds
    } | {f"text-{arm}-seed{seed}": "skipped" for arm in arms for seed in seeds}
    assert outcomes["text-base-seed1"].message == "was not begun"
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(
    ("statuses", "code"),
    [
        (("done", "was done"), None),
        (("done", "failed"), "some cells failed"),
        (("skipped", "done"), "some cells failed"),
        (("stopped", "failed"), str(REQUEUE)),
    ],
)
def test_a_sweep_ends_as_its_cells_did(tmp_path, monkeypatch, capsys, statuses, code):
    outcomes = {f"c{i}": Outcome(status, 61.7 * i, f"why {i}") for i, status in enumerate(statuses)}
    given = []
    monkeypatch.setattr(sweep, "run_sweep", lambda config, console: given.append(config) or outcomes)
    monkeypatch.setattr("sys.argv", ["sweep", "sweep=smoke", f"output_dir={tmp_path}", "jobs=3"])
    with nullcontext() if code is None else pytest.raises(SystemExit, match=f"^{code}"):
        sweep.main()
    assert [(config.name, config.output_dir, config.jobs) for config in given] == [("smoke", str(tmp_path), 3)]
    shown = [re.split(r" *[│┃] *", line)[1:-1] for line in capsys.readouterr().out.splitlines() if "c" in line]
    assert shown == [
        ["cell", "status", "seconds", "why"],
        ["c0", statuses[0], "", "why 0"],
        ["c1", statuses[1], "62", "why 1"],
    ]
    monkeypatch.setattr(sweep, "submit_sweep", lambda config: f"{config.name} is submitted")
    monkeypatch.setattr("sys.argv", ["sweep", "sweep=smoke", "launcher=slurm"])
    sweep.main()
    assert capsys.readouterr().out == "smoke is submitted\n"


def test_the_status_tells_what_is_done_runs_and_failed(tmp_path, ran, monkeypatch, capsys):
    _, failing = ran
    failing.add("text-full-seed1")
    run(make_config(tmp_path))
    (tmp_path / "logs").mkdir()
    log = "$ train.py\nValueError: of an earlier try\n$ train.py\nerror: boom\nbye\n"
    (tmp_path / "logs" / "text-full-seed1.log").write_text(log)
    knob = tmp_path / "text-dash-knob1-seed0"
    (knob / "cell.json").unlink()
    (knob / "metrics.jsonl").write_text("".join(f'{{"step": {step}, "split": "train"}}\n' for step in (3, 7)))
    with FileLock(knob / ".lock"):
        rows = {name: rest for name, *rest in status(tmp_path)}
    assert rows["text-base-seed0"] == ["done", "", ""]
    assert rows["text-full-seed1"] == ["failed", "", "error: boom"]
    assert rows["text-dash-knob1-seed0"] == ["running", "7", ""]
    assert {name: rest for name, *rest in status(tmp_path)}["text-dash-knob1-seed0"][0] == "missing"
    with pytest.raises(
        ValueError, match=r"no sweep's directory \(it has no cells.json\): give the sweep's output_dir$"
    ):
        status(knob)
    with pytest.raises(ValueError, match=r"nowhere does not exist: give the sweep's output_dir$"):
        status(tmp_path / "nowhere")
    monkeypatch.setattr("sys.argv", ["status", str(tmp_path)])
    status_module.main()
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "6 done, 1 missing, 1 failed"
    assert sum(" text-" in line for line in said) == 8
