"""What a run takes from the checkpoint it starts from, and keeps."""

import json
import os
import shutil
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from data import NO_TOKEN
from data.tokenizer import TextTokenizer, build_tokenizer, train_bpe
from experiments import origin as origin_module
from experiments.config import load_config, to_train_config
from experiments.evaluation import export, target
from experiments.origin import LEFT_OPEN, parse_branch, with_commits
from experiments.training.check import check
from models import ModelConfig, RopeConfig
from models.hf import read_config
from tests.checkpoints import make_folder
from train import train

CONFIGS = Path(__file__).parents[2] / "configs"
RUN = (
    *("device=cpu", "threads=1", "logger=off", "steps=2", "rows_per_batch=2", "log_every=1", "stats_every=0"),
    *("eval_every=0", "save_every=0", "optim.lr=1e-3", "optim.warmup_steps=0"),
)
TEXT = ("data.seq_len=64", "data.max_bytes=200000", "data.validation_rows=2", "data.validation_fraction=0.2")
LLAMA3 = {
    **{"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 5e5},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}


@pytest.fixture
def folder(tmp_path):
    """A tiny checkpoint whose tokenizer ends texts with a token of its own."""
    return make_folder(tmp_path / "checkpoint")


def configure(tmp_path, *overrides, data=TEXT):
    places = (f"run_dir={tmp_path / 'run'}", f"cache_dir={tmp_path / 'cache'}")
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return to_train_config(compose("train", [*RUN, "model=checkpoint", *places, *data, *overrides]))


def test_the_file_leaves_every_value_of_the_model_open():
    values = OmegaConf.to_container(OmegaConf.load(CONFIGS / "model" / "checkpoint.yaml"), resolve=False)
    rope = values.pop("rope")
    assert rope == dict.fromkeys(("theta", "scaling", "partial_rotary_factor"), LEFT_OPEN)
    assert all(item.default is None for item in fields(RopeConfig) if item.name not in rope)
    names = {item.name for item in fields(ModelConfig)} - {"rope"}
    assert values == {name: LEFT_OPEN for name in names} | {"defaults": ["model_schema", "_self_"]}


def test_a_model_is_the_checkpoints_but_for_what_is_given(folder, tmp_path):
    config = configure(tmp_path, f"init_from={folder}")
    assert config.model == read_config(folder)
    assert config.data.tokenizer == str(folder)
    config = configure(tmp_path, f"init_from={folder}", "model.max_seq_len=512", "data.tokenizer=elsewhere.json")
    assert (config.model.max_seq_len, config.model.hidden_size) == (512, 32)
    assert config.data.tokenizer == "elsewhere.json"
    with pytest.raises(ValueError, match="model=checkpoint is that of init_from"):
        configure(tmp_path)
    for group in ("model=checkpoint", "attention=checkpoint"):
        for origin, said in (
            (tmp_path / "gone", "does not exist: init_from takes"),
            (tmp_path, "is neither a run nor"),
        ):
            with pytest.raises(ValueError, match=said):
                configure(tmp_path, "model=debug", group, f"init_from={origin}")


def test_a_scaling_that_is_given_replaces_the_checkpoints_with_its_parameters(tmp_path):
    folder = make_folder(tmp_path / "llama3", rope_parameters=LLAMA3, max_position_embeddings=128)
    rope = configure(tmp_path, f"init_from={folder}").model.rope
    assert (rope.scaling, rope.factor, rope.theta) == ("llama3", 4.0, 5e5)
    rope = configure(tmp_path, f"init_from={folder}", "model.rope.scaling=none").model.rope
    assert (rope.scaling, rope.factor, rope.low_freq_factor, rope.theta) == ("none", None, None, 5e5)


def test_a_vocabulary_below_the_tokenizers_is_refused_before_anything_is_built(tmp_path):
    folder = make_folder(tmp_path / "small", vocab_size=270)
    config = configure(tmp_path, f"init_from={folder}")
    with pytest.raises(ValueError, match=r"model\.vocab_size=270 is below the 272 of data\.tokenizer"):
        check(config)
    assert not (tmp_path / "cache").exists()


def test_a_checkpoint_without_a_tokenizer_is_refused(folder, tmp_path):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer\.json.*data\.tokenizer"):
        configure(tmp_path, f"init_from={folder}")
    assert configure(tmp_path, f"init_from={folder}", data=["data=mqar"]).model.vocab_size == 310  # no text


def test_a_run_keeps_its_tokenizer_and_needs_its_origin_no_more(folder, tmp_path):
    overrides = (f"init_from={folder}", "attention=dash", "attention.chunk_size=16", "save_every=1")
    run = train(configure(tmp_path, *overrides))
    kept = TextTokenizer.load(str(run / "tokenizer"))
    assert json.loads((run / "start.json").read_text())["tokenizer"] == kept.fingerprint()
    assert (kept.eos_token, kept.settings["bos_token"]) == ("</s>", "<s>")
    weights = load_file(run / "checkpoints" / "step-00000002" / "model.safetensors")
    shutil.rmtree(folder)
    found = target.locate(str(run), "cpu")
    assert target.validation_stream(found).tokenizer.fingerprint() == kept.fingerprint()
    target.check_tokenizer(found, kept)
    other = TextTokenizer(train_bpe(iter(["x"]), 257, "</s>"), "</s>")
    with pytest.raises(ValueError, match=r"step-00000002/tokenizer is another tokenizer.*restore it"):
        target.check_tokenizer(found, other)
    shutil.rmtree(run / "checkpoints" / "step-00000002")
    (run / "checkpoints" / "latest").write_text("step-00000001\n")
    resumed = load_file(train(configure(tmp_path, *overrides)) / "checkpoints" / "step-00000002" / "model.safetensors")
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)


def test_a_run_that_continues_another_reads_text_as_it_does(folder, tmp_path):
    first = train(configure(tmp_path, f"init_from={folder}", "model.rope.max_period=64"))
    second = configure(tmp_path, f"init_from={first}", f"run_dir={tmp_path / 'second'}", "data.max_bytes=300000")
    assert second.model == load_config(first / "config.yaml").model
    assert second.data.tokenizer == str(first / "tokenizer")
    checkpoint = first / "checkpoints" / "step-00000002"
    assert configure(tmp_path, f"init_from={checkpoint}", f"run_dir={tmp_path / 'second'}").model == second.model
    assert second.model.rope.max_period == 64
    longer = ("model.max_seq_len=4096", f"init_from={first}", f"run_dir={tmp_path / 'second'}")
    assert check(configure(tmp_path, *longer)).model.rope.max_period == 64
    for other, mend in (
        ("model.rope.scaling=none", r"model\.rope\.max_period=64"),
        ("model.rope.max_period=32", r"model\.rope\.max_period=64"),
        ("model.rope.partial_rotary_factor=0.5", r"model\.rope\.partial_rotary_factor=null"),
        ("model.norm_eps=0.1", r"model\.norm_eps=1e-06"),
    ):
        with pytest.raises(ValueError, match=rf"the model is not the one in .*step-00000002: set {mend}, or take"):
            check(configure(tmp_path, f"init_from={checkpoint}", f"run_dir={tmp_path / 'second'}", other))
    start = json.loads((train(second) / "start.json").read_text())
    assert start["tokenizer"] == json.loads((first / "start.json").read_text())["tokenizer"]


def test_an_export_has_the_tokenizer_and_its_ids(tmp_path):
    folder = make_folder(tmp_path / "checkpoint", (Qwen2Config, Qwen2ForCausalLM))
    run = train(configure(tmp_path, f"init_from={folder}"))
    export.export(run, tmp_path / "back")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "back", local_files_only=True)
    ours = TextTokenizer.load(str(folder))
    assert tokenizer("def f(x)", add_special_tokens=False)["input_ids"] == ours.encode("def f(x)")
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template) == ("<s>", "</s>", "{{ messages }}")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (ours.named_bos_id, ours.eos_id)
    assert config["model_type"] == "qwen2"
    assert read_config(tmp_path / "back") == read_config(folder)
    card = (tmp_path / "back" / "README.md").read_text()
    assert "`full`, exact causal attention." in card
    assert "How to load it" not in card


