"""Activation checkpointing and torch.compile change speed and memory, not results."""

import pickle
import re
import shutil
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code

from dashattn.backends import DashConfig, FullConfig, IndexerConfig, InfLLMv2Config, NSAConfig, dash, indexer
from dashattn.ops.compression.reference import mean_compress
from models import ModelConfig, Transformer
from models import loss as loss_module
from models.generate import generate
from models.loss import chunk_loss, cross_entropy

SHAPE = ModelConfig(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=32,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    max_seq_len=256,
)
WINDOWS = {"block_size": 16, "kernel_size": 8, "kernel_stride": 4, "window_size": 16, "topk": 3}
NSA = NSAConfig(**WINDOWS)
INDEXER = IndexerConfig(block_size=8, index_size=8, topk=3, init_blocks=0, local_blocks=0)


@pytest.fixture
def _poisoned_empty():
    """Nothing is poisoned here: torch.compile would trace the poisoning."""


def build(attention, **changes):
    torch.manual_seed(0)
    return Transformer(replace(SHAPE, **changes), attention)


def loss_and_gradients(model, input_ids, **options):
    output = model(input_ids, labels=input_ids, **options)
    loss = output.loss + (0 if output.auxiliary_loss is None else output.auxiliary_loss)
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("attention", [FullConfig(), DashConfig(chunk_size=16), NSA, INDEXER], ids=lambda c: c.name)
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


@pytest.mark.long
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
    assert frames[1] == frames[0] + 1  # the loss's, of which the number of tokens is a symbol from the second one on


def test_layers_that_share_a_selection_compile_once_each_into_one_graph():
    """The selection and its bias go from graph to graph, and the bias's gradient back."""
    pytest.importorskip("triton")
    torch._dynamo.reset()
    layers = {"1": {"share_selection_from": 0}}
    attention = DashConfig(chunk_size=16, impl="triton", prior="raw", router_scale=4.0, layers=layers)
    eager, compiled = (build(attention, num_layers=2, init_std=0.3) for _ in range(2))
    backend = CompileCounterWithBackend("aot_eager")
    compiled.compile_layers(backend=backend, fullgraph=True)
    frames = []
    for length in (36, 49):
        input_ids = torch.randint(50, (1, length))
        results = [loss_and_gradients(model, input_ids) for model in (eager, compiled)]
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-4)
        frames.append(backend.frame_count)
    assert frames[1] == frames[0] + 1  # the loss's


@pytest.mark.parametrize("options", [{"gradient": "prior"}, {"warmup_steps": 1}], ids=str)
def test_around_an_indexer_that_stays_as_it_is_the_layer_compiles(options):
    """With all its defaults it goes on after a warm-up."""
    torch._dynamo.reset()
    eager, compiled = (build(replace(INDEXER, **options)) for _ in range(2))
    compiled.compile_layers(backend="aot_eager")
    input_ids = torch.randint(50, (1, 49))
    for step in range(2):
        results = []
        for model in (eager, compiled):
            model.set_step(step)
            results.append(loss_and_gradients(model, input_ids))
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-4)
            assert expected.abs().max() > 0


@pytest.mark.parametrize(
    ("module", "called", "attention"),
    [(indexer, "indexer_attention", INDEXER), (dash, "dash_attention", DashConfig(chunk_size=8, prior="mass"))],
    ids=["indexer", "hils"],
)
def test_what_a_backend_leaves_uncompiled_is_not_traced(monkeypatch, module, called, attention):
    """Neither in training, with a loss of its own, nor in evaluation."""
    torch._dynamo.reset()
    whole, is_traced = getattr(module, called), []

    def attend(*inputs, **options):
        is_traced.append(torch.compiler.is_compiling())
        return whole(*inputs, **options)

    monkeypatch.setattr(module, called, attend)
    model, input_ids = build(attention), torch.randint(50, (1, 20))
    model.compile_layers(backend="eager")
    model(input_ids, labels=input_ids)
    with torch.no_grad():
        model(input_ids)
    assert is_traced == [False, False]


