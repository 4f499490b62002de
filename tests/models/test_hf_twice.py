"""Hugging Face folders whose config.json says something twice, or leaves to the architecture what decides."""

from dataclasses import replace

import pytest
import torch
from test_hf import KINDS, LLAMA3, YARN, assert_same_logits, edit, read, save
from transformers import AutoModelForCausalLM

from dashattn.backends import FullConfig
from models.hf import read_config, write_folder

ORIGINAL = "original_max_position_embeddings"
LONGROPE = {
    **{"rope_type": "longrope", "factor": 4.0, "rope_theta": 1e4},
    **{"short_factor": [1.0, 1.3, 1.6, 1.9], "long_factor": [1.5, 2.0, 4.0, 6.0]},
}


def edited(folder, kind, **values):
    """Our model of a folder and transformers', after its config.json was changed."""
    save(folder, kind)
    edit(folder, **values)
    return read(folder)[0], AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()


def test_of_two_notations_of_rope_the_older_wins(tmp_path):
    linear = {"rope_type": "linear", "factor": 2.0}
    assert_same_logits(*edited(tmp_path, "llama", rope_scaling=linear, rope_parameters=YARN, rope_theta=5e5))
    assert (read_config(tmp_path).rope.factor, read_config(tmp_path).rope.theta) == (2.0, 5e5)


@pytest.mark.parametrize("rope", [YARN, LLAMA3], ids=["yarn", "llama3"])
def test_two_original_lengths_are_refused_and_one_counts_wherever_it_stands(tmp_path, rope):
    save(tmp_path)
    edit(tmp_path, **{"rope_parameters": rope, ORIGINAL: 16})
    with pytest.raises(ValueError, match=f"{ORIGINAL} is 32 among the rope parameters and 16 beside them: set one"):
        read(tmp_path)
    edit(tmp_path, **{ORIGINAL: 32})
    assert read_config(tmp_path).rope.original_max_seq_len == 32
    beside = {key: value for key, value in rope.items() if key != ORIGINAL}
    assert_same_logits(*edited(tmp_path, "llama", **{"rope_parameters": beside, ORIGINAL: 16}))


def test_phi3_has_an_original_length_of_its_own(tmp_path):
    config = {"rope_parameters": LONGROPE, "max_position_embeddings": 64, "sliding_window": 200}
    assert_same_logits(*edited(tmp_path, "phi3", **config, **{ORIGINAL: ...}))
    assert read_config(tmp_path).rope.original_max_seq_len == 4096


def test_a_window_of_all_layers_is_not_taken_back_by_layer_types(tmp_path):
    save(tmp_path, "phi3")
    edit(tmp_path, sliding_window=16, layer_types=["full_attention"] * 2)
    assert read_config(tmp_path).max_seq_len == 16
    edit(tmp_path, sliding_window=None, layer_types=["full_attention", "sliding_attention"])
    with pytest.raises(ValueError, match="layer_types has sliding_attention without a sliding_window"):
        read_config(tmp_path)


def test_yarn_whose_bounds_are_exchanged_is_transformers(tmp_path):
    exchanged = YARN | {"beta_fast": 1.0, "beta_slow": 4.0}
    assert_same_logits(*edited(tmp_path, "llama", rope_parameters=exchanged))


def test_llamas_width_is_a_multiple_of_its_heads(tmp_path):
    """Its class in transformers refuses any other, whatever size heads have."""
    assert KINDS["llama"][2]["head_dim"] == 32
    save(tmp_path / "theirs", "llama")
    config = replace(read_config(tmp_path / "theirs"), hidden_size=40, max_seq_len=8192)
    torch.manual_seed(0)
    model, _ = read(tmp_path / "theirs")
    model = type(model)(config, FullConfig()).eval()
    write_folder(tmp_path / "back", config, model.state_dict(), FullConfig())
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back", local_files_only=True)
    assert (back.config.model_type, back.config.sliding_window) == ("mistral", None)
    assert_same_logits(model, back)
    assert read_config(tmp_path / "back") == config
