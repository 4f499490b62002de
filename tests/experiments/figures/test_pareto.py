"""Frontiers from rows made by hand."""

import json
from pathlib import Path

import pytest

from data.task_sets import SUITES
from experiments.figures import frontier, pareto
from experiments.figures.rows import as_trained, line_of
from experiments.intervals import interval
from experiments.plots import METHODS, pyplot
from tests.shown import assert_as_expected


def make_row(label="dash", knob=1.0, sparsity=0.5, score=0.9, **changes):
    row = {
        "label": label,
        "data": "mqar",
        "task": "recall",
        "metric": "accuracy",
        "length": 512,
        "rows": 8,
        "seed": 0,
        "step": 100,
        "knob": knob,
        "trained_knob": 1.0 if knob is not None else None,
        "causal_sparsity": sparsity,
        "score": score,
        "position": None,
        "variant": None,
        "config_hash": f"{label} {changes.get('trained_knob')}",
    }
    return row | changes


def scored(*pairs, metric="accuracy"):
    rows = [make_row(knob=i, sparsity=s, score=v, metric=metric) for i, (s, v) in enumerate(pairs)]
    return frontier.points(rows)


def test_frontier_drops_what_another_point_beats_in_both():
    edge = frontier.frontier(scored((0.2, 1.0), (0.5, 0.8), (0.6, 0.9), (0.9, 0.3), (0.85, 0.2)))
    assert [(p.sparsity, p.score) for p in edge] == [(0.2, 1.0), (0.6, 0.9), (0.9, 0.3)]


def test_an_answer_that_was_filtered_is_a_score_of_its_own_panel():
    filtered = [f"exact_match ({name})" for name in ("strict-match", "flexible-extract")]
    rows = [make_row(metric=metric, knob=k, score=k / 4) for metric in filtered for k in (1.0, 2.0)]
    found = frontier.points(frontier.of_frontiers([*rows, make_row(metric="bleu")]))
    assert sorted({p.panel.metric for p in found}) == sorted(filtered)
    assert [p.score for p in frontier.frontier(p for p in found if p.panel.metric == filtered[0])] == [0.5]


def test_frontier_of_a_loss_prefers_low():
    for metric in ("nats", "perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte"):
        edge = frontier.frontier(scored((0.2, 3.0), (0.5, 3.5), (0.6, 3.2), metric=metric))
        assert [(p.sparsity, p.score) for p in edge] == [(0.2, 3.0), (0.6, 3.2)]


def test_interpolation_never_leaves_the_measured_span():
    line = frontier.frontier(scored((0.4, 1.0), (0.8, 0.5)))
    assert frontier.interpolate(line, 0.6) == pytest.approx(0.75)
    assert frontier.interpolate(line, 0.8) == pytest.approx(0.5)
    assert frontier.interpolate(line, 0.3) is None
    assert frontier.interpolate(line, 0.9) is None
    assert frontier.interpolate(line[:1], 0.4) == 1.0
    assert frontier.interpolate(line[:1], 0.5) is None


def test_a_sparser_point_that_is_no_worse_stands_for_the_denser_ones():
    line = scored((0.4, 1.0), (0.8, 1.0), (0.9, 0.5))
    assert [frontier.score_at(line, s) for s in (0.3, 0.4, 0.5, 0.8, 0.95)] == [None, 1.0, 1.0, 1.0, None]
    assert frontier.score_at(line, 0.85) == pytest.approx(0.75)


def test_seeds_are_averaged_and_counted_once():
    (point,) = frontier.points([make_row(seed=s, score=v, sparsity=v / 2) for s, v in ((0, 0.6), (1, 0.8))])
    assert (point.score, point.sparsity, point.scores) == (pytest.approx(0.7), pytest.approx(0.35), [0.6, 0.8])


def test_each_seed_has_its_own_frontier():
    def line(seed, *scores):
        return [make_row(knob=i, seed=seed, sparsity=s, score=v) for i, (s, v) in enumerate(scores)]

    both = frontier.points(line(0, (0.4, 1.0), (0.8, 0.5)) + line(1, (0.5, 0.9), (0.7, 0.7)))
    assert frontier.scores_at(both, 0.6) == pytest.approx([0.75, 0.8])
    assert frontier.scores_at(both, 0.75) is None  # seed 1 was not measured there
    assert "0.7750 (0.750, 0.800)" in pareto.to_markdown(frontier.points(line(0, (0.5, 0.75)) + line(1, (0.5, 0.8))))


