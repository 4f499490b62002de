import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dashattn.backends import AttentionShape, DashConfig, NSAConfig, build_backend
from experiments.config import OptimConfig
from experiments.training import build as build_module
from experiments.training import optim as optim_module
from experiments.training.check import check
from experiments.training.checkpoint import read_state, seal
from experiments.training.optim import (
    LR_FACTOR,
    build_optimizer,
    check_order,
    learning_rate,
    parameter_groups,
    parameter_order,
)
from experiments.training.ranks import Ranks
from experiments.training.weights import find_weights
from models import ModelConfig, Transformer
from train import train

SHAPE = ModelConfig(32, 48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, max_seq_len=64, vocab_size=50)


def rates(steps=100, **options):
    config = OptimConfig(lr=1.0, **options)
    return [learning_rate(config, step, steps) for step in range(steps)]


@pytest.mark.parametrize("schedule", ["constant", "cosine", "wsd"])
def test_the_warm_up_is_linear_and_ends_at_lr(schedule):
    values = rates(schedule=schedule, warmup_steps=10)
    assert values[:11] == pytest.approx([(step + 1) / 11 for step in range(11)])
    assert max(values) == values[10]


def test_cosine_falls_to_the_smallest_rate():
    values = rates(schedule="cosine", warmup_steps=10, min_lr_ratio=0.1)
    assert values[55] == pytest.approx(0.55)  # half way: the middle of 1 and 0.1
    assert values[10:] == sorted(values[10:], reverse=True)
    assert 0.1 < values[-1] < 0.101


def test_wsd_is_stable_then_falls_linearly():
    values = rates(schedule="wsd", warmup_steps=10, decay_fraction=0.2, min_lr_ratio=0.0)
    assert values[10:80] == [1.0] * 70
    assert values[80:] == pytest.approx([k / 21 for k in range(20, 0, -1)])


def test_only_a_schedule_that_decays_so_needs_room_for_it(make_config):
    options = ("steps=10", "optim.warmup_steps=4", "optim.decay_fraction=0.7")
    for schedule in ("constant", "cosine"):
        check(make_config("run", *options, f"optim.schedule={schedule}"))
    check(make_config("run", *options, "optim.schedule=wsd", "optim.decay_fraction=0.6"))
    with pytest.raises(ValueError, match=r"optim\.decay_fraction=0\.7 overlap within steps=10"):
        check(make_config("run", *options, "optim.schedule=wsd"))
    rounded = ("optim.schedule=wsd", "optim.warmup_steps=5", "optim.decay_fraction=0.55")  # 6 of 10 steps
    with pytest.raises(ValueError, match=r"optim\.decay_fraction=0\.55 overlap within steps=10"):
        check(make_config("run", *options, *rounded))
    with pytest.raises(ValueError, match=r"optim\.warmup_steps=10 leaves no step of steps=10 after the warm-up"):
        check(make_config("run", *options, "optim.warmup_steps=10"))


def test_constant_stays():
    assert rates(schedule="constant") == [1.0] * 100


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.backend = build_backend(DashConfig(), AttentionShape(4, 2, 1, 2))
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight


def test_only_matrices_of_linear_layers_decay():
    model = Model()
    decayed, others, routing = parameter_groups(model, OptimConfig(lr=1.0, weight_decay=0.1, routing_eps=1e-15))
    assert [id(p) for p in decayed["params"]] == [id(model.linear.weight)]
    assert [id(p) for p in routing["params"]] == [id(model.backend.chunk_query)]
    assert len(others["params"]) == 4
    assert [group["weight_decay"] for group in (decayed, others, routing)] == [0.1, 0, 0]
    assert routing["eps"] == 1e-15
    optim = OptimConfig(lr=0.5, beta1=0.8, beta2=0.7, eps=1e-3, weight_decay=0.1)
    for group in build_optimizer(model, optim, torch.device("cpu")).param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.5, (0.8, 0.7), 1e-3)


@pytest.mark.parametrize("optim", [OptimConfig(lr=1.0), OptimConfig(lr=1.0, backend_lr=2.0)])
def test_every_parameter_lies_where_its_size_allows(optim):
    """In the flat tensor that DeepSpeed makes of a group, and in 16 bits."""
    model = Transformer(SHAPE, NSAConfig(variant="minicpm", window_size=0, topk=32, local_blocks=17))
    assert any(parameter.numel() % 8 for parameter in model.parameters()), "gates with a bias of two"
    for group in parameter_groups(model, optim):
        start = 0
        for parameter in group["params"]:
            assert start % math.gcd(parameter.numel(), 8) == 0
            start += parameter.numel()


