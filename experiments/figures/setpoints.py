"""Where a row's knob stands, for what groups rows by it: a sparsity that was asked for has a knob of its own in each
seed, and is one setting of all of them."""


class AtSparsity(float):
    """A sparsity in the place of a knob; as such it equals no number.

    Attributes:
        count: how it is counted.
        is_held: training ended with a knob that it had turned to this sparsity, and that knob it is; else a knob that
            an evaluation found.
    """

    def __new__(cls, sparsity: float, count: str, is_held: bool = False):
        self = super().__new__(cls, sparsity)
        self.count, self.is_held = count, is_held
        return self

    def _key(self) -> tuple:
        return float(self), self.count, self.is_held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AtSparsity) and self._key() == other._key()

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self._key())

    def __str__(self) -> str:
        count = "" if self.count == "causal" else f" ({self.count} count)"
        return f"{100 * self:.6g}%{count}{' held' if self.is_held else ''}"

    def __format__(self, spec: str) -> str:
        return str(self)


def with_setpoints(row: dict) -> dict:
    """``row`` with sparsities as ``knob`` and ``trained_knob``, where the knob was asked for by them."""
    knob, trained_knob = row["knob"], row["trained_knob"]
    trained = trained_knob
    if row.get("trained_sparsity") is not None:
        trained = AtSparsity(row["trained_sparsity"], row["trained_sparsity_count"], is_held=True)
    if row.get("target_sparsity") is not None:
        knob = AtSparsity(row["target_sparsity"], row["sparsity_count"])
    elif knob == trained_knob:
        knob = trained
    return row | {"knob": knob, "trained_knob": trained}


def is_as_trained(knob: float | None, trained_knob: float | None) -> bool:
    """Whether an evaluation is at the knob, or at the sparsity, that was trained with."""
    if isinstance(knob, AtSparsity) and isinstance(trained_knob, AtSparsity):
        return (float(knob), knob.count) == (float(trained_knob), trained_knob.count)
    return knob == trained_knob
