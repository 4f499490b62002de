"""How fast a run trains on a kind of GPU: a model of a step's time, fitted to the committed rows of train.py's steps.

The time of a token is a sum, of what matrices multiply, of what attention reads, of what its router scores and of the
passes over activations around them. Operations come from ``models.flops``; the rate at which each kind of work goes is
fitted, not negative, to the rows of throughput.jsonl and parallel.jsonl of one kind of GPU (least squares of relative
errors, Lawson and Hanson 1974). What several GPUs lose is the median of the rows of so many.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median

import numpy as np
from hydra import compose
from scipy.optimize import nnls

from experiments.config import TrainConfig, to_train_config
from experiments.files import ROOT, SCALING, THROUGHPUT, read_rows
from experiments.training.check import accumulation
from experiments.training.memory import meta_model
from experiments.training.utilisation import PEAK_TFLOPS
from models import Transformer
from models.flops import count_parameters, matmul_parameters

MEMORY_TBPS = 3.35  # only the unit of the passes: what is fitted is a multiple of it
MATMUL = ("matmul", "")
_OF_LAYERS = ("compiled", "eager")  # passes beside attention
# Of a step's matrix products, over their time at the peak: they went at 700 of 989 TFLOP/s on an H100, see
# results/throughput_h100/NOTES.md. All rows are of models of one size, which cannot tell them from the passes.
MATMUL_COST = 989.4 / 700
# Parameters; the rows' models have 380 to 406 million.
SMALL, LARGE = 1e8, 2e9
# Seconds below which no micro-batch was measured to take in models of 4 layers or more that are not compiled, since the
# host launches their kernels: as likely, least and most. Of the dense bases in results/ablations_h200, rates_h200 and
# text_h200, of 12 million parameters in 4 layers, which had a GPU alone, and by the fit work for 16 ms.
LAUNCH = (0.021, 0.017, 0.031)


@dataclass(frozen=True)
class Row:
    """A measured step.

    Attributes:
        work: kind -> seconds a token, if each kind of work went at the GPU's peak.
        rate: tokens a second of one GPU.
        way: how several GPUs share the work, None for one.
    """

    device: str
    backend: str
    compile: bool
    work: dict[tuple, float]
    rate: float
    way: tuple | None
    source: str


@dataclass(frozen=True)
class Rate:
    """Tokens a second of all GPUs together; ``least`` and ``most`` are as far off as the rows are from the model."""

    tokens_per_s: float
    least: float
    most: float
    notes: tuple[str, ...]


def kind_of(device: str) -> tuple[str, float]:
    """The kind of a GPU by its name, and its peak in TFLOP/s.

    Raises:
        ValueError: it is not known.
    """
    for name, peak in PEAK_TFLOPS:
        if name in device:
            return name, peak
    raise ValueError(f"gpu={device} is not known: choose from {', '.join(name for name, _ in PEAK_TFLOPS)}")


def work_of(
    model: Transformer, peak: float, reads: Sequence[tuple[float, float]], *, compiled: bool, checkpointed: bool
) -> dict[tuple, float]:
    """Kind of work -> seconds a token at ``peak`` TFLOP/s.

    Args:
        reads: of each layer, keys and summaries that a token reads, per KV head.
        checkpointed: the forward pass of the layers runs twice.
    """
    config, work = model.config, {}

    def add(kind: tuple, forward: float, backward: float) -> None:
        again = forward if checkpointed else 0.0
        work[kind] = work.get(kind, 0.0) + (forward + backward + again) / (peak * 1e12)

    def add_passes(kind: tuple) -> None:
        work[kind] = work.get(kind, 0.0) + 2 * config.hidden_size / (MEMORY_TBPS * 1e12)

    multiplied = 2 * matmul_parameters(config)
    add(MATMUL, multiplied, 2 * multiplied)
    for backend, (keys, summaries) in zip(model.backends, reads, strict=True):
        name = backend.config.name
        none, read, scored = (backend.flops(*x) for x in ((0.0, 0.0), (keys, 0.0), (keys, summaries)))
        add(MATMUL, none.forward, none.backward)
        add(("attention", name), read.forward - none.forward, read.backward - none.backward)
        add(("router", name), scored.forward - read.forward, scored.backward - read.backward)
        add_passes(("passes", "compiled" if compiled else "eager"))
        if backend.config.knob is not None:
            add_passes(("passes", name))
    return {kind: seconds for kind, seconds in work.items() if seconds > 0}


@cache
def rows() -> tuple[Row, ...]:
    """Of all committed rows those that were measured; where one case was with several versions, the newest's.

    To be called where Hydra's ``compose`` may be.
    """
    paths = sorted(path for name in (THROUGHPUT, SCALING) for path in (ROOT / "results").glob(f"*/{name}"))
    newest: dict[tuple, dict[str, list[tuple[str, Row]]]] = {}
    for path in paths:
        for row in read_rows(path):
            if row["status"] != "ok" or "parameters" not in row:
                continue
            row |= {key: row.get(key, default) for key, default in (("ranks", 1), ("stage", 1), ("shares_rows", False))}
            case = tuple(
                row[key] for key in ("device", "backend", "length", "ranks", "stage", "shares_rows", "compile")
            )
            kept = newest.setdefault((*case, path), {})
            kept.setdefault(row["git_sha"], []).append((row["date"], _measured(row, path)))
    found = []
    for versions in newest.values():
        latest = max(versions.values(), key=lambda dated: max(date for date, _ in dated))
        found += [row for _, row in latest]
    return tuple(found)


def _measured(row: dict, path: Path) -> Row:
    model = _model_of(tuple(x for x in row["train"] if x.startswith("model")), row["backend"])
    causal = (row["length"] + 1) / 2
    reads = [
        (causal * (1 - sparsity), summaries)
        for sparsity, summaries in zip(row["causal_sparsity_per_layer"], row["routing_reads_per_layer"], strict=True)
    ]
    work = work_of(
        model,
        kind_of(row["device"])[1],
        reads,
        compiled=row["compile"],
        checkpointed=row["activation_checkpointing"],
    )
    way = None if row["ranks"] == 1 else (row["stage"], row["shares_rows"])
    rate = row["tokens_per_s"] / row["ranks"]
    return Row(kind_of(row["device"])[0], row["backend"], row["compile"], work, rate, way, path.parent.name)


@cache
def _model_of(chosen: tuple[str, ...], backend: str) -> Transformer:
    return meta_model(to_train_config(compose("train", [*chosen, f"attention={backend}"])))


@dataclass(frozen=True)
class Fit:
    """What work costs.

    Attributes:
        cost: of each kind of work, a multiple of its time at the peak.
        slowness: of each kind of GPU, a factor of its time.
        rows: what it was fitted to.
    """

    cost: dict[tuple, float]
    slowness: dict[str, float]
    rows: tuple[Row, ...]

    def seconds(self, work: dict[tuple, float], device: str) -> float:
        """Of a token on one GPU alone. KeyError for a kind of work that no row has."""
        return self.slowness[device] * sum(self.cost[kind] * seconds for kind, seconds in work.items())

    def ratio(self, row: Row) -> float:
        """A measured rate over the model's."""
        return row.rate * self.seconds(row.work, row.device) / self.share(row.way, row.backend)

    def share(self, way: tuple | None, backend: str) -> float:
        """What a GPU keeps of its rate among others: the median of the rows, of this backend where there are such."""
        if way is None:
            return 1.0
        of_way = [row for row in self.rows if row.way == way]
        of_both = [row for row in of_way if row.backend == backend] or of_way
        return median(row.rate * self.seconds(row.work, row.device) for row in of_both)


