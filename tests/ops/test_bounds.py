"""No kernel reads or writes outside its tensors, whatever numbers it gets: alphas that nobody checked, NaN, infinity.

In Triton's interpreter every address that a mask lets through is looked up in the memory of the launch's tensors.
"""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from triton.runtime import interpreter

from dashattn import infllmv2_attention, nsa_attention
from dashattn.ops.block_sparse.triton import block_sparse_attention
from dashattn.ops.chunk_summary.triton import chunk_summary
from dashattn.ops.compression.reference import mean_compress
from dashattn.ops.dash_attention.triton import dash_attention
from dashattn.ops.dash_routing.triton import dash_routing
from dashattn.ops.decode import triton as decode
from dashattn.selection import Selection

if torch.cuda.is_available():
    pytest.skip("runs in Triton's interpreter", allow_module_level=True)

# Of what is computed with NaN and infinity NumPy warns, on whose arrays the interpreter computes.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

CHUNK = 16
WINDOWS = dict(kernel_size=8, kernel_stride=4)
BLOCKS = dict(block_size=CHUNK, topk=3, init_blocks=1)


@pytest.fixture(autouse=True)
def _checked_addresses(monkeypatch):
    memory = []

    def tensors(args):
        for arg in args:
            arg = getattr(arg, "base", arg)  # of a descriptor
            if isinstance(arg, torch.Tensor):
                yield arg.untyped_storage()

    def launch(self, *args, **kwargs):
        memory[:] = {(x.data_ptr(), x.data_ptr() + x.nbytes()) for x in tensors((*args, *kwargs.values()))}
        run(self, *args, **kwargs)

    def checked(access, pointers_at, mask_at):
        def check(self, *args, **kwargs):
            pointers, mask = args[pointers_at], args[mask_at]
            first, mask = np.broadcast_arrays(pointers.data, mask.data)
            first = first[mask.astype(bool)].astype(np.int64)
            end = first + max(1, pointers.get_element_ty().primitive_bitwidth // 8)
            inside = np.zeros(first.shape, dtype=bool)
            for low, high in memory:
                inside |= (first >= low) & (end <= high)
            assert inside.all(), f"{access.__name__} outside the tensors of the launch"
            return access(self, *args, **kwargs)

        return check

    run = interpreter.GridExecutor.__call__
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)
    builder = interpreter.InterpreterBuilder
    for name, *places in (("create_masked_load", 0, 1), ("create_masked_store", 0, 2), ("create_atomic_rmw", 1, 3)):
        monkeypatch.setattr(builder, name, checked(getattr(builder, name), *places))


