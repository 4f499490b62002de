"""Triton kernels of attention over a band of keys, backward; see ``triton_forward``.

dq by query tile, dk and dv by tile of keys over the query tiles that see it. There are few compressed keys and many
queries: their tiles are dealt out to several programs, and the parts added in a fixed order.

Shapes as in ``triton_forward``: do like out; dq like q; delta float32 [n, Hq]; dk and dv [splits, J, H, D], float32
where there are several splits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dashattn.ops.band.triton_forward import (
    Band,
    band_constants,
    band_tiles,
    partial_tile,
    tile_keys,
    visible_keys,
)
from dashattn.ops.block_sparse.triton_backward import delta, key_grad_options, packs, query_grad_options
from dashattn.ops.block_sparse.triton_forward import key_descriptor
from dashattn.ops.tiles import LOG2E, Geometry, locate_tile, query_rows, query_splits
from dashattn.ops.tuning import around, launch


@triton.jit
def _query_grad_keys(dq, q, do, lse, delta, k_desc, v_desc, kv_head, first_key, key, begin, stop, scale_log2,
                     KEYS: tl.constexpr, DIM: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    k = k_desc.load([kv_head, first_key + key, 0]).reshape(KEYS, DIM)
    logits = tl.dot(q, k.T, input_precision=PRECISION)
    v = v_desc.load([kv_head, first_key + key, 0]).reshape(KEYS, DIM)
    dp = tl.dot(do, v.T, input_precision=PRECISION)
    p = tl.exp2(logits * scale_log2 - lse[:, None])
    if MASKED:
        column = (key + tl.arange(0, KEYS))[None, :]
        p = tl.where((column >= begin[:, None]) & (column < stop[:, None]), p, 0.0)
    dl = p * (dp - delta[:, None])
    return tl.dot(dl.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=["num_slots", "num_documents", "span"])
def band_query_grad_kernel(
    q_ptr, k_desc, v_desc, do_ptr, lse_ptr, delta_ptr, dq_ptr, documents, key_starts, scale, scale_log2,
    num_slots, num_documents, span,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, PER_TOKEN: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    KEYS: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
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
    do = tl.load(do_ptr + offset, mask=in_tile, other=0.0)
    lse = tl.load(lse_ptr + flat_row, mask=valid, other=float("inf"))
    delta = tl.load(delta_ptr + flat_row, mask=valid, other=0.0)
    stop = visible_keys(position, SIZE, STRIDE)
    begin = tl.maximum(stop - span, 0)

    dq = tl.zeros([ROWS, DIM], tl.float32)
    first_stop = visible_keys(index * TOKENS, SIZE, STRIDE)
    lowest, whole, whole_end, low_tiles, high_tiles = band_tiles(begin, stop, first_stop, KEYS)
    for key in range(whole, whole_end, KEYS):
        dq = _query_grad_keys(
            dq, q, do, lse, delta, k_desc, v_desc, kv_head, first_key, key, begin, stop, scale_log2, KEYS, DIM, False,
            PRECISION,
        )  # fmt: skip
    for tile in range(0, low_tiles + high_tiles):
        key = partial_tile(tile, lowest, whole_end, low_tiles, KEYS)
        dq = _query_grad_keys(
            dq, q, do, lse, delta, k_desc, v_desc, kv_head, first_key, key, begin, stop, scale_log2, KEYS, DIM, True,
            PRECISION,
        )  # fmt: skip
    tl.store(dq_ptr + offset, (dq * scale).to(dq_ptr.dtype.element_ty), mask=in_tile)


@triton.jit(do_not_specialize=["num_keys", "num_documents", "span", "splits"])
def band_key_grad_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, documents, key_starts, scale, scale_log2,
    num_keys, num_documents, span, splits,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, PER_TOKEN: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    KEYS: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Takes every ``splits``-th of the query tiles that see the tile of keys. Logits stand as [key, row]."""
    kv_head = tl.program_id(0) % KV_HEADS
    slot = tl.program_id(0) // KV_HEADS
    split = tl.program_id(1)
    document, first_key, end_key, tile = locate_tile(key_starts, slot, num_documents, KEYS)
    if first_key + tile * KEYS >= end_key:
        return
    start = tl.load(documents + document)
    end = tl.load(documents + document + 1)
    key = tile * KEYS + tl.arange(0, KEYS)
    dim = tl.arange(0, DIM)
    in_keys = (first_key + key < end_key)[:, None] & (dim < HEAD_DIM)[None, :]
    offset = ((first_key + key).to(tl.int64)[:, None] * KV_HEADS + kv_head) * HEAD_DIM + dim[None, :]
    k = tl.load(k_ptr + offset, mask=in_keys, other=0.0)
    v = tl.load(v_ptr + offset, mask=in_keys, other=0.0)

    row = tl.arange(0, ROWS)
    query_head = kv_head * GROUP + row % PER_TOKEN
    dk = tl.zeros([KEYS, DIM], tl.float32)
    dv = tl.zeros([KEYS, DIM], tl.float32)
    # A key is seen from its end on, until ``span`` more keys have ended. From the last query back, so that programs
    # that run at once, of which all see late queries, share them in the L2 cache.
    first_seen = tile * KEYS * STRIDE + SIZE - 1
    seen_end = tl.minimum(first_seen + (KEYS - 1 + span) * STRIDE, end - start)
    for query_tile in range(split, tl.cdiv(seen_end - first_seen, TOKENS), splits):
        position = seen_end - (query_tile + 1) * TOKENS + row // PER_TOKEN
        valid = (position >= first_seen) & (row % PER_TOKEN < GROUP) & (row < TOKENS * PER_TOKEN)
        flat_row = (start + position).to(tl.int64) * (KV_HEADS * GROUP) + query_head
        row_offset = flat_row[:, None] * HEAD_DIM + dim[None, :]
        in_tile = valid[:, None] & (dim < HEAD_DIM)[None, :]
        q = tl.load(q_ptr + row_offset, mask=in_tile, other=0.0)
        do = tl.load(do_ptr + row_offset, mask=in_tile, other=0.0)
        lse = tl.load(lse_ptr + flat_row, mask=valid, other=float("inf"))
        delta = tl.load(delta_ptr + flat_row, mask=valid, other=0.0)
        stop = visible_keys(position, SIZE, STRIDE)
        logits = tl.dot(k, q.T, input_precision=PRECISION)
        p = tl.exp2(logits * scale_log2 - lse[None, :])
        p = tl.where((key[:, None] < stop[None, :]) & (key[:, None] >= (stop - span)[None, :]), p, 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(v, do.T, input_precision=PRECISION)
        dl = p * (dp - delta[None, :])
        dk = tl.dot(dl.to(q.dtype), q, dk, input_precision=PRECISION)
    offset += split.to(tl.int64) * num_keys * KV_HEADS * HEAD_DIM
    tl.store(dk_ptr + offset, (dk * scale).to(dk_ptr.dtype.element_ty), mask=in_keys)
    tl.store(dv_ptr + offset, dv.to(dv_ptr.dtype.element_ty), mask=in_keys)


def backward(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, out: Tensor, lse: Tensor, starts: Tensor, geo: Geometry, band: Band,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk and dv. All tensors flat and contiguous; rows of k and v that no document owns get 0."""
    delta_nH = delta(out, do)
    dq = torch.empty_like(q)
    keys = tile_keys(q.itemsize)
    span = band.limit(geo)
    options = query_grad_options(geo.padded_dim, keys, q.itemsize)
    constants = band_constants(geo, band, q.dtype, options["rows"], packs(geo))
    slots = geo.slots(constants["TOKENS"])
    launch(
        band_query_grad_kernel, (slots * geo.kv_heads,),
        q, key_descriptor(k, geo, keys), key_descriptor(v, geo, keys), do, lse, delta_nH, dq, geo.documents, starts,
        scale, scale * LOG2E, slots, geo.num_documents, span, options=options["launch"], tokens=geo.tokens,
        **constants,
    )  # fmt: skip

    programs = (k.shape[0] // keys + geo.num_documents) * geo.kv_heads
    splits = query_splits(programs, min(span * band.stride, geo.longest) * geo.group)
    dtype = k.dtype if splits == 1 else torch.float32
    dk, dv = (torch.zeros(splits, *k.shape, dtype=dtype, device=k.device) for _ in range(2))
    options = key_grad_options(geo.padded_dim, keys, q.itemsize)
    first = options["launch"][0]
    constants = band_constants(geo, band, q.dtype, options["rows"], packs(geo))
    launch(
        band_key_grad_kernel, (programs, splits),
        q, k, v, do, lse, delta_nH, dk, dv, geo.documents, starts, scale, scale * LOG2E, k.shape[0],
        geo.num_documents, span, splits, tokens=geo.tokens,
        # Rows lie side by side here: a second program gains more than a third stage.
        options=around(first["num_warps"], min(2, first["num_stages"])),
        **constants,
    )  # fmt: skip
    dk, dv = (x[0] if splits == 1 else x.sum(0).to(k.dtype) for x in (dk, dv))
    return dq, dk, dv
