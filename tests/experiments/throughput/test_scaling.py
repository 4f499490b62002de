"""The benchmark of several ranks at toy size: what is measured, when, against what, and what becomes of failures."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir

from experiments.files import SCALING, append_rows, read_rows
from experiments.schema import to_config
from experiments.throughput import scaling as parallel
from experiments.throughput import scaling_report as parallel_report
from experiments.throughput.scaling import Mode, cases, check_parallel, measure
from experiments.training.ranks import init_ranks
from tests.experiments.conftest import CONFIGS, TINY
from tests.experiments.training.test_train_cli import command, torchrun

STEP = {"compile": False, "tokens_per_step": 512, "tokens_per_micro_batch": 128, "warmup": 1, "steps": 2}
MODES = {"zero1": {"length": 64, **STEP}, "shared": {"length": 128, "stage": 3, "shares_rows": True, **STEP}}


@pytest.fixture
def train_overrides(cache_dir):
    return [*TINY, "data.pack=plain", f"cache_dir={cache_dir}"]


@pytest.fixture
def config(train_overrides):
    """Of two modes; Hydra stays open, since every case composes its run."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = to_config(compose("scaling", ["backends=[full]"]))
        config.train, config.modes = train_overrides, {name: Mode(**mode) for name, mode in MODES.items()}
        yield config


def rows_of(config, path):
    return list(measure(config, init_ranks("cpu"), path))


def test_one_rank_measures_what_is_missing(config, tmp_path):
    check_parallel(config, 1)
    path = tmp_path / SCALING
    first, second = rows_of(config, path)
    assert read_rows(path) == [first, second]
    assert (first["length"], second["length"], second["stage"], second["shares_rows"]) == (64, 128, 1, False)
    for row in (first, second):
        assert row["status"] == "ok"
        assert row["tokens_per_s"] == pytest.approx(512 / row["step_time"])
        assert len(row["losses"]) == 3
        assert row["losses"][-1] < row["losses"][0]
    assert rows_of(config, path) == []
    config.modes["shared"].steps = 1
    assert [row["steps"] for row in rows_of(config, path)] == [1]


def test_a_failure_is_a_row_and_the_others_are_measured(config, tmp_path, monkeypatch):
    def time_steps(run, warmup, steps):
        assert (warmup, steps) == (1, 2)
        if run.config.data.seq_len == 64:
            raise RuntimeError("a kernel failed")
        return {"tokens_per_s": 1.0}

    monkeypatch.setattr(parallel, "time_steps", time_steps)
    failed, other = rows_of(config, tmp_path / SCALING)
    assert (failed["status"], failed["detail"]) == ("error", "RuntimeError: a kernel failed")
    assert other["status"] == "ok"


def test_of_several_ranks_one_writes_and_whichever_fails_ends_all(config, tmp_path, monkeypatch):
    replies, waited = [{"status": "ok", "tokens_per_s": 1.0}] * 5 + [{"status": "error", "detail": "lost"}], []
    monkeypatch.setattr(parallel, "attempt", lambda *_: replies.pop(0))

    def found(is_main, path):
        ranks = SimpleNamespace(device=torch.device("cpu"), world_size=2, is_main=is_main)
        ranks.barrier = lambda: waited.append(is_main)
        return measure(config, ranks, path)

    assert list(found(False, tmp_path / SCALING)) == []
    assert not (tmp_path / SCALING).exists()
    rows = list(found(True, tmp_path / SCALING))
    assert [(row["ranks"], row["stage"], row["shares_rows"]) for row in rows] == [(2, 1, False), (2, 3, True)]
    other = found(False, tmp_path / "other" / SCALING)
    (tmp_path / "other").mkdir()
    (failed,) = read_rows(tmp_path / "other" / SCALING) or [next(other)]  # after one that was measured
    assert (failed["status"], failed["detail"], failed["stage"]) == ("error", "lost", 3)
    with pytest.raises(SystemExit) as end:
        next(other)
    assert end.value.code == 1
    assert waited == [False, True, False]


