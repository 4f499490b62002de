import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from data import MixtureDataConfig, TextDataConfig
from data.config import MixedCorpusConfig
from experiments.config import load_config, plain, to_train_config
from experiments.errors import REQUEUE, Occupied
from experiments.files import read_rows, write_atomically
from experiments.schema import flat
from experiments.training import run_dir
from experiments.training.checkpoint import seal
from experiments.training.metrics import drop_rows_after
from experiments.training.ranks import Ranks
from experiments.training.run_dir import config_hash, find_run_dir, open_run_dir
from tests.experiments.conftest import CONFIGS


@pytest.fixture
def config(make_config):
    return make_config("run", "model.vocab_size=300")


def opened(config, start=None):
    open_run_dir(find_run_dir(config), config, ["steps=4"], start or {})
    return find_run_dir(config)


def test_a_new_directory_explains_itself(config, monkeypatch):
    monkeypatch.setattr(run_dir, "git_state", lambda: ({"sha": "abc", "dirty": True}, "what differs\n"))
    run = opened(config, {"parameters": 7})
    assert run.checkpoint is None
    assert run.step == 0
    assert load_config(run.path / "config.yaml") == config
    assert (run.path / "overrides.yaml").read_text() == "- steps=4\n"
    environment = json.loads((run.path / "environment.json").read_text())
    assert environment["packages"]["torch"]
    assert "variables" in environment
    assert json.loads((run.path / "git.json").read_text()) == {"sha": "abc", "dirty": True}
    assert (run.path / "git.diff").read_text() == "what differs\n"
    assert json.loads((run.path / "start.json").read_text()) == {"parameters": 7}


def test_nothing_secret_is_written(config, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "hunter2")
    run = opened(config)
    assert not [path for path in run.path.rglob("*") if path.is_file() and "hunter2" in path.read_text()]


def test_another_configuration_is_refused_by_the_names_of_its_keys(config):
    opened(config)
    other = replace(config, steps=8, optim=replace(config.optim, lr=1.0))
    with pytest.raises(ValueError, match=r"optim.lr: 0.003 there, 1.0 now\n  steps: 4 there, 8 now\ngive another name"):
        find_run_dir(other)


def test_what_one_configuration_has_and_the_other_lacks_is_said(make_config):
    full, dash = make_config("run"), make_config("run", "attention=dash")
    for there, now, sizes, names in (
        (full, dash, "absent there, 64 now", "full there, dash now"),
        (dash, full, "64 there, absent now", "dash there, full now"),
    ):
        path = opened(there).path
        message = rf"attention\.chunk_size: {sizes}\n(.*\n)*  attention\.name: {names}\n"
        with pytest.raises(ValueError, match=message):
            find_run_dir(now)
        shutil.rmtree(path)


def test_what_is_only_logged_or_measured_may_differ(config):
    opened(config)
    find_run_dir(replace(config, log_every=3, logger=replace(config.logger, tags=["a"]), keep_checkpoints=5))
    find_run_dir(replace(config, eval_every=2, threads=3, save_every=2, stats_every=4, any_tokenizer=True))
    find_run_dir(replace(config, data=replace(config.data, validation_rows=None)))
    with pytest.raises(ValueError, match=r"data.seq_len: 64 there, 32 now\n[^\n]*only these may change: .*eval_every"):
        find_run_dir(replace(config, threads=3, data=replace(config.data, seq_len=32)))


FREE = (
    *("name", "run_dir", "overwrite", "cache_dir", "log_every", "stats_every", "eval_every", "save_every", "threads"),
    *("keep_checkpoints", "keep_every", "max_skipped_steps", "activation_checkpointing", "check_memory"),
    *("peak_tflops", "profile_steps", "rows_per_micro_batch", "sequence_parallel", "any_tokenizer", "branch_from"),
    *("data.validation_rows", "data.files", "deepspeed.stage"),
)
HASHED = {"eval_every", "threads", "data.validation_rows", "data.files"}  # all the same


def test_of_all_values_only_these_may_differ(config, monkeypatch):
    """Each other one is listed, and makes another hash."""
    path = opened(config).path / "config.yaml"
    others = {bool: lambda x: not x, int: lambda x: x + 1, float: lambda x: x / 2, str: lambda x: f"{x}x"}
    others |= {list: lambda x: [*x, "x"], type(None): lambda x: 1}
    kept = {"attention.name", "model.vocab_size", "data.bos_token", "launcher"}
    before = flat(yaml.safe_load(path.read_text()))
    changed = {key: others[type(value)](value) for key, value in before.items() if key not in kept}
    saved = OmegaConf.load(path)
    for key, value in changed.items():
        OmegaConf.update(saved, key, value)
    OmegaConf.save(saved, path)
    with pytest.raises(ValueError, match="another configuration") as refused:
        find_run_dir(config)
    listed = re.findall(r"^  ([\w.]+): ", str(refused.value), re.MULTILINE)
    free = {key for key in changed if key in FREE or key.startswith("logger.")}
    assert listed == sorted(changed.keys() - free)

    own = config_hash(config)
    for key, value in changed.items():
        monkeypatch.setattr(run_dir, "plain", lambda _, key=key, value=value: before | {key: value})
        assert (config_hash(config) == own) == (key in free - HASHED), key


