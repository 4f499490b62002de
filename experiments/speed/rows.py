"""Rows of the speed benchmark: what stands in them, and every ratio against dense attention of the same run."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

FORWARD, BOTH = PASSES = ("forward", "forward+backward")
# One token against a cache: a layer's attention, whose row has the time of one layer, and a whole model.
DECODE, MODEL_DECODE = DECODE_PASSES = ("decode", "decode, whole model")
DENSE, ROUTING, ATTENTION, WHOLE = STAGES = ("dense", "routing", "attention", "whole")
CUDNN, FLASH_3 = "SDPA cuDNN", "FlashAttention-3"
FULL = "full"  # this library's own dense decoding
# Where FlashAttention-3 cannot be had, cuDNN's time multiplied by this stands for it.
CUDNN_FACTORS = {"forward": 0.95, "forward+backward": 0.90}
SETUP = ("device", "heads", "kv_heads", "head_dim", "chunk_size", "dtype")
CASE = ("length", "pattern", "sparsity", "stage", "method", "pass")
PATTERNS = {"shared": "-", "clustered": "--", "iid": ":"}  # and how their lines are drawn


@dataclass(frozen=True)
class Curve:
    """A whole operation over the lengths."""

    method: str
    pattern: str
    sparsity: float
    rows: tuple[dict, ...]  # ascending length

    @property
    def label(self) -> str:
        return f"{self.method}, {self.pattern}"


def batch(row: dict) -> int:
    """Sequences; only rows that decode have more than one."""
    return row.get("batch", 1)


def model_of(row: dict) -> int | None:
    """What tells whole models with heads of one shape apart, their layers; None of what is no model."""
    return row.get("layers") if row["pass"] == MODEL_DECODE else None


def newest(rows: Iterable[dict]) -> list[dict]:
    """Of rows about the same thing on the same device the one written last; running out of time unsays nothing."""
    kept: dict[tuple, dict] = {}
    for row in rows:
        key = (*(row[name] for name in (*SETUP, *CASE)), batch(row), model_of(row))
        if key not in kept or row["status"] != "out of time":
            kept[key] = row
    return list(kept.values())


def dense_times(rows: Iterable[dict]) -> dict[tuple, tuple[float, float, str]]:
    """(run, shape, length, batch, pass) -> (milliseconds of dense attention, as a CUDA graph too, what they are)."""
    times: dict[tuple, tuple[float, float, str]] = {}
    for row in rows:
        if row["status"] != "ok" or row["stage"] != DENSE:
            continue
        key = _case_of_dense(row)
        called, graph = row["ms"], row.get("graph_ms") or row["ms"]
        if row["method"] == FLASH_3:
            times[key] = (called, graph, FLASH_3)
        elif row["method"] == FULL:
            times.setdefault(key, (called, graph, "our full attention"))
        elif row["method"] == CUDNN and row["pass"] in CUDNN_FACTORS:
            factor = CUDNN_FACTORS[row["pass"]]
            times.setdefault(key, (called * factor, graph * factor, f"cuDNN x {factor:.2f}"))
    return times


def _case_of_dense(row: dict) -> tuple:
    return (row["run"], *(row[name] for name in SETUP), row["length"], batch(row), row["pass"])


def with_ratios(rows: Sequence[dict]) -> list[dict]:
    """The newest rows, each with ``against`` and the time of dense attention over its own, None if unknown.

    ``ratio`` is of calls, ``graph_ratio`` of their replay as a CUDA graph where that was measured: of both, or against
    a row of calls, which for as long as dense attention takes hide what the host does.
    """
    times = dense_times(rows)
    found = []
    for row in newest(rows):
        dense, dense_graph, against = times.get(_case_of_dense(row), (None, None, None))
        ratio = dense / row["ms"] if dense and row["status"] == "ok" else None
        graph = row.get("graph_ms")  # rows written before graphs were measured lack it
        graph_ratio = dense_graph / graph if ratio and graph else None
        found.append(row | {"ratio": ratio, "graph_ratio": graph_ratio, "against": against})
    return found


def curves(rows: Iterable[dict], name: str) -> list[Curve]:
    """The measured whole operations of one pass."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["stage"] == WHOLE and row["pass"] == name and row["status"] == "ok":
            groups.setdefault((row["method"], row["pattern"], row["sparsity"]), []).append(row)
    order = list(PATTERNS)
    keys = sorted(groups, key=lambda key: (key[0], key[2], order.index(key[1])))
    return [Curve(*key, tuple(sorted(groups[key], key=lambda row: row["length"]))) for key in keys]


def setups(rows: Iterable[dict]) -> dict[tuple, list[dict]]:
    """Rows by device and shape: nothing is compared between two of these."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in SETUP), []).append(row)
    return groups
