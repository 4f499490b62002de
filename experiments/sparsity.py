"""A sparsity instead of a knob: the value of an attention's sparsity knob at which its layers have it on average.

Both the search and the holding of it move the logarithm of the knob and look at the log-odds of the sparsity: for
DashAttention's ``router_scale`` these two are nearly proportional, from half of the keys to a tenth of them. Of a knob
that is a share, such as top-p, they move the log-odds: those of a flat router's sparsity are theirs with the other
sign.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dashattn.backends import BACKENDS, AttentionConfig
from dashattn.backends.layers import layer_configs
from dashattn.stats import PAPER_SKIP, AttentionStats
from models import Transformer

if TYPE_CHECKING:  # the speed benchmark does without what data need
    from data import Batch

TOLERANCE = 0.005  # half a point: within this a target is met
_CLOSE = 0.001  # the search looks no further
_PASSES = 12
_FACTOR = 4.0  # of the knob, at first, where the target is not yet between two values; squared each time
_LEAST = 1e-3  # sparsities this close to 0 or 1 count as equal: their odds tell nothing

HOLD_EVERY = 4  # optimizer steps from one measurement to the next
_GAIN = 0.8  # of the step that would do if log-odds and logarithm went alike: some miss is left, and less noise
_LONGEST = 0.2  # step of the knob's logarithm or log-odds
_NEAREST = 1e-6  # a share as near to 1 is 1
_MEMORY = 8  # measurements that an integer knob's mean goes back
_FEWEST = 3  # of them before it moves


@dataclass(frozen=True)
class Found:
    """A knob, and what was measured at it.

    Attributes:
        tried: knob -> sparsity, in the order they were measured.
    """

    knob: float
    sparsity: float
    tried: dict[float, float]

    def record(self) -> dict:
        """Plain JSON values."""
        return {"knob": self.knob, "sparsity": self.sparsity, "tried": [list(item) for item in self.tried.items()]}


def find_knob(
    measure: Callable[[float], float], target: float, span: tuple[float, float], start: float, passes: int = _PASSES
) -> Found:
    """The knob whose sparsity is nearest to ``target``: within 0.001, or of integers the nearest one.

    The place between two values of the knob, one too dense and one too sparse, is where a straight line through their
    log-odds meets the target's; the middle when one of the two has stayed twice, so that plateaus and jumps cost no
    more than halving does.

    Args:
        measure: sparsity at a value of the knob; monotonous.
        span: the densest and the sparsest value, both integers if the knob is one. Nothing beyond is tried.
        start: the first value tried, or the end of the span that it lies beyond.
        passes: most calls of ``measure``.
    """
    axis = _Axis(span)
    tried: dict[float, float] = {}
    dense = sparse = None  # knobs
    place, reach, stayed = axis.place(axis.knob(axis.place(start))), math.log(_FACTOR), 0
    while len(tried) < passes:
        knob = axis.knob(place)
        if knob in tried:  # an end of the span, or of integers there is none between
            break
        tried[knob] = measure(knob)
        if abs(tried[knob] - target) <= _CLOSE:
            break
        if tried[knob] < target:
            dense, stayed = knob, max(stayed, 0) + 1
        else:
            sparse, stayed = knob, min(stayed, 0) - 1
        if dense is None or sparse is None:
            place += reach if sparse is None else -reach
            reach, stayed = 2 * reach, 0
            continue
        low, goal, high = (_log_odds(value) for value in (tried[dense], target, tried[sparse]))
        share = (goal - low) / (high - low) if high > low and abs(stayed) < 2 else 0.5
        place = axis.between(dense, sparse, min(max(share, 0.05), 0.95))
    knob = min(tried, key=lambda knob: abs(tried[knob] - target))
    return Found(knob, tried[knob], tried)


class _Axis:
    """The knob's logarithm, or a share's log-odds, in the direction from dense to sparse."""

    def __init__(self, span: tuple[float, float]) -> None:
        self.sign = 1 if span[1] > span[0] else -1
        self.least, self.most = min(span), max(span)
        self.is_integer = isinstance(span[0], int)
        self.is_share = not self.is_integer and self.most == 1.0

    def place(self, knob: float) -> float:
        return self.sign * self._coordinate(knob)

    def _coordinate(self, knob: float) -> float:
        return math.log(knob) - math.log(max(1 - knob, _NEAREST)) if self.is_share else math.log(knob)

    def knob(self, place: float) -> float:
        """The knob there, within the span; an integer knob's nearest."""
        coordinate = min(max(self.sign * place, self._coordinate(self.least)), self._coordinate(self.most))
        if self.is_share:
            knob = 1 / (1 + math.exp(-coordinate))
            knob = 1.0 if 1 - knob <= _NEAREST else knob
        else:
            knob = round(math.exp(coordinate)) if self.is_integer else math.exp(coordinate)
        return min(max(knob, self.least), self.most)

    def between(self, dense: float, sparse: float, share: float) -> float:
        """A place that far from one knob to the other; of integers at one of those between, if there are any."""
        place = self.place(dense) + share * (self.place(sparse) - self.place(dense))
        if self.is_integer and abs(dense - sparse) > 1:
            return self.place(min(max(self.knob(place), min(dense, sparse) + 1), max(dense, sparse) - 1))
        return place


