"""Block-sparse forward for Hopper, in Gluon (Triton's lower level): the fast path of ``triton_forward``.

A tile of 64 rows reads 32 KiB of keys and values per 2 MFLOP: at half the chip's matrix rate that is all the bandwidth
its L2 cache has. Here several groups of warps share one program: one fetches the blocks that any token of two or three
neighbouring tiles chose, once for all; the others multiply, each for its own tile, and pass over blocks that none of
its tokens chose. While one of them is at its softmax another has the tensor cores.

Shapes as in ``triton_forward``, D 64 or 128. In shared memory: q_tiles [TILES, 64, D], the rings k_ring and v_ring
[STAGES, BLOCK, D], and for each stage of these the barriers full and empty.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from dashattn.ops.block_sparse.schedule import TileLists
from dashattn.ops.block_sparse.triton_forward import stages_that_fit
from dashattn.ops.gates.share import Share, share_constants
from dashattn.ops.tiles import LOG2E, Geometry, locate_tile

# The same barrier among the warps of a partition has another name from Triton 3.7 on.
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
ROWS = gl.constexpr(64)
NO_PEAK = gl.constexpr(-1e30)


@gluon.jit
def _fetch(k_desc, v_desc, k_ring, v_ring, full, empty, block_list, num_blocks, start, kv_head, BLOCK: gl.constexpr,
           DIM: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    block = gl.load(block_list, mask=num_blocks > 0, other=0)
    for entry in range(num_blocks):
        following = gl.load(block_list + entry + 1, mask=entry + 1 < num_blocks, other=0)
        stage = entry % STAGES
        mbarrier.wait(empty.index(stage), ((entry // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(stage), 2 * k_desc.block_type.nbytes)
        key = start + block * BLOCK
        tma.async_copy_global_to_shared(k_desc, [key, kv_head * DIM], full.index(stage), k_ring.index(stage))
        tma.async_copy_global_to_shared(v_desc, [key, kv_head * DIM], full.index(stage), v_ring.index(stage))
        block = following


@gluon.jit
def _own_choice(choice, PART: gl.constexpr, TOKENS: gl.constexpr):
    """Of a choice of all tiles the bits of PART's; more than 32 tokens of a tile have one of their own."""
    if TOKENS > 32:
        return choice
    else:
        return ((choice >> (PART * TOKENS)) & ((1 << TOKENS) - 1)).to(gl.int32)


