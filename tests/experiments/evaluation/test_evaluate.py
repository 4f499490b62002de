"""Rows of a trained checkpoint against what the model says when asked directly."""

import hashlib
import json
import re
import shutil
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import Timeout
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file, save_file

import train
from dashattn.backends import DashConfig, FullConfig, IndexerConfig, NSAConfig
from data import IGNORE, Batch, build_data
from experiments.evaluation import evaluate as evaluation
from experiments.evaluation.config import EvaluateConfig
from experiments.evaluation.evaluate import bytes_read, evaluate, find_target
from experiments.evaluation.export import export
from experiments.evaluation.target import build_model, validation_stream
from experiments.evaluation.tasks import streams
from experiments.files import read_rows
from experiments.intervals import ratio_stderr
from experiments.schema import to_config
from experiments.training.checkpoint import seal
from experiments.training.ranks import Ranks
from models import ModelConfig, Transformer
from tests import forked

MQAR = (
    *("experiment=pareto_recall", "device=cpu", "threads=1", "steps=2", "optim.warmup_steps=1", "eval_every=0"),
    *("data.seq_len=64", "data.pairs_max=8", "data.validation_rows=6", "model.hidden_size=32", "model.head_dim=16"),
    "seed=3",
)
DASH = ("attention=dash", "attention.chunk_size=8", "attention.router_scale=2")
CONFIGS = Path(__file__).parents[3] / "configs"


def compose_train(overrides):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return to_config(compose("train", overrides))


@pytest.fixture
def recall_run(tmp_path):
    """Trains a tiny dash model on MQAR for two steps; returns its run directory."""
    run_dir = tmp_path / "recall"
    train.train(compose_train([*MQAR, *DASH, "name=recall", f"run_dir={run_dir}"]))
    return run_dir


def run(config):
    return list(evaluate(config, find_target(config)))


