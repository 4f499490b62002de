"""Triton kernel of the block-sparse forward.

A program owns a tile: TOKENS neighbouring tokens x the heads of one KV group, padded to ROWS rows in all. It
walks the union of the blocks its tokens chose, so that K and V are read once a tile and not once a token. A block
wholly in the past is taken or left by a row as a whole. Such a row is masked by the number subtracted in the exponent
(infinity gives probability 0), which costs nothing per key; only the last blocks need a causal mask.

Shapes: n = B T tokens laid out flat, Hq query heads, H KV heads, D head size, N blocks of BLOCK keys. q and out
[n, Hq, D]; k and v [n, H, D]; bias [n, H or Hq, N]; lse float32 [n, Hq], to base 2; lists as in ``schedule.TileLists``.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dashattn.ops.block_sparse.schedule import TileLists
from dashattn.ops.tiles import LOG2E, Geometry, locate_tile, power_of_2_from, query_rows
from dashattn.ops.tuning import around, launch

# Finite, so that a row that has met no key yet rescales by exp2(0) and not by NaN.
NO_PEAK = tl.constexpr(-1e30)
SHARED_MEMORY = 220 * 1024  # bytes for tiles; the rest is left to Triton


@triton.jit
def _attend_block(
    acc, total, peak, q, k_desc, v_desc, bias_row, entry_block, choice, token, position, kv_head, start,
    scale_log2, BLOCK: tl.constexpr, DIM: tl.constexpr, HAS_BIAS: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over the keys of one block; base-2 logarithms throughout."""
    chosen = ((choice >> token.to(choice.dtype)) & 1) != 0
    first_key = entry_block * BLOCK
    k = k_desc.load([kv_head, start + first_key, 0]).reshape(BLOCK, DIM)
    logits = tl.dot(q, k.T, input_precision=PRECISION)
    if CAUSAL:
        key = first_key + tl.arange(0, BLOCK)
        visible = key[None, :] <= tl.where(chosen, position, -1)[:, None]
        logits = tl.where(visible, logits, float("-inf"))
    highest = tl.max(logits, 1) * scale_log2
    if HAS_BIAS:
        bias = tl.load(bias_row + entry_block, mask=chosen, other=0.0).to(tl.float32) * 1.4426950408889634
        highest += bias
    new_peak = tl.where(chosen, tl.maximum(peak, highest), peak)
    shift = tl.where(chosen, new_peak, float("inf"))
    if HAS_BIAS:
        shift -= bias
    p = tl.exp2(logits * scale_log2 - shift[:, None])
    decay = tl.exp2(peak - new_peak)
    total = total * decay + tl.sum(p, 1)
    v = v_desc.load([kv_head, start + first_key, 0]).reshape(BLOCK, DIM)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
    return acc, total, new_peak