def test_others_may_read_what_a_run_and_an_export_hold(folder, tmp_path):
    before = os.umask(0o022)
    try:
        run = train(configure(tmp_path, f"init_from={folder}", "data.tokenizer=null"))
        trained = configure(tmp_path, "init_from=null", "model=debug", f"run_dir={tmp_path / 'trained'}")
        build_tokenizer(trained.data, tmp_path / "cache")
        export.export(run, tmp_path / "back")
    finally:
        os.umask(before)
    for place in (run / "checkpoints", run / "tokenizer", tmp_path / "cache", tmp_path / "back"):
        for path in (place, *place.rglob("*")):
            if "deepspeed" not in path.parts and path.suffix != ".lock":
                assert path.stat().st_mode & 0o444 == 0o444, path


def test_a_sparse_export_says_what_it_was_and_is_taken_as_such(folder, tmp_path):
    dash = ("attention=dash", "attention.chunk_size=16", "attention.target_sparsity=0.15", "stats_every=2")
    run = train(configure(tmp_path, f"init_from={folder}", *dash))
    attention = target.locate(str(run), "cpu").train.attention
    assert attention.router_scale != load_config(run / "config.yaml").attention.router_scale
    measured = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["causal_sparsity"]
    export.main([str(run), str(tmp_path / "sparse")])
    export.main(["--dense", str(run), str(tmp_path / "dense")])
    commit = json.loads((run / "git.json").read_text())["sha"]
    for name, words in (("sparse", "attention=checkpoint"), ("dense", "written as those of a dense model")):
        card = (tmp_path / name / "README.md").read_text()
        for expected in (
            words,
            "`dash`:",
            f"- router_scale: {attention.router_scale}",
            f"{measured:.1%} of training rows",
            commit,
        ):
            assert expected in card
        assert "- python_stdlib, rows of 64 tokens" in card

    later = f"run_dir={tmp_path / 'later'}"
    taken = configure(tmp_path, f"init_from={tmp_path / 'sparse'}", "attention=checkpoint", later)
    assert taken.attention == replace(attention, target_sparsity=None)
    of_run = configure(tmp_path, f"init_from={run}", "attention=checkpoint", later)
    assert of_run.attention == load_config(run / "config.yaml").attention
    given = configure(tmp_path, f"init_from={run}", "attention=checkpoint", "attention.impl=reference", later)
    assert given.attention == replace(of_run.attention, impl="reference")
    assert configure(tmp_path, f"init_from={folder}", "attention=checkpoint", later).attention.name == "full"
    check(taken)
    start = json.loads((train(taken) / "start.json").read_text())
    assert start["init_from"]["new_parameters"] == []

    for name in ("sparse", "dense"):
        dense = ("attention=full", f"init_from={tmp_path / name}", f"run_dir={tmp_path / name}-run")
        with pytest.raises(ValueError, match=r"trained with dash attention.*any_attention=true"):
            check(configure(tmp_path, *dense))
        assert (train(configure(tmp_path, *dense, "any_attention=true")) / "metrics.jsonl").exists()


