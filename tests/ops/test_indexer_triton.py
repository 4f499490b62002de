"""The learned indexer with ``impl="triton"`` against the reference; in Triton's interpreter without a GPU."""

import pytest
import torch

pytest.importorskip("triton")

from dashattn.indexer import indexer_attention
from dashattn.ops.block_sparse.triton import attention_and_normalisers
from dashattn.ops.indexer import triton as kernels
from dashattn.ops.indexer.reference import Choice, Index, index_routing
from dashattn.ops.true_mass import reference as mass_reference
from dashattn.ops.true_mass import triton as mass_kernels
from dashattn.selection import Selection

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTH = 68
CU_SEQLENS = torch.tensor([0, 1, 19, LENGTH], dtype=torch.int32, device=DEVICE)
BOTH = pytest.mark.parametrize("cu_seqlens", [None, CU_SEQLENS], ids=["one", "packed"])


def make(*shape):
    return torch.randn(*shape, device=DEVICE, requires_grad=True)


@pytest.mark.parametrize(
    ("options", "cu_seqlens"),
    [
        ({}, None),
        ({"index_pooling": "mean"}, CU_SEQLENS),
        ({"dense": True}, CU_SEQLENS),
        ({"selector": "topp", "top_p": 0.7}, None),
        ({"gradient": "prior"}, CU_SEQLENS),
        ({"gradient": "prior", "index_pooling": "mean"}, None),
        ({"gradient": "prior", "index_pooling": "mean", "selector": "topp", "top_p": 0.7}, CU_SEQLENS),
    ],
    ids=["max", "mean, packed", "dense, packed", "topp", "prior, packed", "prior, mean", "prior, mean, topp, packed"],
)
def test_kernels_and_reference_agree(options, cu_seqlens):
    inputs = [make(1, LENGTH, heads, 16) for heads in (3, 1, 1)] + [make(1, LENGTH, 1, 8), make(1, LENGTH, 8)]
    forced = {"init_blocks": 0, "local_blocks": 0}
    options = {"block_size": 16, "topk": 3, "scale": 0.4, **forced, "cu_seqlens": cu_seqlens} | options
    with_kl = "gradient" not in options
    results = []
    for impl in ("triton", "reference"):
        with torch.device("meta"):  # nothing is made on the default device
            found = indexer_attention(*inputs, impl=impl, return_stats=True, return_kl=with_kl, **options)
        loss = (found.out * torch.linspace(-1, 1, found.out.numel(), device=DEVICE).view_as(found.out)).sum()
        loss = loss + (1000 * found.kl if with_kl else 0)
        grads = torch.autograd.grad(loss, inputs)
        results.append((found.out, found.stats.active_tokens, found.stats.routing_reads, *grads))
        assert all(grad.abs().max() > 0 for grad in grads)
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


@BOTH
@pytest.mark.parametrize(("pooling", "selector"), [("max", "topk"), ("mean", "topk"), ("mean", "topp")])
def test_the_kernel_selects_what_the_definition_does(pooling, selector, cu_seqlens):
    batch = 1 if cu_seqlens is not None else 2
    index_q, index_k = torch.randn(batch, LENGTH, 2, 24, device=DEVICE), torch.randn(batch, LENGTH, 24, device=DEVICE)
    index_k[:, 20:40] = index_k[:, 20:21]  # ties
    forced = {"init_blocks": 0, "local_blocks": 0}
    index = Index.make(index_q, index_k, 16, pooling, cu_seqlens)
    expected, _ = index_routing(index, Choice(selector, 1 if selector == "topk" else 0.6, **forced), prior=False)
    options = {"block_size": 16, "selector": selector, "topk": 2, "top_p": 0.6, **forced, "prior": False}
    found, bias = kernels.index_routing(index_q, index_k, pooling=pooling, **options, cu_seqlens=cu_seqlens)
    assert torch.equal(found.words, expected.words)
    assert bias is None


def test_what_the_selecting_kernel_does_not_take():
    index_q = torch.randn(1, 9, 2, 24)
    assert kernels.unsupported(index_q, 32, "max", "topk", prior=False) is None
    assert "at most 32 index keys" in kernels.unsupported(index_q, 64, "max", "topk", prior=False)
    assert kernels.unsupported(index_q.bfloat16(), 64, "max", "topk", prior=False) is None
    assert "topk alone" in kernels.unsupported(index_q, 32, "max", "topp", prior=False)
    assert "topk alone" in kernels.unsupported(index_q, 32, "max", "topk", prior=True)
    assert kernels.unsupported(index_q, 128, "mean", "topp", prior=True) is None
    assert "head sizes" in kernels.unsupported(index_q[..., :7], 32, "mean", "topk", prior=False)


@BOTH
def test_masses_are_those_of_the_softmax(cu_seqlens):
    q, k, v = (make(1, LENGTH, heads, 16) for heads in (6, 2, 2))
    mask = torch.rand(1, LENGTH, 2, 5, device=DEVICE) < 0.5
    mask[..., 0] = True  # a row that reads nothing has no mass to share out
    selection = Selection.from_mask(mask, 16)
    options = {"scale": 0.4, "cu_seqlens": cu_seqlens}
    out, lse = attention_and_normalisers(q, k, v, selection, **options)
    assert (out.requires_grad, lse.requires_grad) == (True, False)
    found = mass_kernels.block_masses(q, k, selection, lse, **options)
    expected = mass_reference.block_masses(q, k, selection, block_size=16, **options)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.sum(-1), torch.ones_like(found[..., 0]), rtol=1e-4, atol=1e-5)
