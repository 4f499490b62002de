"""RoPE tables against transformers for every scaling, and the properties a rotation has."""

import cmath
import math

import pytest
import torch
from transformers import LlamaConfig, PhiConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.phi.modeling_phi import PhiRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as apply_partial_rotary_pos_emb

from dashattn.rope import apply_rope
from models import ModelConfig, RopeConfig
from models.rope import attention_factor, inverse_frequencies, rope_tables

HEAD_DIM, MAX_SEQ_LEN, ORIGINAL = 16, 512, 128
SHORT = [1.0 + 0.1 * i for i in range(HEAD_DIM // 2)]
LONG = [1.0 + 2.0 * i for i in range(HEAD_DIM // 2)]
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN_BETAS = {"beta_fast": 16.0, "beta_slow": 2.0}
SCALINGS = [
    ("none", {}),
    ("linear", {"factor": 4.0}),
    ("llama3", LLAMA3 | {"original_max_seq_len": ORIGINAL}),
    ("yarn", {"factor": 4.0, "original_max_seq_len": ORIGINAL}),
    ("yarn", {"factor": 2.0, "original_max_seq_len": ORIGINAL, "attention_factor": 1.5} | YARN_BETAS),
    ("longrope", {"original_max_seq_len": ORIGINAL, "short_factor": SHORT, "long_factor": LONG}),
    (
        "longrope",
        {
            "original_max_seq_len": ORIGINAL,
            "short_factor": SHORT,
            "long_factor": LONG,
            "factor": 32.0,
            "attention_factor": 0.9,
        },
    ),
]


def model_config(scaling="none", **parameters) -> ModelConfig:
    rope = RopeConfig(theta=10000.0, scaling=scaling, **parameters)
    return ModelConfig(32, 64, 1, 2, 1, HEAD_DIM, MAX_SEQ_LEN, rope=rope)


def transformers_rope(scaling, parameters) -> LlamaRotaryEmbedding:
    names = {"original_max_seq_len": "original_max_position_embeddings"}
    rope_parameters = {names.get(key, key): value for key, value in parameters.items()}
    rope_parameters |= {"rope_type": "default" if scaling == "none" else scaling, "rope_theta": 10000.0}
    return LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=32,
            num_attention_heads=2,
            head_dim=HEAD_DIM,
            max_position_embeddings=MAX_SEQ_LEN,
            rope_parameters=rope_parameters,
        )
    )


@pytest.mark.parametrize(("original", "factor"), [(2, {}), (1, {"attention_factor": 0.9})])
@pytest.mark.parametrize("length", [1, 2, 3])
def test_longropes_shortest_lengths_equal_transformers(original, factor, length):
    parameters = {"original_max_seq_len": original, "short_factor": SHORT, "long_factor": LONG} | factor
    theirs = transformers_rope("longrope", parameters)(torch.zeros(1), torch.arange(length)[None])
    ours = rope_tables(model_config("longrope", **parameters), torch.arange(length))
    torch.testing.assert_close(torch.stack(ours), torch.cat(theirs))


@pytest.mark.parametrize("length", [1, ORIGINAL, ORIGINAL + 1, MAX_SEQ_LEN])
@pytest.mark.parametrize(("scaling", "parameters"), SCALINGS)
def test_tables_equal_transformers(scaling, parameters, length):
    position_ids = torch.arange(length)
    theirs = transformers_rope(scaling, parameters)(torch.zeros(1), position_ids[None])
    ours = rope_tables(model_config(scaling, **parameters), position_ids)
    for our, their in zip(ours, theirs, strict=True):
        assert our.dtype == torch.float32
        # Angles of up to 512 radians in float32, where one rounding is 3e-5.
        torch.testing.assert_close(our, their[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("original", [4096, 2**18])
def test_yarns_own_bounds_are_transformers_at_a_real_head_size(original):
    """Small heads have so few pairs that other bounds can fall on the same ones. In 2**18 tokens all 64 turn more than
    once: the upper bound lies beyond the last.
    """
    yarn = {"factor": 4.0, "original_max_position_embeddings": original, "rope_type": "yarn", "rope_theta": 10000.0}
    sizes = dict(hidden_size=256, num_attention_heads=2, head_dim=128, max_position_embeddings=4 * original)
    theirs = LlamaRotaryEmbedding(LlamaConfig(**sizes, rope_parameters=yarn)).inv_freq
    rope = RopeConfig(theta=10000.0, scaling="yarn", factor=4.0, original_max_seq_len=original)
    ours = inverse_frequencies(ModelConfig(256, 64, 1, 2, 1, 128, 4 * original, rope=rope))
    torch.testing.assert_close(ours, theirs, atol=0, rtol=1e-5)


def turned_by_definition(x_TD, config):
    """Channel pair (i, i + D/2) of token t as a complex number, multiplied by e^(i t theta^(-2i/D)) if it comes round
    within ``max_period`` tokens."""
    half, result = config.head_dim // 2, x_TD.double().clone()
    for position, x_D in enumerate(x_TD.tolist()):
        for pair in range(half):
            frequency = config.rope.theta ** (-2 * pair / config.head_dim)
            if 2 * math.pi / frequency <= config.rope.max_period:
                turned = complex(x_D[pair], x_D[pair + half]) * cmath.exp(1j * position * frequency)
                result[position, pair], result[position, pair + half] = turned.real, turned.imag
    return result


@pytest.mark.parametrize(("max_period", "turning"), [(7, 1), (20, 2), (500, 4), (10**5, 8)])
def test_pairs_that_do_not_come_round_within_max_period_have_no_position(max_period, turning):
    """HoPE, token by token. Pair i of 8 turns once in 2 pi 10^(i/2) tokens."""
    config = model_config(max_period=max_period)
    x_TD = torch.randn(40, HEAD_DIM)
    tables = rope_tables(config, torch.arange(40))
    turned = apply_rope(x_TD[None, :, None], *tables)[0, :, 0]
    torch.testing.assert_close(turned.double(), turned_by_definition(x_TD, config), atol=1e-5, rtol=0)
    still = torch.arange(HEAD_DIM).view(2, -1)[:, turning:].flatten()
    assert torch.equal(turned[:, still], x_TD[:, still])
    assert (turned[1:] != x_TD[1:]).any(0).sum() == 2 * turning


PARTIAL = [(scaling, parameters) for scaling, parameters in SCALINGS if scaling != "longrope"] + [
    ("longrope", {"original_max_seq_len": ORIGINAL, "short_factor": SHORT[:6], "long_factor": LONG[:6], "factor": 4.0})
]


@pytest.mark.parametrize("length", [3, ORIGINAL + 1])
@pytest.mark.parametrize(("scaling", "parameters"), PARTIAL)
def test_a_part_of_a_head_is_turned_as_by_transformers(scaling, parameters, length):
    """There channel i of the first R turns with i + R/2; here all of a head is in halves."""
    channels = HEAD_DIM * 3 // 4
    halves = [*range(channels // 2), *range(channels, HEAD_DIM - 2), *range(channels // 2, channels), *range(14, 16)]
    names = {"original_max_seq_len": "original_max_position_embeddings"}
    rope = {names.get(key, key): value for key, value in parameters.items()} | {"partial_rotary_factor": 0.75}
    rope |= {"rope_type": "default" if scaling == "none" else scaling, "rope_theta": 10000.0}
    sizes = dict(hidden_size=32, num_attention_heads=2, max_position_embeddings=MAX_SEQ_LEN, pad_token_id=0)
    theirs = PhiRotaryEmbedding(PhiConfig(**sizes, rope_parameters=rope))
    q_BTHD, k_BTHD = torch.randn(1, length, 2, HEAD_DIM), torch.randn(1, length, 1, HEAD_DIM)
    tables = theirs(q_BTHD, torch.arange(length)[None])
    expected = apply_partial_rotary_pos_emb(q_BTHD.transpose(1, 2), k_BTHD.transpose(1, 2), *tables)
    config = model_config(scaling, **parameters, partial_rotary_factor=0.75)
    torch.testing.assert_close(inverse_frequencies(config), theirs.original_inv_freq, atol=0, rtol=1e-5)
    ours = rope_tables(config, torch.arange(length))
    for x_BTHD, expected_BHTD in zip((q_BTHD, k_BTHD), expected, strict=True):
        turned = apply_rope(x_BTHD[..., halves], *ours)
        torch.testing.assert_close(turned, expected_BHTD.transpose(1, 2)[..., halves], atol=2e-4, rtol=0)


def test_apply_equals_transformers():
    torch.manual_seed(0)
    q_BTHD, k_BTHD = torch.randn(2, 9, 3, HEAD_DIM), torch.randn(2, 9, 1, HEAD_DIM)
    cos, sin = rope_tables(model_config(), torch.arange(9))
    q_BHTD, k_BHTD = apply_rotary_pos_emb(q_BTHD.transpose(1, 2), k_BTHD.transpose(1, 2), cos[None], sin[None])
    torch.testing.assert_close(apply_rope(q_BTHD, cos, sin), q_BHTD.transpose(1, 2))
    torch.testing.assert_close(apply_rope(k_BTHD, cos, sin), k_BHTD.transpose(1, 2))


def test_scores_depend_on_the_distance_only():
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, HEAD_DIM).double(), torch.randn(1, 1, 1, HEAD_DIM).double()

    def score(query_position, key_position):
        tables = rope_tables(model_config(), torch.tensor([query_position, key_position]))
        cos, sin = (table.double() for table in tables)
        return (apply_rope(q, cos[:1], sin[:1]) * apply_rope(k, cos[1:], sin[1:])).sum()

    torch.testing.assert_close(score(9, 2), score(107, 100), atol=1e-4, rtol=0)


def test_rows_with_their_own_positions():
    position_ids = torch.stack((torch.arange(6), torch.arange(6) + 40))
    cos_BTD, sin_BTD = rope_tables(model_config(), position_ids)
    x_BTHD = torch.randn(2, 6, 3, HEAD_DIM)
    alone = apply_rope(x_BTHD[1:], *rope_tables(model_config(), position_ids[1]))
    torch.testing.assert_close(apply_rope(x_BTHD, cos_BTD, sin_BTD)[1:], alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_result_has_the_dtype_of_the_input_and_is_rounded_once(dtype):
    torch.manual_seed(0)
    x_BTHD = torch.randn(1, 300, 2, HEAD_DIM).to(dtype)
    tables = rope_tables(model_config(), torch.arange(300))
    rotated = apply_rope(x_BTHD, *tables)
    assert rotated.dtype == dtype
    exact = apply_rope(x_BTHD.double(), *tables)
    assert (rotated - exact).norm() / exact.norm() <= torch.finfo(dtype).eps / 2


def test_longrope_factors_follow_each_document():
    """A short document beside a long one keeps its short factors, as it has them alone."""
    config = model_config("longrope", original_max_seq_len=8, short_factor=SHORT, long_factor=LONG)
    lengths = [5, 20, 8]
    position_ids = torch.cat([torch.arange(n) for n in lengths])
    cu_seqlens = torch.tensor([0, 5, 25, 33], dtype=torch.int32)
    alone = [rope_tables(config, torch.arange(n)) for n in lengths]
    for packed, pieces in zip(rope_tables(config, position_ids, cu_seqlens), zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(packed, torch.cat(pieces), atol=0, rtol=0)


def test_attention_factor_of_minicpm_is_one():
    """Its max_seq_len equals the original length."""
    config = model_config("longrope", original_max_seq_len=MAX_SEQ_LEN, short_factor=SHORT, long_factor=LONG)
    assert attention_factor(config) == 1.0
