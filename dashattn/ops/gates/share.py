"""A branch's share of NSA's gated sum, added by the kernel that computes the branch: no branch is stored by itself.

Shapes: n = B T tokens laid out flat, Hq query heads, D head size; R rows of a program, a token's query head each.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Share:
    """Where a branch goes in place of an output of its own.

    Attributes:
        gates: contiguous [n, Hq, 2 or 3].
        branch: which of them is the branch's. The first one's kernel writes ``out``, the others add to it.
        out: [n, Hq, D].
    """

    gates: Tensor
    branch: int
    out: Tensor


def share_constants(share: Share | None) -> dict[str, int]:
    """BRANCH is -1 without a share."""
    return dict(BRANCH=-1, BRANCHES=0) if share is None else dict(BRANCH=share.branch, BRANCHES=share.gates.shape[-1])


@triton.jit
def shared_out(out, gates_ptr, out_ptr, flat_row, valid, offset, in_tile, BRANCH: tl.constexpr, BRANCHES: tl.constexpr):
    """What a kernel stores for the rows ``out`` of its branch, [R, D] in float32."""
    if BRANCH >= 0:
        gate = tl.load(gates_ptr + flat_row * BRANCHES + BRANCH, mask=valid, other=0.0).to(tl.float32)
        out *= gate[:, None]
    if BRANCH > 0:
        out += tl.load(out_ptr + offset, mask=in_tile, other=0.0).to(tl.float32)
    return out.to(out_ptr.dtype.element_ty)
