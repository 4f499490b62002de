"""All figures and tables, from rows made by hand and from the committed ones."""

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from data.task_sets import SUITES
from experiments.figures import curves, frontier, paired, routers, scores
from experiments.figures import page as page_module
from experiments.figures.__main__ import FIGURES, main, write_figures
from experiments.figures.page import WIDEST
from experiments.figures.paired import make_paired, make_paired_scores
from experiments.figures.published import RULER_16K
from experiments.figures.rows import BARS, averaged, load_study
from experiments.figures.setpoints import with_setpoints
from experiments.files import REPLACED, read_rows
from experiments.plots import METHODS, grid, save
from experiments.speed.rows import CUDNN, DECODE, DENSE, FLASH_3, FULL, PASSES, SETUP, WHOLE
from experiments.sweep import collect
from experiments.throughput import scaling_report as parallel_report
from experiments.throughput.report import CASE
from tests.shown import assert_as_expected, shown

RESULTS = Path(__file__).parents[3] / "results"
COMMON = {
    "backend": "dash",
    "label": "dash",
    "data": "text",
    "length": 512,
    "rows": 8,
    "seed": 0,
    "step": 100,
    "tokens": 1_000_000,
    "parameters": 2_500_000,
    "knob_name": "router_scale",
    "knob": 4.0,
    "trained_knob": 4.0,
    "config_hash": "x",
    "causal_sparsity": 0.6,
    "active_tokens": 100.0,
    "routing_reads": 10.0,
    "bytes_read": 5000.0,
    "position": None,
    "variant": None,
}


PARALLEL = dict.fromkeys((*parallel_report.WORK, *parallel_report.WAY), 1)
PARALLEL |= {"device": "GPU", "train": [], "git_sha": None}
PARALLEL |= {"backend": "dash", "length": 8192, "status": "ok", "step_time": 1.0, "peak_memory_mib": 1.0}
ALONE = PARALLEL | {"ranks": 1, "tokens_per_s": 100.0, "losses": [5.0, 4.0]}
PAIR = PARALLEL | {"ranks": 2, "tokens_per_s": 190.0, "losses": [5.0, 4.5]}


def row(task, metric, score, **changes):
    label = changes.get("label", "dash")
    return COMMON | {"task": task, "metric": metric, "score": score, "config_hash": label} | changes


def rows():
    for seed, shift in ((0, 0.0), (1, 0.1)):
        for knob, score in ((4.0, 0.8), (2.0, 0.9), (8.0, 0.3)):
            sparsity = 0.2 * knob**0.5
            yield row("recall", "accuracy", score - shift, seed=seed, knob=knob, causal_sparsity=sparsity)
    yield row("recall", "accuracy", 0.99, label="full", knob=None, trained_knob=None, causal_sparsity=0.0)
    yield row("sparsity", "causal_sparsity", 0.6, per_head=[[0.5, 0.7], [0.6, 0.6]])
    yield row("sparsity", "causal_sparsity", 0.4, per_head=[[0.3, 0.5], [0.4, 0.4]], seed=1)
    for first, last, median in ((0, 0, 1), (1, 1, 2), (2, 3, 3), (4, 7, 4)):
        yield row("sparsity", "active_tokens", median, position=[first, last], p10=1, p90=last + 1)
    for length in (512, 1024):
        for metric in ("recall", "precision", "relevant_mass", "softmax_relevant_mass", "entropy", "support"):
            yield row("routing", metric, 512 / length, length=length, probe="mqar", per_head=[[0.25, None], [0.75, 1]])
        for relevant in (1, 2, 4):
            changes = {"length": length, "probe": f"niah_values_{relevant}", "p10": 1, "p90": 9}
            yield row("routing", "active_blocks", relevant + 1, relevant=relevant, **changes)
        for depth in (0.0, 0.5, 1.0):
            yield row("niah", "match", depth, length=length, depth=depth)
        yield row("loss", "nats", 3 - length / 4096, length=length)
    for label, nats in (("infllmv2", [3.0, 4.0]), ("dash", [3.5, 4.0])):
        asked = {"target_sparsity": 0.5, "sparsity_count": "causal", "length": 256}
        yield row("loss", "nats", 3.5, label=label, by_row={"corpus": "ab", "nats": nats, "targets": [1, 1]}, **asked)
    for task in SUITES["ruler"]:
        score, sparsity = (0.5, 0.5) if task.startswith("niah") else (0.25, 0.75)
        yield row(task, "match", score, length=16384, causal_sparsity=sparsity)
        if task not in ("qa_1", "qa_2"):
            differs = "haystack: mine" if task == "niah_single_2" else None
            yield row(task, "match", 1.0, length=16384, label="nsa", differs=differs)
    for label, score in (("sigma:1", 0.5), ("sigma:1e6", 0.4), ("prior:raw", 0.6)):
        for knob in (2.0, 4.0):
            yield row("recall", "accuracy", score, label=label, knob=knob, causal_sparsity=0.2 * knob)


def training_rows(run):
    for step in (1, 2, 4):
        yield {"run": run, "step": step, "split": "train", "tokens": 100 * step, "loss": 5 / step, "grad_norm": 1.0} | {
            "step_time": 0.5,
            "causal_sparsity": 0.1,
        }
    yield {"run": run, "step": 4, "split": "validation", "tokens": 400, "loss": 1.5}


TWO_STEPS = list(training_rows("x"))[:2]


def speed_rows():
    """Dense attention, of which one kernel runs out of memory, and a method that gets no sparser than 60 % at first."""
    common = {"run": "a", "device": "GPU", "heads": 8, "kv_heads": 2, "head_dim": 64, "chunk_size": 64, "dtype": "bf16"}
    common |= {"seed": 0, "date": "2026-11-28T01:00:00+0000", "git_sha": "0" * 40, "dirty": False, "versions": {}}
    for name, factor in zip(PASSES, (1.0, 3.0), strict=True):
        for length, dense, sparse in ((1024, 1.0, 2.0), (8192, 64.0, 16.0)):
            row = common | {"length": length, "pass": name, "status": "ok", "detail": "", "pattern": None}
            row |= {"sparsity": None, "causal_sparsity": None, "stage": DENSE}
            yield row | {"method": FLASH_3, "ms": dense * factor, "extra_mib": None}
            full = {"status": "out of memory", "ms": None, "extra_mib": None} if length > 1024 else {}
            yield row | {"method": CUDNN, "ms": 1.5 * factor, "extra_mib": 1.0} | full
            reached = {"sparsity": 0.75, "causal_sparsity": 0.6 if length == 1024 else 0.75}
            ours = {"stage": WHOLE, "method": "dash", "pattern": "clustered", "extra_mib": length / 100} | reached
            yield row | ours | {"ms": sparse * factor}


@pytest.fixture
def study(tmp_path):
    root = tmp_path / "study"
    root.mkdir()
    numerics = [
        {"backend": "dash", "tensor": tensor, "dtype": dtype, "impl": "reference", "device": "cpu", "length": 99}
        | {"error": error}
        for tensor in ("out", "dq")
        for dtype, error in (("fp32", 1e-7), ("bf16", 2e-3))
    ]
    throughput = [
        dict.fromkeys(CASE)
        | {"backend": backend, "length": length, "device": "GPU", "train": [], "status": "ok"}
        | {"tokens_per_s": rate, "mfu_causal": rate / 2e5, "mfu_sparse": rate / 4e5, "causal_sparsity": sparsity}
        for backend, sparsity, rates in (("full", 0.0, (1e5, 5e4)), ("dash", 0.75, (1.2e5, 9e4)))
        for length, rate in zip((8192, 16384), rates, strict=True)
    ]
    for name, content in (
        ("throughput.jsonl", throughput),
        ("parallel.jsonl", [ALONE, PAIR]),
        ("results.jsonl", rows()),
        ("metrics.jsonl", [*training_rows("a"), *training_rows("b")]),
        ("numerics.jsonl", numerics),
        ("speed.jsonl", speed_rows()),
    ):
        (root / name).write_text("".join(json.dumps(line) + "\n" for line in content))
    return load_study(root)


def rounded(cells):
    """A line of a CSV, with few digits."""
    return ",".join(re.sub(r"\d+\.\d{5,}(e-?\d+)?", lambda number: f"{float(number[0]):.5g}", cell) for cell in cells)


def table(figure, study):
    (made,) = (f.make(study) for f in FIGURES if f.number == figure)
    return made.table


