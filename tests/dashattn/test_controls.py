"""The oracle and the window against their definitions, token by token."""

import math

import oracle
import pytest
import torch

from dashattn import infllmv2_attention
from dashattn.controls import oracle_attention, sink_window_attention

T, HQ, H, D, SIZE = 43, 6, 2, 8, 4


@pytest.fixture(params=[256, 16], ids=["one tile", "tiles"])
def qkv(request, monkeypatch):
    monkeypatch.setattr("dashattn.ops.block_sparse.reference.QUERY_TILE", request.param)
    torch.manual_seed(3)
    return [2 * torch.randn(1, T, heads, D, dtype=torch.float64) for heads in (HQ, H, H)]


def masses(q, k):
    """[T][H][block]: mean over the group of what dense attention gives a block."""
    found = [[None] * H for _ in range(T)]
    for t in range(T):
        for h in range(H):
            total = [0.0] * (t // SIZE + 1)
            for head in range(h * HQ // H, (h + 1) * HQ // H):
                p = oracle.softmax(k[: t + 1, h] @ q[t, head] / math.sqrt(D))
                for s in range(t + 1):
                    total[s // SIZE] += p[s] / (HQ // H)
            found[t][h] = total
    return found


def forced(t, init, local):
    own = t // SIZE
    return {b for b in range(own + 1) if b < init or b >= own - local}


def compare(function, qkv, blocks, **options):
    out, stats = function(*qkv, block_size=SIZE, return_stats=True, **options)
    q, k, v = (x[0].numpy() for x in qkv)
    expected = oracle.block_sparse(q, k, v, blocks, lambda *_: 0.0, SIZE, D**-0.5)
    torch.testing.assert_close(out[0], torch.from_numpy(expected), rtol=0, atol=1e-12)
    active = oracle.active_tokens(T, H, lambda t, h, s: s // SIZE in blocks[t][h])
    assert stats.active_tokens[0].tolist() == active.tolist()
    halved = function(2 * qkv[0], *qkv[1:], block_size=SIZE, scale=D**-0.5 / 2, **options)
    torch.testing.assert_close(halved, out, rtol=0, atol=1e-12)
    return stats


@pytest.mark.parametrize(("init", "local", "topk"), [(1, 1, 4), (0, 0, 1), (2, 3, 6)])
def test_the_oracle_takes_the_heaviest_blocks(qkv, init, local, topk):
    mass = masses(*(x[0].numpy() for x in qkv[:2]))
    blocks = [
        [oracle.top_blocks(mass[t][h], t // SIZE, topk, forced(t, init, local)) for h in range(H)] for t in range(T)
    ]
    stats = compare(oracle_attention, qkv, blocks, topk=topk, init_blocks=init, local_blocks=local)
    assert stats.routing_reads[0].tolist() == list(range(1, T + 1)), "it has scored every key"


@pytest.mark.parametrize(("init", "local", "top_p"), [(1, 1, 0.8), (0, 0, 0.5), (2, 3, 0.95)])
def test_top_p_is_the_fewest_blocks_that_reach_it(qkv, init, local, top_p):
    mass = masses(*(x[0].numpy() for x in qkv[:2]))
    blocks = [[None] * H for _ in range(T)]
    for t in range(T):
        for h in range(H):
            chosen = forced(t, init, local)
            for b in sorted(range(t // SIZE + 1), key=lambda b: -mass[t][h][b]):
                if b not in chosen and sum(mass[t][h][c] for c in chosen) < top_p:
                    chosen = chosen | {b}
            blocks[t][h] = chosen
    compare(oracle_attention, qkv, blocks, select="top_p", top_p=top_p, init_blocks=init, local_blocks=local)


def test_with_everything_selected_it_is_dense(qkv):
    dense = oracle_attention(*qkv, block_size=SIZE, topk=100)
    torch.testing.assert_close(oracle_attention(*qkv, block_size=SIZE, select="top_p", top_p=1.0), dense)
    _, stats = oracle_attention(*qkv, block_size=SIZE, topk=100, return_stats=True)
    assert stats.causal_sparsity() == 0


def test_the_window_is_infllmv2_with_nothing_left_to_choose(qkv):
    windows = {"kernel_size": 2, "kernel_stride": 1, "topk": 4, "window_size": 2 * SIZE}
    expected, stats = infllmv2_attention(*qkv, block_size=SIZE, **windows, init_blocks=1, return_stats=True)
    out, own = sink_window_attention(*qkv, block_size=SIZE, init_blocks=1, local_blocks=2, return_stats=True)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    assert torch.equal(own.active_tokens, stats.active_tokens)
    assert own.routing_reads.sum() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topk": 5}, "below the 6 forced blocks"),
        ({"select": "mass"}, "topk, top_p"),
        ({"select": "top_p", "top_p": float("nan")}, r"top_p must lie in \(0, 1\]"),
        ({"select": "top_p", "top_p": 0.0}, "top_p must lie"),
        ({"init_blocks": -1}, "init_blocks must be an integer of at least 0"),
        ({"local_blocks": 1.5}, "local_blocks must be an integer"),
        ({"block_size": 0}, "block_size"),
        ({"topk": 0, "select": "top_p"}, "topk must be a positive integer"),
    ],
)
def test_refusals(options, message):
    q = torch.zeros(1, T, 2, D)
    with pytest.raises(ValueError, match=message):
        oracle_attention(q, q, q, **options)
    if options.keys() & {"block_size", "init_blocks", "local_blocks"}:
        with pytest.raises(ValueError, match=message):
            sink_window_attention(q, q, q, **options)