def test_recall_and_loss_equal_the_models_own(recall_run, monkeypatch):
    config = EvaluateConfig(run=str(recall_run), tasks=["recall", "loss"], rows_per_batch=4, device="cpu")
    spent, turn_knob, measure = [], evaluation.turn_knob, streams.measure
    # What is not the run's own, and what takes 100 seconds and 3.
    monkeypatch.setattr(evaluation, "git_state", lambda: ({"sha": "of the evaluation"}, ""))
    monkeypatch.setattr(evaluation, "config_hash", lambda train: "of the evaluation")
    monkeypatch.setattr(evaluation, "time", SimpleNamespace(perf_counter=lambda: sum(spent)))
    monkeypatch.setattr(evaluation, "turn_knob", lambda *args: spent.append(100.0) or turn_knob(*args))
    monkeypatch.setattr(streams, "measure", lambda *args: spent.append(3.0) or measure(*args))
    recall, loss = run(config)
    monkeypatch.undo()
    target = find_target(config)
    (batch,) = build_data(target.train.data, split="validation", seed=3, rows=6)
    model = build_model(target)
    assert not model.training
    with torch.no_grad():
        output = model(batch.input_ids, position_ids=batch.position_ids, return_stats=True)
        expected = model(batch.input_ids, labels=batch.labels).loss
    right = asked = 0
    for inputs, labels, guesses in zip(batch.input_ids, batch.labels, output.logits.argmax(-1), strict=True):
        seen = set()
        for token, label, guess in zip(inputs.tolist(), labels.tolist(), guesses.tolist(), strict=True):
            if label != IGNORE:
                asked += token not in seen
                right += token not in seen and guess == label
                seen.add(token)
    assert recall["score"] == pytest.approx(right / asked)
    assert loss["score"] == pytest.approx(expected.item(), abs=1e-5)
    sparsity = torch.stack([layer.causal_sparsity() for layer in output.stats])
    assert loss["causal_sparsity"] == pytest.approx(sparsity.mean().item(), abs=1e-6)
    assert loss["causal_sparsity_per_layer"] == pytest.approx(sparsity.tolist(), abs=1e-6)
    assert 0 < loss["causal_sparsity"] < 1

    checkpoint = recall_run / "checkpoints" / "step-00000002"
    state, start, git = (json.loads((checkpoint / f"{name}.json").read_text()) for name in ("state", "start", "git"))
    told = {
        **{"backend": "dash", "data": "mqar", "seed": 3, "knob": 2.0, "knob_name": "router_scale", "trained_knob": 2.0},
        **{"trained_sparsity": None, "trained_sparsity_count": None, "target_sparsity": None, "sparsity_count": None},
        **{"checkpoint": "step-00000002", "step": 2, "tokens": 2 * 8 * 64, "parameters": start["parameters"]},
        **{"config_hash": state["config_hash"], "git_sha": git["sha"], "device": "cpu", "label": "dash"},
        **{"length": 64, "rows": 6, "variant": None, "seconds": 3.0, "bytes_read": bytes_read(model, loss)},
        **{"task": "loss", "metric": "nats", "position": None, "samples": 6, "by_corpus": {}, "paper_sparsity": None},
    }
    assert {key: loss[key] for key in told} == told
    nats, targets = loss["by_row"]["nats"], loss["by_row"]["targets"]
    assert loss["stderr"] == ratio_stderr(nats, targets)
    measured = {"causal_sparsity", "causal_sparsity_per_layer", "active_tokens", "active_tokens_per_layer"}
    measured |= {"routing_reads", "routing_reads_per_layer"}
    assert loss.keys() == told.keys() | measured | {"score", "stderr", "by_row", "date"}
    assert (recall["metric"], recall["samples"], recall["seconds"]) == ("accuracy", 6, 3.0)

    halved = replace(target.train, deepspeed=replace(target.train.deepspeed, precision="bf16"))
    assert {p.dtype for p in build_model(replace(target, train=halved)).parameters()} == {torch.bfloat16}
    for other, differs in (
        (FullConfig(), "dropped: att.*chunk_query"),
        (NSAConfig(), "new: att.*gate.*; dropped: att"),
    ):
        with pytest.raises(
            ValueError, match=rf"00002 is not a checkpoint of this configuration \(.*{differs}.*restore"
        ):
            build_model(replace(target, train=replace(target.train, attention=other)))


def test_knobs_turn_and_nothing_is_done_twice(recall_run):
    config = EvaluateConfig(run=str(recall_run), tasks=["loss"], knobs=[0.01, 50.0], device="cpu")
    dense, sparse = run(config)
    assert (dense["knob"], sparse["knob"], sparse["trained_knob"]) == (0.01, 50.0, 2.0)
    assert dense["causal_sparsity"] < sparse["causal_sparsity"]
    assert run(config) == []
    config.knobs = [0.01, 50.0, 4.0, 4.0]
    assert [row["knob"] for row in run(config)] == [4.0]
    config.tasks = ["loss", "recall"]
    assert {(row["task"], row["knob"]) for row in run(config)} == {("recall", k) for k in (0.01, 50.0, 4.0)}
    assert len((recall_run / "results.jsonl").read_text().splitlines()) == 6


def test_a_checkpoint_is_evaluated_at_its_own_step_beside_the_others(tmp_path):
    schedule = ["attention.alpha_mode=scheduled", "attention.alpha_start=1.2", "attention.alpha_steps=4"]
    run_dir = tmp_path / "recall"
    options = [*MQAR, *DASH, *schedule, "save_every=1", "keep_checkpoints=0", f"run_dir={run_dir}"]
    train.train(compose_train(options))
    for step, alpha in ((1, 1.275), (2, 1.35)):  # of the way from 1.2 to 1.5, a quarter and a half
        config = EvaluateConfig(run=str(run_dir / "checkpoints" / f"step-0000000{step}"), tasks=["loss"], device="cpu")
        model = build_model(find_target(config))
        assert [backend.metrics()["alpha"] for backend in model.backends] == pytest.approx([alpha] * 2)
        (row,) = run(config)
        assert (row["checkpoint"], row["step"], row["tokens"]) == (f"step-0000000{step}", step, step * 8 * 64)
        assert run(config) == []
        export(config.run, tmp_path / f"folder-{step}")
        model = build_model(replace(find_target(config), checkpoint=tmp_path / f"folder-{step}"))
        assert model.backends[0].metrics()["alpha"] == pytest.approx(alpha)


