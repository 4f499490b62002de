"""The report page holds what the rows hold, of one run and of several, and nothing from outside."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from experiments.figures import run_page as report
from experiments.figures.run_page import main
from experiments.plots import pyplot
from tests.shown import assert_as_expected, shown


def make_run(path, steps=(1, 2, 3), layers=3, config="attention:\n  name: dash\nsteps: 3\n", **columns):
    path.mkdir()
    (path / "config.yaml").write_text(f"name: {path.name}\nmodel: {{}}\ndata: {{}}\n{config}")
    with (path / "metrics.jsonl").open("w") as file:
        for step in steps:
            row = {"step": step, "split": "train", "tokens": 100 * step, "loss": 4.0 - step, "lr": 1e-3}
            row |= {"grad_norm": 1.0, "tokens_per_s": 12345.0, "step_time": 0.5 if step == steps[-1] else 1.0}
            of_layers = [0.1 * step + 0.01 * layer for layer in range(layers)]
            row |= {"causal_sparsity": 0.5, "causal_sparsity_per_layer": of_layers} if layers else {}
            row |= {"data_wait": 0.125}
            file.write(json.dumps(row | columns) + "\n")
    return path


class Elements(HTMLParser):
    """Every tag with its attributes, and the text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += " " + data


@pytest.fixture
def undrawn(monkeypatch):
    """Of a figure only what its axes are called."""

    def named(figure, **options):
        ax = figure.axes[0]
        pyplot().close(figure)
        return f"<svg>{ax.get_title()}{ax.get_title(loc='left')}: {ax.get_xlabel()}</svg>"

    monkeypatch.setattr(report, "_svg", named)


def drawn(*runs):
    main([str(run) for run in runs])
    return (runs[0] / "report.html").read_text()


def test_a_row_without_tokens_ends_the_report_in_a_line(tmp_path, capsys):
    path = make_run(tmp_path / "run") / "metrics.jsonl"
    path.write_text(path.read_text().replace('"tokens": 200, ', ""))
    with pytest.raises(SystemExit):
        main([str(path.parent)])
    assert re.match(
        r"error: .*metrics.jsonl, line 2 .*does not say tokens\): remove the line\n", capsys.readouterr().err
    )


def test_one_run(tmp_path):
    text = drawn(make_run(tmp_path / "run"))
    page = Elements(text)
    assert {"loss, nats per token", "tokens per second", "causal sparsity, mean over the layers"} <= {
        piece.strip() for piece in re.findall(r">([^<]+)<", text)
    }
    for absent in ("alpha, mean", "utilisation", "Where the configurations differ", "validation</text>"):
        assert absent not in text
    for value in ("3 of 3", "1.0000", "50.0%", "12.35k", "25.0%", "attention.name"):
        assert value in page.text
    for tag, attributes in page.tags:  # self-contained: no script, nothing fetched
        assert tag not in ("script", "link", "iframe")
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:"))


def test_runs_side_by_side(tmp_path):
    dense = make_run(tmp_path / "dense", layers=0, config="attention:\n  name: full\nsteps: 3\n")
    sparse = make_run(tmp_path / "dash", alpha=1.5, mfu_causal=0.45, mfu_sparse=0.4, grad_norm_chunk_query=1e-4)
    text = drawn(dense, sparse)
    assert not (sparse / "report.html").exists()
    for piece in ("alpha, mean", "utilisation", "chunk query", "45.0%", "40.0%", "<h1>dense, dash</h1>"):
        assert piece in text
    assert text.count("<figcaption>") == 1  # only one of the two has sparsity
    differing = text[text.index("Where the configurations differ") : text.index("<details>")]
    assert "attention.name" in differing
    assert ">steps<" not in differing


def test_a_run_of_one_row_and_a_name_that_is_no_html(tmp_path):
    config = 'attention: {name: dash}\nsteps: 3\ncorpora: {"<b>": x}\n'
    run = make_run(tmp_path / "a <b> & c", steps=(1,), config=config)
    text = drawn(with_scores(run, (0.5, 0.5)))
    assert "corpora.&lt;b&gt;" in text
    assert "a &lt;b&gt; &amp; c" in text
    assert "<b>" not in text


def test_the_same_rows_give_the_same_page(tmp_path):
    run = make_run(tmp_path / "run")
    assert drawn(run) == drawn(run)


def test_what_cannot_be_drawn(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"no run directory .*config\.yaml"):
        report.read_run(tmp_path)
    with pytest.raises(ValueError, match="no training rows yet"):
        report.read_run(make_run(tmp_path / "run", steps=()))
    with pytest.raises(SystemExit):
        main([])
    assert "arguments are required: runs" in capsys.readouterr().err


SCORE = {
    **{"task": "niah_single_1", "metric": "match", "position": None, "rows": 25, "stderr": 0.1, "samples": 25},
    **{"label": "dash", "data": "text", "length": 512, "seed": 0, "step": 3, "config_hash": "x"},
    **{"knob_name": "router_scale", "trained_knob": 2.0},
}


