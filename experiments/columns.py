"""What rows say and what their columns may hold, so that a damaged row is named where it is read, and not where it is
drawn."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Columns:
    """Of one kind of rows.

    Attributes:
        required: all rows have them.
        kinds: of a column, whether a value can stand in it.
        other: the same of a column and a value where ``kinds`` has no such column.
        never_null: null stands in none of these, nor in any where ``nullable`` is false.
    """

    required: Collection[str]
    kinds: Mapping[str, Callable[[object], bool]]
    other: Callable[[str, object], bool] = lambda column, value: True
    never_null: Collection[str] = ()
    nullable: bool = True

    def lacking(self, row: dict) -> list[str]:
        return [column for column in self.required if column not in row]

    def misfits(self, row: dict) -> list[str]:
        """The columns of a row that hold what they cannot."""
        return [column for column, value in row.items() if not self._fits(column, value)]

    def _fits(self, column: str, value: object) -> bool:
        if value is None:
            return self.nullable and column not in self.never_null
        return self.kinds[column](value) if column in self.kinds else self.other(column, value)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_number(value: object) -> bool:
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**63)


def _is_finite(value: object) -> bool:
    return _is_number(value) and math.isfinite(value)


def _is_step(value: object) -> bool:
    return type(value) is int and _is_number(value)


def _holds_numbers(value: object) -> bool:
    """null is a head or a layer that had nothing to measure."""
    return all(map(_holds_numbers, value)) if isinstance(value, list) else value is None or _is_number(value)


def _are_numbers(value: object) -> bool:
    return isinstance(value, list) and _holds_numbers(value)


def are_texts(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def are_commands(value: object) -> bool:
    return isinstance(value, list) and all(map(are_texts, value))


METRIC_ROWS = Columns(
    required=("step", "split"),
    kinds={"split": _is_text, "run": _is_text, "step": _is_step},
    # Everything else is measured; in 16 bits a gradient may be infinite.
    other=lambda column, value: isinstance(value, list) == column.endswith("_per_layer") and _holds_numbers(value),
    nullable=False,
)
# A column that stands nowhere here, of a task that came with a package say, may hold anything.
RESULT_ROWS = Columns(
    required=("task", "metric", "score", "label", "length", "knob", "trained_knob", "causal_sparsity", "data"),
    kinds=dict.fromkeys(
        (
            *("task", "metric", "label", "backend", "checkpoint", "config_hash", "data", "date", "device", "git_sha"),
            *("run", "knob_name", "probe", "set", "sparsity_count", "trained_sparsity_count", "untrained", "differs"),
            *("text", "weights"),
        ),
        _is_text,
    )
    | dict.fromkeys(
        (
            *("score", "stderr", "p10", "p90", "length", "knob", "trained_knob", "target_sparsity", "trained_sparsity"),
            *("paper_sparsity", "causal_sparsity", "active_tokens", "routing_reads", "bytes_read", "step", "tokens"),
            *("seed", "parameters", "rows", "depth", "relevant", "samples", "seconds", "counted"),
        ),
        _is_finite,
    )
    | dict.fromkeys(
        (
            *("causal_sparsity_per_layer", "active_tokens_per_layer", "routing_reads_per_layer", "per_head"),
            "by_sample",
        ),
        _are_numbers,
    ),
    never_null=("task", "metric", "score", "label", "length", "causal_sparsity", "data", "checkpoint"),
)
CELL_ROWS = Columns(
    required=("run", "commands"), kinds={"run": _is_text, "commands": are_commands}, never_null=("run", "commands")
)
