"""The Triton router, and the whole operation around it, against the references through Triton's interpreter."""

import pytest
import torch

pytest.importorskip("triton")

from dashattn.ops.block_sparse.reference import block_sparse_attention
from dashattn.ops.block_sparse.triton import attend
from dashattn.ops.chunk_summary.reference import chunk_summary
from dashattn.ops.chunk_summary.triton import summary_starts
from dashattn.ops.dash_attention.triton import _backward_op, _forward_op, dash_attention
from dashattn.ops.dash_routing import reference
from dashattn.ops.dash_routing import triton as kernels
from dashattn.ops.dash_routing.triton_forward import prior_bias, router_options
from dashattn.ops.tiles import geometry

if torch.cuda.is_available():
    pytest.skip("tests/gpu covers the kernels where there is a GPU", allow_module_level=True)

CHUNK = 16


def relative_error(x, expected):
    return ((x - expected).norm() / expected.norm().clamp_min(1e-20)).item()


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan():
    """What a kernel leaves out of a tensor, no other may read: PyTorch fills it in this mode."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_forwards_leave_out_only_a_prior_that_16_bits_do_not_show():
    """Where |log p| < 100, 100 / sigma of a weight is a twentieth of bfloat16's rounding from a sigma of 1e6 on."""
    for sigma, is_shown in ((1e6, False), (9e5, True), (1e5, True)):
        assert kernels.has_forward_bias("tempered", sigma, torch.bfloat16) == is_shown
        assert kernels.has_forward_bias("tempered", sigma, torch.float32)
    assert kernels.has_forward_bias("raw", 1e6, torch.bfloat16)
    assert not kernels.has_forward_bias("none", 1.0, torch.float32)


