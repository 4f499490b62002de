"""The reference stays usable: what it keeps for the backward pass grows like a few T x T / 2 matrices, no more."""

import pytest
import torch

from dashattn.backends import AttentionShape, DashConfig, InfLLMv2Config, NSAConfig, build_backend


@pytest.mark.parametrize(
    "config",
    [DashConfig(prior="raw"), InfLLMv2Config(topk=8, window_size=256), NSAConfig()],
    ids=lambda config: config.name,
)
def test_saved_bytes_at_2048_tokens(config):
    heads, length = 4, 2048
    backend = build_backend(config, AttentionShape(256, heads, 2, 64))
    q, k, v = (torch.randn(1, length, h, 64, requires_grad=True) for h in (heads, 2, 2))
    storages = {}

    def record(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(record, lambda x: x):
        out = backend(q, k, v, hidden=torch.randn(1, length, 256))
    causal_matrix = heads * length * length // 2 * 4
    assert sum(storages.values()) < 4 * causal_matrix
    out.sum().backward()