def _log_odds(sparsity: float) -> float:
    sparsity = min(max(sparsity, _LEAST), 1 - _LEAST)
    return math.log(sparsity / (1 - sparsity))


@dataclass
class Hold:
    """Keeps a sparsity while the weights move: what is measured now says which knob the next steps have.

    A function of what it is given and of its state, so that a resumed run goes on alike.

    Attributes:
        span: see ``knob_span``.
        knob: the current one.
        mean, seen: of an integer knob: the sparsity, and how often it was measured, since the knob moved.
    """

    target: float
    span: tuple[float, float] = field(repr=False)
    knob: float
    mean: float = 0.0
    seen: int = 0

    def update(self, sparsity: float) -> float:
        """The next knob, after ``sparsity`` was measured at the current one."""
        axis = _Axis(self.span)
        if axis.is_integer:
            self._step_integer(axis, sparsity)
        else:
            step = _GAIN * (_log_odds(self.target) - _log_odds(sparsity))
            self.knob = axis.knob(axis.place(self.knob) + min(max(step, -_LONGEST), _LONGEST))
        return self.knob

    def _step_integer(self, axis: _Axis, sparsity: float) -> None:
        """By one, to a neighbour that is nearer to the target: what is read is nearly proportional to the knob."""
        self.seen += 1
        self.mean += (sparsity - self.mean) / min(self.seen, _MEMORY)
        miss = self.target - self.mean
        spacing = (1 - self.mean) / self.knob
        if self.seen < _FEWEST or abs(miss) <= 0.6 * spacing:  # beyond the middle, so that it does not go to and fro
            return
        knob = self.knob + (axis.sign if miss > 0 else -axis.sign)
        if axis.least <= knob <= axis.most:
            self.knob, self.mean, self.seen = knob, 0.0, 0

    def state_dict(self) -> dict:
        """Plain JSON values."""
        return {"knob": self.knob, "mean": self.mean, "seen": self.seen}


def turned_layers(attention: AttentionConfig, num_layers: int) -> list[AttentionConfig]:
    """The configurations of the layers that the knob turns, as ``Transformer.turned``."""
    layers = layer_configs(attention, num_layers, BACKENDS)
    return [own for own, _ in layers if own.name == attention.name and own.knob is not None]


def knob_span(layers: Sequence[AttentionConfig], length: int) -> tuple[float, float]:
    """The densest and the sparsest value of a knob that several layers share, each with sizes of its own."""
    spans = [attention.knob_span(length) for attention in layers]
    # Fewer blocks than one layer forces, none can have; more than it has do no harm.
    furthest = max if spans[0][0] > spans[0][1] else min
    return furthest(dense for dense, _ in spans), max(sparse for _, sparse in spans)


def check_reachable(layers: Sequence[AttentionConfig], target: float, count: str, length: int, *, packed: bool) -> None:
    """Refuses what rows of ``length`` tokens cannot have, whatever stands in them.

    Args:
        layers: those that the knob turns.
        packed: rows hold several documents, which are shorter.

    Raises:
        ValueError: with what can be reached.
    """
    if count == "paper" and (packed or length <= PAPER_SKIP):
        raise ValueError(
            f"sparsity_count=paper needs rows of one document (data.pack=plain) and more than {PAPER_SKIP} tokens, "
            f"since it leaves out the first {PAPER_SKIP}; rows have {length}: use sparsity_count=causal"
        )
    if not layers:
        raise ValueError("a sparsity needs layers with a knob to turn: attention.layers leaves none of them")
    most = mean(attention.most_sparsity(length, count) for attention in layers)
    if target > most + TOLERANCE:
        raise ValueError(
            f"a sparsity of {target:g} cannot be had: at {length} tokens attention={layers[0].name} reaches "
            f"{math.floor(1000 * most) / 1000:.3f}, with what it always attends to. Lower the target, or force fewer "
            "or smaller blocks"
        )


