"""The protocol: every backend built from its config, inside and outside what it can do."""

import dataclasses
import importlib
import inspect
import math
import subprocess
import sys

import pytest
import torch

from dashattn import dash_attention, full_attention, infllmv2_attention, nsa_attention
from dashattn.backends import (
    BACKENDS,
    AttentionShape,
    DashConfig,
    FullConfig,
    HeadShare,
    IndexerConfig,
    InfLLMv2Config,
    NSAConfig,
    OracleConfig,
    SinkWindowConfig,
    build_backend,
    build_backends,
)
from dashattn.controls import oracle_attention, sink_window_attention
from dashattn.indexer import IndexerOutput, indexer_attention
from dashattn.ops.dash_routing.reference import dash_routing, select_chunks
from dashattn.rope import apply_rope

SHAPE = AttentionShape(hidden_size=24, num_heads=6, num_kv_heads=2, head_dim=8)
SMALL = {"block_size": 8, "kernel_size": 4, "kernel_stride": 2}
CONFIGS = {
    "full": FullConfig(),
    "dash": DashConfig(chunk_size=8, router_scale=2.0, prior="raw"),
    "dash rope": DashConfig(chunk_size=8, summary_rope="mean", alpha_mode="learnable", sigma=1.0),
    "dash unrotated": DashConfig(chunk_size=8, router_scale=2.0, prior="raw", summary_keys="unrotated"),
    "dash sink": DashConfig(chunk_size=8, router_scale=2.0, prior="raw", init_chunks=1, local_chunks=1),
    "dash topk": DashConfig(chunk_size=8, selector="topk", topk=4, prior="raw", init_chunks=1),
    "dash topp": DashConfig(chunk_size=8, selector="topp", top_p=0.7, sigma=1.0, local_chunks=1),
    "hils": DashConfig(chunk_size=8, router_scale=1.5, selector="topk", topk=4, prior="mass", local_chunks=1),
    "moba": DashConfig(chunk_size=8, selector="topk", topk=4, prior="none", learn_summary=False),
    "infllmv2": InfLLMv2Config(**SMALL, topk=4, window_size=8),
    "nsa": NSAConfig(**SMALL, topk=4, window_size=12),
    "nsa own kv": NSAConfig(**SMALL, topk=4, window_size=12, shared_kv=False),
    "nsa minicpm": NSAConfig(**SMALL, topk=4, window_size=0, local_blocks=2, variant="minicpm"),
    "indexer": IndexerConfig(block_size=8, index_size=6, topk=4, local_blocks=0),
    "indexer mean topp": IndexerConfig(block_size=8, index_size=6, index_pooling="mean", selector="topp", top_p=0.6),
    "indexer prior": IndexerConfig(block_size=8, index_size=6, topk=4, gradient="prior"),
    "sink window": SinkWindowConfig(block_size=8, init_blocks=1, local_blocks=2),
    "oracle topk": OracleConfig(block_size=8, topk=4, init_blocks=1, local_blocks=1),
    "oracle top_p": OracleConfig(block_size=8, select="top_p", top_p=0.7, init_blocks=1, local_blocks=1),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def make_inputs(length, batch=1, dtype=torch.float64):
    q, k, v = (torch.randn(batch, length, heads, SHAPE.head_dim, dtype=dtype) for heads in (6, 2, 2))
    angles = (torch.arange(length)[:, None] / torch.tensor([1.0, 3.0, 10.0, 30.0])).repeat(1, 2).to(dtype)
    return (q, k, v), {
        "hidden": torch.randn(batch, length, SHAPE.hidden_size, dtype=dtype),
        "rope": (angles.cos(), angles.sin()),
    }


def build(config, shape=SHAPE):
    backend = build_backend(config, shape).double()
    for parameter in backend.parameters():  # away from the zero initialisations, which would hide a gradient
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return backend


@each_config
def test_gradcheck_of_inputs_and_parameters(config):
    backend = build(config)
    (q, k, v), extra = make_inputs(27)
    names = [name for name, _ in backend.named_parameters()]

    def fn(q, k, v, hidden, *parameters):
        options = {"hidden": hidden, "rope": extra["rope"]}
        return torch.func.functional_call(backend, dict(zip(names, parameters, strict=True)), (q, k, v), options)

    inputs = [x.detach().requires_grad_() for x in (q, k, v, extra["hidden"], *backend.parameters())]
    assert torch.autograd.gradcheck(fn, inputs, fast_mode=True, atol=1e-6)


@each_config
def test_every_parameter_gets_a_gradient(config):
    backend = build(config)
    qkv, extra = make_inputs(40)
    out, loss = backend.forward_with_loss(*(x.requires_grad_() for x in qkv), **extra)
    (out.square().sum() + (0 if loss is None else loss)).backward()
    for name, parameter in backend.named_parameters():
        assert parameter.requires_grad == getattr(config, "learn_summary", True), name
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


@each_config
def test_packed_equals_separate_and_causal(config):
    backend = build(config)
    qkv, extra = make_inputs(46)
    cu_seqlens = torch.tensor([0, 3, 30, 46], dtype=torch.int32)
    packed, packed_stats = backend(*qkv, **extra, cu_seqlens=cu_seqlens, return_stats=True)
    for start, end in ((0, 3), (3, 30), (30, 46)):
        document = slice(start, end)
        alone, stats = backend(
            *(x[:, document] for x in qkv),
            hidden=extra["hidden"][:, document],
            rope=tuple(table[document] for table in extra["rope"]),
            return_stats=True,
        )
        torch.testing.assert_close(packed[:, document], alone, rtol=0, atol=1e-12)
        for count in ("active_tokens", "positions", "routing_reads"):
            assert torch.equal(getattr(packed_stats, count)[:, document], getattr(stats, count)), count
            assert getattr(stats, count).dtype == getattr(packed_stats, count).dtype == torch.int32, count
        prefix = backend(
            *(x[:, : end - 1] for x in qkv),
            hidden=extra["hidden"][:, : end - 1],
            rope=tuple(table[: end - 1] for table in extra["rope"]),
        )
        whole = backend(*qkv, **extra)
        torch.testing.assert_close(whole[:, : end - 1], prefix, rtol=0, atol=1e-12)


@each_config
def test_all_is_made_on_the_device_of_the_inputs(config):
    """And nothing on the default one, which computes nothing here."""
    backend, cu_seqlens = build(config), torch.tensor([0, 3, 30, 46], dtype=torch.int32)
    qkv, extra = make_inputs(46)
    with torch.device("meta"):
        (out, stats), loss = backend.forward_with_loss(*qkv, **extra, cu_seqlens=cu_seqlens, return_stats=True)
        made = [out, stats.active_tokens, stats.positions, stats.routing_reads, loss]
        routing = backend.route(*qkv, **extra)
        made += [] if routing is None else [routing.selection.words, routing.probabilities, routing.logits]
        cache = backend.new_cache(2, 46, dtype=torch.float64, device="cpu")
        for part in (slice(0, 20), slice(20, 21), slice(21, 24)):
            new = {"hidden": extra["hidden"][:, part].expand(2, -1, -1)}
            new["rope"] = tuple(table[part] for table in extra["rope"])
            made.append(backend.decode(*(x[:, part].expand(2, -1, -1, -1) for x in qkv), cache.layers[0], **new))
            cache.advance(part.stop - part.start)
        cache.truncate([5, 7])
        cache.reorder([1, 0])
        selected = cache.select([0, 0, 1])
        made += [cache.lengths, selected.lengths, *cache.layers[0].tensors.values(), *backend.parameters()]
    assert {x.device.type for x in made if x is not None} == {"cpu"}
    assert selected.lengths.tolist() == [7, 7, 5]


class SecondGroup(HeadShare):
    """The second of the two KV heads and its three query heads, where nothing has to be gathered."""

    query_heads, kv_heads = slice(3, 6), slice(1, 2)

    def gather(self, x):
        return x[:, :, self.kv_heads if x.shape[2] == SHAPE.num_kv_heads else self.query_heads]


@each_config
def test_a_share_of_the_heads_gives_their_part_of_the_output(config):
    backend, share = build(config), SecondGroup()
    qkv, extra = make_inputs(46)
    expected, expected_stats = backend(*qkv, **extra, return_stats=True)
    out, stats = backend(*(share.gather(x) for x in qkv), **extra, share=share, return_stats=True)
    torch.testing.assert_close(out, expected[:, :, 3:], rtol=0, atol=1e-12)
    assert torch.equal(stats.active_tokens, expected_stats.active_tokens[..., 1:])


@each_config
def test_short_sequences(config):
    backend = build(config)
    for length in (1, 2, 7, 8, 9):
        qkv, extra = make_inputs(length, batch=2)
        out, stats = backend(*qkv, **extra, return_stats=True)
        assert out.isfinite().all()
        assert stats.active_tokens.shape == (2, length, 2)


@pytest.mark.parametrize("options", [{"summary_rope": "mean"}, {"summary_keys": "unrotated"}], ids=str)
def test_the_router_is_translation_invariant(options):
    """Moving a document changes nothing when r is rotated with its chunk, or when nothing that the router sees is."""
    torch.manual_seed(1)
    backend = build(DashConfig(chunk_size=8, router_scale=3.0, prior="raw", **options))
    raw_q, raw_k, v = (torch.randn(1, 40, heads, 8, dtype=torch.float64) for heads in (6, 2, 2))
    frequencies = torch.tensor([1.0, 0.3, 0.1, 0.03], dtype=torch.float64)

    def attend(offset):
        angles = ((torch.arange(40) + offset)[:, None] * frequencies).repeat(1, 2)
        rope = (angles.cos(), angles.sin())
        return backend(apply_rope(raw_q, *rope), apply_rope(raw_k, *rope), v, rope=rope)

    torch.testing.assert_close(attend(0), attend(1000), rtol=0, atol=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 1.3])