def test_another_model_and_missing_files_are_refused_before_anything_is_built(tmp_path):
    folder = make_folder(tmp_path / "checkpoint", shard_size="20KB")
    with pytest.raises(ValueError, match=r"the model is not the one in .* set model\.hidden_size=32"):
        check(configure(tmp_path, f"init_from={folder}", "model.hidden_size=64"))
    with pytest.raises(ValueError, match="attention=checkpoint is that of init_from"):
        configure(tmp_path, "model=debug", "attention=checkpoint")
    shard = next(folder.glob("model-00002*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{shard.name} is cut short .*bytes"):
        check(configure(tmp_path, f"init_from={folder}"))
    shard.unlink()
    with pytest.raises(ValueError, match=f"has no {shard.name}"):
        check(configure(tmp_path, f"init_from={folder}"))
    assert not (tmp_path / "cache").exists()


def of_run(folder, data):
    """A folder that says of a run what is read of it here, with the tokenizer's."""
    (folder / "tokenizer").mkdir(parents=True)
    values = {"model": {}, "attention": {}, "data": data}
    OmegaConf.save(OmegaConf.create(values), folder / "config.yaml")
    return folder


def test_text_begins_and_ends_as_where_the_weights_come_from_unless_told_otherwise(tmp_path):
    run = of_run(tmp_path / "run", {"bos_token": "<s>", "eos_token": "<e>"})
    before = of_run(tmp_path / "before", {})  # of before there were such tokens
    for origin, own, expected in (
        (run, {}, ("<s>", "<e>")),
        (run, {"bos_token": "<b>"}, ("<b>", "<e>")),
        (run, {"eos_token": "<b>"}, ("<s>", "<b>")),
        (before, {}, (NO_TOKEN, None)),
    ):
        data = OmegaConf.create({"tokenizer": None, "bos_token": None, "eos_token": None} | own)
        origin_module._take_tokenizer(data, origin)
        assert (data.tokenizer, data.bos_token, data.eos_token) == (str(origin / "tokenizer"), *expected)


def test_a_branch_is_a_run_and_a_step():
    assert parse_branch("outputs/a@b@12") == (Path("outputs/a@b"), 12)
    for wrong in ("run", "run@", "@3", "run@x", "run@-1", "run@1.5"):
        with pytest.raises(ValueError, match=rf"branch_from={wrong}: give RUN@STEP"):
            parse_branch(wrong)


def test_commits_of_the_hub_are_those_that_a_run_began_with(tmp_path, monkeypatch):
    """By corpus of a mixture, or of the only one; a run that is there before the one that it branches off."""
    monkeypatch.setattr(origin_module, "pinned", lambda data, began: (data.name, began))
    mixture = of_run(tmp_path / "mixture", {"name": "m", "corpora": {"a": {"revision": "1"}, "b": {}}})
    single = of_run(tmp_path / "single", {"name": "s", "revision": "2"})
    data = SimpleNamespace(name="own")
    for run_dir, branch, began in (
        (mixture, None, {"a": "1", "b": None}),
        (single, None, {"own": "2"}),
        (mixture, f"{single}@3", {"a": "1", "b": None}),
        (tmp_path / "new", f"{single}@3", {"own": "2"}),
        (tmp_path / "new", None, {}),
    ):
        assert with_commits(data, str(run_dir), branch) == ("own", began)
