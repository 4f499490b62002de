"""What a file that was damaged, a full disk or a lost process is told as: one line that names it and the mend."""

import contextlib
import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

import data.collect
from experiments.config import load_config, to_train_config
from experiments.errors import Stopped, is_lost_rank, run_faults, user_errors
from experiments.evaluation.config import EvaluateConfig
from experiments.evaluation.evaluate import evaluate, find_target
from experiments.evaluation.export import export
from experiments.figures.run_page import read_run
from experiments.files import CONFIGS, ROOT, read_rows
from experiments.provenance import snapshot
from experiments.sweep.cells import Cell, record_done, write_plan
from experiments.sweep.collect import collect
from experiments.sweep.status import status
from experiments.training.checkpoint import write_checkpoint
from experiments.training.prepare import prepare
from experiments.training.ranks import Ranks
from tests.experiments.conftest import TINY
from train import train


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache_dir):
    """The folder of a sweep with one run, which was trained; not to be written to."""
    folder = tmp_path_factory.mktemp("damage")
    overrides = [
        *TINY,
        "steps=1",
        "optim.warmup_steps=0",
        "name=run",
        f"run_dir={folder}/run",
        f"cache_dir={cache_dir}",
    ]
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        train(to_train_config(compose("train", overrides)))
    return folder


@pytest.fixture
def sweep(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "sweep")
    cell = Cell("run", folder / "run", ("steps=1",), ("tasks=[loss]",), None)
    record_done(cell.run_dir, cell.commands)
    write_plan(folder, [cell])
    return folder


def evaluated(sweep):
    config = EvaluateConfig(run=str(sweep / "run"), device="cpu")
    return list(evaluate(config, find_target(config)))


def started_again(sweep):
    return train(load_config(sweep / "run" / "config.yaml"))


def exported(sweep):
    return export(sweep / "run", sweep / "exported")


KEPT = "checkpoints/step-00000001"  # where a checkpoint has what it needs
OF_RUN = (
    *(f"{KEPT}/{name}" for name in ("git.json", "start.json", "config.yaml", "tokenizer/tokenizer.json")),
    "results.jsonl",
)
COMMANDS = {
    evaluated: OF_RUN,
    exported: OF_RUN,
    started_again: ("config.yaml",),
    lambda sweep: collect(sweep, sweep.with_name("kept")): ("cell.json", "metrics.jsonl"),
    lambda sweep: read_run(sweep / "run"): ("config.yaml", "metrics.jsonl"),
}


@pytest.mark.parametrize("content", [b"", b"{\n", b"\xff\xfe\x00\n", b"[]\n", b"7\n", b"{}\n"])
def test_a_damaged_file_is_named_and_nothing_is_written(sweep, content):
    for command, names in COMMANDS.items():
        for name in names:
            path = sweep / "run" / name
            before = path.read_bytes() if path.exists() else None
            if path.suffix == ".jsonl" and (content == b"" or (command is not evaluated and before is None)):
                continue  # no row
            if content == b"{}\n" and command is exported and path.name in ("git.json", "start.json"):
                continue  # the card says what is known
            path.write_bytes(content)
            found = {entry for entry in sweep.parent.rglob("*") if ".lock" not in entry.name}
            with pytest.raises(ValueError, match=f"(?s){path.name}.*: .*") as error:
                command(sweep)
            assert "\n" not in str(error.value)
            new = {entry for entry in sweep.parent.rglob("*") if ".lock" not in entry.name} - found
            assert {entry.name for entry in new} <= {".evaluating"}
            path.unlink() if before is None else path.write_bytes(before)


WRONG = {
    "start.json": ('{"data": 3, "parameters": 9}', '{"data": {}, "parameters": "x"}'),
    "git.json": ('{"sha": {}}',),
    "config.yaml": ("model: 3\nattention: [1]\ndata: {}\n", "model: {}\nattention: {name: []}\ndata: {}\n"),
}


def test_values_that_cannot_be_are_damage(sweep):
    for command in (evaluated, exported):
        for name, contents in WRONG.items():
            path = sweep / "run" / KEPT / name
            before = path.read_text()
            for content in contents if name != "config.yaml" else (*contents, before.replace("seed: 0", "seed: x", 1)):
                path.write_text(content)
                with pytest.raises(ValueError, match=rf"{name}") as error:
                    command(sweep)
                assert "\n" not in str(error.value)
            path.write_text(before)