def test_each_case_is_told_in_a_line(config, tmp_path, monkeypatch, capsys):
    row = {"ranks": 2, "backend": "dash", "length": 64, "stage": 3, "status": "ok", "tokens_per_s": 12345.6}
    failed = row | {"status": "error", "detail": "a kernel failed", "tokens_per_s": None}
    for is_main in (True, False):
        monkeypatch.setattr(parallel, "init_ranks", lambda device, main=is_main: SimpleNamespace(is_main=main))
        monkeypatch.setattr(parallel, "measure", lambda *_: iter([row, failed]))
        monkeypatch.setattr(parallel, "write_report", lambda path: f"the table of {path.name}")
        parallel.main.__wrapped__(compose("scaling", [f"output_dir={tmp_path / 'out'}"]))
        assert capsys.readouterr().out.splitlines() == [
            "[0 s] 2 x dash  64  stage 3  ok  12,346 tokens/s",
            "[0 s] 2 x dash  64  stage 3  error  a kernel failed",
            *["the table of out"] * is_main,
        ]


def test_one_rank_does_once_what_stages_and_sharing_divide_among_several(config):
    config.backends = ["full", "dash"]
    config.modes["zero2"] = Mode(stage=2, length=64, **STEP)
    alone = [(backend, mode.length, mode.stage) for backend, mode in cases(config, 1)]
    assert alone == [("full", 64, 1), ("dash", 64, 1), ("full", 128, 1), ("dash", 128, 1)]
    assert [mode.stage for _, mode in cases(config, 2)] == [1, 1, 3, 3, 2, 2]


def test_the_settings_that_are_shipped_serve_several_ranks():
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = to_config(compose("scaling"))
        check_parallel(config, 4)
        run = parallel.compose_run(config, "full", Mode(), 4, Path("unused"))
    measured = (8192, 1, False, True, False, 131072, 32768, 2, 5)
    assert Mode(*measured) == Mode()
    assert run.data.validation_rows >= 4
    assert run.eval_every == 0


@pytest.mark.parametrize(
    ("change", "ranks", "message"),
    [
        ({"tokens_per_micro_batch": 100}, 1, "tokens_per_step=512 is no multiple of tokens_per_micro_batch=100"),
        ({"length": 96}, 1, "no multiple of length=96"),
        ({"steps": 0}, 1, "steps must be a positive integer"),
        ({}, 3, "rows_per_batch=8 is no multiple"),
        ({"compile": True, "stage": 3}, 2, "compile=true does not go with"),
    ],
)
def test_what_cannot_be_measured_is_refused(config, change, ranks, message):
    with pytest.raises(ValueError, match=message):  # noqa: PT012
        config.modes = {"zero1": Mode(**MODES["zero1"] | change)}
        check_parallel(config, ranks)


@pytest.mark.parametrize(("stage", "shares"), [(2, True), (3, False)])
def test_the_run_of_a_case(config, tmp_path, stage, shares):
    mode = Mode(128, stage, shares, compile=stage == 2, activation_checkpointing=not shares, tokens_per_step=2048)
    mode = replace(mode, tokens_per_micro_batch=512, warmup=3, steps=4)
    run = parallel.compose_run(config, "nsa", mode, 4, tmp_path / "a, b")
    assert (run.attention.name, run.data.seq_len, run.model.max_seq_len) == ("nsa", 128, 128)
    assert (run.rows_per_micro_batch, run.rows_per_batch, run.steps, run.optim.warmup_steps) == (4, 16, 7, 0)
    assert (run.deepspeed.stage, run.sequence_parallel) == (stage, 4 if shares else 1)
    assert (run.compile, run.activation_checkpointing) == (stage == 2, not shares)
    assert (run.run_dir, run.check_memory) == (str(tmp_path / "a, b"), False)


def test_unknown_backends_and_no_modes_are_refused(config):
    config.backends = ["flash"]
    with pytest.raises(ValueError, match="backends has flash: choose from full"):
        check_parallel(config, 1)
    config.backends, config.modes = ["full"], {}
    with pytest.raises(ValueError, match="modes has no entry"):
        check_parallel(config, 1)


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_is_measured_by_default_can_be(ranks):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        check_parallel(to_config(compose("scaling")), ranks)


ROW = {"device": "GPU", "train": ["model=350m"], "date": "2026-01-02T", "git_sha": None, "dirty": False, "versions": {}}
ROW |= {"backend": "dash", "length": 8192, "tokens_per_step": 1, "tokens_per_micro_batch": 1, "compile": True}
ROW |= {"activation_checkpointing": False, "stage": 1, "shares_rows": False, "warmup": 1, "steps": 1, "status": "ok"}
ROW |= {"step_time": 0.5, "peak_memory_mib": 3000.0, "detail": None}


