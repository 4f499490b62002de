"""Block-sparse backward for Hopper by key block, in Gluon (Triton's lower level): dk and dv, and dq where that pays.

A program owns 64 keys of a block and walks the tokens of one window that chose it, 64 rows (token, head of the group)
at a time. Of each tile it forms four products: S = k q^T, dP = v do^T, dv += P do and dk += dS q. Where it is fused, it
forms dq = dS^T k, too, which many blocks have a share in: it is added up in float32 by the L2 cache, which holds a
window's sums beside its queries and output gradients, in whatever order the shares come. Against
``triton_backward.query_grad`` that saves two products, and the blocks that only a neighbour in a tile chose.

Shapes as in ``triton_backward``, D 64 or 128. In shared memory: k_tile and v_tile [64, D], the rings q_ring and
do_ring [2, 64, D], ds_tile [64 keys, 64 rows], shift_line and delta_line float32 [64], sums of the bias gradient
float32 [4 warps, WIDTH]. Sums of dq: float32 [n, H, D / 16, PER_TOKEN, 16], see ``round_kernel``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from dashattn.ops.block_sparse import dq_sums as sizes
from dashattn.ops.block_sparse.schedule import KeyLists, key_list_start
from dashattn.ops.block_sparse.triton_backward import packs
from dashattn.ops.tiles import LOG2E, Geometry, locate_tile

# The same barrier among the warps of a partition has another name from Triton 3.7 on.
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
ROWS = gl.constexpr(64)
KEYS = gl.constexpr(64)
STAGES = gl.constexpr(2)


@gluon.jit
def _rows(list_ptr, first, stop, kv_head, row, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, PER_TOKEN: gl.constexpr,
          TOKENS: gl.constexpr):  # fmt: skip
    """(token, row of [n * Hq], whether it stands for a query) of each row of a tile; idle ones repeat another."""
    place = first + row // PER_TOKEN
    valid = (place < stop) & (row % PER_TOKEN < GROUP) & (row < TOKENS * PER_TOKEN)
    token = gl.load(list_ptr + gl.minimum(place, stop - 1))
    head = kv_head * GROUP + gl.minimum(row % PER_TOKEN, GROUP - 1)
    return token, token.to(gl.int64) * (KV_HEADS * GROUP) + head, valid


@gluon.jit
def _fetch(q_ptr, do_ptr, lse_ptr, delta_ptr, bias_ptr, q_stage, do_stage, list_ptr, first, stop, block, kv_head,
           bias_width, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, PER_TOKEN: gl.constexpr, TOKENS: gl.constexpr,
           DIM: gl.constexpr, BIAS_HEADS: gl.constexpr):  # fmt: skip
    """Begins to copy a tile's queries and output gradients; returns its shifts and deltas, one row a thread."""
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LOAD))
    dim = gl.arange(0, DIM, layout=gl.SliceLayout(0, LOAD))
    _, flat_row, _ = _rows(list_ptr, first, stop, kv_head, row, KV_HEADS, GROUP, PER_TOKEN, TOKENS)
    offset = flat_row[:, None] * DIM + dim[None, :]
    async_copy.async_copy_global_to_shared(q_stage, q_ptr + offset)
    async_copy.async_copy_global_to_shared(do_stage, do_ptr + offset)
    async_copy.commit_group()
    row = gl.arange(0, ROWS, layout=LINE)
    token, flat_row, valid = _rows(list_ptr, first, stop, kv_head, row, KV_HEADS, GROUP, PER_TOKEN, TOKENS)
    shift = gl.load(lse_ptr + flat_row, mask=valid, other=float("inf"))
    if BIAS_HEADS > 0:
        bias_row = flat_row if BIAS_HEADS > KV_HEADS else token.to(gl.int64) * KV_HEADS + kv_head
        bias = gl.load(bias_ptr + bias_row * bias_width + block, mask=valid, other=0.0)
        shift -= bias.to(gl.float32) * 1.4426950408889634
    return shift, gl.load(delta_ptr + flat_row, mask=valid, other=0.0)


