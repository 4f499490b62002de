"""An evaluation that is asked for sparsities: which knobs it takes, and where it finds them."""

import pytest
import torch
from hydra import compose, initialize_config_dir

from data import build_data
from experiments.evaluation import knobs
from experiments.evaluation.config import EvaluateConfig
from experiments.evaluation.evaluate import evaluate, find_target
from experiments.evaluation.target import build_model
from experiments.figures import frontier
from experiments.files import CALIBRATIONS, RESULTS, read_rows
from experiments.schema import to_config
from experiments.training.checkpoint import read_state
from tests.experiments.conftest import CONFIGS, TINY
from train import train

TEXT = ("data.seq_len=128", "steps=4", "attention=dash", "attention.chunk_size=8", "attention.target_sparsity=0.5")


@pytest.fixture(scope="module")
def text_run(tmp_path_factory, cache_dir):
    """The directory of a run of four steps on packed documents, which held half of the keys."""
    run_dir = tmp_path_factory.mktemp("runs") / "text"
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        overrides = [*TINY, *TEXT, "name=text", f"run_dir={run_dir}", f"cache_dir={cache_dir}", "data.pack=documents"]
        return train(to_config(compose("train", overrides)))


def configured(run_dir, **options):
    return EvaluateConfig(**{"run": str(run_dir), "device": "cpu", "tasks": ["loss"]} | options)


def run(config):
    return list(evaluate(config, find_target(config)))


def test_the_knob_of_a_sparsity_is_found_for_each_length_and_kept(text_run, monkeypatch):
    for name in (RESULTS, CALIBRATIONS):  # of other tests
        (text_run / name).unlink(missing_ok=True)
    config = configured(text_run, sparsities=[0.3, 0.5], lengths=[96, 128])
    rows = run(config)
    assert [(row["target_sparsity"], row["length"]) for row in rows] == [(s, n) for s in (0.3, 0.5) for n in (96, 128)]
    assert len({row["knob"] for row in rows}) == 4
    found = read_rows(text_run / CALIBRATIONS)
    assert [row["knob"] for row in found] == [row["knob"] for row in rows]
    assert all(abs(row["sparsity"] - row["target_sparsity"]) <= 0.005 for row in found)
    for row in rows:
        assert row["causal_sparsity"] == pytest.approx(row["target_sparsity"], abs=0.06)  # 4 rows of other documents
        assert (row["sparsity_count"], row["trained_sparsity"]) == ("causal", 0.5)
    assert run(config) == []
    at_96 = [row for row in frontier.newest(read_rows(text_run / RESULTS)) if row["length"] == 96]
    assert [str(row["knob"]) for row in at_96] == ["30%", "50%"]

    monkeypatch.setattr(knobs, "calibrate", None)  # not again
    config.tasks = ["loss", "position"]
    more = run(config)
    assert {row["task"] for row in more} == {"position"}
    assert {(row["target_sparsity"], row["length"], row["knob"]) for row in more} == {
        (row["target_sparsity"], row["length"], row["knob"]) for row in rows
    }


@pytest.mark.parametrize(("task", "packed"), [("loss", True), ("decode", False)])
def test_it_is_found_on_training_rows_packed_as_the_tasks_are(text_run, monkeypatch, task, packed):
    read = []

    def observed(data, **options):
        read.append((data.pack, data.seq_len, options["split"]))
        return build_data(data, **options)

    monkeypatch.setattr(knobs, "build_data", observed)
    config = configured(text_run, sparsities=[0.4], tasks=[task], rows_per_batch=8)
    (row,) = run(config)
    (found,) = [found for found in read_rows(text_run / CALIBRATIONS) if found["target_sparsity"] == 0.4][-1:]
    assert read == [("documents" if packed else "plain", 128, "train")]
    assert (found["knob"], found["packed"], found["rows"]) == (row["knob"], packed, 16)
    target = find_target(config)
    model, data = build_model(target), target.train.data
    data.pack = "documents" if packed else "plain"
    model.set_knob(row["knob"])
    stream = build_data(data, split="train", seed=0, rows=16, cache_dir=target.train.cache_dir)
    batch = next(stream)
    with torch.no_grad():
        stats = model(batch.input_ids, cu_seqlens=batch.cu_seqlens, return_stats=True).stats
    sparsity = torch.stack([layer.causal_sparsity() for layer in stats]).mean().item()
    assert found["sparsity"] == pytest.approx(sparsity, abs=1e-4)


def test_a_knob_that_another_evaluation_found_meanwhile_is_taken(text_run, monkeypatch, tmp_path):
    append = knobs.append_rows

    def overtaken(path, rows, key):
        append(path, [row | {"knob": 0.125} for row in rows], key)
        return append(path, rows, key)

    monkeypatch.setattr(knobs, "append_rows", overtaken)
    config = configured(text_run, sparsities=[0.45], output=str(tmp_path), rows=2)
    (row,) = run(config)
    assert row["knob"] == 0.125
    config.sparsities, config.knobs = None, [0.125]
    (same,) = run(config)
    assert same["causal_sparsity"] == row["causal_sparsity"]


def test_without_knobs_it_is_the_one_that_training_held(text_run):
    (row,) = run(configured(text_run))
    state = read_state(text_run / "checkpoints/step-00000004")
    assert row["knob"] == row["trained_knob"] == state["sparsity"]["knob"] != 1.0
    assert row["target_sparsity"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsities": [0.5], "knobs": [1.0]}, "give one of them"),
        ({"sparsities": []}, "names none"),
        ({"sparsities": [0.5, 75.0]}, r"share of the keys in \[0, 1\)"),
        ({"sparsities": [float("nan")]}, r"share of the keys in \[0, 1\)"),
        ({"sparsities": [0.5, 0.9], "lengths": [128, 64]}, "at 128 tokens attention=dash reaches 0.8"),
        ({"sparsities": [0.7], "lengths": [128, 64]}, r"at 64 tokens attention=dash reaches 0\.646"),
        ({"sparsities": [0.5], "sparsity_count": "paper"}, "use sparsity_count=causal"),
        ({"sparsities": [0.5], "sparsity_count": "mine"}, "sparsity_count must be one of causal, paper"),
    ],
)
def test_refusals(text_run, options, message):
    with pytest.raises(ValueError, match=message):
        find_target(configured(text_run, **options))


def test_what_cannot_be_reached_writes_no_row(text_run):
    config = configured(text_run, sparsities=[0.79], tasks=["decode"])
    before = [read_rows(text_run / name) for name in (RESULTS, CALIBRATIONS)]
    with pytest.raises(ValueError, match=r"attention=dash reaches at most 0\.7"):
        run(config)
    assert [read_rows(text_run / name) for name in (RESULTS, CALIBRATIONS)] == before
