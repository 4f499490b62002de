"""What another user has written is read as data: it runs nothing."""

import os
import shutil
from functools import partial

import pytest
import torch

from experiments.provenance import snapshot
from experiments.training.checkpoint import seal
from experiments.training.ranks import Ranks
from train import train


class Payload:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


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
        (step / "manifest.json").unlink()
        seal(step, Ranks(0, 1, torch.device("cpu")))
        with pytest.raises(ValueError, match=rf"{message}.*init_from=.*model\.safetensors"):
            train(config)
    assert not mark.exists()
    path.write_bytes(own)
    (step / "manifest.json").unlink()
    seal(step, Ranks(0, 1, torch.device("cpu")))
    assert train(config)
    assert (checkpoints / "step-00000004").is_dir()


def test_a_copy_of_the_code_is_what_its_name_says(tmp_path):
    code = snapshot(tmp_path)
    compiled = code / "data" / "__pycache__"
    compiled.mkdir()
    (compiled / "config.cpython-311.pyc").write_bytes(b"planted")
    assert snapshot(tmp_path) == code
    assert not compiled.exists()
    changes = [partial((code / name).write_text, "print('other')\n") for name in ("train.py", "data/new.py")]
    for change in (*changes, partial((code / "torch").symlink_to, tmp_path)):
        shutil.copytree(code, tmp_path / "kept")
        change()
        with pytest.raises(ValueError, match="holds other code than its name says"):
            snapshot(tmp_path)
        shutil.rmtree(code)
        (tmp_path / "kept").rename(code)
    assert snapshot(tmp_path) == code
