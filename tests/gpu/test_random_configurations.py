"""500 random configurations of DashAttention and of block-sparse attention against float64 (``make test-gpu``).

The kernels are specialised on a few sizes and run with any others: each test draws the former once and the latter
anew for every configuration. The reference gets the kernel's own chunk summaries, and tokens whose selection differs
get no output gradient, so that what is compared is the arithmetic alone. Near the edge of the support the router's
gradient is a quotient of small numbers, on which float32 errs by more than 16-bit inputs do elsewhere: the bound is
the tolerance of the type, or a small multiple of what the reference itself errs by in float32.
"""

import random

import pytest
import torch

pytest.importorskip("triton")

from dashattn.ops.block_sparse import reference as attention_reference
from dashattn.ops.block_sparse import triton as attention
from dashattn.ops.chunk_summary import reference as summary_reference
from dashattn.ops.chunk_summary import triton as summary
from dashattn.ops.dash_routing import reference as routing_reference
from dashattn.ops.dash_routing import triton as routing
from dashattn.selection import Selection

SPECIALISATIONS = 50
DRAWS = 10  # of each
TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 2e-5}
OVER_FLOAT32 = 5.0
# Rows whose selection differs: only where a float32-sized change of the scores could flip them.
SELECTED_ROWS = 0.005


def relative_error(x, truth):
    return ((x.double() - truth).norm() / truth.norm().clamp_min(1e-12)).item()


def draw_specialisation(rng):
    head_dim = rng.choice([32, 64, 64, 96, 128, 128, 256])
    dtype = rng.choice([torch.bfloat16, torch.bfloat16, torch.float16, torch.float32])
    chunk = rng.choice([16, 32, 64, 64, 128])
    if dtype == torch.float32 and head_dim > 128:
        chunk = min(chunk, 64)
    group = rng.choice([1, 2, 3, 4, 7, 8, 16, 32])
    prior = rng.choice(["raw", "tempered", "tempered", "none"])
    return head_dim, dtype, chunk, group, prior, rng.choice([True, False])


def draw_sequences(rng, chunk):
    """(batch, length, cu_seqlens): one or several rows, or packed documents, some of them empty or tiny."""
    length = rng.choice([1, rng.randint(1, chunk), rng.randint(chunk, 4 * chunk), rng.randint(1, 900)])
    if rng.random() < 0.6:
        return rng.choice([1, 1, 2]), length, None
    cuts = sorted(rng.randint(0, length) for _ in range(rng.randint(0, 4)))
    return 1, length, torch.tensor([0, *cuts, length], dtype=torch.int32, device="cuda")


def gaussian(generator, *size, dtype=torch.float32):
    return torch.randn(*size, generator=generator, device="cuda").to(dtype)


def gradients(out, inputs, grad):
    grads = torch.autograd.grad(out, inputs, grad.to(out.dtype), allow_unused=True)
    return [out.detach(), *(torch.zeros_like(x) if g is None else g for g, x in zip(grads, inputs, strict=True))]


def check(results, truth, rounded, dtype, names, configuration):
    """``results`` of the kernels, ``truth`` in float64, ``rounded``: what float32 makes of it."""
    for name, result, wanted, float32 in zip(names, results, truth, rounded, strict=True):
        assert torch.isfinite(result).all(), (name, configuration)
        if wanted.norm() < 1e-9 * max(1, wanted.numel()) ** 0.5:  # a gradient that is nothing but rounding
            assert result.double().norm() <= 1e-2 * max(1, result.numel()) ** 0.5, (name, configuration)
            continue
        error = relative_error(result, wanted)
        allowed = max(TOLERANCE[dtype], OVER_FLOAT32 * relative_error(float32, wanted))
        assert error <= allowed, f"{name} off by {error:.2g}, allowed {allowed:.2g}: {configuration}"