@gluon.jit
def _attend_block(acc, total, peak, q, k_ring, v_ring, full, empty, entry, block, mine, token, position, bias_row,
                  scale_log2, BLOCK: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr, HAS_BIAS: gl.constexpr,
                  CAUSAL: gl.constexpr):  # fmt: skip
    """See ``triton_forward._attend_block``."""
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    stage = entry % STAGES
    chosen = ((mine >> token.to(mine.dtype)) & 1) != 0
    if HAS_BIAS:  # comes while keys are waited for and multiplied
        bias = gl.load(bias_row + block, mask=chosen, other=0.0)
    mbarrier.wait(full.index(stage), (entry // STAGES) & 1)
    if mine != 0:
        zeros = gl.zeros([ROWS, BLOCK], gl.float32, LOGITS)
        logits = warpgroup_mma(q, k_ring.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
        logits = warpgroup_mma_wait(0, deps=[logits])
        if CAUSAL:
            key = block * BLOCK + gl.arange(0, BLOCK, layout=gl.SliceLayout(0, LOGITS))
            limit = gl.where(chosen, position, -1)
            logits = gl.where(key[None, :] <= limit[:, None], logits, float("-inf"))
        highest = gl.max(logits, 1) * scale_log2
        if HAS_BIAS:
            bias = bias.to(gl.float32) * 1.4426950408889634
            highest += bias
        new_peak = gl.where(chosen, gl.maximum(peak, highest), peak)
        shift = gl.where(chosen, new_peak, float("inf"))
        if HAS_BIAS:
            shift -= bias
        p = gl.exp2(logits * scale_log2 - shift[:, None])
        decay = gl.exp2(peak - new_peak)
        peak = new_peak
        total = total * decay + gl.sum(p, 1)
        acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, OUT))[:, None]
        p = gl.convert_layout(p.to(v_ring.dtype), gl.DotOperandLayout(0, OUT, 2))
        # Waiting here is faster than letting this product run into the next block's (measured: 6.6 against 7.5 ms at
        # 32k): another tile keeps the tensor cores busy, and a running accumulator through a branch costs copies.
        acc = warpgroup_mma(p, v_ring.index(stage), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
    # No warp may give back a stage that another one has not yet seen full, blocks that are passed over included.
    _barrier()
    mbarrier.arrive(empty.index(stage), count=1)
    return acc, total, peak


@gluon.jit
def _multiply(tiles, PART: gl.constexpr, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, BLOCK: gl.constexpr,
              DIM: gl.constexpr, STAGES: gl.constexpr, BIAS_HEADS: gl.constexpr, BRANCH: gl.constexpr,
              BRANCHES: gl.constexpr):  # fmt: skip
    """Tile PART of a program's. ``first``: position of the first token of all of them in its document."""
    (q_ptr, out_ptr, lse_ptr, bias_ptr, gates_ptr, q_tiles, k_ring, v_ring, full, empty, block_list, choice_list, past,
     num_blocks, start, end, first, kv_head, list_width, bias_width, scale_log2) = tiles  # fmt: skip
    TOKENS: gl.constexpr = ROWS // GROUP
    if TOKENS > 32:
        choice_list += PART * list_width
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    first += PART * TOKENS

    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LOAD))
    dim = gl.arange(0, DIM, layout=gl.SliceLayout(0, LOAD))
    in_tile = (start + first + row // GROUP < end) & (row < TOKENS * GROUP)
    flat_row = (start + first + row // GROUP).to(gl.int64) * (KV_HEADS * GROUP) + kv_head * GROUP + row % GROUP
    q_tile = q_tiles.index(PART)
    q_tile.store(gl.load(q_ptr + flat_row[:, None] * DIM + dim[None, :], mask=in_tile[:, None], other=0.0))
    fence_async_shared()
    _barrier()
    if q_tiles.shape[0] == 2:
        q = q_tile.load(gl.DotOperandLayout(0, LOGITS, 2))
    else:  # the registers of three groups of warps are needed elsewhere
        q = q_tile

    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LOGITS))
    token = row // GROUP
    position = first + token
    query_head = kv_head * GROUP + row % GROUP
    HAS_BIAS: gl.constexpr = BIAS_HEADS > 0
    bias_row = None
    if HAS_BIAS:
        bias_head = query_head if BIAS_HEADS > KV_HEADS else kv_head
        bias_row = bias_ptr + ((start + position).to(gl.int64) * BIAS_HEADS + bias_head) * bias_width

    acc = gl.zeros([ROWS, DIM], gl.float32, OUT)
    total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, LOGITS))
    peak = gl.full([ROWS], NO_PEAK, gl.float32, gl.SliceLayout(1, LOGITS))
    choice = gl.load(choice_list, mask=num_blocks > 0, other=0)
    following = 0
    if HAS_BIAS:
        following = gl.load(block_list, mask=num_blocks > 0, other=0)
    for entry in range(past):
        mine = _own_choice(choice, PART, TOKENS)
        block = following
        choice = gl.load(choice_list + entry + 1, mask=entry + 1 < num_blocks, other=0)
        if HAS_BIAS:
            following = gl.load(block_list + entry + 1, mask=entry + 1 < num_blocks, other=0)
        acc, total, peak = _attend_block(
            acc, total, peak, q, k_ring, v_ring, full, empty, entry, block, mine, token, position, bias_row, scale_log2,
            BLOCK, DIM, STAGES, HAS_BIAS, False,
        )  # fmt: skip
    for entry in range(past, num_blocks):
        mine = _own_choice(choice, PART, TOKENS)
        choice = gl.load(choice_list + entry + 1, mask=entry + 1 < num_blocks, other=0)
        block = gl.load(block_list + entry)
        acc, total, peak = _attend_block(
            acc, total, peak, q, k_ring, v_ring, full, empty, entry, block, mine, token, position, bias_row, scale_log2,
            BLOCK, DIM, STAGES, HAS_BIAS, True,
        )  # fmt: skip

    has_keys = total > 0.0
    lse = gl.where(has_keys, peak + gl.log2(total), float("inf"))
    row_offset = (start + position).to(gl.int64) * (KV_HEADS * GROUP) + query_head
    valid = (start + position < end) & (row < TOKENS * GROUP)
    gl.store(lse_ptr + row_offset, lse, mask=valid)
    inverse = gl.convert_layout(gl.where(has_keys, 1.0 / total, 0.0), gl.SliceLayout(1, OUT))
    out = gl.convert_layout((acc * inverse[:, None]).to(out_ptr.dtype.element_ty), LOAD)
    out_ptr += flat_row[:, None] * DIM + dim[None, :]
    if BRANCH >= 0:
        gate = gl.load(gates_ptr + flat_row * BRANCHES + BRANCH, mask=in_tile, other=0.0).to(gl.float32)
        before = gl.load(out_ptr, mask=in_tile[:, None], other=0.0).to(gl.float32)
        # Rounded before it is weighed, as a branch that is stored by itself is: both give the same bits.
        out = (before + gate[:, None] * out.to(gl.float32)).to(out.dtype)
    gl.store(out_ptr, out, mask=in_tile[:, None])