def test_a_line_joins_only_means_over_the_same_seeds():
    rows = [make_row(knob=k, trained_knob=k, seed=s, config_hash=f"{k}") for k in (1.0, 2.0) for s in (0, 1)]
    rows += [make_row(knob=3.0, trained_knob=3.0, config_hash="3")]
    found = frontier.points(rows)
    (line,) = (line for (_, _, curve), line in frontier.curves(found).items() if curve == "trained at each")
    assert [p.knob for p in line] == [1.0, 2.0]
    assert "| dash | 3 | 3 | 50.0% | 0.9000 | 0.9000 | missing |" in pareto.to_markdown(found)


def test_a_turned_knob_has_a_line_of_the_seeds_that_all_its_points_share():
    rows = [make_row(knob=k, seed=s, sparsity=k / 4, score=0.9) for k in (1.0, 2.0) for s in (0, 1)]
    rows += [make_row(knob=3.0, seed=0, sparsity=0.75, score=0.1)]
    found = frontier.points(rows)
    (line,) = frontier.curves(found).values()
    assert [p.knob for p in line] == [1.0, 2.0]
    text = pareto.to_markdown(found)
    assert "| dash | 1 | 3 | 75.0% | 0.1000 | 0.1000 | missing |" in text
    assert "| dash | trained at 1, knob turned | 0.9000 (0.900, 0.900) | not measured | " in text


def test_two_runs_are_no_two_seeds():
    for changes, differing in (
        ({"config_hash": "another model", "score": 0.1}, "config_hash"),
        ({"rows": 9}, "rows"),
        ({"step": 200, "rows": 9}, "rows, step"),
    ):
        with pytest.raises(
            ValueError, match=rf"two results of dash .* \(they differ in {differing}\): give one a label"
        ):
            frontier.points([make_row(), make_row(**changes)])


def test_two_runs_of_one_configuration_are_no_newer_and_older_one(tmp_path):
    for run, score in (("a", 0.1), ("b", 0.2)):
        (tmp_path / run).mkdir()
        (tmp_path / run / "results.jsonl").write_text(json.dumps(make_row(score=score)) + "\n")
    with pytest.raises(ValueError, match=r"differ in run\), from a and b: give one a label"):
        frontier.points(frontier.load_rows(tmp_path))


def test_trained_and_turned_knobs_are_different_curves():
    turned = [make_row(knob=k, trained_knob=1.0) for k in (1.0, 2.0)]
    others = [make_row(knob=4.0, trained_knob=4.0, config_hash="another"), make_row("full", None, 0.0, 1.0)]
    (alone,) = frontier.curves(frontier.points(turned))
    assert alone[1:] == ("dash", "trained at 1, knob turned")
    found = {curve: line for (_, _, curve), line in frontier.curves(frontier.points([*turned, *others])).items()}
    assert {curve: [p.knob for p in line] for curve, line in found.items()} == {
        "trained at each": [1.0, 4.0],
        "trained at 1, knob turned": [1.0, 2.0],
    }


def test_panels_without_a_line_are_not_drawn_beside_those_with_one():
    turned = [make_row(knob=k, length=512) for k in (1.0, 2.0)]
    others = [make_row(length=length) for length in (1024, 2048)]
    assert [panel.length for panel in frontier.panels_to_draw(frontier.points([*turned, *others]))] == [512]
    assert [panel.length for panel in frontier.panels_to_draw(frontier.points(others))] == [1024, 2048]


def test_curves_are_compared_over_the_span_they_share():
    wide, narrow = scored((0.2, 1.0), (0.8, 0.4)), scored((0.5, 0.9), (0.9, 0.5))
    assert frontier.common_span([wide, narrow]) == (0.5, 0.8)
    assert frontier.mean_score(wide, 0.5, 0.8) == pytest.approx((0.7 + 0.4) / 2)
    assert frontier.mean_score(narrow, 0.5, 0.8) == pytest.approx((0.9 + 0.6) / 2)
    bent = scored((0.2, 1.0), (0.4, 0.8), (0.8, 0.0))
    assert frontier.mean_score(bent, 0.2, 0.8) == pytest.approx((0.2 * 0.9 + 0.4 * 0.4) / 0.6)
    assert frontier.mean_score(bent, 0.5, 0.7) == pytest.approx(0.4)  # the bend lies outside
    assert frontier.common_span([wide, scored((0.85, 1.0), (0.9, 1.0))]) is None


