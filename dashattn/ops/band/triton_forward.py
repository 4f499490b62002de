"""Triton kernel of attention over a band of keys: NSA's compressed and window branches, forward.

Of the keys of its document a token sees those that end at or before it, and of these the last ``span``. Key j ends at
position ``stride * j + size - 1``: tokens are keys of size 1 at stride 1, compression windows of 32 stand every 16.

A program owns neighbouring tokens x the heads of one KV group, as in the block-sparse core. Keys that all its tokens
see need no mask; a first or last few do. At 32k tokens, 32 heads of 128 and a stride of 16 the compressed branch costs
0.55 TFLOP forward and 1.9 backward, a window of 512 half as much; without values, for the normalisers alone, 0.27.

Shapes: n = B T tokens laid out flat, M documents, J keys (those of the documents follow one another), Hq query heads, H
KV heads, D head size. q and out [n, Hq, D]; k and v [J, H, D]; lse float32 [n, Hq], to base 2; key_starts
int32 [M + 1].
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from dashattn.ops.block_sparse.triton_forward import (
    NO_PEAK,
    forward_options,
    key_descriptor,
    precision,
    stages_that_fit,
)
from dashattn.ops.gates.share import Share, share_constants, shared_out
from dashattn.ops.tiles import LOG2E, Geometry, locate_tile, multiples, query_rows
from dashattn.ops.tuning import around, launch


@dataclass(frozen=True)
class Band:
    """Which keys a token sees.

    Attributes:
        size, stride: key j of a document covers its tokens ``stride * j`` to ``stride * j + size - 1``.
        span: how many of the last keys; None for all.
    """

    size: int
    stride: int
    span: int | None = None

    def limit(self, geo: Geometry) -> int:
        """``span`` as a number that kernels can multiply by the stride: no more keys than there are."""
        keys = geo.tokens // self.stride + 1
        return keys if self.span is None else min(self.span, keys)

    def starts(self, geo: Geometry) -> Tensor:
        """First key of every document and their total, int32 [M + 1]."""
        if geo.uniform is not None:
            complete = max(0, (geo.uniform - self.size) // self.stride + 1)
            return multiples(complete, geo.num_documents, geo.documents.device)
        complete = (geo.documents.diff() - self.size + self.stride).clamp_min(0) // self.stride
        return torch.nn.functional.pad(complete.cumsum(0, dtype=torch.int32), (1, 0))


@triton.jit
def visible_keys(position, SIZE: tl.constexpr, STRIDE: tl.constexpr):
    """How many keys end at or before a position."""
    return tl.maximum(position + 1 - SIZE + STRIDE, 0) // STRIDE


@triton.jit
def band_tiles(begin, stop, first_stop, KEYS: tl.constexpr):
    """Tiles of keys of a query tile whose rows see ``begin`` to ``stop``; ``first_stop`` is its first token's.

    Returns the first key of all, the first and the end of the tiles that all rows see in full, and how many tiles
    before and after these some row sees in part.
    """
    lowest = tl.min(begin, 0)
    low_tiles = tl.cdiv(tl.max(begin, 0) - lowest, KEYS)
    whole = lowest + low_tiles * KEYS
    whole_end = whole + tl.maximum(first_stop - whole, 0) // KEYS * KEYS
    high_tiles = tl.cdiv(tl.maximum(tl.max(stop, 0) - whole_end, 0), KEYS)
    return lowest, whole, whole_end, low_tiles, high_tiles


@triton.jit
def partial_tile(tile, lowest, whole_end, low_tiles, KEYS: tl.constexpr):
    """First key of the tile-th of the tiles that need a mask."""
    return tl.where(tile < low_tiles, lowest + tile * KEYS, whole_end + (tile - low_tiles) * KEYS)


@triton.jit
def _attend_keys(acc, total, peak, q, k_desc, v_desc, kv_head, first_key, key, begin, stop, scale_log2,
                 KEYS: tl.constexpr, DIM: tl.constexpr, MASKED: tl.constexpr, HAS_V: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    """One step of the online softmax over KEYS keys; base-2 logarithms throughout."""
    k = k_desc.load([kv_head, first_key + key, 0]).reshape(KEYS, DIM)
    logits = tl.dot(q, k.T, input_precision=PRECISION)
    if MASKED:
        column = (key + tl.arange(0, KEYS))[None, :]
        logits = tl.where((column >= begin[:, None]) & (column < stop[:, None]), logits, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(logits, 1) * scale_log2)
    p = tl.exp2(logits * scale_log2 - new_peak[:, None])
    decay = tl.exp2(peak - new_peak)
    total = total * decay + tl.sum(p, 1)
    if HAS_V:
        v = v_desc.load([kv_head, first_key + key, 0]).reshape(KEYS, DIM)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
    return acc, total, new_peak


@triton.jit(do_not_specialize=["num_slots", "num_documents", "span"])
def band_kernel(
    q_ptr, k_desc, v_desc, gates_ptr, out_ptr, lse_ptr, documents, key_starts, scale_log2, num_slots, num_documents,
    span,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, PER_TOKEN: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    KEYS: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
    HAS_V: tl.constexpr, BRANCH: tl.constexpr, BRANCHES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Late tiles have most to do: they go first, and those of one KV head run together and share it in the L2 cache.
    pid = tl.program_id(0)
    kv_head = pid // num_slots
    slot = num_slots - 1 - pid % num_slots
    document, start, end, index = locate_tile(documents, slot, num_documents, TOKENS)
    if start + index * TOKENS >= end:
        return
    first_key = tl.load(key_starts + document)

    position, _, valid, flat_row, offset, in_tile = query_rows(
        start, end, index * TOKENS, kv_head, KV_HEADS, GROUP, PER_TOKEN, TOKENS, ROWS, HEAD_DIM, DIM
    )
    position = tl.minimum(position, end - start - 1)
    q = tl.load(q_ptr + offset, mask=in_tile, other=0.0)
    stop = visible_keys(position, SIZE, STRIDE)
    begin = tl.maximum(stop - span, 0)

    acc = tl.zeros([ROWS, DIM if HAS_V else 1], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    peak = tl.full([ROWS], NO_PEAK, tl.float32)
    first_stop = visible_keys(index * TOKENS, SIZE, STRIDE)
    lowest, whole, whole_end, low_tiles, high_tiles = band_tiles(begin, stop, first_stop, KEYS)
    for key in range(whole, whole_end, KEYS):
        acc, total, peak = _attend_keys(
            acc, total, peak, q, k_desc, v_desc, kv_head, first_key, key, begin, stop, scale_log2, KEYS, DIM, False,
            HAS_V, PRECISION,
        )  # fmt: skip
    for tile in range(0, low_tiles + high_tiles):
        key = partial_tile(tile, lowest, whole_end, low_tiles, KEYS)
        acc, total, peak = _attend_keys(
            acc, total, peak, q, k_desc, v_desc, kv_head, first_key, key, begin, stop, scale_log2, KEYS, DIM, True,
            HAS_V, PRECISION,
        )  # fmt: skip

    empty = total == 0.0
    if HAS_V:
        acc = acc / tl.where(empty, 1.0, total)[:, None]
        out = shared_out(acc, gates_ptr, out_ptr, flat_row, valid, offset, in_tile, BRANCH, BRANCHES)
        tl.store(out_ptr + offset, out, mask=in_tile)
    # An infinite normaliser makes every probability of an empty row 0 wherever it is formed again.
    tl.store(lse_ptr + flat_row, tl.where(empty, float("inf"), peak + tl.log2(total)), mask=valid)


def tile_keys(itemsize: int) -> int:
    """Keys of a tile."""
    return 32 if itemsize == 4 else 64


@cache
def band_options(dim: int, itemsize: int, has_v: bool) -> dict:
    """Rows of a tile, and launch options.

    Neighbouring tokens see the same keys but for a few: with heads of 128 a tile twice as tall as in the block-sparse
    core, which reads half as much through the L2 cache, is faster. Its accumulators leave a multiprocessor two programs
    if they take 128 registers.
    """
    keys = tile_keys(itemsize)
    if itemsize == 4 or dim != 128:
        return forward_options(dim, keys, itemsize)
    stages = stages_that_fit(128 * dim * itemsize, 2 * keys * dim * itemsize, 2)
    return dict(rows=128, launch=around(8, stages, maxnreg=128) if has_v else around(8, stages))


def band_constants(geo: Geometry, band: Band, dtype: torch.dtype, rows: int, packed: bool = True) -> dict:
    return dict(
        KV_HEADS=geo.kv_heads, GROUP=geo.group, **geo.tile(rows, packed, most=rows), KEYS=tile_keys(dtype.itemsize),
        SIZE=band.size, STRIDE=band.stride, HEAD_DIM=geo.head_dim, DIM=geo.padded_dim, PRECISION=precision(dtype),
    )  # fmt: skip


def forward(
    q: Tensor, k: Tensor, v: Tensor | None, starts: Tensor, geo: Geometry, band: Band, scale: float,
    share: Share | None = None,
) -> tuple[Tensor | None, Tensor]:  # fmt: skip
    """Output [n, Hq, D] (None without v) and base-2 log-normalisers, float32 [n, Hq]. All flat and contiguous.

    A token that sees no key gives 0, its normaliser is infinite.
    """
    out = share.out if share is not None else None if v is None else torch.empty_like(q)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    keys = tile_keys(q.itemsize)
    options = band_options(geo.padded_dim, q.itemsize, v is not None)
    constants = band_constants(geo, band, q.dtype, options["rows"])
    slots = geo.slots(constants["TOKENS"])
    launch(
        band_kernel, (slots * geo.kv_heads,),
        q, key_descriptor(k, geo, keys), None if v is None else key_descriptor(v, geo, keys),
        None if share is None else share.gates, out, lse, geo.documents, starts, scale * LOG2E, slots,
        geo.num_documents, band.limit(geo), HAS_V=v is not None, **share_constants(share),
        restore=[] if share is None else [out], options=options["launch"], tokens=geo.tokens, **constants,
    )  # fmt: skip
    return out, lse
