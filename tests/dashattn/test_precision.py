"""16-bit inputs: every operation computes in float32, so that it is as good as float64 on the same rounded inputs."""

import pytest
import torch

from dashattn.ops.block_sparse.reference import block_sparse_attention
from dashattn.ops.chunk_summary.reference import chunk_summary
from dashattn.ops.compression.reference import compressed_attention, mean_compress
from dashattn.ops.dash_routing.reference import dash_routing
from dashattn.ops.window.reference import window_attention
from dashattn.selection import Selection

LENGTH, CHUNK = 128, 16
WINDOWS = {"kernel_size": 8, "kernel_stride": 4}
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def make(heads, dtype, length=LENGTH):
    return torch.randn(1, length, heads, 32).to(dtype)


def assert_rounded_once(fn, *inputs):
    """The result differs from float64's by the rounding to its own dtype: 0.2 eps in RMS (twice: 0.29)."""
    out, exact = fn(*inputs), fn(*(x.double() for x in inputs))
    assert out.dtype == inputs[0].dtype
    assert (out - exact).norm() / exact.norm() <= torch.finfo(out.dtype).eps / 4


@each_dtype
def test_summaries_and_compressed_keys_are_rounded_to_the_keys_dtype(dtype):
    k, r = 3 + make(2, dtype), torch.randn(2, 32)
    angles = torch.randn(LENGTH, 16).repeat(1, 2)
    assert_rounded_once(lambda k: chunk_summary(k, r, chunk_size=CHUNK), k)
    assert_rounded_once(lambda k: chunk_summary(k, r, chunk_size=CHUNK, rope=(angles.cos(), angles.sin())), k)
    assert_rounded_once(lambda k: mean_compress(k, **WINDOWS), k)


@each_dtype
def test_routing_is_float32(dtype):
    q, summaries = make(6, dtype), make(2, dtype, LENGTH // CHUNK)
    selection, bias = dash_routing(q, summaries, chunk_size=CHUNK, router_scale=3.0, prior="raw")
    exact, exact_bias = dash_routing(q.double(), summaries.double(), chunk_size=CHUNK, router_scale=3.0, prior="raw")
    assert (selection.words == exact.words).all()
    assert bias.dtype == torch.float32
    # The logarithm of a probability near the support's edge carries the scores' 1e-6 enlarged.
    torch.testing.assert_close(bias.double().exp(), exact_bias.exp(), rtol=0, atol=1e-5)


@each_dtype
def test_attention_is_float32(dtype):
    q, k, v = make(6, dtype), make(2, dtype), make(2, dtype)
    selection = Selection.from_mask(torch.rand(1, LENGTH, 2, LENGTH // CHUNK) < 0.7, CHUNK)
    bias = 10 + torch.randn(1, LENGTH, 2, LENGTH // CHUNK)  # float32 whatever q is
    assert_rounded_once(lambda q, k, v: block_sparse_attention(q, k, v, selection, bias), q, k, v)
    assert_rounded_once(lambda q, k, v: window_attention(q, k, v, window_size=40, scale=0.2), q, k, v)


@each_dtype
def test_compressed_attention_is_float32(dtype):
    q, k, v = make(6, dtype), make(2, dtype), make(2, dtype)
    ck, cv = (mean_compress(x, **WINDOWS) for x in (k, v))

    def attend(*qkv):
        out, (log_p,) = compressed_attention(*qkv, lambda log_p: log_p, **WINDOWS, scale=0.2, cu_seqlens=None)
        return out, log_p.exp()

    for result, exact in zip(attend(q, ck, cv), attend(*(x.double() for x in (q, ck, cv))), strict=True):
        assert result.dtype == torch.float32
        torch.testing.assert_close(result.double(), exact, rtol=0, atol=1e-5)


def test_tokens_with_nothing_selected_give_zero():
    q, k, v = make(4, torch.float32), make(2, torch.float32), make(2, torch.float32)
    mask = torch.ones(1, LENGTH, 2, LENGTH // CHUNK, dtype=torch.bool)
    mask[:, 40, 1] = False
    out = block_sparse_attention(q, k, v, Selection.from_mask(mask, CHUNK))
    assert (out[:, 40, 2:] == 0).all()
    assert (out[:, 40, :2] != 0).any()
