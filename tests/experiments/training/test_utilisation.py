"""MFU by hand, and only where there is a peak to compare with."""

from dataclasses import replace

import pytest
import torch

from dashattn.stats import AttentionStats
from data import Batch
from experiments.training.check import check
from experiments.training.ranks import Ranks
from experiments.training.utilisation import Utilisation, peak_tflops
from models import Transformer
from models.flops import matmul_parameters

ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture
def config(make_config):
    config = check(make_config("run", "attention=dash", "attention.chunk_size=16"))
    return replace(config, model=replace(config.model, vocab_size=300))


def on_gpu(config, precision="bf16", **values):
    return replace(config, device="cuda", deepspeed=replace(config.deepspeed, precision=precision), **values)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA GB200", 2500),
        ("Tesla T4", None),
    ],
)
def test_the_peak_is_known_by_the_devices_name(config, name, peak):
    assert peak_tflops(on_gpu(config), name) == peak
    assert peak_tflops(on_gpu(config, peak_tflops=5.0), name) == 5
    assert peak_tflops(on_gpu(config, precision="fp32"), name) is None
    assert peak_tflops(on_gpu(config, precision="fp32", peak_tflops=5.0), name) == 5


def test_there_is_no_mfu_on_a_cpu(config):
    assert peak_tflops(config, "x86_64") is None
    assert peak_tflops(replace(config, peak_tflops=1.0), "x86_64") is None
    utilisation = Utilisation(config, None, ALONE)
    utilisation.measure([])
    assert utilisation.read([], 1000.0) == {}


def test_both_counts_by_hand(config):
    model, layers = config.model, config.model.num_layers
    peak = 4 * 0.5  # of four ranks
    utilisation = Utilisation(config, 0.5, replace(ALONE, world_size=4))
    # Two documents of 2 and 4 tokens: dense attention reads 1, 2, 1, 2, 3 and 4 keys.
    positions = torch.tensor([[0, 1, 0, 1, 2, 3]])
    batch = Batch(torch.zeros(1, 6, dtype=torch.long), torch.zeros(1, 6, dtype=torch.long), positions)
    channels = model.num_heads * model.head_dim
    dense = 3 * (2 * matmul_parameters(model) + layers * 4 * channels * 13 / 6)
    expected = {"mfu_causal": dense * 1000 / (peak * 1e12)}
    assert utilisation.read([batch], 1000.0) == pytest.approx(expected)

    active, reads = torch.full((1, 6, model.num_kv_heads), 2), torch.full((1, 6), 3)
    utilisation.measure([AttentionStats(active, positions, reads)] * layers)
    sparse = 3 * (2 * matmul_parameters(model) + layers * channels * (4 * 2 + 2 * 3))
    expected["mfu_sparse"] = sparse * 1000 / (peak * 1e12)
    assert utilisation.read([batch], 1000.0) == pytest.approx(expected)


def test_no_weights_are_made_for_it(config, monkeypatch):
    made = []
    init = Transformer.__init__
    monkeypatch.setattr(Transformer, "__init__", lambda self, *args: (made.append(self), init(self, *args))[1])
    Utilisation(config, 1.0, ALONE)
    assert {p.device.type for p in made[0].parameters()} == {"meta"}