@triton.jit(do_not_specialize=["num_slots", "num_documents", "list_width", "bias_width"])
def forward_kernel(
    q_ptr, k_desc, v_desc, bias_ptr, out_ptr, lse_ptr, documents, blocks, choices, counts, scale_log2,
    num_slots, num_documents, list_width, bias_width,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BIAS_HEADS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Late tiles have most to do: they go first, and those of one KV head run together and share it in the L2 cache.
    pid = tl.program_id(0)
    kv_head = pid // num_slots
    slot = num_slots - 1 - pid % num_slots
    _, start, end, index = locate_tile(documents, slot, num_documents, TOKENS)
    if start + index * TOKENS >= end:
        return

    position, query_head, valid, flat_row, offset, in_tile = query_rows(
        start, end, index * TOKENS, kv_head, KV_HEADS, GROUP, GROUP, TOKENS, ROWS, HEAD_DIM, DIM
    )
    token = tl.arange(0, ROWS) // GROUP
    q = tl.load(q_ptr + offset, mask=in_tile, other=0.0)

    HAS_BIAS: tl.constexpr = BIAS_HEADS > 0
    bias_row = None
    if HAS_BIAS:
        bias_head = query_head if BIAS_HEADS > KV_HEADS else kv_head
        bias_row = bias_ptr + ((start + position).to(tl.int64) * BIAS_HEADS + bias_head) * bias_width

    acc = tl.zeros([ROWS, DIM], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    peak = tl.full([ROWS], NO_PEAK, tl.float32)
    list_row = kv_head.to(tl.int64) * num_slots + slot
    list_start = list_row * list_width
    count = counts + list_row * 2
    past = tl.load(count)
    num_blocks = tl.load(count + 1)
    for entry in range(0, past):
        block = tl.load(blocks + list_start + entry)
        choice = tl.load(choices + list_start + entry)
        acc, total, peak = _attend_block(
            acc, total, peak, q, k_desc, v_desc, bias_row, block, choice, token, position, kv_head, start,
            scale_log2, BLOCK, DIM, HAS_BIAS, False, PRECISION,
        )  # fmt: skip
    for entry in range(past, num_blocks):
        block = tl.load(blocks + list_start + entry)
        choice = tl.load(choices + list_start + entry)
        acc, total, peak = _attend_block(
            acc, total, peak, q, k_desc, v_desc, bias_row, block, choice, token, position, kv_head, start,
            scale_log2, BLOCK, DIM, HAS_BIAS, True, PRECISION,
        )  # fmt: skip

    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    tl.store(out_ptr + offset, acc.to(out_ptr.dtype.element_ty), mask=in_tile)
    # An infinite normaliser makes every probability of an empty row 0 in the backward too.
    tl.store(lse_ptr + flat_row, tl.where(empty, float("inf"), peak + tl.log2(total)), mask=valid)


def precision(dtype: torch.dtype) -> str:
    """float32 inputs are multiplied to float32 accuracy by three TF32 products (one alone errs by 3e-4)."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def key_descriptor(x: Tensor, geo: Geometry, block_size: int) -> TensorDescriptor:
    """Blocks of one head of [n, H, D]; tokens past the end and padding of D read as 0."""
    return TensorDescriptor(
        x,
        shape=[geo.kv_heads, x.shape[0], geo.head_dim],
        strides=[geo.head_dim, geo.kv_heads * geo.head_dim, 1],
        block_shape=[1, block_size, geo.padded_dim],
    )


def stages_that_fit(resident: int, streamed: int, wanted: int) -> int:
    """Pipeline stages for which tiles of these bytes fit the 227 KiB of shared memory of a Hopper multiprocessor."""
    return max(1, min(wanted, (SHARED_MEMORY - resident) // streamed))


@cache
def forward_options(dim: int, block_size: int, itemsize: int) -> dict:
    """Rows of a tile, and launch options.

    64 rows leave room for two programs per multiprocessor, one multiplying while the other is at its softmax.
    """
    if itemsize == 4:
        # The three-part products of float32 keep two more copies of their operands. Of 64 rows by blocks of 16, 8 warps
        # read past the operands (Triton 3.6).
        return dict(rows=64 if dim <= 128 else 32, launch=(dict(num_warps=4, num_stages=1),))
    stages = stages_that_fit(64 * dim * itemsize, 2 * block_size * dim * itemsize, 2)
    return dict(rows=64, launch=around(4, stages))


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, lists: TileLists, geo: Geometry, block_size: int,
    scale: float, options: dict,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output [n, Hq, D] and base-2 log-normalisers, float32 [n, Hq]. All tensors flat and contiguous."""
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    slots = geo.slots(lists.tokens)
    launch(
        forward_kernel, (slots * geo.kv_heads,),
        q, key_descriptor(k, geo, block_size), key_descriptor(v, geo, block_size), bias, out, lse,
        geo.documents, lists.blocks, lists.choices, lists.counts, scale * LOG2E,
        slots, geo.num_documents, lists.blocks.shape[-1], 0 if bias is None else bias.shape[-1],
        KV_HEADS=geo.kv_heads, GROUP=geo.group, ROWS=power_of_2_from(lists.tokens * geo.group), TOKENS=lists.tokens,
        BLOCK=block_size,
        HEAD_DIM=geo.head_dim, DIM=geo.padded_dim, BIAS_HEADS=0 if bias is None else bias.shape[1],
        PRECISION=precision(q.dtype), options=options["launch"], tokens=geo.tokens,
    )  # fmt: skip
    return out, lse