@gluon.jit
def _sums_of_warps(dl, WIDTH: gl.constexpr):
    """Of [64 keys, 64 rows], 16 keys a warp, the sums over a warp's keys and over neighbouring rows: [4, WIDTH].

    The columns of a thread come first, for they cost no exchange: pairs of rows, and pairs of pairs 8 rows apart.
    """
    if WIDTH <= 32:
        dl = gl.sum(dl.reshape((KEYS, 32, 2)), 2)
    if WIDTH <= 16:
        dl = gl.sum(dl.reshape((KEYS, 4, 2, 4)), 2).reshape((KEYS, 16))
    return gl.sum(dl.reshape((4, 16, WIDTH)), 1)


@gluon.jit
def _add_bias_grad(sums, bias_grad_ptr, list_ptr, first, stop, block, kv_head, bias_width, KV_HEADS: gl.constexpr,
                   GROUP: gl.constexpr, PER_TOKEN: gl.constexpr, TOKENS: gl.constexpr, PARTS: gl.constexpr,
                   BIAS_GRAD_HEADS: gl.constexpr):  # fmt: skip
    """The gradient of the block's bias, of each query head or summed over the group, from ``_sums_of_warps``.

    Idle rows have the sum 0.
    """
    WIDTH: gl.constexpr = sums.shape[1]
    LINE: gl.constexpr = gl.BlockedLayout([4, 1], [1, 32], [1, 4], [0, 1])
    total = gl.sum(sums.load(LINE), 0)
    SUMMED: gl.constexpr = BIAS_GRAD_HEADS == KV_HEADS and PER_TOKEN & (PER_TOKEN - 1) == 0
    if SUMMED:
        total = gl.sum(total.reshape((TOKENS, WIDTH // TOKENS)), 1)
        lane = gl.arange(0, TOKENS, layout=total.type.layout)
        valid = first + lane < stop
        token = gl.load(list_ptr + gl.minimum(first + lane, stop - 1))
        target = token.to(gl.int64) * KV_HEADS + kv_head
    else:
        row = gl.arange(0, ROWS, layout=total.type.layout)
        token, flat_row, valid = _rows(list_ptr, first, stop, kv_head, row, KV_HEADS, GROUP, PER_TOKEN, TOKENS)
        target = flat_row if BIAS_GRAD_HEADS > KV_HEADS else token.to(gl.int64) * KV_HEADS + kv_head
    target = bias_grad_ptr + target * bias_width + block
    if PARTS == 1 and (SUMMED or BIAS_GRAD_HEADS > KV_HEADS):
        gl.store(target, total, mask=valid)
    else:
        gl.atomic_add(target, total, mask=valid, sem="relaxed")


@gluon.jit
def _add(dq, HALF: gl.constexpr, dq_ptr, list_ptr, first, stop, kv_head, KV_HEADS: gl.constexpr, GROUP: gl.constexpr,
         PER_TOKEN: gl.constexpr, TOKENS: gl.constexpr, DIM: gl.constexpr):  # fmt: skip
    """Adds 64 columns of a tile to the sums of dq.

    Each thread has pairs of columns. In the order in which the sums stand (``round_kernel``) four lie side by side, and
    those of a group's heads next to them: reductions take half the time of pairs.
    """
    FOURS: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [8, 0], [0, 16], [0, 32]], [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [],
        [ROWS, 64],
    )  # fmt: skip
    dq = dq.reshape((ROWS, 4, 2, 4, 2)).permute((0, 1, 3, 2, 4)).reshape((ROWS, 64))
    dq = gl.convert_layout(dq, FOURS, assert_trivial=True)
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, FOURS))
    column = gl.arange(0, 64, layout=gl.SliceLayout(0, FOURS))
    token, _, valid = _rows(list_ptr, first, stop, kv_head, row, KV_HEADS, GROUP, PER_TOKEN, TOKENS)
    head = gl.minimum(row % PER_TOKEN, GROUP - 1)
    base = (token.to(gl.int64) * KV_HEADS + kv_head) * (PER_TOKEN * DIM) + HALF * 64 * PER_TOKEN + head * 16
    place = column // 16 * (PER_TOKEN * 16) + column % 16
    target = dq_ptr + base[:, None] + place[None, :]
    if PER_TOKEN == GROUP:  # idle rows add 0 to another one: there are few, and a mask costs a branch an instruction
        gl.atomic_add(target, dq, sem="relaxed")
    else:
        gl.atomic_add(target, dq, mask=valid[:, None], sem="relaxed")


