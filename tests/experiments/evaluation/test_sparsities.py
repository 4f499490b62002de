"""An evaluation that is asked for sparsities: which knobs it takes, and where it finds them."""

from dataclasses import replace
from itertools import count, repeat
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir

from dashattn.backends import DashConfig
from data import MQARDataConfig, build_data
from experiments.evaluation import knobs
from experiments.evaluation.config import EvaluateConfig
from experiments.evaluation.evaluate import describe, evaluate, find_target
from experiments.evaluation.export import export
from experiments.evaluation.knobs import Setpoint, setpoints, turn_knob
from experiments.evaluation.target import build_model
from experiments.evaluation.tasks.streams import MQARForm
from experiments.figures import frontier
from experiments.files import CALIBRATIONS, RESULTS, read_rows
from experiments.schema import to_config
from experiments.sparsity import Found
from experiments.training.checkpoint import read_state
from models.hf import read_attention
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
    config = configured(text_run, sparsities=[0.3, 0.5, 0.3], lengths=[96, 128])
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
    assert [place.target for place in setpoints(config, find_target(config).train)] == [0.3, 0.5]
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


def test_a_knob_is_found_anew_where_anything_differs_that_it_depends_on(monkeypatch, tmp_path):
    """On as many training rows of the same kind as a batch takes, or 16."""
    read, turned, number = [], [], count(1)

    def calibrate(model, batches, *asked, device):
        read[-1] += (len(batches), *asked)
        return Found(float(next(number)), 0.5, {})

    def build(data, *, split, seed, rows, cache_dir):
        read.append((data, split, seed, rows, cache_dir))
        return repeat("a batch")

    monkeypatch.setattr(knobs, "calibrate", calibrate)
    monkeypatch.setattr(knobs, "build_data", build)
    data = MQARDataConfig(name="mqar", seq_len=64, pairs_min=4, pairs_max=4, validation_rows=4)
    train = SimpleNamespace(attention=DashConfig(), data=data, cache_dir=str(tmp_path), device="cpu", seed=3)
    target = SimpleNamespace(train=train, checkpoint=Path("step-1"), rows_dir=tmp_path, identity={})
    task, place = SimpleNamespace(columns={"length": 64}, packed=False), Setpoint(target=0.5, count="causal")
    plain, form = EvaluateConfig(run="r"), EvaluateConfig(run="r", mqar=MQARForm(pairs_max=8), rows_per_batch=5)

    def found(place=place, task=task, config=plain, target=target):
        turned.clear()
        knob = turn_knob(SimpleNamespace(set_knob=turned.append), place, task, config, target)
        assert turned in ([knob], [])  # where it was measured the model has it
        return knob

    def of(**changes):
        return SimpleNamespace(**vars(target) | {"train": SimpleNamespace(**vars(train) | changes)})

    def read_by(rows, batches, *asked, data=data):
        return data, "train", 3, rows, tmp_path, batches, *asked

    other = replace(data, name="other")
    questions = (
        ({}, read_by(8, 2, 0.5, "causal", 64)),
        ({"place": Setpoint(target=0.6, count="causal")}, read_by(8, 2, 0.6, "causal", 64)),
        ({"place": Setpoint(target=0.5, count="paper")}, read_by(8, 2, 0.5, "paper", 64)),
        (
            {"task": SimpleNamespace(columns={"length": 128}, packed=False)},
            read_by(8, 2, 0.5, "causal", 128, data=data.at_length(128)),
        ),
        ({"task": SimpleNamespace(columns={"length": 64}, packed=True)}, read_by(1, 16, 0.5, "causal", 64)),
        ({"config": form}, read_by(4, 4, 0.5, "causal", 64, data=data.at_length(64, pairs_max=8))),
        ({"target": of(attention=DashConfig(chunk_size=8))}, read_by(8, 2, 0.5, "causal", 64)),
        ({"target": of(data=other)}, read_by(8, 2, 0.5, "causal", 64, data=other)),
        ({"target": SimpleNamespace(**vars(target) | {"checkpoint": Path("2")})}, read_by(8, 2, 0.5, "causal", 64)),
        ({"target": SimpleNamespace(**vars(target) | {"identity": {"x": "y"}})}, read_by(8, 2, 0.5, "causal", 64)),
    )
    assert [found(**question) for question, _ in questions] == list(range(1, 11))
    assert read == [rows for _, rows in questions]
    assert [found(**question) for question, _ in questions] == list(range(1, 11))
    assert found(target=of(attention=DashConfig(router_scale=7.0))) == 1, "it is what is looked for"
    assert len(read) == 10


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


def test_without_knobs_it_is_the_one_that_training_held(text_run, tmp_path):
    (row,) = run(configured(text_run))
    state = read_state(text_run / "checkpoints/step-00000004")
    assert row["knob"] == row["trained_knob"] == state["sparsity"]["knob"] != 1.0
    told = ("target_sparsity", "sparsity_count", "trained_sparsity", "trained_sparsity_count")
    assert [row[name] for name in told] == [None, None, 0.5, "causal"]
    target = find_target(configured(text_run))
    given = replace(target.train, attention=replace(target.train.attention, sparsity_control="none"))
    assert [describe(replace(target, train=given))[name] for name in told[2:]] == [None, None]
    export(text_run, tmp_path / "folder")
    assert read_attention(tmp_path / "folder").router_scale == row["knob"]


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
        ({"sparsities": [0.5], "sparsity_count": "paper", "lengths": [8192]}, "needs rows of one document"),
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
