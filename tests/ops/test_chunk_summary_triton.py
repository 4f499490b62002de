"""The Triton kernels of the chunk summaries against the reference, on the CPU through Triton's interpreter."""

import pytest
import torch

pytest.importorskip("triton")

from dashattn.ops.chunk_summary import reference
from dashattn.ops.chunk_summary import triton as kernels

if torch.cuda.is_available():
    pytest.skip("tests/gpu covers the kernels where there is a GPU", allow_module_level=True)


@pytest.mark.parametrize(
    ("length", "cu_seqlens"),
    [(100, None), (5, None), (16, None), (48, None), (100, [0, 20, 20, 21, 75, 100]), (96, [0, 16, 48, 48, 96])],
    ids=str,
)
@pytest.mark.parametrize("rotated", [False, True])
def test_summaries_and_gradients_agree_with_the_reference(length, rotated, cu_seqlens):
    if cu_seqlens is not None:
        cu_seqlens = torch.tensor(cu_seqlens, dtype=torch.int32)
    k = torch.randn(1 if cu_seqlens is not None else 2, length, 2, 24, requires_grad=True)
    chunk_query = torch.randn(2, 24, requires_grad=True)
    rope = None
    if rotated:
        angles = torch.arange(length)[:, None] * 10000 ** (-torch.arange(12) / 12)
        rope = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()
    options = dict(chunk_size=16, cu_seqlens=cu_seqlens, rope=rope)
    expected = reference.chunk_summary(k, chunk_query, **options)
    out = kernels.chunk_summary(k, chunk_query, **options)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(expected, (k, chunk_query), grad)
    torch.testing.assert_close(torch.autograd.grad(out, (k, chunk_query), grad), expected, rtol=1e-4, atol=1e-5)
