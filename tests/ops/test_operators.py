"""The custom operators as torch.compile, autograd and activation checkpointing see them."""

from importlib import import_module
from pkgutil import walk_packages

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from dashattn import dash_attention, ops
from dashattn.backends import AttentionShape, DashConfig, IndexerConfig, InfLLMv2Config, NSAConfig, build_backend
from dashattn.ops import operators
from dashattn.ops.band import triton as band
from dashattn.ops.block_scores import triton as block_scores
from dashattn.ops.block_sparse import triton as block_sparse
from dashattn.ops.chunk_summary import triton as chunk_summary
from dashattn.ops.dash_attention import triton as dash_whole
from dashattn.ops.gates import triton as gates
from dashattn.ops.matvec import triton as matvec
from dashattn.ops.true_mass import triton as true_mass

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(*shape):
    return torch.randn(*shape, device=DEVICE, requires_grad=True)


def make_half(*shape):
    return torch.randn(*shape, device=DEVICE).bfloat16().requires_grad_()


def make_qkv(length=24):
    return [make(1, length, heads, 16) for heads in (2, 1, 1)]


def test_operators_keep_torch_librarys_rules():
    """Schema, fake tensors, autograd and tracing with dynamic shapes, all by ``torch.library.opcheck``."""
    q, k, v = make_qkv()
    selected = (make(1, 20, 2, 16).detach(), make(1, 2, 1, 16).detach())
    scale = torch.tensor(2.0, dtype=torch.float64)  # on the CPU, wherever the others are
    k_of_topk = torch.tensor(1.0, dtype=torch.float64)
    whole = (q, k, v, make(1, 1, 16), None, None)
    words = torch.full((1, 1, 24, 1), 3, dtype=torch.int32, device=DEVICE)
    for operator, arguments in (
        (chunk_summary._forward_op, (k, make(1, 1, 16), None, 16)),
        (dash_whole._forward_op, (*whole, None, None, 16, 1.0, [0, 0], 0.25, "entmax", "raw", 1.0)),
        (dash_whole._forward_op, (*whole, scale, None, 16, 1.0, [1, 0], 0.25, "entmax", "raw", 1.0)),
        (dash_whole._forward_op, (*whole, None, k_of_topk, 16, 1.0, [0, 0], 0.25, "topk", "raw", 1.0)),
        (block_sparse._forward_op, (q, k, v, words, None, None, 16, 0.25)),
        (band._forward_op, (*make_qkv(20), None, 1, 1, 10, 0.25)),
        (block_scores._select_op, (*selected, None, None, 8, 8, "max", 16, 1, 0, 1, 0.25)),
        (gates._forward_op, (make(1, 20, 4, 2), make(1, 20, 4, 16), make(1, 20, 4, 16), None)),
    ):
        assert set(torch.library.opcheck(operator.op, arguments).values()) == {"SUCCESS"}


def test_fake_tensors_have_the_sizes_of_what_is_computed(monkeypatch):
    """And its types, in 16 bits, of every operator, at lengths that fill neither a word nor a block."""
    call, calls = operators.Operator.__call__, []

    def recorded(operator, *inputs, **options):
        found = call(operator, *inputs, **options)
        calls.append((operator, inputs, options, found))
        return found

    monkeypatch.setattr(operators.Operator, "__call__", recorded)
    sizes = {"impl": "triton", "block_size": 16, "kernel_size": 8, "kernel_stride": 4, "topk": 3}
    for config in (
        DashConfig(impl="triton", chunk_size=16, summary_rope="mean", init_chunks=1),
        InfLLMv2Config(**sizes, window_size=16),
        NSAConfig(**sizes, window_size=20),
        IndexerConfig(impl="triton", block_size=16, topk=3),
        IndexerConfig(impl="triton", block_size=16, topk=3, gradient="prior"),
    ):
        backend = build_backend(config, AttentionShape(32, 2, 1, 16)).to(DEVICE, torch.bfloat16)
        q, k, v = (make_half(1, 27, heads, 16) for heads in (2, 1, 1))
        rope = torch.ones(27, 16, device=DEVICE), torch.zeros(27, 16, device=DEVICE)
        extra = {"hidden": make_half(1, 27, 32), "rope": rope}
        with torch.no_grad():
            backend.forward_with_loss(q, k, v, **extra)
            backend.route(q, k, v, **extra)
        backend(q, k, v, **extra).sum().backward()
    alpha = torch.full((2,), 1.5, device=DEVICE, requires_grad=True)
    others = {"alpha": alpha, "prior": "raw", "router_qk": (make_half(1, 27, 2, 16), k)}
    dash_attention(q, k, v, make_half(1, 16), chunk_size=16, **others, impl="triton").sum().backward()
    x, weights = make_half(1, 1, 32).detach(), [make_half(rows, 32).detach() for rows in (64, 16, 48)]
    matvec.heads(x, weights, 16, (x[0, 0], 1e-5), None)
    matvec.swiglu(x, *weights[:1] * 2, None)
    matvec.product(x, weights[2])
    for operator, inputs, options, found in calls:
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in inputs]
            told = operator.op(*fakes, **options)
        for fake, real in zip(*((x,) if isinstance(x, Tensor) else x for x in (told, found)), strict=True):
            assert (fake.shape, fake.dtype) == (real.shape, real.dtype), operator.op
    modules = (import_module(name) for _, name, _ in walk_packages(ops.__path__, "dashattn.ops.") if "triton" in name)
    every = {x for module in modules for x in vars(module).values() if isinstance(x, operators.Operator)}
    assert {operator for operator, *_ in calls} == every


