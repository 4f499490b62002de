"""What a transformer block is made of beside attention.

Shape suffixes: B batch, T tokens, E hidden size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dashattn.ops.dtypes import upcast


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
        gate, up = project(x_BTE, self.gate_proj), project(x_BTE, self.up_proj)
        return project(F.silu(gate) * up, self.down_proj)


def project(x_BTE: Tensor, layer: nn.Linear) -> Tensor:
    """``layer(x_BTE)``, where decoding is compiled written such that the compiler can do more with it.

    A single token's product does little but read the weight. As a sum it is in one kernel with what stands before and
    behind it, gate and up are in one with each other: a quarter of the kernels of a token fewer.
    """
    if not torch.compiler.is_compiling() or torch.is_grad_enabled() or x_BTE.shape[0] * x_BTE.shape[1] != 1:
        return layer(x_BTE)
    out_11E = (upcast(layer.weight) * upcast(x_BTE)).sum(-1, keepdim=True).mT
    return (out_11E if layer.bias is None else out_11E + layer.bias).to(x_BTE.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, accumulated in float32, result in x's dtype."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # One dtype for both keeps the fused kernel, which accumulates in float32; autocast may widen its result.
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps).to(x.dtype)