@pytest.mark.parametrize("is_mixture", [False, True])
def test_a_corpus_may_lie_elsewhere(config, is_mixture):
    def at(*files, **changes):
        common = {"name": "x", "seq_len": 64}
        if is_mixture:
            corpora = {"some": MixedCorpusConfig(source="files", files=list(files), **changes)}
            return replace(config, data=MixtureDataConfig(**common, corpora=corpora))
        return replace(config, data=TextDataConfig(**common, source="files", files=list(files), **changes))

    opened(at("a.jsonl"))
    find_run_dir(at("moved/a.jsonl", "b.jsonl"))
    with pytest.raises(ValueError, match=r"text_column: text there, body now\ngive"):
        find_run_dir(at("moved/a.jsonl", text_column="body"))


def test_a_directory_of_before_a_key_has_its_default(config):
    run = opened(config)
    path = run.path / "config.yaml"
    older = [
        line
        for line in path.read_text().splitlines()
        if line.split(":")[0].strip() not in ("bos_token", "any_tokenizer")
    ]
    path.write_text("\n".join(older) + "\n")
    find_run_dir(config)
    assert load_config(path).data.bos_token == "none", "documents began with nothing"
    with pytest.raises(ValueError, match=r"data\.bos_token: none there, <s> now"):
        find_run_dir(replace(config, data=replace(config.data, bos_token="<s>")))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", r"is damaged \(it has no model, attention, data\): restore it from a copy$"),
        ("model: {}\nattention: {name: full}\n", r"is damaged \(it has no data\): restore"),
        ("model: 3\nattention: {name: full}\ndata: {}\n", r"is damaged \(it has no model\): restore"),
        ("model: {}\nattention: {}\ndata: {}\n", "no attention backend is called None: install the package"),
        (
            "model: {}\nattention: {name: full}\ndata: {}\n",
            r"is damaged \(its data are of no kind known",
        ),
        ("model: {a: '${x}'}\nattention: {}\ndata: {}\n", r"refers to other values with \${...}, which no run writes"),
        ("model: {", r"is damaged \(.*\): restore it from a copy$"),
        ("steps: [\nmodel", r"is damaged \(.*\): restore it from a copy$"),
    ],
)
def test_a_configuration_that_no_run_wrote_is_told_from_one_that_was_damaged(tmp_path, content, message):
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(ValueError, match=rf"config\.yaml:? {message}"):
        load_config(tmp_path / "config.yaml")


def test_a_null_vocabulary_stands_for_the_datas(config):
    opened(config)
    find_run_dir(replace(config, model=replace(config.model, vocab_size=None)))


def test_a_foreign_directory_is_refused(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="no run directory"):
        find_run_dir(config)


