"""``dashattn plan``: its numbers against the committed rows, and what train.py refuses by them."""

import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch.utils._python_dispatch import TorchDispatchMode

from dashattn.backends import (
    AttentionShape,
    DashConfig,
    FullConfig,
    InfLLMv2Config,
    NSAConfig,
    OracleConfig,
    SinkWindowConfig,
    build_backend,
    build_backends,
)
from experiments import plan, rates
from experiments.config import TrainConfig, to_train_config
from experiments.files import CONFIGS, ROOT, SCALING, THROUGHPUT, append_rows, read_rows
from experiments.sweep.cells import Cell
from experiments.training import build, memory
from experiments.training.check import meta_backends
from experiments.training.memory import GIB, check_memory, check_room, estimate_memory, fits, meta_model
from models.flops import matmul_parameters
from tests.checkpoints import make_folder

RESULTS = ROOT / "results"


def configure(*overrides: str) -> TrainConfig:
    """As for a GPU, with the vocabulary's size."""
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        config = to_train_config(compose("train", ["deepspeed.precision=bf16", *overrides]))
    return replace(config, model=replace(config.model, vocab_size=memory.vocabulary(config)))


@pytest.fixture(scope="module")
def models():
    """Of each backend, at the size that the rows were measured with: configuration and model."""
    names = ("full", "dash", "infllmv2", "nsa")
    found = {name: configure("model=350m", "model.vocab_size=32768", f"attention={name}") for name in names}
    return {name: (config, meta_model(config)) for name, config in found.items()}


def measured_rows(name):
    return [
        row
        for path in sorted(RESULTS.glob(f"*/{name}"))
        for row in read_rows(path)
        if row["status"] == "ok" and "parameters" in row
    ]


def estimate(models, row):
    """Memory that is planned for a row."""
    config, model = models[row["backend"]]
    ranks, length = row.get("ranks", 1), row["length"]
    count = (row.get("micro_batch_tokens") or row["tokens_per_micro_batch"]) // length
    config = replace(
        config,
        data=config.data.at_length(length),
        deepspeed=replace(config.deepspeed, stage=row.get("stage", 1)),
        rows_per_micro_batch=count,
        rows_per_batch=count * ranks,
        sequence_parallel=ranks if row.get("shares_rows") else 1,
        compile=row["compile"],
        activation_checkpointing=row["activation_checkpointing"],
    )
    return estimate_memory(config, ranks, model)


def test_memory_is_what_one_gpu_was_measured_to_take(models):
    rows = [row for name in (THROUGHPUT, SCALING) for row in measured_rows(name) if row.get("ranks", 1) == 1]
    assert len(rows) > 30
    for row in rows:
        assert estimate(models, row).peak / 2**20 == pytest.approx(row["peak_memory_mib"], rel=0.02), row


def test_memory_is_what_two_gpus_were_measured_to_take(models):
    """Beside what a launch still held of its cases before, which these rows count, too: once the optimizer's part of
    the last one, or at stage 3 all states of every one."""
    launches = defaultdict(list)
    for row in measured_rows(SCALING):
        if row["ranks"] == 2:
            launches[row["run"]].append(row)
    count = 0
    for rows in launches.values():
        left = 0.0
        for before, row in zip([None, *rows], rows, strict=False):
            own = estimate(models, row)
            held = [0.0] + ([] if before is None else [estimate(models, before).optimizer, left])
            nearest = min(held, key=lambda x: abs(own.peak + x - row["peak_memory_mib"] * 2**20))
            assert (own.peak + nearest) / 2**20 == pytest.approx(row["peak_memory_mib"], rel=0.05), row
            left += (own.weights + own.gradients + own.optimizer) * (row["stage"] == 3)
            count += nearest == 0
    assert count > 10


@pytest.mark.parametrize(
    ("study", "cell", "changes"),
    [
        ("frontier_h100", "recall-base-seed0", []),
        ("frontier_h100", "recall-nsa-knob12-seed0", []),
        ("text_h200", "text-infllmv2-seed0", []),
        # Its weights and its corpora are not part of this: their shape is.
        ("real_model_h200", "real-full-seed0", ["model=smollm2_135m", "data=python_stdlib", "data.seq_len=8192"]),
    ],
)
def test_memory_is_what_a_run_of_a_study_took(study, cell, changes):
    (commands,) = [row["commands"] for row in read_rows(RESULTS / study / "cells.jsonl") if row["run"] == cell]
    told = [x for x in commands[0][1:] if not x.startswith(("init_from=", "name=", "run_dir=", "logger="))]
    peaks = [r.get("peak_memory_mib", 0) for r in read_rows(RESULTS / study / "metrics.jsonl") if r["run"] == cell]
    assert estimate_memory(configure(*told, *changes), 1).peak / 2**20 == pytest.approx(max(peaks), rel=0.06)


