"""Generation: the same tokens as without a cache, whatever else is in the batch."""

import subprocess
import sys

import pytest
import torch
from test_transformer import BACKENDS, VOCAB, build, every_backend, tokens
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from dashattn.backends import Capabilities, DashConfig, FullConfig
from dashattn.backends.full import FullBackend
from models import RopeConfig
from models.generate import generate, sample

PROMPTS = [tokens(1, length, seed=length)[0].tolist() for length in (1, 30, 7, 17)]


def greedy_without_cache(model, prompt, count):
    sequence = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            input_ids = torch.tensor([sequence], device=model.embedding.weight.device)
            sequence.append(model(input_ids).logits[0, -1].argmax().item())
    return sequence[len(prompt) :]


@every_backend
def test_greedy_equals_generation_without_a_cache(attention):
    model = build(attention).double()
    together = generate(model, PROMPTS, max_new_tokens=12)
    assert together == [greedy_without_cache(model, prompt, 12) for prompt in PROMPTS]


@every_backend
def test_decoded_logits_equal_one_forward(attention):
    model, input_ids = build(attention).double(), tokens(2, 40)
    cache = model.new_cache(2, 40)
    logits = []
    for piece in input_ids.split([11, 1, 1, 9, 1, 17], dim=1):
        logits.append(model.decode(piece, cache))
        cache.advance(piece.shape[1])
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(logits, dim=1), model(input_ids).logits, atol=1e-6, rtol=0)


def test_decoding_scales_embeddings_branches_and_logits_as_one_forward_does():
    model = build(BACKENDS["dash"], embedding_scale=3.0, residual_scale=0.5, logit_scale=0.25).double()
    input_ids = tokens(2, 20)
    cache = model.new_cache(2, 20)
    logits = model.decode(input_ids[:, :19], cache)
    cache.advance(19)
    logits = torch.cat([logits, model.decode(input_ids[:, 19:], cache)], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(input_ids).logits, atol=1e-6, rtol=0)


def test_decoding_knows_every_option_of_the_model():
    options = dict(norm_position="post", qk_norm="width", qkv_bias=True, no_rope_layers=[1])
    model, input_ids = build(BACKENDS["nsa, own k and v"], **options).double(), tokens(1, 30)
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.q_proj.bias.normal_()
        cache = model.new_cache(1, 30)
        logits = []
        for piece in input_ids.split([11, 1, 18], dim=1):
            logits.append(model.decode(piece, cache))
            cache.advance(piece.shape[1])
        torch.testing.assert_close(torch.cat(logits, dim=1), model(input_ids).logits, atol=1e-6, rtol=0)


@every_backend
def test_a_step_says_whether_it_waits_for_the_device(attention):
    """A tensor without values refuses to be read, as a CUDA graph under capture would."""
    with FakeTensorMode():
        model = build(attention)
        cache = model.new_cache(2, 64)
        cache.host_lengths = [20, 33]
        token = torch.zeros(2, 1, dtype=torch.int64)
        if all(b.decodes_statically(layer) for b, layer in zip(model.backends, cache.layers, strict=True)):
            assert model.decode(token, cache).shape == (2, 1, VOCAB)
        else:
            with pytest.raises(DataDependentOutputException):
                model.decode(token, cache)


def test_only_the_logits_asked_for():
    model, input_ids = build(BACKENDS["dash"]), tokens(2, 9)
    whole = model.decode(input_ids, model.new_cache(2, 9))
    some = model.decode(input_ids, model.new_cache(2, 9), at=torch.tensor([3, 8]))
    torch.testing.assert_close(some, whole[[0, 1], [3, 8]][:, None])


def test_stop_tokens_end_their_own_row_and_are_left_out():
    model = build(BACKENDS["infllmv2"])
    free = generate(model, PROMPTS, max_new_tokens=12)
    stop = free[1][4]
    stopped = generate(model, PROMPTS, max_new_tokens=12, stop_tokens={stop})
    expected = [row[: row.index(stop)] if stop in row else row for row in free]
    assert stopped == expected
    assert len(stopped[1]) < 12


