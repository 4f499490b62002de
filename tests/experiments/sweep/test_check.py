"""What a sweep is refused for before one of its cells is trained."""

import io
from dataclasses import replace

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console

from experiments import plan
from experiments.config import plain, to_train_config
from experiments.files import CONFIG, CONFIGS
from experiments.sweep import __main__ as sweep
from experiments.sweep import check
from experiments.sweep.__main__ import run_sweep
from experiments.sweep.cells import ArmConfig, StudyConfig, SweepConfig, cells
from experiments.sweep.check import check_cells

# As of sweep=real_model, without a checkpoint: three query heads a group, rows of 8192.
REAL = ["model=smollm2_135m", "data.seq_len=8192", "data.pack=plain", "device=cpu"]
WINDOW = ["attention=dash_sink", "attention.local_chunks=4"]


def make_sweep(tmp_path, arm, *, base=None, seeds=(0,), turned=None):
    study = StudyConfig(train=REAL, base=base, evaluate=["tasks=[loss]"], evaluate_turned=turned, arms={"one": arm})
    return SweepConfig(name="s", output_dir=str(tmp_path / "s"), studies={"t": study}, seeds=list(seeds))


def found(sweep_config, elsewhere=True):
    return check_cells(cells(sweep_config), 1, elsewhere=elsewhere)


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        (
            {"train": WINDOW, "sparsities": [0.5, 0.91]},
            "a sparsity of 0.91 cannot be had: at 8192 tokens attention=dash",
        ),
        (
            {"train": WINDOW, "evaluate": ["sparsities=[0.91]"]},
            "0.91 cannot be had: at 8192 .* reaches 0.900, with what",
        ),
        ({"train": WINDOW, "evaluate": ["lengths=[4096]"], "sparsities": [0.85]}, "0.85 cannot be had: at 4096 tokens"),
        ({"train": [*WINDOW, "attention.target_sparsity=0.91"]}, "0.91 cannot be had: at 8192 tokens attention=dash"),
        ({"train": ["attention=full"], "sparsities": [0.5]}, "attention=full has no sparsity knob: leave sparsities"),
        ({"train": ["attention=infllmv2"], "knobs": [64, 9]}, "topk counts the forced blocks too: topk 9 < 18"),
        ({"train": ["attention=full"], "evaluate": ["rows_per_batch=0"]}, "rows_per_batch must be a positive integer"),
        ({"train": ["attention=full"], "evaluate": ["attention=dash"]}, "has its own, leave it out"),
        ({"train": ["attention=full"], "evaluate": ["tasks=[qa_1]"]}, "task qa_1 needs squad=FILE"),
    ],
)
def test_an_arm_that_could_not_be_evaluated_is_refused_by_name(tmp_path, arm, message):
    with pytest.raises(ValueError, match=rf"^cell t-one-seed0 cannot work: .*{message}") as error:
        found(make_sweep(tmp_path, ArmConfig(**arm)))
    assert "\n" not in str(error.value)


def test_the_second_evaluation_is_looked_at_too(tmp_path):
    arm = ArmConfig(train=WINDOW, sparsities=[0.85])
    assert found(make_sweep(tmp_path, arm, turned=["tasks=[loss]"])) == []
    with pytest.raises(ValueError, match=r"0\.85 cannot be had: at 4096"):
        found(make_sweep(tmp_path, arm, turned=["lengths=[4096]"]))


def test_nothing_is_begun_of_a_sweep_that_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "run_cell", None)
    config = make_sweep(tmp_path, ArmConfig(train=WINDOW, sparsities=[0.91]))
    with pytest.raises(ValueError, match="cell t-one-seed0 cannot work"):
        run_sweep(config, Console(file=io.StringIO()))
    assert list(tmp_path.iterdir()) == []
    config.studies["t"].arms["one"] = ArmConfig(train=["attention=full"], evaluate=["device=cuda"])
    with pytest.raises(ValueError, match="device=cuda, but PyTorch sees no GPU"):
        run_sweep(config, Console(file=io.StringIO()))
    assert found(config) == []  # as a job elsewhere it can work
    (tmp_path / "file").touch()
    config.studies["t"].arms["one"].evaluate = [f"output={tmp_path}/file", "device=cpu"]
    with pytest.raises(ValueError, match=r"cell t-one-seed0 cannot work: .*file is no directory: evaluate\.py keeps"):
        run_sweep(config, Console(file=io.StringIO()))