@pytest.fixture(scope="module")
def measured():
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        return rates.rows()


def test_rates_are_those_measured(measured):
    fitted = rates.fit(measured)
    assert {row.device for row in measured} == {"H100", "H200"}
    off = [fitted.ratio(row) for row in measured]
    assert len(off) > 40
    assert 0.9 < min(off) <= max(off) < 1.1
    assert all(cost > 0 for kind, cost in fitted.cost.items() if kind[0] == "attention")


def test_rates_of_rows_that_were_not_fitted(measured):
    """Each length on an H100 by the others."""
    for device, backend in ((row.device, row.backend) for row in measured if row.device == "H100"):
        lengths = [row for row in measured if (row.device, row.backend) == (device, backend)]
        for row in lengths:
            others = [other for other in measured if other is not row]
            found = rates.fit(others)
            assert row.rate * found.seconds(row.work, device) == pytest.approx(1, rel=0.12), row


def test_work_of_a_token_by_hand():
    """A dense layer that reads 10 keys and others that read 6 and score 2 summaries, at a peak of 2 TFLOP/s."""
    config = configure("model=10m", "model.vocab_size=99", "attention=dash", "attention.layers={0: full}")
    model = meta_model(config)
    shape = model.config
    reads = [(10.0, 0.0), *[(6.0, 2.0)] * (shape.num_layers - 1)]
    work = rates.work_of(model, 2.0, reads, compiled=False, checkpointed=False)
    again = rates.work_of(model, 2.0, reads, compiled=True, checkpointed=True)
    multiplied = 2 * matmul_parameters(shape)
    layers = shape.num_layers
    by_kind = defaultdict(float)
    for backend, (keys, summaries) in zip(model.backends, reads, strict=True):
        none, read, scored = (backend.flops(*x) for x in ((0.0, 0.0), (keys, 0.0), (keys, summaries)))
        name = backend.config.name
        for way in ("forward", "backward"):
            by_kind["matmul", "", way] += getattr(none, way)
            by_kind["attention", name, way] += getattr(read, way) - getattr(none, way)
            by_kind["router", name, way] += getattr(scored, way) - getattr(read, way)
    by_kind["matmul", "", "forward"] += multiplied
    by_kind["matmul", "", "backward"] += 2 * multiplied
    passes = 2 * shape.hidden_size / 3.35e12
    for found, runs, compiled in ((work, 1, "eager"), (again, 2, "compiled")):
        expected = {
            kind: (runs * by_kind[*kind, "forward"] + by_kind[*kind, "backward"]) / 2e12
            for kind in {key[:2] for key in by_kind} - {("router", "full")}
        }
        expected |= {("passes", compiled): layers * passes, ("passes", "dash"): (layers - 1) * passes}
        assert found == pytest.approx(expected)
    assert by_kind["router", "full", "forward"] == 0 < by_kind["router", "dash", "forward"]


def made(rate, *, device="H100", backend="dash", way=None, **work):
    """A step of a matrix product, which takes a second at the peak, and of other kinds of work."""
    kinds = {("attention", "dash"): work.pop("attention", 0.0), ("passes", "eager"): work.pop("passes", 0.0)}
    return rates.Row(
        device, backend, False, {rates.MATMUL: 1.0, **{k: s for k, s in kinds.items() if s}}, rate, way, ""
    )


def test_a_fit_finds_what_rows_were_made_with():
    """Matrix products at 700 of 989.4, attention at a third of its peak, passes at half; an L40S half as fast."""
    matmul = 989.4 / 700
    steps = [(1.0, 1.0), (5.0, 1.0), (2.0, 8.0)]
    alone = [
        made(1 / (matmul + 3 * attention + 2 * passes) / slow, device=device, attention=attention, passes=passes)
        for device, slow in (("H100", 1.0),)
        for attention, passes in steps
    ]
    first = alone[0].rate
    of_way = [made(share * first, way=(1, False), attention=1.0, passes=1.0) for share in (0.9, 0.5, 0.8)]
    of_way += [made(0.25 * first, way=(1, False), backend="nsa", attention=1.0, passes=1.0)]
    found = rates.fit([*alone, *of_way])
    assert found.cost == pytest.approx({rates.MATMUL: matmul, ("attention", "dash"): 3.0, ("passes", "eager"): 2.0})
    assert found.slowness == pytest.approx({"H100": 1.0})
    assert found.seconds({rates.MATMUL: 2.0, ("passes", "eager"): 3.0}, "H100") == pytest.approx(2 * matmul + 6)
    assert [found.share(None, "dash"), found.share((1, False), "dash")] == pytest.approx([1.0, 0.8])
    assert found.share((1, False), "nsa") == pytest.approx(0.25)
    assert found.share((1, False), "moba") == pytest.approx(0.65)  # of all four
    assert [found.ratio(row) for row in (alone[1], of_way[0], of_way[3])] == pytest.approx([1.0, 0.9 / 0.8, 1.0])
    slow = [made(row.rate / 2, device="L40S", attention=1.0, passes=1.0) for row in alone[:1]]
    assert rates.fit([*alone, *slow]).slowness["L40S"] > 1.5