def odd_numbers(*shape):
    """Gaussian, but for a NaN and infinities in some of the rows."""
    x = torch.randn(shape)
    rows = x.flatten(0, -2)
    for row, value in ((1, torch.nan), (len(rows) // 2, torch.inf), (len(rows) - 1, -torch.inf)):
        rows[row % len(rows), row % shape[-1]] = value
    return x


def half_numbers(*shape):
    """Of 16 bits: more chunks are taken at a time than a word has."""
    return odd_numbers(*shape).half()


def backward(out, *inputs):
    torch.autograd.grad(out, [x for x in inputs if x.requires_grad], odd_numbers(*out.shape).to(out.dtype))


ALPHAS = [None, 0.5, 0.9, 1.0, 1.7, torch.nan, torch.inf]


@pytest.mark.parametrize(
    ("alpha", "numbers"), [(0.9, torch.randn), (None, half_numbers), *((alpha, odd_numbers) for alpha in ALPHAS)]
)
def test_dash_attention(alpha, numbers):
    length = 70  # five chunks, of which words and tiles have room for many more
    q, k, v = (numbers(1, length, heads, 16) for heads in (2, 1, 1))
    chunk_query = numbers(1, 16)
    inputs = [x.requires_grad_() for x in (q, k, v, chunk_query)]
    alpha = 1.5 if alpha is None else torch.full((2,), alpha, requires_grad=True)
    options = dict(chunk_size=CHUNK, router_scale=3.0, prior="raw", alpha=alpha)
    out, _ = dash_attention(*inputs, **options)
    backward(out, *inputs)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_priors(alpha):
    q, summaries = odd_numbers(1, 90, 2, 16), odd_numbers(1, 5, 1, 16)
    inputs = [q.requires_grad_(), summaries.requires_grad_()]
    alpha = 1.5 if alpha is None else torch.full((2,), alpha)
    _, bias = dash_routing(*inputs, chunk_size=CHUNK, prior="tempered", sigma=1.0, alpha=alpha)
    backward(bias, *inputs)


@pytest.mark.parametrize("selector", [{"selector": "topk", "topk": 3}, {"selector": "topp", "top_p": 0.6}], ids=str)
def test_selectors_by_a_softmax(selector):
    q, k, v = (odd_numbers(1, 70, heads, 16).requires_grad_() for heads in (2, 1, 1))
    out, _ = dash_attention(q, k, v, odd_numbers(1, 16), chunk_size=CHUNK, sigma=1.0, init_chunks=1, **selector)
    backward(out, q, k, v)
    lengths = torch.tensor([69], dtype=torch.int32)
    caches = [odd_numbers(1, length, 1, 16) for length in (66 * CHUNK, 66 * CHUNK, 66)]  # words of no power of two
    options = dict(chunk_size=CHUNK, router_scale=3.0, prior="tempered", sigma=1.0, **selector)
    decode.routed_attention(odd_numbers(1, 1, 2, 16), *caches, lengths, **options)


def test_other_methods():
    q, k, v = (odd_numbers(1, 90, heads, 16).requires_grad_() for heads in (2, 1, 1))
    backward(infllmv2_attention(q, k, v, **BLOCKS, **WINDOWS, window_size=CHUNK, impl="triton"), q, k, v)
    compressed = [mean_compress(x, **WINDOWS).detach().requires_grad_() for x in (k, v)]
    gates = odd_numbers(1, 90, 2, 3).requires_grad_()
    sizes = dict(**BLOCKS, **WINDOWS, local_blocks=1, window_size=20)
    backward(nsa_attention(q, k, v, *compressed, gates, **sizes, impl="triton"), q, k, v, *compressed, gates)
    every_bit = Selection(torch.full((1, 1, 90, 1), -1, dtype=torch.int32), CHUNK)
    bias = odd_numbers(1, 90, 2, 6).requires_grad_()
    backward(block_sparse_attention(q, k, v, every_bit, bias), q, k, v, bias)
    backward(chunk_summary(k, odd_numbers(1, 16), chunk_size=CHUNK), k)


@pytest.mark.parametrize(("alpha", "num_tokens"), [(0.5, 2), *((alpha, 1) for alpha in ALPHAS)])
def test_decoding(alpha, num_tokens):
    capacity = 5 * CHUNK
    k, v = odd_numbers(1, capacity, 1, 16), odd_numbers(1, capacity, 1, 16)
    summaries = odd_numbers(1, 5, 1, 16)
    lengths = torch.tensor([capacity - num_tokens], dtype=torch.int32)
    alpha = 1.5 if alpha is None else torch.full((2,), alpha)
    options = dict(chunk_size=CHUNK, alpha=alpha, router_scale=3.0, prior="raw", sigma=1.0)
    q = odd_numbers(1, num_tokens, 2, 16)
    new = decode.NewToken(k[:, :1], v[:, :1], k, v, odd_numbers(1, 16)) if num_tokens == 1 else None
    decode.routed_attention(q, k, v, summaries, lengths, **options, new=new)
    every_bit = Selection(torch.full((1, 1, num_tokens, 1), -1, dtype=torch.int32), CHUNK)
    decode.cached_attention(q, k, v, lengths, every_bit)
    compressed = [odd_numbers(1, capacity // 4, 1, 16) for _ in range(2)]
    decode.cached_window_routing(q, *compressed, lengths, **BLOCKS, **WINDOWS, local_blocks=1, pooling="max")
