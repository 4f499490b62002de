"""The Triton kernels of NSA's compressed and window branches, and their gated sum, against the references.

On the CPU through Triton's interpreter.
"""

import pytest
import torch

pytest.importorskip("triton")

from dashattn.ops.band import triton as kernels
from dashattn.ops.compression import reference as compression_reference
from dashattn.ops.compression.reference import num_windows
from dashattn.ops.gates import reference as gates_reference
from dashattn.ops.gates import triton as gates_kernels
from dashattn.ops.window import reference as window_reference

if torch.cuda.is_available():
    pytest.skip("tests/gpu covers the kernels where there is a GPU", allow_module_level=True)


def relative_error(x, expected):
    return ((x - expected).norm() / expected.norm().clamp_min(1e-20)).item()


def assert_agree(attention, reference, inputs, tolerance=1e-5):
    """Output and every gradient."""
    inputs = [x.requires_grad_() for x in inputs]
    out, expected = attention(*inputs), reference(*inputs)
    assert out.dtype == inputs[0].dtype
    assert relative_error(out, expected) < tolerance
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(expected, inputs, grad.to(expected.dtype))
    for result, wanted in zip(torch.autograd.grad(out, inputs, grad), expected, strict=True):
        assert relative_error(result, wanted) < tolerance


def packed(*ends):
    return torch.tensor([0, *ends], dtype=torch.int32)


@pytest.mark.parametrize(
    ("batch", "length", "group", "kv_heads", "head_dim", "kernel_size", "kernel_stride", "cu_seqlens", "dtype"),
    [
        (1, 150, 3, 1, 16, 8, 4, None, torch.float32),
        (2, 70, 1, 2, 24, 8, 8, None, torch.float32),
        (1, 110, 2, 1, 16, 12, 4, packed(3, 3, 50, 110), torch.float32),
        (1, 90, 2, 1, 16, 8, 4, None, torch.float16),
    ],
)
def test_compressed_branch(batch, length, group, kv_heads, head_dim, kernel_size, kernel_stride, cu_seqlens, dtype):
    windows = num_windows(length, kernel_size, kernel_stride)
    q = torch.randn(batch, length, group * kv_heads, head_dim).to(dtype)
    k, v = (torch.randn(batch, windows, kv_heads, head_dim).to(dtype) for _ in range(2))
    options = dict(kernel_size=kernel_size, kernel_stride=kernel_stride, scale=0.3, cu_seqlens=cu_seqlens)
    assert_agree(
        lambda *qkv: kernels.compressed_attention(*qkv, **options)[0],
        lambda *qkv: compression_reference.compressed_attention(*qkv, lambda p: None, **options)[0],
        (q, k, v),
        2e-3 if dtype == torch.float16 else 1e-5,
    )


def test_before_the_first_window_there_is_nothing_to_attend_to():
    q, k, v = (torch.randn(1, length, 1, 16, requires_grad=True) for length in (20, 1, 1))
    out, lse = kernels.compressed_attention(q, k, v, kernel_size=16, kernel_stride=8, scale=1.0, cu_seqlens=None)
    assert (out[:, :15] == 0).all()
    assert (out[:, 15:] == v[:, :1]).all()
    assert lse[:, :15].isposinf().all()
    assert lse[:, 15:].isfinite().all()
    assert not lse.requires_grad
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(x.isfinite().all() for x in grads)
    torch.testing.assert_close(grads[2], torch.full_like(v, 5.0))

    no_windows = torch.zeros(1, 0, 1, 16, requires_grad=True)
    out, _ = kernels.compressed_attention(
        q[:, :15], no_windows, no_windows, kernel_size=16, kernel_stride=8, scale=1.0, cu_seqlens=None
    )
    assert (out == 0).all()
    assert torch.autograd.grad(out.sum(), no_windows)[0].shape == no_windows.shape


@pytest.mark.parametrize(
    ("length", "group", "window_size", "cu_seqlens"),
    [
        (100, 3, 1, None),
        (130, 4, 40, None),
        (100, 3, 63, None),  # a tile's first token sees one key less than it takes to fill a tile of them
        (100, 1, 33, packed(1, 60, 60, 100)),
        (50, 2, 1000, None),
    ],
)
def test_window_branch(length, group, window_size, cu_seqlens):
    options = dict(window_size=window_size, scale=0.3, cu_seqlens=cu_seqlens)
    qkv = [torch.randn(1, length, heads, 16) for heads in (group, 1, 1)]
    if window_size == 1:  # the one probability is 1: no gradient reaches q and k but noise
        assert torch.equal(kernels.window_attention(*qkv, **options), qkv[2].expand(-1, -1, group, -1))
        return
    assert_agree(
        lambda *qkv: kernels.window_attention(*qkv, **options),
        lambda *qkv: window_reference.window_attention(*qkv, **options),
        qkv,
    )


@pytest.mark.parametrize("branches", [2, 3])
def test_gated_sum(branches):
    gates = torch.rand(1, 21, 3, branches)
    assert_agree(
        lambda gates, *outs: gates_kernels.gated_sum(gates, outs),
        lambda gates, *outs: gates_reference.gated_sum(gates, outs),
        [gates, *(torch.randn(1, 3, 21, 24).transpose(1, 2) for _ in range(branches))],
    )
