"""A method looks the same in every figure."""

import re

import pytest
from matplotlib.lines import Line2D
from PIL import Image

from dashattn.backends import BACKENDS
from experiments.plots import (
    BLACK,
    COLOURS,
    MARKS,
    METHODS,
    entitle,
    from_zero,
    grid,
    legend_below,
    method_of,
    plain_log,
    pyplot,
    save,
    styles,
)

OKABE_ITO = {"#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"}


def test_colours_are_told_apart_by_all_readers_and_no_two_methods_look_alike():
    assert {*COLOURS, BLACK} - {"#999999"} == OKABE_ITO
    assert {colour for colour, _ in METHODS.values()} <= {*COLOURS, BLACK}
    own = {name: style for name, style in METHODS.items() if name != "oracle-topk"}  # an oracle like the other
    assert len(set(own.values())) == len(own)
    assert {mark for _, mark in METHODS.values()} <= {*MARKS, "x"}  # which is dense attention's alone
    assert [name for name, (_, mark) in METHODS.items() if mark == "x"] == ["full"]
    assert set(MARKS) <= {mark for mark in Line2D.filled_markers if isinstance(mark, str)}


def test_every_backend_has_a_style_of_its_own():
    own = {name for name, (config, _) in BACKENDS.items() if config.__module__.startswith("dashattn.")}
    assert {name.replace("_", "-") for name in own} <= METHODS.keys()


@pytest.mark.parametrize(
    ("label", "method"),
    [
        ("dash", "dash"),
        ("dash_sink", "dash-sink"),
        ("dash-sink-window", "dash-sink-window"),  # not the window with a sink
        ("dash-raw-lr:1e-3", "dash-raw"),
        ("recall-dash-raw-knob4-seed0", "dash-raw"),
        ("real-dash-topk-sink-tempered-seed0", "dash-topk-sink-tempered"),
        ("full, untrained", "full"),
        ("infllmv2 (topk 12)", "infllmv2"),
        ("nsa (topk 12)", "nsa"),
        ("XunhaoLai NSA, no window", "xunhaolai-nsa,-no-window"),
        ("dashboard", None),
        ("sigma:1e2", None),
        ("recall-base-seed0", None),
        ("continued-topk-tempered-seed1", "topk"),
        ("index-prior-topp-lr:1e-3", "index"),
        ("entmax-none, trained at 75% held", "entmax"),
    ],
)
def test_labels_and_runs_name_their_method(label, method):
    assert method_of(label) == method


def test_a_method_looks_the_same_whatever_is_drawn_beside_it():
    alone = styles(["infllmv2"])
    many = styles(
        ["dash", "dash-untrained", "infllmv2", "infllmv2, untrained", "nsa", "a", "b", "dash (router_scale 4)"]
    )
    assert alone["infllmv2"] == many["infllmv2"] == METHODS["infllmv2"]
    assert len(set(many.values())) == len(many)
    assert {many[name][0] for name in many if name.startswith("dash")} == {METHODS["dash"][0]}
    for name in set(many) - METHODS.keys():  # no variant looks like another method
        assert many[name] not in METHODS.values()


def test_the_shortest_label_of_a_method_has_its_mark():
    found = styles(["dash with more words", "dash zz"])
    assert found["dash zz"] == METHODS["dash"]
    assert found["dash with more words"][0] == METHODS["dash"][0]


def test_lines_that_name_no_method_are_told_apart_by_colour_and_by_mark():
    found = styles([f"alpha {value}" for value in range(6)]).values()
    assert len({colour for colour, _ in found}) == len({mark for _, mark in found}) == 6


def test_an_axis_from_zero_holds_the_highest_mark_and_numbers_stand_in_place_of_powers():
    figure, (ax, beside) = grid(2)
    ax.plot([1, 2], [0.9, 1.0], marker="o")
    from_zero(ax)
    assert ax.get_ylim() == (0, pytest.approx(1.08))
    for top, said in (
        (50, {"1", "2", "5", "10", "20", "50"}),
        (500, {"1", "10", "100"}),
        (5000, {"1", "10", "100", "1000"}),
    ):
        beside.clear()
        beside.plot([1, 2], [1, top])
        beside.set_yscale("log")
        plain_log(beside.yaxis)
        figure.draw_without_rendering()
        low, high = beside.get_ylim()
        shown = [t.get_text() for v, t in zip(beside.get_yticks(), beside.get_yticklabels(), strict=True)]
        assert {s for v, s in zip(beside.get_yticks(), shown, strict=True) if low <= v <= high} == said
        assert not any(t.get_text() for t in beside.get_yticklabels(minor=True))
    pyplot().close(figure)


def test_titles_fit_over_a_panel_and_files_hold_no_date(tmp_path):
    figure, (ax,) = grid(1)
    entitle(ax, "one line\n" + "ab " * 20)
    assert ax.get_title() == "one line\n" + "ab " * 17 + "ab\nab ab"
    ax.plot([0, 1], label="a")
    for name in ("first", "second"):
        save(figure, tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.pdf", "first.png", "second.pdf", "second.png"]
    for kind in ("pdf", "png"):
        assert (tmp_path / f"first.{kind}").read_bytes() == (tmp_path / f"second.{kind}").read_bytes()
    assert b"CreationDate" not in (tmp_path / "first.pdf").read_bytes()
    with Image.open(tmp_path / "first.png") as picture:
        assert picture.size == (round(7.2 * 160), round(3.2 * 160))
    assert not pyplot().fignum_exists(figure.number)


def test_more_lines_than_styles_still_have_one():
    found = styles([f"run-{i}" for i in range(200)] + [f"dash {i}" for i in range(50)])
    assert len(found) == 250
    assert all(re.fullmatch(r"#[0-9A-F]{6}", colour) for colour, _ in found.values())


def test_a_legend_is_no_wider_than_its_figure():
    figure, (ax,) = grid(1)
    handles = {f"a line of a name that is long enough, {number}": ax.plot([number])[0] for number in range(9)}
    legend_below(figure, handles, columns=4)
    figure.canvas.draw()
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 9
    assert 1 < legend._ncols < 4
    box = legend.get_window_extent()
    assert figure.bbox.x0 <= box.x0
    assert box.x1 <= figure.bbox.x1
    short, _ = grid(1)
    legend_below(short, dict(zip("abcdefghi", handles.values(), strict=True)), columns=4)
    assert short.legends[0]._ncols == 4
