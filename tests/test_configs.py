"""Every YAML file under configs/ composes, and what the command line gets wrong is refused."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf

from dashattn.backends import BACKENDS, Capabilities
from dashattn.backends.dash import DashBackend
from dashattn.integrations.transformers import PRESETS
from experiments import plan  # noqa: F401 (registers its schema)
from experiments.config import TrainConfig, load_config, plain, register_configs, to_train_config
from experiments.evaluation import generate  # noqa: F401 (likewise)
from experiments.evaluation.config import register_evaluate_config
from experiments.schema import to_config
from experiments.speed.config import register_speed_config
from experiments.sweep import check as sweep_check
from experiments.sweep.cells import cells, register_sweep_config
from experiments.throughput.scaling import register_parallel_config
from experiments.throughput.steps import register_throughput_config
from experiments.training.check import accumulation, check
from models import Transformer
from tests.checkpoints import make_folder
from tests.composition import hasten

hasten()
register_configs()
register_sweep_config()
register_evaluate_config()
register_speed_config()
register_throughput_config()
register_parallel_config()
CONFIGS = Path(__file__).parents[1] / "configs"
GROUPS = ("attention", "model", "data", "optim", "deepspeed", "logger", "launcher", "experiment")
CHOICES = [f"{group}={path.stem}" for group in GROUPS for path in sorted((CONFIGS / group).glob("*.yaml"))]
for group in ("model", "attention"):
    CHOICES.remove(f"{group}=checkpoint")  # needs a checkpoint: tests/experiments/test_origin.py
CHOICES.remove("experiment=continue_pretraining")  # likewise: the test below
EVALUATED_ONLY = "attention=oracle"
# What a choice needs before it is a run.
COMPANIONS = {
    "data=local": ["data.files=[a.txt]", "model=60m"],
    "data=hub": ["model=60m"],
    "data=mixture_debian": ["model=60m"],
    "data=real_text": ["model=smollm2_135m"],
}


# Of a training run without overrides every value as it is composed, of a choice those that it changes (with what it is
# composed with here), of the other commands every one. Rows of results name them: another value is another experiment.
VALUES = json.loads((Path(__file__).parent / "expected" / "configs.json").read_text())
# Likewise of a sweep, as a digest of its configuration.
SWEEPS = {
    "ablations": "c3374083",
    "from_scratch": "60a249b6",
    "frontier": "bf09f4fe",
    "frontier_base": "3d27d5f0",
    "frontier_budget": "218a5eef",
    "frontier_rates": "240691c9",
    "frontier_text": "1ba28492",
    "pareto": "06c9a9c5",
    "real_model": "88bd6267",
    "real_model_controls": "b5179eae",
    "real_model_ruler": "d2b9c8bb",
    "routers": "5ba028ad",
    "routers_gpu": "310cbd27",
    "scratch": "5430257f",
    "smoke": "51f26a71",
}


def from_files(entry: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose(entry, list(overrides))


def composed(*overrides: str) -> TrainConfig:
    return to_config(from_files("train", *overrides))


def values_of(cfg: DictConfig) -> dict:
    """By dotted keys."""

    def leaves(value, key):
        if not isinstance(value, dict) or not value:
            return {key: value}
        return {k: v for name, inner in value.items() for k, v in leaves(inner, f"{key}.{name}".lstrip(".")).items()}

    return leaves(OmegaConf.to_container(cfg), "")


@pytest.mark.parametrize("overrides", [[], ["attention=nsa", "optim=wsd", "steps=${rows_per_batch}"]])
def test_what_is_composed_in_haste_is_what_hydra_composes(overrides, monkeypatch):
    hasty = [composed(*overrides, "name=x") for _ in range(2)]
    for kind, name in ((ConfigLoaderImpl, "load_configuration"), (ConfigRepository, "load_config")):
        monkeypatch.setattr(kind, name, getattr(kind, name).__wrapped__)
    assert hasty == 2 * [composed(*overrides, "name=x")]


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_makes_a_run(choice):
    cfg = from_files("train", choice, "device=cpu", *COMPANIONS.get(choice, []))
    expected = VALUES["train"] | {"device": "cpu"}
    assert {key: value for key, value in values_of(cfg).items() if (key, value) not in expected.items()} == VALUES.get(
        choice
    )
    if choice == EVALUATED_ONLY:
        with pytest.raises(ValueError, match="for evaluation only"):
            check(to_config(cfg))
        return
    config = check(to_config(cfg))
    assert config.device == "cpu"
    assert config.deepspeed.precision == "fp32"


OTHERS = {
    "train": ["train"],
    **{choice: ["train", choice] for choice in ("model=checkpoint", "attention=checkpoint")},
    "experiment=continue_pretraining": ["train", "experiment=continue_pretraining"],
    **{
        entry: [entry]
        for entry in ("evaluate", "generate", "plan", "scaling", "speed", "speed_peers", "speed_shapes", "throughput")
    },
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_other_files_say_what_they_said(name):
    found = values_of(from_files(*OTHERS[name]))
    if OTHERS[name][0] == "train" != name:
        found = {key: value for key, value in found.items() if (key, value) not in VALUES["train"].items()}
    assert found == VALUES.get(name)


def test_every_file_is_held_to_its_values():
    """Those of ``configs/sweep`` below."""
    named = {*CHOICES, *OTHERS} - {"train"}
    files = {path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "sweep"}
    assert {f"{path.parent.name}={path.stem}" if path.parent != CONFIGS else path.stem for path in files} == named | {
        "train",
        "sweep",
    }


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("checkpoint") / "tiny", max_position_embeddings=8192)


def test_pretraining_continues_with_the_checkpoints_model(checkpoint):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        choices = ["experiment=continue_pretraining", "attention=dash_sink", f"init_from={checkpoint}", "device=cpu"]
        config = check(to_train_config(compose("train", choices)))
    assert (config.model.hidden_size, config.data.tokenizer) == (32, str(checkpoint))


def test_moba_is_top_k_of_mean_keys_without_a_prior():
    attention = composed("attention=moba").attention
    assert (attention.selector, attention.prior, attention.learn_summary) == ("topk", "none", False)


def test_an_index_is_distilled_into_the_checkpoints_model(checkpoint):
    router = ["attention=indexer", "attention.warmup_steps=150", "optim.train_only=router"]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        choices = ["model=checkpoint", f"init_from={checkpoint}", *router, "data.seq_len=256", "device=cpu"]
        config = check(to_train_config(compose("train", choices)))
    assert (config.model.hidden_size, config.attention.warmup_steps, config.optim.train_only) == (32, 150, "router")


@pytest.mark.parametrize("attention", ["full", "dash", "infllmv2", "nsa"])
@pytest.mark.parametrize("data", ["python_stdlib", "mixture", "mqar"])
def test_a_saved_configuration_loads_as_the_same_one(attention, data, tmp_path):
    config = composed(f"attention={attention}", f"data={data}")
    path = tmp_path / "config.yaml"
    path.write_text(OmegaConf.to_yaml(plain(config)))
    assert load_config(path) == config


def test_the_attentions_of_transformers_are_those_composed_here():
    assert {name: composed(f"attention={name}").attention for name in PRESETS} == PRESETS
    assert {preset.name for preset in PRESETS.values()} == BACKENDS.keys() - {"full"}
    files = {path.stem for path in (CONFIGS / "attention").glob("*.yaml")}
    assert {name for name in (*files, "attention", "checkpoint") if not BACKENDS.is_ours(name)} == set()


@pytest.mark.parametrize("size", [32, 64, 128])
def test_what_is_timed_is_what_is_composed(size):
    """But for the size of the blocks."""
    timed = {name: config for kind, _ in BACKENDS.own.values() for name, config in kind.variants(size).items()}
    dense = timed.pop("full")
    assert dense == composed("attention=full").attention
    assert timed == {name: replace(PRESETS[name], **{PRESETS[name].blocks: size}) for name in timed}
    assert timed.keys() == PRESETS.keys()


def test_attention_by_layer_is_composed_checked_saved_and_loaded(tmp_path):
    layers = "attention.layers={0:full,1:{chunk_size:32}}"
    config = check(composed("attention=dash", "device=cpu", layers))
    path = tmp_path / "config.yaml"
    path.write_text(OmegaConf.to_yaml(plain(config)))
    assert load_config(path).attention.layers == {0: "full", 1: {"chunk_size": 32}}
    with pytest.raises(ValueError, match="the model's layers are 0 to 1"):
        check(composed("attention=dash", "device=cpu", "attention.layers={2-9/3:full}"))
    with pytest.raises(ValueError, match="for evaluation only"):
        check(composed("attention=dash", "device=cpu", "attention.layers={*/2:oracle}"))


@pytest.mark.parametrize(
    "override",
    ["optim.learning_rate=1", "attention.topk=4", "stepz=3", "optim.lr=fast", "steps=1.5", "attention=sparse"],
)
def test_unknown_keys_and_wrong_types_stop_at_composition(override):
    with pytest.raises(ConfigCompositionException):
        composed(override)


@pytest.mark.parametrize(
    ("overrides", "mend"),
    [
        (["deepspeed.stage=0", "deepspeed.precision=bf16"], "deepspeed.stage=1"),
        (["deepspeed.stage=4"], "0, 1, 2, 3"),
        (["deepspeed=zero3", "compile=true"], "use stage 2"),
        (["peak_tflops=0"], "peak_tflops must be a positive finite number"),
        (["profile_steps=-1"], "at least 0"),
        (["deepspeed.precision=fp16"], "fp32 or bf16"),
        (["deepspeed.precision=int8"], "fp32"),
        (["device=tpu"], "cpu, cuda"),
        (["optim.schedule=linear"], "wsd"),
        (["logger.mode=on"], "offline"),
        (["steps=10", "optim.warmup_steps=10"], "raise steps"),
        (["optim=wsd", "steps=100", "optim.warmup_steps=90"], "lower one"),
        (["optim.min_lr_ratio=2"], "between 0 and 1"),
        (["optim.lr=0"], "positive"),
        (["optim.grad_clip=-1"], "at least 0"),
        (["steps=0"], "positive"),
        (["sequence_parallel=0"], "positive"),
        (["sequence_parallel=2"], "start a multiple of 2 ranks"),
        (["keep_every=4", "save_every=0"], r"no multiple of save_every=0, .*: take a multiple, or keep_every=0"),
        (["keep_every=4", "save_every=3"], "keep_every=4 is no multiple of save_every=3"),
        (["log_every=0"], "positive"),
        (["threads=0"], "from 1 to 1024"),
        (["rows_per_batch=6", "rows_per_micro_batch=4"], "rows_per_batch=4"),
        (["data.seq_len=4096"], "model.max_seq_len=4096"),
        (["model.num_kv_heads=3"], "num_kv_heads among"),
        (["attention=dash", "attention.chunk_size=512"], "lower attention.chunk_size"),
        (["attention=dash_sink", "attention.local_chunks=14", "attention.chunk_size=32"], "force fewer chunks"),
        (["attention=dash", "attention.init_chunks=-1"], "init_chunks must be an integer of at least 0"),
        (["attention=dash", "attention.alpha=3"], "alpha"),
        (["attention=infllmv2", "attention.topk=4"], "window_size"),
        (["model.num_heads=64", "model.num_kv_heads=1", "attention=dash"], "raise num_kv_heads"),
    ],
)
def test_impossible_combinations_are_refused_with_their_mend(overrides, mend):
    with pytest.raises(ValueError, match=mend):
        check(composed("device=cpu", *overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        ["keep_every=4", "save_every=2"],
        ["keep_every=0", "save_every=0"],
        ["steps=10", "optim.warmup_steps=9"],
        ["optim=wsd", "steps=10", "optim.warmup_steps=8", "optim.decay_fraction=0.2"],
        ["optim=wsd", "optim.schedule=cosine", "steps=10", "optim.warmup_steps=9", "optim.decay_fraction=0.9"],
        ["data.seq_len=512", "model.max_seq_len=512"],
        ["deepspeed.stage=0", "deepspeed.precision=fp32", "compile=true"],
        ["deepspeed.stage=1", "deepspeed.precision=bf16"],
        ["deepspeed.stage=2", "compile=true"],
        ["deepspeed.stage=3", "compile=false"],
    ],
)
def test_the_last_value_that_can_be_is_taken(overrides):
    check(composed("device=cpu", *overrides))


@pytest.mark.parametrize(
    ("has_gpu", "asked", "resolved"),
    [
        (True, ("auto", "auto"), ("cuda", "bf16")),
        (True, ("cpu", "auto"), ("cpu", "fp32")),
        (True, ("cuda", "fp16"), ("cuda", "fp16")),
        (False, ("auto", "auto"), ("cpu", "fp32")),
        (False, ("auto", "bf16"), ("cpu", "bf16")),
        (False, ("cuda", "auto"), None),
    ],
)
def test_auto_is_what_the_machine_has(monkeypatch, has_gpu, asked, resolved):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    config = composed(f"device={asked[0]}", f"deepspeed.precision={asked[1]}")
    if resolved is None:
        with pytest.raises(ValueError, match="device=cuda, but PyTorch sees no GPU: use device=cpu"):
            check(config)
    else:
        found = check(config)
        assert (found.device, found.deepspeed.precision) == resolved


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sixteen_bits_need_a_stage_that_keeps_float32_weights(monkeypatch, precision):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = composed("device=cuda", "deepspeed.stage=0", f"deepspeed.precision={precision}")
    with pytest.raises(ValueError, match=rf"deepspeed\.stage=0 trains in fp32 only, not {precision}: use"):
        check(config)


def test_a_backend_that_cannot_take_packed_documents_is_refused_before_it_meets_them(monkeypatch):
    monkeypatch.setattr(DashBackend, "capabilities", Capabilities(packed=False))
    check(composed("attention=dash", "data.pack=plain"))
    with pytest.raises(ValueError, match=r"use data\.pack=plain"):
        check(composed("attention=dash"))


def test_a_key_forced_in_is_refused():
    with pytest.raises(ValueError, match=r"unknown key attention.topk"):
        composed("+attention.topk=4")


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIGS / "sweep").glob("*.yaml")))
def test_every_sweep_composes_into_cells_that_can_be(name, tmp_path, checkpoint, monkeypatch):
    monkeypatch.setenv("INIT_FROM", str(checkpoint))
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("sweep", [f"sweep={name}", f"output_dir={tmp_path}"])
        said = json.dumps({key: value for key, value in values_of(cfg).items() if key != "output_dir"})
        digest = hashlib.blake2b(said.encode(), digest_size=4).hexdigest()
        assert digest == SWEEPS.get(name)
        sweep = to_config(cfg)
        assert len(cells(sweep)) % len(sweep.seeds) == 0
        trained = []
        monkeypatch.setattr(sweep_check, "check", lambda config, ranks: trained.append(config) or check(config, ranks))
        sweep_check.check_cells(cells(sweep), sweep.gpus_per_cell, elsewhere=True)
        assert len(trained) >= len(cells(sweep)) / len(sweep.seeds)
        for config in trained:
            with torch.device("meta"):
                Transformer(replace(config.model, vocab_size=1024), config.attention)


@pytest.mark.parametrize("key", ["foo", "studies.recall.foo", "studies.recall.arms.dash.knob"])
def test_a_key_forced_into_a_sweep_is_refused(key):
    with (
        initialize_config_dir(str(CONFIGS), version_base="1.3"),
        pytest.raises(ValueError, match=f"unknown key {key}"),
    ):
        to_config(compose("sweep", ["sweep=smoke", f"+{key}=1"]))


def test_missing_values_are_named():
    with pytest.raises(ValueError, match=r"no value for optim.lr"):
        composed("optim.lr=???")


def test_a_batch_is_shared_by_ranks_and_micro_batches():
    config = composed("rows_per_batch=16")
    assert accumulation(config, ranks=4) == (4, 1)
    config.rows_per_micro_batch = 2
    assert accumulation(config, ranks=4) == (2, 2)
    with pytest.raises(ValueError, match="no multiple"):
        accumulation(config, ranks=3)
    config.rows_per_micro_batch = None
    with pytest.raises(ValueError, match="multiple of 3"):
        accumulation(config, ranks=3)
    shared = replace(config, sequence_parallel=2)
    assert accumulation(shared, ranks=4) == (8, 1)
    assert accumulation(replace(shared, rows_per_micro_batch=2), ranks=4) == (2, 4)
    message = "rows_per_micro_batch=5 x 2 groups of 2 ranks: change one, for instance rows_per_batch=10$"
    with pytest.raises(ValueError, match=message):
        accumulation(replace(shared, rows_per_micro_batch=5), ranks=4)


@pytest.mark.parametrize(
    ("shared", "overrides", "mend"),
    [
        (2, ["rows_per_batch=3"], "2 groups of 2 ranks: take a multiple of 2"),
        (2, ["data.seq_len=511"], "change data.seq_len"),
        (2, ["model.num_heads=3", "model.num_kv_heads=1"], "take a divisor of it"),
        (8, ["data=mqar", "data.curriculum_lengths=[4,64,128]", "model.num_heads=8"], "rows of 4 tokens equally"),
    ],
)
def test_what_ranks_cannot_share_is_refused(shared, overrides, mend):
    config = composed("device=cpu", "rows_per_batch=6", "sequence_parallel=2")
    assert accumulation(check(config, ranks=4), ranks=4) == (3, 1)
    with pytest.raises(ValueError, match=mend):
        check(composed("device=cpu", f"sequence_parallel={shared}", *overrides), ranks=2 * shared)
