"""Files that several processes write, and what is left of them when a write fails."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import files
from experiments.files import (
    append_rows,
    check_writable,
    columns_of,
    locked,
    naming,
    read_json,
    read_rows,
    write_atomically,
)
from experiments.training import checkpoint

ROOT = Path(__file__).parents[2]


NAMES = {
    **{"CONFIG": "config.yaml", "START": "start.json", "TOKENIZER": "tokenizer", "GIT": "git.json", "LOCK": ".lock"},
    **{"SUBMITTED": "slurm", "METRICS": "metrics.jsonl", "ANOMALIES": "anomalies.jsonl", "RESULTS": "results.jsonl"},
    **{"CALIBRATIONS": "calibrations.jsonl", "EVALUATING": ".evaluating", "WEIGHTS": "model.safetensors"},
    **{"STATE": "state.json", "CELL": "cell.json", "CELL_LOCK": ".cell.lock", "PLAN": "cells.json"},
    **{"CELLS": "cells.jsonl", "SPEED": "speed.jsonl", "NUMERICS": "numerics.jsonl", "UNTRAINED": "untrained"},
    **{"THROUGHPUT": "throughput.jsonl", "SCALING": "parallel.jsonl", "REPLACED": ".replaced-"},
}


def test_what_is_on_disk_from_before_is_found_by_its_name():
    own = {name for name, value in vars(files).items() if name.isupper() and isinstance(value, str)} - {"CONFIGS"}
    assert {name: getattr(files, name) for name in own} == NAMES
    run = (checkpoint.MANIFEST, checkpoint.LATEST, checkpoint.step_name(1234567890), checkpoint.step_name(7))
    assert run == ("manifest.json", "latest", "step-1234567890", "step-00000007")


def start(code, *arguments):
    """A process of its own."""
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT)


def test_rows_of_several_processes_are_all_kept(tmp_path):
    code = (
        "import sys; from pathlib import Path; from experiments.files import append_rows\n"
        "for number in range(60): append_rows(Path(sys.argv[1]), [{'by': sys.argv[2], 'number': number}])\n"
    )
    path = tmp_path / "rows.jsonl"
    assert all(process.wait() == 0 for process in [start(code, path, by) for by in "abcd"])
    rows = read_rows(path)
    assert sorted((row["by"], row["number"]) for row in rows) == [(by, n) for by in "abcd" for n in range(60)]


def test_several_processes_add_each_identity_once(tmp_path):
    code = (
        "import sys; from pathlib import Path; from experiments.files import append_rows\n"
        "for number in range(30):\n"
        "    append_rows(Path(sys.argv[1]), [{'number': number, 'by': sys.argv[2]}], lambda row: row['number'])\n"
    )
    path = tmp_path / "rows.jsonl"
    assert all(process.wait() == 0 for process in [start(code, path, by) for by in "abcd"])
    assert [row["number"] for row in read_rows(path)] == list(range(30))


def test_rows_with_an_identity_that_is_there_are_left_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_rows(path, [{"task": "a"}, {"task": "a", "position": 1}], lambda row: row["task"])
    added = append_rows(path, [{"task": "a", "position": 2}, {"task": "b"}], lambda row: row["task"])
    assert added == [{"task": "b"}]
    assert read_rows(path) == [{"task": "a"}, {"task": "a", "position": 1}, {"task": "b"}]


def test_an_identity_is_what_a_row_says_in_some_of_its_columns():
    one, other = {"a": {"x": 1, "y": 2}, "b": 3, "c": 4}, {"c": 5, "a": {"y": 2, "x": 1}, "b": 3, "d": None}
    assert columns_of(one, ("a", "b")) == columns_of(other, ("a", "b"))
    assert columns_of(one, ("d",)) == columns_of(other, ("d",)) != columns_of(one, ("c",)) != columns_of(other, ("c",))


def test_an_error_that_names_no_file_names_the_one_that_was_written(tmp_path):
    for error, named in (
        (OSError(28, "No space left"), str(tmp_path)),
        (OSError(28, "No space left", "other"), "other"),
        (OSError("timed out"), None),
    ):
        with pytest.raises(OSError, match=r"No space left|timed out") as found, naming(tmp_path):
            raise error
        assert (found.value.errno, found.value.filename) == (error.errno, named)


@pytest.mark.parametrize(
    ("name", "key", "fit", "misfit"),
    [
        *(("start.json", key, {}, []) for key in ("data", "init_from")),
        ("start.json", "parameters", 3, "3"),
        ("start.json", "tokenizer", None, 3),
        ("git.json", "sha", None, 3),
        *(("state.json", key, 3, "3") for key in ("step", "tokens", "stage", "world_size")),
        ("state.json", "config_hash", "x", None),
        ("state.json", "data", [], {}),
    ],
)
def test_what_stands_in_files_is_of_its_kind(tmp_path, name, key, fit, misfit):
    path = tmp_path / name
    path.write_text(json.dumps({key: fit, "other": 1}))
    assert read_json(path) == {key: fit, "other": 1}
    path.write_text(json.dumps({key: misfit, "other": 1}))
    with pytest.raises(ValueError, match=rf"{name} is damaged \(its {key} cannot be\): restore it"):
        read_json(path)


def test_a_number_that_is_not_finite_is_named_and_nothing_is_written(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_rows(path, [{"score": 1.0}])
    with pytest.raises(ValueError, match=r"rows.jsonl takes finite numbers.* score is nan, by_row.nats.1 is inf$"):
        append_rows(path, [{"score": 2.0}, {"score": float("nan"), "by_row": {"nats": [0.0, float("inf")]}}])
    assert read_rows(path) == [{"score": 1.0}]


def test_a_write_that_fails_leaves_the_old_text_and_no_half_of_the_new(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    append_rows(path, [{"number": 1}])

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*rows.jsonl'"):
            append_rows(path, [{"number": 2}])
    assert {entry.name for entry in tmp_path.iterdir()} == {"rows.jsonl", ".rows.jsonl.lock"}
    append_rows(path, [{"number": 2}])
    assert read_rows(path) == [{"number": 1}, {"number": 2}]


def test_what_is_replaced_is_whole_on_disk_before_and_its_name_after(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace

    def synced(descriptor):
        file = Path(f"/proc/self/fd/{descriptor}").resolve()
        done.append((file.name.split(".")[1], file.stat().st_size) if file.is_file() else file)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda old, new: done.append(new.name) or replace(old, new))
    write_atomically(tmp_path / "text", "123")
    assert done == [("text", 3), "text", tmp_path]


def test_two_writers_of_a_text_do_not_meet_in_one_temporary_file(tmp_path):
    code = (
        "import sys; from pathlib import Path; from experiments.files import write_atomically\n"
        "for _ in range(100): write_atomically(Path(sys.argv[1]), sys.argv[2] * 20000)\n"
    )
    path = tmp_path / "text"
    assert all(process.wait() == 0 for process in [start(code, path, by) for by in "ab"])
    assert path.read_text() in ("a" * 20000, "b" * 20000)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("umask", [0o002, 0o027])
def test_files_have_the_modes_of_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "text", "x")
        append_rows(tmp_path / "rows.jsonl", [{"a": 1}])
        with locked(tmp_path / "plan"):
            pass
    finally:
        os.umask(before)
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path


def test_a_link_stays_one(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "rows.jsonl").symlink_to(tmp_path / "there" / "rows.jsonl")
    append_rows(tmp_path / "rows.jsonl", [{"a": 1}])
    assert (tmp_path / "rows.jsonl").is_symlink()
    assert read_rows(tmp_path / "there" / "rows.jsonl") == [{"a": 1}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1', "is damaged .*: buy another"),
        (b"\xff\xfe", "is damaged .*: buy another"),
        (b"[1]", "is damaged .*no JSON object.*: buy another"),
        (b"[" * 100_000, "is damaged .*: buy another"),
        (None, "cannot be read .*: buy another"),
    ],
)
def test_a_damaged_file_is_named_with_the_mend(tmp_path, content, message):
    path = tmp_path / "git.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"git\.json {message}"):
        read_json(path, "buy another")


@pytest.mark.parametrize("line", [b"\xff", b"3", b'{"a": ', b"[" * 100_000])
def test_a_damaged_row_is_named(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b"\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2 is damaged"):
        read_rows(path)
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2 is damaged"):
        append_rows(path, [{"a": 2}], json.dumps)


def test_a_column_that_a_row_lacks_is_named_with_its_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_rows(path, [{"a": 1}, {"a": {"b": 2}}])
    one, two = read_rows(path)
    assert one | {"c": 3} == {"c": 3} | one == {"a": 1, "c": 3}
    for number, row in ((1, one), (1, one | {"c": 3}), (1, {"a": 0} | one), (2, two), (2, two["a"])):
        message = rf"rows\.jsonl, line {number} is damaged, or of another version \(it does not say d\): remove"
        with pytest.raises(ValueError, match=message):
            row["d"]
    assert ({"a": 0} | one)["a"] == 1
    assert (one | {"a": 0})["a"] == 0


def test_a_directory_that_cannot_be_written_is_refused(tmp_path):
    check_writable(tmp_path / "new" / "one", "")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is no directory: buy another"):
        check_writable(tmp_path / "file", "buy another")
    with pytest.raises(ValueError, match="file is not writable; buy another"):
        check_writable(tmp_path / "file" / "below", "buy another")
