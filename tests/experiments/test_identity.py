"""A run, a checkpoint and an export hold what they need: their tokenizer above all, and data known by their content."""

import json
import os
import random
import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from data import TextTokenizer, build_tokenizer
from data.tokenizer import train_bpe
from experiments.config import load_config, to_train_config
from experiments.evaluation.config import EvaluateConfig
from experiments.evaluation.evaluate import evaluate, find_target
from experiments.evaluation.export import export
from experiments.evaluation.generate import GenerateConfig, run_generation
from experiments.evaluation.target import locate, validation_stream
from experiments.files import read_rows
from experiments.training import build as build_module
from experiments.training.check import check
from experiments.training.checkpoint import seal
from experiments.training.prepare import prepare
from experiments.training.ranks import Ranks
from experiments.training.run_dir import _is_kept as is_kept
from tests.experiments.conftest import CONFIGS
from tests.fake_hub import FIRST, PATH, SECOND, FakeHub
from train import train

MQAR = (
    *("experiment=pareto_recall", "device=cpu", "threads=1", "steps=1", "optim.warmup_steps=0", "eval_every=0"),
    *("data.seq_len=64", "data.pairs_max=8", "data.validation_rows=6", "model.hidden_size=32", "model.head_dim=16"),
    *("logger=off", "name=recall"),
)
WORDS = ["the", "water", "runs", "under", "old", "bridges", "and", "nobody", "counts", "stones"]


def write_corpus(path, seed=0, documents=150):
    generator = random.Random(seed)
    lines = [json.dumps({"text": f"{i} " + " ".join(generator.choices(WORDS, k=60))}) for i in range(documents)]
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def make(make_config, tmp_path):
    """Configurations of a tiny run on a corpus of its own, with everything in ``tmp_path``."""
    corpus = write_corpus(tmp_path / "corpora" / "water.jsonl")

    def configure(name, *overrides, files=corpus):
        own = ("data=local", f"data.files=[{files}]", "data.validation_fraction=0.1", "data.max_bytes=null")
        return make_config(name, *own, f"cache_dir={tmp_path / 'cache'}", "steps=2", *overrides)

    return configure


