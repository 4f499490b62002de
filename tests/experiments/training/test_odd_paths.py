"""A run directory may have any name."""

import shutil
from dataclasses import replace

import pytest

from experiments.evaluation.export import export
from experiments.files import read_rows
from experiments.overrides import override
from models.hf import is_hf_folder
from train import train

ODD = "[12] lr=0.1,{a}('\"&#!~;^<>`*?|$ä漢"


def losses(run_dir):
    return {row["step"]: row["loss"] for row in read_rows(run_dir / "metrics.jsonl")}


def test_a_run_resumes_on_another_stage_and_is_exported(make_config, tmp_path):
    config = make_config("run", "save_every=2", "deepspeed=zero1", "model.vocab_size=300")
    config = replace(config, name=ODD, run_dir=str(tmp_path / ODD))
    run_dir = train(config)
    whole = losses(run_dir)
    for stage in (1, 2):  # the second one through DeepSpeed's universal format
        shutil.rmtree(run_dir / "checkpoints" / "step-00000004")
        (run_dir / "checkpoints" / "latest").write_text("step-00000002\n")
        train(replace(config, deepspeed=replace(config.deepspeed, stage=stage)))
        assert losses(run_dir) == whole
    export(run_dir, tmp_path / f"export {ODD}")
    assert is_hf_folder(tmp_path / f"export {ODD}")


def test_a_name_that_configurations_take_for_another_value_is_refused(make_config, tmp_path):
    for key in ("run_dir", "cache_dir", "logger.group"):
        with pytest.raises(ValueError, match=rf"^{key}=.*a\$\{{HOME\}}: with .* take another name"):
            make_config("run", override(key, f"{tmp_path}/a${{HOME}}" if key != "logger.group" else "a${HOME}"))
