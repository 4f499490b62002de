"""The options that all backends share, and what a backend says about its own."""

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from dashattn.checks import check
from dashattn.fields import Checked, Line, OneOf, Sparsity
from dashattn.implementation import IMPLS
from dashattn.stats import SPARSITY_COUNTS, AttentionStats

SCALES = (1e-6, 1e6)  # of scores: whatever these are, all blocks of a row are all but equal, or one is above all others
SPARSITY_CONTROLS = ("hold", "start", "none")


@dataclass
class AttentionConfig(Checked, at="attention"):
    """Fields that all backends share.

    Attributes:
        name: the backend's key in the registry; stands in every result row.
        impl: auto | triton | reference.
        layers: layers with another backend or other options; the notation is that of ``dashattn.backends.layers``.
        target_sparsity: in [0, 1), the mean over the layers that training turns the knob to, whatever the knob's own
            field says; None = the knob is what its field says. A backend by itself does nothing about it.
        sparsity_count: how the target counts: ``causal`` or ``paper``, see ``AttentionStats``.
        sparsity_control: ``hold``: the knob is found before training and follows while the weights move; ``start``: it
            is found and then stays; ``none``: the target is not heeded.
    """

    name: Line = "???"
    impl: Annotated[str, OneOf(IMPLS)] = "auto"
    layers: Any = None  # a mapping; a command line may add keys to none but an untyped one
    target_sparsity: Sparsity | None = None
    sparsity_count: Annotated[str, OneOf(SPARSITY_COUNTS)] = "causal"
    sparsity_control: Annotated[str, OneOf(SPARSITY_CONTROLS)] = "hold"

    knob: ClassVar[str | None] = None
    """The field that sets the sparsity, if there is one."""

    blocks: ClassVar[str | None] = None
    """The field that holds the keys per block, if there are blocks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.target_sparsity is None or self.knob is not None,
            f"attention={self.name} has no sparsity knob: set attention.target_sparsity=null",
        )

    @property
    def controls_sparsity(self) -> bool:
        """Whether training has a target to turn the knob to."""
        return self.target_sparsity is not None and self.sparsity_control != "none"

    @property
    def holds_sparsity(self) -> bool:
        """Whether the knob moves while training."""
        return self.controls_sparsity and self.sparsity_control == "hold"

    @classmethod
    def at_block_size(cls, size: int) -> "AttentionConfig":
        """The defaults, at blocks of ``size`` keys if there are blocks."""
        return cls() if cls.blocks is None else cls(**{cls.blocks: size})

    @classmethod
    def variants(cls, block_size: int) -> dict[str, "AttentionConfig"]:
        """What is timed at blocks of ``block_size`` keys, by the names that rows have."""
        config = cls.at_block_size(block_size)
        return {config.name: config}

    @classmethod
    def samples(cls) -> dict[str, "AttentionConfig"]:
        """What errors are measured of, by the names that rows have: sparse where it can be at a thousand tokens."""
        config = cls.at_block_size(32)
        return {config.name: config}

    def check_rows(self, length: int) -> None:
        """ValueError where rows of ``length`` tokens leave nothing to select."""
        if self.blocks is None:
            return
        size = getattr(self, self.blocks)
        check(
            size < length,
            f"attention.{self.blocks}={size} leaves nothing to select in rows of {length} tokens: lower "
            f"attention.{self.blocks} or take longer rows (data.seq_len)",
        )

    def with_knob(self, value: float) -> "AttentionConfig":
        """This configuration at another value of its sparsity knob; ValueError where that cannot be."""
        check(self.knob is not None, f"attention={self.name} has no sparsity knob")
        kind = type(getattr(self, self.knob))
        check(kind is not int or float(value).is_integer(), f"{self.knob} must be an integer; got {value}")
        return dataclasses.replace(self, **{self.knob: kind(value)})

    def knob_span(self, length: int) -> tuple[float, float]:
        """The knob's values between which all sparsities lie that rows of ``length`` tokens can have: the densest one,
        then the sparsest. Here an integer knob counts blocks, from all that there are to the fewest that it may have;
        another one is a scale, of which larger is sparser. One that is real and densest at 1.0 is taken for a share.
        ValueError where there is no knob."""
        check(self.knob is not None, f"attention={self.name} has no sparsity knob")
        if not isinstance(getattr(self, self.knob), int):
            return SCALES
        blocks = length if self.blocks is None else -(-length // getattr(self, self.blocks))
        fewest = next(count for count in itertools.count(1) if self._can_have(count))
        return max(blocks, fewest), fewest

    def _can_have(self, knob: int) -> bool:
        try:
            self.with_knob(knob)
        except ValueError:
            return False
        return True

    def is_dense_at(self, step: int) -> bool:
        """Whether training attends to everything in this optimiser step, counted from 0, whatever the knob says."""
        return False

    def least_active(self, length: int) -> Tensor:
        """Keys that each token of an unpacked row attends to at least, at any value of the knob: int64 [length]. Here
        itself; a backend that forces more can say so, for an earlier refusal of what cannot be reached."""
        return torch.ones(length, dtype=torch.int64)

    def sparsest_active(self, length: int, group: int) -> Tensor:
        """Keys that each token of an unpacked row attends to at most when the knob is at its sparsest value, whatever
        the weights are, but for ties of their scores: int64 [length]. Here those of ``least_active``.

        Args:
            group: query heads of a KV head, which may choose apart.
        """
        return self.least_active(length)

    def most_sparsity(self, length: int, count: str) -> float:
        """An upper bound of the sparsity, counted as ``sparsity_count`` says, that unpacked rows can have. Only a
        router that must choose something may stay below it."""
        return _sparsity(self.least_active(length), count)

    def sure_sparsity(self, length: int, count: str, group: int) -> float:
        """The sparsity that unpacked rows can have with any weights; arguments as of ``sparsest_active`` and
        ``most_sparsity``."""
        return _sparsity(self.sparsest_active(length, group), count)


def _sparsity(active: Tensor, count: str) -> float:
    """Of an unpacked row whose tokens attend to ``active`` [T] keys."""
    stats = AttentionStats(active[None, :, None], torch.arange(len(active))[None], torch.zeros(1))
    active, counted = stats.counts(count).tolist()
    return 1 - active / counted


def forced_keys(length: int, block_size: int, init_blocks: int, local_blocks: int, window_size: int = 0) -> Tensor:
    """Keys of the first blocks, of the last ones up to a token's own and of a sliding window, each once: int64 [T].

    Args:
        length: T, tokens of an unpacked row.
        local_blocks: the token's own block included.
        window_size: keys up to the token itself; 0 for none.
    """
    tokens = torch.arange(length)
    local_start = (tokens // block_size + 1 - local_blocks) * block_size
    recent_start = torch.minimum(local_start, tokens + 1 - window_size).clamp(min=0)
    return tokens + 1 - recent_start + recent_start.clamp(max=init_blocks * block_size)
