"""The decode kernels against the reference, in Triton's interpreter where there is no GPU."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from dashattn.backends import (
    AttentionShape,
    DashConfig,
    FullConfig,
    IndexerConfig,
    InfLLMv2Config,
    NSAConfig,
    build_backend,
)
from dashattn.backends.nsa import MeanMLP
from dashattn.ops.block_scores.triton import select_blocks
from dashattn.ops.chunk_summary.reference import chunk_summary
from dashattn.ops.compression.reference import mean_compress
from dashattn.ops.dash_routing.triton import dash_routing
from dashattn.ops.decode import reference, triton_attention
from dashattn.ops.decode import triton as kernels
from dashattn.selection import Selection

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK = 16
NAN = float("nan")


def make_cache(lengths, capacity, kv_heads=2, head_dim=24, dtype=torch.float32):
    """Keys and values with NaN past the new tokens, which nobody may read."""
    k, v = torch.randn(2, len(lengths), capacity, kv_heads, head_dim, device=DEVICE).to(dtype)
    return k, v, torch.tensor(lengths, dtype=torch.int32, device=DEVICE)


def poison(x, lengths, num_tokens):
    for row, length in enumerate(lengths.tolist()):
        x[row, length + num_tokens :] = NAN


def queries(lengths, num_tokens, heads, head_dim=24, dtype=torch.float32):
    return torch.randn(len(lengths), num_tokens, heads, head_dim, device=DEVICE).to(dtype)


@pytest.mark.parametrize(
    ("group", "num_tokens", "window"), [(1, 1, None), (3, 1, 20), (4, 3, None), (2, 3, 20), (3, 1, 1)]
)
def test_attention_over_all_keys_or_a_window(group, num_tokens, window):
    k, v, lengths = make_cache([0, 37, 93], 96)
    q = queries(lengths, num_tokens, 2 * group)
    expected = reference.cached_attention(q, k, v, lengths, window_size=window)
    poison(k, lengths, num_tokens)
    poison(v, lengths, num_tokens)
    out = kernels.cached_attention(q, k, v, lengths, window_size=window)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("num_tokens", [1, 2])
def test_attention_over_selected_blocks(density, num_tokens):
    # more than a word of blocks: 40
    k, v, lengths = make_cache([5, 606], 640)
    q = queries(lengths, num_tokens, 6)
    own = (lengths[:, None] + torch.arange(num_tokens, device=DEVICE)) // BLOCK
    block = torch.arange(40, device=DEVICE)
    mask = (torch.rand(2, num_tokens, 2, 40, device=DEVICE) < density) & (block <= own[..., None, None])
    selection = Selection.from_mask(mask | (block == own[..., None, None]), BLOCK)
    expected = reference.cached_attention(q, k, v, lengths, selection)
    poison(k, lengths, num_tokens)
    poison(v, lengths, num_tokens)
    out = kernels.cached_attention(q, k, v, lengths, selection)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("group", "alpha", "router_scale", "prior", "sigma", "dtype", "num_tokens", "forced"),
    [
        (4, 1.5, 1.0, "tempered", 1e6, torch.float16, 1, (0, 0)),
        (3, 1.5, 4.0, "raw", 1.0, torch.float32, 2, (0, 0)),
        (1, 1.5, 0.01, "raw", 1.0, torch.float32, 1, (0, 0)),
        (2, "heads", 2.0, "tempered", 0.5, torch.float32, 2, (0, 0)),
        (2, 1.01, 2.0, "raw", 1.0, torch.float16, 1, (0, 0)),
        (2, 2.0, 1.0, "none", 1.0, torch.float32, 1, (0, 0)),
        (2, 1.5, 300.0, "tempered", 1.0, torch.float32, 1, (0, 0)),
        (3, 1.5, 4.0, "raw", 1.0, torch.float32, 2, (1, 0)),
        (1, 1.5, 4.0, "tempered", 0.5, torch.float32, 1, (1, 2)),
        (4, "heads", 2.0, "raw", 1.0, torch.float32, 2, (0, 3)),
        (16, 1.5, 2.0, "none", 1.0, torch.float16, 1, (2, 1)),
        (2, 1.5, 2.0, "tempered", 0.5, torch.float32, 2, (20, 17)),  # one candidate, and then two
        (2, 1.5, 2.0, "raw", 1.0, torch.float32, 1, (2**40, 2**40)),
    ],
)
def test_routing_and_attention(group, alpha, router_scale, prior, sigma, dtype, num_tokens, forced):
    k, v, lengths = make_cache([14, 606], 640, dtype=dtype)
    q = queries(lengths, num_tokens, 2 * group, dtype=dtype)
    summaries = chunk_summary(k, torch.randn(2, 24, device=DEVICE), chunk_size=BLOCK)
    alpha = torch.linspace(1.1, 1.9, 2 * group, device=DEVICE) if alpha == "heads" else alpha
    options = dict(alpha=alpha, router_scale=router_scale, prior=prior, sigma=sigma)
    options |= dict(init_chunks=forced[0], local_chunks=forced[1])
    selection, bias = reference.cached_dash_routing(
        q, summaries, lengths, chunk_size=BLOCK, prior_heads="group", **options
    )
    expected = reference.cached_attention(q, k, v, lengths, selection, bias)
    poison(summaries, lengths // BLOCK, 0)
    out = kernels.routed_attention(q, k, v, summaries, lengths, chunk_size=BLOCK, **options)
    assert out.dtype == dtype
    error = ((out - expected).float().norm() / expected.float().norm()).item()
    assert error < (1e-3 if dtype == torch.float16 else 1e-5)
    assert torch.equal(attend_in_steps(q, k, v, summaries, lengths, options), out)


@pytest.mark.parametrize(
    ("group", "selector", "router_scale", "prior", "dtype", "num_tokens", "forced"),
    [
        (3, {"topk": 4}, 4.0, "raw", torch.float32, 2, (0, 0)),
        (4, {"topk": 6}, 2.0, "tempered", torch.float32, 2, (1, 2)),
        (2, {"topk": 60}, 2.0, "raw", torch.float32, 1, (1, 0)),
        (16, {"topk": 3}, 2.0, "none", torch.float16, 1, (1, 1)),
        (3, {"top_p": 0.6}, 4.0, "raw", torch.float32, 2, (1, 0)),
        (1, {"top_p": 0.8}, 2.0, "tempered", torch.float32, 1, (0, 1)),
        (2, {"top_p": 1.0}, 300.0, "raw", torch.float32, 1, (0, 0)),
        (2, {"top_p": 1e-6}, 0.01, "tempered", torch.float32, 2, (20, 17)),  # one candidate, and then two
    ],
)
def test_routing_by_another_selector_and_attention(group, selector, router_scale, prior, dtype, num_tokens, forced):
    k, v, lengths = make_cache([14, 606], 640, dtype=dtype)
    q = queries(lengths, num_tokens, 2 * group, dtype=dtype)
    summaries = chunk_summary(k, torch.randn(2, 24, device=DEVICE), chunk_size=BLOCK)
    options = dict(selector="topk" if "topk" in selector else "topp", **selector)
    options |= dict(router_scale=router_scale, prior=prior, sigma=0.5, init_chunks=forced[0], local_chunks=forced[1])
    selection, bias = reference.cached_dash_routing(
        q, summaries, lengths, chunk_size=BLOCK, prior_heads="group", **options
    )
    expected = reference.cached_attention(q, k, v, lengths, selection, bias)
    poison(summaries, lengths // BLOCK, 0)
    out = kernels.routed_attention(q, k, v, summaries, lengths, chunk_size=BLOCK, **options)
    error = ((out - expected).float().norm() / expected.float().norm()).item()
    assert error < (1e-3 if dtype == torch.float16 else 1e-5)
    assert torch.equal(attend_in_steps(q, k, v, summaries, lengths, options), out)


def attend_in_steps(q, k, v, summaries, lengths, options):
    """As where other layers take the selection over."""
    selection, bias = kernels.cached_dash_routing(q, summaries, lengths, chunk_size=BLOCK, **options)
    return kernels.cached_attention(q, k, v, lengths, selection, bias)


@pytest.mark.parametrize("pooling", ["max", "weighted"])
@pytest.mark.parametrize(("group", "num_tokens", "topk"), [(1, 1, 3), (3, 2, 4), (2, 1, 36), (2, 1, 60)])
def test_selection_from_compressed_keys(pooling, group, num_tokens, topk):
    # 40 blocks, more than a word; the first row sees no compressed key yet, the second one whose block is not full
    lengths = torch.tensor([0, 23, 607], dtype=torch.int32, device=DEVICE)
    compressed_k, compressed_v = torch.randn(2, 3, 160, 2, 24, device=DEVICE)
    q = queries(lengths, num_tokens, 2 * group)
    options = dict(block_size=BLOCK, kernel_size=8, kernel_stride=4, pooling=pooling, topk=topk)
    options |= dict(init_blocks=1, local_blocks=2)
    expected_out, expected = reference.cached_window_routing(q, compressed_k, compressed_v, lengths, **options)
    poison(compressed_k, lengths // 4, 0)
    poison(compressed_v, lengths // 4, 0)
    out, selection = kernels.cached_window_routing(q, compressed_k, compressed_v, lengths, **options)
    assert torch.equal(selection.mask(), expected.mask())
    torch.testing.assert_close(out, expected_out, rtol=1e-4, atol=1e-5)
    assert out[0].abs().max() == 0


@pytest.mark.parametrize("method", ["dash", "infllmv2"])
@pytest.mark.parametrize(("group", "scale"), [(1, 1.0), (1, 1000.0), (3, 30.0), (3, 1000.0), (16, 1000.0)])
def test_prefill_and_decoding_rank_what_the_reference_ranks(method, group, scale):
    """At any scale: of the sharpest scores hardly a probability is above 0 in float32."""
    tokens, length, topk = 24, 24 * BLOCK, 8
    q = torch.randn(1, length, 2, 1, 24, device=DEVICE) + 0.1 * torch.randn(1, length, 2, group, 24, device=DEVICE)
    q = q.flatten(2, 3)
    lengths = torch.tensor([length - tokens], dtype=torch.int32, device=DEVICE)
    last = q[:, -tokens:].contiguous()
    if method == "dash":
        summaries = torch.randn(1, length // BLOCK, 2, 24, device=DEVICE)
        options = dict(chunk_size=BLOCK, selector="topk", topk=topk, router_scale=scale, prior="none", init_chunks=1)
        prefill = dash_routing(q, summaries, **options)[0]
        options |= dict(sigma=1.0)
        decoded = kernels.cached_dash_routing(last, summaries, lengths, **options)[0]
        wanted = reference.cached_dash_routing(last, summaries, lengths, prior_heads="group", **options)[0]
        exact = (last.double(), summaries.double(), lengths)
        exact = reference.cached_dash_routing(*exact, prior_heads="group", **options)[0]
    else:
        keys = torch.randn(1, length // 4, 2, 24, device=DEVICE)
        options = dict(block_size=BLOCK, kernel_size=8, kernel_stride=4, pooling="max", topk=topk)
        options |= dict(init_blocks=1, local_blocks=1, scale=scale * 24**-0.5)
        prefill = select_blocks(q, keys[:, :-1], **options, cu_seqlens=None)
        decoded = kernels.cached_window_routing(last, keys, None, lengths, **options)[1]
        wanted = reference.cached_window_routing(last, keys, None, lengths, **options)[1]
        exact = reference.cached_window_routing(last.double(), keys.double(), None, lengths, **options)[1]
    masks = [x.mask()[:, -tokens:, :, : length // BLOCK] for x in (prefill, decoded, wanted)]
    for mask in masks:
        assert (mask != exact.mask()[..., : length // BLOCK]).any(-1).float().mean() < 0.03  # rounding of scores
    assert torch.equal(masks[0].sum(-1), masks[1].sum(-1))


def test_ties_go_to_the_lower_block():
    """Equal queries score all windows alike; only the first and the last blocks differ by how many touch them."""
    lengths = torch.tensor([600], dtype=torch.int32, device=DEVICE)
    compressed_k = torch.randn(1, 160, 2, 24, device=DEVICE)
    q = torch.zeros(1, 1, 4, 24, device=DEVICE)
    options = dict(block_size=BLOCK, kernel_size=8, kernel_stride=4, topk=9, init_blocks=2, local_blocks=3)
    _, selection = kernels.cached_window_routing(q, compressed_k, None, lengths, pooling="max", **options)
    chosen = selection.mask()[0, 0, 0].nonzero().flatten().tolist()
    assert chosen == [0, 1, 2, 3, 4, 5, 35, 36, 37]


@pytest.mark.parametrize("alpha", [1.01, 1.2, 1.5, 1.8, 2.0])
@pytest.mark.parametrize("spread", [0.0, 0.3, 30.0])
def test_probabilities_sum_to_one_at_any_spread(alpha, spread):
    """The kernel's own threshold, checked by its definition in float64 over 1000 chunks."""
    chunks = 1000
    summaries = spread * torch.randn(1, chunks + 1, 1, 16, device=DEVICE)
    q = torch.randn(1, 1, 1, 16, device=DEVICE)
    lengths = torch.tensor([chunks * BLOCK], dtype=torch.int32, device=DEVICE)
    tensor = None if alpha == 1.5 else torch.tensor([alpha], device=DEVICE)
    words, bias = kernels.route(q, summaries, lengths, tensor, BLOCK, 0.25, True, None)
    mask = Selection(words, BLOCK).mask()[0, 0, 0, : chunks + 1]
    p = bias[0, 0, 0].double().exp() * mask  # the raw prior of a group of one is log p
    assert mask[-1]
    assert p[:-1].sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "query", None])