def with_scores(run, *scores, parameters=10):
    rows = [SCORE | {"score": score, "causal_sparsity": s, "knob": 10 * s} for s, score in scores]
    (run / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "start.json").write_text(json.dumps({"parameters": parameters}))
    return run


@pytest.mark.usefixtures("undrawn")
def test_a_run_shows_its_scores(tmp_path):
    text = drawn(with_scores(make_run(tmp_path / "run"), (0.5, 0.5), (0.75, 0.25)))
    for piece in ("text: niah_single_1, share found, 512 tokens", "measured causal sparsity", "All 2 scores"):
        assert piece in text
    cells = re.findall(r"<td>([^<]*)</td>", text[text.index("All 2 scores") :])
    assert cells[:6] == ["run", "niah_single_1 match", "512", "router_scale 5", "50.0%", "0.500 [0.318, 0.682]"]
    assert "Scores" not in drawn(make_run(tmp_path / "other"))
    at_one = drawn(with_scores(make_run(tmp_path / "one"), (0.5, 0.5)))
    assert "measured causal sparsity" not in at_one  # a point is no curve
    assert "0.500 [0.318, 0.682]" in at_one


def test_runs_of_different_size_are_shown_by_what_they_cost(tmp_path, monkeypatch):
    small, large = (with_scores(make_run(tmp_path / name), parameters=n) for name, n in (("a", 10), ("b", 1000)))
    panels = []

    def look(figure, **options):
        ax = figure.axes[0]
        panels.append((ax.get_title(loc="left"), ax.get_xlabel(), ax.get_xscale()))
        pyplot().close(figure)
        return ""

    def shows(*runs):
        panels.clear()
        drawn(*runs)
        return [panels[0], *(panel for panel in panels if panel[1] == effort)]

    monkeypatch.setattr(report, "_svg", look)
    loss, effort = "loss, nats per token", "FLOPs of training, 6 x parameters x tokens"
    assert shows(small, large) == [(loss, "tokens", "linear"), (loss, effort, "log")]
    with_scores(large, parameters=10)
    assert shows(small, large) == [(loss, "tokens", "linear")]
    (large / "start.json").unlink()
    assert shows(small, large) == [(loss, "tokens", "linear")]  # of one it is not known
    for steps, scale in ((24, "linear"), (25, "log")):  # the other has 3
        longer = make_run(tmp_path / f"longer{steps}", steps=range(1, steps + 1))
        assert shows(*((small, longer) if steps == 24 else (longer, small))) == [(loss, "tokens", scale)]


def test_the_whole_page(tmp_path, monkeypatch):
    """Two runs with all that a page can show; ``expected`` was checked by hand against the rows."""
    figures = []

    def look(figure, **options):
        assert svg(figure, **options).startswith("<svg")
        figures.append("\n".join(["<svg>", *shown(figure), "</svg>"]))
        return figures[-1]

    svg = report._svg
    monkeypatch.setattr(report, "_svg", look)
    all_columns = {
        "alpha": 1.5,
        "mfu_causal": 0.45,
        "mfu_sparse": 0.4,
        "grad_norm_router": 0.5,
        "peak_memory_mib": 2560,
    }
    dash = make_run(tmp_path / "dash", **all_columns, grad_norm_chunk_query=1e-4, tokens_per_s=1.5e6)
    config = "attention:\n  name: full\nsteps: 90\nseed: 7\n"
    dense = make_run(tmp_path / "b", range(3, 34, 3), 0, config, lr=2e-3, data_wait=0.0)
    (dense / "config.yaml").write_text((dense / "config.yaml").read_text().replace("name: b\n", "name: its own\n"))
    with (dash / "metrics.jsonl").open("a") as file:
        for step in (1, 3):
            file.write(
                json.dumps({"step": step, "split": "validation", "tokens": 100 * step, "loss": 4.5 - step}) + "\n"
            )
    with_scores(dash, (0.75, 0.25), (0.5, 0.5))
    with_scores(dense, (0.0, 0.75), parameters=2_000_000)
    before = SCORE | {"score": 0.125, "causal_sparsity": 0.75, "knob": 7.5, "step": 2}  # of an older checkpoint
    (dash / "results.jsonl").write_text(json.dumps(before) + "\n" + (dash / "results.jsonl").read_text())
    text = drawn(dash, dense)
    assert len(figures) == len(re.findall("<figure>", text))
    assert_as_expected(text, Path(__file__).parent / "expected" / "report.html", tmp_path)


@pytest.mark.usefixtures("undrawn")
def test_runs_that_are_called_alike_are_numbered_and_none_is_lost(tmp_path):
    runs = [tmp_path / "x" / "dash", tmp_path / "y" / "dash"]
    for score, run in zip((0.5, 0.25), runs, strict=True):
        run.parent.mkdir()
        with_scores(make_run(run), (0.5, score))
    text = drawn(*runs)
    assert "<h1>dash (1), dash (2)</h1>" in text
    assert "0.500 [" in text
    assert "0.250 [" in text