@pytest.mark.parametrize(
    ("alpha", "router_scale"),
    [(1.5, 0.1), (1.5, 3.0), (1.01, 8.0), (1.05, 3.0), (1.05, 16.0), (1.1, 4.0), (2.0, 0.1), ("heads", 1.0)],
)
def test_selection_and_prior_agree_with_the_reference(alpha, router_scale):
    # 38 chunks: more than a tile of them and more than a word, with room for flat and for peaked probabilities
    q, summaries = torch.randn(1, 600, 2, 16), torch.randn(1, 600 // CHUNK, 1, 16)
    alpha = torch.tensor([1.1, 1.7]) if alpha == "heads" else alpha
    options = dict(chunk_size=CHUNK, alpha=alpha, router_scale=router_scale, prior="raw")
    expected, expected_bias = reference.dash_routing(q, summaries, **options)
    selection, bias = kernels.dash_routing(q, summaries, **options)
    assert torch.equal(selection.mask(), expected.mask())
    # log p at the very edge of the support amplifies the last digit of a score
    assert relative_error(bias, expected_bias) < 1e-4


@pytest.mark.parametrize("tokens", [63, 64, 65])
def test_there_are_as_many_chunks_as_have_tokens(tokens):
    q, summaries = torch.randn(1, tokens, 2, 16), torch.randn(1, tokens // CHUNK, 1, 16)
    _, bias = kernels.dash_routing(q, summaries, chunk_size=CHUNK, prior="raw")
    assert bias.shape == (1, tokens, 1, -(-tokens // CHUNK))


def test_what_is_chosen_of_16_bits_is_chosen_and_weighed_in_32():
    # float16: what the interpreter makes of bfloat16 is not what a GPU does
    q, summaries = torch.randn(1, 600, 2, 16).half(), torch.randn(1, 600 // CHUNK, 1, 16).half()
    options = dict(chunk_size=CHUNK, router_scale=3.0, prior="raw")
    expected, expected_bias = reference.dash_routing(q.float(), summaries.float(), **options)
    selection, bias = kernels.dash_routing(q, summaries, **options)
    assert torch.equal(selection.mask(), expected.mask())
    assert relative_error(bias, expected_bias) < 1e-4


def test_a_threshold_is_the_one_of_the_token_alone():
    """Beside tokens that take more steps: the same bits."""
    alpha = torch.tensor([1.2, 1.7])
    q, summaries = torch.randn(1, 200, 2, 16), torch.randn(1, 12, 1, 16)
    q *= torch.logspace(-2, 2, 200)[torch.randperm(200)][:, None, None]
    _, peak, tau = kernels._route_op(q, summaries, alpha, None, None, None, CHUNK, 1.0, [0, 0], "entmax")
    for first in range(2):
        among_easy = q.clone()
        among_easy[:, first::2] = 0
        _, *alone = kernels._route_op(among_easy, summaries, alpha, None, None, None, CHUNK, 1.0, [0, 0], "entmax")
        for together, by_itself in zip((peak, tau), alone, strict=True):
            assert torch.equal(together[:, 1 - first :: 2], by_itself[:, 1 - first :: 2])


@pytest.mark.parametrize(
    ("init_chunks", "local_chunks", "alpha", "prior"),
    [
        (1, 0, 1.2, "tempered"),
        (3, 2, 1.5, "raw"),
        (0, 33, 1.5, "tempered"),
        (33, 1, 1.2, "raw"),
        (20, 15, 1.5, "raw"),  # two candidates at the end
        (20, 17, 1.5, "raw"),  # none
        (2**40, 0, 1.2, "raw"),
        (0, 2**40, 1.5, "raw"),
    ],
)
def test_selection_and_prior_with_forced_chunks(init_chunks, local_chunks, alpha, prior):
    """In the first tile of 32 chunks and past it, up to all of them."""
    q, summaries = torch.randn(1, 600, 3, 16), torch.randn(1, 600 // CHUNK, 1, 16)
    options = dict(chunk_size=CHUNK, alpha=alpha, router_scale=3.0, prior=prior, sigma=2.0)
    options |= dict(init_chunks=init_chunks, local_chunks=local_chunks)
    expected, expected_bias = reference.dash_routing(q, summaries, **options)
    selection, bias = kernels.dash_routing(q, summaries, **options)
    assert torch.equal(selection.mask(), expected.mask())
    assert relative_error(bias, expected_bias) < 1e-4


@pytest.mark.parametrize(
    ("group", "alpha", "router_scale", "prior", "sigma", "cu_seqlens"),
    [
        (3, 1.5, 1.0, "raw", 1.0, None),
        (1, 1.5, 1.0, "tempered", 0.5, [0, 20, 20, 21, 66]),
        (2, (1.2, 1.8), 1.0, "tempered", 2.0, None),
        (2, (1.2, 1.8), 1.0, "raw", 1.0, None),
        (3, (1.01, 1.1), 150.0, "tempered", 10.0, None),  # most of p underflows
        (1, 1.5, 1.0, "tempered", 1e6, None),
        (2, 1.5, 1.0, "none", 1.0, None),
    ],
)
def test_attention_and_gradients_agree_with_the_references(group, alpha, router_scale, prior, sigma, cu_seqlens):
    compare(66, group, alpha, cu_seqlens, router_scale=router_scale, prior=prior, sigma=sigma)


@pytest.mark.parametrize(
    ("length", "group", "alpha", "prior", "forced", "cu_seqlens"),
    [
        (130, 1, 1.5, "raw", (1, 0), None),
        (130, 1, 1.5, "tempered", (1, 1), None),  # tiles of tokens of several chunks
        (130, 3, 1.5, "tempered", (1, 1), None),
        (130, 4, (1.2, 1.8), "raw", (2, 1), None),
        (130, 16, 1.5, "tempered", (1, 0), None),
        (130, 3, (1.2, 1.8), "tempered", (0, 2), None),
        (100, 2, 1.5, "none", (1, 1), None),
        (100, 3, 1.5, "raw", (1, 1), [0, 1, 20, 20, 85, 100]),  # some shorter than what is forced
        (40, 2, 1.5, "raw", (1, 1), None),  # all is forced
        (9, 1, 1.5, "tempered", (3, 2), None),
    ],
)
def test_forced_chunks_agree_with_the_references(length, group, alpha, prior, forced, cu_seqlens):
    init_chunks, local_chunks = forced
    forced = dict(init_chunks=init_chunks, local_chunks=local_chunks)
    compare(length, group, alpha, cu_seqlens, router_scale=1.5, prior=prior, sigma=0.5, **forced)


def test_many_forced_chunks_agree_with_the_references():
    """More of them than a tile of chunks and an entry of the lists of the backward hold."""
    compare(600, 1, 1.5, None, router_scale=1.5, prior="raw", init_chunks=33, local_chunks=1)


@pytest.mark.parametrize(
    ("length", "group", "selector", "router_scale", "prior", "forced", "cu_seqlens"),
    [
        (130, 3, {"topk": 3}, 3.0, "raw", (0, 0), None),
        (130, 3, {"topk": 4}, 3.0, "tempered", (1, 1), None),
        (130, 1, {"topk": 3}, 1.0, "none", (1, 0), None),
        (130, 2, {"topk": 99}, 1.0, "raw", (1, 0), None),
        (130, 4, {"topk": 1}, 1.0, "tempered", (0, 0), None),  # nothing but a token's own chunk
        (100, 3, {"topk": 3}, 2.0, "raw", (1, 0), [0, 1, 20, 20, 85, 100]),
        (130, 3, {"top_p": 0.6}, 3.0, "raw", (0, 0), None),
        (130, 3, {"top_p": 0.8}, 1.0, "tempered", (1, 1), None),
        (130, 2, {"top_p": 1.0}, 1.0, "raw", (1, 0), None),
        (130, 2, {"top_p": 1e-6}, 1.0, "raw", (0, 0), None),
        (540, 1, {"top_p": 0.7}, 2.0, "raw", (0, 2), None),  # more chunks than a tile of them and than a word
        (100, 3, {"top_p": 0.6}, 2.0, "tempered", (1, 0), [0, 1, 20, 20, 85, 100]),
        (40, 2, {"top_p": 0.6}, 2.0, "raw", (1, 1), None),  # all is forced
    ],
)
def test_other_selectors_agree_with_the_references(length, group, selector, router_scale, prior, forced, cu_seqlens):
    options = dict(selector="topk" if "topk" in selector else "topp", **selector)
    options |= dict(init_chunks=forced[0], local_chunks=forced[1], router_scale=router_scale, prior=prior, sigma=0.5)
    compare(length, group, 1.5, cu_seqlens, **options)


@pytest.mark.parametrize("selector", [{"topk": 6}, {"top_p": 0.47}, {"top_p": 1.0}], ids=str)
@pytest.mark.parametrize("router_scale", [1e-3, 300.0])
def test_ties_and_underflow_of_other_selectors(selector, router_scale):
    """Chunks alike but for one, and of a large scale: the others' probabilities are 0, or as good as."""
    q, summaries = torch.ones(1, 300, 2, 16), torch.zeros(1, 18, 1, 16)
    summaries[:, 7] = 1
    options = dict(chunk_size=CHUNK, selector="topk" if "topk" in selector else "topp", **selector)
    options |= dict(router_scale=router_scale, prior="raw", init_chunks=1)
    expected, expected_bias = reference.dash_routing(q, summaries, **options)
    selection, bias = kernels.dash_routing(q, summaries, **options)
    assert torch.equal(selection.mask(), expected.mask())
    assert bias.isfinite().all()
    assert relative_error(bias, expected_bias) < 1e-5


def test_a_bound_that_moves_gives_the_same_bits():
    q, summaries = torch.randn(1, 90, 2, 16), torch.randn(1, 5, 1, 16)
    for selector, name, bound in (("topk", "topk", 3), ("topp", "top_p", 0.6)):
        found = []
        for value in (bound, torch.tensor(bound, dtype=torch.float64)):
            options = {"chunk_size": CHUNK, "selector": selector, "prior": "raw", name: value}
            found.append(kernels.dash_routing(q, summaries, **options))
        assert torch.equal(found[0][0].words, found[1][0].words)
        assert torch.equal(found[0][1], found[1][1])


def compare(length, group, alpha, cu_seqlens, **options):
    """Selection, output and gradients of kernels and references; ``alpha``: one, or (the first, the last head's)."""
    if cu_seqlens is not None:
        cu_seqlens = torch.tensor(cu_seqlens, dtype=torch.int32)
    q, grad = (torch.randn(1, length, group, 16) for _ in range(2))
    k, v = (torch.randn(1, length, 1, 16) for _ in range(2))
    inputs = [q, k, v, torch.randn(1, 16)]
    if isinstance(alpha, tuple):
        inputs.append(torch.linspace(*alpha, group))
    options |= dict(chunk_size=CHUNK, cu_seqlens=cu_seqlens)

    # float64, because float32 errs by more than the kernels at the edge of the support
    q, k, v, chunk_query, *alphas = exact = [x.double().requires_grad_() for x in inputs]
    summaries = chunk_summary(k, chunk_query, chunk_size=CHUNK, cu_seqlens=cu_seqlens)
    expected_selection, bias = reference.dash_routing(q, summaries, alpha=alphas[0] if alphas else alpha, **options)
    expected_out = block_sparse_attention(q, k, v, expected_selection, bias, cu_seqlens=cu_seqlens)
    expected = torch.autograd.grad(expected_out, exact, grad.double(), materialize_grads=True)

    for x in inputs:
        x.requires_grad_()
    out, selection = dash_attention(*inputs[:4], alpha=inputs[4] if alphas else alpha, **options)
    blocks = expected_selection.words.shape[-1]
    assert torch.equal(selection.words[..., :blocks], expected_selection.words)
    assert relative_error(out, expected_out) < 1e-5
    for result, wanted in zip(torch.autograd.grad(out, inputs, grad), expected, strict=True):
        assert relative_error(result, wanted) < 1e-4


@pytest.mark.parametrize(("prior", "cu_seqlens"), [("raw", None), ("tempered", [0, 17, 50])])
def test_the_bias_of_the_router_alone_is_differentiable(prior, cu_seqlens):
    """By each head's alpha, too."""
    cu_seqlens = None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32)
    inputs = [torch.randn(1, 50, 2, 16), torch.randn(1, 3, 1, 16), torch.tensor([1.3, 1.8])]
    inputs, grad = [x.requires_grad_() for x in inputs], torch.randn(1, 50, 1, 4)
    results = []
    for router in (reference, kernels):
        options = dict(chunk_size=CHUNK, prior=prior, sigma=2.0, cu_seqlens=cu_seqlens)
        _, bias = router.dash_routing(*inputs[:2], alpha=inputs[2], **options)
        results.append(torch.autograd.grad(bias, inputs, grad[..., : bias.shape[-1]]))
    for result, wanted in zip(*results, strict=True):
        assert relative_error(result, wanted) < 1e-4


def test_a_sequence_shorter_than_a_chunk_attends_to_itself():
    q, k, v = (torch.randn(1, 7, 1, 16) for _ in range(3))
    out, selection = dash_attention(q, k, v, torch.zeros(1, 16), chunk_size=CHUNK)
    assert selection.words.eq(1).all()
    expected = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)
    torch.testing.assert_close(out, expected.transpose(1, 2))


@pytest.mark.parametrize("alpha", [None, 1.7])
def test_the_words_alone_say_what_is_selected(alpha):
    """z is formed again wherever it is needed, and its last bit may differ: at the edge of the support from the words.

    Here words lack a chunk that z has (whose bias gradient nobody wrote), and have one that z lacks.
    """
    length, scale, score_scale = 90, 0.25, 4.0
    q, k, v, grad = (torch.randn(1, length, heads, 16) for heads in (2, 1, 1, 2))
    alpha = None if alpha is None else torch.full((2,), alpha)
    settings = (CHUNK, score_scale, [0, 0], scale, "entmax", "raw", 1.0)
    rows = _forward_op(q, k, v, torch.zeros(1, 1, 16), alpha, None, None, None, *settings)
    out, words, lse, peak, tau, summaries = rows
    own = torch.arange(length)[:, None] // CHUNK
    fewer = torch.where(words & (words - 1) != 0, words & (words - 1), words)  # without the first chunk selected
    more = words | ((2 << own) - 1).int()  # every chunk up to the own one
    assert (fewer != words).any()
    assert (more != words).any()
    for changed in (fewer, more):
        saved = (torch.zeros(1, 1, 16), alpha, None, None, out, changed, lse, peak, tau, summaries)
        grads = _backward_op(grad, q, k, v, *saved, *settings, True)
        assert all(x.isfinite().all() for x in grads)

    geo = geometry(q, 1, None)
    blocks, router = -(-length // CHUNK), router_options(geo.padded_dim, q.itemsize)
    starts = summary_starts(geo, CHUNK)
    rows = (q[0], summaries, alpha, starts, words[0], peak[0], tau[0])
    bias = prior_bias(*rows, geo, CHUNK, blocks, score_scale, (0, 0), None, False, router)
    with_more, _ = attend(q[0], k[0], v[0], more[0], bias, geo, CHUNK, scale)
    assert relative_error(with_more, out[0]) < 1e-6


def test_priors_per_head_are_refused():
    q, summaries = torch.randn(1, 20, 1, 16), torch.randn(1, 1, 1, 16)
    with pytest.raises(ValueError, match="reference"):
        kernels.dash_routing(q, summaries, chunk_size=CHUNK, prior_heads="head")
