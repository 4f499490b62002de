"""Rotation by rotary tables, in the rotate-half layout: channel i turns together with channel i + D/2."""

import torch
from torch import Tensor


def rotate_half(x: Tensor) -> Tensor:
    """A quarter turn of every channel pair of x [..., D]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def apply_rope(x_BTHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x by tables [T, D] or [B, T, D]; in the wider of the two dtypes, result in x's dtype."""
    return torch.addcmul(x_BTHD * cos.unsqueeze(-2), rotate_half(x_BTHD), sin.unsqueeze(-2)).to(x_BTHD.dtype)


def undo_rope(x_BTHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The inverse of ``apply_rope``, also where the tables scale besides (YaRN); exact but for the rounding of x."""
    size = cos.square() + sin.square()
    return apply_rope(x_BTHD, cos / size, -sin / size)