def test_rulers_average_is_over_the_tasks_that_all_settings_have():
    def row(task, score, knob=1.0):
        return make_row(task=task, metric="match", score=score, knob=knob)

    rows = [row("vt", 0.2), row("cwe", 0.6), row("vt", 0.4, knob=2.0), make_row()]
    (average,) = frontier.ruler_averages(rows)
    assert (average["task"], average["score"], average["knob"]) == ("ruler (2 of 13 tasks)", pytest.approx(0.4), 1.0)
    assert frontier.ruler_averages(rows[:1]) == []
    assert average["bytes_read"] is None  # as rows from before it was kept
    (average,) = frontier.ruler_averages([row("vt", 0.2) | {"bytes_read": 100}, row("cwe", 0.6) | {"bytes_read": 400}])
    assert average["bytes_read"] == 250
    panels = {p.panel.task for p in frontier.points(frontier.of_frontiers(rows))}
    assert panels == {"vt", "cwe", "recall", "ruler (2 of 13 tasks)"}
    (average,) = frontier.ruler_averages(
        row(task, 0.2) | {"causal_sparsity": number / 24} for number, task in enumerate(SUITES["ruler"])
    )
    assert (average["task"], average["causal_sparsity"]) == ("ruler", pytest.approx(0.25))
    asked = {"data": "text", "length": 1024, "variant": "chat", "rows": 9}
    for name, value in (asked | {"label": "nsa", "config_hash": "x", "seed": 1, "knob": 2.0, "step": 200}).items():
        pair = [row(task, 0.2) for task in ("vt", "cwe")]
        pair += [row(task, 0.6) | {name: value} for task in ("vt", "cwe", "fwe")]
        found = [(average["task"], round(average["score"], 9)) for average in frontier.ruler_averages(pair)]
        alone = [("ruler (2 of 13 tasks)", 0.2)] if name in asked else []  # else one task of three is missing there
        assert found == [*alone, ("ruler (3 of 13 tasks)", 0.6)], name


def at_sparsity(target, knob, **changes):
    """A row of a run that held 75 %, evaluated at a sparsity: each seed found a knob of its own."""
    trained = {"trained_sparsity": 0.75, "trained_sparsity_count": "causal", "trained_knob": 0.4}
    asked = {"target_sparsity": target, "sparsity_count": None if target is None else "causal"}
    return make_row(**trained | asked | {"knob": knob, "sparsity": target or 0.75} | changes)


def test_a_sparsity_that_was_asked_for_is_one_setting_of_all_seeds():
    rows = [
        *(at_sparsity(target, 2 * target, score=1 - target / 2) for target in (0.5, 0.75, 0.9)),
        *(at_sparsity(target, target, score=1 - target / 2, seed=1, trained_knob=0.3) for target in (0.5, 0.75, 0.9)),
        *(at_sparsity(None, 0.4), at_sparsity(None, 0.3, seed=1, trained_knob=0.3)),  # the held knob
    ]
    points = frontier.points(frontier.of_frontiers(rows))
    assert {str(p.knob): sorted(p.of_seed) for p in points} == {
        setting: [0, 1] for setting in ("50%", "75%", "90%", "75% held")
    }
    assert {str(p.knob) for p in points if p.is_trained} == {"75%", "75% held"}
    ((key, line),) = frontier.curves(points).items()
    assert key[2] == "trained at 75% held, knob turned"
    assert [p.sparsity for p in line] == [0.5, 0.75, 0.9, 0.75]
    assert "| dash | 75% held | 90% | 90.0% |" in pareto.to_markdown(points)
    again = frontier.newest(frontier.newest(rows))
    assert [row["knob"] for row in again] == [p["knob"] for p in frontier.newest(rows)]


