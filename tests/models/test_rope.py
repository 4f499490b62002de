"""RoPE tables against transformers for every scaling, and the properties a rotation has."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

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


def test_yarns_own_bounds_are_transformers_at_a_real_head_size():
    """Small heads have so few pairs that other bounds can fall on the same ones."""
    yarn = {"factor": 4.0, "original_max_position_embeddings": 4096, "rope_type": "yarn", "rope_theta": 10000.0}
    sizes = dict(hidden_size=256, num_attention_heads=2, head_dim=128, max_position_embeddings=16384)
    theirs = LlamaRotaryEmbedding(LlamaConfig(**sizes, rope_parameters=yarn)).inv_freq
    rope = RopeConfig(theta=10000.0, scaling="yarn", factor=4.0, original_max_seq_len=4096)
    ours = inverse_frequencies(ModelConfig(256, 64, 1, 2, 1, 128, 16384, rope=rope))
    torch.testing.assert_close(ours, theirs, atol=0, rtol=1e-5)


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
