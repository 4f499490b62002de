"""Errors against float64: sizes that each precision allows, and nothing measured twice."""

import pytest

from experiments.files import read_rows
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
    errors = {(row["backend"], row["tensor"], row["dtype"]): row["error"] for row in rows}
    assert all(errors[name, "out", "bf16"] > 10 * errors[name, "out", "fp32"] for name in ("full", "nsa"))
    assert write_numerics(tmp_path, 150) == 0


def test_usage(capsys):
    with pytest.raises(SystemExit):
        main([])
    assert "usage" in capsys.readouterr().err