def test_what_is_told_of_an_estimate(measured, monkeypatch):
    monkeypatch.setattr(rates, "SMALL", 0.0)
    config = configure("model=60m", "model.vocab_size=99", "attention=dash", "compile=true")
    model = meta_model(config)

    def told(ranks, device, rows=measured, config=config, model=model):
        found = rates.estimate_rate(config, model, ranks, device, 0.75, rows)
        assert found.least <= found.tokens_per_s <= found.most
        return found, list(found.notes)

    alone, nothing = told(1, "NVIDIA H100 80GB HBM3")
    assert nothing == []
    fitted = rates.fit(measured)
    off = [fitted.ratio(row) for row in measured if row.backend == "dash"]
    assert alone.most / alone.tokens_per_s == pytest.approx(max(off))
    assert alone.least / alone.tokens_per_s == pytest.approx(min(off))
    several = "more than 2 GPUs were not measured: as 2 of one host"
    way = "no rows of GPUs that share work this way: nothing is taken off for it"
    assert told(2, "H100")[1] == []
    assert told(3, "H100")[1] == [several]
    bare = [row for row in measured if row.way is None]
    shared, notes = told(4, "H100", rows=bare)
    assert notes == [way, several]
    assert shared.tokens_per_s == pytest.approx(
        4 * rates.estimate_rate(config, model, 1, "H100", 0.75, bare).tokens_per_s
    )
    other, notes = told(1, "A100")
    assert notes == ["no rows of this kind of GPU: the share of the peak that H100 and H200 reach"]
    assert 0.3 < other.tokens_per_s / alone.tokens_per_s < 0.6  # products at 312 of 989, passes alike
    with monkeypatch.context() as patched:  # as slow as the slowest kind that is known
        rates_of = []
        for slowness in ({"H100": 1.0, "H200": 1.0}, {"H100": 2.0, "H200": 1.0}):
            patched.setattr(rates, "fit", lambda rows, known=slowness: replace(fitted, slowness=known))
            rates_of.append(told(1, "A100")[0].tokens_per_s)
        assert rates_of[1] == pytest.approx(rates_of[0] / 2)
    without = [row for row in measured if row.backend != "dash"]
    notes = told(1, "H100", rows=without)[1]
    assert sorted(notes) == [
        f"no rows of dash: its {what} as the slowest of the others" for what in ("attention", "passes", "router")
    ]
    monkeypatch.setattr(rates, "SMALL", 1e12)
    assert told(1, "H100")[1] == ["no rows of a model this small"]
    monkeypatch.setattr(rates, "SMALL", 0.0)
    monkeypatch.setattr(rates, "LARGE", 1.0)
    assert told(1, "H100")[1] == ["no rows of a model this large"]
    with pytest.raises(ValueError, match="no committed rows to tell a rate by: run `dashattn throughput` on a GPU"):
        told(1, "H100", rows=[])


def test_work_without_rows_costs_what_that_of_another_backend_does():
    cost = {("passes", "eager"): 9.0, ("passes", "nsa"): 2.0, ("passes", "dash"): 1.0, ("router", "dash"): 7.0}
    assert (rates.slowest(cost, "passes"), rates.slowest(cost, "router")) == (2.0, 7.0)


def test_layers_that_take_a_selection_over_score_nothing():
    layers = {"*/2": "dash", "*": {"share_selection_from": -1}}
    backends = build_backends(DashConfig(layers=layers), AttentionShape(64, 4, 2, 16), 2)
    assert [backend.summaries_scored(127) for backend in backends] == [1, 0]