def test_a_model_that_was_not_trained_has_a_curve():
    asked = [{"target_sparsity": sparsity, "sparsity_count": "causal"} for sparsity in (0.5, 0.9)]
    rows = [make_row(sparsity=one["target_sparsity"], trained_knob=None, **one) for one in asked]
    points = frontier.points(frontier.newest([*rows, make_row(knob=3.0, label="other")]))
    assert {key[1:]: len(line) for key, line in frontier.curves(points).items()} == {
        ("dash", "untrained, knob turned"): 2,
        ("other", "trained at 1, knob turned"): 1,
    }
    assert "| dash | untrained | 90% | 90.0% |" in pareto.to_markdown(points)
    (key,) = frontier.curves(frontier.points(frontier.newest(row | {"label": "dash, untrained"} for row in rows)))
    assert key[1:] == ("dash, untrained", "knob turned")


def test_dense_weights_before_and_after_training_are_two_levels():
    before = make_row("full, untrained", None, 0.0, 0.6) | {"untrained": "smollm2", "step": 0}
    text = pareto.to_markdown(frontier.points(frontier.newest([before, make_row("full", None, 0.0, 0.995)])))
    assert "| full | | | 0.0% | 0.9950 |" in text
    assert "| full, untrained | | | 0.0% | 0.6000 |" in text


def test_lines_say_the_sparsity_and_the_held_knob_is_the_one_trained_with():
    held, found, other = at_sparsity(None, 0.4), at_sparsity(0.75, 0.41), at_sparsity(0.9, 1.0, label="more")
    held, found, other = frontier.newest([held, found, other | {"trained_sparsity": 0.9}])
    assert [line_of(row) for row in (held, found, other)] == ["dash (75% held)", "dash (75%)", "more (90%)"]
    assert as_trained([held, found, other]) == [held, other]  # ``more`` was evaluated at nothing else
    assert line_of(make_row(knob=0.25, knob_name="router_scale")) == "dash (router_scale 0.25)"
    (found,) = frontier.newest([at_sparsity(0.875, 0.4, sparsity_count="paper")])
    assert line_of(found) == "dash (87.5% (paper count))"


def test_a_sparsity_is_no_knob_of_its_value_and_no_other_count():
    rows = [
        make_row(knob=0.75, trained_knob=0.75),
        *(at_sparsity(0.75, 0.4), at_sparsity(0.75, 0.2, sparsity_count="paper", score=0.1)),
    ]
    kept = frontier.newest(rows)
    assert sorted(str(row["knob"]) for row in kept) == ["0.75", "75%", "75% (paper count)"]
    assert len(frontier.points(kept)) == 3
    assert [p.is_trained for p in frontier.points(kept)] == [True, True, False]


def test_another_form_of_the_task_is_another_panel():
    rows = [make_row(), make_row(variant="pairs_max=4", score=0.1)]
    assert {p.panel.title: p.score for p in frontier.points(rows)} == {
        "mqar: recall, accuracy, 512 tokens": 0.9,
        "mqar: recall, accuracy, 512 tokens, pairs_max=4": 0.1,
    }


def test_only_the_newest_checkpoint_counts():
    rows = frontier.newest([make_row(step=100, score=0.1), make_row(step=200, score=0.2), make_row(step=150)])
    assert [row["step"] for row in rows] == [200]
    again = [make_row(step=200, score=score) for score in (0.3, 0.2)]  # of the same checkpoint, the row written last
    assert [row["score"] for row in frontier.newest(again)] == [0.2]
    others = dict.fromkeys(("run", "data", "set", "text", "label", "config_hash", "task", "metric"), "x")
    others |= {"length": 1, "rows": 1, "seed": 1}
    others |= {"knob": 2.0, "variant": "x", "probe": "x", "position": [0, 0], "depth": 0.5, "relevant": 1, "part": "x"}
    for name, value in others.items():
        other_work = [make_row(step=100), make_row(step=200) | {name: value}]
        assert frontier.newest(other_work) == other_work, name
    # Weights are another at each step; two at one step are two models, and no mean is of both.
    steps = [make_row(step=step) | {"weights": weights} for step, weights in ((100, "a"), (200, "b"), (200, "c"))]
    assert frontier.newest([*steps, steps[2]]) == steps[1:]
    with pytest.raises(ValueError, match=r"differ in weights\): give one a label .*, or remove its rows"):
        frontier.points(frontier.newest(steps))


