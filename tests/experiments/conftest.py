import subprocess
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from experiments.config import register_configs, to_train_config
from experiments.speed.config import register_speed_config
from experiments.throughput.steps import register_throughput_config
from experiments.training import prepare
from tests.composition import hasten

hasten()
register_configs()
register_speed_config()
register_throughput_config()

CONFIGS = Path(__file__).parents[2] / "configs"

# Real text, a model of 130 thousand parameters, and no more steps than it takes: under a second per run.
TINY = (
    *("experiment=debug", "steps=4", "rows_per_batch=4", "device=cpu", "threads=1"),
    *("model.hidden_size=64", "model.intermediate_size=128", "model.head_dim=16", "model.max_seq_len=256"),
    *("data.seq_len=64", "data.max_bytes=3000000", "data.vocab_size=300", "data.validation_rows=4"),
    *("data.tokenizer_bytes=300000", "optim.warmup_steps=1"),
    *("log_every=1", "stats_every=0", "eval_every=0", "save_every=0"),
)


@pytest.fixture(autouse=True)
def _loaders_read_for_an_instant(monkeypatch):
    monkeypatch.setattr(prepare, "LOADER_SECONDS", 0.05)


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    base = tmp_path_factory.getbasetemp()
    # The workers of pytest-xdist have a directory each, below one that they share.
    return (base.parent if base.name.startswith("popen-") else base) / "cache"


@pytest.fixture
def tiny_overrides(cache_dir, tmp_path):
    """Overrides of a tiny run and its directory: tiny_overrides("run-a", "attention=dash", "steps=8")."""

    def make(name, *overrides):
        run_dir = tmp_path / name
        return [*TINY, f"name={name}", f"run_dir={run_dir}", f"cache_dir={cache_dir}", *overrides], run_dir

    return make


@pytest.fixture
def make_config(tiny_overrides):
    """The composed configuration of a tiny run, as the command line would compose it."""

    def make(name, *overrides):
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            return to_train_config(compose("train", tiny_overrides(name, *overrides)[0]))

    return make


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a few MB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=7m", "tmpfs", str(path)], capture_output=True, text=True
    )
    if mount.returncode:
        pytest.skip(f"a small tmpfs needs the right to mount: {mount.stderr.strip()}")
    yield path
    subprocess.run(["umount", str(path)], check=True)
