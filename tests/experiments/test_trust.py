"""What another user has written is read as data: it runs nothing."""

import json
import os
import shutil
import sys
from contextlib import contextmanager, suppress
from functools import partial

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from omegaconf import OmegaConf
from omegaconf.errors import ValidationError

from experiments.config import load_config, read_config
from experiments.evaluation.config import EvaluateConfig
from experiments.evaluation.evaluate import evaluate, find_target
from experiments.evaluation.export import export
from experiments.evaluation.generate import GenerateConfig, run_generation
from experiments.files import write_atomically
from experiments.provenance import snapshot
from experiments.training.checkpoint import foreign_code, seal
from experiments.training.ranks import Ranks
from tests import forked
from train import train


class Payload:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


def seal_again(checkpoint):
    """Who writes a file can write its checksum."""
    (checkpoint / "manifest.json").unlink()
    seal(checkpoint, Ranks(0, 1, torch.device("cpu")))


def test_a_checkpoint_that_would_run_code_is_not_resumed(make_config, tmp_path):
    config = make_config("run", "save_every=2")
    checkpoints = train(config) / "checkpoints"
    shutil.rmtree(checkpoints / "step-00000004")
    (checkpoints / "latest").write_text("step-00000002\n")
    step = checkpoints / "step-00000002"
    (path,) = (step / "deepspeed").glob("zero_pp_rank_0*optim_states.pt")
    own, mark = path.read_bytes(), tmp_path / "ran"
    payload = torch.load(path, weights_only=False) | {"more": Payload(os.mkdir, str(mark))}
    for save, message in (
        (lambda: torch.save(payload, path), r"optim_states\.pt calls posix\.mkdir"),
        (lambda: torch.save(payload, path, _use_new_zipfile_serialization=False), "cannot be searched"),
        (lambda: path.write_bytes(b""), "cannot be searched"),
    ):
        save()
        seal_again(step)
        with pytest.raises(ValueError, match=rf"{message}.*init_from=.*model\.safetensors"):
            train(config)
    assert not mark.exists()
    path.write_bytes(own)
    seal_again(step)
    assert train(config)
    assert (checkpoints / "step-00000004").is_dir()


def test_what_every_checkpoint_calls_is_taken_and_each_rank_looks_at_its_share(tmp_path):
    """Of fp16, too, which no CPU trains in."""
    folder = tmp_path / "deepspeed"
    folder.mkdir()
    scalers = [DynamicLossScaler(1.0, 2.0, 1, 1.0, 1, False), LossScaler(1.0)]
    torch.save(
        {"own": [*scalers, ZeroStageEnum(2), fragment_address(numel=1, start=0), torch.ones(1)]}, folder / "0.pt"
    )
    for name in "123":
        torch.save({"more": Payload(os.getenv, name)}, folder / f"{name}.pt")
    (folder / "sub").mkdir()
    torch.save({"more": Payload(os.getenv, "4")}, folder / "sub" / "4.pt")
    bad = [f"deepspeed/{name}.pt calls os.getenv" for name in ("1", "2", "3", "sub/4")]
    assert foreign_code(tmp_path) == bad
    assert [foreign_code(tmp_path, rank=rank, world_size=2) for rank in (0, 1)] == [bad[1:2], [bad[0], bad[2], bad[3]]]


def test_a_copy_of_the_code_is_what_its_name_says(tmp_path):
    code = snapshot(tmp_path)
    compiled = code / "data" / "__pycache__"
    compiled.mkdir()
    (compiled / "config.cpython-311.pyc").write_bytes(b"planted")
    assert snapshot(tmp_path) == code
    assert not compiled.exists()
    assert list(tmp_path.iterdir()) == [code], "the second copy is gone"
    changes = [partial((code / name).write_text, "print('other')\n") for name in ("train.py", "data/new.py")]
    for change in (*changes, partial((code / "torch").symlink_to, tmp_path)):
        shutil.copytree(code, tmp_path / "kept")
        change()
        with pytest.raises(ValueError, match="holds other code than its name says"):
            snapshot(tmp_path)
        shutil.rmtree(code)
        (tmp_path / "kept").rename(code)
    assert snapshot(tmp_path) == code