ROWS = [
    ROW | {"ranks": 2, "tokens_per_s": 90.0, "losses": [5.0, 4.0], "compile": False, "stage": 3, "shares_rows": True},
    ROW | {"ranks": 1, "tokens_per_s": 1.0, "losses": [9.0, 9.0]},
    ROW | {"ranks": 1, "tokens_per_s": 100.0, "losses": [5.0, 4.0]},  # again: the last one counts
    ROW | {"ranks": 1, "tokens_per_s": 50.0, "losses": [5.0, 4.0], "compile": False},
    ROW | {"ranks": 2, "tokens_per_s": 190.0, "losses": [5.0, 3.99], "activation_checkpointing": False},
    ROW | {"ranks": 2, "tokens_per_s": 170.0, "losses": [5.0, 4.0], "activation_checkpointing": True},
    ROW | {"ranks": 2, "stage": 2, "status": "out of memory", "detail": "a | b"},
    ROW | {"ranks": 1, "status": "error", "detail": None, "tokens_per_micro_batch": 2},
    ROW | {"ranks": 2, "tokens_per_s": 190.0, "losses": [5.0, 4.0], "tokens_per_micro_batch": 2},
    ROW | {"ranks": 4, "tokens_per_s": 300.0, "losses": [4.5, 4.0]},
    ROW | {"ranks": 2, "tokens_per_s": 80.0, "losses": [5.0, 4.0], "backend": "full", "length": 4096},
    ROW | {"ranks": 1, "tokens_per_s": 50.0, "losses": [5.0, 4.0], "backend": "full", "length": 4096},
    ROW | {"ranks": 1, "tokens_per_s": 7.0, "losses": [5.0, 4.0], "train": ["model=60m"]},
    ROW | {"ranks": 2, "tokens_per_s": 7.0, "losses": [5.0, 4.0], "train": ["model=60m"]},
    ROW | {"ranks": 2, "tokens_per_s": 9.0, "losses": [5.0, 4.0], "device": "other"},
    *(
        ROW
        | {"ranks": ranks, "tokens_per_s": rate, "losses": [5.0, 4.0], "device": "third", "git_sha": sha, "stage": s}
        for ranks, rate, sha, s in ((1, 20.0, "a", 1), (2, 30.0, "a", 1), (1, 10.0, "b", 1), (2, 16.0, "c", 2))
    ),
]


def test_the_table_compares_with_one_device_at_the_same_work(tmp_path):
    append_rows(tmp_path / SCALING, ROWS)
    table = parallel_report.write_report(tmp_path)
    assert (tmp_path / "parallel.md").read_text() == table
    assert [line for line in table.splitlines() if line.startswith(("## ", "| 8k", "| 4k"))] == [
        "## GPU: model=350m",
        "| 4k | full | 1 | 1 | whole | yes | no | 50 |  | 0.500 s | 2.9 GiB |  |",
        "| 4k | full | 2 | 1 | whole | yes | no | 80 | 80.0% | 0.500 s | 2.9 GiB | 0.0e+00 |",
        "| 8k | dash | 1 | 1 | whole | yes | no | 100 |  | 0.500 s | 2.9 GiB |  |",
        "| 8k | dash | 1 | 1 | whole | yes | no | error | | | | |",
        "| 8k | dash | 2 | 1 | whole | yes | no | 190 | 95.0% | 0.500 s | 2.9 GiB | 1.0e-02 |",
        "| 8k | dash | 2 | 1 | whole | yes | yes | 170 |  | 0.500 s | 2.9 GiB |  |",
        "| 8k | dash | 2 | 1 | whole | yes | no | 190 |  | 0.500 s | 2.9 GiB |  |",
        "| 8k | dash | 2 | 2 | whole | yes | no | out of memory a / b | | | | |",
        "| 8k | dash | 4 | 1 | whole | yes | no | 300 | 75.0% | 0.500 s | 2.9 GiB | 5.0e-01 |",
        "| 8k | dash | 1 | 1 | whole | no | no | 50 |  | 0.500 s | 2.9 GiB |  |",
        "| 8k | dash | 2 | 3 | shared | no | no | 90 | 90.0% | 0.500 s | 2.9 GiB | 0.0e+00 |",
        "## GPU: model=60m",
        "| 8k | dash | 1 | 1 | whole | yes | no | 7 |  | 0.500 s | 2.9 GiB |  |",
        "| 8k | dash | 2 | 1 | whole | yes | no | 7 | 50.0% | 0.500 s | 2.9 GiB | 0.0e+00 |",
        "## other: model=350m",
        "| 8k | dash | 2 | 1 | whole | yes | no | 9 |  | 0.500 s | 2.9 GiB |  |",
        "## third: model=350m",
        "| 8k | dash | 1 | 1 | whole | yes | no | 10 |  | 0.500 s | 2.9 GiB |  |",
        "| 8k | dash | 2 | 1 | whole | yes | no | 30 | 75.0% | 0.500 s | 2.9 GiB | 0.0e+00 |",
        "| 8k | dash | 2 | 2 | whole | yes | no | 16 | 80.0%, one device at commit b | 0.500 s | 2.9 GiB | 0.0e+00 |",
    ]


