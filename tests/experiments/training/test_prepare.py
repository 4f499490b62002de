"""The command that fills the cache before a run."""

import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from data import build_data
from experiments.schema import to_config
from experiments.training.prepare import prepare
from tests import forked

ROOT = Path(__file__).parents[3]
MIXTURE = (
    *("data=mixture", "data.seq_len=64", "data.vocab_size=300", "data.tokenizer_bytes=200000"),
    *("data.corpora.python.max_bytes=1000000", "data.corpora.recall.max_documents=100", "data.validation_rows=4"),
)


@pytest.mark.long
def test_prepare_mends_what_is_damaged_and_a_run_finds_it_all(make_config, tmp_path, capfd):
    config = make_config("run", "data.max_bytes=1000000", f"cache_dir={tmp_path}")
    prepare(config)
    said = capfd.readouterr().out
    assert re.search(r"^python_stdlib: [\d,]+ documents, 1\.\d MB of text, [\d,]+ tokens", said, re.MULTILINE)
    assert re.search(r"^the loader alone: [\d,]+ tokens/s", said, re.MULTILINE)
    (tokens,) = tmp_path.glob("tokens/*/shard-00000/train-0.tokens")
    written, whole = tokens.stat().st_mtime_ns, tokens.read_bytes()
    prepare(config)
    assert tokens.stat().st_mtime_ns == written, "intact: nothing is made again"
    tokens.write_bytes(whole[:1000] + b"\0\0" + whole[1002:])
    prepare(config)
    assert tokens.read_bytes() == whole
    written = tokens.stat().st_mtime_ns
    build_data(config.data, split="train", seed=0, rows=1, cache_dir=tmp_path)
    assert tokens.stat().st_mtime_ns == written


def test_what_is_generated_while_training_needs_no_preparation():
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = to_config(compose("train", ["data=mqar"]))
    with pytest.raises(ValueError, match="nothing to prepare"):
        prepare(config)


def test_the_command_takes_the_arguments_of_a_run(tmp_path):
    done = forked.run("-m", "experiments.training.prepare", *MIXTURE, f"cache_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^(\w+): ", done.stdout, re.MULTILINE) == ["python", "recall"]