@gluon.jit(do_not_specialize=["num_slots", "num_documents", "list_width", "bias_width"])
def forward_kernel(
    q_ptr, k_desc, v_desc, bias_ptr, gates_ptr, out_ptr, lse_ptr, documents, blocks, choices, counts, scale_log2,
    num_slots, num_documents, list_width, bias_width,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, BLOCK: gl.constexpr, DIM: gl.constexpr,
    BIAS_HEADS: gl.constexpr, BRANCH: gl.constexpr, BRANCHES: gl.constexpr, STAGES: gl.constexpr, TILES: gl.constexpr,
    WORKER_REGS: gl.constexpr,
):  # fmt: skip
    TOKENS: gl.constexpr = TILES * (ROWS // GROUP)
    pid = gl.program_id(0)
    kv_head = pid // num_slots
    slot = num_slots - 1 - pid % num_slots
    _, start, end, index = locate_tile(documents, slot, num_documents, TOKENS)
    list_row = kv_head.to(gl.int64) * num_slots + slot
    past = gl.load(counts + list_row * 2)
    num_blocks = gl.load(counts + list_row * 2 + 1)
    list_start = list_row * list_width
    blocks += list_start
    choices += list_start * (2 if TOKENS > 64 else 1)

    dtype: gl.constexpr = k_desc.dtype
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, DIM], dtype)
    q_tiles = gl.allocate_shared_memory(dtype, [TILES, ROWS, DIM], q_layout)
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, DIM], k_desc.layout)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, DIM], v_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=TILES)
    fence_async_shared()

    tiles = (q_ptr, out_ptr, lse_ptr, bias_ptr, gates_ptr, q_tiles, k_ring, v_ring, full, empty, blocks, choices, past,
             num_blocks, start, end, index * TOKENS, kv_head, list_width, bias_width, scale_log2)  # fmt: skip
    fetch = (k_desc, v_desc, k_ring, v_ring, full, empty, blocks, num_blocks, start, kv_head, BLOCK, DIM, STAGES)
    if TILES == 2:
        gl.warp_specialize(
            [
                (_multiply, (tiles, 0, KV_HEADS, GROUP, BLOCK, DIM, STAGES, BIAS_HEADS, BRANCH, BRANCHES)),
                (_multiply, (tiles, 1, KV_HEADS, GROUP, BLOCK, DIM, STAGES, BIAS_HEADS, BRANCH, BRANCHES)),
                (_fetch, fetch),
            ],
            worker_num_warps=[4, 1],
            worker_num_regs=[WORKER_REGS, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_multiply, (tiles, 0, KV_HEADS, GROUP, BLOCK, DIM, STAGES, BIAS_HEADS, BRANCH, BRANCHES)),
                (_multiply, (tiles, 1, KV_HEADS, GROUP, BLOCK, DIM, STAGES, BIAS_HEADS, BRANCH, BRANCHES)),
                (_multiply, (tiles, 2, KV_HEADS, GROUP, BLOCK, DIM, STAGES, BIAS_HEADS, BRANCH, BRANCHES)),
                (_fetch, fetch),
            ],
            worker_num_warps=[4, 4, 1],
            worker_num_regs=[WORKER_REGS, WORKER_REGS, 24],
        )