def test_says_so_where_no_dense_control_solves_the_task():
    sparse = make_row()
    good, bad = make_row("full", None, 0.0, 0.995), make_row("full", None, 0.0, 0.98)
    assert "No dense control" not in pareto.to_markdown(frontier.points([good, sparse]))
    assert "No dense control" in pareto.to_markdown(frontier.points([bad, sparse]))
    assert "No dense control" in pareto.to_markdown(frontier.points([sparse]))
    # Rows longer than it was trained at ask for more than training; another task says nothing of this one.
    assert "No dense control" not in pareto.to_markdown(frontier.points([good, bad | {"length": 4096}, sparse]))
    other = [good | {"data": "text"}, bad | {"length": 4096}, sparse]
    assert "No dense control" in pareto.to_markdown(frontier.points(other))


def test_writes_table_and_figure(tmp_path, capsys):
    """Recall, whose control has solved it, and a loss of two seeds; both files are in ``expected``, checked by hand."""
    rows = [make_row(knob=k, sparsity=s, score=v) for k, s, v in ((1.0, 0.4, 1.0), (2.0, 0.8, 0.6), (3.0, 0.9, 0.7))]
    rows += [make_row("full", None, 0.0, 1.0), make_row("nsa", 4, 0.8, 0.5, trained_knob=4)]
    rows += [
        make_row("nsa", 2.0, 0.4, 0.6, trained_knob=2.0),
        make_row("nsa", 1.0, 0.45, 0.75, trained_knob=1.0, seed=7),
    ]
    loss = {"task": "loss", "metric": "nats", "variant": "packed"}
    rows += [
        make_row("dash", knob, sparsity + seed / 50, score + seed / 4, seed=seed, **loss)
        for knob, sparsity, score in ((1.0, 0.5, 3.0), (2.0, 0.8, 3.5))
        for seed in (0, 1)
    ]
    rows += [make_row("moba", None, 0.75, 4.0, **loss) | {"knob": 3.0}]
    rows += [make_row(position=[0, 0], task="position", metric="nats")]  # not of a frontier
    rows += [make_row(depth=0.0, score=0.1), make_row(part="half", score=0.1), make_row("sigma:1", score=0.1)]
    rows += [make_row(metric="support", score=9.0)]
    for i, row in enumerate(rows):
        run = tmp_path / f"run{i}"
        run.mkdir()
        (run / "results.jsonl").write_text(json.dumps(row) + "\n")
    pareto.main([str(tmp_path)])
    written, expected = tmp_path / "written", Path(__file__).parent / "expected"
    written.mkdir()
    text = (tmp_path / "pareto.md").read_text()
    assert capsys.readouterr().out == f"{text}\n{tmp_path / 'pareto.png'} and .pdf, pareto.md, pareto.csv\n"
    for name in ("pareto.md", "pareto.csv"):
        assert_as_expected((tmp_path / name).read_text(), expected / name, written)
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "pareto.pdf").read_bytes().startswith(b"%PDF")


def test_nothing_to_show(tmp_path, capsys):
    with pytest.raises(SystemExit):
        pareto.main([str(tmp_path)])
    assert "run a sweep" in capsys.readouterr().err


def drawn(monkeypatch, tmp_path, rows):
    """The figure of rows, and its legend: text -> handle."""
    figures = []
    monkeypatch.setattr(pareto, "save", lambda figure, path: figures.append(figure))
    pareto.draw(frontier.points(rows), tmp_path / "pareto")
    (figure,) = figures
    pyplot().close(figure)
    (legend,) = figure.legends
    return figure, {text.get_text(): handle for text, handle in zip(legend.texts, legend.legend_handles, strict=True)}


def bars_of(ax):
    paths = [path for bars in ax.collections for path in bars.get_segments()]
    return sorted(tuple(sorted(path[:, 1])) for path in paths if len(path) == 2)