def configure_recall(run_dir, *overrides):
    """MQAR, which has tokens of its own."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return to_train_config(compose("train", [*MQAR, f"run_dir={run_dir}", *overrides]))


def weights(run, step):
    return load_file(run / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


def assert_same(ones, others):
    assert ones.keys() == others.keys()
    assert all(torch.equal(ones[name], others[name]) for name in ones)


def set_back(run, step):
    """As if the run had been stopped after ``step``."""
    for checkpoint in (run / "checkpoints").glob("step-*"):
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    (run / "checkpoints" / "latest").write_text(f"step-{step:08d}\n")


def test_a_copied_checkpoint_is_whole(make, tmp_path, capsys):
    run = train(make("run"))
    ids = TextTokenizer.load(str(run / "tokenizer")).encode("the water")
    copy = tmp_path / "elsewhere" / "mine"
    shutil.copytree(run / "checkpoints" / "step-00000002", copy)
    for lost in (run, tmp_path / "cache", tmp_path / "corpora"):
        shutil.rmtree(lost)

    assert locate(str(copy), "cpu").tokenizer.encode("the water") == ids
    run_generation(GenerateConfig(str(copy), "the water", max_new_tokens=2, threads=1))
    assert "\nthe water" in capsys.readouterr().out
    config = EvaluateConfig(run=str(copy), tasks=["vt"], lengths=[768], rows=1, device="cpu", threads=1)
    (row,) = evaluate(config, find_target(config))  # no corpus is needed for a task that is made
    assert read_rows(copy / "results.jsonl") == [row]
    with pytest.raises(ValueError, match="does not exist"):
        list(evaluate(config := replace(config, tasks=["loss"]), find_target(config)))

    harness = pytest.importorskip("experiments.evaluation.harness").HarnessModel(str(copy), device="cpu")
    assert harness.tok_encode("the water") == ids

    export(copy, tmp_path / "exported")
    assert TextTokenizer.load(str(tmp_path / "exported")).encode("the water") == ids
    path = tmp_path / "exported" / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    with pytest.raises(ValueError, match=r"exported/model\.safetensors holds other weights than were written"):
        run_generation(GenerateConfig(str(path.parent), "the water", max_new_tokens=2, threads=1))
    path.write_bytes(content)
    other = write_corpus(tmp_path / "corpora" / "other.jsonl", seed=1)
    for origin in (copy, tmp_path / "exported"):
        config = check(make(f"from-{origin.name}", f"init_from={origin}", files=other))
        assert TextTokenizer.load(config.data.tokenizer).encode("the water") == ids
    (copy / "tokenizer" / "tokenizer.json").write_text((tmp_path / "exported" / "tokenizer.json").read_text()[:-9])
    with pytest.raises(ValueError, match=r"no intact weights in .*mine \(tokenizer/tokenizer\.json has \d+ bytes"):
        locate(str(copy), "cpu")


def test_what_a_corpus_becomes_changes_no_run(make, tmp_path):
    run = train(make("run"))
    ids = locate(str(run), "cpu").tokenizer.encode("the water")
    with (tmp_path / "corpora" / "water.jsonl").open("a") as file:
        file.write(json.dumps({"text": "waterways " * 300}) + "\n")
    assert locate(str(run), "cpu").tokenizer.encode("the water") == ids
    config = EvaluateConfig(run=str(run), device="cpu", threads=1)
    with pytest.raises(ValueError, match=r"the corpus of data\.name=local has changed since"):
        list(evaluate(config, find_target(config)))
    # What goes on from it reads the new text with its tokenizer, prepared beforehand or not.
    second = make("second", f"init_from={run}", "steps=1", "optim.warmup_steps=0")
    prepare(second)
    entries = sorted(path.name for path in (tmp_path / "cache" / "tokens").iterdir())
    kept = TextTokenizer.load(str(train(second) / "tokenizer"))
    assert kept.encode("the water") == ids
    assert sorted(path.name for path in (tmp_path / "cache" / "tokens").iterdir()) == entries
    assert len(list((tmp_path / "cache" / "tokenizers").glob("*/tokenizer.json"))) == 1, "none was trained"


def test_other_tokens_than_the_weights_are_refused_unless_asked_for(make, tmp_path):
    ends = ("steps=1", "optim.warmup_steps=0")
    text_run, mqar_run = train(make("text", *ends)), train(configure_recall(tmp_path / "recall"))
    other = TextTokenizer(
        train_bpe(iter(["zebra quilts vex jumping foxes " * 9]), 300, "<|endoftext|>"), "<|endoftext|>"
    )
    other.save_folder(tmp_path / "other")
    shutil.copytree(text_run / "tokenizer", tmp_path / "same")
    exported = tmp_path / "exported"
    export(text_run, exported)

    check(make("a", f"init_from={text_run}"))
    check(make("a", f"init_from={text_run}", f"data.tokenizer={tmp_path / 'same'}"))
    check(configure_recall(tmp_path / "a", f"init_from={mqar_run}"))
    for config in (
        make("a", f"init_from={text_run}", f"data.tokenizer={tmp_path / 'other'}"),
        make("a", f"init_from={text_run / 'checkpoints' / 'step-00000001'}", f"data.tokenizer={tmp_path / 'other'}"),
        make("a", f"init_from={exported}", f"data.tokenizer={tmp_path / 'other'}", "attention=full"),
        make("a", f"init_from={mqar_run}"),
        configure_recall(tmp_path / "a", f"init_from={text_run}"),
    ):
        for step in (check, prepare) if config.data.name == "local" else (check,):
            with pytest.raises(ValueError, match=r"has other tokens than .* was trained on.*any_tokenizer=true"):
                step(config)
    check(make("a", f"init_from={text_run}", f"data.tokenizer={tmp_path / 'other'}", "any_tokenizer=true"))
    bare = shutil.copy(text_run / "checkpoints" / "step-00000001" / "model.safetensors", tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match=r"nothing beside .*bare\.safetensors says what its tokens.*data\.tokenizer"):
        check(make("a", f"init_from={bare}"))
    for known in (f"data.tokenizer={tmp_path / 'same'}", "any_tokenizer=true"):
        check(make("a", f"init_from={bare}", known))
    with pytest.raises(ValueError, match=r"has no config\.yaml, nor does it lie in a run directory: copy it there"):
        locate(str(bare), "cpu")

    folder = dict(run=str(exported), data=make("b").data, device="cpu")
    named = replace(folder["data"], tokenizer=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="any_tokenizer=true"):
        find_target(EvaluateConfig(**folder | {"data": named}))
    target = find_target(EvaluateConfig(**folder | {"data": named}, any_tokenizer=True))
    assert target.tokenizer.fingerprint() == other.fingerprint()
    assert target.identity["text"] != find_target(EvaluateConfig(**folder)).identity["text"], "it is text to this model"


def test_a_corpus_that_was_moved_or_touched_is_the_same(make, tmp_path):
    run = train(make("run", "steps=3", "save_every=1", "keep_checkpoints=0"))
    last = weights(run, 3)
    set_back(run, 1)
    moved = Path(shutil.move(tmp_path / "corpora" / "water.jsonl", tmp_path / "other_place.jsonl"))
    os.utime(moved, (1, 1))
    resumed = ("steps=3", "save_every=2", "eval_every=1", "data.validation_rows=2", "log_every=2", "logger=off")
    resumed = (*resumed, "keep_checkpoints=0")
    assert_same(weights(train(make("run", *resumed, "threads=2", files=moved)), 3), last)
    asked = EvaluateConfig(run=str(run), device="cpu", threads=1)
    with pytest.raises(ValueError, match=r"water\.jsonl', which does not exist: name .*with data=local, to"):
        list(evaluate(asked, find_target(asked)))
    asked = replace(asked, data=replace(make("x", files=moved).data, name="local2"))
    assert len(list(evaluate(asked, find_target(asked)))) == 1
    other = write_corpus(tmp_path / "corpora" / "other.jsonl", seed=1)
    wrong = replace(asked, data=make("x", files=other).data, tasks=["position"])
    with pytest.raises(ValueError, match=r"the corpus of data\.name=local has changed since"):
        list(evaluate(wrong, find_target(wrong)))
    with pytest.raises(ValueError, match="where the files of its corpora lie now"):
        find_target(replace(asked, data=configure_recall(tmp_path / "a").data))
    hashes = {json.loads(path.read_text())["config_hash"] for path in run.glob("checkpoints/step-*/state.json")}
    assert len(hashes) == 1, "it stays the run it was"
    set_back(run, 1)
    with moved.open("a") as file:
        file.write(json.dumps({"text": "one more " * 20}) + "\n")
    with pytest.raises(ValueError, match=r"the data differ from those the checkpoint was trained on: tokens is"):
        train(make("run", "steps=3", files=moved))
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ValueError, match=r"differ from those that the run in .* began with \(tokens_fingerprint\)"):
        train(make("run", "steps=3", files=moved))


def test_a_run_keeps_the_commit_of_what_it_reads_from_the_hub(make_config, tmp_path, monkeypatch):
    corpora = [write_corpus(tmp_path / "corpora" / f"{seed}.jsonl", seed) for seed in (0, 1)]
    first, second = ([row["text"] for row in read_rows(path)] for path in corpora)
    hub = FakeHub(tmp_path, monkeypatch, {FIRST: first, SECOND: second})
    own = ("data=hub", f"data.path={PATH}", "data.config_name=null", "data.streaming=false", "data.max_bytes=null")
    own = (
        *own,
        "data.validation_fraction=0.1",
        f"cache_dir={tmp_path / 'cache'}",
        "save_every=1",
        "steps=2",
        "keep_checkpoints=0",
    )

    def make(name, *overrides):
        return make_config(name, *own, *overrides)

    run = train(make("run"))
    last = weights(run, 2)
    assert load_config(run / "config.yaml").data.revision == FIRST
    hub.move()
    set_back(run, 1)
    assert_same(weights(train(make("run")), 2), last)
    config = EvaluateConfig(run=str(run), device="cpu", threads=1)
    assert len(list(evaluate(config, find_target(config)))) == 1
    set_back(run, 1)
    for revision in ("main", SECOND):
        with pytest.raises(ValueError, match=rf"data\.revision: {FIRST} there, {SECOND} now"):
            train(make("run", f"data.revision={revision}"))
    assert_same(weights(train(make("other", f"data.revision={FIRST}")), 2), last)
    other = train(make("new"))
    assert load_config(other / "config.yaml").data.revision == SECOND
    starts = [json.loads((x / "start.json").read_text())["data"]["tokens_fingerprint"] for x in (run, other)]
    assert starts[0] != starts[1]
    export(run, tmp_path / "folder")
    scored = EvaluateConfig(run=str(tmp_path / "folder"), data=make("x").data, device="cpu")
    assert find_target(scored).train.data.revision == SECOND
    hub.disconnect()  # what was prepared needs no network
    set_back(run, 1)
    assert_same(weights(train(make("run")), 2), last)
    assert train(make("offline")).is_dir()


WSD = ("optim=wsd", "optim.lr=3e-3", "optim.warmup_steps=1", "optim.decay_fraction=0.4", "attention=dash")
WSD = (*WSD, "attention.chunk_size=16")


def test_a_branch_is_what_a_run_of_its_length_would_have_been(make, tmp_path, monkeypatch):
    trunk = train(make("trunk", *WSD, "steps=5", "save_every=1", "keep_checkpoints=0"))  # at its peak up to step 3
    whole = train(make("whole", *WSD, "steps=4", "optim.decay_fraction=0.25"))
    before = {path: path.stat().st_mtime_ns for path in trunk.rglob("*")}
    branch = make("branch", *WSD, "steps=4", "optim.decay_fraction=0.25", f"branch_from={trunk}@3")
    run = train(branch)
    assert_same(weights(run, 4), weights(whole, 4))
    state, expected = (
        json.loads((x / "checkpoints" / "step-00000004" / "state.json").read_text()) for x in (run, whole)
    )
    assert {**state, "config_hash": ""} == {**expected, "config_hash": ""}
    assert state["config_hash"] == expected["config_hash"]
    assert [row["step"] for row in read_rows(run / "metrics.jsonl") if row["split"] == "train"] == [4]
    assert json.loads((run / "start.json").read_text())["branch_from"]["step"] == 3
    with pytest.raises(ValueError, match=rf"init_from: None there, {tmp_path / 'lost'} now"):
        train(make("other", *WSD, "steps=4", f"branch_from={trunk}@3", f"init_from={tmp_path / 'lost'}"))
    asked = []
    with monkeypatch.context() as patch:  # at another stage it has to be converted
        patch.setattr(build_module, "load_checkpoint", lambda *_, reshard_in: asked.append(reshard_in) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(make("stage2", *WSD, "steps=5", "deepspeed.stage=2", f"branch_from={trunk}@3"))
    assert asked == [tmp_path / "stage2" / "checkpoints"]
    assert before == {path: path.stat().st_mtime_ns for path in trunk.rglob("*")}, "the trunk is only read"
    with pytest.raises(ValueError, match=r"(?s)steps: 5 there, 9 now\nbranch_from=.*trunk@STEP, under another"):
        train(make("trunk", *WSD, "steps=9"))
    # It goes on from its own checkpoints, wherever the trunk is.
    shutil.rmtree(trunk)
    assert train(branch) == run
    assert locate(str(run), "cpu").tokenizer is not None


def test_whoever_reads_text_begins_it_as_documents_began(make, tmp_path, monkeypatch, capsys):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    from experiments.evaluation.harness import HarnessModel

    run = train(make("run", 'data.bos_token="<s>"', "steps=1", "optim.warmup_steps=0"))
    target = locate(str(run), "cpu")
    tokenizer, bos = target.tokenizer, target.tokenizer.bos_id
    assert (tokenizer.bos_token, tokenizer.encode_prompt("the")) == ("<s>", [bos, *tokenizer.encode("the")])
    assert load_config(run / "config.yaml").data.bos_token == "<s>"
    for batch in validation_stream(target):
        ids = batch.input_ids[0]
        first = batch.cu_seqlens[:-1].long()  # of documents, and of those that go on from the row before
        begins = {int(i) for i in first if int(i) and ids[i - 1] == tokenizer.eos_id}
        assert begins
        assert {int(i) for i in (ids == bos).nonzero()} - {0} == begins

    prompts = []
    monkeypatch.setattr("experiments.evaluation.generate.generate", lambda model, ids, **_: prompts.extend(ids) or [[]])
    run_generation(GenerateConfig(str(run), "the water", max_new_tokens=1, threads=1))
    assert prompts == [tokenizer.encode_prompt("the water")]
    assert capsys.readouterr().out.endswith("\nthe water\n"), "it is not shown"

    lm = HarnessModel(str(run), device="cpu")
    scored = []
    monkeypatch.setattr(
        lm, "_loglikelihood_tokens", lambda requests, *_, **__: scored.extend(requests) or [(0.0, True)] * len(requests)
    )
    ids = tokenizer.encode("the water")
    assert lm.tok_encode("the water") == lm.tok_encode("<s>the water") == [bos, *ids], "a template may spell it"
    assert lm.tok_encode("the water", add_special_tokens=False) == ids
    pairs = [("the", " water"), ("", "the water")]
    lm.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs])
    lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("the water",), 0)])
    assert [[*context, *continuation] for _, context, continuation in scored] == [[bos, *ids]] * 3
    assert [context for _, context, _ in scored[1:]] == [[bos]] * 2

    # What goes on from it begins likewise, unless told otherwise.
    for origin in (run, run / "checkpoints" / "step-00000001"):
        assert make("on", f"init_from={origin}").data.bos_token == "<s>"
    assert check(make("on", f"init_from={run}", "data.bos_token=none")).data.bos_token == "none"
    export(run, tmp_path / "exported")
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path / "exported")
    assert theirs("the water")["input_ids"] == [bos, *ids]
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (bos, tokenizer.eos_id)
    scored = EvaluateConfig(run=str(tmp_path / "exported"), data=make("x").data, device="cpu")
    assert find_target(scored).train.data.bos_token == "<s>"


def test_a_tokenizer_that_lies_elsewhere_is_the_one_that_was_kept(make, tmp_path):
    """With what the data say of its beginning: of its own it has none."""
    config = make("x", 'data.bos_token="<s>"')
    kept = build_tokenizer(config.data, tmp_path / "cache")
    kept.save_folder(tmp_path / "kept")
    (tmp_path / "moved").mkdir()
    kept.save(tmp_path / "moved" / "tokenizer.json")
    assert is_kept(tmp_path / "kept", make("x", f"data.tokenizer={tmp_path / 'moved'}", 'data.bos_token="<s>"'))
    assert not is_kept(tmp_path / "none", make("x", f"data.tokenizer={tmp_path / 'moved'}", 'data.bos_token="<s>"'))
    assert not is_kept(tmp_path / "kept", make("x")), "none is named"


def test_a_run_of_before_there_was_a_beginning_goes_on_without(make, tmp_path):
    """Its configuration does not say, and its tokenizer puts one before every text."""
    folder = tmp_path / "llama"
    trained = build_tokenizer(make("x", 'data.bos_token="<s>"').data, tmp_path / "cache")
    folder.mkdir()
    trained.framing().save(folder / "tokenizer.json")
    run = train(make("run", f"data.tokenizer={folder}", "data.bos_token=none", "steps=2", "save_every=1"))
    last = weights(run, 2)
    for path in run.rglob("config.yaml"):
        path.write_text(path.read_text().replace("  bos_token: none\n", ""))
    for path in run.rglob("tokenizer_config.json"):
        path.write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    (run / "checkpoints" / "step-00000001" / "manifest.json").unlink()  # as they were written then
    checkpoint = run / "checkpoints" / "step-00000001"
    seal(checkpoint, Ranks(0, 1, torch.device("cpu")))
    set_back(run, 1)
    assert locate(str(run), "cpu").tokenizer.bos_token is None
    assert make("on", f"init_from={run}").data.bos_token == "none"
    assert_same(weights(train(make("run", f"data.tokenizer={folder}", "steps=2")), 2), last)


def test_what_a_run_says_of_itself_is_what_its_checkpoint_says(make):
    """Else the next checkpoint would keep what was damaged beside the last one, under new checksums."""
    options = ("steps=2", "save_every=1")
    run = train(make("run", *options))
    set_back(run, 1)
    for name, old, new in (
        ("config.yaml", "keep_every: 0", "keep_every: {a: 1}"),  # where a resumption may differ
        ("start.json", '"parameters": ', '"parameters": 9'),
        ("git.json", '"sha": ', '"shb": '),
        ("tokenizer/tokenizer_config.json", '"eos_token": "', '"eos_token": "x'),
    ):
        path = run / name
        whole = path.read_text()
        assert old in whole
        for damaged in (whole.replace(old, new), None):
            path.unlink() if damaged is None else path.write_text(damaged)
            with pytest.raises(ValueError, match=rf"{name} is not as the run wrote it: .* cp .*1/{name} .*run/{name}"):
                train(make("run", *options))
            path.write_text(whole)
            if name == "config.yaml":  # without it there is no run
                break
    train(make("run", *options))


def test_all_ranks_read_the_data_that_the_first_one_found(make, monkeypatch):
    """Each looks up a branch on the hub for itself, which may move meanwhile."""
    config, opened = check(make("run", "rows_per_batch=2", "rows_per_micro_batch=1")), []
    first = replace(config.data, max_documents=7)  # in place of another commit
    ranks = SimpleNamespace(world_size=2, device=torch.device("cpu"), gather=lambda value: [first, value])
    monkeypatch.setattr(build_module, "init_ranks", lambda *_: ranks)
    monkeypatch.setattr(build_module, "verify_checkpoint", lambda run_dir, *_: run_dir)

    def open_data(config, *_):
        opened.append(config.data)
        raise ValueError("opened")

    monkeypatch.setattr(build_module, "_open_data", open_data)
    with pytest.raises(ValueError, match="opened"), ExitStack() as resources:
        build_module.build(config, (), resources)
    assert opened == [first]
