"""Random configurations of DashAttention, block-sparse attention and NSA against float64 (``make test-gpu``).

The kernels are specialised on a few sizes and run with any others: each test draws the former once and the latter
anew for every configuration. The reference gets the kernel's own chunk summaries, and tokens whose selection differs
get no output gradient, so that what is compared is the arithmetic alone. Near the edge of the support the router's
gradient is a quotient of small numbers, on which float32 errs by more than 16-bit inputs do elsewhere: the bound is
the tolerance of the type, or a small multiple of what changes of the queries make of the reference that move scores as
much as adding up their products in float32 does; for DashAttention with changes of delta = do . o alike.

The backward gets delta = do . o from the output as it was rounded. Where a sharp softmax leaves a small gradient, that
error is a large part of it: DashAttention's gradients are compared with those for the kernel's own output, those of the
other methods to within the tolerance of the gradient and a tenth of what delta can add.

Memory that PyTorch hands out holds NaN (tests/conftest.py): what a kernel reads and none wrote shows.
"""

import random
from functools import partial

import pytest
import torch

pytest.importorskip("triton")

from dashattn import nsa_attention
from dashattn.documents import per_document
from dashattn.ops.band import triton as band
from dashattn.ops.block_scores.reference import topk_selection
from dashattn.ops.block_scores.triton import select_blocks
from dashattn.ops.block_sparse import reference as attention_reference
from dashattn.ops.block_sparse import triton as attention
from dashattn.ops.chunk_summary import reference as summary_reference
from dashattn.ops.chunk_summary import triton as summary
from dashattn.ops.compression.reference import compressed_attention, mean_compress
from dashattn.ops.dash_attention.triton import dash_attention
from dashattn.ops.dash_routing import reference as routing_reference
from dashattn.ops.gates.reference import gated_sum
from dashattn.ops.window.reference import window_attention
from dashattn.selection import Selection

SPECIALISATIONS = 50
DRAWS = 10  # of each
# float16 rounds dq twice, after attention and after the router, to 2 ** -11 each.
TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 2e-3, torch.float32: 2e-5}
OVER_FLOAT32 = 5.0
PERTURBATIONS = 3
# Rows whose selection differs: only where a float32-sized change of the scores could flip them.
SELECTED_ROWS = 0.005


@pytest.fixture(autouse=True)
def _memory_is_poisoned():
    like = torch.zeros(1, device="cuda")
    assert all(x.isnan() for x in (torch.empty(1, device="cuda"), torch.empty_like(like), like.new_empty(1)))


def relative_error(x, truth):
    return ((x.double() - truth).norm() / truth.norm().clamp_min(1e-12)).item()


def draw_specialisation(rng):
    head_dim = rng.choice([32, 64, 64, 96, 128, 128, 160, 256])
    dtype = rng.choice([torch.bfloat16, torch.bfloat16, torch.float16, torch.float32])
    chunk = rng.choice([16, 32, 64, 64, 128])
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


def gradients(outs, inputs, grads):
    """The first output, and the gradient of each input."""
    grads = [grad.to(out.dtype) for out, grad in zip(outs, grads, strict=True)]
    grads = torch.autograd.grad(outs, inputs, grads, allow_unused=True)
    return [outs[0].detach(), *(torch.zeros_like(x) if g is None else g for g, x in zip(grads, inputs, strict=True))]


def log_normaliser(q, k, selection, bias, cu_seqlens):
    """Logarithm of what each row's softmax divides by, [B, T, Hq]. Its gradient by the logits are the probabilities."""
    kv_heads = k.shape[2]
    tokens = partial(attention_reference.blocks_to_tokens, block_size=selection.block_size)

    def rows(q, k, mask, bias):
        length = q.shape[1]
        logits = torch.einsum("bthgd,bshd->bthgs", q.unflatten(2, (kv_heads, -1)) * q.shape[-1] ** -0.5, k)
        if bias is not None:
            logits = logits + tokens(bias.unflatten(2, (kv_heads, -1)), length=length)
        past = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
        allowed = tokens(mask, length=length)[:, :, :, None] & past[:, None, None]
        return logits.masked_fill(~allowed, torch.finfo(q.dtype).min).logsumexp(-1).flatten(2)

    return torch.cat(per_document(rows, cu_seqlens, q, k, selection.mask(), bias), dim=1)


