"""The learned indexer against its definition, token by token, and what its index learns from."""

import oracle
import pytest
import torch

from dashattn.backends import AttentionShape, IndexerConfig, build_backend
from dashattn.indexer import indexer_attention
from dashattn.ops.indexer import reference

T, HQ, H, D, INDEX, SIZE = 43, 6, 2, 8, 5, 4
OPTIONS = {
    "block_size": SIZE,
    "index_pooling": "max",
    "selector": "topk",
    "topk": 6,
    "top_p": 0.6,
    "init_blocks": 1,
    "local_blocks": 1,
    "gradient": "kl",
}
CASES = {
    "max, topk": {},
    "mean, topk": {"index_pooling": "mean"},
    "max, topp": {"selector": "topp"},
    "mean, topp, nothing forced": {"index_pooling": "mean", "selector": "topp", "init_blocks": 0, "local_blocks": 0},
    "dense": {"dense": True},
    "prior, topk": {"gradient": "prior"},
    "prior, mean, topp": {"gradient": "prior", "index_pooling": "mean", "selector": "topp", "init_blocks": 2},
}
SHAPE = AttentionShape(hidden_size=24, num_heads=HQ, num_kv_heads=H, head_dim=D)


@pytest.fixture
def inputs():
    torch.manual_seed(3)
    qkv = [2 * torch.randn(1, T, heads, D, dtype=torch.float64) for heads in (HQ, H, H)]
    return [
        *qkv,
        2 * torch.randn(1, T, H, INDEX, dtype=torch.float64),
        2 * torch.randn(1, T, INDEX, dtype=torch.float64),
    ]


