"""The gated sum of NSA's branches."""

from torch import Tensor

from dashattn.ops.dtypes import upcast


def gated_sum(gates: Tensor, branches: list[Tensor]) -> Tensor:
    """Sum over i of gates[..., i] times branch i, in float32 or float64.

    Args:
        gates: [B, T, Hq, n].
        branches: n of [B, T, Hq, D].
    """
    weights = upcast(gates)[..., None].unbind(3)
    return sum(weight * upcast(branch) for weight, branch in zip(weights, branches, strict=True))
