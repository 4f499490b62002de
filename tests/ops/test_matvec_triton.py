"""The products of a single token against the reference, in Triton's interpreter where there is no GPU."""

import pytest
import torch

pytest.importorskip("triton")

from dashattn.ops.matvec import reference, triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP32, BF16 = torch.float32, torch.bfloat16
TOLERANCE = {FP32: 1e-5, BF16: 8e-3}


def exact(x):
    """In float64: a tensor, several, or what is none."""
    if isinstance(x, tuple | list):
        return type(x)(map(exact, x))
    return x.double() if isinstance(x, torch.Tensor) else x


def make(*size, dtype=FP32):
    return torch.randn(size, device=DEVICE).to(dtype)


def check(name, dtype, x, *arguments):
    """Against float64, where nothing is rounded on the way."""
    found, expected = getattr(triton, name)(x, *arguments), getattr(reference, name)(*exact((x, *arguments)))
    for ours, wanted in zip(*((y if isinstance(y, tuple) else (y,)) for y in (found, expected)), strict=True):
        assert (ours.shape, ours.dtype) == (wanted.shape, dtype)
        assert (ours.double() - wanted).norm() / wanted.norm() < TOLERANCE[dtype]


@pytest.fixture(params=[(FP32, 96, 2**10), (BF16, 128, 2**10), (BF16, 40, 2**8)], ids=str)
def sizes(request, monkeypatch):
    """A type, inputs, and weights of a program: rows that fill programs or do not, columns that are masked or not."""
    monkeypatch.setattr(triton, "TILE", request.param[2])
    return request.param[:2]


def norm_of(columns, dtype):
    return make(columns, dtype=dtype) + 1, 1e-3


@pytest.mark.parametrize("has_norm", [True, False])
@pytest.mark.parametrize("turns", [True, False])
def test_heads(sizes, turns, has_norm):
    dtype, columns = sizes
    weights = [make(count * 16, columns, dtype=dtype) for count in (6, 3, 3)]
    rope = (make(1, 1, 16), make(1, 1, 16)) if turns else None  # what the two halves turn by differs
    norm = norm_of(columns, dtype) if has_norm else None
    check("heads", dtype, make(1, 1, columns, dtype=dtype), weights, 16, norm, rope)


@pytest.mark.parametrize("has_norm", [True, False])
def test_swiglu(sizes, has_norm):
    dtype, columns = sizes
    gate, up = (make(50, columns, dtype=dtype) / columns**0.5 for _ in range(2))
    check("swiglu", dtype, make(1, 1, columns, dtype=dtype), gate, up, norm_of(columns, dtype) if has_norm else None)


@pytest.mark.parametrize("has_norm", [True, False])
@pytest.mark.parametrize("adds", [True, False])
def test_product(sizes, adds, has_norm):
    dtype, columns = sizes
    norm, onto = norm_of(columns, dtype) if has_norm else None, make(1, 1, 50, dtype=dtype) if adds else None
    check("product", dtype, make(1, 1, columns, dtype=dtype), make(50, columns, dtype=dtype), norm, onto, 0.3)