def test_what_the_weights_decide_is_noted_once_for_all_seeds(tmp_path, monkeypatch):
    composed = []
    monkeypatch.setattr(check, "compose", lambda name, told: composed.append(name) or compose(name, told))
    config = make_sweep(tmp_path, ArmConfig(train=WINDOW, sparsities=[0.5, 0.9]), seeds=(0, 1, 2))
    (note,) = found(config)
    assert note.startswith("cell t-one-seed0: a sparsity of 0.9 may not be had: at 8192 tokens attention=dash reaches")
    assert composed.count("train") == 1

    monkeypatch.setattr(sweep, "check_cells", lambda *_, **__: [note])
    monkeypatch.setattr(sweep, "take", lambda cell: 1 / 0)
    said = io.StringIO()
    with pytest.raises(ZeroDivisionError):
        run_sweep(config, Console(file=said, width=400))
    assert said.getvalue() == f"s: 3 cells to do, 0 done before\nnote: {note}\n"


def test_a_seed_is_looked_at_by_itself_where_another_one_was_begun(tmp_path):
    """Which needs its origin no more."""
    train = ["model=checkpoint", f"init_from={tmp_path}/gone", "attention=full"]
    config = make_sweep(tmp_path, ArmConfig(train=train), seeds=(0, 1))
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        begun = to_train_config(compose("train", [*REAL, "attention=full"]))
    (tmp_path / "s" / "t-one-seed0").mkdir(parents=True)
    OmegaConf.save(plain(begun), tmp_path / "s" / "t-one-seed0" / CONFIG)
    with pytest.raises(ValueError, match=r"cell t-one-seed1 cannot work: .*/gone does not exist: init_from takes"):
        found(config)


def test_two_studies_are_looked_at_each_with_its_base(tmp_path):
    arm = ArmConfig(train=["attention=checkpoint"], sparsities=[0.75])
    config = make_sweep(tmp_path, arm, base=["attention=dash"])
    assert found(config) == []
    config.studies["u"] = replace(config.studies["t"], base=["attention=full"])
    with pytest.raises(ValueError, match="cell u-one-seed0 cannot work: attention=full has no sparsity knob"):
        found(config)


def test_arms_of_two_studies_that_no_figure_could_tell_apart_are_refused(tmp_path):
    config = make_sweep(tmp_path, ArmConfig(train=["attention=full"]))
    for same in ({}, {"train": [*REAL, "steps=50"]}, {"base": ["attention=full"]}):
        config.studies["u"] = replace(config.studies["t"], **same)
        with pytest.raises(ValueError, match=r"cell u-one-seed0 cannot work: .* study t, .* on the same"):
            found(config)
    for told in (
        {"train": [*REAL, "data.name=other"]},
        {"train": [*REAL, "data.seq_len=4096"]},
        {"evaluate": ["tasks=[position]"]},
        {"arms": {"two": ArmConfig(train=["attention=full"])}},
    ):
        config.studies["u"] = replace(config.studies["t"], **told)
        assert found(config) == []


def test_cells_that_take_the_model_of_an_untrained_base_are_checked_with_it(tmp_path):
    arm = {"train": ["model=checkpoint", *WINDOW], "sparsities": [0.9]}
    base = ["attention=full", "model.num_heads=3"]
    assert found(make_sweep(tmp_path, ArmConfig(**arm), base=base)) == []  # no group
    arm["sparsities"] = [0.91]
    with pytest.raises(ValueError, match=r"0\.91 cannot be had"):
        found(make_sweep(tmp_path, ArmConfig(**arm), base=base))
    arm = {"train": ["attention=checkpoint"], "knobs": [64, 9]}
    with pytest.raises(ValueError, match="topk 9 < 18"):
        found(make_sweep(tmp_path, ArmConfig(**arm), base=["attention=infllmv2"]))
    with pytest.raises(ValueError, match=r"model is not the one in .*t-base-seed0: set model\.num_layers=30"):
        found(make_sweep(tmp_path, ArmConfig(train=["attention=full", "model.num_layers=2"]), base=["attention=full"]))
    (tmp_path / "s" / "t-base-seed0").mkdir(parents=True)
    (tmp_path / "s" / "t-base-seed0" / CONFIG).write_text("{}")
    with pytest.raises(ValueError, match="t-base-seed0"):  # one that was begun says itself what it is
        found(make_sweep(tmp_path, ArmConfig(**arm), base=["attention=infllmv2"]))


def test_a_plan_refuses_the_same():
    """Its notes: tests/experiments/test_plan.py."""
    dash = "studies.recall.arms.dash"
    told = ["sweep=smoke", "~studies.recall.arms.full", f"{dash}.knobs=null", f"{dash}.sparsities=[0.9]"]
    with pytest.raises(
        ValueError, match=r"recall-dash-seed0 cannot work: a sparsity of 0\.9 cannot be had: at 128 tok"
    ):
        plan.run_plan(told)