@pytest.mark.parametrize(("attention", "routing"), [(DashConfig(), 1), (NSAConfig(), 2)])
def test_bytes_read_count_what_the_heads_of_a_group_share_once(attention, routing):
    """A token reads 10 keys and values and scores 3 summaries, or keys and values of windows, in each KV head."""
    shape = ModelConfig(16, 16, num_layers=3, num_heads=8, num_kv_heads=2, head_dim=4, max_seq_len=32, vocab_size=20)
    read = bytes_read(
        Transformer(shape, attention), {"active_tokens_per_layer": [10.0] * 3, "routing_reads_per_layer": [3.0] * 3}
    )
    assert read == 2 * 3 * 2 * 4 * (2 * 10 + routing * 3)


def test_bytes_read_count_an_index_key_once_for_all_heads():
    shape = ModelConfig(16, 16, num_layers=1, num_heads=8, num_kv_heads=2, head_dim=4, max_seq_len=32, vocab_size=20)
    model = Transformer(shape, IndexerConfig(index_size=5))
    read = bytes_read(model, {"active_tokens_per_layer": [10.0], "routing_reads_per_layer": [3.0]})
    assert read == 2 * (2 * 2 * 4 * 10 + 5 * 3)


@pytest.mark.parametrize("packed", [False, True])
def test_the_loss_is_told_by_row_by_corpus_and_by_position(packed):
    tally, seen = streams.Tally(["loss", "position"]), []
    tally.sparsity = SimpleNamespace(add=lambda stats, packed: seen.append(packed))
    losses = torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 3.0], [4.0, 4.0, 4.0]])
    labels = torch.tensor([[5, IGNORE, 5], [IGNORE, IGNORE, 5], [5, 5, 5]])
    positions = torch.tensor([[0, 1, 2], [7, 8, 0], [1, 2, 3]])  # in documents
    for rows, sources in ((slice(0, 2), ("prose", "code")), (slice(2, 3), ("prose",))):
        shape = (1, -1) if packed else (len(sources), -1)
        tokens = labels[rows].reshape(shape)
        starts = torch.tensor([0, 3]) if packed else None
        batch = Batch(tokens, tokens, positions[rows].reshape(shape), cu_seqlens=starts, sources=sources)
        tally.add(batch, SimpleNamespace(token_losses=losses[rows].reshape(shape), stats=None))
    (row,) = streams.SCORES["loss"](tally)
    assert row["score"] == pytest.approx(18 / 6)
    assert row["by_corpus"] == {"code": 3.0, "prose": 15 / 5}
    read = row["by_row"].pop("read")
    assert read == hashlib.sha256(labels.numpy().tobytes()).hexdigest()[:16]  # however many rows went at once
    assert row["by_row"] == {"corpus": ["prose", "code", "prose"], "nats": [3, 3, 12], "targets": [2, 1, 3]}
    assert (row["stderr"], row["samples"]) == (ratio_stderr([3, 3, 12], [2, 1, 3]), 3)
    assert seen == [packed] * 2
    keys = ("position", "score", "samples", "stderr")
    assert [tuple(row[key] for key in keys) for row in streams.SCORES["position"](tally)] == [
        ([0, 0], 4 / 2, 2, ratio_stderr([1, 3], [1, 1])),
        ([1, 1], 4, 1, None),
        ([2, 3], 10 / 3, 2, ratio_stderr([2, 8], [1, 2])),
    ]


