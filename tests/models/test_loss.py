"""Chunked cross-entropy against the plain one, in value, gradient and memory."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from models import loss as loss_module
from models.loss import chunk_loss, cross_entropy

TOKENS, SIZE, VOCAB = 50, 24, 31


def make(dtype=torch.float32, batch=2):
    hidden = torch.randn(batch, TOKENS // batch, SIZE).to(dtype).requires_grad_()
    weight = (torch.randn(VOCAB, SIZE) / 4).to(dtype).requires_grad_()
    labels = torch.randint(VOCAB, hidden.shape[:2])
    labels[:, ::3] = -100
    return hidden, weight, labels


def plain(hidden, weight, labels):
    """The loss whose definition this is: all logits at once."""
    logits = F.linear(hidden, weight).to(torch.promote_types(hidden.dtype, torch.float32))
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    return losses.sum() / (labels != -100).sum().clamp(min=1), losses


@pytest.fixture(params=[1, 7, TOKENS, 10**6], ids="tokens={}".format)
def chunk(request, monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", request.param * VOCAB)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str
)
def test_value_and_gradients_are_those_of_the_plain_loss(dtype, tolerance):
    hidden, weight, labels = make(dtype)
    results = []
    for function in (cross_entropy, plain):
        value, losses, *_ = function(hidden, weight, labels)
        results.append([value, losses, *torch.autograd.grad(3 * value, (hidden, weight))])
    for ours, expected in zip(*results, strict=True):
        assert ours.dtype == expected.dtype
        assert (ours - expected).norm() <= tolerance * expected.norm()


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("count", [0, 1, 2])
def test_of_few_targets(count):
    hidden, weight, labels = make()
    labels = torch.full_like(labels, -100)
    labels[1, 3 : 3 + count] = 5
    value, losses, *_ = cross_entropy(hidden, weight, labels)
    expected, theirs = plain(hidden, weight, labels)
    torch.testing.assert_close((value, losses), (expected, theirs))
    torch.testing.assert_close(cross_entropy(hidden, weight, labels, torch.tensor(8))[0], expected * count / 8)


@pytest.mark.usefixtures("chunk")
def test_float16_gradients_survive_a_loss_scale():
    """Scaled losses keep float16 gradients above its smallest number: the scale must reach them unrounded."""
    hidden, weight, labels = make(torch.float16)
    scale = 2.0**16
    value, *_ = cross_entropy(hidden, weight, labels)
    ours = torch.autograd.grad(value * scale, (hidden, weight))
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = torch.autograd.grad(plain(*exact, labels)[0] * scale, exact)
    assert all((a - b).norm() <= 5e-3 * b.norm() for a, b in zip(ours, expected, strict=True))


def test_a_weight_that_is_frozen_and_no_grad():
    hidden, weight, labels = make()
    value, losses, is_likeliest = cross_entropy(hidden, weight.detach(), labels)
    value.backward()
    assert is_likeliest is None
    assert hidden.grad is not None
    assert not losses.requires_grad
    asked = []

    def spy(*inputs, with_grad):
        asked.append(with_grad)
        return chunk_loss(*inputs, with_grad=with_grad)

    with torch.no_grad():
        assert torch.equal(cross_entropy(hidden, weight, labels, chunk_loss=spy)[0], value)
    assert asked == [False]


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_whether_the_label_is_the_likeliest_token(dtype):
    hidden, weight, labels = make(dtype)
    with torch.no_grad():
        likeliest = F.linear(hidden, weight).argmax(-1)
        labels[:, 1::3] = likeliest[:, 1::3]
        _, _, found = cross_entropy(hidden, weight, labels)
    assert torch.equal(found, likeliest == labels)
    assert TOKENS / 3 <= found.sum() < (labels != -100).sum()


class LargestTensor(TorchDispatchMode):
    """The largest number of elements any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


def test_no_tensor_has_the_size_of_all_logits(monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 4 * VOCAB)
    inputs = make()
    with LargestTensor() as ours:
        cross_entropy(*inputs)[0].backward()
    with LargestTensor() as theirs:
        plain(*inputs)[0].backward()
    assert theirs.numel == TOKENS * VOCAB
    assert ours.numel == TOKENS * SIZE  # the hidden states' gradient