@gluon.jit
def _tokens(
    dk, dv, shift, delta, k_tile, v_tile, q_ring, do_ring, ds_tile, shift_line, delta_line, sums, stage, q_ptr, do_ptr,
    lse_ptr, delta_ptr, bias_ptr, dq_ptr, bias_grad_ptr, list_ptr, first, stop, following, following_stop, block,
    first_key, kv_head, scale_log2, bias_width, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, PER_TOKEN: gl.constexpr,
    TOKENS: gl.constexpr, DIM: gl.constexpr, PARTS: gl.constexpr, BIAS_HEADS: gl.constexpr,
    BIAS_GRAD_HEADS: gl.constexpr, CAUSAL: gl.constexpr, FUSED: gl.constexpr,
):  # fmt: skip
    """One tile, after it has begun to copy the following one. Logits stand as [key, row]."""
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    GRAD: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    ACROSS: gl.constexpr = gl.SliceLayout(0, LOGITS)
    q = q_ring.index(stage)
    do = do_ring.index(stage)
    shift_line.store(shift)
    delta_line.store(delta)
    async_copy.wait_group(0)
    fence_async_shared()
    _barrier()  # this tile has come, and no warp reads the tile before any more
    if following < following_stop:
        shift, delta = _fetch(
            q_ptr, do_ptr, lse_ptr, delta_ptr, bias_ptr, q_ring.index(1 - stage), do_ring.index(1 - stage), list_ptr,
            following, following_stop, block, kv_head, bias_width, KV_HEADS, GROUP, PER_TOKEN, TOKENS, DIM, BIAS_HEADS,
        )  # fmt: skip
    zeros = gl.zeros([KEYS, ROWS], gl.float32, LOGITS)
    logits = warpgroup_mma(k_tile, q.permute((1, 0)), zeros, use_acc=False, is_async=True)
    dp = warpgroup_mma(v_tile, do.permute((1, 0)), zeros, use_acc=False, is_async=True)
    logits = warpgroup_mma_wait(1, deps=[logits])
    p = gl.exp2(logits * scale_log2 - shift_line.load(ACROSS)[None, :])
    if CAUSAL:
        key = first_key + gl.arange(0, KEYS, layout=gl.SliceLayout(1, LOGITS))
        row = gl.arange(0, ROWS, layout=ACROSS)
        token, _, _ = _rows(list_ptr, first, stop, kv_head, row, KV_HEADS, GROUP, PER_TOKEN, TOKENS)
        p = gl.where(key[:, None] <= token[None, :], p, 0.0)
    p_half = gl.convert_layout(p.to(q_ring.dtype), gl.DotOperandLayout(0, GRAD, 2))
    dv = warpgroup_mma(p_half, do, dv, is_async=True)
    if DIM == 128:  # with dv left running, registers spill
        dp, dv = warpgroup_mma_wait(0, deps=[dp, dv])
    else:
        dp = warpgroup_mma_wait(1, deps=[dp])
    dl = p * (dp - delta_line.load(ACROSS)[None, :])
    dl_half = dl.to(q_ring.dtype)
    if FUSED:
        ds_tile.store(dl_half)
        if BIAS_GRAD_HEADS > 0:
            sums.store(_sums_of_warps(dl, sums.shape[1]))
        fence_async_shared()
        _barrier()
    dk = warpgroup_mma(gl.convert_layout(dl_half, gl.DotOperandLayout(0, GRAD, 2)), q, dk, is_async=True)
    if FUSED:
        # Of 64 columns at a time, for the registers.
        PIECE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
        dq_zeros = gl.zeros([ROWS, 64], gl.float32, PIECE)
        ds = ds_tile.permute((1, 0))
        dq = warpgroup_mma(ds, k_tile.slice(0, 64, 1), dq_zeros, use_acc=False, is_async=True)
        if BIAS_GRAD_HEADS > 0:
            _add_bias_grad(
                sums, bias_grad_ptr, list_ptr, first, stop, block, kv_head, bias_width, KV_HEADS, GROUP, PER_TOKEN,
                TOKENS, PARTS, BIAS_GRAD_HEADS,
            )  # fmt: skip
        dv, dk, dq = warpgroup_mma_wait(0, deps=[dv, dk, dq])
        _add(dq, 0, dq_ptr, list_ptr, first, stop, kv_head, KV_HEADS, GROUP, PER_TOKEN, TOKENS, DIM)
        if DIM == 128:
            dq = warpgroup_mma(ds, k_tile.slice(64, 64, 1), dq_zeros, use_acc=False)
            _add(dq, 1, dq_ptr, list_ptr, first, stop, kv_head, KV_HEADS, GROUP, PER_TOKEN, TOKENS, DIM)
    else:
        dv, dk = warpgroup_mma_wait(0, deps=[dv, dk])
    return dk, dv, shift, delta


