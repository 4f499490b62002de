"""Activation checkpointing and torch.compile change speed and memory, not results."""

from copy import deepcopy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from dashattn.backends import DashConfig, FullConfig, NSAConfig
from models import ModelConfig, Transformer
from models.generate import generate

SHAPE = ModelConfig(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=32,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_seq_len=256,
)
NSA = NSAConfig(block_size=16, kernel_size=8, kernel_stride=4, window_size=16, topk=3)


@pytest.fixture
def _poisoned_empty():
    """Nothing is poisoned here: torch.compile would trace the poisoning."""


def build(attention):
    torch.manual_seed(0)
    return Transformer(SHAPE, attention)


def loss_and_gradients(model, input_ids, **options):
    loss = model(input_ids, labels=input_ids, **options).loss
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("attention", [FullConfig(), DashConfig(chunk_size=16), NSA], ids=lambda c: c.name)
def test_activation_checkpointing_changes_nothing_and_keeps_less(attention):
    model, input_ids, results, kept = build(attention), torch.randint(50, (2, 40)), [], []
    for model.checkpoint_activations in (False, True):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, sizes=sizes: (sizes.append(x.numel()), x)[1], lambda x: x
        ):
            results.append(loss_and_gradients(model, input_ids, return_stats=True))
        kept.append(sum(sizes))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert kept[1] < kept[0] / 2


@pytest.mark.parametrize(
    "attention",
    [
        pytest.param(FullConfig(), id="full"),
        pytest.param(
            DashConfig(chunk_size=16, impl="triton", alpha_mode="scheduled", alpha_steps=10), id="dash, scheduled alpha"
        ),
        pytest.param(
            DashConfig(chunk_size=16, impl="triton", alpha_mode="learnable", summary_rope="mean", prior="raw"),
            id="dash, learnable alpha",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_layer_compiles_once_into_one_graph(attention):
    """Whatever the length and whatever alpha a schedule has reached: around the operators nothing is left to eager."""
    if attention.name == "dash":
        pytest.importorskip("triton")
    torch._dynamo.reset()
    eager, compiled = build(attention), build(attention)
    backend = CompileCounterWithBackend("aot_eager")
    compiled.compile_layers(backend=backend, fullgraph=True)  # a graph break raises
    frames = []
    for step, length in enumerate((36, 49)):
        input_ids = torch.randint(50, (1, length))
        results = []
        for model in (eager, compiled):
            model.set_step(step)
            results.append(loss_and_gradients(model, input_ids))
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-4)
        frames.append(backend.frame_count)
    assert frames[0] == frames[1]


def test_decoding_compiles_once_around_the_attention():
    """Whatever the length, the capacity and the number of sequences; one sequence is a case of its own."""
    torch._dynamo.reset()
    eager, compiled = (build(DashConfig(chunk_size=16)).double() for _ in range(2))
    backend = CompileCounterWithBackend("aot_eager")
    compiled.compile_layers(backend=backend)
    frames = []
    for lengths in ([40], [7], [5, 21], [33, 90, 1]):
        prompts = [torch.randint(50, (length,)).tolist() for length in lengths]
        tokens = [generate(model, prompts, max_new_tokens=8) for model in (eager, compiled)]
        assert tokens[0] == tokens[1]
        frames.append(backend.frame_count)
    assert frames[0] == frames[1]
    assert frames[2] == frames[3]


def test_a_copy_of_a_compiled_model_decodes_with_its_own_parameters():
    model = build(DashConfig(chunk_size=16))
    model.compile_layers(backend="eager")
    copied = deepcopy(model)
    for one in (model, copied):
        assert all(backend.decode.__self__ is backend for backend in one.backends)


def test_activation_checkpointing_and_compilation_go_together():
    torch._dynamo.reset()
    plain, both, input_ids = build(FullConfig()), build(FullConfig()), torch.randint(50, (2, 40))
    both.checkpoint_activations = True
    both.compile_layers(backend="aot_eager", fullgraph=True)
    results = [loss_and_gradients(model, input_ids) for model in (plain, both)]
    assert all(torch.allclose(a, b, atol=1e-6, rtol=1e-4) for a, b in zip(*results, strict=True))
