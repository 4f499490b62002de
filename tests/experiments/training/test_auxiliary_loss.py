"""What an attention backend learns beside the model's loss: counted, logged, resumed, and nowhere else."""

from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file

from experiments.config import to_train_config
from experiments.files import read_rows
from experiments.training import build as build_module
from experiments.training.weights import find_weights
from tests.experiments.conftest import CONFIGS, TINY
from tests.experiments.training.test_train import interrupt_after
from train import train

INDEXER = (
    *("attention=indexer", "attention.block_size=8", "attention.index_size=8", "attention.topk=4"),
    *("attention.local_blocks=0", "optim.lr=3e-3", "optim.schedule=constant"),
)


def rows(run_dir):
    return [row for row in read_rows(run_dir / "metrics.jsonl") if row["split"] == "train"]


def column(run_dir, key):
    return [row[key] for row in rows(run_dir)]


def weights(run_dir):
    """Those of the model, and those of the backends."""
    found = load_file(find_weights(run_dir))
    own = {name: x for name, x in found.items() if ".backend." in name}
    return {name: x for name, x in found.items() if name not in own}, own


def differ(a, b):
    return [not torch.equal(a[name], b[name]) for name in a]


@pytest.fixture(scope="module")
def dense(tmp_path_factory, cache_dir):
    """A dense run to begin with."""
    run_dir = tmp_path_factory.mktemp("dense") / "run"
    overrides = [*TINY, "attention=full", "name=dense", f"run_dir={run_dir}", f"cache_dir={cache_dir}", "steps=2"]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return train(to_train_config(compose("train", overrides)))


def test_it_moves_the_index_and_nothing_else(make_config):
    """Attention to everything, so that what the index learns cannot show in what the model does."""
    options = [*INDEXER, "attention.warmup_steps=100", "optim.grad_clip=0", "steps=6"]
    runs = [train(make_config(f"run{w}", *options, f"attention.kl_weight={w}")) for w in (1e-9, 1.0)]
    assert column(runs[0], "loss") == column(runs[1], "loss")
    (model, index), (other_model, other_index) = (weights(run) for run in runs)
    assert not any(differ(model, other_model))
    assert all(differ(index, other_index))
    small, large = (column(run, "auxiliary_loss") for run in runs)
    assert large[0] == pytest.approx(1e9 * small[0], rel=1e-5)
    assert large[-1] < large[0]


def test_every_token_counts_the_same_whichever_micro_batch_it_is_in(make_config):
    runs = [train(make_config(f"rows{n}", *INDEXER, f"rows_per_micro_batch={n}", "steps=3")) for n in (4, 1)]
    for key in ("loss", "auxiliary_loss", "grad_norm", "grad_norm_router"):
        assert column(runs[1], key) == pytest.approx(column(runs[0], key), rel=1e-4), key


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_frozen_model_gets_an_index_and_a_resumed_run_is_the_same(make_config, tmp_path, stage, dense):
    """Over the end of the warm-up, from which on it is sparse."""
    options = [
        *(*INDEXER, f"deepspeed=zero{stage}", f"init_from={dense}", "optim.train_only=router"),
        *("attention.warmup_steps=3", "steps=6", "save_every=2", "keep_checkpoints=0", "stats_every=1"),
    ]
    whole = train(make_config("whole", *options))
    assert [sparsity > 0 for sparsity in column(whole, "causal_sparsity")] == [False] * 3 + [True] * 3
    model, index = weights(whole)
    assert not any(differ(weights(dense)[0], model))
    assert len(index) == 4
    interrupt_after(whole, 2, tmp_path / "resumed")
    resumed = train(make_config("resumed", *options))
    for key in ("step", "loss", "auxiliary_loss", "grad_norm"):
        assert column(resumed, key) == column(whole, key), key
    assert not any(differ(index, weights(resumed)[1]))


def test_a_target_sparsity_is_held_only_once_the_warm_up_is_over(make_config):
    options = [*INDEXER, "attention.selector=topp", "attention.target_sparsity=0.3", "attention.warmup_steps=8"]
    run = train(make_config("run", *options, "steps=16", "stats_every=1"))
    knobs, sparsities = column(run, "knob"), column(run, "causal_sparsity")
    assert len(set(knobs[:11])) == 1  # measured at steps 4 and 8, had it been sparse; the first time is step 12
    assert knobs[-1] != knobs[0]
    assert sparsities[:8] == [0] * 8
    assert sparsities[8] == pytest.approx(0.3, abs=0.05)


def test_where_there_is_none_no_row_has_it(make_config):
    for name, options in (("full", ["attention=full"]), ("prior", [*INDEXER, "attention.gradient=prior"])):
        assert "auxiliary_loss" not in rows(train(make_config(name, *options, "steps=1", "optim.warmup_steps=0")))[0]


def test_only_the_router_needs_a_router(make_config):
    small = ["attention.block_size=16", "attention.window_size=16", "attention.topk=3"]
    for options in (
        ["attention=full"],
        ["attention=infllmv2", *small],
        ["attention=moba", "attention.chunk_size=8"],
        ["attention=dash", "attention.chunk_size=8", "attention.prior=none"],
    ):
        with pytest.raises(ValueError, match="has nothing of its own to train"):
            train(make_config("run", *options, "optim.train_only=router"))
    with pytest.raises(ValueError, match=r"optim\.train_only must be one of router; got 'index'"):
        train(make_config("run", *INDEXER, "optim.train_only=index"))


def test_the_router_of_dash_alone_learns_through_a_frozen_model(make_config, dense):
    options = ["attention=dash", "attention.chunk_size=8", "attention.prior=raw", f"init_from={dense}"]
    run = train(make_config("run", *options, "optim.train_only=router"))
    model, own = weights(run)
    assert not any(differ(weights(dense)[0], model))
    assert all(x.abs().max() > 0 for x in own.values())


@pytest.mark.parametrize(("device", "printed"), [("cuda", 1), ("cpu", 0)])
def test_who_trains_on_a_gpu_is_told_what_has_no_kernels(device, printed):
    said = []
    build_module._print_start(
        SimpleNamespace(print=said.append),
        SimpleNamespace(path="run", damaged={}, checkpoint=None),
        SimpleNamespace(world_size=1, device=torch.device(device)),
        {"parameters": 7},
        knows_peak=True,
        in_pytorch=["the index"],
    )
    assert said[1:] == ["in PyTorch, for want of kernels: the index"] * printed
