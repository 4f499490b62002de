"""What grows with the square of the length is counted before it is allocated, and refused where it can never fit."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from dashattn import dash_attention
from dashattn.ops.block_sparse import hopper_backward, schedule
from dashattn.ops.block_sparse import triton as sparse
from dashattn.ops.block_sparse.dq_sums import sums_bytes
from dashattn.ops.dash_attention import triton as whole
from dashattn.ops.tiles import Geometry, geometry
from dashattn.selection import Selection

if torch.cuda.is_available():
    pytest.skip("runs in Triton's interpreter", allow_module_level=True)


def of_length(tokens, kv_heads=2, heads=32, uniform=True):
    documents = torch.tensor([0, tokens], dtype=torch.int32)
    return Geometry(documents, tokens if uniform else None, tokens, heads, kv_heads, 128)


@pytest.mark.parametrize("tile_tokens", [4, 32, 42, 64, 128])
@pytest.mark.parametrize("cu_seqlens", [None, [0, 30, 70]])
def test_bytes_are_those_allocated(tile_tokens, cu_seqlens):
    cu_seqlens = None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32)
    geo = geometry(torch.zeros(1, 70, 4, 16), 2, cu_seqlens)
    words = Selection.from_mask(torch.ones(1, 70, 2, 5, dtype=torch.bool), 16).words[0]
    lists = schedule.tile_lists(words, geo, 16, tile_tokens)
    by_query = sum(x.nbytes for x in (lists.blocks, lists.choices, lists.counts))
    assert schedule.tile_list_bytes(geo, words.shape[-1], tile_tokens) == by_query
    lists = schedule.key_lists(words, geo, 16, 64)
    by_key = sum(x.nbytes for x in (lists.tokens, lists.counts, lists.offsets))
    assert schedule.key_list_bytes(geo, 16, 64) == by_key
    assert schedule.words_bytes(geo, words.shape[-1]) == words.nbytes


@pytest.mark.parametrize("uniform", [True, False])
def test_bytes_of_a_million_tokens(uniform):
    """Nothing of it is allocated: 2**20 tokens, 2 KV heads of 16 query heads, blocks of 64."""
    geo = of_length(2**20, uniform=uniform)
    slots = 2**20 // 8 + 1
    assert schedule.tile_list_bytes(geo, 512, 8) == 2 * slots * (512 * 32 * 8 + 8)  # 34 GB
    pairs = sum(2**20 - first for first in range(0, 2**20, 64))
    slots = 2**20 // 64 + 1
    assert schedule.key_list_bytes(geo, 64, 2048) == 4 * 2 * (pairs + slots * (2 + 512))  # 69 GB
    assert schedule.bias_bytes(geo, 2, 2**14) == 2**37


@pytest.fixture
def attend(monkeypatch):
    """DashAttention over 40 tokens on a device of ``attend.room`` bytes; launches nothing from then on."""

    def launch(*_):
        raise RuntimeError("launched")

    def call():
        out = dash_attention(q, k, v, torch.zeros(1, 16), chunk_size=16, prior="raw", impl="triton")
        monkeypatch.setattr(schedule, "device_bytes", lambda device: call.room)
        for module, name in ((whole, "summarise"), (sparse, "delta")):  # the first launches
            monkeypatch.setattr(module, name, launch)
        return out

    q, k, v = torch.randn(1, 40, 2, 16, requires_grad=True), *torch.randn(2, 1, 40, 1, 16)
    return call


WORDS_AND_BIAS = 4 * 40 + 4 * 40 * 3


def test_a_forward_that_can_never_fit_is_refused_before_anything_is_launched(attend):
    # Lists: tiles of 32 tokens, two slots.
    attend.room = WORDS_AND_BIAS + 2 * (32 * 8 + 8) - 1
    attend()
    refusal = f"40 tokens and 1 KV heads take {attend.room + 1} bytes, the device has {attend.room}: take larger blocks"
    with pytest.raises(ValueError, match=refusal):
        attend()
    attend.room += 1
    with pytest.raises(RuntimeError, match="launched"):
        attend()


def test_a_backward_that_can_never_fit_is_refused_before_anything_is_launched(attend):
    # Lists of tiles of 16 tokens, three slots, and the gradient of the bias.
    attend.room = WORDS_AND_BIAS + 3 * (32 * 8 + 8) + 4 * 40 * 3 - 1
    out = attend().sum()
    with pytest.raises(ValueError, match=f"take {attend.room + 1} bytes, the device has {attend.room}"):
        out.backward(retain_graph=True)
    attend.room += 1
    with pytest.raises(RuntimeError, match="launched"):
        out.backward()


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (32, 2, 64), (28, 4, 128), (32, 2, 128)])
def test_sums_of_dq_count_where_the_backward_for_hopper_makes_them(monkeypatch, heads, kv_heads, dim):
    geo = Geometry(torch.tensor([0, 320], dtype=torch.int32), 320, 320, heads, kv_heads, dim)
    of_token = sums_bytes(heads, kv_heads, dim, 64, 2)
    made = torch.empty(hopper_backward.sums_shape(geo), device="meta").nbytes if hopper_backward.fused(geo) else 0
    assert of_token * 320 == made
    assert (made == 0) == ((heads, dim) == (32, 128))
    assert [sums_bytes(9, 3, *other) for other in ((64, 64, 4), (64, 32, 2), (32, 64, 2))] == [0, 0, 0]

    checked = []
    monkeypatch.setattr(sparse, "check_room", lambda size, *_: checked.append(size))
    q = torch.empty(1, 320, heads, dim, dtype=torch.bfloat16, device="meta")
    for hopper in (None, hopper_backward):
        monkeypatch.setattr(sparse, "_hopper_backward", lambda *_, module=hopper: module)
        sparse.check_backward_room(q, geo, 64, 0, 0, 0, 0)  # of words of no length the lists by key are largest
    assert checked[1] - checked[0] == made


def test_more_rows_than_32_bits_count_are_refused():
    with pytest.raises(ValueError, match="split the batch"):
        geometry(torch.empty(2**10, 2**15, 64, 1, device="meta"), 64, None)
    assert geometry(torch.empty(2**9, 2**15, 64, 1, device="meta"), 64, None).tokens == 2**24


def test_a_bias_without_groups_is_not_for_the_forward_of_hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    q = SimpleNamespace(is_cuda=True, device=None, dtype=torch.bfloat16, itemsize=2)
    for heads, has_bias, takes_hopper in ((2, False, True), (2, True, False), (4, True, True)):
        geo = of_length(300, kv_heads=2, heads=heads)
        assert (sparse._hopper(q, geo, 64, has_bias) is not None) == takes_hopper