def with_more(study):
    """Several methods, seeds, corpora and lengths in a panel, every kind of value, and what was measured again; without
    most of RULER's tasks, each of which would take a panel."""
    asked = {"trained_knob": None, "knob": 1.0, "target_sparsity": 0.5, "sparsity_count": "causal"}
    more = [
        *(row("recall", "accuracy", 0.7 / k, label="nsa", knob=k, trained_knob=k, seed=s,
              causal_sparsity=0.3 * k + s / 50) for k in (1.0, 2.0) for s in (0, 1)),
        row("recall", "accuracy", 0.45, label="nsa", knob=3.0, trained_knob=3.0, causal_sparsity=0.9),
        row("recall", "accuracy", 0.2, label="full, untrained", knob=None, trained_knob=None, causal_sparsity=0.0),
        row("recall", "accuracy", 0.1, label="moba, untrained", causal_sparsity=0.5, **asked),
        *(row("decode", "ms", 10 / k, knob=k, device=f"GPU {k:g}", date=f"2026-11-2{k:g}T01") for k in (2.0, 4.0)),
        *(row("sparsity", "causal_sparsity", 0.6, data="code", label=label, length=64,
              per_head=[[heads, 0.75], [0.5, 1.0]]) for label, heads in (("dash", 0.25), ("nsa", 0.125))),
        row("sparsity", "causal_sparsity", 0.5, label="infllmv2", per_head=[[0.5, 0.5], [0.5002, None]]),
        *(row("sparsity", "active_tokens", 2, position=[first, first], p10=1.5, p90=3 + first, label="infllmv2")
          for first in (2, 5)),
        row("sparsity", "active_tokens", 3, position=[4, 7], p10=2, p90=6, seed=1),
        row("sparsity", "active_tokens", 16, position=[8, 31], p10=4, p90=24, data="code", length=32),
        *(row("routing", "active_blocks", 5 + s, probe="mqar", relevant=3, seed=s) for s in (0, 1)),
        row("routing", "active_blocks", 9, probe="niah_single_2", relevant=2),
        row("routing", "recall", 0.75, probe="mqar", per_head=[[1.0], [0.5]], seed=1),
        row("routing", "recall", 0.5, probe="niah", label="nsa", per_head=[[0.5]], length=1024, stderr=0.01, samples=9),
        row("routing", "mass_recall", 0.5, probe="mqar", label="nsa", per_head=[[0.25], [0.75]]),
        *(row("routing", "entropy", s + 0.125, probe="mqar", label="infllmv2", length=n, seed=s)
          for n in (512, 1024) for s in (0, 1)),
        *(row("routing", "entropy", n / 2048, probe="niah_values_1", length=n) for n in (512, 1024)),
        row("niah_single_1", "match", 0.75, length=16384, seed=1),
        row("niah_single_1", "match", 0.25, label="nsa"),
        row("niah", "match", 0.25, length=1024, depth=0.5, seed=1),
        row("niah", "match", 0.875, depth=1.0, label="nsa"),
        row("niah", "match", 0.125, length=1024, depth=0.5, label="nsa"),
        *(row("loss", "nats", 3.5 - n / 2048 + s / 4, length=n, label="nsa", variant="documents", seed=s, samples=9,
              stderr=0.1) for n in (512, 1024) for s in (0, 1)),
        row("loss", "nats", 3.25, label="nsa", data="code", length=256, seed=3, target_sparsity=0.5,
            sparsity_count="causal", by_row={"corpus": "c", "nats": [6.5], "targets": [2]}),
        *(row("niah_single_1", "match", sum(scores) / 4, label=label, length=256, by_sample=scores, set="s",
              causal_sparsity=0.5, target_sparsity=0.5, sparsity_count="causal")
          for label, scores in (("infllmv2", [0.0, 1.0, 0.5, 1.0]), ("dash", [1.0, 1.0, 0.5, 1.0]))),
    ]  # fmt: skip
    kept = [r for r in study.evaluations if r["task"] not in SUITES["ruler"][2:]]
    found = [r | {"bytes_read": 10_000 - 9000 * r["causal_sparsity"]} for r in [*kept, *map(with_setpoints, more)]]
    router = [
        r | ({"grad_norm_router": 0.01 * r["step"]} if r["split"] == "train" else {"step_time": 9.0, "loss": 1.75})
        for r in training_rows("recall-nsa-knob2-seed1")
    ]
    dense = {"grad_norm_router": 0.0, "causal_sparsity": 0.0}
    still = [r | dense for r in training_rows("still") if r["split"] == "train"]
    numerics = [study.numerics[0] | {"backend": "nsa", "device": "GPU", "impl": "auto", "error": 1e-4}]
    parallel = [row | {"length": 4096, "git_sha": sha} for row, sha in ((ALONE, "a" * 40), (PAIR, "b" * 40))]
    parallel[1] |= {"tokens_per_s": 210.0}
    again = {"date": "2026-11-28T02:00:00+0000", "seed": 1}, {"date": "2026-11-30T01:00:00+0000"}
    speed = [row | changes for row, changes in zip(study.speed, again, strict=False)]
    return replace(
        study,
        evaluations=found,
        training=study.training | {"recall-nsa-knob2-seed1": router, "still": still},
        trained={"a": ["attention=full"], "b": ["attention=dash"]},
        speed=[study.speed[0] | {"status": "error", "detail": "mended since"}, *speed, *study.speed[2:]],
        numerics=[*study.numerics, *numerics],
        throughput=[study.throughput[0] | {"tokens_per_s": 1.0}, *study.throughput],
        parallel=[*study.parallel, *parallel],
    )


@pytest.fixture
def marks_stand_whole(monkeypatch):
    """Of every figure that is saved no mark is cut by the axes."""
    save_as = Figure.savefig

    def checked(figure, *args, **options):
        save_as(figure, *args, **options)
        for ax in figure.axes:
            box = ax.get_window_extent()
            for line in ax.lines:
                if line.get_marker() not in ("None", "", None) and line.get_transform().contains_branch(ax.transData):
                    radius = line.get_markersize() * figure.dpi / 72 / 2
                    points = line.get_xydata()
                    if ax.get_yscale() == "log":  # which has no place for 0
                        points = points[points[:, 1] > 0]
                    ys = ax.transData.transform(points)[:, 1]
                    ys = ys[np.isfinite(ys)]
                    whole = (box.y0 + radius / 2 <= ys) & (ys <= box.y1 - radius / 2)
                    assert whole.all(), f"{ax.get_title() or ax.get_ylabel()}: {line.get_label()}"

    monkeypatch.setattr(Figure, "savefig", checked)