@pytest.mark.long
@pytest.mark.parametrize(
    ("options", "knobs"),
    [
        ({}, (1.0, 1e6)),
        ({"selector": "topk", "summary_keys": "unrotated"}, (3, 1)),
        pytest.param({"selector": "topp"}, (1.0, 1e-5), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_knob_that_moves_compiles_nothing_anew(options, knobs):
    pytest.importorskip("triton")
    torch._dynamo.reset()
    attention = DashConfig(chunk_size=16, impl="triton", target_sparsity=0.5, **options)
    eager, compiled = build(attention), build(attention)
    backend = CompileCounterWithBackend("aot_eager")
    compiled.compile_layers(backend=backend, fullgraph=True)
    input_ids, frames, read = torch.arange(40)[None], [], []
    for knob in knobs:
        results = []
        for model in (eager, compiled):
            model.set_knob(knob)
            results.append(loss_and_gradients(model, input_ids))
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-4)
        frames.append(backend.frame_count)
        read.append(eager(input_ids, return_stats=True).stats[0].causal_sparsity().item())
    assert frames == frames[:1] * 2
    assert read == sorted(set(read))  # the knob was heeded


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a compiler")
@pytest.mark.parametrize(
    "attention",
    [
        FullConfig(),
        DashConfig(chunk_size=16, impl="triton"),
        InfLLMv2Config(**WINDOWS, impl="triton"),
        NSAConfig(**WINDOWS, impl="triton"),
    ],
    ids=lambda c: c.name,
)
def test_inductor_compiles_what_stands_between_the_operators(attention):
    if attention.name != "full":
        pytest.importorskip("triton")
    torch._dynamo.reset()
    eager, compiled, input_ids = build(attention), build(attention), torch.randint(50, (2, 50))
    compiled.compile_layers(fullgraph=True)
    results = [loss_and_gradients(model, input_ids) for model in (eager, compiled)]
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


def test_compiled_windows_have_no_sum_for_a_size():
    """What Inductor fails on, but for a GPU only: see ``compress_windows``."""
    torch._dynamo.reset()
    sizes = []

    def backend(graph, _):
        means = [node for node in graph.graph.nodes if node.target == "mean"]
        sizes.extend(size for node in means for size in node.args[0].meta["example_value"].shape)
        return graph

    compiled, x = torch.compile(mean_compress, dynamic=True, fullgraph=True, backend=backend), torch.randn(2, 50, 2, 16)
    torch.testing.assert_close(compiled(x, 8, 4), mean_compress(x, 8, 4))
    symbols = [size.node.expr for size in sizes if isinstance(size, torch.SymInt)]
    assert symbols
    assert not any(symbol.is_Add for symbol in symbols)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_compiled_loss_is_the_eager_one(dtype, monkeypatch):
    """Whatever the number of tokens, in training and without gradients: two graphs for each."""
    torch._dynamo.reset()
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 16 * 50)
    backend = CompileCounterWithBackend("aot_eager_decomp_partition")  # Inductor's operations, without its compiler
    compiled = torch.compile(chunk_loss, backend=backend, fullgraph=True)
    weight = torch.randn(50, 24).to(dtype).requires_grad_()
    for tokens in (32, 40, 37, 26):  # the last chunk has 16, 8, 5 or 10
        hidden, labels = torch.randn(2, tokens // 2, 24).to(dtype).requires_grad_(), torch.randint(50, (2, tokens // 2))
        labels[:, ::3] = -100
        results = []
        for function in (chunk_loss, compiled):
            value, losses, _ = cross_entropy(hidden, weight, labels, chunk_loss=function)
            with torch.no_grad():
                assert torch.equal(cross_entropy(hidden, weight, labels, chunk_loss=function)[1], losses)
            results.append([value, losses, *torch.autograd.grad(value, (hidden, weight))])
        for ours, expected in zip(*results, strict=True):
            tolerance = 1e-6 if ours.dtype == torch.float32 else 2**-7
            torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
    assert backend.frame_count == 4


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a compiler")
def test_inductor_writes_nothing_as_large_as_the_logits_but_their_gradient():
    torch._dynamo.reset()
    logits, labels = torch.randn(48, 1024).bfloat16(), torch.randint(1024, (48,))
    labels[::3] = -100
    compiled = torch.compile(chunk_loss, fullgraph=True)
    (losses, grad), (code,) = run_and_get_code(compiled, logits, labels, with_grad=True)
    expected_losses, expected_grad = chunk_loss(logits, labels, with_grad=True)
    torch.testing.assert_close(losses, expected_losses)
    torch.testing.assert_close(grad, expected_grad, rtol=2**-7, atol=0)
    buffers = re.findall(r"= empty_strided_cpu\(\(48, 1024\), \(1024, 1\), torch\.(\w+)\)", code)
    assert buffers == ["bfloat16"]


@pytest.mark.long
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


def test_a_compiled_model_can_be_pickled():
    torch._dynamo.reset()
    model, input_ids = build(FullConfig()), torch.randint(50, (2, 40))
    model.compile_layers(backend="eager")
    loss = model(input_ids, labels=input_ids).loss
    copied = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(copied(input_ids, labels=input_ids).loss, loss)


def test_activation_checkpointing_and_compilation_go_together():
    torch._dynamo.reset()
    plain, both, input_ids = build(FullConfig()), build(FullConfig()), torch.randint(50, (2, 40))
    both.checkpoint_activations = True
    both.compile_layers(backend="aot_eager", fullgraph=True)
    results = [loss_and_gradients(model, input_ids) for model in (plain, both)]
    assert all(torch.allclose(a, b, atol=1e-6, rtol=1e-4) for a, b in zip(*results, strict=True))