def fit(measured: Iterable[Row]) -> Fit:
    """Costs with which the model comes closest to the rows of one GPU alone, whatever its kind."""
    measured = tuple(measured)
    alone = [row for row in measured if row.way is None]
    kinds = sorted({kind for row in alone for kind in row.work} - {MATMUL})
    relative = np.array([[row.work.get(kind, 0.0) * row.rate for kind in kinds] for row in alone])
    left = np.array([1 - MATMUL_COST * row.work[MATMUL] * row.rate for row in alone])
    scale = relative.max(0)
    found, _ = nnls(relative / scale, left)
    cost = {MATMUL: MATMUL_COST} | dict(zip(kinds, (found / scale).tolist(), strict=True))
    slowness = {}
    for device in {row.device for row in alone}:
        own = [row for row in alone if row.device == device]
        slowness[device] = 1 / median(row.rate * sum(cost[k] * s for k, s in row.work.items()) for row in own)
    return Fit(cost, slowness, measured)


def slowest(cost: dict[tuple, float], what: str) -> float:
    """The most that this kind of a backend's work costs; passes of layers, which all have, are none."""
    return max(value for (kind, name), value in cost.items() if kind == what and name not in _OF_LAYERS)


def estimate_rate(
    config: TrainConfig, model: Transformer, ranks: int, device: str, sparsity: float, measured: Sequence[Row]
) -> Rate:
    """Tokens a second of a run on ``ranks`` GPUs of the kind ``device``.

    Args:
        model: of this configuration; it may lie on the meta device.
        sparsity: causal, of the layers whose attention is sparse.
        measured: ``rows()``.

    Raises:
        ValueError: the kind of GPU is not known, or no row is committed.
    """
    if not measured:
        raise ValueError("no committed rows to tell a rate by: run `dashattn throughput` on a GPU")
    kind, peak = kind_of(device)
    found, notes = fit(measured), []
    if kind not in found.slowness:
        others = " and ".join(sorted(found.slowness))
        notes.append(f"no rows of this kind of GPU: the share of the peak that {others} reach")
    like = kind if kind in found.slowness else max(found.slowness, key=found.slowness.get)
    length = config.data.seq_len
    reads = [
        ((length + 1) / 2 * (1 - (sparsity if backend.config.knob else 0.0)), backend.summaries_scored(length))
        for backend in model.backends
    ]
    work = work_of(model, peak, reads, compiled=config.compile, checkpointed=config.activation_checkpointing)
    cost = dict(found.cost)
    for what, name in work.keys() - cost.keys():
        cost[what, name] = slowest(found.cost, what)
        notes.append(f"no rows of {name}: its {what} as the slowest of the others")
    seconds = Fit(cost, found.slowness, found.rows).seconds(work, like)
    names = {backend.config.name for backend in model.backends}
    way = None if ranks == 1 else (config.deepspeed.stage, config.sequence_parallel > 1)
    share = 1.0
    if way in {row.way for row in measured}:
        share = min(found.share(way, name) for name in names)
    else:
        notes.append("no rows of GPUs that share work this way: nothing is taken off for it")
    if ranks > 2:
        notes.append("more than 2 GPUs were not measured: as 2 of one host")
    parameters = count_parameters(model)
    if parameters < SMALL:
        notes.append("no rows of a model this small")
    elif parameters > LARGE:
        notes.append("no rows of a model this large")
    off = [found.ratio(row) for row in measured if row.backend in names] or [found.ratio(row) for row in measured]
    rate = ranks * share / seconds
    rates = [rate, rate * max(off), rate * min(off)]
    if not config.compile:
        rows_, _ = accumulation(config, ranks)
        tokens = ranks * rows_ * length // config.sequence_parallel
        launched = [tokens / seconds for seconds in LAUNCH]
        if launched[0] < rate:
            notes.append(
                "the host's launching of kernels bounds it: longer micro-batches or compile=true may be faster"
            )
        rates = [min(pair) for pair in zip(rates, launched, strict=True)]
    return Rate(rates[0], min(rates), max(rates), tuple(dict.fromkeys(notes)))
