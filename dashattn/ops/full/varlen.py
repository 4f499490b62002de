"""FlashAttention over packed documents, as PyTorch has it. Apart, because importing it loads PyTorch's compiler."""

from inspect import signature

from torch.nn.attention.varlen import varlen_attn

# PyTorch 2.11 takes grouped heads without being told.
GROUPED = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}

__all__ = ["GROUPED", "varlen_attn"]
