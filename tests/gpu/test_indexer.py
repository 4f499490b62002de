"""The learned indexer on a GPU: its kernels at real sizes, and that PyTorch's part keeps its memory bounded."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from dashattn.backends import AttentionShape, IndexerConfig, build_backend
from dashattn.documents import document_positions
from dashattn.indexer import indexer_attention
from dashattn.ops.block_sparse import triton as attention
from dashattn.ops.indexer import triton as kernels
from dashattn.ops.indexer.reference import Choice, Index, index_routing
from dashattn.ops.true_mass import reference as mass_reference
from dashattn.ops.true_mass import triton as mass_kernels
from dashattn.selection import Selection

BF16, FP32 = torch.bfloat16, torch.float32
LENGTH = 3000
ENDS = (0, 100, 100, 131, 1700, LENGTH)


def random(*shape, dtype=BF16):
    return torch.randn(*shape, device="cuda").to(dtype)


def documents(is_packed):
    return torch.tensor(ENDS, dtype=torch.int32, device="cuda") if is_packed else None


def relative_error(x, expected):
    return ((x.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-20)).item()


@pytest.mark.parametrize("is_packed", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize(
    ("block_size", "pooling", "selector", "dtype"),
    [
        (64, "max", "topk", BF16),
        (16, "max", "topk", BF16),
        (32, "max", "topk", FP32),
        (64, "mean", "topk", BF16),
        (128, "mean", "topp", FP32),
        (64, "mean", "topp", BF16),
    ],
)
def test_the_kernels_select_what_the_definition_does(block_size, pooling, selector, dtype, is_packed):
    """But for a few rows, in which blocks have nearly one score."""
    index_q, index_k = random(1, LENGTH, 2, 64, dtype=dtype), random(1, LENGTH, 64, dtype=dtype)
    forced, cu_seqlens = {"init_blocks": 1, "local_blocks": 2}, documents(is_packed)
    index = Index.make(index_q, index_k, block_size, pooling, cu_seqlens)
    expected, _ = index_routing(index, Choice(selector, 6 if selector == "topk" else 0.5, **forced), prior=False)
    options = {"block_size": block_size, "selector": selector, "topk": 10, "top_p": 0.5, **forced, "prior": False}
    found, _ = kernels.index_routing(index_q, index_k, pooling=pooling, **options, cu_seqlens=cu_seqlens)
    differing = (found.words != expected.words).any(-1).float().mean().item()
    assert differing <= 0.005
    own = document_positions(cu_seqlens, 1, LENGTH, "cuda") // block_size
    if selector == "topk":
        assert torch.equal(found.mask().sum(-1), (own + 1).clamp(max=10)[..., None].expand(-1, -1, 2))


@pytest.mark.parametrize("is_packed", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize(("heads", "head_dim", "dtype"), [(32, 128, BF16), (6, 64, FP32), (7, 96, BF16)])
def test_masses_are_those_of_the_softmax(heads, head_dim, dtype, is_packed):
    kv_heads, cu_seqlens = (1 if heads == 7 else 2), documents(is_packed)
    q, k, v = (random(1, LENGTH, h, head_dim, dtype=dtype) for h in (heads, kv_heads, kv_heads))
    mask = torch.rand(1, LENGTH, kv_heads, 47, device="cuda") < 0.3
    mask[..., 0] = True
    selection = Selection.from_mask(mask, 64)
    _, lse = attention.attention_and_normalisers(q, k, v, selection, cu_seqlens=cu_seqlens)
    found = mass_kernels.block_masses(q, k, selection, lse, cu_seqlens=cu_seqlens)
    expected = mass_reference.block_masses(q.float(), k.float(), selection, block_size=64, cu_seqlens=cu_seqlens)
    assert relative_error(found, expected) < (5e-3 if dtype == BF16 else 1e-5)


OPTIONS = {
    "topk": {},
    "mean": {"index_pooling": "mean"},
    "topp": {"selector": "topp", "top_p": 0.3},
    "mean, topp": {"selector": "topp", "top_p": 0.3, "index_pooling": "mean"},
    "prior": {"gradient": "prior"},
    "prior, mean": {"gradient": "prior", "index_pooling": "mean"},
    "prior, mean, topp": {"gradient": "prior", "index_pooling": "mean", "selector": "topp", "top_p": 0.3},
    "warm-up": {"warmup_steps": 1},
}


@pytest.mark.parametrize("is_packed", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize("name", OPTIONS)
def test_output_loss_and_gradients_are_the_references(name, is_packed):
    """In float32, where both select alike but for a few rows."""
    config = IndexerConfig(block_size=32, topk=12, **OPTIONS[name])
    q, k, v = (random(1, LENGTH, heads, 64, dtype=FP32) for heads in (4, 2, 2))
    hidden, results = random(1, LENGTH, 96, dtype=FP32), []
    for impl in ("triton", "reference"):
        torch.manual_seed(0)
        backend = build_backend(replace(config, impl=impl), AttentionShape(96, 4, 2, 64)).cuda()
        for parameter in backend.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        backend.set_step(0)
        out, loss = backend.forward_with_loss(q, k, v, hidden=hidden, cu_seqlens=documents(is_packed))
        objective = (out * out.detach()).sum() if loss is None else loss
        results.append([out.detach(), objective.detach(), *torch.autograd.grad(objective, list(backend.parameters()))])
    for found, expected in zip(*results, strict=True):
        assert relative_error(found, expected) < 5e-3


@pytest.mark.parametrize("pooling", ["max", "mean"])
def test_training_over_32k_tokens_holds_a_tile_of_products(pooling):
    """All of them were 8 GiB."""
    shape, length = AttentionShape(512, 16, 2, 128), 32768
    backend = build_backend(IndexerConfig(index_pooling=pooling), shape).to("cuda", BF16)
    q, k, v = (random(1, length, heads, 128).requires_grad_() for heads in (16, 2, 2))
    hidden = random(1, length, 512)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, loss = backend.forward_with_loss(q, k, v, hidden=hidden)
    (out.float().square().mean() + loss).backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in backend.parameters())
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    print(f"{pooling}: {peak:.2f} GiB, KL {loss.item():.3f}")
    assert peak < 6


def test_nothing_waits_for_the_device():
    """Packed documents, KL and its gradient included."""
    backend = build_backend(IndexerConfig(topk=8), AttentionShape(64, 16, 1, 128)).to("cuda", BF16)
    q, k, v = (random(1, 1000, heads, 128) for heads in (16, 1, 1))
    hidden, ends = random(1, 1000, 64), torch.tensor([0, 300, 310, 1000], dtype=torch.int32, device="cuda")
    losses = []
    try:
        for mode in ("default", "error"):  # the first time compiles
            torch.cuda.set_sync_debug_mode(mode)
            _, loss = backend.forward_with_loss(q, k, v, hidden=hidden, cu_seqlens=ends)
            loss.backward()
            losses.append(loss.detach())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert losses[0] == losses[1] > 0


def test_long_prompts_decode_as_prefill_does():
    for options in OPTIONS.values():
        config = IndexerConfig(block_size=64, topk=8, **options)
        backend = build_backend(config, AttentionShape(256, 8, 2, 64)).to("cuda", FP32).eval()
        for parameter in backend.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        q, k, v = (random(2, 1200, heads, 64, dtype=FP32) for heads in (8, 2, 2))
        hidden, cache = random(2, 1200, 256, dtype=FP32), backend.new_cache(2, 1200, dtype=FP32, device="cuda")
        outs, begin = [], 0
        with torch.no_grad():
            for end in (1100, *range(1101, 1150), 1200):
                part = slice(begin, end)
                outs.append(backend.decode(q[:, part], k[:, part], v[:, part], cache.layers[0], hidden=hidden[:, part]))
                cache.advance(end - begin)
                begin = end
            expected = backend(q, k, v, hidden=hidden)
        wrong = ((torch.cat(outs, 1) - expected).norm(dim=-1) > 1e-3 * expected.norm(dim=-1).mean()).float().mean()
        assert wrong.item() < 0.005  # of nearly equal scores either may be taken


def test_weights_of_the_kl_count():
    q, k, v = (random(1, 900, heads, 64) for heads in (4, 2, 2))
    inputs = (q, k, v, random(1, 900, 2, 32), random(1, 900, 32))
    one, other, both = (
        indexer_attention(*inputs, topk=6, return_kl=True, head_weights=weights).kl.item()
        for weights in ((1.0, 0.0), (0.0, 1.0), None)
    )
    assert both == pytest.approx((one + other) / 2, rel=1e-4)
