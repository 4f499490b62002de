"""A Hugging Face folder is scored as it is."""

import json
import math

import pytest
import torch
from hydra import compose, initialize_config_dir
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from data.tokenizer import train_bpe
from experiments.evaluation.config import register_evaluate_config
from experiments.evaluation.evaluate import evaluate, find_target
from experiments.evaluation.target import locate, validation_stream
from experiments.files import CONFIGS
from experiments.schema import to_config

register_evaluate_config()
TEXT = (
    "data=python_stdlib",
    "data.seq_len=64",
    "data.max_bytes=200000",
    "data.validation_rows=4",
    "data.pack=plain",
    "data.validation_fraction=0.3",
)


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "checkpoint", LlamaConfig, LlamaForCausalLM)


def make_folder(path, config_class, model_class, **values):
    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    ids = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None, initializer_range=0.2)
    model_class(config_class(**shape, **ids, num_key_value_heads=2, vocab_size=310, **values)).save_pretrained(path)
    train_bpe(iter(["def f(x):\n    return x\n" * 20]), 280, "</s>").save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return path


def configure(tmp_path, folder, *overrides, data=TEXT):
    places = (f"run={folder}", f"cache_dir={tmp_path / 'cache'}", f"output={tmp_path / 'rows'}", "device=cpu")
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        return to_config(compose("evaluate", [*places, *data, *overrides]))


def rows_of(config):
    return list(evaluate(config, find_target(config)))


def test_the_loss_is_transformers_and_nothing_was_trained(folder, tmp_path):
    config = configure(tmp_path, folder, "tasks=[loss]")
    (row,) = rows_of(config)
    model = LlamaForCausalLM.from_pretrained(folder)
    total = count = 0
    for batch in validation_stream(find_target(config)):
        logits = model(batch.input_ids).logits.log_softmax(-1)
        valid = batch.labels >= 0
        total -= logits[valid].gather(1, batch.labels[valid][:, None]).sum().item()
        count += valid.sum().item()
    assert row["score"] == pytest.approx(total / count, rel=1e-5)
    assert (row["untrained"], row["step"], row["tokens"], row["causal_sparsity"]) == (str(folder), 0, 0, 0)
    assert row["parameters"] == sum(p.numel() for p in model.parameters())
    assert json.loads((tmp_path / "rows" / "results.jsonl").read_text()) == row
    assert rows_of(config) == []  # they are there


def test_another_attention_and_its_knob(folder, tmp_path):
    sparse = ("attention=dash", "attention.chunk_size=8", "knobs=[0.1,1000]")
    first, second = rows_of(configure(tmp_path, folder, *sparse))
    assert first["causal_sparsity"] < second["causal_sparsity"]
    assert (first["backend"], first["knob"], first["trained_knob"]) == ("dash", 0.1, None)
    assert first["label"] == "dash, untrained"
    (named,) = rows_of(configure(tmp_path, folder, *sparse[:2], "knobs=[0.1]", "label=mine"))
    assert named["label"] == "mine"
    assert math.isfinite(second["score"])
    (third,) = rows_of(configure(tmp_path, folder, "attention=dash", "attention.chunk_size=8", "sparsities=[0.3]"))
    assert third["causal_sparsity"] == pytest.approx(0.3, abs=0.05)
    assert (third["target_sparsity"], third["untrained"]) == (0.3, str(folder))
    (other,) = rows_of(configure(tmp_path, folder, "attention=dash", "attention.chunk_size=4", "knobs=[1000]"))
    assert other["causal_sparsity"] > second["causal_sparsity"], "of other options, under the same label"
    assert rows_of(configure(tmp_path, folder, *sparse)) == []


def test_what_cannot_be_scored_gets_one_line(folder, tmp_path):
    with pytest.raises(ValueError, match=r"name the text to score it on.*data=python_stdlib"):
        find_target(configure(tmp_path, folder, data=()))
    with pytest.raises(ValueError, match=r"evaluate\.py scores it"):
        locate(str(folder), "cpu")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention": {"name": "dash", "chunk_size": 8}}))
    assert find_target(configure(tmp_path, folder)).train.attention.name == "dash"
    with pytest.raises(ValueError, match="trained with dash"):
        find_target(configure(tmp_path, folder, "attention=full"))
    assert (
        find_target(configure(tmp_path, folder, "attention=full", "any_attention=true")).train.attention.name == "full"
    )
    sizes = {"kernel_size": 4, "kernel_stride": 2, "block_size": 8, "window_size": 16, "topk": 2, "dense_len": 64}
    (folder / "config.json").write_text(json.dumps(config | {"sparse_config": sizes}))
    assert find_target(configure(tmp_path, folder, "lengths=[64]")).train.attention.name == "infllmv2"
    with pytest.raises(ValueError, match="rows of 48 would be read sparsely"):
        find_target(configure(tmp_path, folder, "lengths=[48,64]"))
    assert find_target(configure(tmp_path, folder, "lengths=[48]", "attention=full")).train.attention.name == "full"
    window = make_folder(tmp_path / "mistral", MistralConfig, MistralForCausalLM, sliding_window=128)
    assert find_target(configure(tmp_path, window, "lengths=[128]"))
    with pytest.raises(ValueError, match="sliding_window 128"):
        find_target(configure(tmp_path, window, "lengths=[64,256]"))
    with pytest.raises(ValueError, match="layers names 5: the model's layers are 0 to 1"):
        find_target(configure(tmp_path, window, "attention=dash", "attention.layers={5:full}"))
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 200}))
    with pytest.raises(ValueError, match=r"model\.vocab_size=200 is below the 27. of data\.tokenizer"):
        find_target(configure(tmp_path, folder))
    (window / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        find_target(configure(tmp_path, window, "lengths=[128]"))
    with pytest.raises(ValueError, match=r"nowhere does not exist: give a run directory"):
        find_target(configure(tmp_path, tmp_path / "nowhere"))
    assert not (tmp_path / "rows").exists()
