"""Triton and Gluon kernels at real sizes and types against the references (relative RMS error, float32 reference)."""

from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from dashattn import infllmv2_attention, nsa_attention
from dashattn.backends import AttentionShape, NSAConfig, build_backend
from dashattn.ops.band import triton as band
from dashattn.ops.block_scores.reference import topk_selection
from dashattn.ops.block_scores.triton import select_blocks
from dashattn.ops.block_sparse import reference as attention_reference
from dashattn.ops.block_sparse import triton as attention
from dashattn.ops.chunk_summary import reference as summary_reference
from dashattn.ops.compression.reference import compressed_attention, mean_compress, num_windows
from dashattn.ops.dash_attention import triton as whole
from dashattn.ops.dash_routing import reference as routing_reference
from dashattn.ops.gates.reference import gated_sum
from dashattn.ops.window.reference import window_attention
from dashattn.selection import Selection

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Of the float32 reference; the kernels round probabilities to the inputs' type before the second product.
TOLERANCE = {BF16: 5e-3, FP16: 1e-3, FP32: 1e-5}


def relative_error(x, expected):
    return ((x.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-20)).item()


def random(*shape, dtype=FP32):
    return torch.randn(*shape, device="cuda").to(dtype)


@contextmanager
def deterministic(enabled=True):
    """Where sums need no fixed order, other kernels may run."""
    torch.use_deterministic_algorithms(enabled)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def packed(*ends):
    return torch.tensor([0, *ends], dtype=torch.int32, device="cuda")


@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8, 16, 32])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_group_sizes(group, dtype):
    check_attention(1, 700, group, 1, 128, 64, "kv", dtype)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("group", [1, 2, 3, 5, 7, 8])
def test_gradients_by_key_and_by_query(group, head_dim):
    bias_heads = (None, "kv", "query")[group % 3]
    check_attention(1, 700, group, 2, head_dim, 64 * (1 + group % 2), bias_heads, BF16, packed(3, 3, 130, 700))


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_head_and_block_sizes(head_dim, block_size):
    check_attention(2, 333, 4, 2, head_dim, block_size, None, BF16)


@pytest.mark.parametrize(("head_dim", "block_size"), [(64, 64), (128, 64), (256, 64), (160, 128), (256, 128)])
def test_float32(head_dim, block_size):
    check_attention(1, 5 * block_size, 4, 2, head_dim, block_size, "kv", FP32)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 129, 4099])
def test_lengths(length):
    check_attention(1, length, 16, 2, 128, 64, None, BF16)


def test_packed_documents():
    check_attention(1, 900, 16, 2, 128, 64, "query", BF16, packed(100, 100, 131, 700, 900))