def test_loss_by_position_averages_to_the_loss(tiny_overrides):
    overrides, run_dir = tiny_overrides("text", "steps=2", "attention=dash", "attention.chunk_size=8")
    train.train(compose_train(overrides))
    rows = run(EvaluateConfig(run=str(run_dir), tasks=["loss", "position"], device="cpu"))
    bins = [row["position"] for row in rows[1:]]
    assert bins == [[0, 0], [1, 1], [2, 3], [4, 7], [8, 15], [16, 31], [32, 63]]
    assert min(r["score"] for r in rows[1:]) <= rows[0]["score"] <= max(r["score"] for r in rows[1:])


def test_another_label_is_another_row(recall_run):
    config = EvaluateConfig(run=str(recall_run), tasks=["loss", "loss"], device="cpu")
    assert [row["label"] for row in run(config)] == ["dash"]
    config.label = "dash-raw"
    assert [row["label"] for row in run(config)] == ["dash-raw"]


def test_the_whole_split_and_a_padded_vocabulary(tiny_overrides):
    overrides, run_dir = tiny_overrides(
        "run", "steps=2", "data.validation_rows=null", "model.vocab_size=512", "eval_every=2"
    )
    train.train(compose_train(overrides))
    (row,) = run(EvaluateConfig(run=str(run_dir), device="cpu"))
    assert row["rows"] is None
    (trained,) = [r["loss"] for r in read_rows(run_dir / "metrics.jsonl") if r["split"] == "validation"]
    assert row["score"] == pytest.approx(trained, abs=1e-5)


def test_a_changed_corpus_is_refused(tiny_overrides):
    overrides, run_dir = tiny_overrides("run", "steps=2", "attention=dash", "attention.chunk_size=8")
    train.train(compose_train(overrides))
    checkpoint = run_dir / "checkpoints" / "step-00000002"
    start, config = checkpoint / "start.json", EvaluateConfig(run=str(run_dir), device="cpu")
    whole = start.read_text()

    def rewrite(key):
        start.write_text(whole.replace(f'"{key}": "', f'"{key}": "x'))
        (checkpoint / "manifest.json").unlink()
        seal(checkpoint, Ranks(0, 1, torch.device("cpu")))

    rewrite("tokenizer")
    for read in (validation_stream, lambda target: target.tokenizer):
        with pytest.raises(
            ValueError, match=r"tokenizer is another tokenizer than the run was trained with .*: restore"
        ):
            read(find_target(config))
    rewrite("tokens_fingerprint")
    for asked in (
        {"tasks": ["loss"]},
        {"tasks": ["decode"]},
        {"tasks": ["json_kv"], "lengths": [512], "sparsities": [0.1]},
    ):
        with pytest.raises(ValueError, match="has changed since"):
            run(replace(config, **asked))


def test_half_a_row_of_a_crash_makes_way_for_whole_ones(recall_run):
    config = EvaluateConfig(run=str(recall_run), knobs=[1.0], device="cpu")
    run(config)
    path = recall_run / "results.jsonl"
    before = path.read_text()
    path.write_text(before + '{"task": "lo')
    config.knobs = [1.0, 2.0]
    assert [row["knob"] for row in run(config)] == [2.0]
    assert path.read_text().startswith(before)
    assert [json.loads(line)["knob"] for line in path.open()] == [1.0, 2.0]


def test_two_evaluations_at_once_share_the_work(recall_run):
    command = [sys.executable, "evaluate.py", f"run={recall_run}", "tasks=[loss,recall]", "device=cpu", "threads=1"]
    command += ["lengths=[32,64]", "knobs=[0.5,1,2,4,8,16]"]
    running = [forked.Process(command, stdout=(recall_run / f"said{i}").open("w")) for i in range(2)]
    assert [process.wait(300) for process in running] == [0, 0]
    rows = [(row["task"], row["length"], row["knob"]) for row in read_rows(recall_run / "results.jsonl")]
    assert sorted(rows) == sorted(product(("loss", "recall"), (32, 64), (0.5, 1, 2, 4, 8, 16)))
    said = [(recall_run / f"said{i}").read_text() for i in range(2)]
    assert sum(int(re.search(r"(\d+) new rows", text)[1]) for text in said) == 24
    tables = {text[text.rindex("router_scale 0.5 ") : text.rindex("\n", 0, -1)] for text in said}
    assert len(tables) == 1  # of all that there is, whoever made it


