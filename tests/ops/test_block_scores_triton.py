"""The Triton kernel that selects blocks against the reference, on the CPU through Triton's interpreter."""

from functools import partial

import pytest
import torch

pytest.importorskip("triton")

from dashattn.ops.block_scores import triton as kernels
from dashattn.ops.block_scores import triton_select
from dashattn.ops.block_scores.reference import topk_selection
from dashattn.ops.compression.reference import compressed_attention, num_windows
from dashattn.selection import Selection

if torch.cuda.is_available():
    pytest.skip("tests/gpu covers the kernels where there is a GPU", allow_module_level=True)


def reference(q, k, windows, blocks, **options):
    select = partial(topk_selection, **windows, **blocks)
    return Selection.concatenate(compressed_attention(q, k, None, select, **windows, **options)[1])


def packed(*ends):
    return torch.tensor([0, *ends], dtype=torch.int32)


@pytest.mark.parametrize("pooling", ["max", "weighted"])
@pytest.mark.parametrize(
    (
        "length",
        "group",
        "kv_heads",
        "kernel_size",
        "kernel_stride",
        "topk",
        "init_blocks",
        "local_blocks",
        "cu_seqlens",
    ),
    [
        (200, 3, 1, 8, 4, 6, 1, 2, None),
        (120, 1, 2, 8, 8, 3, 0, 1, None),  # windows that touch one block only
        (150, 2, 1, 20, 4, 4, 2, 1, packed(5, 5, 60, 150)),  # windows longer than a block
        (100, 2, 1, 8, 4, 3, 1, 2, None),  # nothing left to compete for
        (600, 1, 1, 16, 8, 7, 1, 1, None),  # more blocks than a word and than a step of the search
    ],
)
def test_selection_equals_the_reference(
    length, group, kv_heads, kernel_size, kernel_stride, topk, init_blocks, local_blocks, cu_seqlens, pooling
):
    windows = dict(kernel_size=kernel_size, kernel_stride=kernel_stride)
    blocks = dict(pooling=pooling, block_size=16, topk=topk, init_blocks=init_blocks, local_blocks=local_blocks)
    q = torch.randn(1, length, group * kv_heads, 16)
    k = torch.randn(1, num_windows(length, kernel_size, kernel_stride), kv_heads, 16)
    options = dict(scale=1.0, cu_seqlens=cu_seqlens)
    expected = reference(q, k, windows, blocks, **options)
    words = kernels.select_blocks(q, k, **windows, **blocks, **options).words
    used = expected.words.shape[-1]
    assert torch.equal(words[..., :used], expected.words)
    assert not words[..., used:].any()


def test_heads_of_a_group_in_several_parts(monkeypatch):
    """Three times eight heads, of which the last four are none, and four tokens."""
    monkeypatch.setattr(triton_select, "QUERY_BYTES", 2**13)
    triton_select.select_tile.cache_clear()
    assert triton_select.select_tile(20, 16, 4, False) == dict(TOKENS=4, HEADS=8, PARTS=3)
    windows, options = dict(kernel_size=8, kernel_stride=4), dict(scale=1.0, cu_seqlens=None)
    blocks = dict(pooling="max", block_size=16, topk=4, init_blocks=1, local_blocks=1)
    q, k = torch.randn(1, 100, 20, 16), torch.randn(1, num_windows(100, 8, 4), 1, 16)
    expected = reference(q, k, windows, blocks, **options)
    assert torch.equal(kernels.select_blocks(q, k, **windows, **blocks, **options).words, expected.words)
    triton_select.select_tile.cache_clear()


@pytest.mark.parametrize(
    ("group", "tile"), [(1, (64, 1, 1)), (3, (32, 1, 3)), (7, (32, 1, 7)), (4, (32, 2, 2)), (16, (16, 4, 4))]
)
def test_no_head_of_a_real_model_is_idle(group, tile):
    assert tuple(triton_select.select_tile(group, 128, 2, group == 1).values()) == tile


def test_ties_go_to_the_lower_index():
    """Equal keys give equal scores everywhere; two keys that stand out tie with each other."""
    windows = dict(kernel_size=8, kernel_stride=8)
    blocks = dict(pooling="max", block_size=16, topk=5, init_blocks=0, local_blocks=1)
    q = torch.ones(1, 160, 2, 16)
    k = torch.zeros(1, 20, 1, 16)
    k[:, [8, 15]] = 0.5  # of blocks 4 and 7
    selection = kernels.select_blocks(q, k, **windows, **blocks, scale=1.0, cu_seqlens=None)
    assert selection.mask()[0, -1, 0].nonzero().flatten().tolist() == [0, 1, 4, 7, 9]