def test_a_file_is_refused(config, tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(ValueError, match="no directory"):
        find_run_dir(config)


def test_a_run_killed_while_its_directory_is_opened_starts_again(config, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("experiments.training.run_dir.git_state", interrupt)
        with pytest.raises(KeyboardInterrupt):
            opened(config)
    assert opened(config).step == 0


def test_a_run_killed_while_its_config_is_written_starts_again(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.yaml.0a1b2c3d.tmp").touch()
    assert opened(config).step == 0


def interrupt():
    raise KeyboardInterrupt


def save(run, step, stage):
    checkpoint = run.checkpoints / f"step-{step:08d}"
    checkpoint.mkdir()
    (checkpoint / "state.json").write_text(json.dumps({"step": step, "world_size": 1, "stage": stage}))
    seal(checkpoint, Ranks(0, 1, torch.device("cpu")))
    write_atomically(run.checkpoints / "latest", checkpoint.name + "\n")
    return checkpoint


@pytest.mark.parametrize(("old", "new", "mend"), [(1, 3, "stage 1 or 2,"), (3, 2, "stage 3,"), (0, 1, "stage 0,")])
def test_a_stage_of_another_family_is_refused_with_what_can_be(config, old, new, mend):
    def at(stage):
        return replace(config, deepspeed=replace(config.deepspeed, stage=stage))

    save(opened(at(old)), 2, old)
    with pytest.raises(ValueError, match=f"use {mend} on any number of ranks.*init_from="):
        find_run_dir(at(new))
    assert not find_run_dir(at(old)).is_resharded
    save(find_run_dir(at(old)), config.steps, old)
    assert find_run_dir(at(new)).step == config.steps, "what is complete is not resumed"


@pytest.mark.parametrize("old", [1, 2])
def test_stages_of_one_family_are_converted(config, old):
    def at(stage):
        return replace(config, deepspeed=replace(config.deepspeed, stage=stage))

    save(opened(at(old)), 2, old)
    assert [find_run_dir(at(new)).is_resharded for new in (old, 3 - old)] == [False, True]


def test_another_number_of_ranks_is_noticed(config, monkeypatch):
    run = opened(config)
    for stage, is_resharded in ((0, False), (1, True)):  # at stage 0 every rank holds everything
        own = replace(config, deepspeed=replace(config.deepspeed, stage=stage))
        save(run, 2 + stage, stage)
        assert not find_run_dir(own).is_resharded
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert find_run_dir(own).is_resharded == is_resharded
        monkeypatch.delenv("WORLD_SIZE")


def test_a_damaged_checkpoint_is_set_aside_and_latest_names_the_one_before(config):
    run = opened(config)
    save(run, 2, stage=1)
    (save(run, 3, stage=1) / "state.json").write_text("{")
    run = find_run_dir(config)
    assert run.step == 2
    assert "state.json has 1 bytes" in run.damaged["step-00000003"]
    open_run_dir(run, config, [], {}).release()
    assert (run.checkpoints / "latest").read_text() == "step-00000002\n"
    assert [path.name[:22] for path in run.checkpoints.glob("damaged-*")] == ["damaged-step-00000003-"]
    assert find_run_dir(config).damaged == {}


@pytest.mark.parametrize("content", [b"", b"zzz", b"\xff"])
def test_a_garbled_latest_is_set_aside_and_the_newest_intact_one_taken(config, content):
    run = opened(config)
    for step in (2, 3):
        save(run, step, stage=1)
    (run.checkpoints / "step-00000003" / "state.json").write_text("{")
    (run.checkpoints / "latest").write_bytes(content)
    run = find_run_dir(config)
    assert run.step == 2
    assert sorted(run.damaged) == ["latest", "step-00000003"]
    open_run_dir(run, config, [], {}).release()
    assert (run.checkpoints / "latest").read_text() == "step-00000002\n"
    assert find_run_dir(config).damaged == {}


def test_a_directory_that_cannot_be_written_is_refused(config):
    with pytest.raises(ValueError, match=r"/proc/run cannot be written .*another run_dir"):
        open_run_dir(find_run_dir(replace(config, run_dir="/proc/run")), config, [], {})
    with pytest.raises(ValueError, match=r"is not writable"):
        find_run_dir(replace(config, run_dir=__file__ + "/run"))


def branching(config, step=2, **changes):
    """A run of 6 steps with a checkpoint after two, and the configuration of its branch."""
    optim = replace(config.optim, schedule="wsd", warmup_steps=1, decay_fraction=0.5)
    trunk = replace(config, steps=6, optim=optim)
    save(opened(trunk), 2, stage=1)
    branch = replace(trunk, run_dir=f"{trunk.run_dir}-branch", branch_from=f"{trunk.run_dir}@{step}")
    return replace(branch, **changes)


def test_a_branch_begins_at_a_checkpoint_of_another_run(config):
    branch = branching(config, steps=4, eval_every=3)
    run = find_run_dir(branch)
    assert (run.step, run.is_branch, run.checkpoint.parent.parent.name) == (2, True, "run")
    open_run_dir(run, branch, [], {"parameters": 7}).release()
    assert load_config(run.path / "config.yaml") == branch
    assert json.loads((run.path / "start.json").read_text()) == {"parameters": 7}
    assert find_run_dir(branch).step == 2, "killed before its first checkpoint it begins there again"
    save(run, 3, stage=1)
    run = find_run_dir(replace(branch, branch_from=None))
    assert (run.step, run.is_branch) == (3, False)


@pytest.mark.parametrize(
    ("step", "changes", "message"),
    [
        (3, {}, r"@3: no such checkpoint; .* has those of the steps 2"),
        ("x", {}, r"@x: give RUN@STEP"),
        (2, {"steps": 2}, r"leaves nothing of steps=2: raise steps"),
        (
            2,
            {"steps": 3},
            r"step 2 was taken at a learning rate of 0.003, and would have been at 0.0021 with steps=3",
        ),
        (
            2,
            {"seed": 1},
            r"another configuration:\n  seed: 0 there, 1 now\na branch may change steps, .*init_from takes",
        ),
    ],
)
def test_a_branch_that_cannot_be_is_refused(config, step, changes, message):
    with pytest.raises(ValueError, match=message):
        find_run_dir(branching(config, step, **changes))


def test_a_tokenizer_is_the_runs_own_or_that_of_what_it_goes_on_from(tmp_path):
    path, trunk = tmp_path / "branch", tmp_path / "trunk"
    checkpoint = trunk / "checkpoints" / "step-00000002"
    run, new = run_dir.RunDir(path, checkpoint), run_dir.RunDir(path)
    assert (run.tokenizer_home, new.tokenizer_home) == (path, path)
    for place in (trunk, checkpoint, path):
        (place / "tokenizer").mkdir(parents=True)
        assert run.tokenizer_home == place
    assert new.tokenizer_home == path


def test_a_damaged_checkpoint_is_not_branched_from(config):
    branch = branching(config)
    run = find_run_dir(branch)
    with pytest.raises(ValueError, match=r"@2 is damaged \(model has another checksum\): branch from another step"):
        find_run_dir(branch, {run.checkpoint.name: "model has another checksum"})
    (run.checkpoint / "state.json").write_text("{")
    with pytest.raises(ValueError, match=r"@2 is damaged \(state\.json has 1 bytes"):
        find_run_dir(branch)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], "29345ef0"),
        (["experiment=pareto_recall", "attention=dash"], "dc97b811"),
        (["data=mixture", "attention=nsa"], "adca3c33"),
        (["attention=infllmv2"], "5e6b554b"),
    ],
)
def test_rows_are_found_by_the_hash_that_they_were_written_with(overrides, expected):
    """If this fails for a new key, put it with its default into ``_LATER``: rows that are kept must still be found."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = to_train_config(compose("train", [*overrides, "device=cpu"]))
    assert config_hash(config)[:8] == expected
    if config.data.name != "mqar":
        without, other = (replace(config, data=replace(config.data, bos_token=token)) for token in ("none", "<s>"))
        assert config_hash(without) == config_hash(config) != config_hash(other)


DEFAULTS = {
    **{"overwrite": False, "cache_dir": "~/.cache/dashattn", "data.files": [], "data.validation_rows": 64},
    **{"deepspeed.stage": 1, "rows_per_micro_batch": None, "sequence_parallel": 1, "any_tokenizer": False},
    **{"branch_from": None, "log_every": 10, "stats_every": 50, "eval_every": 200, "save_every": 1000, "threads": None},
    **{"keep_checkpoints": 2, "keep_every": 0, "max_skipped_steps": 10, "activation_checkpointing": False},
    **{"check_memory": True, "peak_tflops": None, "profile_steps": 0, "launcher": None, "logger.mode": "offline"},
    **{"logger.project": "dashattn", "logger.entity": None, "logger.group": None, "logger.tags": []},
}


def test_what_no_hash_covers_is_by_default_as_ever():
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        values = flat(plain(to_train_config(compose("train"))))
    free = {key for key in values if key in FREE or key.split(".")[0] in ("logger", "launcher")} - {"name", "run_dir"}
    assert {key: values[key] for key in free} == DEFAULTS


def test_the_hash_covers_what_is_learned_and_nothing_else(config):
    assert config_hash(config) == config_hash(replace(config, run_dir="elsewhere", name="x", log_every=7))
    assert config_hash(config) != config_hash(replace(config, seed=1))


def test_rows_that_will_be_written_again_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "split": "train"} for step in (1, 2, 3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"st')  # cut short by a crash
    drop_rows_after(path, 2)
    assert read_rows(path) == rows[:2]
    assert path.read_text().endswith("\n")
    drop_rows_after(tmp_path / "none.jsonl", 0)
    assert read_rows(tmp_path / "none.jsonl") == []


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "split": "train"}\n{"st{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2 is damaged"):
        read_rows(path)


def test_a_second_process_on_a_run_directory_is_refused(make_config, monkeypatch):
    config = make_config("locked")
    run = find_run_dir(config)
    lock = open_run_dir(run, config, [], {})
    with pytest.raises(ValueError, match="another process is training"):
        open_run_dir(run, config, [], {})
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    with pytest.raises(ValueError, match="another process is training"):
        open_run_dir(run, config, [], {})
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # a job that Slurm has begun again
    with pytest.raises(Occupied, match=r"another process still trains .* asks to be queued again") as occupied:
        open_run_dir(run, config, [], {})
    assert occupied.value.exit_code == REQUEUE
    lock.release()
    open_run_dir(find_run_dir(config), config, [], {}).release()


def test_a_run_that_another_process_took_further_meanwhile_is_refused(config):
    save(opened(config), 2, stage=1)
    found = find_run_dir(config)
    save(found, 3, stage=1)
    metrics = found.path / "metrics.jsonl"
    metrics.write_text('{"step": 3, "split": "train"}\n')
    with pytest.raises(ValueError, match=r"another process has just trained .* start again to go on"):
        open_run_dir(found, config, [], {})
    assert [row["step"] for row in read_rows(metrics)] == [3]
    assert not (found.path / "resumed").exists()
    open_run_dir(find_run_dir(config), config, [], {}).release()
