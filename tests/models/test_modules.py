"""What a transformer block is made of beside attention."""

import torch
from torch import nn

from models.modules import project


def test_a_token_that_is_decoded_compiled_is_projected_in_float32(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    layer, x = nn.Linear(256, 1024).bfloat16(), torch.randn(1, 1, 256, dtype=torch.bfloat16)
    with torch.no_grad():
        out = project(x, layer)
        exact = layer.double()(x.double())
    assert (out.shape, out.dtype) == ((1, 1, 1024), torch.bfloat16)
    assert (out == exact.bfloat16()).float().mean() > 0.98  # but for ties
