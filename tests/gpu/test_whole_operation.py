"""dash_attention as a whole on a GPU: a million tokens, torch.compile, activation checkpointing, autocast."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from dashattn import dash_attention
from dashattn.ops.chunk_summary import triton as summary
from dashattn.ops.dash_attention import triton as whole
from dashattn.ops.entmax.reference import entmax

BF16 = torch.bfloat16


def relative_error(x, expected):
    return ((x.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-20)).item()


def make_inputs(length, group=16, kv_heads=1, head_dim=128):
    heads = (group * kv_heads, kv_heads, kv_heads)
    inputs = [torch.randn(1, length, h, head_dim, device="cuda", dtype=BF16) for h in heads]
    return [x.requires_grad_() for x in (*inputs, 0.2 * torch.randn(kv_heads, head_dim, device="cuda"))]


@torch.no_grad()
def test_a_million_tokens():
    """Past 2**31 elements of q and of the lists, on tokens from the first to the last."""
    chunk, group, dim, length = 64, 16, 128, 2**20 + 100
    q = torch.empty(1, length, group, dim, dtype=BF16, device="cuda").normal_()
    k, v = (torch.empty(1, length, 1, dim, dtype=BF16, device="cuda").normal_() for _ in range(2))
    assert q.numel() > 2**31
    chunk_query = torch.zeros(1, dim, device="cuda")
    summaries = summary.chunk_summary(k, chunk_query, chunk_size=chunk)
    scale = 40.0
    out, selection = whole.dash_attention(q, k, v, chunk_query, chunk_size=chunk, router_scale=scale)
    for token in (0, 63, 64, 5000, 2**19 + 7, 2**20 - 1, 2**20 + 64, length - 1):
        own = token // chunk
        words = selection.words[0, 0, token]
        chosen = ((words[:, None] >> torch.arange(32, device="cuda")) & 1).flatten().nonzero()[:, 0]
        scores = q[0, token].float() @ summaries[0, :own, 0].float().T * (scale * dim**-0.5)
        p, _ = entmax(scores, 1.5, torch.ones_like(scores, dtype=torch.bool))
        expected = torch.cat([(p > 0).any(0).nonzero()[:, 0], torch.tensor([own], device="cuda")])
        assert len(set(chosen.tolist()) ^ set(expected.tolist())) <= 1, token
        keys = (chosen[:, None] * chunk + torch.arange(chunk, device="cuda")).flatten()
        keys = keys[keys <= token]
        weights = (q[0, token].float() @ k[0, keys, 0].float().T * dim**-0.5).softmax(-1)
        assert relative_error(out[0, token], weights @ v[0, keys, 0].float()) < 5e-3, token


def test_inside_torch_compile_and_under_checkpointing():
    def attend(q, k, v, chunk_query):
        return dash_attention(q, k, v, chunk_query, router_scale=2.0, prior="raw").float().square()

    def gradients(function, inputs):
        out = function(*inputs)
        return [out.detach(), *torch.autograd.grad(out.sum(), inputs)]

    compiled = torch.compile(attend, fullgraph=True)
    for length in (700, 1024):
        inputs = make_inputs(length)
        expected = gradients(attend, inputs)
        for function in (compiled, lambda *x: checkpoint(attend, *x, use_reentrant=False)):
            for result, wanted in zip(gradients(function, inputs), expected, strict=True):
                assert relative_error(result, wanted) < 1e-3  # sums of dq have no fixed order


def test_autocast_does_not_reach_inside():
    inputs = make_inputs(500)
    expected = dash_attention(*inputs, prior="raw")
    with torch.autocast("cuda", dtype=torch.float16):
        assert torch.equal(dash_attention(*inputs, prior="raw"), expected)
