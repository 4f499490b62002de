"""Runs that are asked for a sparsity: the knob they find, hold, save and go on with."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dashattn.backends import AttentionShape, build_backend
from data import MQARDataConfig
from experiments.files import METRICS, START, read_rows
from experiments.sparsity import Found, Hold, knob_span
from experiments.training import build as build_module
from experiments.training import start_knob
from experiments.training.check import check
from experiments.training.checkpoint import read_state
from experiments.training.ranks import init_ranks
from experiments.training.run_dir import RunDir
from models import Transformer
from train import train

PACKED = "data.pack=documents"
LONG = ("data.seq_len=128", "data.pack=plain", "stats_every=1")
DASH = (*LONG, "attention=dash", "attention.chunk_size=8", "attention.target_sparsity=0.6")
BLOCKS = (
    *(*LONG, "attention.block_size=8", "attention.kernel_size=4", "attention.kernel_stride=2"),
    *("attention.window_size=8", "attention.topk=12", "attention.target_sparsity=0.6"),
)


def found(run_dir):
    return json.loads((run_dir / START).read_text())["sparsity"]


def rows(run_dir):
    return [row for row in read_rows(run_dir / METRICS) if row["split"] == "train"]


def state(run_dir, step):
    return read_state(run_dir / f"checkpoints/step-{step:08d}")


@pytest.mark.parametrize(
    "options", [("deepspeed=zero1",), ("deepspeed=zero3", "deepspeed.precision=bf16", "rows_per_micro_batch=2")]
)
def test_a_held_sparsity_is_met_saved_and_resumed_exactly(make_config, tmp_path, options):
    options = (*DASH, *options, "steps=12", "save_every=6", "keep_checkpoints=0")
    whole = train(make_config("whole", *options))
    assert abs(found(whole)["sparsity"] - 0.6) <= 0.005
    knobs = [row["knob"] for row in rows(whole)]
    assert knobs[:4] == 4 * [found(whole)["knob"]]  # measured at steps 4, 8 and 12
    assert len(set(knobs[:4])) == len(set(knobs[4:8])) == len(set(knobs[8:])) == 1
    assert len(set(knobs)) == 3
    measured = {row["step"]: row["causal_sparsity"] for row in rows(whole)}
    assert (knobs[4] > knobs[3]) == (measured[4] < 0.6)
    assert state(whole, 6)["sparsity"]["knob"] == knobs[5]
    assert state(whole, 12)["sparsity"]["knob"] != knobs[11]

    (whole / "checkpoints/latest").write_text("step-00000006\n")
    last = [(whole / "checkpoints/step-00000012" / name).read_bytes() for name in ("state.json", "model.safetensors")]
    before = rows(whole)
    train(make_config("whole", *options))
    again = [(whole / "checkpoints/step-00000012" / name).read_bytes() for name in ("state.json", "model.safetensors")]
    assert again == last
    for key in ("loss", "knob", "causal_sparsity"):
        assert [row[key] for row in rows(whole)] == [row[key] for row in before]
    assert "sparsity" not in json.loads((whole / "resumed/step-00000006" / START).read_text())


def test_finding_the_knob_leaves_the_data_and_the_weights_as_they_are(make_config):
    """The same run with the knob given reads the same rows and learns the same, until the held one moves."""
    held = train(make_config("held", *DASH, "steps=5"))
    knob = found(held)["knob"]
    started = train(make_config("started", *DASH, "steps=5", "attention.sparsity_control=start"))
    given = train(
        make_config("given", *DASH, "steps=5", "attention.sparsity_control=none", f"attention.router_scale={knob!r}")
    )
    losses = [[row["loss"] for row in rows(run)] for run in (held, started, given)]
    assert losses[1] == losses[2]
    assert losses[0][:4] == losses[2][:4]
    assert losses[0][4] != losses[2][4]
    assert [row["knob"] for row in rows(started)] == 5 * [knob]
    assert state(started, 5)["sparsity"]["knob"] == knob
    assert "sparsity" not in state(given, 5)


def test_the_knob_is_found_on_the_rows_of_a_step_or_on_16(make_config, monkeypatch):
    class Model(torch.nn.Linear):
        def set_knob(self, knob):
            self.knob = knob

    read, asked, opened, build_data = [], [], [], start_knob.build_data

    def calibrate(model, batches, *target, **options):
        read.append(sum(len(batch.input_ids) for batch in batches))
        asked.append((model.weight.dtype, *target, options))
        return Found(2.5, 0.6, {2.5: 0.6})

    monkeypatch.setattr(start_knob, "calibrate", calibrate)
    monkeypatch.setattr(start_knob, "build_data", lambda data, **how: opened.append(how) or build_data(data, **how))
    data = MQARDataConfig(name="mqar", seq_len=128, pairs_min=4, pairs_max=4, validation_rows=4)
    config = replace(make_config("run", *DASH, "deepspeed.precision=fp32"), data=data)
    for rows_per_batch in (4, 16, 40):
        model = Model(1, 1)
        start_knob.find_start_knob(replace(config, rows_per_batch=rows_per_batch), model, init_ranks("cpu"), rows=4)
        assert model.knob == 2.5
    assert read == [16, 16, 40]
    # Of each of several readers its share, in the precision of training; the third of four ranks is the second reader.
    ranks = replace(init_ranks("cpu"), rank=2, world_size=4, sequence_parallel=2)
    attention = replace(config.attention, sparsity_count="paper")
    config = replace(config, attention=attention, seed=5, rows_per_batch=40)
    config = replace(config, deepspeed=replace(config.deepspeed, precision="bf16"))
    start_knob.find_start_knob(config, model, ranks, rows=4)
    assert read[-1] == 20
    assert asked[-1] == (torch.bfloat16, 0.6, "paper", 128, {"device": ranks.device, "total": ranks.sum})
    how = {"split": "train", "seed": 5, "rows": 4, "rank": 1, "world_size": 2, "cache_dir": Path(config.cache_dir)}
    assert opened[-1] == how
    assert model.weight.dtype == torch.float32


def test_a_resumed_run_holds_as_it_held(make_config):
    """Within what rows of its length can have, which are shorter than the model's longest."""
    config = make_config("run", "attention=infllmv2", *BLOCKS, "model.vocab_size=300", "model.max_seq_len=256")
    model, start = Transformer(config.model, config.attention), {}
    state = {"knob": 5, "mean": 0.55, "seen": 2}
    run_dir = RunDir(Path("run"), Path("checkpoint"), {"step": 4, "sparsity": state})
    hold = build_module._find_hold(model, config, run_dir, None, 4, start)
    assert hold == Hold(0.6, knob_span([config.attention] * 2, 128), 5, mean=0.55, seen=2)
    assert hold.state_dict() == state
    assert ({backend.config.topk for backend in model.backends}, start) == ({5}, {})


