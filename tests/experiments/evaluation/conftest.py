from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

import train
from experiments.schema import to_config

CONFIGS = Path(__file__).parents[3] / "configs"
TEXT = (
    *("steps=1", "optim.warmup_steps=0", "attention=dash", "attention.chunk_size=8", "attention.router_scale=20"),
    *("data.vocab_size=1200", "data.validation_fraction=0.2"),
)
MQAR = (
    *("experiment=pareto_recall", "device=cpu", "threads=1", "steps=1", "optim.warmup_steps=0", "eval_every=0"),
    *("data.seq_len=64", "data.pairs_max=8", "data.validation_rows=6", "model.hidden_size=32", "model.head_dim=16"),
    *("attention=dash", "attention.chunk_size=8", "attention.router_scale=20", "name=recall", "seed=3"),
)


def compose_train(overrides):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return to_config(compose("train", overrides))


@pytest.fixture
def text_run(tiny_overrides):
    overrides, run_dir = tiny_overrides("text", *TEXT)
    train.train(compose_train(overrides))
    return run_dir


@pytest.fixture
def recall_run(tmp_path):
    run_dir = tmp_path / "recall"
    train.train(compose_train([*MQAR, f"run_dir={run_dir}"]))
    return run_dir