def roundings(terms):
    """What roundings to 24 bits on the way make of a sum, in norms of its terms: they add up to sqrt(terms / 2) times
    the one of an error of 2 ** -24 in each."""
    return 2**-24 * (terms / 2) ** 0.5


def perturbed(q, generator):
    """q in float32 with an error that moves a product with a key as float32 does."""
    q = q.float()
    return q * (1 + roundings(q.shape[-1]) * gaussian(generator, *q.shape))


def check(results, truth, rounded, dtype, names, configuration, tolerance=1.0, added=None):
    """``results`` of the kernels, ``truth`` in float64, ``rounded``: what float32 makes of it, several times.

    ``tolerance``: in tolerances of the type. ``added``: for some names an error that is allowed besides.
    """
    for name, result, wanted, *float32 in zip(names, results, truth, *rounded, strict=True):
        assert torch.isfinite(result).all(), (name, configuration)
        if wanted.norm() < 1e-9 * max(1, wanted.numel()) ** 0.5:  # a gradient that is nothing but rounding
            assert result.double().norm() <= 1e-2 * max(1, result.numel()) ** 0.5, (name, configuration)
            continue
        relative = max(tolerance * TOLERANCE[dtype], *(OVER_FLOAT32 * relative_error(x, wanted) for x in float32))
        allowed = relative + (added.get(name, 0.0) / wanted.norm()).item() if added else relative
        error = relative_error(result, wanted)
        assert error <= allowed, f"{name} off by {error:.2g}, allowed {allowed:.2g}: {configuration}"


def from_delta(share, out, grad, q, k, scale):
    """What an error of ``share`` of delta = do . o adds to the gradients of q and k."""
    delta = share * (out.norm(dim=-1) * grad.double().norm(dim=-1)).norm() * scale
    return {"q": delta * k.double().norm(dim=-1).mean(), "k": delta * q.double().norm(dim=-1).mean()}


