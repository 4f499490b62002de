"""A single token's step by the kernels of ``dashattn.ops.matvec``, in Triton's interpreter where there is no GPU."""

import pytest
import torch

pytest.importorskip("triton")

from test_transformer import build, tokens

from dashattn.backends import DashConfig, FullConfig, NSAConfig
from models import RopeConfig, one_token

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL_BLOCKS = dict(block_size=8, kernel_size=4, kernel_stride=2, topk=4)


def last_logits(model, input_ids):
    """Of the last token, decoded alone behind the others."""
    cache = model.new_cache(1, input_ids.shape[1])
    model.decode(input_ids[:, :-1], cache)
    cache.advance(input_ids.shape[1] - 1)
    return model.decode(input_ids[:, -1:], cache)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention": DashConfig(chunk_size=8), "no_rope_layers": [1], "tie_embeddings": False},
        {"attention": NSAConfig(**SMALL_BLOCKS), "residual_scale": 0.3, "logit_scale": 0.5},  # gates of hidden
        {"qkv_bias": True, "qk_norm": "head", "no_rope_layers": [1]},
        {"rope": RopeConfig(partial_rotary_factor=0.5)},
        {"norm_position": "post", "qk_norm": "width", "residual_scale": 0.3},
    ],
    ids=lambda changes: "-".join(map(str, changes)) or "plain",
)
def test_the_kernels_give_what_the_modules_give(monkeypatch, changes):
    attention = changes.get("attention", FullConfig())
    model = build(attention, **{key: value for key, value in changes.items() if key != "attention"}).to(DEVICE)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms, too
            parameter.add_(0.1 * torch.randn_like(parameter))
    input_ids = tokens(1, 40).to(DEVICE)
    monkeypatch.setattr(one_token, "takes", lambda x: False)
    expected = last_logits(model, input_ids)
    steps = []
    monkeypatch.setattr(one_token, "takes", lambda x: steps.append(x.shape[1]) or x.shape[1] == 1)
    torch.testing.assert_close(last_logits(model, input_ids), expected, atol=1e-4, rtol=1e-4)
    assert steps.count(1) == len(model.layers) + 1  # the head


def test_statistics_are_the_modules(monkeypatch):
    model, taken = build(DashConfig(chunk_size=8)).to(DEVICE), []
    monkeypatch.setattr(one_token, "takes", lambda x: taken.append(x) or True)
    _, stats = model.decode(tokens(1, 1).to(DEVICE), model.new_cache(1, 1), return_stats=True)
    assert len(stats) == len(model.layers)
    assert None not in stats
    assert not taken


@pytest.mark.parametrize("what", ["gradients", "tokens", "dtype", "device", None])
def test_what_the_kernels_take(monkeypatch, what):
    class Input:
        is_cuda = what != "device"
        itemsize = 4 if what == "dtype" else 2
        shape = (1, 2 if what == "tokens" else 1, 64)

    with torch.set_grad_enabled(what == "gradients"):
        assert one_token.takes(Input()) == (what is None)