def test_each_command_of_a_job_is_of_the_code_that_was_submitted(tmp_path):
    """A training of days stands between two of them."""
    code, run_dir = snapshot(tmp_path), tmp_path / "run"
    script = f"""
from pathlib import Path
from experiments.signals import Children
from experiments.sweep.cells import Cell
from experiments.sweep.run_cell import run_cell
run_dir = Path({str(run_dir)!r})
run_dir.mkdir(exist_ok=True)
with Children() as children:
    print(run_cell(Cell("c", run_dir, ("--help",), None, None), run_dir, children))
"""
    environment = {"PYTHONDONTWRITEBYTECODE": "1"}
    assert "status='done'" in forked.run("-c", script, cwd=code, env=environment).stdout
    (code / "train.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    said = forked.run("-c", script, cwd=code, env=environment).stdout
    assert "status='failed'" in said
    assert f"{code} holds other code than its name says: move it away and submit again" in said
    assert not (tmp_path / "ran").exists()


_touched: list[str] | None = None  # what is opened, listed or made, while somebody asks; a hook cannot be removed


@sys.addaudithook
def _note(event, arguments):
    if _touched is not None and event in ("open", "os.mkdir", "os.scandir", "os.listdir", "os.rename"):
        _touched.extend(str(argument) for argument in arguments[:2])


@contextmanager
def touched(place):
    """Paths below ``place`` that are opened, listed or made in the context."""
    global _touched
    found, _touched = [], []
    try:
        yield found
    finally:
        found += [path for path in _touched if path.startswith(str(place))]
        _touched = None


_NO_PLACES = ("layers", "bos_token", "eos_token", "text_column", "document_separator")


def point_to(path, place):
    """Let every value in a config.yaml that may be ``place`` be it."""
    values, typed = OmegaConf.load(path), read_config(path)
    changed = []

    def walk(node, prefix=""):
        for key, value in list(OmegaConf.to_container(node).items()):
            name = f"{prefix}{key}"
            if isinstance(value, dict):
                walk(node[key], f"{name}.")
            elif key not in _NO_PLACES and (value is None or isinstance(value, str | list)):
                node[key] = [str(place)] if isinstance(value, list) else str(place)
                with suppress(ValueError, ValidationError):
                    OmegaConf.update(typed, name, node[key])  # at once where it takes no text
                    OmegaConf.save(values, path)
                    load_config(path)
                    changed.append(name)
                    continue
                node[key] = value

    walk(values)
    values.launcher = {"python": str(place), "setup": [f"touch {place}"]}
    OmegaConf.save(values, path)
    return changed


@pytest.fixture
def foreign(make_config, tmp_path, monkeypatch):
    """A run of another user, whose configuration names a file of this user's wherever it can."""
    corpus, private = tmp_path / "corpus.jsonl", tmp_path / "private" / "letters.jsonl"
    private.parent.mkdir()
    for path, word in ((corpus, "water"), (private, "secret")):
        rows = ({"text": f"{word} {i} runs under old bridges and nobody counts the stones " * 3} for i in range(150))
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("attention=dash", "data=local", f"data.files=[{corpus}]", "data.validation_fraction=0.1")
    run = train(
        make_config(
            "run",
            *options,
            "data.max_bytes=null",
            "attention.chunk_size=16",
            "steps=1",
            "optim.warmup_steps=0",
            f"cache_dir={tmp_path / 'cache'}",
        )
    )
    checkpoint = run / "checkpoints" / "step-00000001"
    for path in (run / "config.yaml", checkpoint / "config.yaml"):
        changed = set(point_to(path, private))
    seal_again(checkpoint)
    at_least = {"cache_dir", "run_dir", "init_from", "branch_from", "data.files", "data.path", "data.tokenizer"}
    assert changed >= at_least
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    return run, private.parent


def test_what_a_foreign_run_names_is_neither_read_nor_written(foreign, make_config, tmp_path, capsys):
    run, private = foreign
    asked = dict(run=str(run), lengths=[768], rows=1, device="cpu", threads=1, cache_dir=str(tmp_path / "own"))

    def evaluated(**changes):
        config = EvaluateConfig(**asked | changes)
        return list(evaluate(config, find_target(config)))

    with touched(private) as found:
        assert len(evaluated(tasks=["vt"])) == 1  # its text is made, and kept in the evaluator's own cache
        for changes in (dict(tasks=["loss"]), dict(tasks=["niah_single_2"]), dict(tasks=["vt"], sparsities=[0.5])):
            with pytest.raises(ValueError, match=r"another user's.*read data\.files=\[.*letters\.jsonl.*any_data=true"):
                evaluated(**changes)
        run_generation(GenerateConfig(str(run), "the water", max_new_tokens=2, threads=1))
        export(run, tmp_path / "exported")
        options = ("data=local", f"data.files=[{tmp_path / 'corpus.jsonl'}]", f"init_from={run}")
        make_config("other", *options)
        with pytest.raises(ValueError, match=r"another user's.*data\.tokenizer=.*run/tokenizer if that is it"):
            make_config("run", *options)  # which would go on in its directory
        make_config("run", *options, f"data.tokenizer={run / 'tokenizer'}")
    assert found == []
    assert (tmp_path / "own" / "tasks").is_dir()
    with touched(private) as found, pytest.raises(ValueError, match="has changed since"):
        evaluated(tasks=["loss"], any_data=True)
    assert found == [str(private / "letters.jsonl")] * len(found) != []

    for kept in run.rglob("tokenizer"):
        shutil.rmtree(kept)
    seal_again(run / "checkpoints" / "step-00000001")
    with touched(private) as found, pytest.raises(ValueError, match=r"read data\.tokenizer=.*letters.*, data\.files="):
        run_generation(GenerateConfig(str(run), "the water", max_new_tokens=2, threads=1))
    assert found == []


def test_links_of_another_user_lead_nothing_elsewhere(make_config, tmp_path, monkeypatch):
    run = train(config := make_config("run", "steps=1", "optim.warmup_steps=0"))
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    asked = EvaluateConfig(run=str(run), device="cpu")
    for name, command in (
        ("results.jsonl", partial(find_target, asked)),
        (".evaluating", partial(find_target, asked)),
        ("metrics.jsonl", partial(train, config)),
        ("checkpoints/latest", partial(train, config)),
    ):
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(tmp_path / "private")
        with pytest.raises(ValueError, match=rf"{name} is a link of another user to .*private: remove it"):
            command()
        with pytest.raises(OSError, match="a link of another user"):
            write_atomically(run / name, "x")
        (run / name).unlink()