MADE = {"task": "loss", "metric": "nats", "score": 1.5, "label": "dash", "length": 64, "knob": None, "data": "x"}
MADE |= {"trained_knob": 1, "causal_sparsity": 0.5, "checkpoint": "step-1", "per_head": [[0.5, None]], "device": None}
LOGGED = {"step": 1, "split": "train", "loss": 2.5, "grad_norm": float("inf"), "causal_sparsity_per_layer": [0.1]}
DONE = {"run": "a", "commands": [["train.py", "steps=1"]]}
MISFITS = [
    *(("cells.jsonl", "commands", value) for value in (None, "train.py", [3], [["train.py", 3]])),
    *(
        ("results.jsonl", key, value)
        for key in ("score", "causal_sparsity")
        for value in (None, "1", [1], float("nan"))
    ),
    *(("results.jsonl", key, {}) for key in ("task", "label", "knob", "trained_knob", "length", "data", "device")),
    *(("results.jsonl", "seed", value) for value in (True, "0", 10**400, [])),
    *(("results.jsonl", "per_head", value) for value in (0.5, [["x"]], {})),
    *(("metrics.jsonl", "step", value) for value in (None, "1", [1], 10**400, float("nan"))),
    *(("metrics.jsonl", "split", value) for value in (None, 1, {})),
    *(("metrics.jsonl", "loss", value) for value in ("2.5", None, {}, 10**400, [], True)),
]


@pytest.mark.parametrize(("name", "key", "value"), MISFITS)
def test_a_row_that_cannot_be_is_named_where_it_is_read(tmp_path, name, key, value):
    path = tmp_path / name
    row = {"results.jsonl": MADE, "metrics.jsonl": LOGGED, "cells.jsonl": DONE}[name]
    path.write_text(json.dumps(row) + "\n")
    assert read_rows(path) == [row]
    path.write_text(json.dumps(row) + "\n" + json.dumps(row | {key: value}) + "\n")
    with pytest.raises(ValueError, match=rf"{name}, line 2 is damaged \(its {key} cannot be\): remove the line"):
        read_rows(path)


def test_what_is_made_of_a_row_still_names_its_line(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps(LOGGED) + "\n" + json.dumps(LOGGED | {"by_row": {"nats": [1]}}) + "\n")
    row = read_rows(path)[1]
    for made in (row, row | {"a": 1}, {"a": 1} | row, row["by_row"]):
        with pytest.raises(ValueError, match=r"answers\.jsonl, line 2 .*\(it does not say tokens\): remove the line"):
            made["tokens"]
    assert ({"step": 2} | row)["step"] == 1
    assert (row | {"step": 2})["step"] == 2


def test_all_rows_that_were_committed_are_read():
    assert sum(len(read_rows(path)) for path in (ROOT / "results").rglob("*.jsonl")) > 10_000


@pytest.mark.parametrize(
    "harm",
    [
        *({key: value} for key in ("name", "run_dir", "train") for value in (None, 3, [3])),
        *({key: value} for key in ("base", "evaluate", "evaluate_turned") for value in (-1, {}, [[]])),
    ],
)
def test_a_cell_that_cannot_be_is_named(sweep, harm):
    path = sweep / "cells.json"
    (cell,) = json.loads(path.read_text())
    path.write_text(json.dumps([cell | harm]))
    with pytest.raises(ValueError, match=rf"cells\.json is damaged \(a cell's {next(iter(harm))} cannot be"):
        status(sweep)


@pytest.mark.parametrize("content", ["{", "[]", "{}", "7", "", '{"commands": [3]}', '{"commands": [["a", 3]]}'])
def test_a_damaged_record_of_a_sweep_is_named(sweep, content):
    assert [row[1] for row in status(sweep)] == ["done"]
    for path in (sweep / "run" / "cell.json", sweep / "cells.json"):
        before = path.read_text()
        path.write_text(content)
        with pytest.raises(ValueError, match=rf"{path.name} is damaged .*remove it"):
            status(sweep)
        path.write_text(before)


def test_a_recorded_configuration_looks_nothing_up(sweep, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    path = sweep / "run" / "config.yaml"
    path.write_text(path.read_text().replace("name: run\n", "name: ${oc.env:SECRET}\n"))
    with pytest.raises(ValueError, match=r"config.yaml refers to other values .* do not trust it"):
        load_config(path)


def test_an_export_that_finds_no_room_leaves_nothing(sweep, small_disk):
    (small_disk / "filler").write_bytes(bytes(7 * 2**20 - 2**18))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"exported cannot be written .*No space left.*make room"):
            export(sweep / "run", small_disk / "exported")
        assert [path.name for path in small_disk.iterdir()] == ["filler"]
    (small_disk / "filler").unlink()
    export(sweep / "run", small_disk / "exported")


def fill(path):
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


def test_an_evaluation_that_finds_no_room_names_the_file_and_goes_on(sweep, small_disk, capsys):
    config = EvaluateConfig(run=str(sweep / "run"), device="cpu", output=str(small_disk / "rows"))
    target = find_target(config)
    (small_disk / "rows" / ".evaluating").mkdir(parents=True)
    filler = small_disk / "filler"
    fill(filler)
    with pytest.raises(SystemExit), user_errors():
        list(evaluate(config, target))
    assert "No space left on device: " in (said := capsys.readouterr().err)
    assert "make room there; what is complete stays, and the same command goes on" in said
    filler.unlink()
    assert len(list(evaluate(config, target))) == 1


