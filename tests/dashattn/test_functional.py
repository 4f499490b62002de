"""The public functions against the token-by-token oracle, and the properties that users rely on."""

import functools
import sys
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch
from torch.nn.attention import SDPBackend

from dashattn import dash_attention, full_attention, infllmv2_attention, nsa_attention
from dashattn.controls import oracle_attention, sink_window_attention
from dashattn.indexer import indexer_attention
from dashattn.ops.block_scores.reference import topk_selection
from dashattn.ops.compression.reference import num_windows
from dashattn.ops.dash_routing.reference import dash_routing
from dashattn.ops.full.reference import (
    dense_kernels,
    flash_attention_3_is_active,
    pays_for_a_plan,
    use_flash_attention_3,
)
from dashattn.selected import selected_attention
from dashattn.selection import Selection

D = 8
BLOCKS = {"block_size": 8, "kernel_size": 4, "kernel_stride": 2}
DASH = {"chunk_size": 8, "router_scale": 3.0}
SINK = {"init_chunks": 1, "local_chunks": 1}
INFLLM = {**BLOCKS, "topk": 4, "init_blocks": 1, "window_size": 8}
NSA = {**BLOCKS, "topk": 4, "init_blocks": 1, "local_blocks": 2, "window_size": 11}
# Tokens; query and KV heads. Lengths below, at and off the grid; groups that are and are not powers of two.
SHAPES = [(1, 2, 2), (5, 4, 1), (8, 3, 1), (9, 2, 1), (41, 6, 2), (48, 7, 1), (67, 4, 4)]


def make_qkv(length, num_heads, num_kv_heads, batch=1, dtype=torch.float64, requires_grad=False):
    def make(heads):
        return torch.randn(batch, length, heads, D, dtype=dtype).requires_grad_(requires_grad)

    return make(num_heads), make(num_kv_heads), make(num_kv_heads)


def nsa_inputs(q, k, v, kernel_size=4, kernel_stride=2, gates=3):
    """Compressed keys and values, gates and the window's own keys and values, drawn at random."""
    windows = num_windows(k.shape[1], kernel_size, kernel_stride)
    ck, cv = (torch.randn(k.shape[0], windows, *k.shape[2:], dtype=q.dtype) for _ in range(2))
    return ck, cv, torch.rand(*q.shape[:3], gates, dtype=q.dtype), torch.randn_like(k), torch.randn_like(v)


def dash(q, k, v, chunk_query=None, **options):
    if chunk_query is None:
        chunk_query = torch.randn(k.shape[2], D, dtype=q.dtype, generator=torch.Generator().manual_seed(1))
    return dash_attention(q, k, v, chunk_query, **DASH, **options)


def infllm(q, k, v, **options):
    return infllmv2_attention(q, k, v, **INFLLM, **options)


def nsa_shared(q, k, v, cu_seqlens=None, **options):
    """NSA with a causal stand-in for the learned parts: mean-pooled keys and values, gates from q."""
    from dashattn.ops.compression.reference import mean_compress

    ck, cv = (mean_compress(x, 4, 2, cu_seqlens) for x in (k, v))
    return nsa_attention(q, k, v, ck, cv, q[..., :3].sigmoid(), **NSA, cu_seqlens=cu_seqlens, **options)


def dash_sink(q, k, v, **options):
    return dash(q, k, v, **SINK, **options)


def dash_topk(q, k, v, **options):
    return dash(q, k, v, selector="topk", topk=4, prior="raw", **options)


def dash_topp(q, k, v, **options):
    return dash(q, k, v, selector="topp", top_p=0.7, **SINK, **options)


def hils(q, k, v, **options):
    return dash(q, k, v, selector="topk", topk=4, prior="mass", init_chunks=1, **options)


BACKENDS = {"full": full_attention, "dash": dash, "dash sink": dash_sink, "infllmv2": infllm, "nsa": nsa_shared}
BACKENDS |= {"dash topk": dash_topk, "dash topp": dash_topp, "hils": hils}
each_backend = pytest.mark.parametrize("attention", BACKENDS.values(), ids=BACKENDS.keys())


def arrays(*tensors):
    return [x[0].detach().numpy() for x in tensors]


def assert_matches(result, expected):
    (out, stats), (out_expected, active_expected) = result, expected
    np.testing.assert_allclose(out[0].detach().numpy(), out_expected, rtol=0, atol=1e-9)
    np.testing.assert_array_equal(stats.active_tokens[0].numpy(), active_expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("prior_heads", ["group", "head"])
@pytest.mark.parametrize("prior", ["raw", "tempered", "none"])
def test_dash_equals_its_definition(shape, prior, prior_heads):
    q, k, v = make_qkv(*shape)
    r = torch.randn(k.shape[2], D, dtype=torch.float64)
    alpha = torch.linspace(1.2, 1.9, q.shape[2], dtype=torch.float64)
    for options in ({"alpha": 1.5}, {"alpha": alpha}):
        options |= {**DASH, "prior": prior, "sigma": 2.0, "prior_heads": prior_heads}
        result = dash_attention(q, k, v, r, **options, return_stats=True)
        options["alpha"] = np.asarray(options["alpha"])
        assert_matches(result, oracle.dash(*arrays(q, k, v), r.numpy(), **options))


FORCED = [(1, 0), (2, 1), (0, 3), (99, 0)]  # first chunks, and those before a token's own


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("init_chunks", "local_chunks"), FORCED)
def test_dash_with_forced_chunks_equals_its_definition(shape, init_chunks, local_chunks):
    q, k, v = make_qkv(*shape)
    r = torch.randn(k.shape[2], D, dtype=torch.float64)
    for prior, prior_heads in (("raw", "group"), ("raw", "head"), ("tempered", "group"), ("tempered", "head")):
        options = {**DASH, "alpha": 1.4, "prior": prior, "sigma": 2.0, "prior_heads": prior_heads}
        options |= {"init_chunks": init_chunks, "local_chunks": local_chunks}
        result = dash_attention(q, k, v, r, **options, return_stats=True)
        assert_matches(result, oracle.dash(*arrays(q, k, v), r.numpy(), **options))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("selector", [{"topk": 3}, {"topk": 1}, {"topk": 99}, {"top_p": 0.6}, {"top_p": 1.0}], ids=str)