def test_unrotated_summary_keys_are_those_before_rope(temperature):
    """``temperature``: of tables that scale, too."""
    backend = build(DashConfig(chunk_size=8, router_scale=3.0, prior="raw", summary_keys="unrotated"))
    (q, k, v), extra = make_inputs(46)
    rope = tuple(temperature * table for table in extra["rope"])
    options = dict(chunk_size=8, router_scale=3.0, prior="raw", router_qk=(q, k), return_stats=True)
    turned = [apply_rope(x, *rope) for x in (q, k)]
    expected, expected_stats = dash_attention(*turned, v, backend.chunk_query, **options)
    out, stats = backend(*turned, v, rope=rope, return_stats=True)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    assert torch.equal(stats.active_tokens, expected_stats.active_tokens)
    _, rotated = dash_attention(*turned, v, backend.chunk_query, **options | {"router_qk": None})
    assert not torch.equal(stats.active_tokens, rotated.active_tokens)


def test_unrotated_summary_keys_refuse_what_needs_rotated_ones():
    with pytest.raises(ValueError, match="set summary_rope=none or summary_keys=rotated"):
        DashConfig(summary_keys="unrotated", summary_rope="mean")
    backend = build(DashConfig(chunk_size=8, summary_keys="unrotated"))
    (q, k, v), _ = make_inputs(9)
    with pytest.raises(ValueError, match=r"pass rope=\(cos, sin\)"):
        backend(q, k, v)