@pytest.mark.parametrize("position", [0, 14, 15, 31, 33, 79])
def test_append_writes_the_token_and_the_window_it_completes(pooling, position):
    size, stride = (48, 16) if pooling == "mean" else (16, 16)
    k, v, lengths = make_cache([position, 47], 96)
    new_k, new_v = torch.randn(2, 2, 1, 2, 24, device=DEVICE)
    query = torch.randn(2, 24, device=DEVICE) if pooling == "query" else None
    expected_k, expected_v = k.clone(), v.clone()
    for row, length in enumerate(lengths.tolist()):
        expected_k[row, length], expected_v[row, length] = new_k[row, 0], new_v[row, 0]
    pooled = torch.full((2, 6, 2, 24), NAN, device=DEVICE)
    expected = pooled.clone()
    whole = mean_compress(expected_k, size, stride)
    if query is not None:
        whole = chunk_summary(expected_k, query, chunk_size=size)
    for row, length in enumerate(lengths.tolist()):
        first = length + 1 - size
        if pooling and first >= 0 and first % stride == 0:
            expected[row, first // stride] = whole[row, first // stride]
    for x in (k, v):
        poison(x, lengths, 0)
    options = dict(pooled=pooled, window=(size, stride), chunk_query=query) if pooling else {}
    kernels.append(new_k, new_v, k, v, lengths, **options)
    for x, wanted in ((k, expected_k), (v, expected_v)):
        for row, length in enumerate(lengths.tolist()):
            assert torch.equal(x[row, : length + 1], wanted[row, : length + 1])
            assert x[row, length + 1 :].isnan().all()
    torch.testing.assert_close(pooled, expected, equal_nan=True)


@pytest.mark.parametrize("positions", [[0, 47], [15, 31], [33, 607]])
def test_routing_writes_a_new_token_as_append_does(positions):
    k, v, lengths = make_cache(positions, 640)
    new_k, new_v = torch.randn(2, 2, 1, 2, 24, device=DEVICE)
    q, chunk_query = queries(lengths, 1, 4), torch.randn(2, 24, device=DEVICE)
    summaries = chunk_summary(k, chunk_query, chunk_size=BLOCK)
    poison(summaries, lengths // BLOCK, 0)
    appended, routed = ([x.clone() for x in (k, v, summaries)] for _ in range(2))
    options = dict(chunk_size=BLOCK, alpha=1.5, router_scale=2.0, prior="raw", sigma=1.0)
    window = dict(pooled=appended[2], window=(BLOCK, BLOCK), chunk_query=chunk_query)
    kernels.append(new_k, new_v, *appended[:2], lengths, **window)
    expected = kernels.routed_attention(q, *appended, lengths, **options)
    new = kernels.NewToken(new_k, new_v, *routed[:2], chunk_query)
    out = kernels.routed_attention(q, *routed, lengths, **options, new=new)
    for x, wanted in zip((out, *routed), (expected, *appended), strict=True):  # a GPU sums in another order
        torch.testing.assert_close(x, wanted, equal_nan=True)


@pytest.mark.parametrize("head_dim", [16, 24])
def test_a_window_is_compressed_when_its_last_token_was_written(head_dim):
    size, stride = 8, 4
    lengths = torch.tensor([6, 7, 9, 15], dtype=torch.int32, device=DEVICE)  # of the second and fourth one ends
    caches = [torch.randn(4, 20, 2, head_dim, device=DEVICE) for _ in range(2)]
    compressions = [MeanMLP(size, head_dim).to(DEVICE) for _ in range(2)]
    for parameter in (p for mlp in compressions for p in mlp.parameters()):
        parameter.data.normal_(std=0.3)
    outs = [torch.full((4, 5, 2, head_dim), NAN, device=DEVICE) for _ in range(2)]
    expected = [out.clone() for out in outs]
    for cache, mlp, out in zip(caches, compressions, expected, strict=True):
        for row, length in ((1, 7), (3, 15)):
            window = cache[row, length + 1 - size : length + 1]
            out[row, (length + 1 - size) // stride] = mlp(window[None, None])[0, 0].detach()
    kernels.compress_window(caches, compressions, outs, lengths, size, stride)
    for out, wanted in zip(outs, expected, strict=True):
        torch.testing.assert_close(out, wanted, equal_nan=True)


WINDOWS = dict(block_size=16, kernel_size=8, kernel_stride=4, topk=3)


@pytest.mark.parametrize(
    ("config", "kv_heads"),
    [
        (FullConfig(), 2),
        (DashConfig(chunk_size=16, router_scale=3.0, prior="raw"), 2),
        (DashConfig(chunk_size=16, router_scale=3.0, prior="raw", init_chunks=1, local_chunks=1), 1),
        (DashConfig(chunk_size=16, router_scale=3.0, summary_rope="mean", alpha_mode="learnable"), 1),
        (DashConfig(chunk_size=16, router_scale=3.0, prior="raw", summary_keys="unrotated"), 1),
        (InfLLMv2Config(**WINDOWS, window_size=16), 2),
        (NSAConfig(**WINDOWS, window_size=20, shared_kv=False), 2),
        (NSAConfig(**WINDOWS, window_size=0, variant="minicpm"), 2),
        (IndexerConfig(block_size=16, topk=3, local_blocks=0, gradient="prior"), 2),
    ],
    ids=["full", "dash", "dash sink", "dash rope", "dash unrotated", "infllmv2", "nsa", "nsa minicpm", "indexer"],
)
def test_backends_decode_alike_with_and_without_kernels(config, kv_heads, monkeypatch):
    shape = AttentionShape(hidden_size=24, num_heads=2 * kv_heads, num_kv_heads=kv_heads, head_dim=16)
    backend = build_backend(replace(config, impl="reference"), shape).to(DEVICE)
    for parameter in backend.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))

    def inputs(count, position):
        q, k, v = (torch.randn(2, count, heads, 16, device=DEVICE) for heads in (2 * kv_heads, kv_heads, kv_heads))
        angles = (position + torch.arange(count, device=DEVICE))[:, None] * torch.ones(16, device=DEVICE)
        return (q, k, v), dict(hidden=torch.randn(2, count, 24, device=DEVICE), rope=(angles.cos(), angles.sin()))

    caches = [backend.new_cache(2, 100, dtype=torch.float32, device=DEVICE) for _ in range(2)]
    qkv, extra = inputs(75, 0)
    for cache in caches:
        backend.decode(*qkv, cache.layers[0], **extra)
        cache.advance([62, 75])
    twin = deepcopy(backend)
    twin.config = replace(config, impl="triton")
    assert twin.decodes_statically(caches[1].layers[0])
    monkeypatch.setattr("dashattn.ops.block_sparse.reference.QUERY_TILE", 2)
    for count in (1, 1, 3):  # the first one's chunk ends; the last one's tokens are a tile and the beginning of another
        qkv, extra = inputs(count, caches[0].host_lengths[1])
        with torch.device("meta"):  # nothing is made on the default device
            out, expected = (
                b.decode(*qkv, cache.layers[0], **extra) for b, cache in zip((twin, backend), caches, strict=True)
            )
        torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-5)
        for cache in caches:
            cache.advance(count)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            DashConfig(chunk_size=16, prior="mass", selector="topk"),
            "impl='triton': the kernels decode without prior='mass'",
        ),
        (
            DashConfig(chunk_size=16, prior="raw", prior_heads="head"),
            "impl='triton': the kernels have prior_heads='group'",
        ),
    ],
    ids=["mass", "head"],
)
def test_what_the_kernels_cannot_decode_is_refused(config, message):
    backend = build_backend(replace(config, impl="triton"), AttentionShape(24, 4, 2, 16)).to(DEVICE)
    cache = backend.new_cache(1, 20, dtype=torch.float32, device=DEVICE)
    q, k, v = (torch.randn(1, 2, heads, 16, device=DEVICE) for heads in (4, 2, 2))
    with pytest.raises(ValueError, match=message):
        backend.decode(q, k, v, cache.layers[0])
    auto = build_backend(config, AttentionShape(24, 4, 2, 16)).to(DEVICE)
    assert auto.decodes_statically(cache.layers[0]) == (config.selector != "entmax")
    assert auto.decode(q, k, v, cache.layers[0]).isfinite().all()


@pytest.mark.parametrize(
    ("rows", "blocks", "splits"),
    [
        (1, 2048, 132),
        (2, 2048, 66),
        (4, 2048, 33),
        (6, 2048, 44),
        (8, 2048, 33),
        (128, 2048, 2),
        (1000, 2048, 1),
        (2, 50, 50),
    ],
)
def test_programs_that_share_the_blocks_of_a_row(monkeypatch, rows, blocks, splits):
    monkeypatch.setattr(triton_attention, "processors", lambda device: 132)
    assert triton_attention.num_splits(rows, blocks, torch.device("cpu")) == splits


def test_the_rows_of_every_head_share_the_device(monkeypatch):
    asked = []
    monkeypatch.setattr(triton_attention, "num_splits", lambda rows, blocks, device: asked.append((rows, blocks)) or 1)
    k, v, lengths = make_cache([7, 20], 130, kv_heads=3)
    kernels.cached_attention(queries(lengths, 5, 6), k, v, lengths)
    assert asked == [(2 * 5 * 3, 3)]  # blocks of 64 keys