def test_an_eager_call_is_the_operators():
    """With the same gradients, once: a second derivative is refused, not zero."""
    q, k, v = make_qkv()
    arguments = (q, k, v, make(1, 1, 16), None, None, None, None, 16, 1.0, [0, 0], 0.25, "entmax", "raw", 1.0)
    results = []
    for call in (dash_whole._forward_op, dash_whole._forward_op.op):
        out, words, *_ = call(*arguments)
        assert not words.requires_grad
        results.append([out, words, *torch.autograd.grad(out.square().sum(), arguments[:4], create_graph=True)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    with pytest.raises(RuntimeError, match="once_differentiable"):
        results[0][2].sum().backward()
    with torch.no_grad():
        assert not dash_whole._forward_op(*arguments)[0].requires_grad


def test_an_operator_without_a_gradient_says_so():
    lse, words = torch.zeros(1, 24, 2), torch.ones(1, 1, 24, 1, dtype=torch.int32)
    q, k, _ = make_qkv()
    masses = true_mass._masses_op(q, k, words.to(DEVICE), lse.to(DEVICE), None, 16, 0.25)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        masses.sum().backward()


def test_an_operator_whose_option_has_a_gradient_says_so_too():
    @operators.operator("test_scaled")
    def scaled(x: Tensor, factor: Tensor) -> Tensor:
        return x * factor

    x, factor = torch.ones(2), torch.ones(2)
    assert not scaled(x, factor=factor).requires_grad
    with pytest.raises(RuntimeError, match="no autograd formula"):
        scaled(x, factor=factor.requires_grad_()).sum().backward()


def test_outputs_that_nobody_used_have_no_gradient():
    given = []

    @operators.operator("test_two_outputs")
    def two_outputs(x: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * x, 3 * x

    def backward(ctx, first, second):
        given.append((first, second))
        return 2 * first

    two_outputs.register_autograd(backward, setup_context=lambda ctx, inputs, output: None)
    x = torch.ones(2, requires_grad=True)
    two_outputs(x)[0].sum().backward()
    assert torch.equal(x.grad, torch.full((2,), 2.0))
    assert given[0][1] is None


@pytest.mark.parametrize(
    "config",
    [
        DashConfig(impl="triton", chunk_size=16),
        InfLLMv2Config(impl="triton", block_size=16, kernel_size=8, kernel_stride=4, topk=3, window_size=16),
        NSAConfig(impl="triton", block_size=16, kernel_size=8, kernel_stride=4, topk=3, window_size=16),
    ],
    ids=lambda config: config.name,
)
def test_every_backend_can_be_checkpointed(config):
    backend = build_backend(config, AttentionShape(32, 2, 1, 16)).to(DEVICE)
    q, k, v = make_qkv()
    hidden = make(1, 24, 32)

    def attend(*tensors):
        return backend(*tensors[:3], hidden=tensors[3])

    results = [attend(q, k, v, hidden), checkpoint(attend, q, k, v, hidden, use_reentrant=False)]
    expected, again = ([out, *torch.autograd.grad(out.square().sum(), (q, k, v))] for out in results)
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


@pytest.fixture
def _deterministic():
    torch.use_deterministic_algorithms(True)  # raises where an operation has no such algorithm
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_deterministic")
def test_checkpointing_and_autocast_change_nothing():
    inputs = [*make_qkv(), make(1, 16)]

    def attend(*tensors):
        return dash_attention(*tensors, chunk_size=16, router_scale=2.0, prior="raw", impl="triton")

    results = [attend(*inputs), checkpoint(attend, *inputs, use_reentrant=False)]
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        results.append(attend(*inputs))
    expected, *others = ([out, *torch.autograd.grad(out.square().sum(), inputs)] for out in results)
    assert all(torch.equal(a, b) for other in others for a, b in zip(other, expected, strict=True))
