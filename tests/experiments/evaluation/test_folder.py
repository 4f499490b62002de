"""A Hugging Face folder is scored as it is."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from dashattn.backends import DashConfig
from data import NO_TOKEN
from data.tokenizer import train_bpe
from experiments.config import load_config, to_train_config
from experiments.evaluation.config import EvaluateConfig, register_evaluate_config
from experiments.evaluation.evaluate import evaluate, find_target, own_label
from experiments.evaluation.export import export
from experiments.evaluation.folder import locate_model
from experiments.evaluation.generate import GenerateConfig, run_generation
from experiments.evaluation.target import build_model, locate, validation_stream
from experiments.files import CONFIGS
from experiments.provenance import git_state
from experiments.schema import to_config
from experiments.training.check import check

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
    data = find_target(config).train.data
    assert (data.tokenizer, data.bos_token) == (str(folder), NO_TOKEN)  # said in full: rows are known by it


def test_another_attention_and_its_knob(folder, tmp_path, capsys):
    sparse = ("attention=dash", "attention.chunk_size=8", "knobs=[0.1,1000]")
    first, second = rows_of(configure(tmp_path, folder, *sparse))
    new = "new: attention.backend.chunk_query of layers 0-1; dropped: none"
    assert capsys.readouterr().out == f"weights of {folder}; {new}\n"
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


def test_text_that_has_changed_is_scored_anew_with_a_knob_of_its_own(folder, tmp_path):
    text = tmp_path / "text.jsonl"
    data = ("data=local", f"data.files=[{text}]", "data.seq_len=64", "data.validation_rows=4", "data.pack=plain")
    asked = (
        "attention=dash",
        "attention.chunk_size=4",
        "attention.layers={0:full}",
        "sparsities=[0.5]",
        "lengths=[64]",
    )
    found = []
    for words in ("def return", "x ( y )", "x ( y )"):
        documents = [json.dumps({"text": f"{words} {number} " * 40}) for number in range(60)]
        text.write_text("\n".join(documents))
        found.append(rows_of(configure(tmp_path, folder, *asked, data=(*data, "data.validation_fraction=0.3"))))
    (first,), (second,), third = found
    assert third == []
    assert first["config_hash"] == second["config_hash"]
    assert first["text"] != second["text"]
    assert first["knob"] != second["knob"]
    assert first["score"] != second["score"]


def test_what_cannot_be_scored_gets_one_line(folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"name the text to score it on.*data=python_stdlib"):
        find_target(configure(tmp_path, folder, data=()))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="PyTorch sees no GPU: use device=cpu"):
        find_target(configure(tmp_path, folder, "device=cuda"))
    for option, instead in (
        ("target_sparsity=0.5", r"sparsities=\[0.75\]"),
        ("sparsity_count=paper", "sparsity_count"),
        ("sparsity_control=none", "sparsities"),
    ):
        with pytest.raises(ValueError, match=rf"attention\.{option} is for training: leave it out, here {instead}"):
            find_target(configure(tmp_path, folder, "attention=dash", f"attention.{option}"))
    with pytest.raises(ValueError, match=r"a run is needed here: init_from="):
        locate(str(folder), "cpu")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention": {"name": "dash", "chunk_size": 8}}))
    for own in ((), ("attention=checkpoint",)):
        assert find_target(configure(tmp_path, folder, *own)).train.attention == DashConfig(chunk_size=8)
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
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        goes_on = ("model=checkpoint", f"init_from={folder}", "attention=full", "data.seq_len=48", "device=cpu")
        assert check(to_train_config(compose("train", goes_on))).attention.name == "full"  # so it trains, too
    window = make_folder(tmp_path / "mistral", MistralConfig, MistralForCausalLM, sliding_window=128)
    assert find_target(configure(tmp_path, window, "lengths=[128]"))
    with pytest.raises(ValueError, match="sliding_window 128"):
        find_target(configure(tmp_path, window, "lengths=[64,256]"))
    with pytest.raises(ValueError, match="layers names 5: the model's layers are 0 to 1"):
        find_target(configure(tmp_path, window, "attention=dash", "attention.layers={5:full}"))
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 200}))
    with pytest.raises(ValueError, match=r"model\.vocab_size=200 is below the 27. of data\.tokenizer"):
        find_target(configure(tmp_path, folder))
    (window / "model.safetensors").rename(tmp_path / "weights")
    with pytest.raises(ValueError, match=r"mistral has no model\.safetensors"):
        find_target(configure(tmp_path, window, "lengths=[128]"))
    (tmp_path / "weights").rename(window / "model.safetensors")
    (window / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        find_target(configure(tmp_path, window, "lengths=[128]"))
    with pytest.raises(ValueError, match=r"nowhere does not exist: give a run directory"):
        find_target(configure(tmp_path, tmp_path / "nowhere"))
    assert not (tmp_path / "rows").exists()


def test_an_export_is_scored_as_its_run(text_run, tmp_path, monkeypatch):
    """With its learned chunk queries and options, under a name that says what it is."""
    folder = tmp_path / "exported"
    export(text_run, folder)
    asked = {"tasks": ["loss"], "knobs": [20.0, 1000.0], "device": "cpu", "rows": 4}
    of_run = EvaluateConfig(run=str(text_run), output=str(tmp_path / "run"), **asked)
    _, expected = rows_of(of_run)
    trained = load_config(text_run / "config.yaml")
    same = EvaluateConfig(run=str(folder), output=str(tmp_path / "rows"), **asked)
    same.data, same.cache_dir = replace(trained.data, tokenizer=None, bos_token=None), trained.cache_dir
    as_trained, row = rows_of(same)
    assert as_trained["knob"] == as_trained["trained_knob"] == 20
    columns = ("score", "causal_sparsity", "knob", "trained_knob", "knob_name", "backend", "step", "parameters")
    assert {name: row[name] for name in columns} == {name: expected[name] for name in columns}
    assert (row["label"], row["untrained"]) == ("dash, exported", None)
    assert 0 < row["causal_sparsity"] < 1
    assert (row["tokens"], row["git_sha"]) == (0, git_state()[0]["sha"])  # nothing was trained, and who evaluates
    with monkeypatch.context() as patch:
        patch.chdir(folder)
        target = find_target(replace(same, run=".", output=None))
        assert (own_label(target), target.rows_dir) == ("dash, exported", Path("outputs/exported-dash"))
    weights, own = (build_model(find_target(config)).state_dict() for config in (of_run, same))
    (queries,) = {name for name in own if "chunk_query" in name and name.startswith("layers.0.")}
    assert own[queries].abs().sum() > 0
    torch.testing.assert_close(own, weights, rtol=0, atol=0)
    same.attention = DashConfig(chunk_size=16)
    _, other = rows_of(same)
    assert (other["label"], other["untrained"], other["trained_knob"]) == ("dash, untrained", str(folder), None)
    # Another export in its place is another model.
    same.attention = None
    before = find_target(same).identity
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    assert find_target(same).identity != before
    _, again = rows_of(same)
    assert again["score"] != row["score"]


def test_without_text_what_needs_none(text_run, tmp_path, capsys):
    folder = tmp_path / "exported"
    export(text_run, folder)
    config = EvaluateConfig(
        run=str(folder),
        output=str(tmp_path / "rows"),
        cache_dir=str(tmp_path / "cache"),
        device="cpu",
        tasks=["niah_single_1", "niah_single_2"],
        lengths=[700],
        rows=1,
    )
    with pytest.raises(ValueError, match=r"no text has no held-out text for a haystack: give haystack=FILE"):
        rows_of(config)
    config.tasks = config.tasks[:1]
    (row,) = rows_of(config)
    assert (row["task"], row["length"], row["data"]) == ("niah_single_1", 700, "no text")
    target = find_target(replace(config, lengths=[512, 700, 600]))
    assert (target.train.data.seq_len, target.train.cache_dir) == (700, config.cache_dir)
    assert locate_model(str(folder), "cpu", 40).train.data.seq_len == 40
    for asked in ({"tasks": ["loss"]}, {"tasks": ["decode"]}, {"sparsities": [0.5]}):
        with pytest.raises(ValueError, match="name the text to score it on"):
            find_target(replace(config, **asked))
    run_generation(GenerateConfig(run=str(folder), prompt="import os", device="cpu", max_new_tokens=3))
    assert capsys.readouterr().out.startswith("import os")
