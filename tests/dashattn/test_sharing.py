"""Attention to a selection that was made for other queries and keys."""

from dataclasses import asdict, replace

import numpy as np
import oracle
import pytest
import torch
from test_backends import CONFIGS as ALL_CONFIGS
from test_backends import SHAPE, SecondGroup, build, make_inputs

from dashattn.backends import SharingBackend
from dashattn.selected import selected_attention
from dashattn.selection import Selection

CONFIGS = {name: config for name, config in ALL_CONFIGS.items() if name.startswith(("infllmv2", "indexer"))}
# Scales at which something is left out, and more than one chunk is chosen.
CONFIGS |= {name: replace(config, router_scale=8.0) for name, config in ALL_CONFIGS.items() if name.startswith("dash")}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def make(config, length=46):
    """A router's backend and one that takes from it, with inputs of each, the second's without ``hidden``."""
    (first, options), (second, _) = make_inputs(length), make_inputs(length)
    return build(config), SharingBackend(config, SHAPE, source=0), first, second, options


@each_config
def test_it_equals_the_definition_of_block_sparse_attention(config):
    router, sharing, first, second, options = make(config)
    _, taken = router(*first, **options, return_selection=True)
    out, stats = sharing(*second, taken=taken, return_stats=True)
    mask = Selection(taken.words, 8).mask()[0]
    blocks = [[set(heads.nonzero().flatten().tolist()) for heads in token] for token in mask]

    def bias(t, head, block):
        return 0.0 if taken.bias is None else taken.bias[0, t, head // SHAPE.group_size, block].item()

    expected = oracle.block_sparse(*(x[0].numpy() for x in second), blocks, bias, 8, SHAPE.head_dim**-0.5)
    np.testing.assert_allclose(out[0].detach().numpy(), expected, rtol=0, atol=1e-10)
    _, router_stats = router(*first, **options, return_stats=True)
    assert torch.equal(stats.active_tokens, router_stats.active_tokens)
    assert not stats.routing_reads.any()
    assert stats.routing_reads.dtype == torch.int32
    assert stats.causal_sparsity() > 0
    reads, scaled = torch.arange(46, dtype=torch.int32)[None], {"scale": SHAPE.head_dim**-0.5 / 2, "return_stats": True}
    chosen = Selection(taken.words, 8), taken.bias
    again, stats = selected_attention(2 * second[0], *second[1:], *chosen, routing_reads=reads, **scaled)
    torch.testing.assert_close(again, out, rtol=0, atol=1e-12)
    assert stats.routing_reads is reads


@pytest.mark.parametrize("name", ["dash", "dash sink", "dash topk", "dash topp"])
def test_it_equals_dash_attention_with_a_query_and_keys_of_the_routers_own(name):
    """Token by token, from the definition of the prior, without the router's code."""
    config = CONFIGS[name]
    router, sharing, first, second, _ = make(config)
    _, taken = router(*first, return_selection=True)
    names = ("chunk_size", "router_scale", "prior", "sigma", "prior_heads", "selector", "alpha", "init_chunks")
    given = {option: asdict(config)[option] for option in (*names, "local_chunks")}
    given |= {key: getattr(config, key) if config.knob == key else None for key in ("topk", "top_p")}
    r = router.chunk_query.detach().numpy()
    qkv, (router_q, router_k, _) = ([x[0].numpy() for x in part] for part in (second, first))
    expected, active = oracle.dash(*qkv, r, **given, router_qk=(router_q, router_k))
    out, stats = sharing(*second, taken=taken, return_stats=True)
    np.testing.assert_allclose(out[0].detach().numpy(), expected, rtol=0, atol=1e-9)
    np.testing.assert_array_equal(stats.active_tokens[0].numpy(), active)


@each_config
def test_asking_for_the_selection_changes_nothing(config):
    router, _, first, _, options = make(config)
    (out, stats), taken = router(*first, **options, return_stats=True, return_selection=True)
    expected, expected_stats = router(*first, **options, return_stats=True)
    assert torch.equal(out, expected)
    assert torch.equal(stats.active_tokens, expected_stats.active_tokens)
    assert taken.words.shape[:3] == (1, 2, 46)


@each_config
def test_gradcheck_through_the_router_and_what_takes_from_it(config):
    router, sharing, first, second, options = make(config)
    names = [name for name, _ in router.named_parameters()]

    def fn(*tensors):
        parameters = dict(zip(names, tensors[7:], strict=True))
        inputs = options | {"hidden": tensors[6], "return_selection": True}
        _, taken = torch.func.functional_call(router, parameters, tensors[:3], inputs)
        return sharing(*tensors[3:6], taken=taken)

    inputs = [x.detach().requires_grad_() for x in (*first, *second, options["hidden"], *router.parameters())]
    assert torch.autograd.gradcheck(fn, inputs, fast_mode=True, atol=1e-6)
    learns = any(x.any() for x in torch.autograd.grad(fn(*inputs).sum(), inputs[:2], materialize_grads=True))
    assert learns == (router.config.name == "dash")  # an index learns by its own projections


@each_config
def test_a_share_of_the_heads_takes_their_part(config):
    router, sharing, first, second, options = make(config)
    share = SecondGroup()
    _, whole = router(*first, **options, return_selection=True)
    _, part = router(*(share.gather(x) for x in first), **options, share=share, return_selection=True)
    expected = sharing(*second, taken=whole)[:, :, 3:]
    out = sharing(*(share.gather(x) for x in second), taken=part, share=share)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_priors_of_heads_which_no_kernel_takes_are_taken_over_without():
    config = replace(CONFIGS["dash"], prior_heads="head")
    router, sharing, first, second, options = make(config)
    _, taken = router(*first, **options, return_selection=True)
    by_kernel = SharingBackend(replace(config, impl="triton"), SHAPE, source=0)
    assert torch.equal(by_kernel(*second, taken=taken), sharing(*second, taken=taken))
    assert SharingBackend(replace(CONFIGS["dash"], impl="triton"), SHAPE, source=0).config.impl == "triton"


Q, K = torch.randn(2, 20, 4, 8), torch.randn(2, 20, 2, 8)
WORDS = torch.ones(2, 2, 20, 1, dtype=torch.int32)


@pytest.mark.parametrize(
    ("words", "bias", "message"),
    [
        (WORDS[:1], None, r"the selection's words must have shape \(2, 2, 20, 1\)"),
        (WORDS[:, :1], None, "the selection's words must have shape"),
        (WORDS[:, :, :19], None, "the selection's words must have shape"),
        (WORDS.to("meta"), None, "the selection is on meta"),
        (WORDS, torch.zeros(2, 20, 3, 3), r"bias must have shape \(2, 20, 2, 3\)"),
        (WORDS, torch.zeros(2, 20, 2), "bias must have 4 dimensions"),
        (WORDS, torch.zeros(2, 20, 2, 3, device="meta"), "bias is on meta"),
    ],
)
def test_a_selection_of_another_shape_is_refused(words, bias, message):
    with pytest.raises(ValueError, match=message):
        selected_attention(Q, K, K, Selection(words, 8), bias)