OPTIONS = {
    "dash": DashConfig(
        impl="reference",
        chunk_size=4,
        selector="topk",
        alpha=1.7,
        router_scale=2.0,
        topk=9,
        top_p=0.5,
        prior="raw",
        sigma=3.0,
        prior_heads="head",
        init_chunks=1,
        local_chunks=2,
    ),
    "infllmv2": InfLLMv2Config(impl="reference", **SMALL, topk=5, init_blocks=2, window_size=16),
    "nsa": NSAConfig(impl="reference", **SMALL, topk=7, init_blocks=3, local_blocks=4, window_size=12),
    "indexer": IndexerConfig(
        impl="reference",
        block_size=8,
        index_size=6,
        index_pooling="mean",
        selector="topp",
        topk=9,
        top_p=0.5,
        init_blocks=2,
        local_blocks=3,
    ),
    "full": FullConfig(impl="reference"),
    "sink_window": SinkWindowConfig(impl="reference", block_size=8, init_blocks=2, local_blocks=3),
    "oracle": OracleConfig(
        impl="reference", block_size=8, select="top_p", topk=9, top_p=0.5, init_blocks=2, local_blocks=3
    ),
}
CONTROLS = ("sink_window", "oracle")


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_reaches_the_function(name, monkeypatch):
    module = importlib.import_module(f"dashattn.backends.{'controls' if name in CONTROLS else name}")
    options = inspect.signature(getattr(module, f"{name}_attention")).parameters.values()
    given = {}
    found = IndexerOutput(*range(4))
    monkeypatch.setattr(module, f"{name}_attention", lambda *args, **kwargs: given.update(kwargs) or found)
    qkv, extra = make_inputs(9)
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32)
    build(OPTIONS[name])(*qkv, **extra, cu_seqlens=cu_seqlens, return_stats=True)
    assert given["cu_seqlens"] is cu_seqlens
    assert given["return_stats"]
    assert given.keys() == {o.name for o in options if o.kind is o.KEYWORD_ONLY} - {"scale"}
    fields = {field.name for field in dataclasses.fields(OPTIONS[name])} - {"summary_rope"}
    for option in given.keys() & fields:
        assert given[option] == getattr(OPTIONS[name], option), option
        if option not in ("impl", "gradient"):
            assert given[option] != getattr(type(OPTIONS[name])(), option), f"{option} is tested at its default"


