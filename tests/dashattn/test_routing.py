"""What a backend says about its router against what its forward pass does."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dashattn.backends import (
    AttentionShape,
    DashConfig,
    FullConfig,
    IndexerConfig,
    InfLLMv2Config,
    NSAConfig,
    build_backend,
)
from dashattn.ops.entmax.reference import entmax
from dashattn.stats import selection_stats

SHAPE = AttentionShape(hidden_size=24, num_heads=6, num_kv_heads=2, head_dim=8)
SMALL = {"block_size": 8, "kernel_size": 8, "kernel_stride": 4, "init_blocks": 1}
CONFIGS = {
    "dash": DashConfig(chunk_size=8, router_scale=6.0),
    "dash rope": DashConfig(chunk_size=8, router_scale=6.0, summary_rope="mean", alpha_mode="learnable"),
    "dash sink": DashConfig(chunk_size=8, router_scale=6.0, init_chunks=1, local_chunks=1, prior_heads="head"),
    "dash topk": DashConfig(chunk_size=8, router_scale=6.0, selector="topk", topk=4),
    "dash topp": DashConfig(chunk_size=8, router_scale=6.0, selector="topp", top_p=0.6),
    "hils": DashConfig(chunk_size=8, router_scale=6.0, selector="topk", topk=4, prior="mass"),
    "moba": DashConfig(chunk_size=8, selector="topk", topk=4, prior="none", learn_summary=False),
    "indexer": IndexerConfig(block_size=8, index_size=6, topk=4),
    "indexer prior": IndexerConfig(block_size=8, index_size=6, topk=4, gradient="prior"),
    "indexer topp": IndexerConfig(block_size=8, index_size=6, selector="topp", top_p=0.6, index_pooling="mean"),
    "infllmv2": InfLLMv2Config(**SMALL, topk=4, window_size=8),
    "nsa": NSAConfig(**SMALL, topk=4, local_blocks=2, window_size=12),
    "nsa own kv": NSAConfig(**SMALL, topk=4, local_blocks=2, window_size=12, shared_kv=False),
    "nsa minicpm": NSAConfig(**SMALL, topk=4, local_blocks=2, window_size=0, variant="minicpm"),
}


def inputs(length, dtype=torch.float64):
    q, k, v = (torch.randn(2, length, heads, 8, dtype=dtype) for heads in (6, 2, 2))
    angle = torch.randn(length, 8, dtype=dtype)
    return q, k, v, {"hidden": torch.randn(2, length, 24, dtype=dtype), "rope": (angle.cos(), angle.sin())}


@pytest.mark.parametrize("length", [1, 7, 8, 61])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_selection_is_the_one_that_forward_reads(name, length):
    backend = build_backend(CONFIGS[name], SHAPE).double()
    for p in backend.parameters():
        torch.nn.init.normal_(p)
    q, k, v, extra = inputs(length)
    _, stats = backend(q, k, v, **extra, return_stats=True)
    routing = backend.route(q, k, v, **extra)
    window = getattr(backend.config, "window_size", 0) if name.startswith("nsa") else 0
    counted = selection_stats(routing.selection, stats.routing_reads, None, window)
    assert torch.equal(counted.active_tokens, stats.active_tokens)


@pytest.mark.parametrize("name", CONFIGS)
def test_some_tokens_are_told_what_all_of_them_are(name):
    backend = build_backend(CONFIGS[name], SHAPE).double()
    for p in backend.parameters():
        torch.nn.init.normal_(p)
    q, k, v, extra = inputs(61)
    some = torch.tensor([3, 60, 24, 25, 8])
    of_all, of_some = (backend.route(q, k, v, **extra, positions=positions) for positions in (None, some))
    assert torch.equal(of_some.selection.words, of_all.selection.words[:, :, some])
    torch.testing.assert_close(of_some.probabilities, of_all.probabilities[:, some])
    if of_all.logits is not None:
        torch.testing.assert_close(of_some.logits, of_all.logits[:, some])


class Largest(TorchDispatchMode):
    """The most elements of any tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            self.numel = max(self.numel, x.untyped_storage().nbytes() // x.itemsize if isinstance(x, Tensor) else 0)
        return out


@pytest.mark.parametrize("name", CONFIGS)
def test_the_router_of_some_tokens_holds_no_scores_of_all(name):
    backend = build_backend(CONFIGS[name], SHAPE)
    q, k, v, extra = inputs(4096, torch.float32)
    with Largest() as made:
        backend.route(q, k, v, **extra, positions=torch.tensor([5, 4095]))
    assert made.numel < 2 * 4096 * 2 * 4096 // 8  # rows, tokens, KV heads, blocks


# No other branch reads values.
@pytest.mark.parametrize("name", [name for name in CONFIGS if not name.startswith("nsa")])
def test_values_of_blocks_that_are_not_selected_do_not_matter(name):
    backend = build_backend(CONFIGS[name], SHAPE).double()
    q, k, v, extra = inputs(61)
    selected_BTHN = backend.route(q, k, v, **extra).selection.mask()[..., :8]
    out = backend(q, k, v, **extra)
    for block in range(8):
        changed = v.clone()
        changed[:, 8 * block : 8 * block + 8] += 100
        moved = (backend(q, k, changed, **extra) != out).any(-1).unflatten(2, (2, 3)).any(3)
        assert torch.equal(moved, selected_BTHN[..., block])


@pytest.mark.parametrize("name", CONFIGS)
def test_probabilities_are_of_blocks_in_the_past_and_sum_to_one(name):
    backend = build_backend(CONFIGS[name], SHAPE).double()
    q, k, v, extra = inputs(61)
    p_BTHN = backend.route(q, k, v, **extra).probabilities
    assert p_BTHN.shape == (2, 61, 2, 8)
    own = torch.arange(61) // 8
    past = torch.arange(8) < own[:, None]
    assert (p_BTHN >= 0).all()
    assert not p_BTHN.masked_select(~past[:, None]).any()
    what = "blocks" if name.startswith("indexer") else "chunks"
    first = 8 * (1 + getattr(backend.config, f"init_{what}", 0) + getattr(backend.config, f"local_{what}", 0))
    assert torch.allclose(p_BTHN.sum(-1)[:, first:], torch.ones(1).double())
    if not name.startswith(("infllmv2", "nsa")):
        assert not p_BTHN[:, :first].any()
        if first > 8:
            past &= (torch.arange(8) >= 1) & (torch.arange(8) < own[:, None] - 1)
        selected = backend.route(q, k, v, **extra).selection.mask()[..., :8] & past[:, None]
        if backend.config.selector == "entmax":
            assert torch.equal(selected, p_BTHN > 0)
        else:  # a softmax gives every candidate something
            assert torch.equal(p_BTHN > 0, past[:, None].expand_as(p_BTHN))
            left = p_BTHN.masked_fill(selected | ~past[:, None], 0).amax(-1)
            assert (p_BTHN.masked_fill(~selected, 2).amin(-1) >= left).all()


@pytest.mark.parametrize(("name", "first"), [("dash", 8), ("dash sink", 24)])
def test_dash_gives_the_scores_that_entmax_normalises(name, first):
    backend = build_backend(CONFIGS[name], SHAPE).double()
    q, k, v, extra = inputs(61)
    routing = backend.route(q, k, v, **extra)
    p, _ = entmax(routing.logits[:, first:], 1.5)
    assert torch.allclose(p.unflatten(2, (2, 3)).mean(3), routing.probabilities[:, first:], atol=1e-9)


def test_dense_attention_has_no_router():
    backend = build_backend(FullConfig(), SHAPE)
    q, k, v, extra = inputs(9)
    assert backend.route(q, k, v, **extra) is None
