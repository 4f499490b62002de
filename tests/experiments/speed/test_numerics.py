"""Errors against float64: sizes that each precision allows, and nothing measured twice."""

import re

import pytest
import torch

from dashattn.backends import build_backend
from experiments.arguments import parse, parser
from experiments.files import read_rows
from experiments.provenance import device_name, git_state
from experiments.speed import numerics
from experiments.speed.numerics import CONFIGS, main, write_numerics

WITHOUT_ROUTER = ("full", "sink_window", "oracle")


def test_errors_are_of_the_size_of_the_precision(tmp_path):
    assert write_numerics(tmp_path, 150) == len(CONFIGS) * 2 * 4
    rows = read_rows(tmp_path / "numerics.jsonl")
    assert {row["tensor"] for row in rows} == {"out", "dq", "dk", "dv"}
    for row in rows:
        if row["dtype"] == "fp32" and not row["rows_selected_differently"]:
            assert 0 < row["error"] < 1e-3, row
        assert row["error"] < 0.5, row
        assert (row["rows_selected_differently"] is None) == (row["backend"] in WITHOUT_ROUTER)
    told = {"device": device_name("cpu"), "impl": "reference", "length": 150, "torch": torch.__version__}
    told |= {"git_sha": git_state()[0]["sha"], "dirty": git_state()[0].get("dirty", False)}
    assert all(re.match(r"\d{4}-\d\d-\d\dT", row["date"]) for row in rows)
    assert torch.cuda.is_available() or all({name: row[name] for name in told} == told for row in rows)
    errors = {(row["backend"], row["tensor"], row["dtype"]): row["error"] for row in rows}
    assert all(errors[name, "out", "bf16"] > 10 * errors[name, "out", "fp32"] for name in ("full", "nsa"))
    assert write_numerics(tmp_path, 150) == 0


def test_the_same_is_measured_again():
    first, again = (list(numerics.measure("full", "bf16", 8, "cpu")) for _ in range(2))
    assert first == again


def test_a_row_is_selected_differently_where_any_of_its_words_is(monkeypatch):
    words = torch.zeros(1, 2, 2, 2, dtype=torch.int32)  # of two heads and two tokens
    other = words.clone()
    other[0, 1, 0, 1] = 1
    found = iter((({"out": torch.tensor([3.0, 4.0])}, words), ({"out": torch.tensor([3.0, 4.5])}, other)))
    monkeypatch.setattr(numerics, "_run", lambda *_: next(found))
    (row,) = numerics.measure("infllmv2", "fp32", 8, "cpu")
    assert row == {"tensor": "out", "error": 0.1, "rows_selected_differently": 0.25}


def test_gradients_are_of_what_they_are_called_by():
    backend = build_backend(CONFIGS["full"], numerics.SHAPE).double()
    q, k, v, grad = (torch.randn(1, 5, heads, 64, dtype=torch.double) for heads in (8, 2, 2, 8))
    found, _ = numerics._run(backend, {"q": q, "k": k, "v": v, "hidden": None, "out": grad})
    own = torch.autograd.grad(backend(q, k, v, hidden=None), (q, k, v), grad)
    for name, expected in zip(("dq", "dk", "dv"), own, strict=True):
        torch.testing.assert_close(found[name], expected)


def test_the_length_is_what_the_help_says():
    given = parse("experiments.speed.numerics", ["rows"])
    assert given.length == 1000
    assert "tokens of a row (1000)" in parser("experiments.speed.numerics").format_help()


def test_usage(capsys):
    for arguments, said in (([], "usage"), (["rows", "0"], "LENGTH is 0: at least 1 is needed")):
        with pytest.raises(SystemExit):
            main(arguments)
        assert said in capsys.readouterr().err