def test_whatever_is_measured_otherwise_is_another_case():
    row = ROW | {"ranks": 1, "tokens_per_s": 1.0, "losses": [5.0]}
    two = row | {"ranks": 2}
    for name in ("device", *parallel_report.WORK):
        (_, found) = parallel_report.compared([row, two | {name: 7}])
        assert found["efficiency"] is None, name
    for name in ("device", *parallel_report.WORK, *parallel_report.WAY):
        assert len(parallel_report.compared([row, row | {name: 7}])) == 2, name
    assert len(parallel_report.compared([row, row | {"date": "x"}])) == 1


def test_the_figure_has_a_panel_for_each_number_of_devices(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(parallel_report, "save", lambda figure, path: figures.append((figure, path)))
    nsa = [{"ranks": 1, "tokens_per_s": 10.0}, {"ranks": 2, "tokens_per_s": 12.0}]
    rows = ROWS[:12] + [ROW | row | {"losses": [5.0, 4.0], "backend": "nsa"} for row in nsa]
    parallel_report.draw(parallel_report.compared(rows), tmp_path / "parallel")
    ((figure, path),) = figures
    assert path == tmp_path / "parallel"
    found = {
        axis.get_title(): (
            [label.get_text() for label in axis.get_xticklabels()],
            {
                line.get_label(): line.get_xydata().round(3).tolist()
                for line in axis.get_lines()
                if line.get_linestyle() != "--"
            },
        )
        for axis in figure.axes
    }
    assert found == {
        "2 x GPU": (
            ["4k, ZeRO 1\ncompiled", "8k, ZeRO 1\ncompiled", "8k, ZeRO 3\nrows shared\nnot compiled"],
            {
                "dash": [[0.833, 0.95], [1.833, 0.9]],
                "full": [[0, 0.8]],
                "nsa": [[1.167, 0.6]],
            },
        ),
        "4 x GPU": (["8k, ZeRO 1\ncompiled"], {"dash": [[0, 0.75]]}),
    }


def test_a_report_needs_rows(tmp_path):
    with pytest.raises(ValueError, match=r"run `python -m experiments\.throughput\.scaling output_dir="):
        parallel_report.write_report(tmp_path)


@pytest.mark.slow
def test_two_ranks_have_the_losses_of_one_and_start_again_after_a_failure(config, tmp_path):
    config.train.append("model.intermediate_size=2048")  # stage 3 divides tensors of more than 100,000 numbers alone
    rows_of(config, tmp_path / SCALING)
    long = STEP | {"length": 2**20, "tokens_per_step": 2**21, "tokens_per_micro_batch": 2**20}  # more than the data has
    modes = {"zero1": long, "zero2": MODES["zero1"] | {"stage": 2}, "zero3": MODES["shared"]}
    overrides = [f"modes.{name}={mode}".replace("'", "") for name, mode in modes.items()]
    overrides += ["~modes.rows64k", "~modes.rows128k", f"train={config.train}", f"output_dir={tmp_path}"]
    launcher = torchrun(2, "--max-restarts", "1", "-m")
    done = command([*overrides, "backends=[full]"], *launcher, script="experiments.throughput.scaling")
    assert done.returncode == 0, done.stderr
    alone, shared_alone, *failed, together, shared = read_rows(tmp_path / SCALING)
    assert {row["status"] for row in failed} == {"error"}
    assert (together["ranks"], together["stage"]) == (2, 2)
    assert together["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert (shared["stage"], shared["parameters"]) == (3, alone["parameters"])
    assert shared["losses"] == pytest.approx(shared_alone["losses"], rel=1e-5)