def test_dash_with_another_selector_equals_its_definition(shape, selector):
    q, k, v = make_qkv(*shape)
    r = torch.randn(k.shape[2], D, dtype=torch.float64)
    for prior, prior_heads in (("raw", "group"), ("raw", "head"), ("tempered", "group"), ("none", "group")):
        for init_chunks, local_chunks in ((0, 0), (1, 0), (1, 2)):
            options = {**DASH, "prior": prior, "sigma": 2.0, "prior_heads": prior_heads, **selector}
            options |= {"selector": "topk" if "topk" in selector else "topp"}
            options |= {"init_chunks": init_chunks, "local_chunks": local_chunks}
            if options.get("topk", 99) <= init_chunks + local_chunks:
                continue
            result = dash_attention(q, k, v, r, **options, return_stats=True)
            assert_matches(result, oracle.dash(*arrays(q, k, v), r.numpy(), **options))


@pytest.mark.parametrize("shape", [(5, 1, 1), (48, 2, 2), (67, 3, 3)], ids=str)
def test_moba_equals_its_definition(shape):
    """With the options of its preset."""
    q, k, v = make_qkv(*shape)
    options = {"chunk_size": 8, "selector": "topk", "topk": 3, "prior": "none"}
    result = dash_attention(q, k, v, torch.zeros(shape[2], D, dtype=q.dtype), **options, return_stats=True)
    assert_matches(result, oracle.moba(*arrays(q, k, v), block_size=8, topk=3))


def test_ties_of_a_selector_go_to_the_lower_index():
    q, _, _ = make_qkv(67, 4, 2)
    for selector, expected in (({"topk": 4}, [0, 1, 2, 8]), ({"top_p": 0.5}, [0, 1, 2, 3, 8])):
        options = {"selector": "topk" if "topk" in selector else "topp", **selector}
        selection, _ = dash_routing(q, torch.ones(1, 8, 2, D, dtype=torch.float64), chunk_size=8, **options)
        assert selection.mask()[0, 66, 0].nonzero().flatten().tolist() == expected


@pytest.mark.parametrize("heads", [1, 3])
def test_sharp_scores_are_ranked_where_their_probabilities_are_0_in_float32(heads):
    products = torch.tensor([0.0, -300, -250, -200, -150, -110, -400])
    q = torch.full((1, 57, heads, D), D**-0.5)
    summaries = products[None, :, None, None].expand(1, 7, 1, D).contiguous()
    selection, _ = dash_routing(q, summaries, chunk_size=8, selector="topk", topk=4, prior="none")
    assert selection.mask()[0, 56, 0].nonzero().flatten().tolist() == [0, 4, 5, 7]


def test_everything_that_a_selector_may_take_is_dense_attention():
    q, k, v = make_qkv(61, 6, 2)
    for options in ({"selector": "topk", "topk": 8}, {"selector": "topp", "top_p": 1.0}):
        out, stats = dash(q, k, v, prior="none", **options, return_stats=True)
        torch.testing.assert_close(out, full_attention(q, k, v), rtol=0, atol=1e-12)
        assert stats.causal_sparsity() == 0