@pytest.mark.parametrize(
    ("config", "function"),
    [
        (DashConfig, dash_attention),
        (InfLLMv2Config, infllmv2_attention),
        (NSAConfig, nsa_attention),
        (IndexerConfig, indexer_attention),
        (SinkWindowConfig, sink_window_attention),
        (OracleConfig, oracle_attention),
    ],
)
def test_a_function_and_its_config_have_the_same_defaults(config, function):
    parameters = inspect.signature(function).parameters.values()
    options = {o.name: o.default for o in parameters if o.default is not o.empty and o.name != "summary_rope"}
    shared = {field.name: field.default for field in dataclasses.fields(config) if field.name in options}
    assert shared == {name: options[name] for name in shared}
    assert {config.knob if isinstance(config.knob, str) else config().knob, config.blocks} <= shared.keys()
    calls = {"scale": None, "cu_seqlens": None, "return_stats": False, "return_selection": False, "return_kl": False}
    assert {name: options[name] for name in calls.keys() & options.keys()}.items() <= calls.items()


def test_what_dash_attention_is_made_of_has_its_defaults():
    public = inspect.signature(dash_attention).parameters
    for function in (dash_routing, select_chunks):
        for name, option in inspect.signature(function).parameters.items():
            assert option.default in (option.empty, public[name].default if name in public else None), name


def test_samples_are_what_their_names_say_and_sparse():
    """At blocks of 32, so that at a thousand tokens something is left out."""
    q, k, v, hidden = (torch.randn(1, 640, *shape) for shape in ((2, 8), (1, 8), (1, 8), (8,)))
    for kind, _ in BACKENDS.own.values():
        for name, sample in kind.samples().items():
            if sample.blocks is None:
                continue
            assert getattr(sample, sample.blocks) == 32
            said = {*vars(sample).values(), "sink" if getattr(sample, "init_chunks", 0) else "no sink"}
            assert {"mass" if word == "hils" else word for word in name.split(", ")} <= said, name
            stats = build_backend(sample, AttentionShape(8, 2, 1, 8))(q, k, v, hidden=hidden, return_stats=True)[1]
            assert stats.causal_sparsity() > 0.01, name


def test_own_keys_of_nsa_are_rotated():
    """Moving a document moves nothing: every branch scores with rotated queries and rotated keys."""
    backend = build(CONFIGS["nsa own kv"])
    for compress in (backend.compress_k, backend.compress_v):  # a mean of rotated keys turns with the document
        torch.nn.init.zeros_(compress.down.weight)
        torch.nn.init.zeros_(compress.down.bias)
    (raw_q, raw_k, v), extra = make_inputs(40)
    frequencies = torch.tensor([1.0, 0.3, 0.1, 0.03], dtype=torch.float64)

    def attend(offset):
        angles = ((torch.arange(40) + offset)[:, None] * frequencies).repeat(1, 2)
        rope = (angles.cos(), angles.sin())
        return backend(apply_rope(raw_q, *rope), apply_rope(raw_k, *rope), v, hidden=extra["hidden"], rope=rope)

    torch.testing.assert_close(attend(0), attend(1000), rtol=0, atol=1e-9)