def test_what_another_evaluation_has_in_hand_is_left_to_it_and_looked_at_again(recall_run, monkeypatch, capsys):
    config = EvaluateConfig(run=str(recall_run), knobs=[1.0, 2.0], device="cpu")
    order, whole = [], evaluation.turn_knob

    def turn(model, place, *rest):
        order.append(place.knob)
        if place.knob == 2.0:  # meanwhile the other one finishes the first pass, or is killed in it
            other.__exit__(None, None, None)
        return whole(model, place, *rest)

    monkeypatch.setattr(evaluation, "turn_knob", turn)
    asked = []
    in_hand = evaluation.in_hand
    monkeypatch.setattr(evaluation, "in_hand", lambda *args, **options: asked.append(args) or in_hand(*args, **options))
    run(EvaluateConfig(run=str(recall_run), knobs=[1.0], device="cpu", label="to learn what is asked"))
    (first,) = asked
    other = in_hand(first[0], first[1] | {"label": "dash"}, waits=False)
    assert other.__enter__()
    order.clear()
    assert [row["knob"] for row in run(config)] == [2.0, 1.0]
    assert order == [2.0, 1.0]

    class Busy(SimpleNamespace):
        def acquire(self, timeout=None):
            order.append(timeout)
            if timeout == 0:
                raise Timeout("busy")

        def release(self):
            order.append("released")

    order.clear()
    monkeypatch.setattr(evaluation, "FileLock", lambda path: Busy())
    with in_hand(recall_run, {}, waits=False) as is_free:
        assert not is_free
    assert not capsys.readouterr().err
    with in_hand(recall_run, {}, waits=True) as is_free:
        assert is_free
    assert order == [0, 0, None, "released"]
    said = "waiting for another evaluation, which has in hand what is missing here\n"
    assert capsys.readouterr().err == said


def test_what_another_evaluation_made_meanwhile_is_not_computed_again(recall_run, monkeypatch):
    config = EvaluateConfig(run=str(recall_run), knobs=[1.0, 2.0], device="cpu")
    rows = evaluate(config, find_target(config))
    assert next(rows)["knob"] == 1.0
    assert [row["knob"] for row in run(EvaluateConfig(run=str(recall_run), knobs=[2.0], device="cpu"))] == [2.0]
    monkeypatch.setattr(evaluation, "turn_knob", None)
    assert list(rows) == []


def test_progress_counts_tokens(recall_run):
    """Of as many rows as each task has: six, and one that is decoded."""
    config = EvaluateConfig(run=str(recall_run), tasks=["recall", "decode"], lengths=[32, 64], device="cpu")
    shares, done = [], []
    for row in evaluation.Evaluation(config, find_target(config)).run(shares.append):
        done.append((row["task"], shares[-1] * 7 * (32 + 64)))
    tokens = (6 * 32, 7 * 32, 7 * 32 + 6 * 64, 7 * (32 + 64))
    assert done == list(zip(2 * ["recall", "decode"], map(pytest.approx, tokens), strict=True))
    assert shares == sorted(shares)


def test_a_length_given_twice_is_one(recall_run):
    rows = run(EvaluateConfig(run=str(recall_run), lengths=[32, 64, 32], device="cpu"))
    assert [row["length"] for row in rows] == [32, 64]