def test_an_engine_gives_every_matrix_and_norm_an_address_that_kernels_can_read(make_config, monkeypatch):
    """Of compiled ones each takes 16 bytes at once."""
    found = {}

    def look(model, *args, **kwargs):
        engine = build(model, *args, **kwargs)
        found.update({name: (p.numel(), p.data_ptr()) for name, p in model.named_parameters()})
        return engine

    build = build_module.build_engine
    monkeypatch.setattr(build_module, "build_engine", look)
    options = ["attention=nsa_minicpm", "attention.block_size=16", "attention.topk=2", "attention.local_blocks=1"]
    train(make_config("aligned", *options, "steps=2", "deepspeed.precision=bf16"))
    assert any(size % 8 for size, _ in found.values())
    assert [name for name, (size, address) in found.items() if size % 8 == 0 and address % 16] == []


def test_a_checkpoint_whose_parameters_lie_otherwise_is_refused(monkeypatch):
    optim = OptimConfig(lr=1.0)
    plain = Transformer(SHAPE, DashConfig())
    check_order(plain, parameter_order(plain, optim), None)  # an older version's: all sizes even, the order the same
    odd = Transformer(SHAPE, NSAConfig(variant="minicpm", window_size=0, topk=32, local_blocks=17))
    own = parameter_order(odd, optim)
    check_order(odd, own, own)
    with monkeypatch.context() as patch:
        patch.setattr(optim_module, "_evenness", lambda parameter: 8)
        older = parameter_order(odd, optim)  # of the same names
    for saved in (None, "another", parameter_order(plain, optim), older):
        with pytest.raises(ValueError, match="init_from=RUN"):
            check_order(odd, own, saved)


@pytest.mark.parametrize("stage", ["zero1", "zero3"])
def test_a_run_with_odd_sizes_resumes(make_config, stage):
    """At stage 3 DeepSpeed's parameters have no sizes of their own when they are saved."""
    options = ["attention=nsa_minicpm", "attention.block_size=16", "attention.topk=2", "attention.local_blocks=1"]
    config = make_config(
        f"odd-{stage}", *options, f"deepspeed={stage}", "steps=4", "save_every=2", "keep_checkpoints=0"
    )
    checkpoints = train(config) / "checkpoints"
    expected = load_file(find_weights(checkpoints.parent))
    shutil.rmtree(checkpoints / "step-00000004")
    (checkpoints / "latest").write_text("step-00000002")
    resumed = load_file(find_weights(train(config)))
    assert all(torch.equal(resumed[name], weight) for name, weight in expected.items())
    shutil.rmtree(checkpoints / "step-00000004")
    (checkpoints / "latest").write_text("step-00000002")
    checkpoint = checkpoints / "step-00000002"
    (checkpoint / "state.json").write_text(json.dumps(read_state(checkpoint) | {"parameter_order": "another"}))
    (checkpoint / "manifest.json").unlink()
    seal(checkpoint, Ranks(0, 1, torch.device("cpu")))
    with pytest.raises(ValueError, match="laid the parameters in another order"):
        train(config)


def test_what_backends_own_may_have_a_rate_of_its_own():
    model = Model()
    model.backend.gate = nn.Linear(4, 2)  # as NSA's: a matrix and a bias that belong to a backend
    groups = parameter_groups(model, OptimConfig(lr=1.0, weight_decay=0.1, routing_eps=1e-15, backend_lr=5.0))
    found = [(len(g["params"]), g[LR_FACTOR], g["weight_decay"], g.get("eps")) for g in groups]
    others = (4, 1.0, 0.0, None)
    assert found == [(1, 1.0, 0.1, None), (1, 5.0, 0.1, None), others, (1, 5.0, 0.0, None), (1, 5.0, 0.0, 1e-15)]
    assert [id(p) for p in groups[-1]["params"]] == [id(model.backend.chunk_query)]


def test_the_backends_rate_is_the_one_they_move_by(make_config):
    """Adam's first step is the rate itself, whatever the gradient."""
    moved = {}
    for rate in ("null", "3e-4"):
        options = ["attention=dash", "attention.chunk_size=16", "attention.prior=raw", "steps=1", "optim.lr=1e-2"]
        fixed = ["optim.schedule=constant", "optim.warmup_steps=0", "optim.eps=1e-20", f"optim.backend_lr={rate}"]
        weights = load_file(find_weights(train(make_config(f"rate-{rate}", *options, *fixed))))
        moved[rate] = weights["layers.1.attention.backend.chunk_query"].abs().median().item()
    assert moved == pytest.approx({"null": 1e-2, "3e-4": 3e-4}, rel=1e-3)


def test_a_small_eps_lets_the_chunk_queries_move(make_config):
    moved = {}
    for eps in ("null", "1e-15"):
        options = ["attention=dash", "attention.chunk_size=16", f"optim.routing_eps={eps}", "steps=6"]
        weights = load_file(find_weights(train(make_config(f"eps-{eps}", *options))))
        moved[eps] = weights["layers.1.attention.backend.chunk_query"].abs().mean()
    assert moved["1e-15"] > 1e-3 > 10 * moved["null"] > 0
