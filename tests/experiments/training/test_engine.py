"""What DeepSpeed is told, and what is asked of its engine."""

import math
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import deepspeed
import pytest
import torch

from experiments.config import OptimConfig
from experiments.errors import Stopped
from experiments.training import run as run_module
from experiments.training.anomalies import LossWatch
from experiments.training.engine import (
    DataError,
    backend_metrics,
    consolidated_weights,
    deepspeed_json,
    set_learning_rate,
    to_host,
    validation_loss,
)
from experiments.training.metrics import Clock
from experiments.training.optim import LR_FACTOR, learning_rate
from experiments.training.ranks import Ranks, world_size
from experiments.training.run import Read, Update, hold_sparsity, is_measured, judge, log, read_step, take_step

BF16 = {"bf16": {"enabled": True, "immediate_grad_update": True}, "data_types": {"grad_accum_dtype": "fp32"}}


@pytest.mark.parametrize(
    ("stage", "precision", "clipping", "typed"),
    [
        (0, "fp32", 0.0, {}),
        (1, "fp32", 0.5, {}),
        (2, "bf16", 0.5, BF16),
        (3, "bf16", 0.5, BF16),
        (1, "fp16", 0.5, {"fp16": {"enabled": True}}),
    ],
)
def test_deepspeeds_configuration_is_the_composed_one(make_config, stage, precision, clipping, typed):
    config = make_config("run", "optim.grad_clip=0.5")
    config = replace(config, deepspeed=replace(config.deepspeed, stage=stage, precision=precision))
    for parameters, bucket in ((1001, 1002), (1000, 1000), (3 * 10**9, 500_000_000)):
        json = deepspeed_json(config, parameters=parameters, rows=3, micro_batches=5, universal=stage == 2)
        assert json == {
            "train_micro_batch_size_per_gpu": 3,
            "gradient_accumulation_steps": 5,
            "gradient_clipping": clipping,
            "zero_optimization": {"stage": stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": None,
            "checkpoint": {"load_universal": stage == 2},
            **typed,
        }


def test_each_group_has_its_share_of_the_rate():
    engine = SimpleNamespace(optimizer=SimpleNamespace(param_groups=[{LR_FACTOR: 0.5}, {LR_FACTOR: 1.0}, {}]))
    set_learning_rate(engine, 0.25)
    assert [group["lr"] for group in engine.optimizer.param_groups] == [0.125, 0.25, 0.25]


@pytest.mark.parametrize("stage", [1, 3])
def test_metrics_of_backends_are_means_over_the_layers_that_have_them(monkeypatch, stage):
    gathered = []

    def gather(parameters, *, enabled):
        gathered.append((list(parameters), enabled))
        return nullcontext()

    monkeypatch.setattr(deepspeed.zero, "GatheredParameters", gather)
    told = ({"alpha": 1.0}, {"alpha": 2.0, "beta": 7.0}, {})
    backends = [
        SimpleNamespace(parameters=lambda number=number: [number], metrics=lambda values=values: values)
        for number, values in enumerate(told)
    ]
    engine = SimpleNamespace(module=SimpleNamespace(backends=backends), zero_optimization_stage=lambda: stage)
    assert backend_metrics(engine) == {"alpha": 1.5, "beta": 7.0}
    assert gathered == [([number], stage == 3) for number in range(3)]


def test_weights_of_stage_3_are_gathered_one_by_one(monkeypatch):
    module = torch.nn.Linear(3, 2)
    whole = {name: tensor.detach().clone() for name, tensor in module.named_parameters()}
    module.weight.ds_id = 7

    @contextmanager
    def gather(parameters, *, enabled):
        (parameter,) = parameters
        parameter.data = whole["weight"].clone() if enabled else parameter.data
        yield
        parameter.data = torch.empty(0) if enabled else parameter.data

    monkeypatch.setattr(deepspeed.zero, "GatheredParameters", gather)
    module.weight.data = torch.empty(0)
    found = consolidated_weights(SimpleNamespace(module=module), main=True)
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    assert consolidated_weights(SimpleNamespace(module=module), main=False) == {}


def test_numbers_are_read_on_the_host():
    assert to_host(torch.tensor([1.5, -2.0]))() == [1.5, -2.0]


def test_ranks_that_share_rows_are_one_reader(monkeypatch):
    monkeypatch.setattr(Ranks, "gather", lambda self, value: [f"{value}{rank}" for rank in range(self.world_size)])
    for rank in range(6):
        alone = Ranks(rank, 6, torch.device("cpu"))
        shared = replace(alone, sequence_parallel=3)
        assert (alone.reader, alone.readers, alone.is_main) == (rank, 6, rank == 0)
        assert (shared.reader, shared.readers) == (rank // 3, 2)
        assert shared.gather_readers("x") == ["x0", "x3"]
    monkeypatch.setenv("WORLD_SIZE", "12")
    assert world_size() == 12
    monkeypatch.delenv("WORLD_SIZE")
    assert world_size() == 1


def test_what_ranks_tell_each_other_is_exact_and_a_failure_of_the_first_ends_all(monkeypatch):
    def all_reduce(total, group):
        assert group == "of the hosts"
        total.mul_(2)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    first, second = (Ranks(rank, 2, torch.device("cpu"), host="of the hosts") for rank in (0, 1))
    assert second.sum(2**24 + 1, 0.1) == [2**25 + 2, 0.2]  # more than float32 counts to
    told = []
    monkeypatch.setattr(Ranks, "gather", lambda self, value: told.append(value) or [told[0], value])
    for work, error in ((lambda: "done", None), (lambda: 1 // 0, ZeroDivisionError)):
        if error is None:
            assert (first.first(work), second.first(lambda: 1 // 0)) == ("done", None)
        else:
            with pytest.raises(error):  # a fault of ours, which is not told
                first.first(work)
        told.clear()

    def stop():
        failure = Stopped("no room")
        failure.exit_code = 75
        raise failure

    for rank in (first, second):
        with pytest.raises(Stopped, match=r"^no room$") as stopped:
            rank.first(stop)
        assert stopped.value.exit_code == 75
    assert told == [("no room", 75), None]


def batch(num_targets, num_tokens=None):
    """As much of one as counts."""
    made = SimpleNamespace(num_targets=num_targets, num_tokens=num_tokens, cu_seqlens=None, max_seqlen=None)
    made.input_ids = made.labels = made.position_ids = made.to = lambda device: made
    return made


@pytest.mark.parametrize("shared", [1, 2])
def test_a_validation_loss_is_the_mean_over_targets(monkeypatch, shared):
    """Of two ranks; where they share rows each has its part of a row's loss, and all of its targets."""
    monkeypatch.setattr(Ranks, "sum", lambda self, *values: [2 * value for value in values])
    modes, losses = [], iter([2.0, 5.0])

    class Engine:
        def __getattr__(self, name):
            return lambda: modes.append(name)

        def __call__(self, *arguments, return_stats, **options):
            return SimpleNamespace(loss=torch.tensor(next(losses)))

    ranks = Ranks(0, 2, torch.device("cpu"), sequence_parallel=shared)
    found = validation_loss(Engine(), [batch(3), batch(1)], ranks)
    assert found == shared * (3 * 2.0 + 1 * 5.0) / 4
    assert modes == ["eval", "train"]
    with pytest.raises(DataError):
        validation_loss(Engine(), (1 / 0 for _ in range(1)), ranks)
    assert modes == 2 * ["eval", "train"]


@pytest.mark.parametrize("shared", [1, 2])
def test_what_was_read_for_a_step_is_counted_over_all_ranks(monkeypatch, shared):
    monkeypatch.setattr(Ranks, "sum", lambda self, *values: [2 * value for value in values])

    class Data:
        def __init__(self, batches):
            self.batches, self.read = iter(batches), 0

        def state_dict(self):
            return {"rows": self.read}

        def __next__(self):
            self.read += 1
            return next(self.batches)

    ranks = Ranks(0, 2, torch.device("cpu"), sequence_parallel=shared)
    run = SimpleNamespace(train_data=Data([batch(3, 8), batch(1, 8)]), clock=Clock(), micro_batches=2, ranks=ranks)
    read = read_step(run)
    assert [each.num_targets for each in read.batches] == [3, 1]
    assert read[1:] == ({"rows": 0}, 8 / shared, 32 / shared, None, 0, 0)
    read = read_step(run, is_to_stop=True)
    assert (read.batches, read.position, type(read.error), read.failures, read.stops) == (
        ([], {"rows": 2}, StopIteration, 2, 2)
    )


@pytest.mark.parametrize("auxiliary", [True, False])
def test_a_step_weighs_every_target_and_every_token_of_all_ranks_alike(monkeypatch, auxiliary):
    """Of two ranks and two micro-batches, over which DeepSpeed averages."""
    done, asked = [], []
    losses = iter(((2.0, 10.0, "stats of the first"), (5.0, 20.0, None)))

    def forward(engine, batch, device, *, return_stats):
        asked.append((batch.num_targets, return_stats))
        loss, other, stats = next(losses)
        return SimpleNamespace(
            loss=torch.tensor(loss), auxiliary_loss=torch.tensor(other) if auxiliary else None, stats=stats
        )

    monkeypatch.setattr(Ranks, "sum", lambda self, *values: [2 * value for value in values])
    monkeypatch.setattr(run_module, "forward", forward)
    monkeypatch.setattr(run_module, "set_learning_rate", lambda engine, rate: done.append(("rate", rate)))
    monkeypatch.setattr(run_module, "gradient_norms", lambda engine: {"grad_norm_router": 0.5})
    monkeypatch.setattr(run_module, "optimizer_step", lambda engine, clip: done.append(("update", clip)) or 7.0)
    engine = SimpleNamespace(
        module=SimpleNamespace(set_step=lambda step: done.append(("step", step))),
        backward=lambda objective: done.append(("backward", pytest.approx(float(objective)))),
    )
    optim = OptimConfig(lr=1.0, warmup_steps=8, grad_clip=0.25)
    run = SimpleNamespace(
        config=SimpleNamespace(optim=optim, steps=9),
        engine=engine,
        ranks=Ranks(0, 2, torch.device("cpu")),
        micro_batches=2,
        tokens=100,
        clock=SimpleNamespace(count=lambda tokens: done.append(("tokens", tokens))),
    )
    read = Read([batch(3, 8), batch(1, 4)], {}, targets=8.0, tokens=24.0, error=None, failures=0, stops=0)
    update = take_step(run, 5, read, with_norms=True, with_stats=True)
    rate, ranks_and_parts = learning_rate(optim, 4, 9), 4
    beside = [10 * 8 / 24 if auxiliary else 0, 20 * 4 / 24 if auxiliary else 0]
    assert done == [
        *(("step", 4), ("rate", rate)),
        *(("backward", ranks_and_parts * (2 * 3 / 8 + beside[0])), ("update", 0.25)),
        *(("backward", ranks_and_parts * (5 * 1 / 8 + beside[1])), ("update", 0.25)),
        ("tokens", 24.0),
    ]
    assert asked == [(3, True), (1, False)]
    assert run.tokens == 124
    mean = 2 * (2 * 3 / 8 + 5 * 1 / 8)
    found = pytest.approx(2 * sum(beside)) if auxiliary else None
    assert update == (mean, found, rate, 7.0, {"grad_norm_router": 0.5}, "stats of the first")


def test_the_row_of_a_step(monkeypatch):
    told = []
    monkeypatch.setattr(run_module, "backend_metrics", lambda engine: {"alpha": 1.25})
    monkeypatch.setattr(run_module, "peak_memory_mib", lambda device: 512.0)
    monkeypatch.setattr(run_module, "attention_metrics", lambda stats: {"causal_sparsity": len(stats) / 4})
    timed = {"step_time": 2.0, "data_wait": 0.5, "tokens_per_s": 12.0}
    run = SimpleNamespace(
        **{"tokens": 100, "engine": None, "hold": None, "ranks": Ranks(0, 1, torch.device("cpu"))},
        watch=SimpleNamespace(skipped=2),
        clock=SimpleNamespace(read=lambda: dict(timed)),
        utilisation=SimpleNamespace(measure=told.append, read=lambda *asked: {"mfu_causal": asked}),
        metrics=SimpleNamespace(write=told.append),
    )
    read = SimpleNamespace(batches=["a batch"])
    log(run, 7, read, Update(2.5, None, 0.1, None, norms={}, stats=None))
    plain = {"step": 7, "split": "train", "tokens": 100, "loss": 2.5, "lr": 0.1, "grad_norm": math.inf}
    plain |= {"skipped_steps": 2, **timed, "alpha": 1.25, "peak_memory_mib": 512.0, "mfu_causal": (["a batch"], 12.0)}
    assert told == [plain]
    told.clear()
    run.hold = SimpleNamespace(knob=3.5)
    log(run, 7, read, Update(2.5, 0.25, 0.1, torch.tensor(1.5), norms={"grad_norm_router": 0.5}, stats=["one", "two"]))
    more = {"auxiliary_loss": 0.25, "grad_norm": 1.5, "grad_norm_router": 0.5, "knob": 3.5, "causal_sparsity": 0.5}
    assert told == [["one", "two"], plain | more]


@pytest.mark.parametrize(
    ("warmup", "length", "holds", "measured"),
    [(0, 64, True, [4, 8, 12]), (7, 64, True, [8, 12]), (8, 64, True, [12]), (0, 63, True, []), (0, 64, False, [])],
)
def test_sparsity_is_measured_on_whole_rows_where_all_layers_are_sparse(warmup, length, holds, measured):
    """Step k is taken when k - 1 are done."""
    turned = [SimpleNamespace(config=SimpleNamespace(is_dense_at=lambda step, n=n: step < n)) for n in (0, warmup)]
    config = SimpleNamespace(attention=SimpleNamespace(holds_sparsity=holds), data=SimpleNamespace(seq_len=64))
    run = SimpleNamespace(config=config, engine=SimpleNamespace(module=SimpleNamespace(turned=turned)))
    read = SimpleNamespace(batches=[SimpleNamespace(input_ids=torch.zeros(2, length))])
    assert [step for step in range(1, 13) if is_measured(run, step, read)] == measured


def test_a_sparsity_is_held_by_what_all_ranks_read(monkeypatch):
    counted, turned = [], []
    monkeypatch.setattr(Ranks, "sum", lambda self, active, keys: [active + 10, keys + 100])
    monkeypatch.setattr(run_module, "count_keys", lambda *asked: counted.append(asked) or torch.tensor([30.0, 100.0]))
    model = SimpleNamespace(set_knob=turned.append)
    run = SimpleNamespace(
        config=SimpleNamespace(attention=SimpleNamespace(sparsity_count="paper")),
        engine=SimpleNamespace(module=model),
        ranks=Ranks(0, 2, torch.device("cpu")),
        hold=SimpleNamespace(update=lambda sparsity: ("turned by", sparsity)),
    )
    hold_sparsity(run, SimpleNamespace(stats="stats"))
    assert counted == [(model, "stats", "paper")]
    assert turned == [("turned by", 1 - 40 / 200)]


@pytest.mark.parametrize(("precision", "judged"), [("fp16", None), ("bf16", "skipped")])
def test_a_step_that_loss_scaling_skips_is_no_anomaly(tmp_path, precision, judged):
    recorded, said = [], []
    config = SimpleNamespace(deepspeed=SimpleNamespace(precision=precision), steps=9)
    watch = LossWatch(tmp_path / "anomalies.jsonl", skipped=0, limit=2)
    watch.record = lambda *row: recorded.append(row)
    ranks, metrics = Ranks(0, 1, torch.device("cpu")), SimpleNamespace(print=said.append)
    run = SimpleNamespace(config=config, watch=watch, ranks=ranks, metrics=metrics)
    done = Update(loss=2.5, auxiliary_loss=None, rate=0.1, grad_norm=None, norms={}, stats=None)
    assert judge(run, 3, SimpleNamespace(position={"rows": 7}), done) == judged
    assert recorded == ([] if judged is None else [("skipped", 3, 2.5, math.inf, [{"rows": 7}])])
    assert said == ([] if judged is None else ["WARNING: step 3 skipped: loss 2.5, grad_norm inf"])