@pytest.mark.parametrize(
    ("config", "stride"),
    [
        (DashConfig(chunk_size=32), 32),
        (NSAConfig(kernel_size=32, kernel_stride=8), 8),
        (InfLLMv2Config(kernel_size=32, kernel_stride=8), 8),
        (FullConfig(), None),
        (SinkWindowConfig(), None),
        (OracleConfig(), None),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_what_a_token_scores(config, stride):
    backend = build_backend(config, AttentionShape(64, 4, 2, 16))
    assert backend.summaries_scored(127) == (0 if stride is None else 64 / stride)


@pytest.mark.parametrize(
    "config", [NSAConfig(), DashConfig(summary_keys="unrotated", summary_rope="none")], ids=lambda config: config.name
)
def test_a_cache_takes_what_it_allocates(config):
    backend = build_backend(config, AttentionShape(64, 4, 2, 16))
    cache = backend.new_cache(1, 1024, dtype=torch.bfloat16, device="cpu")
    allocated = sum(tensor.nbytes for tensor in cache.layers[0].tensors.values())
    assert 1024 * memory._cached_bytes(backend, 2) == pytest.approx(allocated, rel=0.01)


def test_a_run_leaves_room_for_what_else_takes_memory(monkeypatch):
    monkeypatch.setattr(memory, "estimate_memory", lambda *args: SimpleNamespace(peak=memory.USABLE))
    assert fits(None, 1, 1.001)
    assert not fits(None, 1, 0.999)


def test_passes_that_only_sparse_layers_make():
    model = meta_model(configure("model=60m", "attention=dash", "attention.layers={0: full}"))
    reads = [(64.0, 1.0)] * len(model.backends)
    work = rates.work_of(model, 989.4, reads, compiled=True, checkpointed=False)
    assert {name for kind, name in work if kind == "passes"} == {"compiled", "dash"}


def test_several_gpus_lose_what_the_worst_of_their_backends_does(measured, monkeypatch):
    config = configure("model=60m", "attention=dash", "attention.layers={0: full}", "compile=true")
    found, ways = [], set()
    for lost in (1.0, 0.5):

        def share(self, way, name, lost=lost):
            ways.add(way)
            return lost if name == "full" else 1.0

        monkeypatch.setattr(rates.Fit, "share", share)
        found.append(rates.estimate_rate(config, meta_model(config), 2, "H100", 0.75, measured).tokens_per_s)
    assert found[1] == pytest.approx(found[0] / 2)
    ways.clear()
    for stage, ranks, shared in ((2, 2, 1), (1, 2, 2)):
        other = replace(config, deepspeed=replace(config.deepspeed, stage=stage), sequence_parallel=shared)
        known = [replace(row, way=(stage, shared > 1)) if row.way else row for row in measured]
        rates.estimate_rate(other, meta_model(other), ranks, "H100", 0.75, known)
    assert {(2, False), (1, True)} <= ways


def test_what_dense_layers_read_is_none_the_less(measured):
    config = configure("model=60m", "attention=full", "compile=true")
    model = meta_model(config)
    dense, sparse = (rates.estimate_rate(config, model, 1, "H100", sparsity, measured) for sparsity in (0.0, 0.75))
    assert dense == sparse


def test_at_the_highest_rate_it_takes_least():
    planned = SimpleNamespace(tokens=7200, rate=rates.Rate(2.0, least=1.0, most=4.0, notes=()))
    assert plan.Plan.hours.fget(planned) == (1.0, 0.5, 2.0)


@pytest.mark.parametrize("study", ["rates_h200", "ablations_h200"])
def test_small_models_wait_for_the_host(study, measured):
    """The steps of the dense bases, which had a GPU alone."""
    rows = [r for r in read_rows(RESULTS / study / "metrics.jsonl") if r["run"].startswith("recall-base")]
    seconds = median(r["step_time"] for r in rows if r["split"] == "train" and r["step"] > 1)
    overrides = ["experiment=frontier_recall", "attention=full", "rows_per_batch=8"]
    found = plan.plan_run(configure(*overrides), plan.PlanConfig(gpu="H200"), measured)
    assert 8 * 4096 / found.rate.tokens_per_s == pytest.approx(seconds, rel=0.15)
    assert any("launching of kernels" in note for note in found.rate.notes)
    assert found.rate.least < 8 * 4096 / seconds < found.rate.most


def test_gpus_that_share_rows_launch_for_the_same_tokens(measured):
    """Each of two has half of every row, and as many kernels to launch as one that has them whole."""
    overrides = ["experiment=frontier_recall", "attention=full", "rows_per_batch=8", "deepspeed=zero2"]
    for ranks, shared in ((1, 1), (2, 2)):
        config = configure(*overrides, f"sequence_parallel={shared}")
        found = rates.estimate_rate(config, meta_model(config), ranks, "H200", 0.0, measured)
        told = (found.tokens_per_s, found.least, found.most)
        assert told == pytest.approx([8 * 4096 / seconds for seconds in (0.021, 0.031, 0.017)])


@pytest.mark.parametrize(("model", "vocab_size"), [("60m", 32768), ("8b", 73448)])
def test_any_size_on_any_number_of_gpus(model, vocab_size, measured):
    config = configure(f"model={model}", f"model.vocab_size={vocab_size}", "attention=dash", "rows_per_batch=512")
    peaks, speeds = [], []
    for gpus in (1, 8, 512):
        options = plan.PlanConfig(gpus=gpus, gpu="H200", sparsity=0.75)
        found = plan.plan_run(replace(config, rows_per_micro_batch=1), options, measured)
        assert 0 < found.rate.least <= found.rate.tokens_per_s <= found.rate.most
        peaks.append(found.memory.peak)
        speeds.append(found.rate.tokens_per_s / gpus)
        assert "GPUs were not measured" in plan.describe(found) or gpus < 3
    assert peaks[0] > peaks[1] > peaks[2]
    assert speeds[0] >= speeds[1] == speeds[2]
    found = plan.plan_run(replace(config, rows_per_micro_batch=1), plan.PlanConfig(gpu="A100"), measured)
    assert any("no rows of this kind of GPU" in note for note in found.rate.notes)


def test_sparser_is_faster_and_packs_take_less_with_checkpointing(measured):
    rows = ["data.seq_len=32768", "model.max_seq_len=32768"]
    config = configure("model=350m", "model.vocab_size=32768", "attention=dash", *rows)
    dense, sparse = (
        plan.plan_run(config, plan.PlanConfig(gpu="H100", sparsity=sparsity), measured) for sparsity in (0.0, 0.9)
    )
    assert sparse.rate.tokens_per_s > 1.5 * dense.rate.tokens_per_s
    assert dense.other.peak < dense.memory.peak / 2
    held = replace(config, attention=replace(config.attention, target_sparsity=0.9))
    assert plan.plan_run(held, plan.PlanConfig(gpu="H100"), measured).rate == sparse.rate


def test_what_cannot_fit_is_refused_with_what_would(monkeypatch):
    config = configure("model=1b", "model.vocab_size=32768", "rows_per_batch=64", "data.seq_len=2048")
    room = 40 * GIB
    with pytest.raises(ValueError, match=r"a GPU has 40\.0 GiB, and this run takes .* on each of 1") as refused:
        check_memory(config, 1, room)
    message = str(refused.value)
    assert f"{estimate_memory(config, 1).peak / GIB:.1f}" in message
    assert "check_memory=false tries it all the same" in message
    mend = message.partition("with rows_per_micro_batch=")[2].split()[0]
    smaller = replace(config, rows_per_micro_batch=int(mend))
    assert fits(smaller, 1, room)
    assert not fits(replace(config, rows_per_micro_batch=2 * int(mend)), 1, room)
    check_memory(smaller, 1, room)
    with pytest.raises(ValueError, match="take more GPUs, a smaller model or shorter rows"):
        check_memory(config, 1, 2 * GIB)

    gpu = SimpleNamespace(total_memory=room)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    ranks = SimpleNamespace(device=torch.device("cuda"), world_size=1)
    with pytest.raises(ValueError, match="check_memory=false"):
        check_room(config, ranks)
    check_room(replace(config, check_memory=False), ranks)
    monkeypatch.setattr(memory, "share_of_memory", lambda: room)
    here = SimpleNamespace(device=torch.device("cpu"), world_size=1)
    with pytest.raises(ValueError, match=r"this machine has for it 40\.0 GiB, and this run takes"):
        check_room(config, here)
    check_room(smaller, here)


def test_a_run_is_refused_before_its_data_are_read(tmp_path, monkeypatch):
    def refuse(config, ranks):
        raise ValueError("does not fit")

    monkeypatch.setattr(build, "check_room", refuse)
    monkeypatch.setattr(build, "_open_data", None)
    config = configure("experiment=debug", "device=cpu", f"run_dir={tmp_path / 'run'}")
    with pytest.raises(ValueError, match="does not fit"):
        build.build(config, [], None)
    assert not (tmp_path / "run").exists()


def test_a_sweep_that_starts_from_a_checkpoint_is_planned_with_its_shape(tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "smollm2")
    monkeypatch.setenv("INIT_FROM", str(folder))
    with pytest.raises(ValueError, match=r"data\.seq_len=8192 exceeds model\.max_seq_len=2048"):  # of the folder
        plan.run_plan(["sweep=real_model"])


def test_what_has_no_memory_is_not_filled():
    """On the meta device PyTorch fills by its compiler, whose import takes longer than all of a plan."""
    asked = []

    class Asked(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            asked.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    config = configure("model=60m", "model.vocab_size=99", "attention=nsa")
    with Asked():
        weights = list(meta_model(config).parameters())
        weights += [p for backend in meta_backends(config) for p in backend.parameters()]
    assert {p.device.type for p in weights} == {"meta"}
    assert "aten::empty.memory_format" in asked or "aten::empty" in asked
    assert not [name for name in asked if "normal" in name or "uniform" in name]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_every_number_of_a_plan_in_its_unit_and_on_its_line(checkpointed):
    options = ["model.vocab_size=99", "attention=dash", "steps=1000", "rows_per_batch=4", "data.seq_len=4096"]
    config = configure("model=60m", *options, f"activation_checkpointing={checkpointed}".lower(), "deepspeed=zero2")
    sizes = {"weights": 1, "gradients": 2, "optimizer": 3, "activations": 5, "logits": 6, "lists": 4, "peak": 9}
    needed = memory.Memory(**{name: size * GIB for name, size in sizes.items()}, cache=0.25 * GIB)
    other = replace(needed, activations=7 * GIB, peak=8 * GIB)
    model = meta_model(config)
    rate = rates.Rate(1000.0, 500.0, 2000.0, ("as it is",))
    planned = plan.Plan(config, model, 2, "H100", 10 * GIB, needed, other, rate, 0.75)
    activations, peaks = ((7, 5), (8, 9)) if checkpointed else ((5, 7), (9, 8))
    numbers = (1, 2, 3, *activations, 4, 6, *peaks)
    said = plan.describe(planned).splitlines()
    parameters = sum(p.numel() for p in model.parameters())
    assert said[0] == f"{parameters:,} parameters, attention=dash, rows of 4096"
    assert said[1:4] == ["2 x H100, ZeRO stage 2, bf16", "", "memory on each GPU, GiB"]
    assert [line.split()[-1] for line in said[4:13]] == [f"{number}.00" for number in numbers]
    assert [line.split()[0] for line in said[4:13]] == (
        ["weights", "gradients", "optimizer", "activations", "with", "of", "logits", "peak", "with"]
    )
    assert said[13:] == [
        "  as configured 9.00 of 10.0: fits",
        "  to generate, the cache of 4096 tokens takes 0.25",
        "",
        "time, at a sparsity of 75%",
        "  1,000 tokens/s (500 to 2,000, as rows lie about the fit)",
        "  16,384,000 tokens in 4.6 h (2.3 h to 9.1 h), beside compilation, validation and checkpoints",
        "  note: as it is",
    ]
    slow = replace(planned, rate=rates.Rate(94.0, 1.0, 10_000.0, ()))
    assert "16,384,000 tokens in 2.0 days (27.3 min to 189.6 days)" in plan.describe(slow)
    assert [plan._duration(hours) for hours in (48.0, 47.9, 1.0, 0.5)] == ["2.0 days", "47.9 h", "1.0 h", "30.0 min"]


def test_what_a_plan_says_of_what_does_not_fit_and_of_pytorch(measured, monkeypatch):
    config = configure("model=60m", "model.vocab_size=99", "attention=full", "compile=true", "attention.impl=reference")
    planned = plan.plan_run(config, plan.PlanConfig(memory_gib=1.0, sparsity=0.5), measured)
    mends, saved = [(["a=1", "b=2"], "still too large"), (["a=1", "b=3"], "smaller")], []
    monkeypatch.setattr(plan, "savings", lambda config, ranks: mends)
    monkeypatch.setattr(plan, "fits", lambda config, *_: config == "smaller")
    monkeypatch.setattr(plan, "estimate_memory", lambda *args: saved.append(args) or SimpleNamespace(peak=3 * GIB))
    said = plan.describe(planned).splitlines()
    assert said[1] == "1 x H100, ZeRO stage 1, bf16, compiled"
    assert f"  as configured {planned.memory.peak / GIB:.2f} of 1.0: does not fit" in said
    assert "  with a=1 b=3 it takes 3.00, and fits" in said
    assert saved == [("smaller", 1, planned.model)]
    assert "time, dense" in said
    assert said[-1] == "  note: in PyTorch, which takes more memory and time than this: the whole attention"
    mends.pop()
    assert "  take more GPUs, a smaller model or shorter rows" in plan.describe(planned).splitlines()


def test_cells_that_differ_by_their_seed_are_planned_once(monkeypatch):
    """On as many GPUs as a cell has, as new runs, with what is to be said of their evaluations."""
    asked, made = [], []

    def planned_as(config, options, measured):
        asked.append((config, options))
        made.append(plan.Plan(config, *[None] * 8))
        return made[-1]

    monkeypatch.setattr(plan, "cells", lambda config: config.cells)
    monkeypatch.setattr(plan, "compose_training", lambda cell, base: (cell.train, base and base.name))
    monkeypatch.setattr(plan, "check_evaluations", lambda cell, config, elsewhere: [f"{cell.name} {config[0][0]}"])
    monkeypatch.setattr(plan, "plan_run", planned_as)
    own = ("steps=3", "name=a", "run_dir=b", "threads=1", "init_from=c")
    found = [
        Cell(f"{base}{seed}", Path(), (*own, f"seed={seed}"), ("tasks=[loss]", f"run={seed}"), base)
        for base in (None, "None0")
        for seed in (0, 1)
    ] + [Cell("4", Path(), ("steps=4",), None, None)]
    job, notes = SimpleNamespace(ranks=8), ("None0 steps=3", "None00 steps=3", "4 steps=4")
    for launcher, gpus, used in ((None, None, 2), (None, 4, 4), (job, None, 8), (job, 4, 4)):
        asked.clear()
        made.clear()
        config = SimpleNamespace(cells=found, launcher=launcher, gpus_per_cell=2)
        planned = list(plan.plan_sweep(config, plan.PlanConfig(gpus=gpus), ()))
        first, second, third = (replace(one, notes=(note,)) for one, note in zip(made, notes, strict=True))
        assert planned == list(zip(found, (first, first, second, second, third), strict=True))
        assert [(config[0][0], config[0][-1], config[1]) for config, _ in asked] == [
            ("steps=3", "run_dir=plan-of-a-new-run", None),
            ("steps=3", "run_dir=plan-of-a-new-run", "None0"),
            ("steps=4", "run_dir=plan-of-a-new-run", None),
        ]
        assert {options.gpus for _, options in asked} == {used}


def test_of_a_case_the_newest_version_counts(tmp_path, monkeypatch):
    row = {"device": "H100", "backend": "dash", "length": 8, "compile": True, "status": "ok", "parameters": 1}
    row |= {"git_sha": "a", "date": "2026-01-02", "ranks": 1, "stage": 1, "shares_rows": False}
    rows = [
        row | {"git_sha": "b", "date": "2026-01-03", "n": 1},
        row | {"n": 2},
        row | {"git_sha": "b", "date": "2026-01-01", "n": 3},  # before, but of the version that was measured last
        row | {"status": "error", "git_sha": "c", "date": "2026-02-01"},
        {key: value for key, value in (row | {"git_sha": "d", "date": "2026-02-01"}).items() if key != "parameters"},
    ]
    others = {"device": "H200", "backend": "nsa", "length": 9, "compile": False, "ranks": 2, "stage": 2}
    others |= {"shares_rows": True}
    rows += [row | {name: value, "n": name} for name, value in others.items()]
    (tmp_path / "results" / "study").mkdir(parents=True)
    append_rows(tmp_path / "results" / "study" / THROUGHPUT, rows)
    append_rows(tmp_path / "results" / "study" / SCALING, [row | {"n": "of several"}])
    monkeypatch.setattr(rates, "ROOT", tmp_path)
    monkeypatch.setattr(rates, "_measured", lambda row, path: (row["n"], path.name))
    assert set(rates.rows.__wrapped__()) == {
        *((name, THROUGHPUT) for name in (1, 3, *others)),
        ("of several", SCALING),
    }


def test_a_sweeps_table_and_its_sums():
    def planned(hours, rate, notes, **changes):
        known = {"hours": hours, "rate": SimpleNamespace(tokens_per_s=rate, notes=notes), "ranks": 2, "device": "H100"}
        known["notes"] = ("d",)
        return SimpleNamespace(**known | {"memory": SimpleNamespace(peak=1.5 * GIB), "fits": True} | changes)

    small = planned((0.5, 0.25, 1.0), 1234.5, ("a", "b"))
    large = planned((40.0, 20.0, 80.0), 98765.0, ("b", "c"), fits=False, memory=SimpleNamespace(peak=123.456 * GIB))
    cells = [(SimpleNamespace(name="recall-dash"), small), (SimpleNamespace(name="x"), large)]
    assert plan.describe_sweep(SimpleNamespace(jobs=3), cells).splitlines() == [
        "cell         GiB/GPU  fits  tokens/s     time",
        "recall-dash     1.50  yes      1,234   30.0 min",
        "x             123.46  no      98,765     40.0 h",
        "2 runs, one after the other 40.5 h (20.2 h to 3.4 days) on 2 x H100; "
        "jobs=3 at a time with 6 GPUs to themselves; evaluations are not counted",
        *("note: a", "note: b", "note: d", "note: c"),
    ]
    assert plan.split(["gpus=2", "model=60m", "gpu=H100", "gpux=1", "sparsity=0.5", "sweep=smoke"]) == (
        ["gpus=2", "gpu=H100", "sparsity=0.5"],
        ["model=60m", "gpux=1", "sweep=smoke"],
    )


def test_where_a_plans_memory_and_sparsity_come_from(measured, monkeypatch):
    config = configure("model=60m", "model.vocab_size=99", "attention=dash", "deepspeed.precision=auto")
    known = plan.plan_run(config, plan.PlanConfig(), measured)
    assert (known.ranks, known.device, known.room, known.sparsity) == (1, "H100", 79.2 * GIB, 0.0)
    assert known.config.deepspeed.precision == "bf16"
    precise = replace(config, deepspeed=replace(config.deepspeed, precision="fp32"))
    assert plan.plan_run(precise, plan.PlanConfig(), measured).config.deepspeed.precision == "fp32"
    assert plan.plan_run(config, plan.PlanConfig(gpu="H200", memory_gib=7.0), measured).room == 7 * GIB
    assert plan.plan_run(config, plan.PlanConfig(gpu="NVIDIA L40S"), measured).room == 44.4 * GIB
    rooms = {"H200": 139.8, "A100": 79.2, "RTX 4090": 23.5, "B200": 178.4, "GB200": 184.0, "H100 NVL": 93.1}
    for gpu, room in (rooms | {"H200 NVL": 139.8, "H100 PCIe": 79.2}).items():
        assert plan.plan_run(config, plan.PlanConfig(gpu=f"NVIDIA {gpu}"), measured).room == room * GIB
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: SimpleNamespace(total_memory=5 * GIB))
    here = plan.plan_run(config, plan.PlanConfig(), measured)
    assert (here.device, here.room) == ("NVIDIA H200", 5 * GIB)
    assert plan.plan_run(config, plan.PlanConfig(gpu="H100"), measured).room == 79.2 * GIB
    usable = memory.USABLE * 5 * GIB
    for peak, fits_ in ((usable, True), (1.001 * usable, False)):
        assert replace(here, memory=replace(here.memory, **dict.fromkeys(("weights",), 0.0), peak=peak)).fits == fits_


def test_the_gpus_of_a_job_are_the_runs():
    overrides = ["model=60m", "attention=full", "launcher=slurm", "launcher.nodes=2", "launcher.gpus_per_node=4"]
    assert "8 x H100" in plan.run_plan([*overrides, "gpu=H100"])
    assert "2 x H100" in plan.run_plan([*overrides, "gpu=H100", "gpus=2"])


def test_what_is_planned_is_a_new_run(monkeypatch):
    composed = []
    monkeypatch.setattr(plan, "compose", lambda name, overrides: composed.append((name, *overrides)) or name)
    monkeypatch.setattr(plan, "to_config", lambda composed: plan.PlanConfig())
    monkeypatch.setattr(plan, "to_train_config", lambda composed: composed)
    monkeypatch.setattr(plan, "rows", tuple)
    monkeypatch.setattr(plan, "plan_run", lambda config, *_: config)
    monkeypatch.setattr(plan, "describe", lambda planned: planned)
    assert plan.run_plan(["gpus=2", "model=60m", "run_dir=outputs/there"]) == "train"
    assert composed == [
        ("plan", "gpus=2"),
        ("train", "model=60m", "run_dir=outputs/there", "run_dir=plan-of-a-new-run"),
    ]


def test_what_is_said():
    page = plan.run_plan(["model=60m", "attention=dash", "gpus=2", "gpu=H100", "deepspeed=zero2"])
    for line in ("2 x H100, ZeRO stage 2, bf16", "activations", "lists of the sparse kernels", "tokens/s", "fits"):
        assert line in page
    assert "time, at a sparsity of 0%, the slowest case (sparsity=0.75 assumes another)" in page
    page = plan.run_plan(["model=60m", "attention=dash", "sparsity=0.9"])
    assert "time, at a sparsity of 90%\n" in page
    page = plan.run_plan(["sweep=smoke", "gpu=H200"])
    assert "5 runs, one after the other" in page
    page = plan.run_plan(["model=60m", "attention=dash", "attention.prior_heads=head"])
    assert "in PyTorch, which takes more memory and time than this: the whole attention" in page
    with pytest.raises(ValueError, match=r"gpu=H300 is not known: choose from H100"):
        plan.run_plan(["gpu=H300"])
    with pytest.raises(ValueError, match="rows_per_batch=16 does not divide among 3 ranks"):
        plan.run_plan(["gpus=3"])


def test_the_commands_that_the_documentation_shows_fit():
    text = (ROOT / "README.md").read_text() + Path(CONFIGS, "plan.yaml").read_text()
    commands = re.findall(r"^ *dashattn plan (.*)", text.replace("\\\n", " "), re.MULTILINE)
    plans = {tuple(sorted(command.split())) for command in commands}
    assert len(plans) == 3
    for overrides in plans:
        assert not re.search(r"does not fit|  no  ", plan.run_plan(overrides)), overrides
