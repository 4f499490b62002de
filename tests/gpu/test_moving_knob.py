"""A knob that training moves, compiled with Inductor and the kernels that run."""

import pytest
import torch

from dashattn.backends import DashConfig
from models import ModelConfig, Transformer

SHAPE = ModelConfig(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=256,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    max_seq_len=2048,
)


def build(selector, target, dtype):
    torch.manual_seed(0)
    attention = DashConfig(impl="triton", selector=selector, init_chunks=1, target_sparsity=target)
    return Transformer(SHAPE, attention).to("cuda", dtype)


def loss_and_gradients(model, input_ids):
    output = model(input_ids, labels=input_ids, return_stats=True)
    sparsity = torch.stack([layer.causal_sparsity() for layer in output.stats]).mean().item()
    return sparsity, [output.loss, *torch.autograd.grad(output.loss, list(model.parameters()))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("selector", "knobs"),
    [("entmax", (1.0, 300.0, 3000.0)), ("topk", (20, 12, 4)), ("topp", (0.9, 0.6, 0.3))],
)
def test_a_moving_knob_compiles_nothing_anew_and_is_the_number(selector, knobs, dtype, monkeypatch):
    monkeypatch.undo()  # the poisoning of conftest.py, which would be traced
    number, moving = (build(selector, target, dtype) for target in (None, 0.5))
    moving.compile_layers(fullgraph=True)
    input_ids = torch.randint(512, (2, 2048), device="cuda")
    loss_and_gradients(moving, input_ids)  # compiles
    sparsities = []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for knob in knobs:
            for model in (number, moving):
                model.set_knob(knob)
            expected, ours = (loss_and_gradients(model, input_ids) for model in (number, moving))
            assert abs(ours[0] - expected[0]) < 0.01
            # Inductor rounds to 16 bits at other places, and a chunk at the edge of the support comes or goes: what
            # only the prior makes may then be another gradient.
            compared = ours[1] if dtype == torch.float32 else ours[1][:1]
            for a, b in zip(compared, expected[1], strict=dtype == torch.float32):
                error = (a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-6)
                assert error < 0.05
            sparsities.append(expected[0])
    assert sparsities == sorted(set(sparsities))
