"""The throughput benchmark at toy size: what is measured, with which setting, and what becomes of failures."""

import gc
import json
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir

from experiments.files import THROUGHPUT, append_rows, read_rows
from experiments.schema import to_config
from experiments.speed.inputs import NEIGHBOURS
from experiments.throughput import __main__ as throughput_command
from experiments.throughput import report as throughput_report
from experiments.throughput import steps as throughput
from experiments.throughput.steps import Benchmark, Setting, check_throughput, resemble, run_benchmark
from tests import forked
from tests.experiments.conftest import CONFIGS, TINY

SMALL, LARGE = Setting(512, compile=False, activation_checkpointing=True), Setting(1024, compile=False)


@pytest.fixture
def make_benchmark(tmp_path, cache_dir):
    """A composed benchmark; Hydra stays open, since every case composes its run."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):

        def make(*overrides, settings=(SMALL,)):
            config = to_config(compose("throughput", [f"output_dir={tmp_path}", *overrides]))
            config.train = [*TINY, "data.pack=plain", f"cache_dir={cache_dir}", "attention.impl=auto"]
            config.lengths, config.settings = [256, 512], list(settings)
            config.tokens_per_step, config.steps, config.sparsity = 1024, 1, 0.4
            return config

        yield make


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(throughput, "LOADER_SECONDS", 0.05)


def case(row):
    return row["backend"], row["length"], row["pattern"], row["micro_batch_tokens"]


def test_settings_compete_and_the_fastest_measures_every_backend(make_benchmark, tmp_path):
    config = make_benchmark("backends=[full,dash]", "patterns=[shared]", settings=[SMALL, LARGE])
    check_throughput(config)
    config.lengths, config.sparsity = [128, 256], 0.2
    said = []
    run_benchmark(config, "cpu", said.append)
    rows = read_rows(tmp_path / THROUGHPUT)
    assert all(row["status"] == "ok" for row in rows)
    assert [row["sparsity"] for row in rows[:-1]] == [*[None] * 3, 0.2, 0.2]
    assert said[0] == f"full  128  512  False  True  ok  {rows[0]['tokens_per_s']:,.0f} tokens/s"
    trials, others, loader = rows[:2], rows[2:-1], rows[-1]
    assert [case(row) for row in trials] == [("full", 128, None, 512), ("full", 128, None, 1024)]
    best = max(trials, key=lambda row: row["tokens_per_s"])["micro_batch_tokens"]
    lines = [("full", 256, None), ("dash", 128, "shared"), ("dash", 256, "shared")]
    assert [case(row) for row in others] == [(*line, best) for line in lines]
    for row in (*trials, *others):
        assert row["tokens_per_s"] == pytest.approx(1024 / row["step_time"], rel=1e-6)
        assert 0 < row["data_wait"] < row["step_time"]
        assert row["loss"] == pytest.approx(5.7, abs=0.5)  # untrained, of 300 tokens
        assert len(row["losses"]) == config.warmup + config.steps
        assert row["loss"] == row["losses"][-1]
    assert all(row["causal_sparsity"] == 0 for row in rows[:3])
    assert others[-1]["causal_sparsity"] == pytest.approx(0.2, abs=0.05)
    assert (loader["backend"], loader["length"]) == ("loader", 128)
    assert loader["tokens_per_s"] > 10 * max(row["tokens_per_s"] for row in rows[:-1])

    table = throughput_report.write_report(tmp_path)
    assert table.count("\n| 128 |") == 3
    assert table.count("\n| 256 |") == 2
    assert "times the fastest model" in table
    assert (tmp_path / "throughput.png").stat().st_size > 10_000


def test_a_top_k_is_found_beyond_what_is_forced(make_benchmark):
    config = make_benchmark()
    config.train += [f"attention.{size}" for size in ("block_size=16", "kernel_size=8", "kernel_stride=4")]
    config.train += ["attention.window_size=32", "attention.topk=30"]
    row = Benchmark(config, "cpu").case("infllmv2", 512, SMALL, "iid")
    assert (row["status"], row["detail"]) == ("ok", None)
    assert row["causal_sparsity"] == pytest.approx(0.4, abs=0.1)
    config.sparsity = 0.99  # the window and the first block stay: 4 of 32 blocks
    row = Benchmark(config, "cpu").case("infllmv2", 512, SMALL, "iid")
    assert (row["knob"], row["status"]) == (4, "ok")


def test_what_is_timed_of_a_step(monkeypatch):
    """The steps after the warm-up, from when the device is done until it is done; memory of the rank that took most."""
    log = []
    ranks = SimpleNamespace(device=torch.device("cpu"), gather=lambda own: [own, 7.0, 1.0])
    clock = SimpleNamespace(restart=lambda: log.append("restart"), read=lambda: {"tokens_per_s": 10.0})
    utilisation = SimpleNamespace(measure=log.append, read=lambda batches, rate: {"read": (batches, rate)})
    engine = SimpleNamespace(module=torch.nn.Linear(3, 2))
    run = SimpleNamespace(ranks=ranks, clock=clock, utilisation=utilisation, engine=engine)
    norms = [1.0, 1.0, 1.0, 1.0, None]
    reads = [SimpleNamespace(error=None, batches=[f"first of {n}", f"second of {n}"]) for n in range(1, 6)]
    reads.append(SimpleNamespace(error=OSError("disk"), batches=[]))

    def take_step(run, step, read):
        log.append(f"step {step} of {read.batches[1]}")
        return SimpleNamespace(loss=10.0 - step, grad_norm=norms.pop(0))

    monkeypatch.setattr(throughput, "read_step", lambda run: reads.pop(0))
    monkeypatch.setattr(throughput, "take_step", take_step)
    monkeypatch.setattr(throughput, "wait_for", lambda run: log.append("wait"))
    monkeypatch.setattr(throughput, "peak_memory_mib", lambda device: 5.0)
    monkeypatch.setattr(throughput, "forward", lambda _, batch, *__, **___: SimpleNamespace(stats=f"stats of {batch}"))
    monkeypatch.setattr(throughput, "attention_metrics", lambda stats: {"causal_sparsity": stats})
    assert throughput.time_steps(run, 2, 2) == {
        **{"tokens_per_s": 10.0, "peak_memory_mib": 7.0, "parameters": 8, "loss": 6.0, "losses": [9.0, 8.0, 7.0, 6.0]},
        **{"read": (["first of 4", "second of 4"], 10.0), "causal_sparsity": "stats of first of 4"},
    }
    steps = [f"step {n} of second of {n}" for n in range(1, 5)]
    assert log == [*steps[:2], "wait", "restart", *steps[2:], "wait", "stats of first of 4"]
    with pytest.raises(ValueError, match="the gradient of step 1 is not finite"):
        throughput.time_steps(run, 0, 1)
    with pytest.raises(OSError, match="disk"):
        throughput.time_steps(run, 0, 1)


def test_every_backend_at_every_length_and_pattern_with_what_was_fastest_and_fits(make_benchmark, monkeypatch):
    asked, slow = [], Setting(2048)
    rates = {("full", 128, 512): 5.0, ("full", 128, 1024): 9.0, ("full", 128, 2048): None}

    def case(self, backend, length, setting, pattern):
        asked.append((backend, length, setting.micro_batch_tokens, pattern))
        rate = rates.get((backend, length, setting.micro_batch_tokens), 1.0)
        status = "out of memory" if rate is None or (length, setting) == (256, LARGE) else "ok"
        return {"status": status, "tokens_per_s": rate}

    monkeypatch.setattr(Benchmark, "case", case)
    monkeypatch.setattr(Benchmark, "loader", lambda self, length: length)
    config = make_benchmark("backends=[nsa,full]", "patterns=[iid,shared]", settings=[SMALL, slow, LARGE])
    config.lengths = [256, 128, 256]
    *_, loader = Benchmark(config, "cpu").rows()
    assert loader == 128
    assert asked == [
        *(("full", 128, setting.micro_batch_tokens, None) for setting in (SMALL, slow, LARGE)),
        *(("nsa", 128, 1024, pattern) for pattern in ("iid", "shared")),
        *(("nsa", 256, size, pattern) for pattern in ("iid", "shared") for size in (1024, 512)),
        *(("full", 256, size, None) for size in (1024, 512)),
    ]


def test_the_loader_reads_packed_documents_by_whole_micro_batches(make_benchmark, monkeypatch):
    opened = []

    def build_data(data, **options):
        opened.append((data.pack, options["split"], options["rows"]))
        return iter(lambda: SimpleNamespace(num_tokens=1), None)

    monkeypatch.setattr(throughput, "build_data", build_data)
    monkeypatch.setattr(throughput, "LOADER_SECONDS", 4.0)
    clock = iter((1.0, 2.0, 3.0, 4.0, 5.5, 6.0))  # three batches in five seconds
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(clock))
    assert Benchmark(make_benchmark(), "cpu").loader(256)["tokens_per_s"] == 3 / 5
    assert opened == [("documents", "train", 2)]


def test_each_row_is_told_in_a_line(make_benchmark, tmp_path, monkeypatch):
    case = {"backend": "nsa", "length": 64, "pattern": "iid", "micro_batch_tokens": 8, "compile": True}
    case |= {"activation_checkpointing": None, "detail": None}
    rows = [case | {"status": "ok", "tokens_per_s": 1234.5}]
    rows.append(case | {"status": "error", "tokens_per_s": None, "detail": "no"})
    monkeypatch.setattr(Benchmark, "rows", lambda self: iter(rows))
    said = []
    run_benchmark(make_benchmark(), "cpu", said.append)
    assert said == ["nsa  64  iid  8  True  ok  1,234 tokens/s", "nsa  64  iid  8  True  error  no"]
    assert read_rows(tmp_path / THROUGHPUT) == rows


def test_what_does_not_fit_gives_way_to_the_next_fastest(make_benchmark, monkeypatch):
    measured = []

    def measure(run, config, pattern):
        measured.append(run.config.rows_per_micro_batch)
        if run.config.attention.name == "dash" and run.config.rows_per_micro_batch == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"tokens_per_s": 10.0 * run.config.rows_per_micro_batch}

    monkeypatch.setattr(throughput, "measure", measure)
    config = make_benchmark("backends=[dash]", "patterns=[iid]", settings=[SMALL, LARGE])
    config.lengths = [512]
    rows = list(Benchmark(config, "cpu").rows())
    assert measured == [1, 2, 2, 1]
    assert [row["status"] for row in rows] == ["ok", "ok", "out of memory", "ok", "ok"]


def test_a_failure_is_a_row_and_frees_the_model(make_benchmark, monkeypatch):
    models, measure = [], throughput.measure

    def failing(run, config, pattern):
        measure(run, config, pattern)
        models.append(weakref.ref(run.engine.module))
        raise RuntimeError("a kernel | failed")

    monkeypatch.setattr(throughput, "measure", failing)
    row = Benchmark(make_benchmark(), "cpu").case("full", 256, SMALL, None)
    gc.collect()
    assert (row["status"], row["detail"]) == ("error", "RuntimeError: a kernel | failed")
    assert models[0]() is None


def test_what_the_time_does_not_suffice_for_is_said(make_benchmark):
    rows = list(Benchmark(make_benchmark("time_budget=1e-9", "backends=[full]"), "cpu").rows())
    assert [row["status"] for row in rows] == ["out of time", "ok"]  # no setting was measured: nothing to go on with


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("backends=[flash]", "backends has flash: choose from full"),
        ("patterns=[]", "patterns has no entry"),
        ("lengths=[]", "lengths and settings need one entry at least"),
        ("settings=[]", "lengths and settings need one entry at least"),
        ("sparsity=1.5", r"sparsity .*got 1\.5"),
        ("sparsity=0.0", "sparsity=0 leaves nothing out"),
        ("steps=0", r"steps .*got 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(make_benchmark, override, message):
    name, value = override.split("=")
    with pytest.raises(ValueError, match=message):
        check_throughput(replace(make_benchmark(), **{name: json.loads(value.replace("flash", '"flash"'))}))


def test_a_micro_batch_holds_a_row_and_a_run_is_checked_beforehand(make_benchmark):
    with pytest.raises(ValueError, match=r"micro_batch_tokens=256 is less than a row of 512"):
        check_throughput(make_benchmark(settings=[Setting(256)]))
    config = make_benchmark("backends=[dash]")
    config.train.append("attention.chunk_size=256")
    with pytest.raises(ValueError, match="leaves nothing to select"):
        check_throughput(config)


@pytest.mark.parametrize(
    ("length", "setting", "rows", "batch"),
    [(256, SMALL, 2, 4), (256, Setting(1500, compile=True), 5, 5), (512, LARGE, 2, 2), (128, SMALL, 4, 8)],
)
def test_the_run_of_a_case(make_benchmark, tmp_path, length, setting, rows, batch):
    """Of whole micro-batches, no fewer tokens than asked for."""
    config = replace(make_benchmark("warmup=3"), steps=4)
    run = throughput.compose_run(config, "nsa", length, setting, tmp_path / "a, b")
    assert (run.attention.name, run.data.seq_len, run.model.max_seq_len) == ("nsa", length, length)
    assert (run.rows_per_micro_batch, run.rows_per_batch, run.steps, run.optim.warmup_steps) == (rows, batch, 7, 0)
    assert (run.compile, run.activation_checkpointing) == (setting.compile, setting.activation_checkpointing)
    assert (run.run_dir, run.check_memory, run.data.pack) == (str(tmp_path / "a, b"), False, "plain")


@pytest.mark.usefixtures("make_benchmark")
def test_what_is_measured_by_default_can_be():
    config = to_config(compose("throughput"))
    check_throughput(config)
    assert (config.lengths, config.sparsity, config.patterns) == ([8192, 16384, 32768], 0.75, ["clustered", "iid"])
    assert (config.tokens_per_step, config.warmup, config.steps, config.time_budget) == (131072, 1, 3, 500.0)
    tried = [(x.micro_batch_tokens, x.compile, x.activation_checkpointing) for x in config.settings]
    assert tried == [(32768, True, False), (32768, False, False), (65536, True, False), (65536, True, True)]


def test_neighbours_resemble_each_other_as_the_pattern_says():
    embedding = torch.nn.Embedding(5000, 64)
    ids = torch.arange(3 * NEIGHBOURS + 5)[None]
    for pattern, rho in (("shared", 1.0), ("clustered", 0.97), ("iid", 0.0)):
        with torch.no_grad():
            handle = embedding.register_forward_hook(resemble(pattern))
            x = embedding(ids)[0]
            handle.remove()
        similar = torch.nn.functional.cosine_similarity(x[1:], x[:-1])
        inside = torch.arange(len(similar)) % NEIGHBOURS != NEIGHBOURS - 1
        inside &= torch.arange(len(similar)) % NEIGHBOURS != 0  # next to the one whose embedding is shared
        assert similar[inside].mean() == pytest.approx(rho**2, abs=0.05)
        assert similar[~inside].mean() < max(0.7, rho)


def test_parameters_that_ranks_share_count_whole():
    module = torch.nn.Linear(3, 2)
    module.weight.ds_numel, module.weight.data = 6, torch.empty(0)  # as ZeRO stage 3 leaves it
    assert throughput.parameters_of(SimpleNamespace(engine=SimpleNamespace(module=module))) == 6 + 2


def make_row(backend, length, tokens_per_s, **values):
    row = {"pattern": None, "device": "GPU", "train": ["model=350m"], "status": "ok"}
    row |= {"date": "2026-01-01T00:00:00", "git_sha": None, "dirty": False, "versions": {"torch": "2"}, "detail": None}
    row |= {"micro_batch_tokens": 32768, "compile": True, "activation_checkpointing": False, "causal_sparsity": 0.75}
    row |= {"peak_memory_mib": 3000.0, "data_wait": 0.01, "step_time": 1.0, "mfu_causal": 0.5, "mfu_sparse": 0.25}
    return row | {"backend": backend, "length": length, "tokens_per_s": tokens_per_s} | values


def test_the_table_compares_with_the_fastest_dense_run_of_the_length(tmp_path, monkeypatch):
    monkeypatch.setattr(throughput_report, "draw", lambda *_: None)  # as the test below looks at it
    rows = [
        make_row("full", 16384, 60.0, causal_sparsity=0.0),
        make_row("full", 8192, 80.0, activation_checkpointing=True, mfu_sparse=None),
        make_row("full", 8192, 70.0, compile=False),
        make_row("full", 8192, 50.0),
        make_row("full", 8192, 100.0, data_wait=0.5, step_time=2.0),  # measured again
        make_row("full", 8192, None, status="error", detail="a | b", micro_batch_tokens=65536),
        make_row("dash", 16384, 70.0, pattern="iid", micro_batch_tokens=65536),
        make_row("dash", 16384, 90.0, pattern="iid", mfu_causal=None),
        make_row("nsa", 16384, None, pattern="iid", status="out of memory"),
        make_row("dash", 16384, None, pattern="iid", status="out of time", detail="raise time_budget"),
        make_row("dash", 16384, 40.0, pattern="iid", sparsity=0.9),  # none of those before
        make_row("dash", 32768, 30.0, pattern="shared"),
        make_row("dash", 32768, None, pattern="clustered", status="out of time", detail="raise time_budget"),
        make_row("loader", 8192, 2050.0, micro_batch_tokens=None),
        make_row("dash", 8192, 10.0, device="other GPU"),
        make_row("full", 8192, 7.0, train=["model=60m", "x=1"]),
        make_row("loader", 8192, None, micro_batch_tokens=None, device="third GPU", status="error"),
    ]
    append_rows(tmp_path / THROUGHPUT, rows)
    table = throughput_report.write_report(tmp_path)
    assert table == (tmp_path / "throughput.md").read_text()
    found = [line for line in table.splitlines() if line and not line.startswith(("2026-", "| length", "|---"))]
    assert found == [
        "## GPU: model=350m",
        "| 8k | full | 32k | yes | no | 75.0% | 100 | 1.00x | 50.0% | 25.0% | 2.9 GiB | 25.0% |",
        "| 8k | full | 32k | yes | yes | 75.0% | 80 | 0.80x | 50.0% |  | 2.9 GiB | 1.0% |",
        "| 8k | full | 32k | no | no | 75.0% | 70 | 0.70x | 50.0% | 25.0% | 2.9 GiB | 1.0% |",
        "| 8k | full | 64k | yes | no | error a / b | | | | | | |",
        "| 16k | full | 32k | yes | no | 0.0% | 60 | 1.00x | 50.0% | 25.0% | 2.9 GiB | 1.0% |",
        "| 16k | dash, iid | 32k | yes | no | 75.0% | 90 | 1.50x |  | 25.0% | 2.9 GiB | 1.0% |",
        "| 16k | dash, iid | 64k | yes | no | 75.0% | 70 | 1.17x | 50.0% | 25.0% | 2.9 GiB | 1.0% |",
        "| 16k | dash, iid 90% | 32k | yes | no | 75.0% | 40 | 0.67x | 50.0% | 25.0% | 2.9 GiB | 1.0% |",
        "| 16k | nsa, iid | 32k | yes | no | out of memory | | | | | | |",
        "| 32k | dash, clustered | 32k | yes | no | out of time raise time_budget | | | | | | |",
        "| 32k | dash, shared | 32k | yes | no | 75.0% | 30 |  | 50.0% | 25.0% | 2.9 GiB | 1.0% |",
        "The loader alone, packed documents in rows of 8k, one thread: 2,050 tokens/s, 20 times the fastest model.",
        "## other GPU: model=350m",
        "| 8k | dash | 32k | yes | no | 75.0% | 10 |  | 50.0% | 25.0% | 2.9 GiB | 1.0% |",
        "## GPU: model=60m x=1",
        "| 8k | full | 32k | yes | no | 75.0% | 7 | 1.00x | 50.0% | 25.0% | 2.9 GiB | 1.0% |",
        "## third GPU: model=350m",
    ]


def points_of(figure):
    """Points of each line, by the panel's axis and the line's name."""
    return {
        axis.get_ylabel() or axis.get_title(): {
            line.get_label(): [tuple(point) for point in line.get_xydata().tolist()] for line in axis.get_lines()
        }
        for axis in figure.axes
    }


@pytest.mark.parametrize(
    ("other", "full", "dash"),
    [
        ({}, "full", "dash, iid"),
        ({"device": "second"}, "full, GPU", "dash, iid, second"),
        ({"train": ["model=60m", "x=1"]}, "full, model=350m", "dash, iid, model=60m, x=1"),
        ({"mfu_causal": None}, "full", "dash, iid"),  # its peak is not known
    ],
)
def test_the_figure_shows_the_fastest_setting_of_each_line(tmp_path, monkeypatch, other, full, dash):
    figures = []
    monkeypatch.setattr(throughput_report, "save", lambda figure, path: figures.append((figure, path)))
    rows = [
        make_row("full", 16384, 60.0, mfu_causal=None, mfu_sparse=None),
        make_row("full", 8192, 80.0, compile=False, mfu_sparse=None),
        make_row("full", 8192, 100.0, mfu_sparse=None),
        make_row("dash", 8192, 90.0, pattern="iid", mfu_sparse=None, **other),
        make_row("loader", 8192, 2000.0, micro_batch_tokens=None),
    ]
    throughput_report.draw(rows, tmp_path / "throughput")
    ((figure, path),) = figures
    assert path == tmp_path / "throughput"
    assert points_of(figure) == {
        "tokens per second": {full: [(8192, 100), (16384, 60)], dash: [(8192, 90)]},
        "MFU, counted as dense causal": {full: [(8192, 0.5)]}
        | ({} if "mfu_causal" in other else {dash: [(8192, 0.5)]}),
    }
    assert figure.get_suptitle() == ("" if "device" in other else "GPU")
    rate, share = figure.axes
    assert rate.get_xscale() == "log"
    assert [axis.yaxis.get_major_formatter()(value) for axis, value in ((rate, 5e4), (share, 0.5))] == ["50k", "50%"]


@pytest.mark.parametrize("rows", [[], [make_row("loader", 8192, 2000.0, micro_batch_tokens=None)]])
def test_no_rows_no_report(tmp_path, rows):
    append_rows(tmp_path / THROUGHPUT, rows)
    with pytest.raises(ValueError, match=r"no measurements in .*python -m experiments.throughput"):
        throughput_report.write_report(tmp_path)


@pytest.mark.parametrize("command", ["experiments.throughput", "experiments.throughput.scaling"])
def test_a_command_line_refuses_what_cannot_be_trained(command, tmp_path):
    """In a process of its own, which knows only the schemas that the command registers."""
    overrides = ["backends=[full]", "train=['model=debug','optim.lr=-1']", f"output_dir={tmp_path / 'out'}"]
    done = forked.run("-m", command, *overrides)
    assert done.returncode != 0
    assert "optim.lr must be a positive finite number" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_home_directory_is_written_to(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    written = []
    monkeypatch.setattr(Benchmark, "rows", lambda _: iter(()))
    monkeypatch.setattr(throughput_command, "write_report", lambda path: written.append(str(path)))
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        throughput_command.main.__wrapped__(compose("throughput", ["output_dir='~/out'"]))
    assert written == [str(tmp_path / "out")]
    assert (tmp_path / "out").is_dir()
