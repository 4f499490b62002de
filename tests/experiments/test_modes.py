"""Colleagues may read what the umask lets them: nothing that is written is narrower, or wider."""

import os
import stat
from dataclasses import replace

import pytest

from experiments.evaluation.config import EvaluateConfig
from experiments.evaluation.evaluate import evaluate, find_target
from experiments.evaluation.export import export
from experiments.provenance import snapshot
from experiments.sweep.collect import collect
from train import train


@pytest.mark.parametrize("umask", [0o002, 0o027])
def test_all_files_have_the_modes_of_the_umask(make_config, tmp_path, umask):
    root = tmp_path / "shared"
    config = make_config("run", "steps=1", "optim.warmup_steps=0", "data.max_bytes=400000")
    before = os.umask(umask)
    try:
        root.mkdir()
        run_dir = train(replace(config, run_dir=str(root / "run"), cache_dir=str(root / "cache")))
        evaluation = EvaluateConfig(run=str(run_dir), device="cpu")
        assert len(list(evaluate(evaluation, find_target(evaluation)))) == 1
        export(run_dir, root / "exported")
        collect(run_dir, root / "kept")
        code = snapshot(root / "slurm")
    finally:
        os.umask(before)
    wrong = []
    for path in [code, *root.rglob("*")]:
        is_copied = code in path.parents  # with the modes of the checkout
        mode = stat.S_IMODE(path.stat().st_mode)
        if path.is_file():
            mode &= ~stat.S_IXUSR  # DeepSpeed's scripts to restore a checkpoint
        if not is_copied and mode != (0o777 if path.is_dir() else 0o666) & ~umask:
            wrong.append(f"{path} {mode:o}")
    assert wrong == []
