import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dashattn import causal_sparsity, dash_attention, full_attention, infllmv2_attention, nsa_attention, paper_sparsity
from dashattn.selection import Selection
from dashattn.stats import AttentionStats, selection_stats


@pytest.mark.parametrize("num_blocks", [1, 31, 32, 33, 70])
def test_selection_round_trip(num_blocks):
    mask = torch.rand(2, 5, 3, num_blocks) < 0.5
    selection = Selection.from_mask(mask, 16)
    assert selection.words.dtype == torch.int32
    assert selection.words.shape == (2, 3, 5, -(-num_blocks // 32))
    unpacked = selection.mask()
    assert (unpacked[..., :num_blocks] == mask).all()
    assert not unpacked[..., num_blocks:].any()


def test_concatenate_pads_the_narrower_document():
    masks = [torch.rand(1, 4, 2, 10) < 0.5, torch.rand(1, 6, 2, 40) < 0.5]
    joined = Selection.concatenate([Selection.from_mask(m, 16) for m in masks]).mask()
    assert (joined[:, :4, :, :10] == masks[0]).all()
    assert (joined[:, 4:, :, :40] == masks[1]).all()


def test_dense_scores_zero_packed_or_not():
    q = torch.randn(1, 12, 2, 8)
    for cu_seqlens in (None, torch.tensor([0, 5, 12], dtype=torch.int32)):
        _, stats = full_attention(q, q, q, cu_seqlens=cu_seqlens, return_stats=True)
        assert stats.causal_sparsity() == 0


def test_paper_sparsity_of_dense_attention_at_16k():
    """The paper's count gives dense causal attention 37 % at 16384."""
    length = 16384
    active = torch.arange(1, length + 1).view(1, length, 1)
    assert paper_sparsity(active).item() == pytest.approx(0.375, abs=1e-3)
    assert causal_sparsity(active, torch.arange(length)[None]).item() == 0


def test_counts_by_hand():
    """Blocks of 4; token 9 reads blocks 0 and 2: four keys and the two of its own block up to itself."""
    mask = torch.zeros(1, 10, 1, 3, dtype=torch.bool)
    mask[0, :, 0, 0] = True
    mask[0, 8:, 0, 2] = True
    selection = Selection.from_mask(mask, 4)
    stats = selection_stats(selection, torch.zeros(1, 10, dtype=torch.int32), None)
    assert stats.active_tokens.flatten().tolist() == [1, 2, 3, 4, 4, 4, 4, 4, 5, 6]
    # A window of the last 3 keys: token 9 adds key 7 to blocks 0 and 2, token 5 adds keys 4 and 5.
    windowed = selection_stats(selection, torch.zeros(1, 10, dtype=torch.int32), None, window_size=3)
    assert windowed.active_tokens.flatten().tolist() == [1, 2, 3, 4, 5, 6, 7, 7, 7, 7]


def test_paper_sparsity_by_hand():
    """Tokens from ``skip`` on, two KV heads apart, over the full length."""
    active = torch.tensor([[1, 1], [2, 2], [1, 3], [2, 4]])[None]
    assert paper_sparsity(active, skip=2).item() == pytest.approx(1 - (1 + 3 + 2 + 4) / 4 / 4)
    assert paper_sparsity(active, skip=4).isnan()


@pytest.mark.parametrize("cu_seqlens", [None, [0, 5, 30]])
def test_routing_reads_are_the_candidates(cu_seqlens):
    """Past chunks that are not forced (dash), windows that end at or before the token (InfLLM v2 and NSA)."""
    q = torch.randn(1, 30, 2, 8)
    bounds = cu_seqlens or [0, 30]
    positions = [t for start, end in itertools.pairwise(bounds) for t in range(end - start)]
    if cu_seqlens is not None:
        cu_seqlens = torch.tensor(cu_seqlens, dtype=torch.int32)
    common = {"cu_seqlens": cu_seqlens, "return_stats": True}
    windows = {"block_size": 8, "kernel_size": 4, "kernel_stride": 2}
    _, dash = dash_attention(q, q, q, torch.zeros(2, 8), chunk_size=8, **common)
    forced = dict(init_chunks=1, local_chunks=1)
    _, sink = dash_attention(q, q, q, torch.zeros(2, 8), chunk_size=8, **forced, **common)
    _, infllm = infllmv2_attention(q, q, q, **windows, topk=3, window_size=8, **common)
    compressed = torch.randn(1, 14, 2, 8)
    _, nsa = nsa_attention(q, q, q, compressed, compressed, torch.rand(1, 30, 2, 3), **windows, **common)
    visible = [sum(2 * j + 3 <= t for j in range(14)) for t in positions]
    assert dash.routing_reads.flatten().tolist() == [t // 8 for t in positions]
    assert sink.routing_reads.flatten().tolist() == [max(0, t // 8 - 2) for t in positions]
    assert infllm.routing_reads.flatten().tolist() == visible
    assert nsa.routing_reads.flatten().tolist() == visible


def test_sums_of_counts_have_the_sparsity_of_all_rows():
    """Calls of different length, two KV heads: 1 - all active keys / all that they are counted against."""
    calls = []
    for length in (5000, 6000):
        active = torch.randint(1, 50, (2, length, 2)).clamp(max=torch.arange(1, length + 1)[:, None])
        calls.append(AttentionStats(active, torch.arange(length).expand(2, -1), torch.zeros(2, length)))
    active, dense = sum(call.counts("causal") for call in calls).tolist()
    assert active == sum(int(call.active_tokens.sum()) for call in calls)
    assert dense == 2 * 2 * (5000 * 5001 // 2 + 6000 * 6001 // 2)
    active, counted = sum(call.counts("paper") for call in calls).tolist()
    assert active == sum(int(call.active_tokens[:, 4096:].sum()) for call in calls)
    assert counted == 2 * 2 * (5000 * (5000 - 4096) + 6000 * (6000 - 4096))
    for count, of_one in (("causal", calls[0].causal_sparsity()), ("paper", calls[0].paper_sparsity())):
        active, counted = calls[0].counts(count).tolist()
        assert 1 - active / counted == pytest.approx(of_one.item(), abs=1e-6)


@pytest.mark.parametrize("cu_seqlens", [None, torch.tensor([0, 30, 41, 90], dtype=torch.int32)])
def test_blocks_are_counted_in_pieces_of_a_bounded_size(monkeypatch, cu_seqlens):
    """Of each token, by hand: the keys of its blocks that lie neither behind it nor in its window, and the window."""
    batch = 2 if cu_seqlens is None else 1
    mask = torch.rand(batch, 90, 3, 12) < 0.5
    starts = torch.tensor([0]) if cu_seqlens is None else cu_seqlens[:-1]
    position = [t - max(start for start in starts.tolist() if start <= t) for t in range(90)]
    expected = torch.zeros(batch, 90, 3, dtype=torch.int32)
    for row, t, head in itertools.product(range(batch), range(90), range(3)):
        chosen = {key for n in range(12) if mask[row, t, head, n] for key in range(8 * n, 8 * n + 8)}
        expected[row, t, head] = len(
            {key for key in chosen | set(range(position[t] - 4, 96)) if 0 <= key <= position[t]}
        )
    selection, reads = Selection.from_mask(mask, 8), torch.zeros(batch, 90)
    limit = 7 * batch * 3 * 32  # of seven tokens
    monkeypatch.setattr("dashattn.stats.CHUNK_BLOCKS", limit)
    with Largest() as seen:
        found = selection_stats(selection, reads, cu_seqlens, window_size=5)
    assert torch.equal(found.active_tokens, expected)
    assert seen.numel == limit


class Largest(TorchDispatchMode):
    """The most elements of any tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numel = max(self.numel, out.numel())
        return out