def test_fresh_backends_start_as_mean_pooling():
    """What lets a dense model continue: zero chunk queries, and NSA's compression a plain mean."""
    assert (build_backend(CONFIGS["dash"], SHAPE).chunk_query == 0).all()
    k = torch.randn(1, 40, 2, 8)
    windows = k.unfold(1, 4, 2).movedim(-1, 2)
    compress = build_backend(CONFIGS["nsa"], SHAPE).compress_k
    torch.testing.assert_close(compress(windows), windows.mean(2))
    for name in ("nsa", "nsa own kv", "nsa minicpm"):
        assert (build_backend(CONFIGS[name], SHAPE).gate.bias == 0).all()
    index = build_backend(CONFIGS["indexer"], AttentionShape(256, 6, 2, 8))
    own = build_backend(CONFIGS["nsa own kv"], SHAPE).branch_kv
    for projection in (own, index.index_query, index.index_key):
        assert projection.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_a_chunk_query_that_no_gradient_reaches_is_not_trained():
    configs = (DashConfig(), DashConfig(prior="none"), DashConfig(learn_summary=False), DashConfig(prior="mass"))
    assert [build_backend(c, SHAPE).chunk_query.requires_grad for c in configs] == [True, False, False, True]


def test_paper_compression_by_hand():
    """Each token of a window gets the embedding of its own place."""
    compress = build(CONFIGS["nsa"]).compress_k
    windows = torch.randn(1, 5, 4, 2, 8, dtype=torch.float64)
    tokens = torch.cat([windows[0, 3, place, 1] + compress.position[place] for place in range(4)])
    expected = windows[0, 3, :, 1].mean(0) + compress.down(torch.nn.functional.silu(compress.up(tokens)))
    torch.testing.assert_close(compress(windows)[0, 3, 1], expected)


def test_minicpm_compression_by_hand():
    """Per channel: 2 l numbers, keys before values, through 128 rectified units to a key and a value."""
    compress = build(CONFIGS["nsa minicpm"]).compress
    k, v = torch.randn(2, 1, 5, 4, 2, 8, dtype=torch.float64)
    key, value = compress(k, v).unbind(-1)
    hidden = compress.up.weight @ torch.cat([k[0, 3, :, 1, 6], v[0, 3, :, 1, 6]]) + compress.up.bias
    expected = compress.down.weight @ hidden.clamp_min(0) + compress.down.bias
    torch.testing.assert_close(torch.stack((key[0, 3, 1, 6], value[0, 3, 1, 6])), expected)
    assert compress.up.weight.shape == (128, 8)


def test_minicpm_pools_by_maximum():
    assert (CONFIGS["nsa"].pooling, CONFIGS["nsa minicpm"].pooling) == ("weighted", "max")


def test_learnable_alpha_stays_where_entmax_is_defined():
    backend = build_backend(DashConfig(alpha_mode="learnable"), SHAPE)
    torch.nn.init.constant_(backend.alpha_logit, -20.0)
    assert backend.alpha().tolist() == pytest.approx([1.01] * 6)


def test_minicpm_below_one_window_gates_dense_attention():
    backend = build(CONFIGS["nsa minicpm"])
    (q, k, v), extra = make_inputs(3)
    gate = backend.gate(q).sigmoid()[..., 1:]
    torch.testing.assert_close(backend(q, k, v, **extra), gate * full_attention(q, k, v), rtol=0, atol=1e-12)


def test_alpha_schedule_is_a_function_of_the_step():
    backend = build_backend(DashConfig(alpha_mode="scheduled", alpha_start=1.25, alpha=1.5, alpha_steps=100), SHAPE)
    expected = {0: 1.25, 50: 1.375, 100: 1.5, 1000: 1.5}
    for step in (50, 0, 1000, 100):
        backend.set_step(step)
        assert backend.metrics()["alpha"] == pytest.approx(expected[step])


def test_learnable_alpha_starts_at_alpha():
    backend = build_backend(DashConfig(alpha_mode="learnable", alpha=1.3), SHAPE)
    assert backend.alpha().tolist() == pytest.approx([1.3] * 6)
    assert backend.bfloat16().alpha().dtype == torch.float32