@pytest.fixture(params=[False, True], ids=["one tile", "tiles"])
def _tiles(request, monkeypatch):
    """Tiles of one query where products are of tokens, of four where they are of blocks."""
    if request.param:
        monkeypatch.setattr(reference, "TILE_PRODUCTS", 4 * H * (T // SIZE))


def held_to_its_definition(inputs, options):
    """The function's result, held to the token-by-token definition, and the KL of each token and head by the latter."""
    with_kl = options["gradient"] == "kl"
    found = indexer_attention(*inputs, **options, return_stats=True, return_kl=with_kl)
    out, active, kl = oracle.indexer(*(x[0].numpy() for x in inputs), **options)
    torch.testing.assert_close(found.out[0], torch.from_numpy(out), rtol=0, atol=1e-12)
    assert found.stats.active_tokens[0].tolist() == active.tolist()
    if with_kl:
        assert found.kl.item() == pytest.approx(kl.mean(), abs=1e-12)
    return found, kl


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("name", CASES)
def test_it_is_its_definition(inputs, name):
    options = OPTIONS | CASES[name]
    with_kl = options["gradient"] == "kl"
    found, kl = held_to_its_definition(inputs, options)
    candidates = [max(0, t // SIZE - options["init_blocks"] - options["local_blocks"]) for t in range(T)]
    scored = SIZE if options["index_pooling"] == "max" else 1
    assert found.stats.routing_reads[0].tolist() == [scored * count for count in candidates]
    if with_kl:
        assert kl.max() > 0.1
        weighted = indexer_attention(*inputs, **options, return_kl=True, head_weights=(0.2, 0.7)).kl
        assert weighted.item() == pytest.approx((kl * [0.2, 0.7]).sum(1).mean(), abs=1e-12)
    doubled = indexer_attention(2 * inputs[0], *inputs[1:], **options, scale=D**-0.5 / 2, return_kl=with_kl)
    torch.testing.assert_close((doubled.out, doubled.kl), (found.out, found.kl), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (7, 1), (16, 2)])
@pytest.mark.parametrize("name", ["max, topk", "mean, topp, nothing forced", "dense", "prior, mean, topp"])
def test_it_is_its_definition_in_groups_of_other_sizes(name, heads, kv_heads):
    shapes = ((heads, D), (kv_heads, D), (kv_heads, D), (kv_heads, INDEX), (INDEX,))
    inputs = [2 * torch.randn(1, T, *shape, dtype=torch.float64) for shape in shapes]
    held_to_its_definition(inputs, OPTIONS | CASES[name])


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("ends", [None, [0, 3, 30, T]], ids=["one", "packed"])
def test_gradcheck(inputs, name, ends):
    cu_seqlens = None if ends is None else torch.tensor(ends, dtype=torch.int32)
    options = OPTIONS | CASES[name] | {"cu_seqlens": cu_seqlens}
    if options["gradient"] == "kl":

        def learned(*index):
            return indexer_attention(*inputs[:3], *index, **options, return_kl=True).kl

        leaves = inputs[3:]
    else:

        def learned(*leaves):
            return indexer_attention(*leaves, **options).out

        leaves = inputs
    leaves = [x.requires_grad_() for x in leaves]
    assert torch.autograd.gradcheck(learned, leaves, fast_mode=True, atol=1e-7)
    assert all(grad.abs().max() > 0 for grad in torch.autograd.grad(learned(*leaves).square().sum(), leaves))


def test_kl_of_packed_documents_is_that_of_each(inputs):
    ends = torch.tensor([0, 3, 30, T], dtype=torch.int32)
    for name in ("max, topk", "mean, topp, nothing forced", "dense"):
        options = OPTIONS | CASES[name] | {"return_kl": True}
        packed = indexer_attention(*inputs, **options, cu_seqlens=ends).kl
        alone = [
            indexer_attention(*(x[:, a:b] for x in inputs), **options).kl * (b - a)
            for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)
        ]
        assert packed.item() == pytest.approx(sum(alone).item() / T, abs=1e-12)


@pytest.mark.parametrize("head_weights", [None, (0.2, 0.3, 0.1)])
def test_kl_is_as_exact_in_bfloat16_as_what_it_is_given(inputs, head_weights):
    """A third, the weight of each of three heads, is no number of bfloat16."""
    q, _, _, index_q, index_k = (x.bfloat16() for x in inputs)
    given = [q, q[:, :, :3], q[:, :, :3], torch.cat([index_q, index_q[:, :, :1] + 1], dim=2), index_k]
    options = OPTIONS | {"return_kl": True, "head_weights": head_weights}
    found, expected = (
        indexer_attention(*(x.to(dtype) for x in given), **options).kl for dtype in (torch.bfloat16, torch.float32)
    )
    assert expected > 0.1
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_gradient_by_a_score_is_the_difference_of_the_two_distributions(inputs):
    """``u - m``, over the tokens and KV heads that the mean is of: each block has a channel of the index of its own."""
    q, k, v, _, _ = inputs
    blocks = T // SIZE
    scores = torch.randn(1, T, H, blocks, dtype=torch.float64, requires_grad=True)
    index_k = torch.zeros(1, T, blocks, dtype=torch.float64)
    index_k[0, torch.arange(blocks * SIZE), torch.arange(blocks * SIZE) // SIZE] = blocks**0.5
    found = indexer_attention(q, k, v, scores, index_k, **OPTIONS | {"topk": 5}, return_kl=True)
    (grad,) = torch.autograd.grad(found.kl, scores)
    own = torch.arange(T) // SIZE
    candidates = (torch.arange(blocks) >= 1) & (torch.arange(blocks) < own[:, None] - 1)
    ranked = scores.detach()[0].masked_fill(~candidates[:, None], -torch.inf)
    chosen = torch.zeros_like(ranked, dtype=torch.bool).scatter(-1, ranked.topk(2).indices, True)
    chosen &= candidates[:, None]
    forced = (torch.arange(-(-T // SIZE)) <= own[:, None]) & ~torch.nn.functional.pad(candidates, (0, 1))
    read = torch.nn.functional.pad(chosen, (0, 1)) | forced[:, None]  # [T, H, N]
    keys = read.repeat_interleave(SIZE, dim=-1)[..., :T] & torch.ones(T, T, dtype=torch.bool).tril()[:, None]
    logits = torch.einsum("thgd,shd->thgs", q[0].unflatten(1, (H, -1)), k[0]) * D**-0.5
    p = logits.masked_fill(~keys[:, :, None], -torch.inf).softmax(-1).mean(2)
    mass = p[..., : blocks * SIZE].unflatten(-1, (blocks, SIZE)).sum(-1).masked_fill(~chosen, 0)
    m = mass / mass.sum(-1, keepdim=True).clamp_min(1e-30)
    u = ranked.masked_fill(~chosen, -torch.inf).softmax(-1).nan_to_num(0)
    torch.testing.assert_close(grad[0], (u - m) / (T * H), rtol=0, atol=1e-12)
    assert (u - m).abs().max() > 0.1


def test_where_no_candidate_has_any_mass_nothing_is_learned(inputs):
    q, k, v, index_q, index_k = inputs
    k = k.clone()
    k[:, SIZE:] -= 1e6 * q[:, :1, ::3]  # so low that the softmax is 0 but for the first block
    q = q[:, :1].expand_as(q)
    index_q.requires_grad_()
    kl = indexer_attention(q, k, v, index_q, index_k, **OPTIONS | {"local_blocks": 0}, return_kl=True).kl
    assert kl.isfinite()
    (grad,) = torch.autograd.grad(kl, index_q)
    assert grad.isfinite().all()


def build(**options):
    config = IndexerConfig(**{"block_size": 8, "index_size": 6, "topk": 5} | options)
    return build_backend(config, SHAPE).double()


def tokens(length=60):
    qkv = [torch.randn(1, length, heads, D, dtype=torch.float64, requires_grad=True) for heads in (HQ, H, H)]
    return qkv, torch.randn(1, length, 24, dtype=torch.float64, requires_grad=True)


def test_the_loss_reaches_the_index_alone_and_the_output_all_but_the_index():
    backend = build(kl_weight=0.5)
    qkv, hidden = tokens()
    out, loss = backend.forward_with_loss(*qkv, hidden=hidden)
    leaves = [*qkv, hidden, *backend.parameters()]
    of_loss = torch.autograd.grad(loss, leaves, allow_unused=True)
    assert [grad is not None for grad in of_loss] == [False] * 4 + [True] * 2
    of_out = torch.autograd.grad(out.sum(), leaves, allow_unused=True)
    assert [grad is not None for grad in of_out] == [True] * 3 + [False] * 3
    twice = build(kl_weight=1.0)
    twice.load_state_dict(backend.state_dict())
    assert twice.forward_with_loss(*qkv, hidden=hidden)[1].item() == pytest.approx(2 * loss.item())


def test_the_prior_reaches_the_index_through_the_output_and_hidden_too():
    backend = build(gradient="prior")
    qkv, hidden = tokens()
    out, loss = backend.forward_with_loss(*qkv, hidden=hidden)
    assert loss is None
    leaves = [*qkv, hidden, *backend.parameters()]
    assert all(grad.abs().max() > 0 for grad in torch.autograd.grad(out.sum(), leaves))


def test_training_is_dense_while_it_warms_up_and_evaluation_is_not():
    backend = build(warmup_steps=3)
    (q, k, v), hidden = tokens()

    def sparsity():
        return backend(q, k, v, hidden=hidden, return_stats=True)[1].causal_sparsity()

    sparse = sparsity()  # before any step is set: as it is used
    assert sparse > 0.1
    for step, expected in ((0, 0), (2, 0), (3, sparse), (1, 0)):
        backend.set_step(step)
        assert sparsity() == expected
    backend.eval()
    assert sparsity() == sparse


def test_the_index_learns_where_the_attention_looks():
    """Distilled into a frozen attention whose keys and queries are linear in what the index sees."""
    torch.manual_seed(0)
    backend = build(index_size=8, init_blocks=0, local_blocks=0, warmup_steps=10**6)
    backend.set_step(0)
    hidden = torch.randn(2, 120, 24, dtype=torch.float64)
    shared = torch.randn(24, D, dtype=torch.float64) / 24**0.5
    keys = (hidden @ shared)[:, :, None].expand(-1, -1, H, -1)
    q, v = 3 * keys.repeat_interleave(HQ // H, dim=2), torch.randn_like(keys)
    optimizer = torch.optim.Adam(backend.parameters(), lr=2e-2)
    losses = []
    for _ in range(60):
        _, loss = backend.forward_with_loss(q, keys, v, hidden=hidden)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.25 * losses[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: IndexerConfig(selector="entmax"), "selector must be one of topk, topp"),
        (lambda: IndexerConfig(index_pooling="sum"), "index_pooling must be one of max, mean"),
        (lambda: IndexerConfig(gradient="none"), "gradient must be one of kl, prior"),
        (lambda: IndexerConfig(topk=2), "topk 2 < 3"),
        (lambda: IndexerConfig(top_p=float("nan")), r"top_p must be a share in \(0, 1\]"),
        (lambda: IndexerConfig(kl_weight=float("nan")), "kl_weight must be a positive finite number"),
        (lambda: IndexerConfig(kl_weight=0.0), "kl_weight must be a positive finite number"),
        (lambda: IndexerConfig(index_size=0), "index_size must be a positive integer"),
        (lambda: IndexerConfig(warmup_steps=-1), "warmup_steps must be an integer of at least 0"),
        (lambda: IndexerConfig(gradient="prior", warmup_steps=5), "set warmup_steps=0"),
        (lambda: build()(*tokens()[0]), "pass hidden"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient": "prior", "return_kl": True}, "has no KL divergence"),
        ({"gradient": "prior", "dense": True}, "has no KL divergence"),
        ({"selector": "entmax"}, "selector must be one of topk, topp"),
        ({"index_pooling": "sum"}, "index_pooling must be one of max, mean"),
        ({"gradient": "none"}, "gradient must be one of kl, prior"),
        ({"topk": 2}, "topk 2 < 3"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\]"),
        ({"block_size": 0}, "block_size must be a positive integer"),
        ({"init_blocks": -1}, "init_blocks must be an integer of at least 0"),
        ({"local_blocks": -1}, "local_blocks must be an integer of at least 0"),
    ],
)
def test_options_of_the_function_are_refused(inputs, options, message):
    with pytest.raises(ValueError, match=message):
        indexer_attention(*inputs, **OPTIONS | options)


def test_an_index_of_another_shape_is_refused(inputs):
    q, k, v, index_q, index_k = inputs
    with pytest.raises(ValueError, match="index_k must have shape"):
        indexer_attention(q, k, v, index_q, index_k[..., :2], **OPTIONS)
    with pytest.raises(ValueError, match="index_q is "):
        indexer_attention(q, k, v, index_q.float(), index_k.float(), **OPTIONS)