def program_constants(geo: Geometry, block_size: int) -> dict[str, int]:
    """Tiles of a program, and registers of a thread as the kernel starts, and of one that multiplies.

    Three tiles read the least through the L2 cache (at 32k tokens 7 to 10 % less time than two), where all their tokens
    are bits of one integer and blocks leave the registers. Heads of 64 have half the products for each exponential: two
    programs share a multiprocessor, so that four groups of warps take turns (13 % less time than one program).
    """
    if block_size == 128:
        return dict(TILES=2, maxnreg=168, WORKER_REGS=240)
    if geo.head_dim == 64:
        return dict(TILES=2, maxnreg=80, WORKER_REGS=112)
    if geo.group < 3:
        return dict(TILES=2, maxnreg=168, WORKER_REGS=240)
    return dict(TILES=3, maxnreg=128, WORKER_REGS=160)


def tile_tokens(geo: Geometry, block_size: int) -> int:
    """Tokens of the tiles of a program."""
    return program_constants(geo, block_size)["TILES"] * geo.tile_tokens(64)


def supported(q: Tensor, geo: Geometry, block_size: int, has_bias: bool) -> bool:
    return (
        q.is_cuda
        and torch.cuda.get_device_capability(q.device)[0] == 9
        and q.dtype in (torch.bfloat16, torch.float16)
        and geo.head_dim in (64, 128)
        and block_size in (32, 64, 128)
        and geo.group <= 64  # a tile holds a token
        # Without groups a bias is a load for each row and block: up to 6 % slower here. Heads of 64 were not measured.
        and (geo.group > 1 or (geo.head_dim == 128 and not has_bias))
    )


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, lists: TileLists, geo: Geometry, block_size: int,
    scale: float, share: Share | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As ``triton_forward.forward``; ``lists`` for tiles of ``tile_tokens``. A ``share`` is added to its ``out``."""
    constants = program_constants(geo, block_size)
    # Beside the ring: the query tiles, and half of their size to change the layout of the output.
    resident = constants["TILES"] * 96 * geo.head_dim * q.itemsize
    stages = stages_that_fit(resident, 2 * block_size * geo.head_dim * q.itemsize, 4)
    out = torch.empty_like(q) if share is None else share.out
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    slots = geo.slots(lists.tokens)
    dtype = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[q.dtype]
    tile = [block_size, geo.head_dim]
    layout = gl.NVMMASharedLayout.get_default_for(tile, dtype)
    k_desc, v_desc = (TensorDescriptor.from_tensor(x.flatten(1), tile, layout) for x in (k, v))
    forward_kernel[(slots * geo.kv_heads,)](
        q, k_desc, v_desc, bias, None if share is None else share.gates, out, lse, geo.documents, lists.blocks,
        lists.choices, lists.counts, scale * LOG2E, slots, geo.num_documents, lists.blocks.shape[-1],
        0 if bias is None else bias.shape[-1],
        KV_HEADS=geo.kv_heads, GROUP=geo.group, BLOCK=block_size, DIM=geo.head_dim,
        BIAS_HEADS=0 if bias is None else bias.shape[1], **share_constants(share), STAGES=stages, num_warps=4,
        **constants,
    )  # fmt: skip
    return out, lse