def compare_selections(words, configuration):
    """``words`` of the kernels, of the reference and of its perturbations.

    Returns the rows [B, H, T] that the kernels selected otherwise, and the tokens [B, T, 1, 1] that all selected alike.
    """
    kernels, exact, *rounded = words
    width = exact.shape[-1]
    assert not kernels[..., width:].any(), configuration
    differ = (kernels[..., :width] != exact).any(-1)
    unclear = torch.stack([(x != exact).any(-1) for x in rounded]).any(0)
    return differ, ~(differ | unclear).any(1)[..., None, None]


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
    # Without the loss scaling of training float16 has no numbers for a gradient divided by a million.
    options["sigma"] = rng.choice([1.0, 100.0, 100.0 if dtype == torch.float16 else 1e6])
    options |= {name: rng.choice([0, 0, 1, rng.randint(2, 9)]) for name in ("init_chunks", "local_chunks")}
    alpha = rng.uniform(1.01, rng.choice([1.1, 2.0])) if any_alpha else 1.5
    configuration = (seed, head_dim, dtype, group, batch, length, kv_heads, alpha, options)
    q, grad = (gaussian(generator, batch, length, group * kv_heads, head_dim, dtype=dtype) for _ in range(2))
    k, v = (gaussian(generator, batch, length, kv_heads, head_dim, dtype=dtype) for _ in range(2))
    tensors = [q, k, v, 0.3 * gaussian(generator, kv_heads, head_dim)]
    if any_alpha:
        tensors.append(torch.full((group * kv_heads,), alpha, device="cuda"))
    summaries = summary.chunk_summary(k, tensors[3], chunk_size=chunk, cu_seqlens=cu_seqlens)

    def reference(queries):
        inputs = [x.to(queries.dtype).requires_grad_() for x in (queries, *tensors[1:])]
        s = summary_reference.chunk_summary(inputs[1], inputs[3], chunk_size=chunk, cu_seqlens=cu_seqlens)
        s = s + (summaries.to(queries.dtype) - s).detach()
        selection, bias = routing_reference.dash_routing(
            inputs[0], s, alpha=inputs[4] if any_alpha else alpha, **options
        )
        out = attention_reference.block_sparse_attention(*inputs[:3], selection, bias, cu_seqlens=cu_seqlens)
        return inputs, selection.words, out, log_normaliser(*inputs[:2], selection, bias, cu_seqlens)

    def kernels():
        inputs = [x.detach().requires_grad_() for x in tensors]
        out, selection = dash_attention(*inputs[:4], alpha=inputs[4] if any_alpha else alpha, **options)
        return inputs, selection.words, out

    runs = [kernels(), *(reference(x) for x in (q.double(), *(perturbed(q, generator) for _ in range(PERTURBATIONS))))]
    differ, kept = compare_selections([words for _, words, *_ in runs], configuration)
    grad = grad * kept
    inputs, _, out = runs[0]
    results = gradients([out * kept], inputs, [grad])
    delta_error = (grad.double() * (runs[1][2] - out).detach()).sum(-1)
    # The sum of p (do . v) over a chunk and its part of delta nearly cancel: each is rounded by itself.
    noise = roundings(head_dim) * (grad.double() * out.detach()).norm(dim=-1)
    errors = [delta_error, *(delta_error + noise * gaussian(generator, *noise.shape) for _ in range(PERTURBATIONS))]
    truth, *rounded = (
        gradients([out * kept, lse], inputs, [grad, error])
        for (inputs, _, out, lse), error in zip(runs[1:], errors, strict=True)
    )
    names = ("out", "q", "k", "v", "chunk_query", "alpha")[: len(results)]
    check(results, truth, rounded, dtype, names, configuration)
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

    def attend(function, queries):
        inputs = [x.to(queries.dtype).requires_grad_() for x in (queries, k, v)]
        inputs += [b.to(torch.promote_types(queries.dtype, torch.float32)).requires_grad_() for b in bias]
        out = function.block_sparse_attention(*inputs[:3], selection, *inputs[3:], cu_seqlens=cu_seqlens)
        return gradients([out], inputs, [grad])

    truth, rounded = (attend(attention_reference, queries) for queries in (q.double(), q.float()))
    results = attend(attention, q)
    if bias:
        # The output's rounding enters the bias gradient through delta = do . o, also where the gradient itself is 0
        # because all keys are in one block.
        size = truth[-1].norm() + 0.1 * (truth[0].norm(dim=-1) * grad.double().norm(dim=-1)).norm()
        error = (results[-1].double() - truth[-1]).norm() / size.clamp_min(1e-12)
        assert error <= 3 * TOLERANCE[dtype], f"bias off by {error:.2g}: {configuration}"
    check(results[:4], truth[:4], [rounded[:4]], dtype, ("out", "q", "k", "v"), configuration)


