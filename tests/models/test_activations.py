"""What is kept for the backward pass, by hand; tests/experiments/test_plan.py holds it to what GPUs were measured to
take."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from models import ModelConfig, activations
from models.activations import layer_bytes, loss_bytes

# In 16 bits a token has 16 bytes of the residual stream, 24 inside the MLP, 256 of queries and 128 of keys.
CONFIG = ModelConfig(
    vocab_size=10,
    hidden_size=8,
    intermediate_size=12,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    max_seq_len=64,
)
KERNELS, LISTS = 1000, 500


def backend(knob, itemsize):
    def of(count):
        def asked(*given):
            assert given == (64, itemsize)
            return count

        return asked

    return SimpleNamespace(config=SimpleNamespace(knob=knob), kept_bytes=of(KERNELS), scratch_bytes=of(LISTS))


@pytest.mark.parametrize(
    ("qk_norm", "normed"), [("none", 0), ("head", 256 + 128 + 4 * 6), ("width", 256 + 128 + 4 * 2)]
)
@pytest.mark.parametrize(
    ("knob", "compiled", "mlp", "copied"),
    [("topk", True, 3 * 24, 0), ("topk", False, 4 * 24, 0), (None, True, 3 * 24, 0), (None, False, 4 * 24, 256)],
)
def test_bytes_of_a_layer_by_hand(qk_norm, normed, knob, compiled, mlp, copied):
    config = replace(CONFIG, qk_norm=qk_norm)
    found = layer_bytes(config, backend(knob, 2), 64, 2, compiled=compiled)
    norms, qkvo = 2 * (2 * 16 + 4), 256 + 128 + 128 + 256
    assert vars(found) == {
        "input": 16,
        "kept": norms + normed + qkvo + KERNELS + copied + mlp,
        "mlp": 2 * 16 + mlp,
        "mlp_scratch": 2 * 24 + 16,
        "attention_scratch": qkvo + 2 * 16 + LISTS,
        "lists": LISTS,
    }
    assert found.scratch == qkvo + 2 * 16 + LISTS - 2 * 16 - mlp
    assert replace(found, mlp_scratch=10_000).scratch == 10_000
    wide = layer_bytes(config, backend(knob, 4), 64, 4, compiled=compiled)
    assert wide.mlp_scratch == 2 * found.mlp_scratch
    factors = norms + normed - (4 * 16 + (256 + 128) * (qk_norm != "none"))  # of the norms, float32 anyway
    assert wide.kept - KERNELS - factors == 2 * (found.kept - KERNELS - factors)


@pytest.mark.parametrize(("most", "tokens_of_a_chunk"), [(2**27, 5), (29, 2), (9, 1)])
def test_bytes_of_the_loss_by_hand(monkeypatch, most, tokens_of_a_chunk):
    monkeypatch.setattr(activations, "CHUNK_LOGITS", most)
    table, hidden = 10 * 8 * (4 + 2), 3 * 2 * 8 * 5
    logits = 10 * tokens_of_a_chunk
    assert loss_bytes(CONFIG, 5, 2, compiled=True) == 2 * 2 * logits + table + hidden
    assert loss_bytes(CONFIG, 5, 2, compiled=False) == (2 + 4 + 4) * logits + table + hidden
