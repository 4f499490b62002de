"""Launch options that are timed on a GPU."""

import pytest
import torch

pytest.importorskip("triton")

from dashattn.ops import tuning
from dashattn.ops.block_sparse.triton_backward import query_grad_kernel
from dashattn.ops.dash_attention.triton import dash_attention


def relative_error(x, expected):
    return ((x.float() - expected.float()).norm() / expected.float().norm()).item()


def make(length, heads):
    return torch.randn(1, length, heads, 64, device="cuda").bfloat16().requires_grad_()


def test_options_are_timed_once_and_kept(monkeypatch, tmp_path):
    """Timings leave no trace in the results; another length compiles nothing, and another process times nothing."""

    def step(length):
        torch.manual_seed(0)
        q, k, v = (make(length, heads) for heads in (8, 2, 2))
        chunk_query = torch.zeros(2, 64, device="cuda", requires_grad=True)
        out, _ = dash_attention(q, k, v, chunk_query, chunk_size=64, prior="raw")
        return out, *torch.autograd.grad(out, (q, k, v, chunk_query), torch.randn_like(out))

    def new_process():
        monkeypatch.setattr(tuning, "_chosen", {})
        monkeypatch.setattr(tuning, "_untimed", {})
        tuning._kept.cache_clear()

    monkeypatch.setattr("dashattn.ops.block_sparse.triton._hopper_backward", lambda *_: None)  # which has no options
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "none.jsonl")
    monkeypatch.setenv("DASHATTN_CACHE", str(tmp_path))
    new_process()
    expected = step(tuning.TIMED_TOKENS)
    assert not (tmp_path / "tuning.jsonl").exists()
    monkeypatch.setattr(tuning, "ENABLED", True)
    timed = step(tuning.TIMED_TOKENS)
    assert all(relative_error(a, b) < 5e-3 for a, b in zip(timed, expected, strict=True))
    kept = (tmp_path / "tuning.jsonl").read_text()
    assert len(kept.splitlines()) == len(tuning._chosen) >= 6

    compiled = sum(len(cache[0]) for cache in query_grad_kernel.device_caches.values())
    new_process()
    monkeypatch.setattr(tuning, "_milliseconds", None)
    for length in (1, tuning.TIMED_TOKENS + 1, tuning.TIMED_TOKENS):
        results = step(length)
    assert all(torch.equal(a, b) for a, b in zip(results, timed, strict=True))
    assert sum(len(cache[0]) for cache in query_grad_kernel.device_caches.values()) == compiled
    assert (tmp_path / "tuning.jsonl").read_text() == kept
    tuning._kept.cache_clear()