def test_every_figure_becomes_files_and_a_page(study, tmp_path, marks_stand_whole, monkeypatch):
    """And shows what it should: ``expected`` was checked by hand against the rows above."""
    drawn, save_as = [], Figure.savefig

    def saved(figure, *args, **options):
        save_as(figure, *args, **options)
        if options["format"] == "png":
            drawn.append(shown(figure))

    monkeypatch.setattr(Figure, "savefig", saved)
    study = with_more(study)
    output = tmp_path / "out"
    assert write_figures(output, [study]) == []
    page = (output / "index.html").read_text()
    text = []
    for figure in FIGURES:
        stem = f"{figure.stem}-study"
        assert len(list(csv.DictReader((output / f"{stem}.csv").open()))) == len(table(figure.number, study)) > 0
        assert f'<h2 id="f{figure.number}">' in page
        made = figure.make(study)
        text += [f"{figure.number}. {figure.title}, of {figure.needs}", *made.notes, f"Rows: {made.origin}."]
        text += [*(drawn.pop(0) if made.draw else []), *map(rounded, csv.reader((output / f"{stem}.csv").open())), ""]
        if figure.number not in (11, 14):
            assert (output / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
            assert (output / f"{stem}.pdf").read_bytes().startswith(b"%PDF")
    assert page.count("<img ") >= 12
    assert len(page) < 1_500_000
    sizes = []
    for path in sorted(output.glob("*.png")):
        with Image.open(path) as picture:
            scale = min(1.0, WIDEST / picture.width)
            sizes.append((str(round(scale * picture.width)), str(round(scale * picture.height))))
    assert re.findall(r'<img [^>]*width="(\d+)" height="(\d+)"', page) == sizes
    assert set(re.findall(r'(?:src|href)="([^#d][^"]*)"', page)) == set()  # all it shows is in it
    assert_as_expected("\n".join(text), Path(__file__).parent / "expected" / "figures.txt", tmp_path)


def test_the_committed_rows_draw_and_the_rest_is_listed_as_missing(tmp_path, capsys, marks_stand_whole):
    main([str(tmp_path), str(RESULTS / "pareto_cpu"), str(RESULTS / "speed_h200")])
    out = capsys.readouterr().out
    assert "missing: 11. RULER (rows come from evaluate.py tasks=[ruler])" in out
    page = (tmp_path / "index.html").read_text()
    assert "Missing: no rows. They come from evaluate.py tasks=[ruler]" in page
    assert (tmp_path / "fig01_frontier-pareto_cpu.png").exists()
    assert (tmp_path / "fig08_speed-speed_h200.png").exists()
    assert not list(tmp_path.glob("fig11*"))


@pytest.mark.slow
def test_the_page_of_all_committed_rows_is_below_four_megabytes(tmp_path, marks_stand_whole):
    main([str(tmp_path), *sorted({str(path.parent) for path in RESULTS.glob("*/*.jsonl")})])
    assert (tmp_path / "index.html").stat().st_size < 4_000_000


def test_the_pages_pictures_keep_the_numbers_that_colours_are_and_what_is_grey(tmp_path):
    figure, (ax,) = grid(1)
    ramp = [[i / 99 for i in range(100)]] * 20
    for bottom, colours in enumerate(("viridis", "gray")):
        ax.imshow(ramp, extent=(0, 1, bottom, bottom + 1), aspect="auto", cmap=colours)
    ax.set_ylim(0, 2)
    save(figure, tmp_path / "map")
    with Image.open(tmp_path / "map.png") as whole:
        exact = whole.convert("RGB")
    data, size = page_module._small(tmp_path / "map.png")
    assert size == exact.size
    with Image.open(io.BytesIO(data)) as small:
        shown = np.asarray(small.convert("RGB"), dtype=int)
    assert np.abs(shown - np.asarray(exact)).max() <= 11
    assert np.ptp(shown[np.ptp(np.asarray(exact), axis=-1) == 0], axis=-1).max() == 0
    assert len(data) < (tmp_path / "map.png").stat().st_size


def test_the_page_lists_figures_and_escapes_what_rows_say():
    figures = [page_module.Figure(3, "a", "A & B", "x <y>", None), page_module.Figure(7, "b", "C", "z", None)]
    rows = [{"name": "<b>", "score": 0.123456, "score low": 0.1, "score high": 0.23456, "n&": 3, "gone": None}]
    rows += [{"name": "missing", "score": 2.0, "score low": None, "score high": 3.0, "extra": True}]
    drawn = page_module.Drawn(rows * 13, None, ["1 < 2"], [{"device": "G&G", "seed": 2, "date": "2026-01-02T03"}])
    beside = page_module.Drawn(rows[:1], None)
    page = page_module.to_html(
        figures, {7: [page_module.Section("a&b", drawn, None), page_module.Section("c", beside, None)]}
    )
    body = page[page.index("<body>") :]
    head = "<tr><th>name</th><th>score</th><th>n&amp;</th><th>gone</th><th>extra</th></tr>"
    first = "<tr><td>&lt;b&gt;</td><td>0.1235 [0.1, 0.235]</td><td>3</td><td></td><td></td></tr>"
    second = '<tr><td class="missing">missing</td><td>2</td><td></td><td></td><td>True</td></tr>'
    assert body == (
        "<body><h1>Figures and tables</h1>"
        '<nav><a href="#f3" class=missing>3</a> <a href="#f7">7</a></nav>'
        '<h2 id="f3">3. A &amp; B</h2><p class="missing">Missing: no rows. They come from x &lt;y&gt;.</p>'
        '<h2 id="f7">7. C</h2><h3>a&amp;b</h3><p class="note">1 &lt; 2</p>'
        '<p class="note">Rows: G&amp;G; seed 2; 2026-01-02.</p>'
        "<details open><summary>26 rows (the first 25; the CSV has all)</summary>"
        f'<div class="scroll"><table>{head}{(first + second) * 12}{first}</table></div></details>'
        "<h3>c</h3><details open><summary>1 rows</summary>"
        f'<div class="scroll"><table>{head.replace("<th>extra</th>", "")}'
        f"{first.replace('<td></td></tr>', '</tr>')}</table></div></details></body></html>\n"
    )
    assert page_module._table(rows, is_open=False).startswith("<details><summary>2 rows</summary>")


def test_what_was_not_measured_is_told_beside_the_figure(study):
    failed = next(r for r in study.speed if r["stage"] == WHOLE)
    failed |= {"status": "failed", "detail": "no memory", "ms": None, "method": "fla NSA", "length": 999_424}
    made = curves.make_speed(replace(study, speed=[*study.speed, failed]))
    assert any(
        note.startswith("Not measured: fla NSA, whole, ") and "976k: failed: no memory" in note for note in made.notes
    )


def test_seeds_are_averaged_and_kept_apart(study):
    point = next(r for r in table(1, study) if r["label"] == "dash" and r["knob"] == 2.0 and r["task"] == "recall")
    assert (point["score"], point["seed 0"], point["seed 1"]) == (pytest.approx(0.85), 0.9, pytest.approx(0.8))
    heat = {(r["layer"], r["kv_head"]): r["causal_sparsity"] for r in table(3, study)}
    assert heat == {(0, 0): pytest.approx(0.4), (0, 1): pytest.approx(0.6), (1, 0): 0.5, (1, 1): 0.5}
    pair = [
        row("sparsity", "causal_sparsity", 0.5, per_head=per_head, seed=seed)
        for seed, per_head in enumerate(([[0.5, None], [None, 1.0]], [[0.25, None], [0.5, 0.0]]))
    ]
    (found,) = averaged(pair, "line", value="per_head")
    assert found["per_head"] == [[0.375, None], [0.5, 0.5]]


def test_a_row_that_lacks_a_column_is_named_or_does_without(study, tmp_path):
    told = {}
    for path in sorted((tmp_path / "study").iterdir()):
        whole = path.read_text()
        lines = list(enumerate(whole.splitlines(), start=1))
        for number, line in {frozenset(json.loads(line)): (number, line) for number, line in lines}.values():
            row = json.loads(line)
            for column in row:
                path.write_text(whole.replace(line, json.dumps({key: row[key] for key in row if key != column})))
                try:
                    changed = load_study(tmp_path / "study")
                    for figure in FIGURES:
                        figure.make(changed)
                except ValueError as error:
                    told[path.name, column, number] = str(error)
        path.write_text(whole)
    for (name, column, number), said in told.items():
        assert re.fullmatch(rf".*/{name}, line {number} .*does not say {column}.*remove.*", said)
    named = {(name, column) for name, column, _ in told}
    assert {("metrics.jsonl", "tokens"), ("metrics.jsonl", "step_time"), ("results.jsonl", "seed")} <= named
    assert {("speed.jsonl", "ms"), ("parallel.jsonl", "losses"), ("throughput.jsonl", "device")} <= named


def test_what_is_said_of_a_router():
    """Of each metric; some have no row above."""
    assert routers.DISPERSION == {
        "relevant_mass": "router's mass on the relevant blocks",
        "softmax_relevant_mass": "mass, softmax over the same scores",
        "dense_relevant_mass": "mass, dense attention of the same model",
        "entropy": "router's entropy, nats",
        "softmax_entropy": "entropy, softmax over the same scores",
        "support": "blocks above zero",
    }
    assert routers.RECALLS == {
        "recall": "share of the answer's blocks selected",
        "topk_recall": "the same for as many blocks by softmax and top-k",
        "precision": "share of the selected blocks that hold the answer",
        "mass_recall": "share of dense attention's mass read",
        "mass_precision": "share of the selected among dense attention's heaviest",
    }


def test_router_tables(study):
    recall = next(r for r in table(6, study) if r["metric"] == "recall" and r["length"] == 512)
    assert (recall["score"], recall["best_head"], recall["causal_sparsity"]) == (1.0, 1, 0.6)
    assert [(r["relevant"], r["score"]) for r in table(5, study) if r["length"] == 512] == [(1, 2), (2, 3), (4, 5)]
    assert {(r["metric"], r["length"], r["score"]) for r in table(7, study)} >= {
        ("entropy", 512, 1),
        ("entropy", 1024, 0.5),
    }


def test_router_recall_is_drawn_at_the_length_that_has_most_settings(study, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(routers, "save", lambda figure, path: drawn.append(figure))
    turned = [
        row("routing", "recall", 0.5, length=512, probe="mqar", knob=knob, per_head=[[0.5]], causal_sparsity=knob / 10)
        for knob in (2.0, 8.0)
    ]
    turned.append(row("routing", "recall", 0.25, label="full", knob=None, length=512, probe="mqar", per_head=[[0.25]]))
    turned += [
        row("routing", "recall", 0.125, label="nsa", knob=knob, trained_knob=knob, probe="mqar", per_head=[[0.125]])
        for knob in (1.0, 2.0)
    ]
    (figure,) = (f for f in FIGURES if f.number == 6)
    figure.make(replace(study, evaluations=[*study.evaluations, *turned])).draw(tmp_path / "figure")
    ax = drawn[0].axes[0]
    assert "mqar, 512 tokens" in ax.get_title()
    assert ax.lines[0].get_xdata().tolist() == [0.2, 0.6, 0.8]
    drawn[0].draw_without_rendering()
    assert_as_expected("\n".join(shown(drawn[0])), Path(__file__).parent / "expected" / "recall.txt", tmp_path)


def test_what_was_evaluated_as_trained_is_filled(study, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(scores, "save", lambda figure, path: drawn.append(figure))
    (figure,) = (f for f in FIGURES if f.number == 2)
    figure.make(study).draw(tmp_path / "figure")
    lines = [line for line in drawn[0].axes[0].lines if len(line.get_xdata()) == 3]  # knobs 2, 4 and 8, trained at 4
    assert [(line.get_markerfacecolor() == "white", line.get_markevery()) for line in lines] == [
        (True, None),
        (False, [False, True, False]),
    ]


def test_the_page_says_where_rows_were_measured_and_when(study, tmp_path):
    first, *others = (r for r in study.evaluations if r["task"] == "sparsity")
    first |= {"device": "H100", "date": "2026-11-28T01:00:00+0000"}
    write_figures(tmp_path, [replace(study, evaluations=[first, *others], speed=[], throughput=[])])
    page = (tmp_path / "index.html").read_text()
    assert page.count("Rows: H100; seed 0, 1; 2026-11-28.") == 1  # the heat map's: active tokens are of others
    assert page.count("Rows: seed 0.") == 1


def test_a_ruler_table_says_what_is_missing_and_what_departs(study):
    by_model = {r["model"]: r for r in table(11, study)}
    dash, nsa = by_model["dash (router_scale 4)"], by_model["nsa (router_scale 4)"]
    assert (dash["SG 1-3"], dash["VT, CWE, FWE"], dash["QA 1-2"]) == (0.5, 0.25, 0.25)
    assert dash["average"] == pytest.approx((8 * 0.5 + 5 * 0.25) / 13)
    assert (nsa["SG 1-3"], nsa["qa_1"], nsa["QA 1-2"], nsa["average"]) == (1.0, *["missing"] * 3)
    (made,) = (f.make(study) for f in FIGURES if f.number == 11)
    assert made.notes == ["niah_single_2 departs from RULER: haystack: mine."]
    assert dash["causal_sparsity"] == pytest.approx((8 * 0.5 + 5 * 0.75) / 13)
    # Wilson's interval of 4 of 8, and of their mean by the root of the sum of squares: 24 samples.
    assert [dash[f"niah_single_1 {bound}"] for bound in ("low", "high")] == pytest.approx([0.2152, 0.7848], abs=1e-4)
    assert [dash[f"SG 1-3 {bound}"] for bound in ("low", "high")] == pytest.approx([0.3143, 0.6857], abs=1e-4)
    page = page_module._table(made.table, is_open=True)
    assert "<td>0.5 [0.314, 0.686]</td>" in page
    assert "<th>SG 1-3</th>" in page
    assert "SG 1-3 low" not in page


def test_the_papers_numbers_stand_beside_ours(study):
    ruler = [r for r in table(14, study) if r["what"] == "RULER, %"]
    paper = {r["model"]: r["average"] for r in ruler if r["source"].startswith("paper")}
    assert paper == {model: scores[-1] for model, scores in RULER_16K.items()}
    (ours,) = (r for r in ruler if r["model"] == "dash (router_scale 4)")
    assert ours["SG 1-3"] == 50
    assert ours["source"] == "ours, 16384 tokens, 60% causally sparse"
    chat = [r | {"variant": "template=chat"} for r in study.evaluations if r["task"] in SUITES["ruler"]]
    source = "ours, 16384 tokens, template=chat, 60% causally sparse"
    assert source in {r["source"] for r in table(14, replace(study, evaluations=chat))}
    (here,) = (r for r in table(11, study) if r["model"] == "dash (router_scale 4)")
    for bound in ("low", "high"):
        assert ours[f"SG 1-3 {bound}"] == pytest.approx(100 * here[f"SG 1-3 {bound}"])
    (decoding,) = (r for r in table(14, study) if r["source"] == "ours")
    assert decoding["model"] == "missing"
    (made,) = (f.make(study) for f in FIGURES if f.number == 14)
    assert any("2.5M parameters and 1.0M training tokens against 8B" in note for note in made.notes)


def test_our_decoding_stands_beside_the_papers(study):
    common = {key: study.speed[0][key] for key in ("run", "device", *SETUP)}
    common |= {"length": 98304, "pass": DECODE, "status": "ok", "pattern": None, "sparsity": None, "stage": DENSE}
    sparse = {"method": "dash", "stage": WHOLE, "pattern": "clustered"}
    rows = [common | {"method": FLASH_3, "ms": 0.06}, common | sparse | {"sparsity": 0.75, "ms": 0.03}]
    rows += [common | sparse | {"sparsity": 0.875, "ms": 0.02}, common | sparse | {"length": 32768, "ms": 0.01}]
    rows += [row | {"batch": 16, "ms": 1.0} for row in rows[:2]]
    rows += [row | {"length": 1024} for row in (rows[0] | {"method": FULL}, rows[1])]  # against our own
    what = "decode speed-up over FlashAttention-3"
    ours = [r for r in table(14, replace(study, speed=rows)) if r["what"] == what and r["source"].startswith("ours")]
    assert ours == [
        {"what": what, "model": "dash"}
        | {
            "source": "ours, GPU: 8 heads, 2 KV heads of 64, chunks of 64, bf16, batch 1, causal, 98304 tokens",
            "75.00% sparse": 2.0,
            "87.50% sparse": 3.0,
        }
    ]
    others = [row | {"heads": 32, "ms": row["ms"] * (1 + (row["method"] == "dash"))} for row in rows[:2]]
    both = [r for r in table(14, replace(study, speed=[*rows, *others])) if r["source"].startswith("ours")]
    assert [r["75.00% sparse"] for r in both if "75.00% sparse" in r] == [2.0, 1.0]
    (made,) = (f.make(replace(study, speed=rows)) for f in FIGURES if f.number == 8)
    assert made.notes == []
    assert {row["ratio"] for row in made.table if row["length"] > 1024} == {1.0, 2.0, 3.0, None}


def test_several_devices_are_drawn_against_one(study, tmp_path, monkeypatch):
    """Of several rows about the same thing the newest, and none that failed or has nothing beside it."""
    drawn = []
    monkeypatch.setattr(parallel_report, "save", lambda figure, path: drawn.append(figure))
    failed = {"status": "out of memory", "tokens_per_s": None, "losses": None}
    rows = [ALONE | {"tokens_per_s": 1.0}, ALONE, PAIR, PAIR | {"tokens_per_s": 180.0}, PAIR | {"stage": 2} | failed]
    rows += [PAIR | {"backend": "nsa"}, PAIR | {"ranks": 4, "tokens_per_s": 300.0}]
    (figure,) = (f for f in FIGURES if f.number == 16)
    made = figure.make(replace(study, parallel=rows))
    assert [(r["backend"], r["ranks"], r["stage"], r["efficiency"], r["loss_difference"]) for r in made.table] == [
        ("dash", 1, 1, None, None),
        ("dash", 2, 1, 0.9, 0.5),
        ("dash", 2, 2, None, None),
        ("nsa", 2, 1, None, None),
        ("dash", 4, 1, 0.75, 0.5),
    ]
    made.draw(tmp_path / "figure")
    panels = drawn[0].axes
    assert [ax.get_title() for ax in panels] == ["2 x GPU", "4 x GPU"]
    shown = [{line.get_label(): list(line.get_ydata()) for line in ax.lines[:-1]} for ax in panels]
    assert shown == [{"dash": [0.9]}, {"dash": [0.75]}]
    assert figure.make(replace(study, parallel=[PAIR])).draw is None
    slow = [row | {"compile": 0} for row in (ALONE, PAIR)]
    figure.make(replace(study, parallel=[*slow, ALONE, PAIR])).draw(tmp_path / "figure")
    modes = [label.get_text().split("\n")[2] for label in drawn[1].axes[0].get_xticklabels()]
    assert modes == ["compiled", "not compiled"]


def test_training_curves_count_time_by_steps(study):
    assert [(r["tokens"], r["seconds"]) for r in table(9, study) if r["run"] == "a" and r["split"] == "train"] == [
        (100, 0.5),
        (200, 1.0),
        (400, 2.0),
    ]
    branch = [row | {"step": row["step"] + 96, "step_time": 2.0} for row in training_rows("a") if row["step"] > 1]
    branch.insert(2, branch[1] | {"step": 103})
    branch = replace(study, training={"branch": branch})  # its first row is of steps 97 and 98
    assert [r["seconds"] for r in table(9, branch) if r["split"] == "train"] == [4.0, 8.0, 14.0]
    (made,) = (f.make(study) for f in FIGURES if f.number == 9)
    assert "router's gradient norm" in made.notes[0]
    rows = list(training_rows("none"))
    none = [row | {"grad_norm_router": 0.0} if row["split"] == "train" else row for row in rows]
    some = [row | {"grad_norm_router": 0.1 * row["step"]} for row in training_rows("some")]
    (made,) = (f.make(replace(study, training={"none": none, "some": some})) for f in FIGURES if f.number == 9)
    assert made.notes[-1] == "Always 0, which no logarithmic axis has: router's gradient norm of none."


def test_extrapolation_and_ablations(study):
    lengths = [(r["length"], r["score"]) for r in table(10, study) if r.get("task") == "loss"]
    assert lengths == [(512, 2.875), (1024, 2.75)]
    beside = [
        *(row("loss", "nats", 2.0, label="sigma:1", length=length) for length in (512, 1024)),
        row("loss", "nats", 2.0, label="nsa"),
        *(row("niah_values_2", "match", 0.5, length=length) for length in (512, 1024)),
    ]
    for name, other in (("data", "code"), ("task", "y"), ("variant", "v"), ("metric", "acc"), ("label", "moba")):
        alone = row("x", "match", 0.5, label=f"nsa {name}")
        beside += [alone, alone | {"length": 1024, name: other}]
    added = replace(study, evaluations=[*study.evaluations, *beside])
    # Neither an ablation, nor what was measured at one length only, nor probes that differ in what they need.
    assert table(10, added) == table(10, study)
    shown = [(r["factor"], r["value"], r["score"]) for r in table(12, study) if r["knob"] == 2]
    assert sorted(shown) == [
        ("prior", "raw", 0.6),
        ("sigma", "1", 0.5),
        ("sigma", "1e6", 0.4),
        ("sigma", "prior raw", 0.6),
    ]
    (made,) = (f.make(study) for f in FIGURES if f.number == 12)
    assert "chunk_size" in made.notes[0]
    assert "sigma" not in made.notes[0]


def test_what_is_no_mean_of_seeds_is_kept_apart(study, tmp_path, monkeypatch):
    """Text, form of a task and metric; a seed that counts twice is refused."""
    chat = {"variant": "template=chat", "length": 16384}
    asked = [row("niah_single_1", "match", score, data=data, **chat) for data, score in (("text", 1.0), ("code", 0.0))]
    asked += [row("niah_single_1", "match", 0.25, length=16384, trained_knob=8.0, config_hash="8")]
    found = {
        (r["data"], r["variant"], r["trained_knob"]): r["niah_single_1"]
        for r in table(11, replace(study, evaluations=[*study.evaluations, *asked]))
        if r["model"].startswith("dash")
    }
    assert found == {
        ("text", None, 4.0): 0.5,
        ("text", "template=chat", 4.0): 1.0,
        ("code", "template=chat", 4.0): 0.0,
        ("text", None, 8.0): 0.25,
    }
    drawn = []
    monkeypatch.setattr(curves, "save", lambda figure, path: drawn.append(figure))
    needles = [row("niah", "match", score, data=data, depth=0.0) for data, score in (("text", 1.0), ("code", 0.5))]
    scores = [
        row("lm_eval/x", metric, length / 2048, length=length)
        for metric in ("acc", "acc_norm")
        for length in (512, 1024)
    ]
    (figure,) = (f for f in FIGURES if f.number == 10)
    figure.make(replace(study, evaluations=[*needles, *scores])).draw(tmp_path / "figure")
    panels = {ax.get_title(): ax for ax in drawn[0].axes if ax.get_title()}
    maps = {title: ax.images[0].get_array().item() for title, ax in panels.items() if ax.images}
    assert maps == {f"{data}: needle found: dash (router_scale 4)": n for data, n in (("text", 1.0), ("code", 0.5))}
    lines = [(ax.get_ylabel(), ax.lines[0].get_xdata().tolist()) for ax in drawn[0].axes if ax.lines]
    assert lines == [("acc", [512, 1024]), ("acc_norm", [512, 1024])]
    twice = [row("routing", "recall", 0.5, probe="mqar", per_head=[[0.5]], config_hash=name) for name in "ab"]
    ruler = [row("qa_1", "match", 0.5, config_hash=name) for name in "ab"]
    for number, rows in ((6, twice), (11, ruler)):
        with pytest.raises(
            ValueError, match=r"two results of dash on .*, seed 0 \(they differ in config_hash\): give one a label"
        ):
            table(number, replace(study, evaluations=rows))


def test_probes_that_need_as_many_blocks_count_by_how_much_they_counted(study):
    counted = {"probe": "niah_values_2", "counted": 30}, {"probe": "niah_values_1", "counted": 10}
    rows = [
        row("routing", "active_blocks", score, relevant=2, p10=1, p90=9, **own)
        for score, own in zip((2.0, 6.0), counted, strict=True)
    ]
    (found,) = table(5, replace(study, evaluations=rows))
    assert [found[key] for key in ("score", "low", "high", "seeds")] == [3.0, 3.0, 3.0, 1]
    rows.append(rows[0] | {"set": "other samples"})
    with pytest.raises(ValueError, match=r"dash on probes of niah_values_2, .* differ in set\)"):
        table(5, replace(study, evaluations=rows))


def test_a_router_at_one_place_of_its_knob_is_not_said_to_be_as_trained(study):
    for knob, said in ((4.0, "At the knob trained with."), (2.0, "Each at one place of its knob, which is in the")):
        found = [row("routing", "recall", 0.5, probe="mqar", per_head=[[0.5]], knob=k) for k in (4.0, knob)]
        found[0] |= {"label": "nsa"}
        (made,) = (f.make(replace(study, evaluations=found)) for f in FIGURES if f.number == 6)
        assert made.notes[0].startswith(said)


def test_an_option_is_drawn_beside_what_it_differs_from(study, tmp_path, monkeypatch):
    """A line a value, of its points from dense to sparse; the control is dashed, and in every panel beside others.
    What is none of the paper's options is in the table only."""
    drawn = []
    monkeypatch.setattr(scores, "save", lambda figure, path: drawn.append(figure))
    other = row("recall", "accuracy", 0.3, label="nsa-lr:1e-3")
    (figure,) = (f for f in FIGURES if f.number == 12)
    figure.make(replace(study, evaluations=[*study.evaluations, other])).draw(tmp_path / "figure")
    lines = {
        ax.get_title().splitlines()[0]: {
            line.get_label(): (line.get_linestyle(), line.get_xydata().tolist())
            for line in ax.lines
            if not line.get_label().startswith("_")
        }
        for ax in drawn[0].axes
    }
    control = ("--", [[0.4, 0.6], [0.8, 0.6]])
    assert lines == {
        "sigma, seed 0": {
            "sigma 1": ("-", [[0.4, 0.5], [0.8, 0.5]]),
            "sigma 1e6": ("-", [[0.4, 0.4], [0.8, 0.4]]),
            "prior raw": control,
        },
    }
    assert list(lines["sigma, seed 0"]) == ["sigma 1", "sigma 1e6", "prior raw"]
    sizes = [row("recall", "accuracy", 0.5, label=f"chunk_size:{size}") for size in (128, 32)]
    figure.make(replace(study, evaluations=[*study.evaluations, *sizes])).draw(tmp_path / "figure")
    named = drawn[1].axes[0].get_legend_handles_labels()[1]
    assert named == ["chunk_size 32", "chunk_size 128", "prior raw"]


def test_a_control_of_fewer_seeds_stands_beside_arms_of_those(study, tmp_path, monkeypatch):
    arms = [("sigma:1", 0), ("sigma:1", 1), ("sigma:1e6", 0), ("sigma:1e6", 1), ("prior:raw", 1), ("prior:raw", 2)]
    rows = [row("recall", "accuracy", 0.5 + seed / 4, label=label, seed=seed) for label, seed in arms]
    rows.append(row("recall", "accuracy", 0.1, label="sigma:1", seed=1, knob=2.0))
    (made,) = (f.make(replace(study, evaluations=rows)) for f in FIGURES if f.number == 12)
    found = {(r["value"], r["knob"]): (r["score"], r["seeds"]) for r in made.table if r["factor"] == "sigma"}
    assert found == {
        ("1", 2.0): (0.1, 1),
        ("1", 4.0): (0.75, 1),
        ("1e6", 4.0): (0.75, 1),
        ("prior raw", 4.0): (0.75, 1),
    }
    assert made.notes[0] == "sigma: without seed 0, which has not all values."
    drawn = []
    monkeypatch.setattr(scores, "save", lambda figure, path: drawn.append(figure))
    made.draw(tmp_path / "figure")
    assert [ax.get_title().splitlines()[0] for ax in drawn[0].axes] == ["sigma, seed 1"]


def test_a_line_joins_points_of_as_many_seeds(study, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(scores, "save", lambda figure, path: drawn.append(figure))
    whole = [(knob, seed) for knob in (2.0, 4.0) for seed in (0, 1)]
    rows = [
        row("recall", "accuracy", knob / 10, knob=knob, seed=seed, bytes_read=knob) for knob, seed in [*whole, (8.0, 0)]
    ]
    (figure,) = (f for f in FIGURES if f.number == 2)
    figure.make(replace(study, evaluations=rows)).draw(tmp_path / "figure")
    lines = {line.get_label(): line for line in drawn[0].axes[0].lines}
    assert lines["dash"].get_xdata().tolist() == [2.0, 4.0]
    (alone,) = (line for line in lines.values() if line.get_markersize() == 3)
    assert alone.get_xydata().tolist() == [[8.0, 0.8]]


def test_an_ablation_compares_arms_of_the_same_seeds_with_their_control(study, tmp_path, monkeypatch):
    arms = (("sigma:1", 0), ("sigma:1", 1), ("sigma:1e6", 1), ("prior:raw", 0), ("prior:raw", 1), ("prior:none", 0))
    rows = [row("recall", "accuracy", 0.5 + seed / 4, label=label, seed=seed) for label, seed in arms]
    (made,) = (f.make(replace(study, evaluations=rows)) for f in FIGURES if f.number == 12)
    assert [(r["factor"], r["value"], r["score"], r["seeds"]) for r in made.table] == [
        ("sigma", "1", 0.75, 1),
        ("sigma", "1e6", 0.75, 1),
        ("sigma", "prior raw", 0.75, 1),
        ("prior", "none", 0.5, 1),
        ("prior", "raw", 0.5, 1),
    ]
    assert made.notes[:2] == [
        "sigma: without seed 0, which has not all values.",
        "prior: without seed 1, which has not all values.",
    ]
    drawn = []
    monkeypatch.setattr(scores, "save", lambda figure, path: drawn.append(figure))
    made.draw(tmp_path / "figure")
    assert [ax.get_title().splitlines()[0] for ax in drawn[0].axes] == ["prior, seed 0", "sigma, seed 1"]


def test_many_runs_are_drawn_by_arm(study, tmp_path, monkeypatch):
    """Losses and the norm of a router's gradient, of an arm's runs in one panel; not of a run of one step."""
    names = ["recall-dash-raw-knob4-seed0", "recall-dash-lr:1e-3-seed0", "recall-base-seed1"]
    names += [f"recall-dash-raw-knob1-seed{seed}" for seed in range(1, 6)]
    runs = {name: list(training_rows(name)) for name in names}
    first = runs["recall-base-seed1"][0]
    runs["recall-base-seed1"] = [first | {"step": n, "tokens": 100 * n, "loss": 100 / n} for n in range(1, 131)]
    router = runs["recall-dash-lr:1e-3-seed0"]
    runs["recall-dash-lr:1e-3-seed0"] = [r | {"grad_norm_router": 0.1 * r["step"]} for r in router]
    runs["recall-new-seed0"] = [first]
    monkeypatch.setattr(curves, "MANY", 8)
    monkeypatch.setattr(curves, "DRAWN", 12)
    (made,) = (f.make(replace(study, training=runs)) for f in FIGURES if f.number == 9)
    styled = []
    monkeypatch.setattr(curves, "save", lambda figure, path: styled.append((figure, path)))
    made.draw(tmp_path / "training")
    ((figure, path),) = styled
    assert path == tmp_path / "training"
    looks = {ax.get_title(): {line.get_color() for line in ax.lines} for ax in figure.axes}
    assert looks["recall-dash-raw"] == {METHODS["dash-raw"][0]}
    assert looks["recall-dash-lr"] == {METHODS["dash"][0]}
    figure.draw_without_rendering()
    text = "\n".join([*made.notes, *shown(figure)])
    assert_as_expected(text, Path(__file__).parent / "expected" / "arms.txt", tmp_path)


def test_long_curves_are_thinned_and_keep_their_ends():
    for count, kept in ((3, [0, 1, 2]), (60, [*range(60)]), (61, [*range(0, 61, 2)]), (130, [*range(0, 130, 3)])):
        assert [row["n"] for row in curves.thinned([{"n": n} for n in range(count)])] == kept
    assert [row["n"] for row in curves.thinned([{"n": n} for n in range(131)])] == [*range(0, 130, 3), 130]


def test_a_dense_control_alone_is_no_frontier(study):
    control = replace(study, evaluations=[r for r in study.evaluations if r["knob"] is None])
    assert control.evaluations
    assert [f.number for f in FIGURES if f.number in (1, 2) and f.make(control) is not None] == []


def test_what_a_study_lacks_is_told(study):
    def notes(figure, **changes):
        (made,) = (f.make(replace(study, **changes)) for f in FIGURES if f.number == figure)
        return None if made is None else list(made.notes)

    needles = [r for r in study.evaluations if r["task"] == "niah"]
    losses = [r for r in study.evaluations if r["task"] == "loss"]
    missing = "Extrapolation: missing, nothing was measured at two lengths."
    assert notes(10, evaluations=needles) == [missing, BARS]
    assert notes(10, evaluations=losses) == ["Needle heat map: missing.", BARS]
    assert notes(10, evaluations=losses[:1]) is None
    routing = [r for r in study.evaluations if r["task"] == "routing"]
    assert notes(7, evaluations=[r for r in routing if r["length"] == 512]) is None
    failed = replace(study, throughput=[r | {"status": "error"} for r in study.throughput])
    (made,) = (f.make(failed) for f in FIGURES if f.number == 15)
    assert (made.draw, len(made.table)) == (None, 4)
    bare = [
        {k: r[k] for k in ("run", "step", "split", "tokens", "loss", "step_time")} for r in list(training_rows("a"))[:1]
    ]
    absent = "Missing: causal sparsity, gradient norm, router's gradient norm, no row has it."
    assert notes(9, training={"a": bare})[0] == absent
    assert notes(9, training={}) is None
    recall = [r for r in study.evaluations if r["task"] == "recall"]
    control = [r for r in recall if r["label"] == "prior:raw"]
    (made,) = (f.make(replace(study, evaluations=control)) for f in FIGURES if f.number == 12)
    assert (made.draw, len(made.table)) == (None, 2)
    assert made.notes == ["Missing: alpha, chunk_size, sigma, summary, group, router_scale."]
    apart = [row("recall", "accuracy", 0.5, label=f"alpha:{n}", seed=n) for n in (1, 2)]
    assert notes(12, evaluations=apart)[0] == "alpha: no seed has all values, so these are means over different seeds."
    whole = {f"alpha:{n}": (0, 1) for n in (1, 2)} | {"alpha:3": (1, 0, 3)}
    more = [row("recall", "accuracy", 0.5, label=label, seed=seed) for label, seeds in whole.items() for seed in seeds]
    assert notes(12, evaluations=more)[0] == "alpha: without seed 3, which has not all values."
    unsolved = [r | ({"score": 0.98} if r["label"] == "full" else {}) for r in recall]
    assert notes(1, evaluations=unsolved)[0] == "text: recall, accuracy, 512 tokens: no dense control of 99 % or more"
    assert notes(1, evaluations=recall) == [BARS]
    for number in (3, 4, 5, 6, 7, 11, 17):
        assert notes(number, evaluations=recall) is None
    for number, name in ((8, "speed"), (13, "numerics"), (15, "throughput"), (16, "parallel")):
        assert notes(number, **{name: []}) is None


def test_scale_beside_the_papers_is_told_as_far_as_rows_know_it(study):
    def notes(evaluations, **changes):
        (made,) = (f.make(replace(study, evaluations=evaluations, **changes)) for f in FIGURES if f.number == 14)
        return None if made is None else made.notes

    source = "The paper's numbers stem from secondary sources; its PDF was not at hand."
    ruler = [r for r in study.evaluations if r["task"] in SUITES["ruler"]]
    said = (
        "Scale: ours have {} parameters and {} training tokens against 8B parameters; "
        "the two say nothing about each other's level, at most about the order of the methods."
    )
    assert notes(ruler, speed=[]) == [source, said.format("2.5M", "1.0M")]
    others = [row("loss", "nats", 3.0, label="tiny", parameters=1_000_000, tokens=1_000)]
    assert notes([*ruler, *others], speed=[]) == notes(ruler, speed=[])  # no row of these is in the table
    elsewhere = said.format("2.5M", "an unknown number of")
    assert notes([r | {"tokens": 0} for r in ruler], speed=[])[-1] == elsewhere
    sizes = [r | {"parameters": n, "tokens": n} for r, n in zip(ruler, (3_000_000, 12_345_678) * 20, strict=False)]
    assert notes(sizes, speed=[])[-1] == said.format("3.0M, 12.3M", "3.0M to 12.3M")
    unknown = [r | {"parameters": None} for r in ruler]
    assert notes(unknown, speed=[])[-1] == said.format("an unknown number of", "1.0M")
    assert notes([]) == [source]
    assert notes([], speed=[]) is None
    assert table(14, replace(study, evaluations=[]))[0]["what"] == "decode speed-up over FlashAttention-3"


def test_costs_are_per_panel(study):
    costs = [r for r in table(2, study) if r["panel"].startswith("text: recall")]
    assert {r["amount"] for r in costs} == {5000}
    assert {r["cost"] for r in costs} == {"bytes_read"}
    (made,) = (f.make(study) for f in FIGURES if f.number == 2)
    assert made.notes[1:] == [
        "Time per decoded token: missing, rows come from evaluate.py tasks=[decode].",
        "In the table only: 17 panels in which no curve has several points.",
    ]


def test_a_score_stands_at_the_time_that_its_own_model_takes_to_decode(study):
    times = [row("decode", "ms", 10 / knob, knob=knob, device="a GPU") for knob in (2.0, 4.0)]
    others = {"data": "code", "label": "nsa", "config_hash": "y", "seed": 5, "step": 99, "length": 99}
    times += [times[0] | {name: other, "score": 1.0} for name, other in others.items()]
    times.append(row("decode", "ms", 700.0, device="a CPU"))
    study = replace(study, evaluations=frontier.newest([*study.evaluations, *times]))
    (made,) = (f.make(study) for f in FIGURES if f.number == 2)
    assert list(dict.fromkeys(r["cost"] for r in made.table)) == ["bytes_read", "decode_ms, a CPU", "decode_ms, a GPU"]
    assert {(r["knob"], r["amount"]) for r in made.table if r["cost"] == "decode_ms, a CPU"} == {(4.0, 700.0)}
    found = {
        (r["panel"].split(",")[0], r["knob"], r["amount"], r["score"])
        for r in made.table
        if r["cost"] == "decode_ms, a GPU"
    }
    assert ("text: recall", 2.0, 5.0, 0.9) in found  # of the seed that was timed
    assert ("text: recall", 4.0, 2.5, 0.8) in found
    assert {knob for _, knob, *_ in found} == {2.0, 4.0}
    assert made.notes[1] == "Time per decoded token: of one sequence."


def test_collected_rows_draw_the_same_figures(tmp_path):
    for run, score in {"a": 0.5, f"a{REPLACED}20261130": 0.1, "b": 0.5}.items():
        (tmp_path / "runs" / run).mkdir(parents=True)
        scored = row("recall", "accuracy", score, label=run[0])
        (tmp_path / "runs" / run / "results.jsonl").write_text(json.dumps(scored))
        with (tmp_path / "runs" / run / "results.jsonl").open("a") as file:
            file.write("\n")
        lines = [{k: v for k, v in line.items() if k != "run"} for line in training_rows(run)]
        (tmp_path / "runs" / run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert collect.collect(tmp_path / "runs", tmp_path / "kept") == {
        "results.jsonl": 2,
        "metrics.jsonl": 8,
        "cells.jsonl": 0,
    }
    collected, direct = load_study(tmp_path / "kept"), load_study(tmp_path / "runs")
    assert table(1, collected) == table(1, direct)
    assert [point["score"] for point in table(1, direct)] == [0.5, 0.5]
    assert [found["score"] for found in frontier.load_rows(tmp_path / "runs")] == [0.5, 0.5]
    assert collected.training.keys() == direct.training.keys() == {"a", "b"}
    assert table(9, collected) == table(9, direct)
    with pytest.raises(ValueError, match="count twice"):
        collect.collect(tmp_path / "runs", tmp_path / "runs" / "kept")


def test_what_is_collected_later_is_added(tmp_path):
    kept = tmp_path / "kept"
    for machine, found in (("first", {"a": 0.1, "b": 0.2}), ("second", {"b": 0.3, "c": 0.4})):
        for run, score in found.items():
            (tmp_path / machine / run).mkdir(parents=True)
            line = json.dumps(row("recall", "accuracy", score, label=run)) + "\n"
            (tmp_path / machine / run / "results.jsonl").write_text(line)
        collect.collect(tmp_path / machine, kept)
    assert {row["run"]: row["score"] for row in read_rows(kept / "results.jsonl")} == {"a": 0.1, "b": 0.3, "c": 0.4}


def test_refusals(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ([str(tmp_path)], "usage"),
        ([str(tmp_path / "out"), str(tmp_path / "empty")], "no rows in"),
        ([str(tmp_path / "out"), str(RESULTS / "pareto_cpu"), str(RESULTS / "pareto_cpu")], "the same name"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="no rows below"):
        collect.collect(tmp_path / "empty", tmp_path / "kept")


def loss(label, seed, nats, corpus="a", **changes):
    by_row = {"corpus": [corpus] * 4, "nats": [*nats, 0.0], "targets": [10, 10, 20, 0]}
    asked = {"target_sparsity": 0.9, "sparsity_count": "causal", "trained_sparsity": 0.75}
    asked |= {"trained_sparsity_count": "causal", "seed": seed, "by_row": by_row}
    return with_setpoints(row("loss", "nats", sum(nats) / 40, label=label, **asked | changes))


def test_only_models_that_were_trained_alike_are_compared_row_by_row(study):
    untrained = ("infllmv2", [20.0, 10.0, 10.0]), ("dash", [20.0, 10.0, 20.0])
    losses = [
        *(loss("infllmv2", 0, [10.0 * n] * 3, trained_sparsity=sparsity) for n, sparsity in ((1, 0.5), (2, 0.75))),
        *(loss("dash", 0, [10.0 * n + 4] * 3, trained_sparsity=sparsity) for n, sparsity in ((1, 0.5), (2, 0.75))),
        *(loss("nsa", 0, [10.0] * 3, trained_sparsity=None, trained_knob=knob) for knob in (1.0, 2.0)),
        *(loss(label, 0, nats, trained_sparsity=None, trained_knob=None) for label, nats in untrained),
        *(loss(label, 0, nats, trained_sparsity=None, length=64) for label, nats in untrained),
    ]
    made = make_paired(replace(study, evaluations=losses))
    assert {(r["trained"], r["label"]): (r["difference"], r["seeds"]) for r in made.table} == {
        ("trained at 50% held", "dash"): (0.3, 1),
        ("trained at 75% held", "dash"): (0.3, 1),
        ("untrained", "dash"): (0.25, 1),
        ("trained", "dash"): (0.25, 1),  # at a knob, which each has of its own
    }
    assert made.notes[-1] == "Left out, for several models of one seed: nsa."


def test_one_row_has_no_interval_and_is_not_compared(study):
    of_one = {"corpus": ["a", "a"], "nats": [10.0, 0.0], "targets": [10, 0]}
    losses = [loss(label, 0, [10.0], by_row=of_one) for label in ("infllmv2", "dash")]
    assert make_paired(replace(study, evaluations=losses)) is None


def test_runs_that_are_called_alike_have_curves_of_their_own(tmp_path):
    for folder, run in (("a/x", None), ("b/x", None), ("b/y", None), ("c", "x")):
        (tmp_path / folder).mkdir(parents=True)
        lines = [{**line, "run": run} if run else {k: v for k, v in line.items() if k != "run"} for line in TWO_STEPS]
        (tmp_path / folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = load_study(tmp_path).training
    assert {name: len(rows) for name, rows in found.items()} == {"a: x": 2, "b: x": 2, "y": 2, "c: x": 2}


def test_losses_on_the_same_rows_are_compared_row_by_row(study, tmp_path, monkeypatch):
    evaluations = [
        loss("infllmv2", 0, [30.0, 20.0, 50.0], causal_sparsity=0.9),
        loss("infllmv2", 1, [31.0, 22.0, 52.0], causal_sparsity=0.9),
        loss("dash-sink", 0, [28.0, 19.0, 44.0], causal_sparsity=0.89),
        loss("dash-sink", 1, [27.0, 21.0, 48.0], causal_sparsity=0.92),
        loss("dash-sink", 2, [1.0, 1.0, 1.0]),  # nothing to compare with
        loss("dash", 0, [1.0, 1.0, 1.0], corpus="b"),
        loss("moba", 0, [1.0, 1.0, 1.0]),
        loss("hils", 0, [1.0, 1.0, 1.0]),
        loss("nsa", 0, [1.0, 1.0, 1.0], rows=9),
        loss("nsa", 0, [32.0, 24.0, 50.0], causal_sparsity=0.85),
        loss("infllmv2", 0, [30.0, 20.0, 50.0], target_sparsity=None),
        loss("dash-sink", 0, [31.0, 20.0, 50.0], target_sparsity=None),
        loss("nsa", 0, [1.0, 1.0, 1.0], target_sparsity=None, trained_sparsity=None, length=1024),  # no sparsity
        *(loss(label, 0, nats, length=1024) for label, nats in (("infllmv2", [30.0] * 3), ("nsa", [31.0, 32.0, 33.0]))),
    ]
    evaluations[6]["by_row"]["targets"] = [20, 10, 10, 0]
    for index, read in ((0, "a"), (2, "a"), (7, "b")):  # where both tell, of other tokens than the reference
        evaluations[index]["by_row"]["read"] = read
    made = make_paired(replace(study, evaluations=evaluations))
    assert made.origin == "seed 0, 1, 2"
    order = [(r["length"], r["at"], r["label"]) for r in made.table]
    assert order == [
        (512, "as trained", "dash-sink"),
        (512, "90%", "dash-sink"),
        (512, "90%", "nsa"),
        (1024, "90%", "nsa"),
    ]
    found = {(r["at"], r["label"]): r for r in made.table if r["length"] == 512}
    assert found["as trained", "dash-sink"]["difference"] == pytest.approx(1 / 40)
    at = found["90%", "dash-sink"]
    assert (at["trained"], at["seeds"]) == ("trained at 75% held", 2)
    assert at["difference"] == pytest.approx(-9 / 40)
    assert at["sparsity_difference"] == pytest.approx(0.005)  # sparser than the reference
    assert "differ by up to 5.0 points" in made.notes[1]  # less sparse
    # Per row -3, -1 and -5 of 10, 10 and 20 targets; Student's quantile of 2 degrees of freedom is 4.303.
    scatter = [-3 + 2.25, -1 + 2.25, -5 + 4.5]
    half = 4.30265 * np.sqrt(sum(x * x for x in scatter) * 3 / 2) / 40
    assert [at["low"], at["high"]] == pytest.approx([-9 / 40 - half, -9 / 40 + half], rel=1e-5)
    assert made.notes[-1].endswith("infllmv2: dash, hils, moba.")
    drawn = []
    monkeypatch.setattr(paired, "save", lambda figure, path: drawn.append(figure))
    made.draw(tmp_path / "figure")
    drawn[0].draw_without_rendering()
    assert_as_expected("\n".join(shown(drawn[0])), Path(__file__).parent / "expected" / "paired.txt", tmp_path)


def match(task, label, scores, seed=0, **changes):
    asked = {"target_sparsity": 0.9, "sparsity_count": "causal", "trained_sparsity": 0.75, "set": task}
    asked |= {"trained_sparsity_count": "causal", "seed": seed, "by_sample": scores, "rows": len(scores)}
    return with_setpoints(row(task, "match", sum(scores) / len(scores), label=label, **asked | changes))


def test_scores_of_the_same_samples_are_compared_sample_by_sample(study, tmp_path, monkeypatch):
    reference = {"vt": [0.5, 0.5, 0.0, 1.0], "cwe": [0.0, 0.0, 0.0, 0.0]}
    evaluations = [
        *(match(task, "infllmv2", scores, seed) for task, scores in reference.items() for seed in (0, 1)),
        match("vt", "dash-sink", [1.0, 0.5, 0.0, 1.0], 0, causal_sparsity=0.7),
        match("vt", "dash-sink", [1.0, 1.0, 0.5, 1.0], 1),
        match("cwe", "dash-sink", [0.0, 0.0, 1.0, 0.0], 0),
        match("cwe", "dash-sink", [0.0, 0.0, 0.0, 0.0], 1),
        *(match(task, "dash-sink", [1.0] * 4, seed=2) for task in reference),  # nothing to compare with
        match("vt", "nsa", [1.0] * 4),  # an evaluation that has not ended
        *(match(task, "moba", [1.0] * 4, set="other") for task in reference),
        *(match(task, "dash", [1.0] * 4) for task in reference for _ in range(2)),
        *(match(task, "hils", [1.0] * 4, by_sample=None) for task in reference),  # from before samples were kept
        match("json_kv", "dash-sink", [1.0] * 4),  # none of RULER's
        match("json_kv", "infllmv2", [0.0] * 4),
    ]
    made = make_paired_scores(replace(study, evaluations=evaluations))
    # Per sample means over the seeds of .5 .25 .25 0 and of 0 0 .5 0.
    found = {r["task"]: (r["difference"], r["seeds"], r["label"], r["at"]) for r in made.table}
    assert found == {
        "mean of 2": (0.1875, 2, "dash-sink", "90%"),
        "vt": (0.25, 2, "dash-sink", "90%"),
        "cwe": (0.125, 2, "dash-sink", "90%"),
    }
    vt, cwe, both = (next(r for r in made.table if r["task"] == task) for task in ("vt", "cwe", "mean of 2"))
    # Student's quantile of 3 degrees of freedom is 3.182; deviations of .25 0 0 -.25 and of -.125 -.125 .375 -.125.
    half = [3.18245 * np.sqrt(total / 3 / 4) for total in (0.125, 0.1875)]
    assert [vt["low"], vt["high"]] == pytest.approx([0.25 - half[0], 0.25 + half[0]], rel=1e-5)
    assert cwe["high"] == pytest.approx(0.125 + half[1], rel=1e-5)
    assert both["high"] == pytest.approx(0.1875 + np.hypot(*half) / 2, rel=1e-5)
    assert both["low"] == pytest.approx(0.1875 - np.hypot(*half) / 2, rel=1e-5)
    assert [r["sparsity_difference"] for r in (vt, cwe, both)] == pytest.approx([0.05, 0, 0.025])
    assert made.notes[2:] == [
        "Left out, for other rows than those of infllmv2: moba.",
        "Left out, for several models of one seed: dash.",
        "Left out, for want of tasks that others have: nsa.",
    ]
    drawn = []
    monkeypatch.setattr(paired, "save", lambda figure, path: drawn.append(figure))
    made.draw(tmp_path / "figure")
    (ax,) = drawn[0].axes
    assert [list(line.get_ydata()) for line in ax.lines] == [[0.1875], [0.0, 0.0]]  # the mean alone
    assert ax.get_ylabel() == "RULER above infllmv2"
    assert make_paired_scores(replace(study, evaluations=evaluations[-4:])) is None


def test_figures_of_what_was_trained_leave_out_where_the_knob_was_turned(study):
    turned = [
        r | {"knob": 2.0, "score": 9.0, "per_head": [[9.0]], "p10": 9, "p90": 9}
        for r in study.evaluations
        if r["task"] in ("sparsity", "routing", "niah", "loss")
    ]
    both = replace(study, evaluations=[*study.evaluations, *turned])
    for number in (3, 4, 5, 7, 10):
        assert table(number, both) == table(number, study), number