@pytest.mark.parametrize("seed", range(SPECIALISATIONS))
def test_dash_attention(seed):
    rng = random.Random(seed)
    fixed = draw_specialisation(rng)
    counts = [check_dash_attention(rng, *fixed, seed=1000 * seed + draw) for draw in range(DRAWS // 2)]
    differing, rows = map(sum, zip(*counts, strict=True))
    assert differing <= max(2, SELECTED_ROWS * rows), f"{differing} of {rows} rows selected otherwise"


def check_dash_attention(rng, head_dim, dtype, chunk, group, prior, any_alpha, seed):
    """Compares one configuration; returns how many rows were selected otherwise, and how many there are."""
    generator = torch.Generator("cuda").manual_seed(seed)
    batch, length, cu_seqlens = draw_sequences(rng, chunk)
    kv_heads = rng.choice([1, 2, 3])
    options = dict(chunk_size=chunk, router_scale=10 ** rng.uniform(-2, 2.3), prior=prior, cu_seqlens=cu_seqlens)
    options["sigma"] = rng.choice([1.0, 100.0, 1e6])
    alpha = rng.uniform(1.01, 2.0) if any_alpha else 1.5
    configuration = (seed, head_dim, dtype, group, batch, length, kv_heads, alpha, options)
    q, grad = (gaussian(generator, batch, length, group * kv_heads, head_dim, dtype=dtype) for _ in range(2))
    k, v = (gaussian(generator, batch, length, kv_heads, head_dim, dtype=dtype) for _ in range(2))
    tensors = [q, k, v, 0.3 * gaussian(generator, kv_heads, head_dim)]
    if any_alpha:
        tensors.append(torch.full((group * kv_heads,), alpha, device="cuda"))
    summaries = summary.chunk_summary(k, tensors[3], chunk_size=chunk, cu_seqlens=cu_seqlens)

    def reference(kind):
        inputs = [x.to(kind).requires_grad_() for x in tensors]
        s = summary_reference.chunk_summary(inputs[1], inputs[3], chunk_size=chunk, cu_seqlens=cu_seqlens)
        s = s + (summaries.to(kind) - s).detach()
        selection, bias = routing_reference.dash_routing(
            inputs[0], s, alpha=inputs[4] if any_alpha else alpha, **options
        )
        out = attention_reference.block_sparse_attention(*inputs[:3], selection, bias, cu_seqlens=cu_seqlens)
        return inputs, selection.words, out

    def kernels():
        inputs = [x.detach().requires_grad_() for x in tensors]
        s = summary.chunk_summary(inputs[1], inputs[3], chunk_size=chunk, cu_seqlens=cu_seqlens)
        out, selection = routing.routed_attention(*inputs[:3], s, alpha=inputs[4] if any_alpha else alpha, **options)
        return inputs, selection.words, out

    runs = [kernels(), reference(torch.float64), reference(torch.float32)]
    width = runs[1][1].shape[-1]
    chosen, exact, rounded = (words[..., :width] for _, words, _ in runs)
    assert not runs[0][1][..., width:].any(), configuration
    differ = (chosen != exact).any(-1)
    kept = ~(differ | (rounded != exact).any(-1)).any(1)[..., None, None]
    results, truth, rounded = (gradients(out * kept, inputs, grad * kept) for inputs, _, out in runs)
    check(results, truth, rounded, dtype, ("out", "q", "k", "v", "chunk_query", "alpha")[: len(results)], configuration)
    return differ.sum().item(), differ.numel()


@pytest.mark.parametrize("seed", range(SPECIALISATIONS))
def test_block_sparse_attention(seed):
    rng = random.Random(seed)
    fixed = draw_specialisation(rng)
    for draw in range(DRAWS - DRAWS // 2):
        check_block_sparse_attention(rng, *fixed, seed=1000 * seed + draw)


def check_block_sparse_attention(rng, head_dim, dtype, block, group, prior, per_head, seed):
    generator = torch.Generator("cuda").manual_seed(seed)
    batch, length, cu_seqlens = draw_sequences(rng, block)
    kv_heads = rng.choice([1, 2, 3])
    density = rng.choice([0.0, 0.02, 0.3, 1.0])
    configuration = (seed, head_dim, dtype, block, group, batch, length, kv_heads, density, cu_seqlens)
    q, grad = (gaussian(generator, batch, length, group * kv_heads, head_dim, dtype=dtype) for _ in range(2))
    k, v = (gaussian(generator, batch, length, kv_heads, head_dim, dtype=dtype) for _ in range(2))
    num_blocks = -(-length // block)
    mask = torch.rand(batch, length, kv_heads, num_blocks, generator=generator, device="cuda") < density
    selection = Selection.from_mask(mask, block)
    bias = []
    if prior != "none":
        bias = [gaussian(generator, batch, length, kv_heads * (group if per_head else 1), num_blocks)]

    def attend(function, kind):
        inputs = [x.to(kind).requires_grad_() for x in (q, k, v)]
        inputs += [b.to(torch.promote_types(kind, torch.float32)).requires_grad_() for b in bias]
        out = function.block_sparse_attention(*inputs[:3], selection, *inputs[3:], cu_seqlens=cu_seqlens)
        return gradients(out, inputs, grad)

    truth, rounded = (attend(attention_reference, kind) for kind in (torch.float64, torch.float32))
    results = attend(attention, dtype)
    if bias:
        # The output's rounding enters the bias gradient through delta = do . o, also where the gradient itself is 0
        # because all keys are in one block.
        size = truth[-1].norm() + 0.1 * (truth[0].norm(dim=-1) * grad.double().norm(dim=-1)).norm()
        error = (results[-1].double() - truth[-1]).norm() / size.clamp_min(1e-12)
        assert error <= 3 * TOLERANCE[dtype], f"bias off by {error:.2g}: {configuration}"
    check(results[:4], truth[:4], rounded[:4], dtype, ("out", "q", "k", "v"), configuration)
