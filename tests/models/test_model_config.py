"""Dataclasses and configs/model/*.yaml: validation, and every file builds at the size its name says."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue

from dashattn.backends import FullConfig
from models import ModelConfig, RopeConfig, Transformer
from models.flops import count_parameters, matmul_parameters

CONFIGS = Path(__file__).parents[2] / "configs" / "model"
MILLION, BILLION = 10**6, 10**9

# Own sizes are named after the parameters beside the embeddings, known shapes after all of them.
NON_EMBEDDING = {
    "debug": (0.3 * MILLION, 0.5 * MILLION),
    "10m": (9 * MILLION, 11 * MILLION),
    "60m": (55 * MILLION, 65 * MILLION),
    "160m": (150 * MILLION, 170 * MILLION),
    "240m": (235 * MILLION, 245 * MILLION),
    "350m": (335 * MILLION, 365 * MILLION),
    "1b": (0.95 * BILLION, 1.1 * BILLION),
    "3b": (2.7 * BILLION, 3.1 * BILLION),
}
TOTAL = {
    "8b": (8.18 * BILLION, 8.20 * BILLION),
    "llama3_8b": (8.02 * BILLION, 8.04 * BILLION),
    "qwen3_8b": (8.18 * BILLION, 8.20 * BILLION),
    "smollm2_135m": (134 * MILLION, 135 * MILLION),
}


def load(name: str) -> ModelConfig:
    values = OmegaConf.load(CONFIGS / f"{name}.yaml")
    assert values.pop("defaults") == ["model_schema", "_self_"]
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), values))


def small(**changes) -> ModelConfig:
    shape = dict(
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_seq_len=64,
    )
    return ModelConfig(**shape | changes)


def test_defaults_are_what_they_were():
    """With others a configuration that is silent, as most are, would name another model."""
    shape = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_layers": 1,
        "num_heads": 1,
        "num_kv_heads": 1,
        "head_dim": 8,
    }
    assert vars(ModelConfig(**shape, max_seq_len=8)) == shape | {
        **{"max_seq_len": 8, "vocab_size": None, "rope": RopeConfig(), "no_rope_layers": [], "norm_eps": 1e-5},
        **{"norm_position": "pre", "qk_norm": "none", "qkv_bias": False, "tie_embeddings": False},
        **{"embedding_scale": 1.0, "residual_scale": 1.0, "logit_scale": 1.0, "init_std": 0.02},
        "embedding_init_std": None,
    }
    rope = vars(RopeConfig())
    assert (rope.pop("theta"), rope.pop("scaling"), set(rope.values())) == (10_000.0, "none", {None})


def test_every_file_is_listed():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == NON_EMBEDDING.keys() | TOTAL.keys() | {"checkpoint"}


@pytest.mark.parametrize("name", sorted(NON_EMBEDDING.keys() | TOTAL.keys()))
def test_file_builds_at_its_size(name):
    config = load(name)
    assert (config.vocab_size is None) == (name in NON_EMBEDDING)
    if config.vocab_size is None:
        config = replace(config, vocab_size=32768)
    with torch.device("meta"):
        model = Transformer(config, FullConfig())
    total, table = count_parameters(model), config.vocab_size * config.hidden_size
    low, high = NON_EMBEDDING.get(name) or TOTAL[name]
    tables = table * (1 if config.tie_embeddings else 2) if name in NON_EMBEDDING else 0
    assert low <= total - tables <= high
    norms = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    assert matmul_parameters(config) == total - norms - (0 if config.tie_embeddings else table)


def test_minicpm4_multipliers():
    config = load("8b")
    assert config.residual_scale == pytest.approx(1.4 / config.num_layers**0.5)
    assert config.logit_scale == 256 / config.hidden_size


def test_qk_norm_of_older_configurations_is_that_of_each_head():
    assert [small(qk_norm=value).qk_norm for value in (True, False, "True", "width")] == [
        "head",
        "none",
        "head",
        "width",
    ]


def test_schema_stops_typos_and_missing_values():
    with pytest.raises(ConfigKeyError):
        OmegaConf.merge(OmegaConf.structured(ModelConfig), {"hiden_size": 64})
    with pytest.raises(MissingMandatoryValue):
        OmegaConf.to_object(OmegaConf.structured(ModelConfig))


@pytest.mark.parametrize(
    ("changes", "mend"),
    [
        ({"num_kv_heads": 3}, r"choose num_kv_heads among \[1, 2, 4\]"),
        ({"head_dim": 7}, "must be even"),
        ({"num_layers": 0}, r"model\.num_layers must be a number of layers.*got 0"),
        ({"vocab_size": -1}, r"model\.vocab_size must be a positive integer.*got -1"),
        ({"qk_norm": "all"}, "one of none, head, width"),
        ({"norm_position": "both"}, "one of pre, post"),
        ({"no_rope_layers": [2]}, "no_rope_layers has 2: layers are 0 to 1"),
        ({"rope": {"scaling": "ntk"}}, "one of none, linear"),
        ({"rope": {"scaling": "linear"}}, "needs rope.factor"),
        ({"rope": {"factor": 4.0}}, "set rope.factor=null or change rope.scaling"),
        ({"rope": {"theta": 0.0}}, "above 1"),
        ({"rope": {"scaling": "linear", "factor": -1.0}}, "must be a positive finite number"),
        ({"rope": {"scaling": "linear", "factor": math.inf}}, "must be a positive finite number"),
        ({"rope": {"theta": math.nan}}, "above 1"),
        ({"norm_eps": math.nan}, r"norm_eps must be a share in \(0, 1\]"),
        ({"rope": {"max_period": 6}}, "below one turn of the fastest channel pair.*the length of the training rows"),
        ({"rope": {"max_period": 64, "scaling": "linear", "factor": 2.0}}, "linear does not use rope.max_period"),
        ({"rope": {"partial_rotary_factor": 1.5}}, r"partial_rotary_factor must be a share in \(0, 1\]"),
        ({"rope": {"partial_rotary_factor": 0.4}}, "turns 3 of model.head_dim=8 channels: an even number"),
        ({"rope": {"partial_rotary_factor": 0.1}}, "turns 0 of model.head_dim=8 channels: an even number"),
        ({"rope": {"scaling": "yarn", "original_max_seq_len": 128}}, "needs rope.factor"),
        (
            {
                "rope": {
                    "scaling": "longrope",
                    "original_max_seq_len": 128,
                    "short_factor": [1.0] * 4,
                    "long_factor": [1.0] * 4,
                }
            },
            "raise max_seq_len",
        ),
        (
            {
                "rope": {
                    "scaling": "longrope",
                    "original_max_seq_len": 64,
                    "short_factor": [1.0],
                    "long_factor": [1.0],
                }
            },
            "needs one for each of 4 pairs",
        ),
        (
            {
                "rope": {
                    "scaling": "longrope",
                    "original_max_seq_len": 1,
                    "short_factor": [1.0] * 4,
                    "long_factor": [2.0] * 4,
                }
            },
            r"original_max_seq_len=1 has no attention factor.*or rope\.attention_factor",
        ),
        (
            {
                "rope": {
                    "scaling": "llama3",
                    "factor": 8.0,
                    "original_max_seq_len": 32,
                    "low_freq_factor": 4.0,
                    "high_freq_factor": 1.0,
                }
            },
            "Llama 3 uses 4 and 1",
        ),
    ],
)
def test_impossible_shapes_name_the_mend(changes, mend):
    values = OmegaConf.merge(OmegaConf.structured(small()), changes)
    with pytest.raises(ValueError, match=mend):
        OmegaConf.to_object(values)


def test_vocabulary_must_be_set_before_building():
    with pytest.raises(ValueError, match="set it to the vocabulary size"):
        Transformer(small(), FullConfig())
    with pytest.raises(ValueError, match="set it to the vocabulary size"):
        matmul_parameters(small())