def test_knobs():
    dash = build_backend(DashConfig(), SHAPE)
    dash.set_knob(4)
    assert dash.config.router_scale == 4.0
    infllm = build_backend(InfLLMv2Config(), SHAPE)
    infllm.set_knob(20)
    assert infllm.config.topk == 20
    with pytest.raises(ValueError, match="shrink window_size"):
        infllm.set_knob(3)
    for value in (20.5, math.nan, math.inf):
        with pytest.raises(ValueError, match="topk must be an integer"):
            infllm.set_knob(value)
        with pytest.raises(ValueError, match="router_scale must be a positive finite number"):
            dash.set_knob(-value)
    with pytest.raises(ValueError, match="no sparsity knob"):
        build_backend(FullConfig(), SHAPE).set_knob(1)


@pytest.mark.parametrize("length", [1, 7, 8, 27, 64, 70])
@pytest.mark.parametrize(
    "config",
    [
        DashConfig(chunk_size=8),
        DashConfig(chunk_size=8, init_chunks=1),
        DashConfig(chunk_size=8, init_chunks=2, local_chunks=1),
        DashConfig(chunk_size=8, selector="topk", init_chunks=1, local_chunks=1),
        DashConfig(chunk_size=8, selector="topp", init_chunks=1),
        InfLLMv2Config(**SMALL, topk=9, window_size=16, init_blocks=2),
        InfLLMv2Config(**SMALL, topk=9, window_size=0, init_blocks=0),
        NSAConfig(**SMALL, topk=9, window_size=12, local_blocks=1),
        NSAConfig(**SMALL, topk=9, window_size=40, init_blocks=0),
        IndexerConfig(block_size=8, index_size=6, topk=9),
        IndexerConfig(block_size=8, index_size=6, selector="topp", init_blocks=0, local_blocks=2),
        SinkWindowConfig(block_size=8, init_blocks=2, local_blocks=1),
        OracleConfig(block_size=8, topk=9, init_blocks=1, local_blocks=1),
        OracleConfig(block_size=8, select="top_p", init_blocks=0, local_blocks=2),
    ],
    ids=lambda config: f"{config.name}-{getattr(config, 'window_size', config.knob)}",
)
def test_the_sparsest_knob_reads_the_fewest_keys_and_the_densest_all(config, length):
    """One query head a group, so that DashAttention's can have one chunk."""
    backend = build_backend(config, AttentionShape(16, 2, 2, 8)).double()
    q, k, v, hidden = (torch.randn(1, length, *shape, dtype=torch.float64) for shape in ((2, 8),) * 3 + ((16,),))
    read = []
    for knob in config.knob_span(length):
        backend.set_knob(knob)
        stats = backend(q, k, v, hidden=hidden, return_stats=True)[1]
        read.append(stats.active_tokens[0].T.long())
    least = config.least_active(length)
    assert (read[-1] == least).all()
    assert (read[0] == torch.arange(1, length + 1)).all()
    assert config.most_sparsity(length, "causal") == pytest.approx(stats.causal_sparsity().item(), abs=1e-6)
    assert config.sure_sparsity(length, "causal", group=1) == config.most_sparsity(length, "causal")


