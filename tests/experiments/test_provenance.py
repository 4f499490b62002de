"""Where a row says that it comes from."""

import json
import os
import platform
import re
import subprocess
import sys
import time

import pytest
import torch

from experiments import provenance as provenance_module
from experiments.provenance import environment, git_state, is_changed, provenance
from slurm.code import digest


@pytest.fixture
def root(tmp_path, monkeypatch):
    """In place of the checkout that the code lies in."""
    path = tmp_path / "checkout"
    path.mkdir()
    monkeypatch.setattr(provenance_module, "ROOT", path)
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "someone")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "someone@example.org")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    return path


def git(root, *arguments):
    return subprocess.run(["git", "-C", root, *arguments], check=True, capture_output=True, text=True).stdout.strip()


def test_the_state_of_a_checkout(root, monkeypatch):
    assert git_state() == ({"sha": None}, "")
    assert provenance("cpu")["dirty"] is False
    git(root, "init", "-q", "-b", "trunk")
    assert git_state() == ({"sha": None, "branch": "trunk", "dirty": False, "untracked": []}, "")
    (root / "code.py").write_text("one\n")
    (root / ".gitignore").write_text("outputs\n")
    assert git_state()[0] == {"sha": None, "branch": "trunk", "dirty": True, "untracked": [".gitignore", "code.py"]}
    git(root, "add", "-A")
    git(root, "commit", "-qm", "first")
    (root / "outputs").touch()
    clean = {"sha": git(root, "rev-parse", "HEAD"), "branch": "trunk", "dirty": False, "untracked": []}
    assert git_state() == (clean, "")
    (root / "code.py").write_text("two\n")
    git(root, "add", "-A")
    state, diff = git_state()
    assert state == clean | {"dirty": True}
    assert {"-one", "+two"} < set(diff.splitlines())
    told = provenance("cpu")
    assert (told["git_sha"], told["dirty"], told["device"]) == (clean["sha"], True, "cpu")
    assert told["versions"].keys() >= {"torch", "triton", "python", "cuda"}
    monkeypatch.setattr(time, "gmtime", lambda: time.struct_time((2001, 2, 3, 4, 5, 6, 5, 34, 0)))
    assert provenance("cpu")["run"] == f"20010203T040506Z-{os.getpid()}"
    git(root, "checkout", "-q", "-f", "--detach")
    assert git_state() == (clean | {"branch": None}, "")
    monkeypatch.setenv("PATH", str(root))
    assert git_state() == ({"sha": None}, "")


def test_a_copy_of_the_code_has_the_state_of_its_checkout_and_knows_a_change(root, monkeypatch):
    assert not is_changed()
    (root / "snapshot.json").write_text(json.dumps({"git": {"sha": "abc", "dirty": True}, "diff": "some"}))
    assert git_state() == ({"sha": "abc", "dirty": True}, "some")
    assert is_changed()
    copy = root.with_name(f"code-{digest(root)}")
    root.rename(copy)
    monkeypatch.setattr(provenance_module, "ROOT", copy)
    assert not is_changed()
    (copy / "more.py").touch()
    assert is_changed()


def test_the_environment_is_told_without_secrets(monkeypatch):
    known = {"CUDA_VISIBLE_DEVICES": "3", "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "SLURM_JOB_ID": "7"}
    for name, value in (known | {"TRITON_INTERPRET": "1", "API_KEY": "secret"}).items():
        monkeypatch.setenv(name, value)
    told = environment("cpu")
    assert told["variables"] == known | {"TRITON_INTERPRET": "1"}
    assert (told["device"], told["cuda"], told["threads"]) == ("cpu", None, torch.get_num_threads())
    assert (told["command"], told["cpus"], told["host"]) == (sys.argv, os.cpu_count(), platform.node())
    assert (told["python"], told["platform"]) == (platform.python_version(), platform.platform())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4}", told["time"])
    assert told["packages"]["torch"] == torch.__version__
    assert told["packages"].keys() >= {"triton", "deepspeed", "numpy", "datasets", "tokenizers", "dashattn"}