@pytest.mark.parametrize("shape", [(5, 4, 1), (41, 6, 2), (48, 7, 1)], ids=str)
def test_dash_with_a_query_and_keys_of_the_routers_own_equals_its_definition(shape):
    q, k, v = make_qkv(*shape)
    router_qk = make_qkv(*shape)[:2]
    r = torch.randn(k.shape[2], D, dtype=torch.float64)
    options = {**DASH, "alpha": 1.4, "prior": "raw", "sigma": 1.0, "prior_heads": "group", "init_chunks": 1}
    result = dash_attention(q, k, v, r, **options, router_qk=router_qk, return_stats=True)
    assert_matches(result, oracle.dash(*arrays(q, k, v), r.numpy(), **options, router_qk=arrays(*router_qk)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("selector", [{"topk": 4}, {"top_p": 0.6}, {"selector": "entmax"}], ids=str)
def test_hils_equals_its_definition(shape, selector):
    q, k, v = make_qkv(*shape)
    r = torch.randn(k.shape[2], D, dtype=torch.float64)
    options = {**DASH, "prior": "mass", "sigma": 1.0, "prior_heads": "group"}
    options |= {"selector": "topk" if "topk" in selector else "topp", **selector}
    for init_chunks, local_chunks in ((0, 0), (1, 2)):
        options |= {"init_chunks": init_chunks, "local_chunks": local_chunks}
        result = dash_attention(q, k, v, r, **options, return_stats=True)
        assert_matches(result, oracle.dash(*arrays(q, k, v), r.numpy(), **options))


def test_hils_over_chunks_of_equal_keys_is_block_sparse_attention():
    q, k, v = make_qkv(61, 6, 2)
    k, r = k[:, ::8].repeat_interleave(8, dim=1)[:, :61], torch.randn(2, D, dtype=torch.float64)
    options = {"chunk_size": 8, "selector": "topk", "topk": 4, "return_stats": True}
    weighed, stats = dash_attention(q, k, v, r, prior="mass", **options)
    plain, plain_stats = dash_attention(q, k, v, r, prior="none", **options)
    torch.testing.assert_close(weighed, plain, rtol=0, atol=1e-12)
    assert torch.equal(stats.active_tokens, plain_stats.active_tokens)
    scaled, _ = dash_attention(q, k, v, r, prior="mass", router_scale=2.0, **options)
    assert (scaled - plain).abs().max() > 1e-3


def test_chunks_that_are_all_forced_are_dense_attention():
    q, k, v = make_qkv(61, 6, 2)
    for forced in ({"init_chunks": 7}, {"local_chunks": 7}, {"init_chunks": 3, "local_chunks": 4}):
        out, stats = dash(q, k, v, prior="raw", **forced, return_stats=True)
        torch.testing.assert_close(out, full_attention(q, k, v), rtol=0, atol=1e-12)
        assert stats.causal_sparsity() == 0
        assert not stats.routing_reads.any()


@pytest.mark.parametrize("prior", ["raw", "tempered"])
def test_forced_chunks_take_no_part_in_routing(prior):
    """Neither the choice among the others nor its gradient knows them."""
    q, _, _ = make_qkv(61, 4, 2)
    options = dict(chunk_size=8, router_scale=3.0, prior=prior, sigma=2.0, init_chunks=1, local_chunks=2)
    summaries = torch.randn(1, 7, 2, D, dtype=torch.float64, requires_grad=True)
    selection, bias = dash_routing(q, summaries, **options)
    forced = torch.zeros(61, 8, dtype=torch.bool)
    for t in range(61):
        forced[t, 0] = True
        forced[t, max(0, t // 8 - 2) : t // 8 + 1] = True
    mask = selection.mask()[..., :8]
    assert mask.masked_select(forced[:, None]).all()
    assert (bias.masked_select(forced[:, None]) == 0).all()
    assert mask.masked_select(~forced[:, None]).any()
    (grad,) = torch.autograd.grad(bias.square().sum(), summaries)
    never_candidates = [0, 5, 6]
    assert (grad[:, never_candidates] == 0).all()
    assert (grad[:, 1:5].abs().sum((0, 2, 3)) > 0).all()
    moved = summaries.detach().clone()
    moved[:, never_candidates] += 100
    selection_moved, bias_moved = dash_routing(q, moved, **options)
    assert torch.equal(selection_moved.words, selection.words)
    assert torch.equal(bias_moved, bias)


def test_dash_summary_rope_equals_its_definition():
    q, k, v = make_qkv(41, 4, 2)
    r = torch.randn(2, D, dtype=torch.float64)
    angles = torch.randn(41, D // 2, dtype=torch.float64).repeat(1, 2)
    rope = (angles.cos(), angles.sin())
    options = {**DASH, "alpha": 1.5, "prior": "raw", "sigma": 1.0, "prior_heads": "group"}
    result = dash_attention(q, k, v, r, **options, summary_rope=rope, return_stats=True)
    assert_matches(result, oracle.dash(*arrays(q, k, v), r.numpy(), **options, rope=[t.numpy() for t in rope]))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("init_blocks", [0, 1])
def test_infllmv2_equals_its_definition(shape, init_blocks):
    q, k, v = make_qkv(*shape)
    options = INFLLM | {"init_blocks": init_blocks}
    result = infllmv2_attention(q, k, v, **options, return_stats=True)
    assert_matches(result, oracle.infllmv2(*arrays(q, k, v), **options))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("pooling", ["weighted", "max"])
def test_nsa_equals_its_definition(shape, pooling):
    q, k, v = make_qkv(*shape)
    ck, cv, gates, kw, vw = nsa_inputs(q, k, v)
    options = NSA | {"pooling": pooling}
    result = nsa_attention(q, k, v, ck, cv, gates, k_window=kw, v_window=vw, **options, return_stats=True)
    assert_matches(result, oracle.nsa(*arrays(q, k, v, ck, cv, gates, kw, vw), **options))


def test_nsa_without_window_has_two_branches():
    q, k, v = make_qkv(41, 4, 2)
    ck, cv, gates, _, _ = nsa_inputs(q, k, v, gates=2)
    options = NSA | {"pooling": "max", "window_size": 0}
    result = nsa_attention(q, k, v, ck, cv, gates, **options, return_stats=True)
    assert_matches(result, oracle.nsa(*arrays(q, k, v, ck, cv, gates, k, v), **options))


def gradcheck(fn, *inputs):
    """In fast mode: a random projection of the Jacobian, float64."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(fn, inputs, fast_mode=True, atol=1e-6)


@pytest.mark.parametrize("prior_heads", ["group", "head"])
@pytest.mark.parametrize("prior", ["raw", "tempered"])
@pytest.mark.parametrize("forced", [{}, {"init_chunks": 1}, {"init_chunks": 1, "local_chunks": 1}], ids=str)
def test_dash_gradcheck(prior, prior_heads, forced):
    q, k, v = make_qkv(37, 6, 2)
    r = torch.randn(2, D, dtype=torch.float64)
    alpha = torch.linspace(1.3, 1.8, 6, dtype=torch.float64)
    angles = torch.randn(37, D // 2, dtype=torch.float64).repeat(1, 2)
    for rope in (None, (angles.cos(), angles.sin())):
        fn = functools.partial(
            dash_attention, chunk_size=8, router_scale=2.0, prior=prior, sigma=1.5, prior_heads=prior_heads, **forced
        )
        gradcheck(lambda q, k, v, r, a, fn=fn, rope=rope: fn(q, k, v, r, alpha=a, summary_rope=rope), q, k, v, r, alpha)


@pytest.mark.parametrize("prior_heads", ["group", "head"])
@pytest.mark.parametrize("prior", ["raw", "tempered"])
@pytest.mark.parametrize("selector", [{"selector": "topk", "topk": 4}, {"selector": "topp", "top_p": 0.6}], ids=str)
def test_gradcheck_of_the_other_selectors(prior, prior_heads, selector):
    q, k, v = make_qkv(37, 6, 2)
    r = torch.randn(2, D, dtype=torch.float64)
    options = dict(chunk_size=8, router_scale=2.0, prior=prior, sigma=1.5, prior_heads=prior_heads, init_chunks=1)
    gradcheck(functools.partial(dash_attention, **options, **selector), q, k, v, r)


@pytest.mark.parametrize("cu_seqlens", [None, [0, 20, 37]])
def test_gradcheck_of_the_other_backends(cu_seqlens):
    if cu_seqlens is not None:
        cu_seqlens = torch.tensor(cu_seqlens, dtype=torch.int32)
    q, k, v = make_qkv(37, 4, 2)
    gradcheck(functools.partial(full_attention, cu_seqlens=cu_seqlens), q, k, v)
    gradcheck(functools.partial(infllm, cu_seqlens=cu_seqlens), q, k, v)
    gradcheck(functools.partial(nsa_shared, cu_seqlens=cu_seqlens), q, k, v)
    inputs = nsa_inputs(q, k, v)
    gradcheck(
        lambda q, k, v, ck, cv, gates, kw, vw: nsa_attention(q, k, v, ck, cv, gates, k_window=kw, v_window=vw, **NSA),
        q, k, v, *inputs,
    )  # fmt: skip


def test_tempered_prior_only_carries_gradient():
    """With a large sigma the forward is plain block-sparse softmax; the router still learns, scaled by 1 / sigma."""
    q, k, v = make_qkv(64, 4, 2)
    grads = {}
    for sigma in (1e6, 1e8):
        r = torch.randn(2, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        out = dash_attention(q, k, v, r, **DASH, prior="tempered", sigma=sigma)
        torch.testing.assert_close(out, dash_attention(q, k, v, r, **DASH, prior="none"), rtol=0, atol=1e-4)
        out.square().sum().backward()
        grads[sigma] = r.grad
    assert grads[1e6].abs().max() > 0
    torch.testing.assert_close(grads[1e6] / 100, grads[1e8], rtol=1e-3, atol=0)


def test_zero_chunk_query_is_mean_pooling_and_learns():
    q, k, v = make_qkv(64, 4, 2, requires_grad=True)
    r = torch.zeros(2, D, dtype=torch.float64, requires_grad=True)
    dash_attention(q, k, v, r, **DASH, prior="raw").square().sum().backward()
    assert r.grad.abs().max() > 1e-6


@each_backend
def test_causality(attention):
    q, k, v = make_qkv(50, 4, 2)
    out = attention(q, k, v)
    changed = [x.clone() for x in (q, k, v)]
    for x in changed:
        x[:, 29:] = torch.randn_like(x[:, 29:])
    torch.testing.assert_close(attention(*changed)[:, :29], out[:, :29], rtol=0, atol=0)


@each_backend
def test_packed_equals_separate(attention):
    lengths = [1, 17, 0, 8, 33, 3]
    q, k, v = make_qkv(sum(lengths), 4, 2, requires_grad=True)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    out, stats = attention(q, k, v, cu_seqlens=cu_seqlens, return_stats=True)
    weight = torch.randn_like(out)
    packed_grads = torch.autograd.grad((out * weight).sum(), (q, k, v))

    start, outs, active = 0, [], []
    for length in lengths:
        document = slice(start, start + length)
        start += length
        if length:
            out_d, stats_d = attention(*(x[:, document] for x in (q, k, v)), return_stats=True)
            outs.append(out_d)
            active.append(stats_d.active_tokens)
            assert (stats.routing_reads[:, document] == stats_d.routing_reads).all()
    separate = torch.cat(outs, 1)
    torch.testing.assert_close(out, separate, rtol=0, atol=1e-12)
    assert (stats.active_tokens == torch.cat(active, 1)).all()
    for packed, alone in zip(packed_grads, torch.autograd.grad((separate * weight).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(packed, alone, rtol=0, atol=1e-12)


@each_backend
def test_permuting_kv_groups_permutes_the_output(attention):
    q, k, v = make_qkv(45, 6, 2)
    if attention in (dash, dash_sink, dash_topk, dash_topp, hils):
        attention = functools.partial(attention, chunk_query=torch.ones(2, D, dtype=q.dtype))
    swapped = attention(q.unflatten(2, (2, 3)).flip(2).flatten(2, 3), k.flip(2), v.flip(2))
    torch.testing.assert_close(swapped.unflatten(2, (2, 3)).flip(2).flatten(2, 3), attention(q, k, v))


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_inputs(attention, dtype):
    """Same dtype out; the sums are float32, so only the inputs' rounding shows (selections may move with it)."""
    q, k, v = make_qkv(40, 4, 2, dtype=dtype)
    out = attention(q, k, v)
    assert out.dtype == dtype
    if attention is full_attention:
        exact = attention(*(x.double() for x in (q, k, v)))
        assert (out - exact).norm() / exact.norm() < 1e-2


@each_backend
def test_autocast_does_not_lower_the_precision_inside(attention):
    q, k, v = make_qkv(40, 4, 2, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k, v)
    torch.testing.assert_close(out, attention(q, k, v), rtol=0, atol=1e-6)


@each_backend
def test_non_contiguous_inputs(attention):
    q, k, v = make_qkv(40, 4, 2)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    torch.testing.assert_close(attention(*strided), attention(q, k, v), rtol=0, atol=1e-13)


@each_backend
def test_query_tiles_do_not_show(attention, monkeypatch):
    """Sequences longer than a tile, which the other tests stay below."""
    q, k, v = make_qkv(70, 4, 2, batch=2, requires_grad=True)
    results = []
    for tile in (256, 16):
        monkeypatch.setattr("dashattn.ops.block_sparse.reference.QUERY_TILE", tile)
        out = attention(q, k, v)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for tiled, whole in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("length", [256, 257, 530])
def test_long_sequences_with_nothing_left_out_are_dense(length):
    """Every block, or one window over all: plain causal attention past the real tile."""
    q, k, v = make_qkv(length, 2, 1)
    dense = full_attention(q, k, v)
    torch.testing.assert_close(infllmv2_attention(q, k, v, **INFLLM | {"topk": 99}), dense, rtol=0, atol=1e-12)
    window = {"k_window": k, "v_window": v, "window_size": length}
    ck, cv, _, _, _ = nsa_inputs(q, k, v)
    only_window = torch.tensor([0.0, 0.0, 1.0], dtype=q.dtype).expand(1, length, 2, 3)
    torch.testing.assert_close(nsa_attention(q, k, v, ck, cv, only_window, **NSA | window), dense, rtol=0, atol=1e-12)


def test_scale_multiplies_the_logits():
    """As larger queries would; DashAttention's router keeps D ** -0.5."""
    q, k, v = make_qkv(41, 4, 2)
    scale = 3 * D**-0.5
    r = torch.randn(2, D, dtype=torch.float64)
    nsa_options = dict(
        zip(("compressed_k", "compressed_v", "gates", "k_window", "v_window"), nsa_inputs(q, k, v), strict=True)
    )
    for attention, options, scaled_options in (
        (full_attention, {}, {}),
        (infllmv2_attention, INFLLM, INFLLM),
        (nsa_attention, NSA | nsa_options, NSA | nsa_options),
        (
            dash_attention,
            {"chunk_query": r, **DASH},
            {"chunk_query": r, **DASH, "router_scale": DASH["router_scale"] / 3},
        ),
    ):
        expected = attention(3 * q, k, v, **scaled_options)
        torch.testing.assert_close(attention(q, k, v, **options, scale=scale), expected, rtol=0, atol=1e-12)


def test_a_tensor_of_one_alpha_is_one_for_all_heads():
    q, k, v = make_qkv(41, 6, 2)
    alpha = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    out = dash(q, k, v, alpha=alpha, prior="raw")
    torch.testing.assert_close(out, dash(q, k, v, alpha=1.3, prior="raw"), rtol=0, atol=1e-12)
    out.square().sum().backward()
    assert alpha.grad != 0


def test_infllmv2_with_every_block_is_dense():
    q, k, v = make_qkv(61, 6, 2, batch=2)
    out, stats = infllmv2_attention(q, k, v, **INFLLM | {"topk": 8}, return_stats=True)
    torch.testing.assert_close(out, full_attention(q, k, v), rtol=0, atol=1e-12)
    assert stats.causal_sparsity() == 0


@pytest.mark.parametrize("topk", [3, 99])
def test_selections_never_name_a_block_of_the_future(topk):
    """Which the causal cut would hide here, and kernels that walk the selection would read."""
    sizes = {"kernel_size": 4, "kernel_stride": 2, "block_size": 8}
    log_p = torch.rand(1, 2, 3, 41, num_windows(41, 4, 2)).log()
    selection = topk_selection(log_p, **sizes, pooling="max", topk=topk, init_blocks=2, local_blocks=1)
    own = torch.arange(41) // 8
    mask = selection.mask()
    assert not (mask & (torch.arange(mask.shape[-1]) > own[:, None, None])).any()
    assert (mask.sum(-1) == (own + 1).clamp(max=topk)[:, None]).all()


def test_dash_with_tiny_router_scale_and_no_prior_is_dense():
    q, k, v = make_qkv(61, 6, 2, batch=2)
    r = torch.randn(2, D, dtype=torch.float64)
    out, stats = dash_attention(q, k, v, r, chunk_size=8, router_scale=1e-6, prior="none", return_stats=True)
    torch.testing.assert_close(out, full_attention(q, k, v), rtol=0, atol=1e-12)
    assert stats.causal_sparsity() == 0


def test_router_scale_is_a_sparsity_knob():
    q, k, v = make_qkv(128, 4, 2)
    sparsities = [
        dash_attention(q, k, v, torch.zeros(2, D, dtype=q.dtype), chunk_size=8, router_scale=g, return_stats=True)[1]
        .causal_sparsity()
        .item()
        for g in (0.1, 1.0, 4.0, 16.0)
    ]
    assert sparsities == sorted(sparsities)
    assert sparsities[-1] > sparsities[0] + 0.3


def small(**changes):
    """Arguments of a valid call, some of them replaced."""
    q, k, v = make_qkv(16, 4, 2)
    return {"q": q, "k": k, "v": v} | changes


CU = functools.partial(torch.tensor, dtype=torch.int32)
R = torch.zeros(2, D, dtype=torch.float64)
DOUBLE = functools.partial(torch.tensor, dtype=torch.float64)
NSA_R = {"compressed_k": R, "compressed_v": R, "gates": R}
THREE_HEADS, SHORT = torch.zeros(1, 16, 3, D, dtype=torch.float64), torch.zeros(1, 8, 4, D, dtype=torch.float64)
TWO_ROWS = {name: torch.zeros(2, 16, 2, D) for name in "qkv"}
Q, K = (torch.zeros(1, 16, heads, D, dtype=torch.float64) for heads in (4, 2))
NSA_C, NSA_G = torch.zeros(1, 0, 2, D, dtype=torch.float64), torch.zeros(1, 16, 4, 3, dtype=torch.float64)
NSA_OK = {"compressed_k": NSA_C, "compressed_v": NSA_C, "gates": NSA_G}
NSA_TWO = NSA_OK | {"gates": NSA_G[..., :2], "window_size": 0}
REFUSALS = {
    "dimensions": (full_attention, {"q": torch.zeros(16, 4, D)}, "4 dimensions"),
    "heads": (full_attention, {"q": THREE_HEADS}, "multiple of the number of KV heads"),
    "lengths": (full_attention, {"q": SHORT}, "agree in batch, length"),
    "kv shapes": (full_attention, {"v": torch.zeros(1, 16, 2, 4, dtype=torch.float64)}, "k and v must have one shape"),
    "dtypes": (full_attention, {"k": torch.zeros(1, 16, 2, D)}, "cast them to one dtype"),
    "dtype of v": (full_attention, {"v": torch.zeros(1, 16, 2, D)}, "v is torch.float32, q is torch.float64"),
    "integers": (full_attention, {n: torch.zeros(1, 2, 1, D).int() for n in "qkv"}, "must be bf16"),
    "devices": (full_attention, {"k": torch.zeros(1, 16, 2, D, device="meta", dtype=torch.float64)}, "one device"),
    "device of v": (full_attention, {"v": torch.zeros(1, 16, 2, D, device="meta", dtype=torch.float64)}, "v is on"),
    "empty": (full_attention, {n: torch.zeros(1, 0, 2, D) for n in "qkv"}, "must not be empty"),
    "cu_seqlens end": (full_attention, {"cu_seqlens": CU([0, 15])}, "rise from 0 to T = 16"),
    "cu_seqlens order": (full_attention, {"cu_seqlens": CU([0, 9, 8, 16])}, "rise from 0"),
    "cu_seqlens dtype": (full_attention, {"cu_seqlens": torch.tensor([0, 16])}, "must be int32"),
    "max_seqlen": (full_attention, {"cu_seqlens": CU([0, 9, 16]), "max_seqlen": 8}, "below the length of a document"),
    "max_seqlen alone": (full_attention, {"max_seqlen": 16}, "pass cu_seqlens, too"),
    "cu_seqlens batch": (full_attention, TWO_ROWS | {"cu_seqlens": CU([0, 16])}, "B must be"),
    "impl": (full_attention, {"impl": "cuda"}, "auto, triton, reference"),
    "chunk size": (dash_attention, {"chunk_query": R, "chunk_size": 0}, "chunk_size must be a positive integer"),
    "chunk_query": (dash_attention, {"chunk_query": R[:1]}, r"chunk_query must have shape \(2, 8\)"),
    "alpha": (dash_attention, {"chunk_query": R, "alpha": 1.0}, r"\[1.01, 2.0\]"),
    "alphas": (dash_attention, {"chunk_query": R, "alpha": torch.tensor([1.5, 1.5, 0.9, 2.0])}, r"\[1.01, 2.0\]; got"),
    "no alpha": (dash_attention, {"chunk_query": R, "alpha": torch.tensor(torch.nan)}, r"\[1.01, 2.0\]; got nan"),
    "alpha heads": (dash_attention, {"chunk_query": R, "alpha": torch.full((3,), 1.5)}, "one entry per query head"),
    "prior": (dash_attention, {"chunk_query": R, "prior": "log"}, "raw, tempered, mass, none"),
    "prior_heads": (dash_attention, {"chunk_query": R, "prior_heads": "all"}, "group, head"),
    "router_scale": (dash_attention, {"chunk_query": R, "router_scale": 0.0}, "router_scale must be a positive"),
    "selector": (dash_attention, {"chunk_query": R, "selector": "softmax"}, "entmax, topk, topp"),
    "topk": (dash_attention, {"chunk_query": R, "selector": "topk", "topk": 0}, "topk must be a positive integer"),
    "topk type": (dash_attention, {"chunk_query": R, "topk": 4.0}, "topk must be a positive integer"),
    "topk forced": (dash_attention, {"chunk_query": R, "selector": "topk", "topk": 1, "init_chunks": 1}, "topk 1 < 2"),
    "top_p": (dash_attention, {"chunk_query": R, "top_p": 1.1}, r"top_p must lie in \(0, 1\]; got 1.1"),
    "no top_p": (dash_attention, {"chunk_query": R, "top_p": torch.nan}, r"top_p must lie in \(0, 1\]; got nan"),
    "moving top_p": (dash_attention, {"chunk_query": R, "top_p": torch.ones(1)}, r"top_p that is a tensor must be"),
    "top_p type": (dash_attention, {"chunk_query": R, "top_p": torch.tensor(0.5)}, r"must be float64 \[\] on the CPU"),
    "moving topk": (dash_attention, {"chunk_query": R, "topk": DOUBLE(2.5)}, "topk must be a positive integer"),
    "infinite topk": (dash_attention, {"chunk_query": R, "topk": DOUBLE(torch.inf)}, "topk must be a positive integer"),
    "topk NaN": (dash_attention, {"chunk_query": R, "topk": DOUBLE(torch.nan)}, "topk must be a positive integer"),
    "init_chunks": (dash_attention, {"chunk_query": R, "init_chunks": -1}, "init_chunks must be an integer of at"),
    "local_chunks": (dash_attention, {"chunk_query": R, "local_chunks": 1.0}, "local_chunks must be an integer of at"),
    "sigma": (dash_attention, {"chunk_query": R, "sigma": -1.0}, "sigma must be a positive"),
    "router_qk": (dash_attention, {"chunk_query": R, "router_qk": (R, R)}, "router_qk q must have shape"),
    "summary_rope": (dash_attention, {"chunk_query": R, "summary_rope": (R, R)}, r"must be \[T, D\]"),
    "forced": (infllmv2_attention, {"topk": 17}, "topk 17 < 18 .* shrink window_size"),
    "window type": (infllmv2_attention, {"window_size": 64.0}, "window_size must be an integer of at least 0"),
    "window": (infllmv2_attention, {"window_size": 100}, r"multiple of block_size \(64\)"),
    "stride": (infllmv2_attention, {"kernel_stride": 24}, "multiples of kernel_stride"),
    "init_blocks": (infllmv2_attention, {"init_blocks": -1}, "init_blocks must be an integer of at least 0"),
    "nsa pooling": (nsa_attention, NSA_R | {"pooling": "mean"}, "pooling must be one of weighted, max"),
    "nsa own block": (nsa_attention, NSA_R | {"local_blocks": 0}, "local_blocks must be a positive integer"),
    "nsa window": (nsa_attention, NSA_R | {"window_size": -1}, "window_size must be an integer of at least 0"),
    "nsa forced": (nsa_attention, NSA_R | {"topk": 2}, "topk 2 < 3"),
    "nsa compressed": (nsa_attention, NSA_R, r"compressed_k must have shape \(1, 0, 2, 8\)"),
    "nsa stride": (nsa_attention, NSA_OK | {"kernel_stride": 24}, "multiples of kernel_stride"),
    "nsa values": (nsa_attention, NSA_OK | {"compressed_v": R}, r"compressed_v must have shape \(1, 0, 2, 8\)"),
    "nsa dtype": (nsa_attention, NSA_OK | {"compressed_k": NSA_C.float()}, "compressed_k is torch.float32"),
    "nsa gates": (nsa_attention, NSA_OK | {"gates": R}, r"gates must have shape \(1, 16, 4, 3\)"),
    "nsa two gates": (nsa_attention, NSA_TWO | {"gates": NSA_G}, r"gates must have shape \(1, 16, 4, 2\)"),
    "nsa gates' device": (nsa_attention, NSA_OK | {"gates": NSA_G.to("meta")}, "gates is on meta, q on cpu"),
    "nsa one of two": (nsa_attention, NSA_OK | {"k_window": K}, "give both k_window and v_window"),
    "nsa no window": (nsa_attention, NSA_TWO | {"k_window": K, "v_window": K}, "need window_size > 0"),
    "nsa own shape": (nsa_attention, NSA_OK | {"k_window": K, "v_window": R}, "v_window must have shape"),
    "nsa own dtype": (nsa_attention, NSA_OK | {"k_window": K.float(), "v_window": K}, "k_window is torch.float32"),
    "strides": (infllmv2_attention, {"impl": "triton", "kernel_stride": 1}, "at most 32 strides, not of 64"),
    "dense kernels": (full_attention, {"impl": "triton"}, "full_attention has no Triton kernels"),
    "cu_seqlens alone": (full_attention, {"cu_seqlens": CU([16])}, r"must be int32 \[N \+ 1\]"),
    "cu_seqlens' device": (full_attention, {"cu_seqlens": CU([0, 16]).to("meta")}, "cu_seqlens is on meta, q on cpu"),
    "chunk_query's device": (dash_attention, {"chunk_query": R.to("meta")}, "chunk_query is on meta, q on cpu"),
    "router_qk k": (dash_attention, {"chunk_query": R, "router_qk": (Q, Q)}, "router_qk k must have shape"),
    "router_qk dtype": (dash_attention, {"chunk_query": R, "router_qk": (Q, K.half())}, "router_qk k is torch.float16"),
    "two tables": (dash_attention, {"chunk_query": R, "summary_rope": 2 * (TWO_ROWS["q"][:, :, 0],)}, r"\[B, T, D\]"),
    "mass": (dash_attention, {"chunk_query": R, "prior": "mass", "return_selection": True}, "no other layer can take"),
    "index_q": (indexer_attention, {"index_q": R, "index_k": R}, "index_q must have shape"),
}  # fmt: skip


def test_alpha_is_checked_in_compiled_functions_too():
    attend = torch.compile(dash_attention, backend="aot_eager", fullgraph=True)
    for alpha in (1.01, 2.0):
        attend(**small(chunk_query=R, alpha=torch.full((4,), alpha)))
    for alpha in (0.9, torch.nan):
        with pytest.raises(RuntimeError, match=r"alpha must lie in \[1.01, 2.0\]"):
            attend(**small(chunk_query=R, alpha=torch.full((4,), alpha)))


def test_max_seqlen_is_checked_where_nobody_reads_it(monkeypatch):
    """In compiled functions, as on a GPU."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    full_attention(**small(cu_seqlens=CU([0, 9, 16]), max_seqlen=9))
    with pytest.raises(RuntimeError, match="max_seqlen is below the length of a document"):
        full_attention(**small(cu_seqlens=CU([0, 9, 16]), max_seqlen=8))


@pytest.mark.parametrize(("attention", "changes", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refusals_say_what_is_allowed(attention, changes, message):
    with pytest.raises(ValueError, match=message):
        attention(**small(**changes))


OTHERS = {
    dash_attention: {"chunk_query": R},
    infllmv2_attention: {},
    nsa_attention: NSA_R,
    indexer_attention: {"index_q": R, "index_k": R},
    sink_window_attention: {},
    oracle_attention: {},
    selected_attention: {"selection": Selection(torch.ones(1, 2, 16, 1, dtype=torch.int32), 8)},
}


@pytest.mark.parametrize("attention", OTHERS, ids=lambda attention: attention.__name__)
def test_every_function_refuses_what_dense_attention_does(attention):
    for name in ("heads", "kv shapes", "dtype of v", "device of v", "cu_seqlens end", "cu_seqlens dtype"):
        _, changes, message = REFUSALS[name]
        with pytest.raises(ValueError, match=message):
            attention(**small(**changes), **OTHERS[attention])


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((16, 8192, 9, 64), True),  # rows of a data set
        ((1, 1024, 9, 64), True),
        ((1, 8000, 9, 64), False),  # a prompt
        ((8, 8000, 9, 64), False),
        ((8, 16_300, 9, 64), True),  # so much that one pass pays
        ((1, 16_300, 32, 128), True),
    ],
)
def test_where_a_plan_for_dense_attention_pays(shape, expected):
    assert pays_for_a_plan(torch.Size(shape))
    with torch.no_grad():
        assert pays_for_a_plan(torch.Size(shape)) == expected


@pytest.fixture
def hopper(monkeypatch, tmp_path):
    """A device of its capability, and a package of FlashAttention-3's name; what a test activates ends with it."""
    pytest.importorskip("torch.nn.attention._registry")  # from PyTorch 2.11 on
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    (tmp_path / "flash_attn_interface.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    yield torch.device("cuda")
    torch.nn.attention.restore_flash_attention_impl(_raise_warn=False)
    sys.modules.pop("flash_attn_interface", None)


def test_flash_attention_3_comes_before_cudnn_once_a_program_takes_it(hopper, monkeypatch):
    q = torch.zeros(1, 8192, 8, 128, dtype=torch.bfloat16)
    assert dense_kernels(q, None)[0] == SDPBackend.CUDNN_ATTENTION
    impls = torch.nn.attention._registry._FLASH_ATTENTION_IMPLS
    monkeypatch.setitem(impls, "FA3", lambda: SimpleNamespace(remove=lambda: None))
    use_flash_attention_3(torch.device("cpu"))
    assert not flash_attention_3_is_active()
    use_flash_attention_3(hopper)
    assert flash_attention_3_is_active()
    assert dense_kernels(q, None)[0] == SDPBackend.FLASH_ATTENTION
    assert dense_kernels(q.float(), None)[0] == SDPBackend.CUDNN_ATTENTION  # which then goes on to the next


def test_a_flash_attention_3_that_pytorch_cannot_use_is_told_and_left(hopper):
    with pytest.warns(UserWarning, match="flash_attn_interface is installed, but PyTorch cannot use it"):
        use_flash_attention_3(hopper)
    assert not flash_attention_3_is_active()
