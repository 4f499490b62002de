"""What DeepSpeed is told, and what is asked of its engine."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import deepspeed
import pytest
import torch

from experiments.training.engine import backend_metrics, deepspeed_json, set_learning_rate, to_host
from experiments.training.optim import LR_FACTOR
from experiments.training.ranks import Ranks, world_size

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
