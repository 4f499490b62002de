"""InfLLM v2, NSA, controls with ``impl="triton"`` against the reference; in Triton's interpreter without a GPU."""

import pytest
import torch

pytest.importorskip("triton")

from dashattn import infllmv2_attention, nsa_attention
from dashattn.backends import AttentionShape, NSAConfig, build_backend
from dashattn.controls import oracle_attention, sink_window_attention
from dashattn.ops.compression.reference import num_windows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = {"block_size": 16, "kernel_size": 8, "kernel_stride": 4, "topk": 3, "scale": 0.4}
CU_SEQLENS = torch.tensor([0, 1, 19, 70], dtype=torch.int32, device=DEVICE)


def make(*shape):
    return torch.randn(*shape, device=DEVICE, requires_grad=True)


def make_qkv(length=70, group=3, kv_heads=1, head_dim=16):
    return [make(1, length, heads, head_dim) for heads in (group * kv_heads, kv_heads, kv_heads)]


def assert_implementations_agree(attention, inputs, **options):
    results = []
    for impl in ("triton", "reference"):
        with torch.device("meta"):  # nothing is made on the default device
            out, stats = attention(*inputs, impl=impl, return_stats=True, **options)
            weight = torch.linspace(-1, 1, out.numel(), device=DEVICE).view_as(out)
            results.append((out, stats.active_tokens, *torch.autograd.grad((out * weight).sum(), inputs)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("cu_seqlens", [None, CU_SEQLENS], ids=["one", "packed"])
def test_infllmv2(cu_seqlens):
    assert_implementations_agree(infllmv2_attention, make_qkv(), **SIZES, window_size=16, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize(
    ("attention", "options"),
    [
        (sink_window_attention, {"local_blocks": 1, "cu_seqlens": CU_SEQLENS}),
        (oracle_attention, {"local_blocks": 0, "topk": 3}),
    ],
    ids=["window, packed", "oracle"],
)
def test_controls(attention, options):
    assert_implementations_agree(attention, make_qkv(), block_size=16, init_blocks=1, scale=0.4, **options)


@pytest.mark.parametrize(
    ("pooling", "window_size", "cu_seqlens"), [("weighted", 20, None), ("max", 0, CU_SEQLENS)], ids=["paper", "minicpm"]
)
def test_nsa(pooling, window_size, cu_seqlens):
    q, k, v = make_qkv()
    compressed = [make(1, num_windows(70, 8, 4), 1, 16) for _ in range(2)]
    gates = torch.rand(1, 70, 3, 3 if window_size else 2, device=DEVICE, requires_grad=True)
    options = SIZES | {"pooling": pooling, "window_size": window_size, "cu_seqlens": cu_seqlens}
    assert_implementations_agree(nsa_attention, [q, k, v, *compressed, gates], **options)


@pytest.mark.parametrize(("window_size", "cu_seqlens"), [(20, None), (0, CU_SEQLENS)])
def test_nsa_without_gradients_adds_branches_up_as_it_goes(window_size, cu_seqlens):
    inputs = [*make_qkv(), *(make(1, num_windows(70, 8, 4), 1, 16) for _ in range(2))]
    gates = torch.rand(1, 70, 3, 3 if window_size else 2, device=DEVICE)
    options = SIZES | {"window_size": window_size, "cu_seqlens": cu_seqlens, "return_stats": True}
    out, stats = nsa_attention(*inputs, gates, impl="triton", **options)
    with torch.no_grad():
        lean, lean_stats = nsa_attention(*inputs, gates, impl="triton", **options)
    assert out.requires_grad
    assert not lean.requires_grad
    torch.testing.assert_close(lean, out.detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(lean_stats.active_tokens, stats.active_tokens)


def test_nsa_window_with_its_own_keys():
    q, k, v = make_qkv(length=40)
    rest = [make(1, num_windows(40, 8, 4), 1, 16) for _ in range(2)]
    gates = torch.rand(1, 40, 3, 3, device=DEVICE, requires_grad=True)

    def attention(*tensors, **options):
        return nsa_attention(*tensors[:-2], k_window=tensors[-2], v_window=tensors[-1], **options)

    assert_implementations_agree(attention, [q, k, v, *rest, gates, *make_qkv(40)[1:]], **SIZES, window_size=20)


def test_gradients_reach_the_compression():
    """Through the kernels into the MLPs, as through the reference."""
    grads = []
    for impl in ("triton", "reference"):
        torch.manual_seed(0)
        config = NSAConfig(impl=impl, block_size=16, kernel_size=8, kernel_stride=4, topk=3, window_size=20)
        backend = build_backend(config, AttentionShape(32, 2, 1, 16)).to(DEVICE)
        torch.nn.init.normal_(backend.compress_k.down.weight)
        out = backend(*make_qkv(40, group=2), hidden=make(1, 40, 32))
        grads.append(torch.autograd.grad(out.square().sum(), list(backend.parameters())))
    for ours, expected in zip(*grads, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


def test_what_the_kernels_do_not_take_is_refused_with_the_mend():
    q, k, v = make_qkv()
    options = {"window_size": 16, "topk": 3}
    for sizes, message in (
        ({"block_size": 16, "kernel_size": 64, "kernel_stride": 16}, "touch two blocks at most.*use impl='auto'"),
        ({"block_size": 64, "kernel_size": 1, "kernel_stride": 1, "window_size": 64}, "32 strides.*use impl='auto'"),
        ({"block_size": 8, "kernel_size": 8, "kernel_stride": 4, "window_size": 8}, "blocks of 16, 32, 64 or 128"),
    ):
        with pytest.raises(ValueError, match=message):
            infllmv2_attention(q, k, v, impl="triton", **options | sizes)
        assert infllmv2_attention(q, k, v, impl="auto", **options | sizes).shape == q.shape