@pytest.mark.parametrize("seed", range(SPECIALISATIONS // 2))
def test_topk_methods(seed):
    rng = random.Random(seed)
    head_dim, dtype, block, group, _, _ = draw_specialisation(rng)
    stride = rng.choice([s for s in (4, 8, 16, 32) if s <= block <= 32 * s])
    windows = {"kernel_size": stride * rng.randint(1, min(4, block // stride + 1)), "kernel_stride": stride}
    pooling = rng.choice(["max", "weighted"])
    counts = [
        check_topk_method(rng, head_dim, dtype, block, group, windows, pooling, seed=1000 * seed + draw)
        for draw in range(DRAWS // 2)
    ]
    differing, rows = map(sum, zip(*counts, strict=True))
    assert differing <= max(2, SELECTED_ROWS * rows), f"{differing} of {rows} rows selected otherwise"


def check_topk_method(rng, head_dim, dtype, block, group, windows, pooling, seed):
    """NSA, whose parts are InfLLM v2's too; returns how many rows were selected otherwise, and how many there are."""
    generator = torch.Generator("cuda").manual_seed(seed)
    batch, length, cu_seqlens = draw_sequences(rng, block)
    kv_heads = rng.choice([1, 2, 3])
    forced = {"init_blocks": rng.randint(0, 2), "local_blocks": rng.randint(1, 3)}
    blocks = {"pooling": pooling, "block_size": block, "topk": sum(forced.values()) + rng.randint(0, 9)} | forced
    window_size = rng.choice([0, 1, rng.randint(1, 600)])
    scale = {"scale": head_dim**-0.5 * 10 ** rng.uniform(-1, 1), "cu_seqlens": cu_seqlens}
    configuration = (seed, head_dim, dtype, group, batch, length, kv_heads, windows, blocks, window_size, scale)
    q, grad = (gaussian(generator, batch, length, group * kv_heads, head_dim, dtype=dtype) for _ in range(2))
    k, v = (gaussian(generator, batch, length, kv_heads, head_dim, dtype=dtype) for _ in range(2))
    compressed = [mean_compress(x, **windows, cu_seqlens=cu_seqlens) for x in (k, v)]
    gates = gaussian(generator, *q.shape[:3], 3 if window_size else 2).sigmoid().to(dtype)
    tensors = [q, k, v, *compressed, gates]

    def reference(queries):
        inputs = [x.to(queries.dtype).requires_grad_() for x in (queries, *tensors[1:])]
        select = partial(topk_selection, **windows, **blocks)
        out, selections = compressed_attention(inputs[0], *inputs[3:5], select, **windows, **scale)
        selection = Selection.concatenate(selections)
        branches = [out, attention_reference.block_sparse_attention(*inputs[:3], selection, **scale)]
        if window_size:
            branches.append(window_attention(*inputs[:3], window_size=window_size, **scale))
        return inputs, selection.words, gated_sum(inputs[5], branches), out

    def kernels():
        inputs = [x.detach().requires_grad_() for x in tensors]
        _, lse = band.compressed_attention(q, *compressed, **windows, **scale)
        words = select_blocks(q, compressed[0], lse, **windows, **blocks, **scale).words
        return (
            inputs,
            words,
            nsa_attention(*inputs, **windows, **blocks, window_size=window_size, impl="triton", **scale),
            None,
        )

    runs = [kernels(), *(reference(x) for x in (q.double(), *(perturbed(q, generator) for _ in range(PERTURBATIONS))))]
    differ, kept = compare_selections([words for _, words, *_ in runs], configuration)
    results, truth, *rounded = (gradients([out * kept], inputs, [grad * kept]) for inputs, _, out, _ in runs)
    names = ("out", "q", "k", "v", "compressed_k", "compressed_v", "gates")
    added = from_delta(0.15 * TOLERANCE[dtype], truth[0], grad, q, k, scale["scale"])
    # The compressed branch has a delta of its own, a sum over dimensions of products with a rounded output. With few
    # windows the gradient of their keys is a small difference beside it.
    share, out = 0.5 * TOLERANCE[dtype] * head_dim**-0.5, runs[1][-1].detach()
    added["compressed_k"] = from_delta(share, out, grad * gates[..., :1], q, compressed[0], scale["scale"])["k"]
    # The branches get a gradient that was rounded a second time, when the gates multiplied it.
    check(results, truth, rounded, dtype, names, configuration, tolerance=1.5, added=added)
    return differ.sum().item(), differ.numel()
