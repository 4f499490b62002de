"""Hugging Face folders, with transformers as the other side."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from dashattn.backends import DashConfig, FullConfig
from experiments.training.checkpoint import find_weights, load_weights
from models import RopeConfig, Transformer
from models.hf import is_hf_folder, read_config, write_folder

SHAPE = dict(
    vocab_size=61,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=128,
    initializer_range=0.1,
    rms_norm_eps=1e-2,  # far from transformers' default, so that a lost one shows
)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 5e4}
LLAMA3 = {
    **{"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 5e5},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
LONGROPE = {
    **{"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4},
    **{"short_factor": [1.0 + 0.1 * i for i in range(16)], "long_factor": [2.0 + 0.2 * i for i in range(16)]},
}
KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama, tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "llama, linear": (
        *(LlamaConfig, LlamaForCausalLM),
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    ),
    "llama 3": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA3}),
    "llama, longrope": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LONGROPE}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    "qwen3, tied, yarn": (
        *(Qwen3Config, Qwen3ForCausalLM),
        {"tie_word_embeddings": True, "rope_parameters": YARN},
    ),
}
INPUT_IDS = torch.arange(2 * 70).view(2, 70) % 61


def save(folder, kind="llama", **options):
    """A random model of transformers, with norms that are not all 1, and its folder."""
    config_class, model_class, changes = KINDS[kind]
    model = model_class(config_class(**SHAPE | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder, **options)
    return model


def read(folder, attention=None, config=None):
    model = Transformer(config or read_config(folder), attention or FullConfig())
    return model, load_weights(model, find_weights(folder))


def edit(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@torch.no_grad()
def assert_same_logits(ours, theirs):
    torch.testing.assert_close(ours(INPUT_IDS).logits, theirs(INPUT_IDS).logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers_there_and_back(tmp_path, kind):
    theirs = save(tmp_path / "theirs", kind)
    ours, new = read(tmp_path / "theirs")
    assert new == []
    assert_same_logits(ours, theirs)
    assert write_folder(tmp_path / "back", ours.config, ours.state_dict()) == []
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back", local_files_only=True)
    assert isinstance(back, Qwen3ForCausalLM if kind.startswith("qwen3") else LlamaForCausalLM)
    assert_same_logits(ours, back)
    assert read_config(tmp_path / "back") == ours.config


def test_a_folder_of_several_files_and_the_old_names_of_rope(tmp_path):
    theirs = save(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    edit(tmp_path, rope_parameters=None, rope_theta=10000.0, rope_scaling=None)
    assert_same_logits(read(tmp_path)[0], theirs)
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(ValueError, match=r"has no model-00002.*safetensors only"):
        read(tmp_path)


def test_new_parameters_are_reported_and_the_export_leaves_them_out(tmp_path):
    theirs = save(tmp_path / "theirs")
    model, new = read(tmp_path / "theirs", DashConfig(chunk_size=128))
    assert new == [f"layers.{i}.attention.backend.chunk_query" for i in range(2)]
    assert all((backend.chunk_query == 0).all() for backend in model.backends)
    assert_same_logits(model, theirs)  # one chunk: dense attention
    assert write_folder(tmp_path / "back", model.config, model.state_dict()) == new
    assert "chunk_query" not in " ".join(load_file(tmp_path / "back" / "model.safetensors"))
    with pytest.raises(ValueError, match="exists"):
        write_folder(tmp_path / "back", model.config, model.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen2"}, "model_type 'qwen2' cannot be mapped: only llama, mistral, qwen3"),
        ({"model_type": "mistral", "sliding_window": 64}, "sliding_window 64"),
        ({"use_sliding_window": True, "sliding_window": 64}, "sliding_window 64"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"attention_bias": True, "hidden_act": "gelu"}, "hidden_act 'gelu'.*attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        ({"rope_parameters": YARN | {"mscale": 0.7}}, "rope parameters mscale of type yarn"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope.factor"),
        ({"vocab_size": None}, "vocab_size"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_mapped_is_named(tmp_path, change, message):
    save(tmp_path)
    edit(tmp_path, **change)
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


def test_missing_and_unexpected_tensors_are_named(tmp_path):
    save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(3)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"layers\.1\.mlp\.up_proj\.weight is not in the file; .*q_proj\.bias is not in"
    ):
        read(tmp_path)


def test_a_pickle_is_not_opened(tmp_path):
    save(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"has no model\.safetensors: weights are read from safetensors only"):
        read(tmp_path)


def test_tied_tables_that_differ_are_refused(tmp_path):
    save(tmp_path)  # untied
    edit(tmp_path, tie_word_embeddings=True)
    with pytest.raises(ValueError, match="untie"):
        read(tmp_path)


def test_the_model_must_be_the_folders_and_the_message_says_how(tmp_path):
    save(tmp_path, "qwen3")
    theirs = read_config(tmp_path)
    other = replace(theirs, qk_norm=False, rope=RopeConfig(theta=5.0))
    with pytest.raises(ValueError, match=r"set model\.qk_norm=true model\.rope\.theta=10000\.0"):
        read(tmp_path, config=other)
    longer = replace(theirs, max_seq_len=512, rope=RopeConfig(scaling="yarn", factor=4.0, original_max_seq_len=128))
    assert read(tmp_path, config=longer)[1] == []  # extending the context is the user's choice
    save(tmp_path / "yarn", "qwen3, tied, yarn")
    with pytest.raises(ValueError, match=r"set model\.rope\.scaling=\"yarn\""):
        read(tmp_path / "yarn", config=replace(read_config(tmp_path / "yarn"), rope=RopeConfig(theta=5e4)))


def test_scales_have_no_counterpart(tmp_path):
    save(tmp_path / "theirs")
    model, _ = read(tmp_path / "theirs")
    with pytest.raises(ValueError, match="logit_scale"):
        write_folder(tmp_path / "back", replace(model.config, logit_scale=0.5), model.state_dict())
    assert not is_hf_folder(tmp_path / "back")
