"""Steps that went wrong, and which batch they had read.

anomalies.jsonl holds a row of each: the step, whether its loss or gradient was not finite ("skipped": no update was
made) or the loss jumped ("spike"), and the position of every rank's data before the step's batches, from which they
can be read again.
"""

import math
import statistics
from collections import deque
from pathlib import Path

from experiments.errors import Stopped
from experiments.files import append_rows

_WINDOW = 64  # losses that a spike is seen against
_LEAST = 16  # of them, before which nothing is a spike
_SIGMAS = 6.0


class LossWatch:
    """Judges every step's loss and gradient. All ranks see the same values and agree."""

    def __init__(self, path: Path, *, skipped: int, limit: int):
        """Args: skipped: steps skipped before a resume. limit: steps skipped in a row that stop the run."""
        self.skipped = skipped
        self._path, self._limit = path, limit
        self._in_a_row = 0
        self._recent: deque[float] = deque(maxlen=_WINDOW)

    def judge(self, loss: float, *, is_finite: bool) -> str | None:
        """``skipped``, ``spike`` or None. is_finite: of the gradient."""
        if not (math.isfinite(loss) and is_finite):
            self.skipped += 1
            self._in_a_row += 1
            return "skipped"
        self._in_a_row = 0
        is_spike = len(self._recent) >= _LEAST and loss > self._threshold()
        self._recent.append(loss)
        return "spike" if is_spike else None

    def _threshold(self) -> float:
        return statistics.fmean(self._recent) + _SIGMAS * statistics.pstdev(self._recent)

    def record(self, kind: str, step: int, loss: float, grad_norm: float, positions: list[dict]) -> None:
        """Add a row to anomalies.jsonl; for one rank."""
        values = {"loss": loss, "grad_norm": grad_norm}
        shown = {key: value if math.isfinite(value) else str(value) for key, value in values.items()}
        append_rows(self._path, [{"step": step, "kind": kind, **shown, "data": positions}])

    def is_hopeless(self) -> bool:
        return self._in_a_row >= self._limit

    def stop(self, step: int, kept: Path) -> Stopped:
        return Stopped(
            f"loss or gradient was not finite in {self._in_a_row} steps in a row, up to step {step}; {self._path} "
            f"names their batches. Lower optim.lr or optim.grad_clip, or raise optim.warmup_steps, in a new run. The "
            f"state is kept in {kept}, and the checkpoints before are untouched"
        )