def test_tokens_stream_as_they_come():
    model, seen = build(), []
    results = generate(model, PROMPTS, max_new_tokens=5, on_token=lambda row, token: seen.append((row, token)))
    assert [row for row, _ in seen] == [0, 1, 2, 3] * 5
    assert results == [[token for row, token in seen if row == index] for index in range(4)]


def test_sampling_repeats_under_its_seed_and_differs_under_another():
    model = build()
    options = dict(max_new_tokens=20, temperature=1.5)
    assert generate(model, PROMPTS, **options) == generate(model, PROMPTS, **options)
    assert generate(model, PROMPTS, **options) != generate(model, PROMPTS, **options, seed=1)


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        (1.0, 1.0, [0.5, 0.3, 0.15, 0.05]),
        (1.0, 0.81, [10 / 19, 6 / 19, 3 / 19, 0]),
        (1.0, 0.79, [0.625, 0.375, 0, 0]),
        (1.0, 0.01, [1, 0, 0, 0]),
        (0.5, 1.0, [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),
        (0.0, 1.0, [1, 0, 0, 0]),
    ],
)
def test_samples_have_the_distribution_asked_for(temperature, top_p, expected):
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(40_000, 4)
    chosen = sample(logits, temperature, top_p, torch.Generator().manual_seed(0))
    shares = chosen.bincount(minlength=4) / len(chosen)
    torch.testing.assert_close(shares, torch.tensor(expected, dtype=torch.float32), atol=0.01, rtol=0)
    assert all(share == 0 for share, p in zip(shares, expected, strict=True) if p == 0)


def test_longrope_keeps_the_factors_of_the_capacity():
    """A cached key cannot be turned again, so a sequence that may grow long starts with the long factors."""
    rope = RopeConfig(scaling="longrope", short_factor=[1.0] * 16, long_factor=[4.0] * 16, original_max_seq_len=16)
    model, input_ids = build(rope=rope).double(), tokens(1, 24)
    cache = model.new_cache(1, 24)
    logits = []
    for token in input_ids.split(1, dim=1):
        logits.append(model.decode(token, cache))
        cache.advance()
    with torch.no_grad():
        expected = model(input_ids).logits
        torch.testing.assert_close(torch.cat(logits, dim=1), expected, atol=1e-6, rtol=0)
        assert (model(input_ids[:, :8]).logits - expected[:, :8]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1, VOCAB]], {}, "outside 0 .. 60"),
        ([[1]], {"max_new_tokens": 0}, "at least 1"),
        ([[1]], {"temperature": -1.0}, "must not be negative"),
        ([[1]], {"temperature": float("nan")}, "must not be negative"),
        ([[1]], {"top_p": 0.0}, r"lie in \(0, 1\]"),
    ],
)
def test_refusals(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate(build(), prompts, **{"max_new_tokens": 3} | options)


def test_no_prompts_no_tokens():
    assert generate(build(), [], max_new_tokens=3) == []


def test_a_backend_that_cannot_decode_is_refused(monkeypatch):
    monkeypatch.setattr(FullBackend, "capabilities", Capabilities(decode=False))
    with pytest.raises(ValueError, match="attention=full cannot decode"):
        build(FullConfig()).new_cache(1, 4)


def test_a_full_cache_is_refused_before_anything_is_written():
    model = build(DashConfig(chunk_size=8))
    cache = model.new_cache(1, 4)
    model.decode(tokens(1, 3), cache)
    cache.advance(3)
    with pytest.raises(ValueError, match="the cache holds 4"):
        model.decode(tokens(1, 2), cache)


def test_the_module_imports_nothing_of_experiments():
    code = "import sys, models.generate; assert 'experiments' not in sys.modules and 'hydra' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
