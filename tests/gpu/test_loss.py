"""The chunked loss on a GPU, where the head's gradient is summed by the products themselves."""

import pytest
import torch
import torch.nn.functional as F

from models import loss as loss_module
from models.loss import cross_entropy


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_gradients_over_many_chunks(monkeypatch, dtype):
    tokens, size, vocabulary = 4000, 256, 1000
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 100 * vocabulary)
    hidden = torch.randn(1, tokens, size, device="cuda").to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, size, device="cuda") / 16).to(dtype).requires_grad_()
    labels = torch.randint(vocabulary, (1, tokens), device="cuda")
    labels[:, ::3] = -100
    loss, *_ = cross_entropy(hidden, weight, labels)
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = F.cross_entropy(F.linear(*wide)[0], labels[0])
    torch.testing.assert_close(loss.double(), expected, atol=0, rtol=1e-3)
    scale = 1000.0  # so that float16 holds the gradients
    found, wanted = torch.autograd.grad(scale * loss, (hidden, weight)), torch.autograd.grad(scale * expected, wide)
    for ours, exact in zip(found, wanted, strict=True):
        assert (ours.double() - exact).norm() / exact.norm() < (1e-2 if dtype == torch.bfloat16 else 2e-3)