@gluon.jit(
    do_not_specialize=["num_tokens", "num_slots", "num_documents", "capacity", "num_windows", "window", "bias_width"]
)
def backward_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, dk_ptr, dv_ptr, bias_grad_ptr, sums_ptr, turns,
    documents, list_tokens, list_bases, counts, offsets, scale, scale_log2, num_tokens, num_slots, num_documents,
    capacity, num_windows, window, bias_width,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, PER_TOKEN: gl.constexpr, TOKENS: gl.constexpr, BLOCK: gl.constexpr,
    DIM: gl.constexpr, BIAS_HEADS: gl.constexpr, BIAS_GRAD_HEADS: gl.constexpr, FUSED: gl.constexpr,
):  # fmt: skip
    """Windows and turns as in ``triton_backward.key_grad_kernel``."""
    PARTS: gl.constexpr = BLOCK // KEYS
    pid = gl.program_id(0)
    if num_windows > 1:
        pid = gl.atomic_add(turns, 1, sem="relaxed")
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

    dtype: gl.constexpr = q_ptr.dtype.element_ty
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    GRAD: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    tile_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, DIM], dtype)
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, ROWS], dtype)
    line_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    k_tile = gl.allocate_shared_memory(dtype, [KEYS, DIM], tile_layout)
    v_tile = gl.allocate_shared_memory(dtype, [KEYS, DIM], tile_layout)
    q_ring = gl.allocate_shared_memory(dtype, [STAGES, ROWS, DIM], tile_layout)
    do_ring = gl.allocate_shared_memory(dtype, [STAGES, ROWS, DIM], tile_layout)
    ds_tile = gl.allocate_shared_memory(dtype, [KEYS, ROWS], ds_layout)
    shift_line = gl.allocate_shared_memory(gl.float32, [ROWS], line_layout)
    delta_line = gl.allocate_shared_memory(gl.float32, [ROWS], line_layout)
    sums = None
    if BIAS_GRAD_HEADS > 0:
        WIDE: gl.constexpr = BIAS_GRAD_HEADS > KV_HEADS or PER_TOKEN & (PER_TOKEN - 1) != 0 or PER_TOKEN == 1
        WIDTH: gl.constexpr = 64 if WIDE else 32 if PER_TOKEN < 16 else 16
        sums = gl.allocate_shared_memory(gl.float32, [4, WIDTH], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))

    document_base = gl.load(list_bases + document)
    list_ptr = list_tokens + key_list_start(document_base, kv_head, capacity, block, end - start, BLOCK)
    list_row = kv_head.to(gl.int64) * num_slots + slot
    offset_ptr = offsets + list_row * num_windows + this_window
    begin = gl.load(offset_ptr, mask=this_window > first_window, other=0)
    stop = gl.load(counts + list_row * 2 + 1)
    stop = gl.load(offset_ptr + 1, mask=this_window < last_window, other=stop)
    near = gl.minimum(gl.load(counts + list_row * 2), stop)
    far = gl.maximum(begin, near)

    shift = gl.zeros([ROWS], gl.float32, gl.BlockedLayout([1], [32], [4], [0]))
    delta = shift
    if begin < stop:
        shift, delta = _fetch(
            q_ptr, do_ptr, lse_ptr, delta_ptr, bias_ptr, q_ring.index(0), do_ring.index(0), list_ptr, begin,
            near if begin < near else stop, block, kv_head, bias_width, KV_HEADS, GROUP, PER_TOKEN, TOKENS, DIM,
            BIAS_HEADS,
        )  # fmt: skip
    key = first_key + gl.arange(0, KEYS, layout=gl.SliceLayout(1, LOAD))
    dim = gl.arange(0, DIM, layout=gl.SliceLayout(0, LOAD))
    offset = (key.to(gl.int64)[:, None] * KV_HEADS + kv_head) * DIM + dim[None, :]
    in_block = (key < end)[:, None]
    k_tile.store(gl.load(k_ptr + offset, mask=in_block, other=0.0))
    v_tile.store(gl.load(v_ptr + offset, mask=in_block, other=0.0))
    dk = gl.zeros([KEYS, DIM], gl.float32, GRAD)
    dv = gl.zeros([KEYS, DIM], gl.float32, GRAD)
    stage = 0
    for first in range(begin, near, TOKENS):
        following = first + TOKENS
        dk, dv, shift, delta = _tokens(
            dk, dv, shift, delta, k_tile, v_tile, q_ring, do_ring, ds_tile, shift_line, delta_line, sums, stage, q_ptr,
            do_ptr, lse_ptr, delta_ptr, bias_ptr, dq_ptr, bias_grad_ptr, list_ptr, first, near, following if
            following < near else near, near if following < near else stop, block, first_key, kv_head, scale_log2,
            bias_width, KV_HEADS, GROUP, PER_TOKEN, TOKENS, DIM, PARTS, BIAS_HEADS, BIAS_GRAD_HEADS, True, FUSED,
        )  # fmt: skip
        stage = 1 - stage
    for first in range(far, stop, TOKENS):
        dk, dv, shift, delta = _tokens(
            dk, dv, shift, delta, k_tile, v_tile, q_ring, do_ring, ds_tile, shift_line, delta_line, sums, stage, q_ptr,
            do_ptr, lse_ptr, delta_ptr, bias_ptr, dq_ptr, bias_grad_ptr, list_ptr, first, stop, first + TOKENS, stop,
            block, first_key, kv_head, scale_log2, bias_width, KV_HEADS, GROUP, PER_TOKEN, TOKENS, DIM, PARTS,
            BIAS_HEADS, BIAS_GRAD_HEADS, False, FUSED,
        )  # fmt: skip
        stage = 1 - stage

    key = first_key + gl.arange(0, KEYS, layout=gl.SliceLayout(1, GRAD))
    dim = gl.arange(0, DIM, layout=gl.SliceLayout(0, GRAD))
    offset = (key.to(gl.int64)[:, None] * KV_HEADS + kv_head) * DIM + dim[None, :]
    in_block = (key < end)[:, None]
    sums_ptr += offset
    dv_sums_ptr = sums_ptr + num_tokens.to(gl.int64) * (KV_HEADS * DIM)
    turn_ptr = turns + 1 + list_row * PARTS + part
    if this_window > first_window:
        while gl.atomic_add(turn_ptr, 0, sem="acquire") != this_window - first_window:
            pass
        dk += gl.load(sums_ptr, mask=in_block, other=0.0, cache_modifier=".cg")
        dv += gl.load(dv_sums_ptr, mask=in_block, other=0.0, cache_modifier=".cg")
    if this_window < last_window:
        gl.store(sums_ptr, dk, mask=in_block)
        gl.store(dv_sums_ptr, dv, mask=in_block)
        _barrier()
        gl.atomic_add(turn_ptr, 1, sem="release")
    else:
        gl.store(dk_ptr + offset, (dk * scale).to(dk_ptr.dtype.element_ty), mask=in_block)
        gl.store(dv_ptr + offset, dv.to(dv_ptr.dtype.element_ty), mask=in_block)


