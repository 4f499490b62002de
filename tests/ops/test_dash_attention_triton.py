"""``dash_attention(impl="triton")`` end to end against the reference, in Triton's interpreter without a GPU."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from dashattn import dash_attention
from dashattn.implementation import use_kernels
from dashattn.selected import selected_attention
from dashattn.selection import Selection

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CU_SEQLENS = torch.tensor([0, 1, 30, 54], dtype=torch.int32, device=DEVICE)
ANGLES = torch.arange(54, device=DEVICE)[:, None] * torch.linspace(0.1, 2, 8, device=DEVICE).repeat(2)


def make_inputs(num_heads=4, num_kv_heads=2, length=54, head_dim=16):
    def make(*shape):
        return torch.randn(*shape, device=DEVICE, requires_grad=True)

    qkv = [make(1, length, heads, head_dim) for heads in (num_heads, num_kv_heads, num_kv_heads)]
    return [*qkv, make(num_kv_heads, head_dim)]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"prior": "raw"}, marks=pytest.mark.slow),
        {"prior": "tempered", "sigma": 2.0},
        pytest.param({"prior": "none"}, marks=pytest.mark.slow),
        {"prior": "raw", "alpha": 1.3, "scale": 0.4},  # several chunks to choose from, by the router's own scale
        {"prior": "raw", "cu_seqlens": CU_SEQLENS, "summary_rope": ANGLES},
        {"prior": "raw", "init_chunks": 1, "local_chunks": 1, "scale": 0.4},
        {"prior": "mass", "selector": "topk", "topk": 3, "cu_seqlens": CU_SEQLENS, "scale": 0.4},
    ],
    ids=lambda options: ", ".join(options),
)
def test_forward_and_gradients_equal_the_reference(options):
    inputs = make_inputs()
    if "summary_rope" in options:
        options = options | {"summary_rope": (ANGLES.cos(), ANGLES.sin())}
    results = {}
    for impl in ("triton", "reference"):
        call = {"chunk_size": 16, "router_scale": 3.0, "impl": impl, "return_stats": True}
        with torch.device("meta"):  # nothing is made on the default device
            out, stats = dash_attention(*inputs, **call, **options)
            weight = torch.linspace(-1, 1, out.numel(), device=DEVICE).view_as(out)
            grads = torch.autograd.grad((out * weight).sum(), inputs, allow_unused=True)
        results[impl] = (out, stats.active_tokens, *grads)
    for ours, expected in zip(results["triton"], results["reference"], strict=True):
        if expected is None:
            assert ours is None or not ours.any()
        else:
            torch.testing.assert_close(ours.float(), expected.float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("selector", ["entmax", "topk"])
def test_more_chunks_than_a_tile_has(selector):
    """A group of 3, whose tiles have an idle row; of 36 chunks, summaries beyond the first tile get their gradients."""
    inputs, results = make_inputs(num_heads=3, num_kv_heads=1, length=576), {}
    for impl in ("triton", "reference"):
        out = dash_attention(*inputs, chunk_size=16, router_scale=3.0, prior="raw", selector=selector, impl=impl)
        weight = torch.linspace(-1, 1, out.numel(), device=DEVICE).view_as(out)
        results[impl] = (out, *torch.autograd.grad((out * weight).sum(), inputs))
    for ours, expected in zip(results["triton"], results["reference"], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", [{"prior": "raw"}, {"prior": "tempered", "sigma": 2.0}, {"prior": "none"}], ids=str)
def test_a_query_and_keys_of_the_routers_own(options):
    inputs, others = make_inputs(), make_inputs()[:2]
    options = dict(options, chunk_size=16, router_scale=3.0, init_chunks=1)
    leaves = [*inputs, *others]
    results = []
    for impl in ("triton", "reference"):
        out = dash_attention(*inputs, router_qk=others, impl=impl, **options)
        weight = torch.linspace(-1, 1, out.numel(), device=DEVICE).view_as(out)
        grads = torch.autograd.grad((out * weight).sum(), leaves, materialize_grads=True)
        results.append((out, *grads))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)
    assert (results[0][-1].abs().max() > 0) == (options["prior"] != "none")


@pytest.mark.parametrize("options", [{"prior": "raw"}, {"prior": "raw", "cu_seqlens": CU_SEQLENS}], ids=str)
def test_a_selection_that_another_layer_takes_over(options):
    inputs, others = make_inputs(), make_inputs()[:3]
    documents = {"cu_seqlens": options.get("cu_seqlens")}
    results = []
    for impl in ("triton", "reference"):
        call = {"chunk_size": 16, "router_scale": 3.0, "impl": impl, "return_selection": True}
        out, chosen = dash_attention(*inputs, **call, **options)
        taken = selected_attention(*others, Selection(chosen.words, 16), chosen.bias, impl=impl, **documents)
        weight = torch.linspace(-1, 1, out.numel(), device=DEVICE).view_as(out)
        grads = torch.autograd.grad((out * weight - taken * weight).sum(), [*inputs, *others])
        results.append((out, taken, *grads))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


def test_learned_alpha_gets_its_gradient():
    inputs = make_inputs(length=40)
    grads = []
    for impl in ("triton", "reference"):
        alpha = torch.tensor([1.2, 1.5, 1.7, 1.9], device=DEVICE, requires_grad=True)
        with torch.device("meta"):  # nothing is made on the default device
            out = dash_attention(*inputs, chunk_size=16, alpha=alpha, prior="raw", impl=impl)
            out.square().sum().backward()
        grads.append(alpha.grad)
    assert grads[1].abs().max() > 0
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4)


def test_a_router_scale_that_moves_gives_the_same_bits():
    inputs, results = make_inputs(), []
    for router_scale in (3.3, torch.tensor(3.3, dtype=torch.float64)):
        out = dash_attention(*inputs, chunk_size=16, router_scale=router_scale, prior="raw", impl="triton")
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    assert all(torch.equal(ours, expected) for ours, expected in zip(*results, strict=True))


@pytest.mark.parametrize("alpha", [1.01, 1.5, 2.0])
@pytest.mark.parametrize("prior", ["raw", "tempered"])
def test_gradient_of_alpha_is_exact_at_any_alpha(alpha, prior):
    """Where z = p ** (alpha - 1) is close to 1, too; on a GPU the special unit's logarithm of it errs by 1e-7."""
    q, k, v, grad = (torch.randn(1, 66, heads, 16, device=DEVICE) for heads in (2, 1, 1, 2))
    grads = []
    for impl, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        tensor = torch.full((2,), alpha, dtype=dtype, device=DEVICE, requires_grad=True)
        queries, keys, values, chunk_query = (x.to(dtype) for x in (2 * q, k, v, torch.zeros(1, 16, device=DEVICE)))
        options = dict(chunk_size=16, alpha=tensor, prior=prior, sigma=1.0, router_scale=8.0, impl=impl)
        out = dash_attention(queries, keys, values, chunk_query, **options)
        grads += torch.autograd.grad(out, tensor, grad.to(dtype))
    error = (grads[0] - grads[1]).norm() / grads[1].norm()
    assert error < (1e-3 if DEVICE == "cuda" else 1e-4)