def check_attention(batch, length, group, kv_heads, head_dim, block_size, bias_heads, dtype, cu_seqlens=None):
    q, grad = (random(batch, length, group * kv_heads, head_dim, dtype=dtype) for _ in range(2))
    k, v = (random(batch, length, kv_heads, head_dim, dtype=dtype) for _ in range(2))
    num_blocks = -(-length // block_size)
    selection = Selection.from_mask(torch.rand(batch, length, kv_heads, num_blocks, device="cuda") < 0.3, block_size)
    bias = []
    if bias_heads is not None:
        bias = [random(batch, length, kv_heads * (group if bias_heads == "query" else 1), num_blocks)]
    results = []
    for function, kind, fixed_order in (
        (attention_reference, FP32, False),
        (attention, dtype, True),
        (attention, dtype, False),
    ):
        inputs = [x.to(kind).requires_grad_() for x in (q, k, v)] + [b.clone().requires_grad_() for b in bias]
        with deterministic(fixed_order):
            out = function.block_sparse_attention(*inputs[:3], selection, *inputs[3:], cu_seqlens=cu_seqlens)
            results.append([out.detach(), *torch.autograd.grad(out, inputs, grad.to(kind))])
    expected, *others = results
    for result in others:
        errors = list(map(relative_error, result, expected))
        # a bias gradient is a difference of sums over a whole block: its error is that of dp, its size often less, and
        # in groups of one no sum over heads evens it out
        allowed = [TOLERANCE[dtype]] * 4 + [TOLERANCE[dtype] * 4] * len(bias)
        assert all(error < most for error, most in zip(errors, allowed, strict=True)), errors


@pytest.mark.parametrize(
    ("group", "alpha", "router_scale", "prior", "sigma", "cu_seqlens", "forced"),
    [
        (16, 1.5, 1.0, "raw", 1.0, None, (0, 0)),
        (16, 1.5, 1.0, "tempered", 1e6, None, (0, 0)),
        (7, 1.3, 2.0, "raw", 1.0, None, (0, 0)),
        (3, 2.0, 2.0, "none", 1.0, None, (0, 0)),
        (4, 1.5, 1.0, "raw", 1.0, (100, 100, 131, 700, 1500), (0, 0)),
        (16, 1.5, 1.0, "raw", 1.0, None, (1, 0)),
        (3, 1.5, 1.0, "tempered", 0.5, None, (1, 4)),
        (4, 1.3, 1.0, "raw", 1.0, (100, 100, 131, 700, 1500), (1, 1)),
    ],
)
def test_dash_attention(group, alpha, router_scale, prior, sigma, cu_seqlens, forced):
    length, chunk = 1500, 64
    cu_seqlens = None if cu_seqlens is None else packed(*cu_seqlens)
    q, grad = (random(1, length, group, 128, dtype=BF16) for _ in range(2))
    k, v = (random(1, length, 1, 128, dtype=BF16) for _ in range(2))
    chunk_query = random(1, 128) * 0.2
    options = dict(chunk_size=chunk, alpha=alpha, router_scale=router_scale, prior=prior, sigma=sigma,
                   cu_seqlens=cu_seqlens, init_chunks=forced[0], local_chunks=forced[1])  # fmt: skip

    inputs = [x.float().requires_grad_() for x in (q, k, v)] + [chunk_query.clone().requires_grad_()]
    s = summary_reference.chunk_summary(inputs[1], inputs[3], chunk_size=chunk, cu_seqlens=cu_seqlens)
    s = s + (s.to(BF16).float() - s).detach()  # the definition rounds summaries to k's dtype
    selection, bias = routing_reference.dash_routing(inputs[0], s, **options)
    out = attention_reference.block_sparse_attention(*inputs[:3], selection, bias, cu_seqlens=cu_seqlens)
    wanted = inputs if prior != "none" else inputs[:3]
    expected = [out.detach(), *torch.autograd.grad(out, wanted, grad.float())]

    inputs = [x.detach().requires_grad_() for x in (q, k, v, chunk_query)]
    out, chosen = whole.dash_attention(*inputs, **options)
    wanted = inputs if prior != "none" else inputs[:3]
    results = [out.detach(), *torch.autograd.grad(out, wanted, grad)]

    width = selection.words.shape[-1]
    assert (chosen.words[..., :width] != selection.words).any(-1).float().mean() < 0.005
    for result, reference in zip(results, expected, strict=True):
        assert relative_error(result, reference) < 8e-3


@pytest.mark.parametrize(
    ("group", "selector", "router_scale", "prior", "sigma", "cu_seqlens", "forced"),
    [
        (16, {"topk": 6}, 1.0, "raw", 1.0, None, (1, 0)),
        (7, {"topk": 8}, 2.0, "tempered", 1e6, None, (0, 0)),
        (3, {"topk": 5}, 2.0, "tempered", 0.5, (100, 100, 131, 700, 1500), (1, 1)),
        (1, {"topk": 6}, 1.0, "none", 1.0, None, (1, 0)),
        (1, {"topk": 8}, 1000.0, "none", 1.0, None, (1, 0)),  # most probabilities are 0 in float32
        (7, {"topk": 12}, 1000.0, "none", 1.0, None, (1, 0)),
        (16, {"top_p": 0.5}, 1.0, "raw", 1.0, None, (1, 0)),
        (4, {"top_p": 0.3}, 2.0, "raw", 1.0, (100, 100, 131, 700, 1500), (0, 2)),
        (3, {"top_p": 0.7}, 2.0, "tempered", 0.5, None, (0, 0)),
        (2, {"top_p": 1.0}, 1.0, "raw", 1.0, None, (1, 0)),
    ],
)
def test_other_selectors(group, selector, router_scale, prior, sigma, cu_seqlens, forced):
    """Selection; output and gradients for the tokens that select alike."""
    length, chunk, name = 1500, 64, "topk" if "topk" in selector else "topp"
    cu_seqlens = None if cu_seqlens is None else packed(*cu_seqlens)
    q, grad = (random(1, length, group, 128, dtype=BF16) for _ in range(2))
    k, v = (random(1, length, 1, 128, dtype=BF16) for _ in range(2))
    chunk_query = random(1, 128) * 0.2
    options = dict(chunk_size=chunk, selector=name, **selector, router_scale=router_scale, prior=prior, sigma=sigma,
                   cu_seqlens=cu_seqlens, init_chunks=forced[0], local_chunks=forced[1])  # fmt: skip

    exact = [x.float().requires_grad_() for x in (q, k, v)] + [chunk_query.clone().requires_grad_()]
    s = summary_reference.chunk_summary(exact[1], exact[3], chunk_size=chunk, cu_seqlens=cu_seqlens)
    s = s + (s.to(BF16).float() - s).detach()  # the definition rounds summaries to k's dtype
    selection, bias = routing_reference.dash_routing(exact[0], s, **options)
    out = attention_reference.block_sparse_attention(*exact[:3], selection, bias, cu_seqlens=cu_seqlens)
    inputs = [x.detach().requires_grad_() for x in (q, k, v, chunk_query)]
    result, chosen = whole.dash_attention(*inputs, **options)

    differs = (chosen.words[..., : selection.words.shape[-1]] != selection.words).any(-1)
    assert differs.float().mean() < 0.005
    alike = ~differs.any(1)[..., None, None]
    count = len(inputs) if prior != "none" else 3
    expected = [out * alike, *torch.autograd.grad(out, exact[:count], grad.float() * alike)]
    results = [result * alike, *torch.autograd.grad(result, inputs[:count], grad * alike)]
    for ours, reference in zip(results, expected, strict=True):
        assert relative_error(ours, reference) < 8e-3


def test_a_threshold_is_the_one_of_the_token_alone():
    """Beside tokens that take more steps: the same bits."""
    from dashattn.ops.dash_routing.triton import _route_op

    q, summaries = (random(1, tokens, heads, 64, dtype=BF16) for tokens, heads in ((4096, 4), (64, 1)))
    q *= torch.logspace(-2, 2, 4096, device="cuda")[torch.randperm(4096)][:, None, None]
    among_easy = q.clone()
    among_easy[:, ::2] = 0
    for alpha in (None, torch.linspace(1.05, 2, 4, device="cuda")):
        options = alpha, None, None, None, 64, 1.0, [0, 0], "entmax"
        _, *among, _, peak, tau = *_route_op(q, summaries, *options), *_route_op(among_easy, summaries, *options)
        for x, alone in zip(among, (peak, tau), strict=True):
            assert torch.equal(x[:, 1::2], alone[:, 1::2])


@pytest.mark.parametrize("num_chunks", [256, 1024, 8192])
@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0])
def test_thresholds_are_exact_at_any_chunk_count(num_chunks, spread):
    """The sum of entmax from the kept threshold, evaluated in float64."""
    from dashattn.ops.dash_routing.triton import _route_op

    chunk, dim = 16, 64
    length = num_chunks * chunk + 1
    q = random(1, 1, 16, dim, dtype=BF16).expand(1, length, 16, dim)
    summaries = (spread * random(1, num_chunks, 1, dim) + random(1, 1, 1, dim)).to(BF16)
    _, peak, tau = _route_op(q, summaries, None, None, None, None, chunk, 1.0, [0, 0], "entmax")
    x = 0.5 * (q[0, -1].double() @ summaries[0, :, 0].double().T - peak[0, -1, :, None])
    p = (x - tau[0, -1, :, None]).clamp_min(0).square()
    assert (p.sum(-1) - 1).abs().max() < 5e-4 * max(1.0, spread * 10)  # float32 scores against float64


