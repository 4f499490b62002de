"""What a transformer block is made of beside attention.

Shape suffixes: B batch, T tokens, E hidden size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def scaled(x: Tensor, factor: float) -> Tensor:
    """x times a factor that mostly is 1, which costs nothing."""
    return x if factor == 1 else x * factor


class SwiGLU(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x_BTE: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BTE)) * self.up_proj(x_BTE))


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, accumulated in float32, result in x's dtype."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # One dtype for both keeps the fused kernel, which accumulates in float32; autocast may widen its result.
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps).to(x.dtype)