def test_what_the_kernels_do_not_take_is_refused_with_the_mend():
    q, k, v, r = make_inputs()
    for changes, message in (
        ({"prior_heads": "head"}, "prior_heads='group' only; use impl='auto'"),
        ({"chunk_size": 20}, "blocks of 16, 32, 64 or 128"),
    ):
        with pytest.raises(ValueError, match=message):
            dash_attention(q, k, v, r, impl="triton", **changes)
    with pytest.raises(ValueError, match="use impl='reference'"):
        dash_attention(*(x.double() for x in (q, k, v, r)), impl="triton")


@pytest.mark.parametrize(
    ("dtype", "head_dim", "block_size", "unsupported", "message"),
    [
        (torch.bfloat16, 64, 16, None, None),
        (torch.float16, 8, 32, None, None),
        (torch.float32, 256, 128, None, None),
        (torch.float64, 64, 64, None, "bfloat16, float16 and float32, not torch.float64: use impl='reference'"),
        (torch.bfloat16, 264, 64, None, "head sizes up to 256 in steps of 8, not 264"),
        (torch.bfloat16, 60, 64, None, "head sizes up to 256 in steps of 8, not 60"),
        (torch.bfloat16, 64, 256, None, "blocks of 16, 32, 64 or 128 keys, not 256"),
        (torch.bfloat16, 64, 64, "the kernels cannot", "impl='triton': the kernels cannot; use impl='auto' or"),
    ],
)
def test_on_a_gpu_the_kernels_run_where_they_fit(dtype, head_dim, block_size, unsupported, message):
    q = SimpleNamespace(is_cuda=True, device="cuda", dtype=dtype, shape=(1, 9, 2, head_dim))
    assert use_kernels("auto", q, block_size, unsupported) == (message is None)
    assert not use_kernels("reference", q, block_size, unsupported)
    if message is None:
        assert use_kernels("triton", q, block_size)
        return
    with pytest.raises(ValueError, match=message):
        use_kernels("triton", q, block_size, unsupported)


def test_without_a_gpu_the_kernels_are_refused(monkeypatch):
    q = torch.zeros(1, 9, 2, 64)
    assert not use_kernels("auto", q, 64)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="needs tensors on a GPU, q is on cpu: use impl='auto' or 'reference'"):
        use_kernels("triton", q, 64)
