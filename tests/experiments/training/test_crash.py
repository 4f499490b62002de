"""Killed with SIGKILL at random moments, a run or a sweep goes on with exactly the numbers it would have had."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.files import read_rows
from experiments.sweep.cells import read_plan
from tests import forked

ROOT = Path(__file__).parents[3]


def rows(run_dir, *keys):
    return [tuple(row.get(key) for key in keys) for row in read_rows(run_dir / "metrics.jsonl")]


@pytest.mark.long
@pytest.mark.parametrize("kills", [2, pytest.param(100, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_goes_on_with_the_same_losses(tiny_overrides, tmp_path, kills):
    overrides, run_dir = tiny_overrides("run", "steps=12", "save_every=1", "eval_every=6", "logger=off")
    overrides = [o for o in overrides if not o.startswith(("name=", "run_dir="))]
    done = forked.run(Path(__file__).with_name("crash.py"), run_dir, kills, kills, *overrides, timeout=60 * kills)
    assert done.returncode == 0, done.stderr
    resumed, saving = map(int, re.search(r"resumed (\d+) killed while saving (\d+)", done.stdout).groups())
    print(done.stdout.splitlines()[-1])
    assert resumed >= kills / 4
    assert saving > 0  # however many more kills that took
    keys = ("step", "split", "loss", "tokens", "grad_norm")
    assert rows(run_dir, *keys) == rows(tmp_path / "whole", *keys)
    assert len(rows(run_dir, *keys)) == 14


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on_with_the_same_results(tmp_path):
    def sweep(name):
        command = [sys.executable, "-m", "experiments.sweep", "sweep=smoke", f"output_dir={tmp_path / name}"]
        return subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL)

    start = time.monotonic()
    assert sweep("whole").wait() == 0
    whole = time.monotonic() - start
    randomness = random.Random(0)
    for _ in range(5):
        process = sweep("killed")
        time.sleep(randomness.uniform(0, whole / 2))
        os.killpg(process.pid, signal.SIGKILL)  # with its cells, as when the machine dies
        process.wait()
    assert sweep("killed").wait() == 0
    for whole_cell, cell in zip(read_plan(tmp_path / "whole"), read_plan(tmp_path / "killed"), strict=True):
        assert rows(cell.run_dir, "step", "loss") == rows(whole_cell.run_dir, "step", "loss")
        results = [
            [(r["task"], r["knob"], r["score"]) for r in read_rows(c.run_dir / "results.jsonl")]
            for c in (whole_cell, cell)
        ]
        assert sorted(results[0], key=str) == sorted(results[1], key=str)