def test_every_point_has_its_interval_and_every_line_its_mark_in_the_legend(monkeypatch, tmp_path):
    known = {"task": "vt", "metric": "match", "rows": 25}
    rows = [make_row(knob=k, sparsity=s, score=v, **known) for k, s, v in ((1.0, 0.5, 0.8), (2.0, 0.7, 0.6))]
    rows += [make_row("full", None, 0.0, 0.9, **known)]
    figure, legend = drawn(monkeypatch, tmp_path, rows)
    (ax,) = figure.axes
    assert ax.get_ylabel() == "share found"
    expected = [interval(row) for row in rows[:2]]
    assert bars_of(ax) == [pytest.approx(bounds) for bounds in sorted(expected)]
    assert legend["dash, trained at 1"].get_marker() == METHODS["dash"][1]
    assert legend["dash, trained at 1"].get_color() == METHODS["dash"][0]
    assert "95 % interval over samples" in legend
    assert not any(text.startswith("no bar") for text in legend)


def test_seeds_that_differ_are_the_interval_and_a_bar_that_lacks_is_explained(monkeypatch, tmp_path):
    seeds = [make_row(knob=k, score=v, sparsity=k / 9, seed=s) for k in (1.0, 2.0) for s, v in ((0, 0.9), (1, 0.7))]
    figure, legend = drawn(monkeypatch, tmp_path, seeds)
    assert bars_of(figure.axes[0]) == [(pytest.approx(0.1), pytest.approx(0.3))] * 2  # of wrong answers
    assert figure.axes[0].get_ylabel() == "queries answered wrong"
    assert figure.axes[0].get_title().endswith("\nno dense control of 99 % or more")
    assert "lowest to highest of 2 seeds" in legend
    assert "fewer seeds" not in legend
    _, legend = drawn(monkeypatch, tmp_path, seeds[:-1])
    assert "fewer seeds" in legend
    _, legend = drawn(monkeypatch, tmp_path, [*seeds, make_row("full", None, 0.0, 1.0)])
    assert not any(text.startswith("no bar") for text in legend)  # a level has none
    _, legend = drawn(monkeypatch, tmp_path, [row for row in seeds if row["seed"] == 0])
    assert "no bar: samples' scatter not kept" in legend


def test_bars_say_what_they_are_of():
    shares = {"metric": "match", "task": "vt", "rows": 25}
    single = [make_row(knob=1.0, **shares)]
    seeds = [make_row(knob=2.0, seed=seed, **shares) for seed in (0, 1, 2)]
    several, samples = "lowest to highest of 3 seeds", "95 % interval over samples"
    for rows, said in (
        (single, samples),
        (seeds, several),
        (single + seeds, f"{several}; {samples}"),
        ([make_row()], ""),
        ([make_row(), *seeds], several),
    ):
        assert pareto.bars(frontier.points(rows)) == said


def test_a_loss_has_no_bar_of_its_rows_which_all_lines_share(monkeypatch, tmp_path):
    by_row = {"nats": [1.0, 2.0, 6.0], "targets": [1, 1, 1]}
    loss = {"task": "loss", "metric": "nats", "by_row": by_row}
    rows = [make_row(knob=k, sparsity=s, score=3.0, **loss) for k, s in ((1.0, 0.5), (2.0, 0.7))]
    assert interval(rows[0]) is not None
    figure, legend = drawn(monkeypatch, tmp_path, rows)
    assert bars_of(figure.axes[0]) == []
    assert not any("95 %" in text or text.startswith("no bar") for text in legend)


def test_weights_that_nothing_was_trained_of_have_a_panel_of_their_own():
    before = {"untrained": "smollm2", "step": 0, "trained_knob": None}
    rows = [make_row(score=0.7), make_row(score=0.1, **before), make_row(score=0.2, variant="packed", **before)]
    assert {p.panel.title: p.score for p in frontier.points(rows)} == {
        "mqar: recall, accuracy, 512 tokens": 0.7,
        "mqar: recall, accuracy, 512 tokens, untrained": 0.1,
        "mqar: recall, accuracy, 512 tokens, packed, untrained": 0.2,
    }


def test_the_mean_of_tasks_scatters_less_than_each_of_them():
    rows = [make_row(task=task, metric="match", score=0.5, rows=100) for task in ("vt", "cwe", "fwe", "qa_1")]
    (average,) = frontier.ruler_averages(rows)
    assert average["stderr"] == pytest.approx(0.05 / 2)
    assert average["samples"] == 400
    one, four = (high - low for low, high in (interval(rows[0]), interval(average)))
    assert four == pytest.approx(one / 2, rel=0.05)