@pytest.mark.parametrize("selector", ["entmax", "topk", "topp"])
@pytest.mark.parametrize("opposed", [False, True])
def test_what_is_surely_reached_is_reached_however_the_heads_of_a_group_choose(selector, opposed):
    """Three heads that choose alike, or each among other chunks: with entmax alone their choices add up."""
    length, size = 70, 8
    config = DashConfig(chunk_size=size, selector=selector, init_chunks=1, local_chunks=1)
    backend = build_backend(config, AttentionShape(18, 3, 1, 6)).double()
    backend.set_knob(config.knob_span(length)[1])
    tokens = torch.arange(length)
    k = torch.rand(1, length, 1, 6, dtype=torch.float64)
    k[0, tokens, 0, tokens // size % 3] += 5 + tokens // size  # each chunk is the best one in a channel so far
    q = torch.zeros(1, length, 3, 6, dtype=torch.float64)
    q[0, :, range(3), range(3) if opposed else 0] = 1.0
    stats = backend(q, k, k, return_stats=True)[1]
    if opposed and selector == "entmax":
        active, sparsity = config.sparsest_active(length, group=3), config.sure_sparsity(length, "causal", group=3)
        assert sparsity < config.most_sparsity(length, "causal") - 0.1
    else:
        active, sparsity = config.least_active(length), config.most_sparsity(length, "causal")
    assert stats.active_tokens[0, :, 0].equal(active.int())
    assert stats.causal_sparsity().item() == pytest.approx(sparsity, abs=1e-6)
    assert selector == "entmax" or config.sparsest_active(length, group=3).equal(config.least_active(length))


@pytest.mark.parametrize(
    ("selector", "name", "knobs"),
    [("entmax", "router_scale", (0.7, 3.0)), ("topk", "topk", (2, 4)), ("topp", "top_p", (0.3, 0.9))],
)
def test_a_knob_that_moves_is_the_same_as_a_number(selector, name, knobs):
    number, moving = (
        build_backend(DashConfig(chunk_size=8, selector=selector, prior="raw", target_sparsity=target), SHAPE).double()
        for target in (None, 0.5)
    )
    assert moving.config.knob == name
    (q, k, v), _ = make_inputs(40)
    outs = []
    for knob in knobs:
        for backend in (number, moving):
            backend.set_knob(knob)
        assert getattr(moving.config, name) == knob
        outs.append(number(q, k, v))
        assert torch.equal(outs[-1], moving(q, k, v))
    assert not torch.equal(*outs)


@pytest.mark.parametrize(
    "scale",
    [
        *(torch.ones(2, dtype=torch.float64), torch.ones(()), torch.ones((), dtype=torch.float64, device="meta")),
        *(torch.tensor(value, dtype=torch.float64) for value in (0.0, -1.0, float("nan"), float("inf"))),
    ],
)
def test_a_router_scale_of_another_kind_is_refused(scale):
    q = torch.randn(1, 20, 2, 8)
    with pytest.raises(ValueError, match=r"float64 \[\] on the CPU|router_scale must be a positive finite number"):
        dash_attention(q, q, q, torch.zeros(2, 8), router_scale=scale)


@pytest.mark.parametrize(
    ("target", "control", "controls", "holds"),
    [
        (None, "hold", False, False),
        (0.5, "hold", True, True),
        (0.5, "start", True, False),
        (0.5, "none", False, False),
        (0.0, "hold", True, True),
    ],
)
def test_when_training_turns_the_knob(target, control, controls, holds):
    config = DashConfig(target_sparsity=target, sparsity_control=control)
    assert (config.controls_sparsity, config.holds_sparsity) == (controls, holds)
    assert isinstance(build_backend(config, SHAPE).knobs["router_scale"], torch.Tensor) == holds


@pytest.mark.parametrize("target", [-0.1, 1.0, 75, float("nan"), float("inf"), True])
def test_a_target_is_a_share_of_the_keys(target):
    with pytest.raises(ValueError, match=r"target_sparsity must be a share of the keys in \[0, 1\)"):
        DashConfig(target_sparsity=target)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DashConfig(sparsity_count="dense"), "sparsity_count must be one of causal, paper"),
        (lambda: DashConfig(sparsity_control="yes"), "sparsity_control must be one of hold, start, none"),
        (lambda: FullConfig(target_sparsity=0.5), "no sparsity knob: set attention.target_sparsity=null"),
        (lambda: DashConfig(impl="cuda"), "attention.impl must be one of"),
        (lambda: DashConfig(selector="top-k"), "selector must be one of entmax, topk, topp"),
        (lambda: DashConfig(selector="topk", topk=2, init_chunks=1, local_chunks=1), "raise topk or lower init_chunks"),
        (lambda: DashConfig(selector="topp", alpha_mode="learnable"), "set alpha_mode=fixed"),
        (lambda: DashConfig(prior="mass", prior_heads="head"), "set prior_heads=group"),
        (lambda: DashConfig(alpha=3.0), r"alpha must be in \[1\.01, 2"),
        (lambda: DashConfig(alpha_mode="scheduled"), "needs alpha_steps > 0"),
        (lambda: DashConfig(alpha_mode="learnable", alpha=2.0), "strictly between"),
        (lambda: DashConfig(alpha_mode="learnable", prior="none"), "set prior=raw or tempered"),
        (lambda: DashConfig(summary_rope="max"), "none, mean"),
        (lambda: InfLLMv2Config(topk=10), "shrink window_size"),
        (lambda: NSAConfig(variant="minicpm"), "set window_size=0"),
        (lambda: NSAConfig(variant="minicpm", window_size=0, shared_kv=False), "shared_kv=true.*got.*shared_kv=False"),
        (lambda: NSAConfig(window_size=0), "window_size > 0"),
        (lambda: build_backend(FullConfig(name="dash"), SHAPE), "with its own config"),
        (lambda: build_backend(FullConfig(), AttentionShape(8, 33, 1, 8)), "raise num_kv_heads"),
        (lambda: build_backend(FullConfig(), AttentionShape(8, 3, 2, 8)), "multiple of num_kv_heads"),
        (lambda: build_backend(FullConfig(), AttentionShape(8, 2, 2, 512)), "head sizes up to 256"),
        (lambda: build(CONFIGS["nsa"])(*make_inputs(9)[0]), "pass hidden"),
        (lambda: build(CONFIGS["indexer"])(*make_inputs(9)[0]), "indexer makes its index of hidden: pass hidden"),
        (lambda: build(CONFIGS["dash rope"])(*make_inputs(9)[0]), "pass rope"),
        (lambda: build(CONFIGS["nsa own kv"])(*make_inputs(9)[0], hidden=make_inputs(9)[1]["hidden"]), "pass rope"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_largest_model_that_a_backend_serves():
    build_backend(FullConfig(), AttentionShape(8, 32, 1, 256))
    for shape, message in (((8, 2, 2, 258), "head sizes up to 256; got 258"), ((8, 2, 2, 63), "even head sizes")):
        with pytest.raises(ValueError, match=message):
            build_backend(FullConfig(), AttentionShape(*shape))


def test_what_runs_in_pytorch_is_told():
    told = {name: build(config).capabilities.in_pytorch for name, config in CONFIGS.items()}
    assert told["hils"].endswith("all of decoding")
    assert {name for name, what in told.items() if what} == {"hils", *(n for n in CONFIGS if n.startswith("indexer"))}


def test_what_a_plan_is_told_of_reads_and_memory_by_hand():
    """Of rows of 64 tokens in float32; eight blocks of 8, two KV heads and six query heads of 8 channels."""
    per_read, scored = {"nsa": 2 * 16, "indexer": 6}, {"infllmv2": 65 / 4, "nsa": 65 / 4}
    for name, config in CONFIGS.items():
        backend = build(config)
        assert backend.numbers_read(20.0, 3.0) == 2 * 16 * 20 + per_read.get(config.name, 16) * 3, name
        unscored = config.name in ("full", "sink_window", "oracle")
        assert backend.summaries_scored(64) == (0 if unscored else scored.get(config.name, 65 / 16)), name
    _, taking = build_backends(
        dataclasses.replace(CONFIGS["dash"], layers={"1": {"share_selection_from": 0}}), SHAPE, 2
    )
    assert taking.summaries_scored(64) == 0
    lists = build(CONFIGS["infllmv2"]).scratch_bytes(64, 4)
    dash = DashConfig(chunk_size=8)
    bias = {"none": 0, "tempered": 1, "raw": 2}
    more = {build(dataclasses.replace(dash, prior=prior)).scratch_bytes(64, 4) - lists: n for prior, n in bias.items()}
    assert more == {4 * 2 * 8 * n: n for n in bias.values()}
    assert build(dataclasses.replace(dash, sigma=1.0)).scratch_bytes(64, 4) - lists == 4 * 2 * 8 * 2
    assert build(CONFIGS["hils"]).scratch_bytes(64, 4) - lists == 8 * 6 * 8
    assert (build(FullConfig()).scratch_bytes(64, 4), build(FullConfig()).kept_bytes(64, 4)) == (0, 4 * 6)
    index = build(CONFIGS["indexer"]).kept_bytes(64, 4)
    assert index == 4 * 6 + 4 * 2 + (2 + 1) * 6 * 4 + 2 * (4 * 2 * 8), "bits of the blocks, the index, scores and p"
    assert InfLLMv2Config.at_block_size(48).window_size == 1008
    assert build(CONFIGS["dash topk"]).metrics() == {}


def test_registry_names_agree():
    for name, (config, _) in BACKENDS.items():
        assert config().name == name


def test_import_needs_no_triton_and_changes_nothing():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; before = (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),"
        " torch.backends.cuda.matmul.allow_tf32)\n"
        "import dashattn, dashattn.backends\n"
        "assert before == (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),"
        " torch.backends.cuda.matmul.allow_tf32)\n"
        "assert not any(m.split('.')[0] in ('models', 'data', 'experiments', 'hydra') for m in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