def test_a_copy_of_the_code_that_finds_no_room_leaves_nothing(small_disk):
    fill(small_disk / "filler")
    os.truncate(small_disk / "filler", (small_disk / "filler").stat().st_size - 2**16)
    with pytest.raises(ValueError, match=r"the code cannot be copied to .*No space left.*: make room there") as error:
        snapshot(small_disk / "slurm")
    assert "\n" not in str(error.value)
    assert not list((small_disk / "slurm").iterdir())
    (small_disk / "filler").unlink()
    (small_disk / "slurm" / ".code-killed").mkdir()
    code = snapshot(small_disk / "slurm")
    assert list((small_disk / "slurm").iterdir()) == [code]


@pytest.mark.parametrize("room", [0, 2**17])
def test_a_preparation_that_finds_no_room_leaves_no_half_and_goes_on(make_config, small_disk, capsys, room):
    """No room for the tokenizer; for the tokens."""
    cache = small_disk / "cache"
    config = make_config("run", "data.max_bytes=400000", f"cache_dir={cache}")
    cache.mkdir()
    fill(small_disk / "filler")
    os.truncate(small_disk / "filler", (small_disk / "filler").stat().st_size - room)
    for _ in range(2):
        with pytest.raises(SystemExit), user_errors():
            prepare(config)
        said = capsys.readouterr().err
        assert re.match(r"error: .*No space left on device.*: ?.*make room", said), said
        assert str(cache) in said
        assert not list(cache.rglob("*.tmp*"))
        assert not list(cache.glob("tokens/*/.shard-*"))
    (small_disk / "filler").unlink()
    prepare(config)


def test_a_collection_that_finds_no_room_is_one_line_and_leaves_nothing(small_disk, tmp_path, monkeypatch):
    (tmp_path / "text.py").write_text("".join(f"print({i})\n" for i in range(4000)))
    fill(small_disk / "filler")
    before = set(small_disk.iterdir())
    monkeypatch.setattr("sys.argv", ["collect", str(small_disk / "corpus.jsonl"), str(tmp_path / "text.py")])
    with pytest.raises(SystemExit, match=r"corpus.jsonl cannot be written .*No space left.*make room"):
        data.collect.main()
    assert set(small_disk.iterdir()) == before


MENDS = {
    **dict.fromkeys(("ENOSPC", "EDQUOT"), "make room there"),
    **dict.fromkeys(("EROFS", "EACCES", "EPERM"), "see that it may be read and written, or name another place"),
    **dict.fromkeys(("EIO", "ESTALE"), "see to the disk"),
    **dict.fromkeys(("ENAMETOOLONG", "ENOTDIR", "EISDIR"), "name another place"),
}


@pytest.mark.parametrize("name", MENDS)
def test_what_is_wrong_with_a_disk_is_one_line_and_a_fault_of_ours_is_not(name, capsys):
    number = getattr(errno, name)
    for context, kept in (
        (user_errors, "; what is complete stays"),
        (run_faults, " (run_dir and cache_dir). The latest"),
    ):
        with pytest.raises(SystemExit, match="1"), context():
            raise OSError(number, os.strerror(number), "/data/file")
        said = capsys.readouterr().err
        assert said.startswith(f"error: [Errno {number}] {os.strerror(number)}: '/data/file': {MENDS[name]}{kept}")
        assert "Traceback" not in said
        with pytest.raises(FileNotFoundError), context():
            raise FileNotFoundError(2, "No such file or directory", "/data/file")


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (torch.distributed.DistBackendError("anything"), True),
        (RuntimeError("Broken pipe"), True),
        (RuntimeError("Socket Timeout"), True),
        (RuntimeError("connection was closed by x"), True),
        (RuntimeError("shapes differ"), False),
        (ValueError("gloo"), False),
    ],
)
def test_a_collective_that_fails_means_a_lost_rank(error, is_lost):
    assert is_lost_rank(error) == is_lost
    with pytest.raises(SystemExit if is_lost else type(error)), run_faults():
        raise error


GONE = [
    "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4242",
    "[gloo/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:46996: Connection reset by peer.",
    "NCCL error in: ProcessGroupNCCL.cpp:3690, remote process exited or there was a network error",
]


@pytest.mark.parametrize("message", GONE)
def test_a_lost_rank_is_not_reported_as_a_full_disk(tmp_path, capsys, message):
    class LosesARank:
        def save_checkpoint(self, *_, **__):
            raise RuntimeError(message)

    with pytest.raises(SystemExit), run_faults():
        write_checkpoint(tmp_path / "step-00000001", {"step": 1}, LosesARank(), Ranks(0, 1, torch.device("cpu")))
    said = capsys.readouterr().err
    assert f"another rank was lost ({message}): what that one said last is the cause" in said
    assert "space" not in said
    assert not list(tmp_path.iterdir())


def test_a_fault_of_ours_while_saving_keeps_its_traceback(tmp_path):
    class Breaks:
        def save_checkpoint(self, *_, **__):
            raise RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")

    with pytest.raises(RuntimeError, match="must match") as fault, run_faults():
        write_checkpoint(Path(tmp_path / "step-00000001"), {"step": 1}, Breaks(), Ranks(0, 1, torch.device("cpu")))
    assert not isinstance(fault.value, Stopped)