def test_rows_go_where_output_says_and_tell_one_run_from_another(recall_run, tmp_path, monkeypatch):
    sources, setting = [], evaluation.Setting  # by which answers that are kept are known
    monkeypatch.setattr(evaluation, "Setting", lambda *values: sources.append(values[3]) or setting(*values))
    before = {path: path.stat().st_mtime_ns for path in recall_run.rglob("*")}
    config = EvaluateConfig(run=str(recall_run), sparsities=[0.5], device="cpu", output=str(tmp_path / "rows" / "new"))
    (row,) = run(config)
    assert read_rows(tmp_path / "rows" / "new" / "results.jsonl") == [row]
    assert (tmp_path / "rows" / "new" / "calibrations.jsonl").exists()
    assert {path: path.stat().st_mtime_ns for path in recall_run.rglob("*")} == before
    assert run(config) == []
    # The same names, another run.
    other = shutil.copytree(recall_run, tmp_path / "other")
    (weights,) = other.glob("checkpoints/step-*/model.safetensors")
    save_file({name: x + 0.5 for name, x in load_file(weights).items()}, weights)
    (other / "checkpoints").joinpath(weights.parent.name, "manifest.json").unlink()
    seal(weights.parent, Ranks(0, 1, torch.device("cpu")))
    config.run = str(other)
    (second,) = run(config)
    assert second["score"] != row["score"]
    assert len(read_rows(tmp_path / "rows" / "new" / "calibrations.jsonl")) == 2
    assert len(set(sources)) == len(sources) == 2


def test_a_run_one_may_not_write_to_is_refused_before_anything_is_computed(recall_run, monkeypatch):
    monkeypatch.setattr("experiments.files.os.access", lambda path, mode: False)  # for root everything may be written
    with pytest.raises(ValueError, match=r"recall cannot be written.*output=\.\.\. names another directory"):
        find_target(EvaluateConfig(run=str(recall_run), device="cpu"))
    monkeypatch.setattr("experiments.files.os.access", lambda path, mode: path != recall_run)
    assert find_target(EvaluateConfig(run=str(recall_run), device="cpu", output=f"{recall_run}-rows"))


def test_a_score_that_is_no_number_is_told_with_its_task(recall_run, monkeypatch):
    score = streams.SCORES["loss"]
    monkeypatch.setitem(streams.SCORES, "loss", lambda tally: (row | {"score": float("nan")} for row in score(tally)))
    with pytest.raises(ValueError, match=r"task loss at knob 2\.0: score is nan, as the outputs of step-00000002"):
        run(EvaluateConfig(run=str(recall_run), device="cpu"))
    assert read_rows(recall_run / "results.jsonl") == []


def test_a_failing_evaluation_keeps_the_rows_before_it(recall_run, monkeypatch):
    config = EvaluateConfig(run=str(recall_run), knobs=[1.0, 2.0], device="cpu")
    whole, calls = streams.measure, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(streams, "measure", failing)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    assert [json.loads(line)["knob"] for line in (recall_run / "results.jsonl").open()] == [1.0]


def test_refusals(recall_run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for changes, message in (
        ({"tasks": ["perplexity"]}, "choose from loss, position, recall"),
        ({"tasks": ["loss", "niah_singel_1"]}, r"did you mean niah_single_1 .*\? Or choose from loss"),
        ({"tasks": []}, "choose from"),
        ({"knobs": [0.0]}, "router_scale must be a positive"),
        ({"knobs": [-1.0]}, r"knobs\[0\] must be a finite number of at least 0"),
        ({"rows": 0}, "rows must be a positive integer"),
        ({"device": "tpu"}, "device must be one of auto, cpu, cuda"),
        ({"device": "cuda"}, "PyTorch sees no GPU: use device=cpu"),
        ({"attention": DashConfig()}, "is for a Hugging Face folder: the run .*recall has its own, leave it out"),
        ({"run": "/nonexistent"}, "/nonexistent does not exist: give a run directory"),
    ):
        with pytest.raises(ValueError, match=message):
            find_target(EvaluateConfig(**{"run": str(recall_run)} | changes))
