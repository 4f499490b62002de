"""Which component each row of a mixture comes from."""

import math
from collections.abc import Sequence

import numpy as np

_SCHEDULE = 2**32 - 1  # apart from the numbers that orders of rows are drawn with
_MOST_ROWS = 2**24  # of a block, whose rows are laid out in memory


class Schedule:
    """An endless sequence of components in exact shares: among the first n rows, a component has within one or two of
    share * n at the end of each block of rows, and inside a block the order is random, a function of (seed, block).

    Where a row comes from depends on its number alone, so a stream's state is the number of rows handed out.

    Raises ValueError for a share of less than two rows in 2**24.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        self.seed = seed
        self.shares = np.asarray(weights, np.float64) / math.fsum(weights)
        self._bounds = np.append(np.cumsum(self.shares)[:-1], 1.0)
        least = self.shares.min()
        if least * _MOST_ROWS < 2:
            raise ValueError(
                f"a corpus, or a length bucket of one, has {least:.1g} of the rows, too few to be dealt out: raise its "
                "weight, or leave it out (a bucket by the weight 0 in data.length_weights)"
            )
        # Every component in every block, so that no count falls from one block to the next.
        self.block = max(1024, math.ceil(2 / least))
        self._cached: tuple[int, np.ndarray, np.ndarray] | None = None

    def counts(self, blocks: int) -> np.ndarray:
        """int64 [components]: rows of each component in the first ``blocks`` blocks."""
        return np.diff(np.floor(blocks * self.block * self._bounds).astype(np.int64), prepend=0)

    def place(self, number: int) -> tuple[int, int]:
        """Of row ``number``: its component, and how many rows of that component come before it."""
        if len(self.shares) == 1:
            return 0, number
        block, offset = divmod(number, self.block)
        if self._cached is None or self._cached[0] != block:
            before, after = self.counts(block), self.counts(block + 1)
            component = np.repeat(np.arange(len(before)), after - before)
            before_it = np.concatenate([np.arange(a, b) for a, b in zip(before, after, strict=True)])
            component = component[np.random.default_rng([self.seed, block, _SCHEDULE]).permutation(self.block)]
            # The rows of a component keep their order, whatever places in the block they were given.
            index = np.empty(self.block, np.int64)
            index[np.argsort(component, kind="stable")] = before_it
            self._cached = (block, component, index)
        return int(self._cached[1][offset]), int(self._cached[2][offset])

    def rows_served(self, available: Sequence[int], most: int) -> int:
        """How many rows, up to ``most``, can be handed out before a component's ``available`` rows are used up."""
        for number in range(most):
            component, index = self.place(number)
            if index >= available[component]:
                return number
        return most