def test_offsets_past_two_to_the_31st():
    """Every token reads its own block alone, so that the end of a huge input can be checked by itself."""
    length, heads, dim, block = 540_672, 32, 128, 64
    assert length * heads * dim > 2**31
    q = torch.empty(1, length, heads, dim, dtype=BF16, device="cuda").normal_()
    k, v = (torch.empty(1, length, 2, dim, dtype=BF16, device="cuda").normal_() for _ in range(2))
    own = torch.arange(length, device="cuda", dtype=torch.int32) // block
    words = torch.zeros(1, 2, length, length // block // 32, dtype=torch.int32, device="cuda")
    word, bit = ((own // 32).long(), 1 << own % 32)
    words.scatter_(-1, *(x[None, None, :, None].expand(1, 2, -1, 1) for x in (word, bit)))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = attention.block_sparse_attention(*inputs, Selection(words, block))
    grads = torch.autograd.grad(out, inputs, out.detach())
    tail = slice(length - 4 * block, length)
    short = [x.detach()[:, tail].clone().requires_grad_() for x in inputs]
    mask = torch.eye(4, dtype=torch.bool, device="cuda").repeat_interleave(block, 0)[None, :, None].expand(1, -1, 2, 4)
    expected = attention.block_sparse_attention(*short, Selection.from_mask(mask, block))
    assert torch.equal(out[:, tail], expected)
    for result, wanted in zip(grads, torch.autograd.grad(expected, short, expected.detach()), strict=True):
        assert relative_error(result[:, tail], wanted) < 1e-3


def test_equal_inputs_give_equal_gradients():
    q, k, v = (random(1, 2000, heads, 64, dtype=BF16).requires_grad_() for heads in (8, 1, 1))
    chunk_query = torch.zeros(1, 64, device="cuda", requires_grad=True)

    def gradients():
        with deterministic():
            out, _ = whole.dash_attention(q, k, v, chunk_query, chunk_size=64)
            return torch.autograd.grad(out, (q, k, v, chunk_query), torch.ones_like(out))

    assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))


def replayed(step):
    """The results of ``step`` recorded as a CUDA graph, which forbids waiting, and run once."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    graph.replay()
    torch.cuda.synchronize()
    return results


def test_nothing_waits_for_the_device():
    """Kernels are compiled first; then forward and backward are recorded as one CUDA graph, which forbids waiting."""
    q, k, v = (random(1, 1000, heads, 64, dtype=BF16).requires_grad_() for heads in (8, 1, 1))
    chunk_query = torch.zeros(1, 64, device="cuda", requires_grad=True)

    def step():
        out, _ = whole.dash_attention(q, k, v, chunk_query, chunk_size=64)
        return torch.autograd.grad(out, (q, k, v, chunk_query), torch.ones_like(out))

    expected = step()
    recorded = replayed(step)
    assert relative_error(recorded[0], expected[0]) < 1e-3  # dq, whose sums have no fixed order
    assert all(torch.equal(a, b) for a, b in zip(recorded[1:], expected[1:], strict=True))


def test_no_recompilation_for_another_length():
    from dashattn.ops.block_sparse.hopper import forward_kernel

    def call(length):
        q, k, v = (random(1, length, heads, 128, dtype=BF16) for heads in (16, 1, 1))
        selection = Selection.from_mask(torch.ones(1, length, 1, -(-length // 64), dtype=torch.bool, device="cuda"), 64)
        attention.block_sparse_attention(q, k, v, selection)

    call(1000)
    compiled = sum(len(cache[0]) for cache in forward_kernel.device_caches.values())
    for length in (1, 64, 1024, 1337):
        call(length)
    assert sum(len(cache[0]) for cache in forward_kernel.device_caches.values()) == compiled


WINDOWS = {"kernel_size": 32, "kernel_stride": 16}


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize(
    ("length", "group", "head_dim", "ends"),
    [(1, 2, 64, None), (31, 1, 128, None), (1500, 16, 128, None), (900, 7, 96, (40, 40, 300, 900)), (700, 3, 64, None),
     (513, 32, 32, None), (400, 4, 256, None)],
)  # fmt: skip
def test_compressed_and_window_branches(length, group, head_dim, ends, dtype):
    cu_seqlens = None if ends is None else packed(*ends)
    q, grad = (random(1, length, 2 * group, head_dim, dtype=dtype) for _ in range(2))
    k, v = (random(1, length, 2, head_dim, dtype=dtype) for _ in range(2))
    compressed = [mean_compress(x, 32, 16, cu_seqlens) for x in (k, v)]
    options = {"scale": head_dim**-0.5, "cu_seqlens": cu_seqlens}
    for kernel, reference, inputs in (
        (
            lambda *qkv: band.compressed_attention(*qkv, **WINDOWS, **options)[0],
            lambda *qkv: compressed_attention(*qkv, lambda p: None, **WINDOWS, **options)[0],
            (q, *compressed),
        ),
        (
            lambda *qkv: band.window_attention(*qkv, window_size=200, **options),
            lambda *qkv: window_attention(*qkv, window_size=200, **options),
            (q, k, v),
        ),
    ):
        results = []
        for function, kind in ((reference, FP32), (kernel, dtype)):
            copies = [x.detach().to(kind).requires_grad_() for x in inputs]
            out = function(*copies)
            results.append([out.detach(), *torch.autograd.grad(out, copies, grad.to(kind))])
        for expected, result in zip(*results, strict=True):
            if expected.numel() and length > 1:  # a single key: gradients of q and k are zero but for rounding
                assert relative_error(result, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("pooling", ["max", "weighted"])
@pytest.mark.parametrize(
    ("length", "group", "topk", "init_blocks", "local_blocks", "ends"),
    [(4099, 16, 20, 1, 2, None), (3000, 1, 12, 0, 1, None), (3000, 7, 16, 1, 4, (64, 64, 900, 3000)),
     (2500, 32, 5, 1, 4, None), (20, 4, 3, 1, 2, None)],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_block_selection(length, group, topk, init_blocks, local_blocks, ends, pooling, dtype):
    cu_seqlens = None if ends is None else packed(*ends)
    q, k = random(1, length, 2 * group, 128, dtype=dtype), random(1, length, 2, 128, dtype=dtype)
    compressed = mean_compress(k, 32, 16, cu_seqlens)
    blocks = {"pooling": pooling, "block_size": 64, "topk": topk, "init_blocks": init_blocks,
              "local_blocks": local_blocks}  # fmt: skip
    options = {"scale": 0.5, "cu_seqlens": cu_seqlens}
    select = partial(topk_selection, **WINDOWS, **blocks)
    _, expected = compressed_attention(q.float(), compressed.float(), None, select, **WINDOWS, **options)
    expected = Selection.concatenate(expected)
    words = select_blocks(q, compressed, **WINDOWS, **blocks, **options).words
    width = expected.words.shape[-1]
    assert (words[..., :width] != expected.words).any(-1).float().mean() < 0.005
    assert torch.equal(Selection(words, 64).mask().sum(-1), expected.mask().sum(-1))


def test_selection_past_two_to_the_31st_is_that_of_its_scores():
    """The last token's, whose scores are computed here in float64."""
    length, topk = 540_672, 64
    q = torch.empty(1, length, 32, 128, dtype=BF16, device="cuda").normal_()
    assert q.numel() > 2**31
    compressed = mean_compress(random(1, length, 2, 128, dtype=BF16), 32, 16)
    words = select_blocks(
        q, compressed, **WINDOWS, pooling="max", block_size=64, topk=topk, init_blocks=1, local_blocks=1, scale=1.0,
        cu_seqlens=None,
    ).words  # fmt: skip
    logits = q[0, -1, 16:].double() @ compressed[0, :, 1].double().T
    scores = F.pad(logits.softmax(-1).sum(0), (1, 0))
    scores = scores.unfold(0, 5, 4).amax(-1)  # of all blocks but the last, which touch windows 4b - 1 to 4b + 3
    scores[0] = torch.inf
    expected = {length // 64 - 1, *scores.topk(topk - 1).indices.tolist()}
    chosen = Selection(words[:, :, -1:], 64).mask()[0, 0, 1].nonzero().flatten().tolist()
    assert len(chosen) == topk
    assert len(expected ^ set(chosen)) <= 2


def test_window_past_two_to_the_31st():
    length, window_size = 540_672, 100
    q = torch.empty(1, length, 32, 128, dtype=BF16, device="cuda").normal_()
    k, v = (random(1, length, 2, 128, dtype=BF16) for _ in range(2))
    options = {"window_size": window_size, "scale": 128**-0.5}
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = band.window_attention(*inputs, **options)
    grads = torch.autograd.grad(out, inputs, out.detach())
    short = [x.detach()[:, -512:].clone().requires_grad_() for x in inputs]
    expected = band.window_attention(*short, **options)
    tail = slice(-512 + 2 * window_size, None)  # what neither sees nor is seen by tokens before the short ones
    for result, wanted in zip(
        (out, *grads), (expected, *torch.autograd.grad(expected, short, expected.detach())), strict=True
    ):
        assert relative_error(result[:, tail], wanted[:, tail]) < 1e-3


@pytest.mark.parametrize("cu_seqlens", [None, (100, 100, 131, 700, 2000)])
@pytest.mark.parametrize("method", ["infllmv2", "nsa", "nsa minicpm"])
def test_topk_methods(method, cu_seqlens):
    """The whole operation against the float32 reference of its parts, given the kernel's selection."""
    length = 2000
    cu_seqlens = None if cu_seqlens is None else packed(*cu_seqlens)
    q, grad = (random(1, length, 32, 128, dtype=BF16) for _ in range(2))
    k, v = (random(1, length, 2, 128, dtype=BF16) for _ in range(2))
    scale = {"scale": 128**-0.5, "cu_seqlens": cu_seqlens}
    blocks = {"pooling": "weighted" if method == "nsa" else "max", "block_size": 64, "topk": 8, "init_blocks": 1,
              "local_blocks": 3}  # fmt: skip
    rest, lse = [], None
    if method == "infllmv2":
        compressed = mean_compress(k, 32, 16, cu_seqlens)

        def attention(q, k, v):
            return infllmv2_attention(q, k, v, topk=8, window_size=128, cu_seqlens=cu_seqlens, impl="triton")

        def reference(q, k, v):
            return attention_reference.block_sparse_attention(q, k, v, selection, **scale)
    else:
        window_size = 512 if method == "nsa" else 0
        compressed = random(1, num_windows(length, 32, 16), 2, 128, dtype=BF16)
        gates = torch.rand(1, length, 32, 3 if window_size else 2, device="cuda").to(BF16)
        rest = [compressed, torch.randn_like(compressed), gates]
        _, lse = band.compressed_attention(q, *rest[:2], **WINDOWS, **scale)

        def attention(*tensors):
            return nsa_attention(
                *tensors, topk=8, local_blocks=3, window_size=window_size, pooling=blocks["pooling"],
                cu_seqlens=cu_seqlens, impl="triton",
            )  # fmt: skip

        def reference(q, k, v, ck, cv, gates):
            branches = [
                compressed_attention(q, ck, cv, lambda p: None, **WINDOWS, **scale)[0],
                attention_reference.block_sparse_attention(q, k, v, selection, **scale),
            ]
            if window_size:
                branches.append(window_attention(q, k, v, window_size=window_size, **scale))
            return gated_sum(gates, branches)

    selection = select_blocks(q, compressed, lse, **WINDOWS, **blocks, **scale)
    results = []
    for function, kind in ((reference, FP32), (attention, BF16)):
        inputs = [x.to(kind).requires_grad_() for x in (q, k, v, *rest)]
        out = function(*inputs)
        results.append([out.detach(), *torch.autograd.grad(out, inputs, grad.to(kind))])
    for expected, result in zip(*results, strict=True):
        assert relative_error(result, expected) < TOLERANCE[BF16]
    with torch.no_grad():
        assert relative_error(attention(*inputs), results[0][0]) < TOLERANCE[BF16]


def test_topk_methods_wait_for_nothing_and_repeat_themselves():
    """As one CUDA graph, packed documents included; equal inputs give equal results."""
    config = NSAConfig(topk=8)
    backend = build_backend(config, AttentionShape(64, 16, 1, 128)).to("cuda", BF16)
    q, k, v = (random(1, 1000, heads, 128, dtype=BF16).requires_grad_() for heads in (16, 1, 1))
    hidden, cu_seqlens = random(1, 1000, 64, dtype=BF16), packed(300, 310, 1000)
    inputs = [q, k, v, *backend.parameters()]

    def step():
        out = backend(q, k, v, hidden=hidden, cu_seqlens=cu_seqlens)
        out = out + infllmv2_attention(q, k, v, topk=8, window_size=128, cu_seqlens=cu_seqlens)
        # Detached: a graph that lives on ties its leaves to the stream it was made on, and capture has another.
        return out.detach(), *torch.autograd.grad(out, inputs, torch.ones_like(out))

    step()
    expected = step()
    recorded = replayed(step)
    assert all(torch.equal(a, b) for a, b in zip(recorded[:4], expected[:4], strict=True))
    assert all(relative_error(a, b) < 5e-3 for a, b in zip(recorded[4:], expected[4:], strict=True))


def test_selection_is_not_compiled_again_for_another_length():
    from dashattn.ops.block_scores.triton_select import select_kernel

    def call(length):
        q, k = random(1, length, 16, 128, dtype=BF16), random(1, length, 1, 128, dtype=BF16)
        infllmv2_attention(q, k, k, topk=4, window_size=64)

    call(1000)
    compiled = sum(len(cache[0]) for cache in select_kernel.device_caches.values())
    for length in (1, 64, 1024, 1337):
        call(length)
    assert sum(len(cache[0]) for cache in select_kernel.device_caches.values()) == compiled
