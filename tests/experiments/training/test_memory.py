"""What a run takes on each GPU, by hand; tests/experiments/test_plan.py compares it with what was measured."""

from dataclasses import replace

import pytest

from data import MQARDataConfig
from experiments.training import memory
from experiments.training.memory import Memory, estimate_memory, meta_model, savings, vocabulary


@pytest.fixture
def config(make_config):
    config = make_config("run", "attention=dash", "attention.chunk_size=8", "model.vocab_size=300")
    return replace(config, compile=True, rows_per_batch=12)


@pytest.mark.parametrize("train_only", [None, "router"])
@pytest.mark.parametrize(
    ("stage", "precision", "weights", "gradients", "optimizer"),
    [
        # In bytes of a parameter that is trained, over 4 ranks; of weights of any.
        (0, "fp32", 4, 4, 8),
        (1, "fp32", 4, 4, (8 + 4) / 4),
        (1, "bf16", 2, 4, (8 + 4) / 4),
        (1, "fp16", 2, 2, (8 + 4) / 4),
        (2, "fp32", 4, 4 / 4 + 4, (8 + 4) / 4),
        (2, "bf16", 2, 4 / 4 + 2, (8 + 4) / 4),
        (3, "bf16", 2 / 4 + 2, 4 / 4 + 2, (8 + 4) / 4),
        (3, "fp16", 2 / 4 + 2, 2 / 4 + 2, (8 + 4) / 4),
    ],
)
def test_states_by_hand(config, stage, precision, weights, gradients, optimizer, train_only):
    deepspeed = replace(config.deepspeed, stage=stage, precision=precision)
    config = replace(config, deepspeed=deepspeed, optim=replace(config.optim, train_only=train_only), compile=False)
    model = meta_model(config)
    count = sum(p.numel() for p in model.parameters())
    trained = count if train_only is None else sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (trained < count) == (train_only == "router")
    found = estimate_memory(config, 4, model)
    assert found.weights == weights * count
    assert (found.gradients, found.optimizer) == (gradients * trained, optimizer * trained)
    assert found.peak >= found.weights + found.gradients + found.optimizer + found.logits


def test_what_is_on_its_way_between_ranks_is_bounded(config, monkeypatch):
    monkeypatch.setattr(memory, "BUCKET", 1000)
    monkeypatch.setattr(memory, "LIVE", 3000)
    config = replace(config, deepspeed=replace(config.deepspeed, stage=3, precision="bf16"), compile=False)
    model = meta_model(config)
    count, found = sum(p.numel() for p in model.parameters()), estimate_memory(config, 2, model)
    assert (found.weights, found.gradients) == (2 * (count / 2 + 3000), 4 * count / 2 + 2 * 1000)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_is_at_the_loss_or_in_a_layers_backward(config, monkeypatch, checkpointing):
    class Layer:
        input, kept, scratch, lists = 1.0, 10.0, 5.0, 2.0

    class Larger:
        input, kept, scratch, lists = 1.0, 20.0, 3.0, 4.0

    layers = iter(2 * [Layer, Larger])
    monkeypatch.setattr(memory, "layer_bytes", lambda *_, **__: next(layers))
    config = replace(config, activation_checkpointing=checkpointing, deepspeed=replace(config.deepspeed, stage=1))
    config = replace(config, deepspeed=replace(config.deepspeed, precision="fp32"), rows_per_micro_batch=2)
    tokens, peaks = 2 * 64, []
    for loss in (0.0, 1e9):
        monkeypatch.setattr(memory, "loss_bytes", lambda *_, loss=loss, **__: loss)
        found = estimate_memory(config, 1)
        assert found.lists == tokens * 4
        assert found.activations == tokens * (1 + 1 + 23 if checkpointing else 30 + 5)
        peaks.append(found.peak - found.weights - found.gradients - found.optimizer)
    beside = 4 * 64 * tokens + 4 * 300 * 64  # the gradient of the hidden states, and the largest table
    assert peaks == [found.activations + beside, tokens * (2 if checkpointing else 30) + 1e9]


def test_what_costs_least_time_is_proposed_first(config):
    config = replace(config, rows_per_micro_batch=4)

    def made(config, ranks):
        return {
            " ".join(mend): (x.deepspeed.stage, x.activation_checkpointing, x.rows_per_micro_batch, x.compile)
            for mend, x in savings(config, ranks)
        }

    rows, checkpointing = (
        {"": 4, "rows_per_micro_batch=2": 2, "rows_per_micro_batch=1": 1},
        "activation_checkpointing=true",
    )
    alone = {mend: (1, False, count, True) for mend, count in rows.items()}
    alone |= {f"{checkpointing} {mend}".strip(): (1, True, count, True) for mend, count in rows.items()}
    assert list(made(config, 1).items()) == list(alone.items())
    several = made(replace(config, activation_checkpointing=True), 3)
    assert list(several.values()) == [(stage, True, n, stage < 3) for stage in (1, 2, 3) for n in (4, 2, 1)]
    assert list(several)[-1] == "deepspeed.stage=3 rows_per_micro_batch=1 compile=false"


def test_the_vocabulary_is_known_before_the_data_are(config, tmp_path):
    assert vocabulary(config) == 300
    unknown = replace(config, model=replace(config.model, vocab_size=None))
    assert vocabulary(replace(unknown, data=replace(unknown.data, vocab_size=444))) == 444
    counts = {"pairs_min": 4, "pairs_max": 4, "num_fillers": 1000, "num_keys": 200, "num_values": 30}
    assert vocabulary(replace(unknown, data=MQARDataConfig(name="mqar", seq_len=64, **counts))) == 1230
    named = replace(unknown, data=replace(unknown.data, tokenizer=str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match=r"nowhere is not at hand: set model\.vocab_size"):
        vocabulary(named)


def test_bytes_are_told_in_gib():
    sizes = {"weights": 1, "gradients": 2, "optimizer": 3, "activations": 4, "logits": 5, "lists": 6, "peak": 7}
    told = Memory(**{name: size * 2**30 for name, size in sizes.items()}, cache=0)
    assert str(told) == "weights 1.0, gradients 2.0, optimizer 3.0, activations 4.0, logits 5.0"