@pytest.mark.parametrize("name", ["infllmv2", "nsa"])
def test_topk_is_the_nearest_integer(make_config, name):
    config = make_config("run", f"attention={name}", *BLOCKS, "steps=1", "optim.warmup_steps=0")
    run = train(config)
    knob = found(run)["knob"]
    assert isinstance(knob, int)
    backend = build_backend(config.attention, AttentionShape(64, 4, 2, 16))
    q, k, v, hidden = (torch.randn(1, 128, *shape) for shape in ((4, 16), (2, 16), (2, 16), (64,)))
    misses = {}
    for topk in range(3, 17):
        backend.set_knob(topk)
        misses[topk] = abs(backend(q, k, v, hidden=hidden, return_stats=True)[1].causal_sparsity().item() - 0.6)
    if name == "infllmv2":  # whatever the weights are
        assert knob == min(misses, key=misses.get)
    assert abs(knob - min(misses, key=misses.get)) <= 1
    assert rows(run)[0]["causal_sparsity"] == pytest.approx(found(run)["sparsity"], abs=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("attention=infllmv2", *BLOCKS, "attention.target_sparsity=0.9"),
            "at 128 tokens attention=infllmv2 reaches 0",
        ),
        (("attention=nsa", *BLOCKS, "attention.target_sparsity=0.9"), "Lower the target, or force fewer"),
        ((*DASH, "attention.target_sparsity=0.9"), "cannot be had: at 128 tokens attention=dash reaches"),
        ((*DASH, "attention.init_chunks=2", "attention.target_sparsity=0.75"), r"attention=dash reaches 0\.604"),
        ((*DASH, "attention.sparsity_count=paper"), "use sparsity_count=causal"),
        (
            (*DASH, "attention.sparsity_count=paper", *("data.seq_len=8192", "model.max_seq_len=8192"), PACKED),
            "needs rows of one document",
        ),
    ],
)
def test_what_no_row_can_have_is_refused_before_anything_is_built(make_config, options, message):
    with pytest.raises(ValueError, match=message):
        check(make_config("run", *options))


def test_what_the_rows_cannot_have_is_refused_before_anything_is_written(make_config, tmp_path):
    """A bound by the length alone lets this pass: two query heads that differ keep more than one chunk."""
    config = make_config("run", *DASH, "attention.target_sparsity=0.79")
    check(config)
    with pytest.raises(ValueError, match=r"attention=dash reaches at most 0\.7"):
        train(config)
    assert not (tmp_path / "run").exists()


def test_the_target_is_of_the_layers_that_the_knob_turns(make_config):
    """Of two layers one is dense; the mean over both would be half of the target."""
    run = train(make_config("run", *DASH, "attention.layers={0:full}", "steps=2"))
    row = rows(run)[0]
    assert row["causal_sparsity_per_layer"][0] == 0
    assert row["causal_sparsity_per_layer"][1] == pytest.approx(0.6, abs=0.02)
    assert abs(found(run)["sparsity"] - 0.6) <= 0.005


def test_rows_that_a_curriculum_makes_shorter_move_no_knob(make_config):
    lengths = {"seq_len": 128, "curriculum_lengths": [64], "curriculum_batches": [5]}
    data = MQARDataConfig(name="mqar", pairs_min=4, pairs_max=4, validation_rows=4, **lengths)
    options = (*DASH, "steps=9", "stats_every=0", "attention.target_sparsity=0.4")
    run = train(replace(make_config("run", *options), data=data))
    knobs = [row["knob"] for row in rows(run)]
    assert knobs[:8] == 8 * [found(run)["knob"]]
    assert knobs[8] != knobs[7]
