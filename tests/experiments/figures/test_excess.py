"""Losses above dense attention's, step by step: which runs are paired, and by how much they differ."""

import json

import pytest

from experiments.figures import excess
from experiments.figures.excess import make_excess
from experiments.figures.rows import load_study

SHARED = ["experiment=x", "steps=30"]


def write_study(root, runs, collected=True):
    """``runs``: name -> (words, losses of steps 10, 20 ..., rows more)."""
    root.mkdir(exist_ok=True)
    for name, (words, losses, *more) in runs.items():
        rows = [
            {"step": 10 * n, "tokens": 1000 * n, "split": "train", "loss": loss, "step_time": 1.0}
            for n, loss in enumerate(losses, 1)
        ] + more
        commands = [["train.py", *words, f"name={name}", f"run_dir=outputs/{name}"], ["evaluate.py"]]
        if collected:
            with (root / "metrics.jsonl").open("a") as metrics, (root / "cells.jsonl").open("a") as done:
                metrics.writelines(json.dumps({"run": name} | row) + "\n" for row in rows)
                done.write(json.dumps({"run": name, "commands": commands}) + "\n")
        else:
            run = root / name
            run.mkdir()
            (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            (run / "cell.json").write_text(json.dumps({"commands": commands}))
    return load_study(root)


def trained(seed, *own):
    return [*SHARED, *own, f"seed={seed}"]


@pytest.mark.parametrize("collected", [True, False])
def test_each_seed_is_compared_with_the_dense_run_of_its_batches(tmp_path, collected):
    validation = {"step": 10, "tokens": 1000, "split": "validation", "loss": 9.0}
    study = write_study(
        tmp_path / "study",
        {
            "s-full-seed0": (trained(0, "attention=full", "optim.lr=1e-3"), [3.0, 2.0, 1.0]),
            "s-full-seed1": (trained(1, "attention=full"), [4.0, 3.0, 2.0], validation),
            "s-dash-seed0": (trained(0, "attention=dash", "attention.chunk_size=16"), [3.5, 2.25, 1.125]),
            "s-dash-seed1": (trained(1, "attention=dash", "attention.chunk_size=16"), [4.25, 3.25], validation),
            "s-nsa-knob4-seed1": (trained(1, "attention=nsa", "optim.lr=1e-4"), [5.0, 2.5, 2.0]),
        },
        collected,
    )
    drawn = make_excess(study)
    assert drawn.table == [
        {"arm": "s-dash", "step": 10, "tokens": 1000, "excess": 0.375, "low": 0.25, "high": 0.5, "seeds": 2},
        {"arm": "s-dash", "step": 20, "tokens": 2000, "excess": 0.25, "low": 0.25, "high": 0.25, "seeds": 2},
        {"arm": "s-nsa-knob4", "step": 10, "tokens": 1000, "excess": 1.0, "low": 1.0, "high": 1.0, "seeds": 1},
        {"arm": "s-nsa-knob4", "step": 20, "tokens": 2000, "excess": -0.5, "low": -0.5, "high": -0.5, "seeds": 1},
        {"arm": "s-nsa-knob4", "step": 30, "tokens": 3000, "excess": 0.0, "low": 0.0, "high": 0.0, "seeds": 1},
    ]
    drawn.draw(tmp_path / "excess")
    assert (tmp_path / "excess.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "words",
    [
        trained(1, "attention=dash"),  # another order of the data
        trained(0, "attention=dash", "data.seq_len=64"),
        trained(0, "attention=dash", "steps=40"),
        ["experiment=y", "steps=30", "attention=dash", "seed=0"],
        trained(0, "attention=full"),  # dense itself
    ],
)
def test_runs_of_other_batches_are_left_out(tmp_path, words):
    dense = (trained(0, "attention=full"), [3.0, 2.0])
    assert make_excess(write_study(tmp_path, {"s-full-seed0": dense, "s-dash-seed0": (words, [3.5, 2.5])})) is None


def test_a_dense_arm_with_options_is_no_control_and_no_control_is_no_figure(tmp_path):
    first, other = trained(0, "attention=full", "attention.layers={0:dash}"), trained(0, "attention=dash")
    assert make_excess(write_study(tmp_path, {"s-a-seed0": (first, [3.0]), "s-b-seed0": (other, [3.5])})) is None


def test_a_logarithmic_axis_where_all_is_above_dense(tmp_path, monkeypatch):
    axes = []
    monkeypatch.setattr(excess, "save", lambda figure, path: axes.append(figure.axes[0]))
    for name, losses in (("above", [3.5, 2.5]), ("below", [3.5, 1.5])):
        runs = {
            "s-full-seed0": (trained(0, "attention=full"), [3.0, 2.0]),
            "s-dash-seed0": (trained(0, "attention=dash"), losses),
        }
        make_excess(write_study(tmp_path / name, runs)).draw(tmp_path / name)
    assert [ax.get_yscale() for ax in axes] == ["log", "linear"]
    assert axes[0].get_ylim() == pytest.approx((0.5 / 1.2, 0.5 * 1.2))
    assert list(axes[0].get_lines()[0].get_ydata()) == [0.5, 0.5]
    assert [text.get_text() for text in axes[0].figure.legends[0].texts] == ["s-dash"]


def test_more_arms_than_a_panel_holds_are_a_table(tmp_path):
    runs = {f"s-dash-knob{n}-seed0": (trained(0, "attention=dash", f"attention.knob={n}"), [3.5]) for n in range(17)}
    drawn = make_excess(write_study(tmp_path, runs | {"s-full-seed0": (trained(0, "attention=full"), [3.0])}))
    assert drawn.draw is None
    assert len(drawn.table) == 17
    assert drawn.notes[-1] == "Many arms: a table alone."
