"""Packed documents: flash-attention's ``cu_seqlens`` convention (int32 [N + 1], first 0, last T, batch of 1)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def document_lengths(cu_seqlens: Tensor) -> list[int]:
    """Lengths of the documents as Python integers. Synchronises with the device: for reference code only."""
    return cu_seqlens.diff().tolist()


def document_positions(cu_seqlens: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
    """Position of every token within its own document, int32 [B, T], without a host synchronisation."""
    token = torch.arange(length, device=device, dtype=torch.int32)
    if cu_seqlens is None:
        return token.expand(batch, length)
    starts = cu_seqlens[torch.searchsorted(cu_seqlens, token, right=True) - 1]
    return (token - starts)[None]


def per_document(fn: Callable[..., Any], cu_seqlens: Tensor | None, *tensors: Tensor | None) -> list[Any]:
    """Applies ``fn`` to each document of tensors laid out [B, T, ...] (None is handed through).

    Without ``cu_seqlens`` the whole tensors are one call.
    """
    if cu_seqlens is None:
        return [fn(*tensors)]
    lengths = [length for length in document_lengths(cu_seqlens) if length > 0]
    pieces = [[None] * len(lengths) if t is None else t.split(lengths, dim=1) for t in tensors]
    return [fn(*document) for document in zip(*pieces, strict=True)]
