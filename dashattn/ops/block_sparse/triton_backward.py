"""Triton kernels of the block-sparse backward.

With p the attention probabilities, dp = do . v and delta = do . o:  dl = p (dp - delta);  dq = scale sum dl k;
dk = scale sum dl q;  dv = sum p do;  the gradient of a block's bias is the sum of dl over its keys.

dq (and the bias) by query tile, as in the forward. dk and dv by key block over the tokens that chose it, gathered, so
that no row of this kernel is idle and nothing is added atomically.

Shapes as in ``triton_forward``: do like out; dq, dk and dv like q, k and v; delta float32 [n, Hq]; the gradient of the
bias float32 [n, H or Hq, N]; sums, dk and dv of a block's windows so far, float32 [2, n, H, D]; turns
int32 [H, slots, parts of a block]; lists of tokens as in ``schedule.KeyLists``.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from dashattn.ops.block_sparse.schedule import KeyLists, TileLists, key_list_start
from dashattn.ops.block_sparse.triton_forward import key_descriptor, precision, stages_that_fit
from dashattn.ops.tiles import LOG2E, Geometry, locate_tile, power_of_2_from, query_rows
from dashattn.ops.tuning import around, launch


@triton.jit(do_not_specialize=["num_rows"])
def _delta_kernel(
    out_ptr, grad_ptr, delta_ptr, num_rows, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, DIM)
    mask = (row < num_rows)[:, None] & (dim < HEAD_DIM)[None, :]
    offset = row[:, None] * HEAD_DIM + dim[None, :]
    out = tl.load(out_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(delta_ptr + row, tl.sum(out * grad, 1), mask=row < num_rows)


@triton.jit
def _query_grad_block(
    dq, q, do, k_desc, v_desc, bias_row, bias_grad, shift, delta, entry_block, choice, token, position, kv_head,
    start, scale_log2, in_group, BLOCK: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, GROUP_P: tl.constexpr,
    TOKENS: tl.constexpr, HAS_BIAS: tl.constexpr, BIAS_GRAD: tl.constexpr, PER_HEAD: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds one block to dq, KEYS keys at a time, and writes the gradient of its bias."""
    chosen = ((choice >> token.to(choice.dtype)) & 1) != 0
    for part in tl.static_range(BLOCK // KEYS):
        first_key = entry_block * BLOCK + part * KEYS
        k = k_desc.load([kv_head, start + first_key, 0]).reshape(KEYS, DIM)
        logits = tl.dot(q, k.T, input_precision=PRECISION)
        v = v_desc.load([kv_head, start + first_key, 0]).reshape(KEYS, DIM)
        dp = tl.dot(do, v.T, input_precision=PRECISION)
        row_shift = tl.where(chosen, shift, float("inf"))
        if HAS_BIAS:
            row_shift -= tl.load(bias_row + entry_block, mask=chosen, other=0.0).to(tl.float32) * 1.4426950408889634
        p = tl.exp2(logits * scale_log2 - row_shift[:, None])
        if CAUSAL:
            key = first_key + tl.arange(0, KEYS)
            p = tl.where(key[None, :] <= position[:, None], p, 0.0)
        dl = p * (dp - delta[:, None])
        if BIAS_GRAD:
            if part == 0:
                row_sum = tl.sum(dl, 1)
            else:
                row_sum += tl.sum(dl, 1)
            if part == BLOCK // KEYS - 1:
                if PER_HEAD:
                    tl.store(bias_grad + entry_block, row_sum, mask=chosen & in_group)
                else:
                    token_sum = tl.sum(tl.reshape(row_sum, (TOKENS, GROUP_P)), 1)
                    lane = tl.arange(0, TOKENS)
                    token_chose = ((choice >> lane.to(choice.dtype)) & 1) != 0
                    tl.store(bias_grad + entry_block, token_sum, mask=token_chose)
        dq = tl.dot(dl.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=["num_slots", "num_documents", "list_width", "bias_width"])
def query_grad_kernel(
    q_ptr, k_desc, v_desc, bias_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, bias_grad_ptr, documents, blocks, choices,
    counts, scale, scale_log2, num_slots, num_documents, list_width, bias_width,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_P: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
    KEYS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BIAS_HEADS: tl.constexpr,
    BIAS_GRAD_HEADS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    kv_head = pid // num_slots
    slot = num_slots - 1 - pid % num_slots
    _, start, end, index = locate_tile(documents, slot, num_documents, TOKENS)
    if start + index * TOKENS >= end:
        return

    ROWS: tl.constexpr = TOKENS * GROUP_P
    position, query_head, valid, flat_row, offset, in_tile = query_rows(
        start, end, index * TOKENS, kv_head, KV_HEADS, GROUP, GROUP_P, TOKENS, ROWS, HEAD_DIM, DIM
    )
    token = tl.arange(0, ROWS) // GROUP_P
    in_group = tl.arange(0, ROWS) % GROUP_P < GROUP
    q = tl.load(q_ptr + offset, mask=in_tile, other=0.0)
    do = tl.load(do_ptr + offset, mask=in_tile, other=0.0)
    shift = tl.load(lse_ptr + flat_row, mask=valid, other=float("inf"))
    delta = tl.load(delta_ptr + flat_row, mask=valid, other=0.0)

    HAS_BIAS: tl.constexpr = BIAS_HEADS > 0
    bias_row = None
    if HAS_BIAS:
        bias_head = query_head if BIAS_HEADS > KV_HEADS else kv_head
        bias_row = bias_ptr + ((start + position).to(tl.int64) * BIAS_HEADS + bias_head) * bias_width
    BIAS_GRAD: tl.constexpr = BIAS_GRAD_HEADS > 0
    PER_HEAD: tl.constexpr = BIAS_GRAD_HEADS > KV_HEADS
    bias_grad = None
    if PER_HEAD:
        bias_grad = bias_grad_ptr + flat_row * bias_width
    elif BIAS_GRAD:
        tile_token = (start + index * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
        bias_grad = bias_grad_ptr + (tile_token * KV_HEADS + kv_head) * bias_width

    dq = tl.zeros([ROWS, DIM], tl.float32)
    list_row = kv_head.to(tl.int64) * num_slots + slot
    list_start = list_row * list_width
    count = counts + list_row * 2
    past = tl.load(count)
    num_blocks = tl.load(count + 1)
    for entry in range(0, past):
        block = tl.load(blocks + list_start + entry)
        choice = tl.load(choices + list_start + entry)
        dq = _query_grad_block(
            dq, q, do, k_desc, v_desc, bias_row, bias_grad, shift, delta, block, choice, token, position, kv_head,
            start, scale_log2, in_group, BLOCK, KEYS, DIM, GROUP_P, TOKENS, HAS_BIAS, BIAS_GRAD, PER_HEAD, False,
            PRECISION,
        )  # fmt: skip
    for entry in range(past, num_blocks):
        block = tl.load(blocks + list_start + entry)
        choice = tl.load(choices + list_start + entry)
        dq = _query_grad_block(
            dq, q, do, k_desc, v_desc, bias_row, bias_grad, shift, delta, block, choice, token, position, kv_head,
            start, scale_log2, in_group, BLOCK, KEYS, DIM, GROUP_P, TOKENS, HAS_BIAS, BIAS_GRAD, PER_HEAD, True,
            PRECISION,
        )  # fmt: skip
    tl.store(dq_ptr + offset, (dq * scale).to(dq_ptr.dtype.element_ty), mask=in_tile)


@triton.jit
def _key_grad_tokens(
    dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, bias_ptr, list_ptr, first, stop, block, first_key, kv_head,
    scale_log2, bias_width, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, PER_TOKEN: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, KEYS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
    BIAS_HEADS: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what TOKENS tokens of the list, all heads of the group, give to one block. Logits stand as [key, row]."""
    row = tl.arange(0, ROWS)
    place = first + row // PER_TOKEN
    valid = (place < stop) & (row % PER_TOKEN < GROUP) & (row < TOKENS * PER_TOKEN)
    token = tl.load(list_ptr + place, mask=valid, other=0)
    query_head = kv_head * GROUP + row % PER_TOKEN
    flat_row = token.to(tl.int64) * (KV_HEADS * GROUP) + query_head
    dim = tl.arange(0, DIM)
    offset = flat_row[:, None] * HEAD_DIM + dim[None, :]
    in_tile = valid[:, None] & (dim < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + offset, mask=in_tile, other=0.0)
    logits = tl.dot(k, q.T, input_precision=PRECISION)
    shift = tl.load(lse_ptr + flat_row, mask=valid, other=float("inf"))
    if BIAS_HEADS > 0:
        bias_head = query_head if BIAS_HEADS > KV_HEADS else kv_head
        bias_offset = (token.to(tl.int64) * BIAS_HEADS + bias_head) * bias_width + block
        shift -= tl.load(bias_ptr + bias_offset, mask=valid, other=0.0).to(tl.float32) * 1.4426950408889634
    p = tl.exp2(logits * scale_log2 - shift[None, :])
    if CAUSAL:
        key = first_key + tl.arange(0, KEYS)
        p = tl.where(key[:, None] <= token[None, :], p, 0.0)
    do = tl.load(do_ptr + offset, mask=in_tile, other=0.0)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    dp = tl.dot(v, do.T, input_precision=PRECISION)
    delta = tl.load(delta_ptr + flat_row, mask=valid, other=0.0)
    dl = p * (dp - delta[None, :])
    dk = tl.dot(dl.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(
    do_not_specialize=["num_tokens", "num_slots", "num_documents", "capacity", "num_windows", "window", "bias_width"]
)
def key_grad_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, sums_ptr, turns, documents, list_tokens,
    list_bases, counts, offsets, scale, scale_log2, num_tokens, num_slots, num_documents, capacity, num_windows, window,
    bias_width,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, PER_TOKEN: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BIAS_HEADS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What the tokens of one window give to one block.

    All blocks of a window come one after the other, so that its queries and output gradients stay in the L2 cache.
    The windows of a block add up in their order: a program waits for its turn after its own work is done. Where there
    are several, programs take numbers as they start, so that whoever is waited for, a lower number, has started.
    ``turns``: the next number, and of each block and part the windows that have added up.
    """
    PARTS: tl.constexpr = BLOCK // KEYS
    pid = tl.program_id(0)
    if num_windows > 1:
        pid = tl.atomic_add(turns, 1, sem="relaxed")
    part = pid % PARTS
    slot = pid // PARTS % num_slots
    kv_head = pid // PARTS // num_slots % KV_HEADS
    this_window = pid // PARTS // num_slots // KV_HEADS
    document, start, end, block = locate_tile(documents, slot, num_documents, BLOCK)
    first_key = start + block * BLOCK + part * KEYS
    first_window = (start + block * BLOCK) // window
    last_window = (end - 1) // window
    if (first_key >= end) | (this_window < first_window) | (this_window > last_window):
        return
    key = first_key + tl.arange(0, KEYS)
    dim = tl.arange(0, DIM)
    offset = (key.to(tl.int64)[:, None] * KV_HEADS + kv_head) * HEAD_DIM + dim[None, :]
    in_block = (key < end)[:, None] & (dim < HEAD_DIM)[None, :]
    k = tl.load(k_ptr + offset, mask=in_block, other=0.0)
    v = tl.load(v_ptr + offset, mask=in_block, other=0.0)
    dk = tl.zeros([KEYS, DIM], tl.float32)
    dv = tl.zeros([KEYS, DIM], tl.float32)

    document_base = tl.load(list_bases + document)
    list_ptr = list_tokens + key_list_start(document_base, kv_head, capacity, block, end - start, BLOCK)
    row = kv_head.to(tl.int64) * num_slots + slot
    offset_ptr = offsets + row * num_windows + this_window
    begin = tl.load(offset_ptr, mask=this_window > first_window, other=0)
    stop = tl.load(counts + row * 2 + 1)
    stop = tl.load(offset_ptr + 1, mask=this_window < last_window, other=stop)
    near = tl.minimum(tl.load(counts + row * 2), stop)
    for first in range(begin, near, TOKENS):
        dk, dv = _key_grad_tokens(
            dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, bias_ptr, list_ptr, first, near, block, first_key, kv_head,
            scale_log2, bias_width, KV_HEADS, GROUP, PER_TOKEN, ROWS, TOKENS, KEYS, HEAD_DIM, DIM, BIAS_HEADS, True,
            PRECISION,
        )  # fmt: skip
    for first in range(tl.maximum(begin, near), stop, TOKENS):
        dk, dv = _key_grad_tokens(
            dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, bias_ptr, list_ptr, first, stop, block, first_key, kv_head,
            scale_log2, bias_width, KV_HEADS, GROUP, PER_TOKEN, ROWS, TOKENS, KEYS, HEAD_DIM, DIM, BIAS_HEADS, False,
            PRECISION,
        )  # fmt: skip

    sums_ptr += offset
    dv_sums_ptr = sums_ptr + num_tokens.to(tl.int64) * (KV_HEADS * HEAD_DIM)
    turn_ptr = turns + 1 + row * PARTS + part
    if this_window > first_window:
        while tl.atomic_add(turn_ptr, 0, sem="acquire") != this_window - first_window:
            pass
        dk += tl.load(sums_ptr, mask=in_block, other=0.0, cache_modifier=".cg")
        dv += tl.load(dv_sums_ptr, mask=in_block, other=0.0, cache_modifier=".cg")
    if this_window < last_window:
        tl.store(sums_ptr, dk, mask=in_block)
        tl.store(dv_sums_ptr, dv, mask=in_block)
        tl.debug_barrier()
        tl.atomic_add(turn_ptr, 1, sem="release")
    else:
        tl.store(dk_ptr + offset, (dk * scale).to(dk_ptr.dtype.element_ty), mask=in_block)
        tl.store(dv_ptr + offset, dv.to(dv_ptr.dtype.element_ty), mask=in_block)


def delta(out: Tensor, grad: Tensor) -> Tensor:
    """sum over D of out * grad, float32 [n, Hq]."""
    rows, head_dim = out.shape[0] * out.shape[1], out.shape[2]
    result = torch.empty(out.shape[:2], dtype=torch.float32, device=out.device)
    _delta_kernel[(-(-rows // 32),)](out, grad, result, rows, HEAD_DIM=head_dim, DIM=power_of_2_from(head_dim), ROWS=32)
    return result


def packs(geo: Geometry) -> bool:
    """Whether the kernels of the backward that gather or mask rows leave none idle (``Geometry.tile``).

    With heads of 128 what divisions by a group of 7 keep in registers spills, and costs more than the idle rows.
    """
    return geo.padded_dim <= 64


@cache
def query_grad_options(dim: int, block_size: int, itemsize: int) -> dict:
    """Rows of a tile, keys of a block at a time, and launch options."""
    warps = 8 if dim > 128 else 4
    if itemsize == 4:
        return dict(rows=32, keys=min(block_size, 2**14 // dim), launch=around(warps, 1))
    stages = stages_that_fit(2 * 64 * dim * itemsize, 2 * block_size * dim * itemsize, 2)
    return dict(rows=64, keys=block_size, launch=around(warps, stages))


@cache
def key_grad_options(dim: int, block_size: int, itemsize: int) -> dict:
    """Keys of a tile (a block or a part of it), rows, and launch options."""
    warps = 8 if dim > 128 else 4
    if itemsize == 4:
        return dict(keys=min(block_size, 32), rows=32, launch=around(warps, 1))
    keys, rows = min(block_size, 64), 64 if dim <= 128 else 32
    stages = stages_that_fit(2 * keys * dim * itemsize, 2 * rows * dim * itemsize, 3 if dim <= 128 else 1)
    return dict(keys=keys, rows=rows, launch=around(warps, stages))


# Bytes of queries and output gradients that stay in the L2 cache of an H100 or H200, and programs that keep its 132
# multiprocessors evenly busy although the lists of a window differ in length.
WINDOW_BYTES = 2**24
KEY_GRAD_PROGRAMS = 4096


def key_grad_window(geo: Geometry, block_size: int, itemsize: int, keys: int) -> int:
    """Tokens of a window of the key kernel: a power of two."""
    cached = WINDOW_BYTES // (2 * geo.group * geo.head_dim * itemsize)
    programs = geo.slots(block_size) * (block_size // keys) * geo.kv_heads
    even = geo.tokens * programs // KEY_GRAD_PROGRAMS
    return max(256, 2 ** (min(cached, even).bit_length() - 1))


def query_grad(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, do: Tensor, lse: Tensor, delta_: Tensor, lists: TileLists,
    geo: Geometry, block_size: int, scale: float, bias_grad: Tensor | None, options: dict,
) -> Tensor:  # fmt: skip
    """dq; adds nothing to but overwrites the selected entries of ``bias_grad``, float32 [n, H or Hq, N]."""
    dq = torch.empty_like(q)
    slots, keys = geo.slots(lists.tokens), options["keys"]
    bias_width = next((x.shape[-1] for x in (bias, bias_grad) if x is not None), 0)
    launch(
        query_grad_kernel, (slots * geo.kv_heads,),
        q, key_descriptor(k, geo, keys), key_descriptor(v, geo, keys), bias, do, lse, delta_, dq, bias_grad,
        geo.documents, lists.blocks, lists.choices, lists.counts, scale, scale * LOG2E, slots, geo.num_documents,
        lists.blocks.shape[-1], bias_width,
        KV_HEADS=geo.kv_heads, GROUP=geo.group, GROUP_P=geo.padded_group, TOKENS=lists.tokens, BLOCK=block_size,
        KEYS=keys, HEAD_DIM=geo.head_dim, DIM=geo.padded_dim, BIAS_HEADS=0 if bias is None else bias.shape[1],
        BIAS_GRAD_HEADS=0 if bias_grad is None else bias_grad.shape[1], PRECISION=precision(q.dtype),
        options=options["launch"], tokens=geo.tokens,
    )  # fmt: skip
    return dq


def key_grad(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, do: Tensor, lse: Tensor, delta_: Tensor, lists: KeyLists,
    geo: Geometry, block_size: int, scale: float, options: dict,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    slots = geo.slots(block_size)
    parts = block_size // options["keys"]
    windows = lists.offsets.shape[-1]
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    sums = torch.empty(2 if windows > 1 else 0, *k.shape, dtype=torch.float32, device=k.device)
    turns = torch.zeros(1 + geo.kv_heads * slots * parts, dtype=torch.int32, device=k.device)
    launch(
        key_grad_kernel, (windows * geo.kv_heads * slots * parts,),
        q, k, v, bias, do, lse, delta_, dk, dv, sums, turns, geo.documents, lists.tokens, lists.bases, lists.counts,
        lists.offsets, scale, scale * LOG2E, geo.tokens, slots, geo.num_documents, lists.tokens.shape[1], windows,
        lists.window, 0 if bias is None else bias.shape[-1],
        KV_HEADS=geo.kv_heads, GROUP=geo.group, **geo.tile(options["rows"], packed=packs(geo)), BLOCK=block_size,
        KEYS=options["keys"], HEAD_DIM=geo.head_dim, DIM=geo.padded_dim,
        BIAS_HEADS=0 if bias is None else bias.shape[1], PRECISION=precision(q.dtype),
        options=options["launch"], tokens=geo.tokens, restore=[turns],
    )  # fmt: skip
    return dk, dv
