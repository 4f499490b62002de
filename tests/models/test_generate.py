"""Generation: the same tokens as without a cache, whatever else is in the batch."""

from dataclasses import replace
from types import MethodType

import pytest
import torch
from test_transformer import BACKENDS, VOCAB, build, every_backend, tokens
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from dashattn.backends import AttentionBackend, DashConfig
from models import RopeConfig
from models.generate import Sampler, Sampling, generate, padded

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
    model, told = build(attention).double(), []
    together = generate(model, PROMPTS, max_new_tokens=12, on_stats=told.append)
    assert together == [greedy_without_cache(model, prompt, 12) for prompt in PROMPTS]
    assert_prompts_stats(model, PROMPTS, *told)


def assert_prompts_stats(model, prompts, stats):
    """``stats`` are what a forward pass over the prompts tells."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    expected = model.hidden_states(padded(prompts, 0, lengths.device), lengths=lengths, return_stats=True)[1]
    for found, layer in zip(stats, expected, strict=True):
        for name in ("active_tokens", "positions", "routing_reads"):
            wanted = getattr(layer, name)
            for row, length in enumerate(lengths):
                torch.testing.assert_close(getattr(found, name)[row, :length], wanted[row, :length], atol=0, rtol=0)


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


@pytest.mark.parametrize(
    "attention",
    [
        BACKENDS["nsa, own k and v"],
        BACKENDS["dash, rotated summaries"],
        DashConfig(chunk_size=8, router_scale=3.0, summary_keys="unrotated"),
    ],
    ids=["nsa", "dash rotated", "dash unrotated"],
)
def test_decoding_knows_every_option_of_the_model(attention):
    """Also what backends turn by themselves: keys of their own, chunk queries, and keys that they turn back."""
    options = dict(norm_position="post", qk_norm="width", qkv_bias=True, no_rope_layers=[1])
    rope = RopeConfig(max_period=20, partial_rotary_factor=0.5)
    model, input_ids = build(attention, **options, rope=rope).double(), tokens(1, 30)
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
    some = model.decode(input_ids, model.new_cache(2, 9), new_tokens=[4, 9])
    torch.testing.assert_close(some, whole[[0, 1], [3, 8]][:, None])
    for wrong in ([4, 0], [4, 10], [4], []):
        with pytest.raises(ValueError, match="a number from 1 to 9 for each of 2 rows"):
            model.decode(input_ids, model.new_cache(2, 9), new_tokens=wrong)


def test_stop_tokens_end_their_own_row_and_are_left_out():
    model = build(BACKENDS["infllmv2"])
    free = generate(model, PROMPTS, max_new_tokens=12)
    stop = free[1][4]
    stopped = generate(model, PROMPTS, max_new_tokens=12, stop_tokens={stop})
    expected = [row[: row.index(stop)] if stop in row else row for row in free]
    assert stopped == expected
    assert len(stopped[1]) < 12


def test_tokens_stream_as_they_come(monkeypatch):
    model, seen, read = build(), [], []
    decode = model.decode
    monkeypatch.setattr(model, "decode", lambda x, cache, **kw: read.append(tuple(x.shape)) or decode(x, cache, **kw))
    results = generate(model, PROMPTS, max_new_tokens=5, on_token=lambda row, token: seen.append((row, token)))
    assert [row for row, _ in seen] == [0, 1, 2, 3] * 5
    assert results == [[token for row, token in seen if row == index] for index in range(4)]
    assert generate(model, PROMPTS, max_new_tokens=1) == [row[:1] for row in results]
    assert read == [(4, 30), *[(4, 1)] * 4, (4, 30)], "the prompts once, then a token at a time, and none for nothing"


def test_sampling_repeats_under_its_seed_and_differs_under_another():
    model, sampling = build(), Sampling(temperature=1.5)
    first, again, other = (
        generate(model, PROMPTS, max_new_tokens=20, sampling=sampling, seeds=[seed] * 4) for seed in (0, 0, 2**64 - 1)
    )
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_what_is_drawn_for_a_prompt_does_not_depend_on_its_neighbours():
    model, sampling = build().double(), Sampling(temperature=1.5, top_k=40, top_p=0.9, repetition_penalty=1.2)
    together = generate(model, PROMPTS, max_new_tokens=20, sampling=sampling, seeds=[5, 6, 7, 8])
    for prompt, seed, expected in zip(PROMPTS, (5, 6, 7, 8), together, strict=True):
        assert generate(model, [prompt], max_new_tokens=20, sampling=sampling, seeds=[seed]) == [expected]
    same = generate(model, PROMPTS[2:3] * 8, max_new_tokens=20, sampling=sampling)
    assert len(set(map(tuple, same))) == 8
    assert same == generate(model, PROMPTS[2:3] * 8, max_new_tokens=20, sampling=sampling, seeds=list(range(8)))


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(1.0), [0.5, 0.3, 0.15, 0.05]),
        (Sampling(1.0, top_p=0.81), [10 / 19, 6 / 19, 3 / 19, 0]),
        (Sampling(1.0, top_p=0.79), [0.625, 0.375, 0, 0]),
        (Sampling(1.0, top_p=0.01), [1, 0, 0, 0]),
        (Sampling(1.0, top_k=3), [10 / 19, 6 / 19, 3 / 19, 0]),
        (Sampling(1.0, top_k=3, top_p=0.83), [0.625, 0.375, 0, 0]),  # of what top-k leaves, the first two are 0.842
        (Sampling(1.0, top_k=9), [0.5, 0.3, 0.15, 0.05]),
        (Sampling(0.5), [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),
        (Sampling(0.0), [1, 0, 0, 0]),
        (Sampling(), [1, 0, 0, 0]),
    ],
)
def test_samples_have_the_distribution_asked_for(sampling, expected):
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(50, 4)
    sampler = Sampler(sampling, [[0]] * 50, range(50), 4, "cpu")
    chosen = torch.cat([sampler(logits) for _ in range(400)])
    shares = chosen.bincount(minlength=4) / len(chosen)
    torch.testing.assert_close(shares, torch.tensor(expected, dtype=torch.float32), atol=0.015, rtol=0)
    assert all(share == 0 for share, p in zip(shares, expected, strict=True) if p == 0)


def test_all_tokens_are_all_of_them(monkeypatch):
    clock = torch.tensor([1.0, 1e-12])  # the second one's rings first, though it has 2e-9 of the probability
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda row, generator: row.copy_(clock))
    sampler = Sampler(Sampling(temperature=1.0), [[0]], [0], 2, "cpu")
    assert sampler(torch.tensor([[0.0, -20.0]])).tolist() == [1]
    clock.zero_()  # of a token that is left out, too
    sampler = Sampler(Sampling(temperature=1.0, top_k=1), [[0]], [0], 2, "cpu")
    assert sampler(torch.tensor([[0.0, 1.0]])).tolist() == [1]


def test_a_repetition_penalty_is_transformers_own():
    from transformers import RepetitionPenaltyLogitsProcessor

    model, penalty = build().double(), 1.7
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    for prompt, new in zip(
        PROMPTS, generate(model, PROMPTS, max_new_tokens=20, sampling=Sampling(repetition_penalty=penalty)), strict=True
    ):
        for position, token in enumerate(new):
            sequence = torch.tensor([prompt + new[:position]])
            with torch.no_grad():
                logits = model(sequence).logits[:, -1]
            assert processor(sequence, logits.clone()).argmax(-1).item() == token


def test_a_penalty_is_not_rounded_to_16_bits():
    logits = torch.tensor([[1.0, 2.0, 1.0]], dtype=torch.bfloat16)
    sampler = Sampler(Sampling(repetition_penalty=1.999), [[1]], [0], 3, "cpu")
    assert sampler(logits).tolist() == [1]  # 2 / 1.999 is above 1, and 1 in bfloat16


LONGROPE = RopeConfig(
    scaling="longrope", short_factor=[1.0] * 16, long_factor=[4.0] * 16, original_max_seq_len=16, factor=4.0
)


@every_backend
def test_longrope_turns_each_row_by_its_own_length(attention):
    """Neither the row beside it nor the room in the cache has a say, before and after it passes the short length."""
    model = build(attention, rope=LONGROPE).double()
    prompts = [PROMPTS[2], PROMPTS[1], PROMPTS[2][:5], PROMPTS[3][:16]]  # 7, 30, 5 and 16 tokens; 16 are still short
    expected = [greedy_without_cache(model, prompt, 14) for prompt in prompts]
    assert generate(model, prompts, max_new_tokens=14) == expected
    for prompt, tokens_ in zip(prompts, expected, strict=True):
        assert generate(model, [prompt], max_new_tokens=3) == [tokens_[:3]]
    stop = expected[0][2]  # a row that has ended stays out of the way
    stopped = generate(model, prompts, max_new_tokens=14, stop_tokens=[stop])
    assert stopped == [row[: row.index(stop)] if stop in row else row for row in expected]


@every_backend
def test_longrope_padding_behind_a_row_does_not_count(attention):
    model, input_ids = build(attention, rope=LONGROPE).double(), tokens(3, 40)
    lengths = torch.tensor([12, 40, 17])
    with torch.no_grad():
        together = model(input_ids, lengths=lengths).logits
        assert (model(input_ids).logits[0, :12] - together[0, :12]).abs().max() > 1e-3
        for row, length in enumerate(lengths.tolist()):
            alone = model(input_ids[row : row + 1, :length]).logits
            torch.testing.assert_close(together[row, :length], alone[0], atol=1e-9, rtol=0)


def test_longrope_refuses_what_cached_keys_cannot_give():
    model, input_ids = build(rope=LONGROPE), tokens(2, 24)
    cache = model.new_cache(2, 40)
    model.decode(input_ids, cache, new_tokens=[10, 20])
    cache.advance([10, 20])
    with pytest.raises(ValueError, match=r"more than 16 tokens.*reset"):
        model.decode(input_ids[:, :7], cache)
    with pytest.raises(ValueError, match=r"up to 16 tokens.*reset"):
        cache.truncate([10, 16])
    cache.truncate([4, 17])
    assert cache.host_lengths == [4, 17]
    told = [cache.outgrows_rotation(new) for new in (12, 13, [12, 99], [13, 0], [12, 12])]
    assert told == [False, True, False, True, False], "by each one's own tokens, and what is long already does not"
    logits = model.decode(input_ids[:, :12], cache)
    assert logits.shape == (2, 12, VOCAB)
    cache.reset([0])
    model.decode(input_ids[:, :20], cache)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1, VOCAB]], {}, "prompt 0 has tokens outside 0 .. 60"),
        ([[0, VOCAB - 1], [-1]], {}, "prompt 1 has tokens outside 0 .. 60"),
        ([[1]], {"max_new_tokens": 0}, "at least 1"),
        ([[1]], {"seeds": [1, 2]}, "2 seeds for 1 prompts"),
    ],
)
def test_refusals(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate(build(), prompts, **{"max_new_tokens": 3} | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "must not be negative"),
        ({"temperature": float("nan")}, "must not be negative"),
        ({"temperature": float("inf")}, "must not be negative"),
        ({"top_p": 0.0}, r"lie in \(0, 1\]"),
        ({"top_p": float("nan")}, r"lie in \(0, 1\]"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_k": 1.5}, "top_k=1.5"),
        ({"top_k": float("nan")}, "top_k=nan"),
        ({"repetition_penalty": 0.0}, "must be positive"),
        ({"repetition_penalty": float("inf")}, "must be positive"),
    ],
)
def test_refused_sampling(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def test_no_prompts_no_tokens():
    assert generate(build(), [], max_new_tokens=3) == []


@pytest.mark.parametrize("name", ["dash", "dash, rotated summaries", "nsa, own k and v"])
def test_without_a_cache_of_its_own_a_backend_reads_everything_again(name):
    """With earlier tokens' queries, keys, tables and gates: what a cache gives, for a batch of ragged prompts too."""
    cached, model = (build(BACKENDS[name], no_rope_layers=[1]).double() for _ in range(2))
    for backend in model.backends:
        backend.capabilities = replace(backend.capabilities, decode=False)
        backend.cache_layout = MethodType(AttentionBackend.cache_layout, backend)
    prompts = [tokens(1, length, seed=length)[0].tolist() for length in (30, 9, 17)]
    told = []
    continued = generate(model, prompts, max_new_tokens=12, on_stats=told.append)
    assert continued == generate(cached, prompts, max_new_tokens=12)
    assert_prompts_stats(model, prompts, *told)
    input_ids, logits = tokens(2, 40), []
    cache = model.new_cache(2, 40)
    for piece in input_ids.split([17, 1, 1, 21], dim=1):
        logits.append(model.decode(piece, cache))
        cache.advance(piece.shape[1])
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(logits, dim=1), model(input_ids).logits, atol=1e-9, rtol=0)
    assert not AttentionBackend.decodes_statically(model.backends[0], cache.layers[0])


def test_without_a_cache_no_selection_is_handed_on():
    model = build(BACKENDS["dash, one router"])
    model.backends[0].capabilities = replace(model.backends[0].capabilities, decode=False)
    with pytest.raises(ValueError, match="leave share_selection_from out"):
        model.decode(tokens(1, 3), model.new_cache(1, 4))


def test_a_full_cache_is_refused_before_anything_is_written():
    model = build(DashConfig(chunk_size=8))
    cache = model.new_cache(1, 4)
    model.decode(tokens(1, 3), cache)
    cache.advance(3)
    with pytest.raises(ValueError, match="the cache holds 4"):
        model.decode(tokens(1, 2), cache)
