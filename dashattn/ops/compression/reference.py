"""Compressed keys: one per sliding window of ``kernel_size`` tokens, every ``kernel_stride`` tokens.

InfLLM v2 (arXiv 2509.24663) averages each window and only scores with it; NSA (arXiv 2502.11089) compresses keys
and values with a learned map and also attends to them.

Shapes: B batch, T tokens, Hq query heads, H KV heads, D head size, l kernel_size, J windows.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dashattn.documents import document_positions, per_document
from dashattn.ops.block_sparse.reference import masked_softmax
from dashattn.ops.dtypes import upcast


def num_windows(length: int, kernel_size: int, kernel_stride: int) -> int:
    """Complete windows in a document of ``length`` tokens."""
    return max(0, (length - kernel_size) // kernel_stride + 1)


def visible_windows(positions: Tensor, kernel_size: int, kernel_stride: int) -> Tensor:
    """How many windows end at or before each position; same shape as ``positions``."""
    return ((positions + 1 - kernel_size).div(kernel_stride, rounding_mode="floor") + 1).clamp_min(0)


def compress_windows(
    compress: Callable[..., Tensor],
    *tensors: Tensor,
    kernel_size: int,
    kernel_stride: int,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Applies ``compress`` to every window of every document.

    Args:
        compress: takes one [B, J, l, H, D] tensor per entry of ``tensors`` and returns [B, J, H, ...].
        tensors: each [B, T, H, D].

    Returns:
        [B, J', H, ...] with ``J' = num_windows(T)``. With ``cu_seqlens`` the documents' windows follow one another
        and the rows past the last are zero. The device is not waited for.
    """
    count = num_windows(tensors[0].shape[1], kernel_size, kernel_stride)
    if count == 0:  # unfold refuses what has no window
        return compress(*(x.new_zeros(x.shape[0], 0, kernel_size, *x.shape[2:]) for x in tensors))
    if cu_seqlens is None:
        if torch.compiler.is_compiling():
            # Inductor of PyTorch 2.11 fails on a GPU where a size of a reduction is a sum, as the number of windows is:
            # it takes B * (N - 1) and B * N - B for different. So T // kernel_stride windows, the last ones dropped.
            tensors = tuple(F.pad(x, (0, 0, 0, 0, 0, kernel_size - kernel_stride)) for x in tensors)
        return compress(*(x.unfold(1, kernel_size, kernel_stride).movedim(-1, 2) for x in tensors))[:, :count]
    ends = visible_windows(cu_seqlens.diff() - 1, kernel_size, kernel_stride).cumsum(0)
    window = torch.arange(count, device=ends.device)
    document = torch.searchsorted(ends, window, right=True).clamp(max=len(ends) - 1)
    before = F.pad(ends, (1, 0))[document]
    exists = window < ends[-1]
    first = torch.where(exists, cu_seqlens[document] + (window - before) * kernel_stride, 0)
    token = first[:, None] + torch.arange(kernel_size, device=ends.device)
    compressed = compress(*(x[:, token] for x in tensors))  # [B, J', l, H, D] each
    return compressed.masked_fill(~exists.view(-1, *(1,) * (compressed.ndim - 2)), 0)


def mean_compress(x: Tensor, kernel_size: int, kernel_stride: int, cu_seqlens: Tensor | None = None) -> Tensor:
    """Mean of every window [B, J, H, D] of x [B, T, H, D], summed in float32 and rounded to x's dtype."""
    return compress_windows(
        lambda windows: windows.mean(2, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype),
        x,
        kernel_size=kernel_size,
        kernel_stride=kernel_stride,
        cu_seqlens=cu_seqlens,
    )


def attend_windows(
    q: Tensor, compressed_k: Tensor, compressed_v: Tensor | None, visible: Tensor, scale: float
) -> tuple[Tensor | None, Tensor]:
    """Attention of q [B, T, Hq, D] over the first ``visible`` (int, broadcasts to [B, T]) of J windows [B, J, H, D].

    Returns:
        The output [B, T, Hq, D] (None without ``compressed_v``), 0 where nothing is visible, and the logarithms of the
        probabilities [B, H, G, T, J], -inf there and without a gradient; both in float32 or float64.
    """
    q_BTHGD = upcast(q).unflatten(2, (compressed_k.shape[2], -1)) * scale
    allowed = (torch.arange(compressed_k.shape[1], device=q.device) < visible[..., None])[:, None, None]
    logits = torch.einsum("bthgd,bjhd->bhgtj", q_BTHGD, upcast(compressed_k))
    log_p = logits.detach().masked_fill(~allowed, -torch.inf).log_softmax(-1).masked_fill(~allowed, -torch.inf)
    if compressed_v is None:
        return None, log_p
    p = masked_softmax(logits, allowed) if logits.shape[-1] else logits
    p = p.masked_fill(~allowed, 0)
    return torch.einsum("bhgtj,bjhd->bthgd", p, upcast(compressed_v)).flatten(2, 3), log_p


def compressed_attention(
    q: Tensor,
    compressed_k: Tensor,
    compressed_v: Tensor | None,
    consume: Callable[[Tensor], Tensor],
    *,
    kernel_size: int,
    kernel_stride: int,
    scale: float,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor | None, list[Tensor]]:
    """Attention of every query over the compressed keys whose window lies wholly in its past.

    Args:
        q: [B, T, Hq, D].
        compressed_k: [B, J, H, D]; ``compressed_v`` likewise, or None when only the probabilities are wanted.
        consume: maps the log probabilities of one document [B, H, G, T, J], -inf where nothing is visible, to what is
            kept.

    Returns:
        The output [B, T, Hq, D] in float32 or float64 (None without ``compressed_v``; 0 before the first window),
        and ``consume``'s result for each document.
    """
    consumed = []
    offset = 0  # of this document's first window

    def attend(q_BTHD):
        nonlocal offset
        length = q_BTHD.shape[1]
        windows = slice(offset, offset + num_windows(length, kernel_size, kernel_stride))
        offset = windows.stop
        positions = document_positions(None, 1, length, q.device)
        visible = visible_windows(positions, kernel_size, kernel_stride)
        values = None if compressed_v is None else compressed_v[:, windows]
        out, log_p = attend_windows(q_BTHD, compressed_k[:, windows], values, visible, scale)
        consumed.append(consume(log_p))
        return out

    outs = per_document(attend, cu_seqlens, q)
    return None if compressed_v is None else torch.cat(outs, dim=1), consumed
