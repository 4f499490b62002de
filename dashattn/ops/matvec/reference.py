"""Products of one token with what stands around them in a transformer block. Shapes: K inputs, N outputs, D head size.

x [1, 1, K]; weights [N, K], as nn.Linear has them. ``norm``: weight [K] and epsilon of an RMSNorm of x, or None.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dashattn.rope import apply_rope

Norm = tuple[Tensor, float] | None


def normalised(x: Tensor, norm: Norm) -> Tensor:
    return x if norm is None else F.rms_norm(x, x.shape[-1:], norm[0].to(x.dtype), norm[1]).to(x.dtype)


def heads(
    x: Tensor, weights: list[Tensor], head_dim: int, norm: Norm, rope: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k and v, [1, 1, heads, D], by their ``weights``, q and k turned by tables [1, D] or [1, 1, D] if there are
    any; and the normalised x."""
    hidden = normalised(x, norm)
    q, k, v = (F.linear(hidden, weight).unflatten(-1, (-1, head_dim)) for weight in weights)
    if rope is not None:
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
    return q, k, v, hidden


def swiglu(x: Tensor, gate: Tensor, up: Tensor, norm: Norm) -> Tensor:
    """silu of the one product times the other, [1, 1, N]."""
    hidden = normalised(x, norm)
    return F.silu(F.linear(hidden, gate)) * F.linear(hidden, up)


def product(x: Tensor, weight: Tensor, norm: Norm = None, onto: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """``scale`` times the product, [1, 1, N], added to ``onto`` if there is such."""
    out = F.linear(normalised(x, norm), weight)
    return out * scale if onto is None else torch.add(onto, out, alpha=scale)
