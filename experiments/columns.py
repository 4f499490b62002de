"""What the columns of rows may hold, so that a damaged row is named where it is read, and not where it is drawn."""

import math

# Of each kind of rows. A column that stands nowhere here, of a task that came with a package say, may hold anything.
_TEXTS = {
    "metrics.jsonl": {"split", "run"},
    "results.jsonl": {
        *("task", "metric", "label", "backend", "checkpoint", "config_hash", "data", "date", "device", "git_sha"),
        *("run", "knob_name", "probe", "set", "sparsity_count", "trained_sparsity_count", "untrained", "differs"),
        "weights",
    },
    "cells.jsonl": {"run"},
}
_NUMBERS = {
    "results.jsonl": {
        *("score", "stderr", "p10", "p90", "length", "knob", "trained_knob", "target_sparsity", "trained_sparsity"),
        *("paper_sparsity", "causal_sparsity", "active_tokens", "routing_reads", "bytes_read", "step", "tokens"),
        *("seed", "parameters", "rows", "depth", "relevant", "samples", "seconds"),
    },
}
_LISTS = {
    "results.jsonl": {"causal_sparsity_per_layer", "active_tokens_per_layer", "routing_reads_per_layer", "per_head"},
    "cells.jsonl": {"commands"},
}
_NEVER_NULL = {
    "results.jsonl": {"task", "metric", "score", "label", "length", "causal_sparsity", "data", "checkpoint"},
    "cells.jsonl": {"run", "commands"},
}


def misfits(name: str, row: dict) -> list[str]:
    """The columns of a row of the file ``name`` that hold what they cannot."""
    texts, numbers, lists = (kinds.get(name, set()) for kinds in (_TEXTS, _NUMBERS, _LISTS))

    def fits(column: str, value: object) -> bool:
        if value is None:
            return name != "metrics.jsonl" and column not in _NEVER_NULL.get(name, ())
        if column in texts:
            return isinstance(value, str)
        if column in numbers:
            return _is_number(value) and math.isfinite(value)
        if column in lists:
            return isinstance(value, list) and (_holds_numbers if name == "results.jsonl" else _are_commands)(value)
        if name != "metrics.jsonl":
            return True
        if column == "step":
            return type(value) is int and _is_number(value)
        # Of a run's metrics everything else is measured; in 16 bits a gradient may be infinite.
        return isinstance(value, list) == column.endswith("_per_layer") and _holds_numbers(value)

    return [column for column, value in row.items() if not fits(column, value)]


def _is_number(value: object) -> bool:
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**63)


def _are_commands(value: list) -> bool:
    return all(isinstance(command, list) and all(isinstance(word, str) for word in command) for command in value)


def _holds_numbers(value: object) -> bool:
    """null is a head or a layer that had nothing to measure."""
    return all(map(_holds_numbers, value)) if isinstance(value, list) else value is None or _is_number(value)