def doubt(layers: Sequence[AttentionConfig], target: float, count: str, length: int, group: int) -> str | None:
    """What stands against a sparsity that ``check_reachable`` lets pass, before there are weights, which decide; None:
    nothing.

    Args:
        group: query heads of a KV head.
    """
    sure, most = (
        mean(bounds)
        for bounds in zip(
            *((a.sure_sparsity(length, count, group), a.most_sparsity(length, count)) for a in layers), strict=True
        )
    )
    if target <= sure + TOLERANCE:
        return None
    return (
        f"a sparsity of {target:g} may not be had: at {length} tokens attention={layers[0].name} reaches "
        f"{math.floor(1000 * sure) / 1000:.3f} to {math.floor(1000 * most) / 1000:.3f}, the more the {group} query "
        "heads of a group choose alike. Lower the target, or force fewer or smaller blocks"
    )


def check_found(found: Found, attention: AttentionConfig, target: float, length: int) -> None:
    """Refuses a knob that misses the target, unless it is the nearest integer.

    Raises:
        ValueError: with what can be reached.
    """
    if abs(found.sparsity - target) <= TOLERANCE:
        return
    dense = [sparsity for sparsity in found.tried.values() if sparsity < target]
    sparse = [sparsity for sparsity in found.tried.values() if sparsity > target]
    if dense and sparse and isinstance(found.knob, int):
        return
    what = f"a sparsity of {target:g} cannot be had: at {length} tokens attention={attention.name}"
    if dense and sparse:
        raise ValueError(
            f"{what} goes from {max(dense):.3f} to {min(sparse):.3f} at {attention.knob}={found.knob:g}. Take one of "
            "them as the target"
        )
    raise ValueError(
        f"{what} reaches {'at most' if dense else 'no less than'} {found.sparsity:.3f}, at "
        f"{attention.knob}={found.knob:g}. Change the target, or the blocks that it selects and forces"
    )


def count_keys(model: Transformer, stats: Iterable[AttentionStats], count: str) -> Tensor:
    """``AttentionStats.counts`` summed over the layers that the knob turns: float64 [2]."""
    turned = set(model.turned)
    layers = zip(model.backends, stats, strict=True)
    return torch.stack([layer.counts(count) for backend, layer in layers if backend in turned]).sum(0)


@torch.no_grad()
def calibrate(
    model: Transformer,
    batches: "Iterable[Batch]",
    target: float,
    count: str,
    length: int,
    *,
    device: torch.device,
    total: Callable[..., list[float]] = lambda *values: list(values),
) -> Found:
    """Turns the knob to where the mean sparsity of the layers that it turns is ``target`` on ``batches``.

    Args:
        batches: rows of ``length`` tokens, or documents packed into as many; all are read once a pass.
        total: sums numbers over the ranks, all of which call this with rows of their own.

    Raises:
        ValueError: the target cannot be reached.
    """
    attention = model.attention
    span = knob_span([backend.config for backend in model.turned], length)
    batches = [batch.to(device) for batch in batches]

    def measure(knob: float) -> float:
        model.set_knob(knob)
        keys = torch.zeros(2, dtype=torch.float64, device=device)
        for batch in batches:
            # With labels, because then the logits of all tokens are never there at once.
            documents = {"cu_seqlens": batch.cu_seqlens, "max_seqlen": batch.max_seqlen}
            options = {"position_ids": batch.position_ids, **documents, "return_stats": True}
            output = model(batch.input_ids, labels=batch.labels, **options)
            keys += count_keys(model, output.stats, count)
        active, counted = total(*keys.tolist())
        return 1 - active / counted

    found = find_knob(measure, target, span, getattr(attention, attention.knob))
    check_found(found, attention, target, length)
    model.set_knob(found.knob)
    return found
