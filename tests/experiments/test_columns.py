"""What rows may hold: every column with values that can stand in it, and with such as cannot."""

import math

import pytest

from experiments.columns import CELL_ROWS, METRIC_ROWS, RESULT_ROWS

TEXTS = (
    *("task", "metric", "label", "backend", "checkpoint", "config_hash", "data", "date", "device", "git_sha", "run"),
    *("knob_name", "probe", "set", "sparsity_count", "trained_sparsity_count", "untrained", "differs", "weights"),
)
NUMBERS = (
    *("score", "stderr", "p10", "p90", "length", "knob", "trained_knob", "target_sparsity", "trained_sparsity"),
    *("paper_sparsity", "causal_sparsity", "active_tokens", "routing_reads", "bytes_read", "step", "tokens", "seed"),
    *("parameters", "rows", "depth", "relevant", "samples", "seconds", "counted"),
)
LISTS = ("causal_sparsity_per_layer", "active_tokens_per_layer", "routing_reads_per_layer", "per_head")
NEVER_NULL = ("task", "metric", "score", "label", "length", "causal_sparsity", "data", "checkpoint")
REQUIRED = ("task", "metric", "score", "label", "length", "knob", "trained_knob", "causal_sparsity", "data")


@pytest.mark.parametrize(
    ("columns", "fit", "misfit"),
    [
        (TEXTS, ("", "x"), (3, 1.5, True, ["x"], {})),
        (NUMBERS, (0, -1, 2.5, 2**63 - 1), ("3", True, math.nan, math.inf, 2**63, [1.0], {})),
        (LISTS, ([], [0.5, None], [[1, None], [2.0]], [math.inf]), (1.0, "x", ["x"], [[True]], {})),
    ],
)
def test_values_of_results(columns, fit, misfit):
    for column in columns:
        assert [value for value in fit if RESULT_ROWS.misfits({column: value})] == [], column
        assert [value for value in misfit if not RESULT_ROWS.misfits({column: value})] == [], column
        assert RESULT_ROWS.misfits({column: None}) == [column] * (column in NEVER_NULL)
    assert RESULT_ROWS.misfits({"of_a_package": {"any": [3]}, columns[0]: misfit[0], "x": None}) == [columns[0]]


def test_columns_that_all_rows_have():
    assert RESULT_ROWS.lacking({}) == list(REQUIRED)
    for column in REQUIRED:
        assert RESULT_ROWS.lacking(dict.fromkeys(set(REQUIRED) - {column})) == [column]
    assert METRIC_ROWS.lacking({"loss": 1.0}) == ["step", "split"]
    assert CELL_ROWS.lacking({"other": 1}) == ["run", "commands"]


def test_values_of_metrics_and_cells():
    row = {"step": 3, "split": "train", "run": "a", "loss": math.inf, "lr": 1, "alpha_per_layer": [1.0, None]}
    assert METRIC_ROWS.misfits(row) == []
    wrong = {"step": 2.0, "split": 3, "run": None, "loss": "1", "lr": [1.0], "alpha_per_layer": 1.0, "tokens": None}
    assert METRIC_ROWS.misfits(wrong) == list(wrong)
    for step in (True, 2**63, 1.0, "1"):
        assert METRIC_ROWS.misfits({"step": step, "grad_norm": 2**63}) == ["step", "grad_norm"]
    assert CELL_ROWS.misfits({"run": "a", "commands": [["train", "x=1"], []], "seconds": None, "other": 3}) == []
    for commands in (None, "train", ["train"], [["train", 3]], [None]):
        assert CELL_ROWS.misfits({"run": None, "commands": commands}) == ["run", "commands"]