def test_ties_fill_words():
    windows = dict(kernel_size=8, kernel_stride=8)
    blocks = dict(pooling="max", block_size=16, topk=35, init_blocks=1, local_blocks=1)
    q, k = torch.ones(1, 600, 1, 16), torch.zeros(1, 75, 1, 16)
    selection = kernels.select_blocks(q, k, **windows, **blocks, scale=1.0, cu_seqlens=None)
    assert selection.mask()[0, -1, 0].nonzero().flatten().tolist() == [*range(34), 37]


def test_scores_that_underflow_still_fill_topk():
    windows = dict(kernel_size=8, kernel_stride=8)
    blocks = dict(pooling="weighted", block_size=16, topk=4, init_blocks=0, local_blocks=1)
    q = torch.ones(1, 160, 2, 16)
    k = torch.zeros(1, 20, 1, 16)
    k[:, 10] = 100.0  # of block 5: all others' probabilities are 0
    selection = kernels.select_blocks(q, k, **windows, **blocks, scale=1.0, cu_seqlens=None)
    assert selection.mask()[0, -1, 0].nonzero().flatten().tolist() == [0, 1, 5, 9]
    assert (selection.mask().sum(-1)[0, :, 0] == (torch.arange(160) // 16 + 1).clamp(max=4)).all()


def test_without_groups_scores_that_underflow_are_told_apart(monkeypatch):
    """The largest product wins, and no pass for normalisers is made."""
    monkeypatch.setattr(kernels, "forward", None)
    windows = dict(kernel_size=8, kernel_stride=8)
    blocks = dict(pooling="max", block_size=16, topk=4, init_blocks=0, local_blocks=1)
    q, k = torch.ones(1, 160, 1, 16), torch.zeros(1, 20, 1, 16)
    k[:, ::2] = -100.0  # the lower of the two windows of every block
    k[:, [1, 7, 11, 13]] = torch.tensor([-50.0, -20.0, 100.0, 50.0])[:, None, None]  # of blocks 0, 3, 5 and 6
    selection = kernels.select_blocks(q, k, **windows, **blocks, scale=1.0, cu_seqlens=None)
    assert selection.mask()[0, -1, 0].nonzero().flatten().tolist() == [1, 5, 6, 9]
    k[:, [3, 5, 9, 15]] = -30.0  # of blocks 1, 2, 4 and 7
    selection = kernels.select_blocks(q, k, **windows, **blocks, scale=1.0, cu_seqlens=None)
    assert selection.mask()[0, -1, 0].nonzero().flatten().tolist() == [5, 6, 8, 9]
    k[:, 17] = -40.0  # of block 8
    selection = kernels.select_blocks(q, k, **windows, **blocks, scale=1.0, cu_seqlens=None)
    assert selection.mask()[0, -1, 0].nonzero().flatten().tolist() == [3, 5, 6, 9]


@pytest.mark.parametrize(("group", "query_bytes"), [(3, 2**16), (4, 2**16), (20, 2**13)])
def test_of_groups_scores_that_underflow_are_told_apart(group, query_bytes, monkeypatch):
    """Up to three parts of eight heads, some of them none; every other token's scores do not underflow."""
    monkeypatch.setattr(triton_select, "QUERY_BYTES", query_bytes)
    triton_select.select_tile.cache_clear()
    windows = dict(kernel_size=8, kernel_stride=4)
    blocks = dict(pooling="max", block_size=16, topk=9, init_blocks=1, local_blocks=1)
    q = torch.randn(1, 200, 1, 16).expand(-1, -1, group, -1) + 0.01 * torch.randn(1, 200, group, 16)
    q[:, ::2] *= 100
    k = torch.randn(1, num_windows(200, 8, 4), 1, 16)
    options = dict(scale=1.0, cu_seqlens=None)
    expected = reference(q, k, windows, blocks, **options)
    assert torch.equal(reference(q.double(), k.double(), windows, blocks, **options).words, expected.words)
    assert torch.equal(kernels.select_blocks(q, k, **windows, **blocks, **options).words, expected.words)
    triton_select.select_tile.cache_clear()


def test_given_normalisers_are_used():
    windows = dict(kernel_size=8, kernel_stride=4)
    blocks = dict(pooling="max", block_size=16, topk=3, init_blocks=0, local_blocks=1)
    q, k = torch.randn(1, 100, 2, 16), torch.randn(1, num_windows(100, 8, 4), 1, 16)
    lse = torch.zeros(1, 100, 2)
    lse[..., 1] = torch.inf  # silences the second head
    options = dict(**windows, **blocks, scale=1.0, cu_seqlens=None)
    silenced = kernels.select_blocks(q, k, lse, **options)
    assert torch.equal(silenced.words, kernels.select_blocks(q[:, :, :1], k, **options).words)