@triton.jit(do_not_specialize=["num_rows"])
def round_kernel(sums_ptr, dq_ptr, scale, num_rows, GROUP: tl.constexpr, PER_TOKEN: tl.constexpr, DIM: tl.constexpr,
                 ROWS: tl.constexpr):  # fmt: skip
    """dq from its sums: scaled, with the columns in their order.

    The sums of a token and KV head are float32 [D / 16, PER_TOKEN, 16], and of 16 columns first all pairs of one half.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, DIM)
    place = column // 16 * (PER_TOKEN * 16) + column // 2 % 4 * 4 + column // 8 % 2 * 2 + column % 2
    start = row // GROUP * (PER_TOKEN * DIM) + row % GROUP * 16
    mask = (row < num_rows)[:, None]
    sums = tl.load(sums_ptr + start[:, None] + place[None, :], mask=mask, other=0.0)
    tl.store(dq_ptr + row[:, None] * DIM + column[None, :], (sums * scale).to(dq_ptr.dtype.element_ty), mask=mask)


def supported(q: Tensor, geo: Geometry, block_size: int) -> bool:
    return (
        q.is_cuda
        and torch.cuda.get_device_capability(q.device)[0] == 9
        and q.dtype in (torch.bfloat16, torch.float16)
        and geo.head_dim in sizes.HEAD_DIMS
        and block_size in sizes.BLOCKS
        and geo.group <= sizes.MAX_GROUP
    )


def fused(geo: Geometry) -> bool:
    """Whether forming dq here is faster than by query tile.

    It takes one product for each row and block that it chose, and not three for each block that any token of a tile
    chose, padded heads included; but the reductions double what goes through the L2 cache, 8 D bytes. With heads of 128
    that costs more than the products, but where the tiles have idle rows (measured on an H200).
    """
    return sizes.fused(geo.group, geo.head_dim)


def sums_shape(geo: Geometry) -> tuple[int, ...]:
    """Of dq's sums, see ``round_kernel``."""
    per_token = geo.tile(ROWS.value, packed=packs(geo))["PER_TOKEN"]
    return geo.tokens, geo.kv_heads, geo.head_dim // 16, per_token, 16


