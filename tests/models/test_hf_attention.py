"""Sparse attention in Hugging Face folders: what config.json says of it, and the way back."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_hf import SHAPE, assert_same_logits, edit, minicpm, save
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from dashattn.backends import DashConfig, FullConfig, IndexerConfig, InfLLMv2Config, NSAConfig
from experiments.training.weights import find_weights, load_weights
from models import Transformer
from models.hf import check_same_attention, read_attention, read_config, read_step, write_folder
from models.hf.attention import their_attention

INPUT_IDS = torch.arange(2 * 70).view(2, 70) % 61
NSA = NSAConfig(block_size=8, kernel_size=4, kernel_stride=2, topk=4, window_size=8)
SPARSE = {
    "dash": DashConfig(chunk_size=8, router_scale=0.4, prior="raw", alpha_mode="learnable", summary_rope="mean"),
    "infllmv2": InfLLMv2Config(block_size=8, kernel_size=4, kernel_stride=2, topk=4, window_size=8),
    "nsa": NSA,
    "indexer": IndexerConfig(block_size=8, index_size=6, topk=4),
    "full": FullConfig(layers={"1": {"name": "dash", "chunk_size": 8}}),
}


def load(folder, attention):
    model = Transformer(read_config(folder), attention)
    assert not load_weights(model, find_weights(folder)).differs
    return model


def sparse_model(tmp_path, attention):
    """Over weights of transformers, with parameters of the attention that are not their initial values."""
    save(tmp_path / "theirs", "qwen3")
    model = Transformer(read_config(tmp_path / "theirs"), attention)
    load_weights(model, tmp_path / "theirs")
    with torch.no_grad():
        for backend in model.backends:
            for parameter in backend.parameters():
                parameter.normal_()
    return model


@pytest.mark.parametrize("name", SPARSE)
def test_a_sparse_model_comes_back_as_it_was_and_transformers_refuses_it(tmp_path, name, monkeypatch):
    monkeypatch.delitem(CONFIG_MAPPING._extra_content, "dashattn", raising=False)  # an earlier test may have registered
    model = sparse_model(tmp_path, SPARSE[name])
    assert write_folder(tmp_path / "back", model.config, model.state_dict(), SPARSE[name], step=7) == []
    assert read_attention(tmp_path / "back") == SPARSE[name]
    assert read_step(tmp_path / "back") == 7
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (written["architectures"], written["base_model_type"]) == (["DashAttnForCausalLM"], "qwen3")
    back = load(tmp_path / "back", SPARSE[name])
    with torch.no_grad():
        assert torch.equal(back(INPUT_IDS).logits, model(INPUT_IDS).logits)
    with pytest.raises(ValueError, match="`dashattn`"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "back", local_files_only=True)
    with pytest.raises(ValueError, match=f"trained with {name} attention.*attention=checkpoint.*any_attention=true"):
        check_same_attention(FullConfig(), tmp_path / "back")


def test_a_sparse_model_is_written_as_a_dense_one_if_asked_for_and_says_so(tmp_path):
    model = sparse_model(tmp_path, SPARSE["dash"])
    left_out = write_folder(tmp_path / "back", model.config, model.state_dict(), SPARSE["dash"], dense=True)
    assert left_out == sorted(name for name in model.state_dict() if "backend" in name)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "back", local_files_only=True)
    assert_same_logits(load(tmp_path / "back", FullConfig()), dense)
    with pytest.raises(ValueError, match="trained with dash attention"):
        check_same_attention(FullConfig(), tmp_path / "back")


def test_a_target_stays_behind_and_its_knob_does_not(tmp_path):
    model = sparse_model(tmp_path, SPARSE["dash"])
    attention = replace(SPARSE["dash"], target_sparsity=0.75)
    write_folder(tmp_path / "back", model.config, model.state_dict(), attention)
    assert read_attention(tmp_path / "back") == SPARSE["dash"]


def test_a_dense_model_says_nothing_of_attention(tmp_path):
    model = sparse_model(tmp_path, FullConfig())
    write_folder(tmp_path / "back", model.config, model.state_dict(), FullConfig())
    assert (
        not {"attention", "attention_step", "base_model_type"}
        & json.loads((tmp_path / "back" / "config.json").read_text()).keys()
    )
    assert read_attention(tmp_path / "back") is None
    check_same_attention(SPARSE["dash"], tmp_path / "back")


@pytest.mark.parametrize("tempered", [True, False])
def test_the_authors_format_in_and_out(tmp_path, tempered):
    save(tmp_path / "theirs")
    path = tmp_path / "theirs" / "model.safetensors"
    queries = {f"model.layers.{i}.self_attn.indexer_q": torch.randn(2 * 32) for i in range(2)}
    save_file(load_file(path) | queries, path)
    options = {"chunk_size": 16, "estimate_diagonal": tempered, "sigma": 100.0, "scaling_factor": 0.35}
    edit(tmp_path / "theirs", **options)
    attention = read_attention(tmp_path / "theirs")
    assert (attention.prior, attention.chunk_size) == ("tempered" if tempered else "raw", 16)
    assert attention.router_scale == 0.35
    assert attention.sigma == (100.0 if tempered else DashConfig().sigma)
    edit(tmp_path / "theirs", scaling_factor=...)
    assert read_attention(tmp_path / "theirs") == replace(attention, router_scale=1.0)
    model = load(tmp_path / "theirs", attention)
    for i, backend in enumerate(model.backends):
        assert torch.equal(backend.chunk_query, queries[f"model.layers.{i}.self_attn.indexer_q"].view(2, 32))
    write_folder(tmp_path / "back", model.config, model.state_dict(), attention)
    written, weights = (
        json.loads((tmp_path / "back" / "config.json").read_text()),
        load_file(tmp_path / "back" / "model.safetensors"),
    )
    assert weights.keys() == load_file(path).keys()
    assert all(torch.equal(weights[name], queries[name]) for name in queries)
    assert {key: written[key] for key in options} == options | {"sigma": attention.sigma}


@pytest.mark.parametrize(
    "options",
    [
        *({"init_chunks": 1}, {"local_chunks": 2}, {"prior": "none"}, {"prior_heads": "head"}, {"alpha": 1.25}),
        *({"alpha_mode": "learnable"}, {"summary_rope": "mean"}, {"layers": {"0": "full"}}),
        {"summary_keys": "unrotated"},
    ],
    ids=str,
)
def test_what_the_authors_format_cannot_say_is_not_said_in_it(options):
    for same in ({}, {"learn_summary": False}, {"alpha_mode": "scheduled", "alpha_steps": 5}):
        assert "estimate_diagonal" in their_attention(DashConfig(**same), "llama", step=0)
    written = their_attention(DashConfig(**options), "llama", step=0)
    assert not {"estimate_diagonal", "chunk_size", "sigma", "scaling_factor"} & written.keys()
    assert options.items() <= written["attention"].items()


def test_minicpms_settings_become_infllmv2(tmp_path):
    minicpm(tmp_path, tie_word_embeddings=False)
    assert read_attention(tmp_path) is None
    edit(
        tmp_path,
        sparse_config={
            "kernel_size": 32,
            "kernel_stride": 16,
            "init_blocks": 1,
            "block_size": 64,
            "window_size": 2048,
            "topk": 64,
            "use_nope": False,
            "dense_len": 8192,
        },
    )
    expected = InfLLMv2Config(init_blocks=1, window_size=2048, topk=96)  # theirs counts no block of the window
    assert read_attention(tmp_path) == expected
    edit(tmp_path, sparse_config={"dense_len": 8192})
    assert read_attention(tmp_path) == expected
    with pytest.raises(ValueError, match="attention=checkpoint"):
        check_same_attention(FullConfig(), tmp_path)


def test_all_that_is_not_known_is_named_in_order(tmp_path):
    config = SHAPE | {"model_type": "minicpm", "sparse_config": {"gate": 1, "beta": 2, "topk": 3, "alpha": 0}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"sparse_config has alpha, beta, gate$"):
        read_attention(tmp_path)


def test_minicpm_attends_densely_to_what_is_shorter_than_dense_len(tmp_path):
    """Its own code asks for the length of the whole sequence, and is then dense or sparse in all of it."""
    minicpm(tmp_path, tie_word_embeddings=False)
    sizes = {"kernel_size": 4, "kernel_stride": 2, "block_size": 8, "window_size": 16, "topk": 2}
    edit(tmp_path, sparse_config=sizes | {"dense_len": 64})
    sparse, dense = read_attention(tmp_path), FullConfig()
    assert sparse.topk * sparse.block_size == 32
    check_same_attention(sparse, tmp_path, [16, 32, 64, 128])
    check_same_attention(dense, tmp_path, [16, 63])
    with pytest.raises(ValueError, match=r"fewer than dense_len=64 tokens, and here rows of 33 .*attention=full"):
        check_same_attention(sparse, tmp_path, [32, 33])
    with pytest.raises(ValueError, match="rows of 63 would be read sparsely"):
        check_same_attention(sparse, tmp_path, [63])
    check_same_attention(replace(sparse, topk=8), tmp_path, [63])
    with pytest.raises(ValueError, match="trained with infllmv2"):
        check_same_attention(dense, tmp_path, [16, 64])
    edit(tmp_path, sparse_config=sizes)
    with pytest.raises(ValueError, match="dense_len=8192 tokens, and here rows of 8191"):
        check_same_attention(sparse, tmp_path, [8192, 8191])
    edit(tmp_path, sparse_config=sizes | {"dense_len": 0})
    check_same_attention(sparse, tmp_path, [33, 8191])


@pytest.mark.parametrize(
    "values",
    [
        {"sparse_config": {"use_nope": True}},
        {"sparse_config": {"dense_len": "8192"}},
        {"sparse_config": {"topk": "64"}},
        {"sparse_config": {"topk": -1}},
        {"sparse_config": {"block_size": 0}},
        {"sparse_config": {"gate": 1}},
        {"sparse_config": [1]},
        {"estimate_diagonal": 1, "chunk_size": 16},
        {"estimate_diagonal": True, "chunk_size": 16},
        {"estimate_diagonal": False},
        {"estimate_diagonal": False, "chunk_size": 2.5},
        {"estimate_diagonal": False, "chunk_size": 16, "scaling_factor": float("nan")},
        {"attention": "dash"},
        {"attention": {"name": "lightning"}},
        {"attention": {"name": "dash", "chunks": 3}},
        {"attention": {"name": "dash", "chunk_size": "x"}},
        {"attention": {"name": []}},
    ],
    ids=str,
)
def test_attention_that_cannot_be_mapped_gets_one_line(tmp_path, values):
    (tmp_path / "config.json").write_text(json.dumps(SHAPE | {"model_type": "llama"} | values))
    with pytest.raises(ValueError, match=r"config\.json has "):
        read_attention(tmp_path)