def _launch(q, k, v, bias, do, lse, delta, dq_sums, bias_grad, lists, geo, block_size, scale, tile):
    slots, parts, windows = geo.slots(block_size), block_size // KEYS.value, lists.offsets.shape[-1]
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    sums = torch.empty(2 if windows > 1 else 0, *k.shape, dtype=torch.float32, device=k.device)
    turns = torch.zeros(1 + geo.kv_heads * slots * parts, dtype=torch.int32, device=k.device)
    backward_kernel[(windows * geo.kv_heads * slots * parts,)](
        q, k, v, bias, do, lse, delta, dq_sums, dk, dv, bias_grad, sums, turns, geo.documents, lists.tokens,
        lists.bases, lists.counts, lists.offsets, scale, scale * LOG2E, geo.tokens, slots, geo.num_documents,
        lists.tokens.shape[1], windows, lists.window,
        next((x.shape[-1] for x in (bias, bias_grad) if x is not None), 0),
        KV_HEADS=geo.kv_heads, GROUP=geo.group, PER_TOKEN=tile["PER_TOKEN"], TOKENS=tile["TOKENS"], BLOCK=block_size,
        DIM=geo.head_dim, BIAS_HEADS=0 if bias is None else bias.shape[1],
        BIAS_GRAD_HEADS=0 if bias_grad is None else bias_grad.shape[1], FUSED=dq_sums is not None, num_warps=4,
    )  # fmt: skip
    return dk, dv


def key_grad(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, do: Tensor, lse: Tensor, delta: Tensor, lists: KeyLists,
    geo: Geometry, block_size: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As ``triton_backward.key_grad``."""
    tile = geo.tile(ROWS.value, packed=packs(geo))
    return _launch(q, k, v, bias, do, lse, delta, None, None, lists, geo, block_size, scale, tile)


def gradients(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, do: Tensor, lse: Tensor, delta: Tensor, lists: KeyLists,
    geo: Geometry, block_size: int, scale: float, bias_grad: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk and dv; overwrites ``bias_grad``, float32 [n, H or Hq, N], 0 where nothing is selected."""
    tile = geo.tile(ROWS.value, packed=packs(geo))
    sums = torch.zeros(sums_shape(geo), dtype=torch.float32, device=q.device)
    if bias_grad is not None:
        bias_grad.zero_()  # of blocks of 128, and of groups that are no power of two, several programs or rows add up
    dk, dv = _launch(q, k, v, bias, do, lse, delta, sums, bias_grad, lists, geo, block_size, scale, tile)
    dq = torch.empty_like(q)
    rows = q.shape[0] * q.shape[1]
    round_kernel[(-(-rows // 32),)](
        sums, dq, scale, rows, GROUP=geo.group, PER_TOKEN=tile["PER_TOKEN"], DIM=geo.head_dim, ROWS=32
    )
    return dq, dk, dv
