"""Triton kernels of decoding: writing a token, and attention over the active blocks of a cache.

One query row (sequence, new token) and KV head has few heads to multiply with but many keys to read, so its active
blocks are split evenly over several programs, whichever blocks they are: each program counts the bits of the selection,
and lists the blocks that are its share of the ranks. Their partial sums meet in a second kernel. Launch shapes depend
on capacities only; lengths stay on the device.

Shapes: B sequences, T new tokens, S tokens of capacity, Hq query heads, H KV heads, D head size, N blocks of BLOCK
keys, W words of 32 blocks. q and out [B, T, Hq, D]; k and v [B, S, H, D], in the strides of ``DecodeCache``; lengths
int32 [B], tokens before the new ones; words int32 [B, H or Hq, T, W]; bias float32 [B, T, H, N]; with several splits
float32 sums [B, T, Hq, splits, D], peak and total [B, T, Hq, splits]; lists int32 [B T, H, splits, list_width].
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from dashattn.ops.block_sparse.triton_forward import NO_PEAK, precision
from dashattn.ops.chunk_summary.triton import pooling_weights
from dashattn.ops.tiles import LOG2E, bitwise_or, overlapped_launch, power_of_2_from, wait_for_kernel_before


@triton.jit
def visible_count(position, SIZE: tl.constexpr, STRIDE: tl.constexpr):
    """Windows of SIZE tokens every STRIDE that end at or before a position; tokens themselves are windows of 1."""
    return tl.maximum(position + 1 - SIZE + STRIDE, 0) // STRIDE


@triton.jit
def load_group(q_ptr, query, kv_head, dim, in_dim, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
               HEAD_DIM: tl.constexpr):  # fmt: skip
    """What the heads of a KV head's group ask at one token, [ROWS, D]; each row's number in [B * T * Hq], and whether
    it stands for a head."""
    member = tl.arange(0, ROWS)
    in_group = member < GROUP
    flat_row = query.to(tl.int64) * (KV_HEADS * GROUP) + kv_head * GROUP + member
    q = tl.load(
        q_ptr + flat_row[:, None] * HEAD_DIM + dim[None, :], mask=in_group[:, None] & in_dim[None, :], other=0.0
    )
    return q, flat_row, in_group


@triton.jit
def _count_bits(word):
    """Set bits of int32 words."""
    x = word.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _list_blocks(list_ptr, halves, ends, begin, end, HALVES: tl.constexpr):
    """Writes the blocks of numbers ``begin`` to ``end`` among the set bits; ``ends``: bits up to each half's last.

    Through memory: to find a number's block in registers, all threads have to meet several times. By halves of words:
    at 128k tokens there are as many as threads, each of which then walks through 16 bits.
    """
    place = ends - _count_bits(halves) - begin
    share = (end - begin).to(tl.uint32, bitcast=True)
    for bit in tl.static_range(16):
        is_set = (halves >> bit) & 1
        mine = (is_set != 0) & (place.to(tl.uint32, bitcast=True) < share)
        tl.store(list_ptr + place, tl.arange(0, HALVES) * 16 + bit, mask=mine)
        place += is_set
    tl.debug_barrier()


@triton.jit(do_not_specialize=["num_tokens", "num_words", "list_width", "num_blocks", "window", "splits"])
def attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, peak_ptr, total_ptr, lengths, words_ptr, lists, bias_ptr, scale_log2,
    sequence_stride, token_stride, head_stride, num_tokens, num_words, list_width, num_blocks, window, splits,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, WORD_HEADS: tl.constexpr,
    WORD_HEADS_P: tl.constexpr, WORDS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, PARTIAL: tl.constexpr, PRECISION: tl.constexpr, SIZE: tl.constexpr,
    STRIDE: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """WORD_HEADS: selections that are united (those of the group's heads, or one); 0: all blocks in the window.

    SIZE and STRIDE: the tokens that a key stands for (``visible_count``). EARLY: queries and lengths were there before
    the kernel before began.
    """
    if not EARLY:
        wait_for_kernel_before(PDL)
    query = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    sequence = query // num_tokens
    token = query % num_tokens
    position = visible_count(tl.load(lengths + sequence) + token, SIZE, STRIDE) - 1  # of the last key that is visible

    dim = tl.arange(0, DIM)
    in_dim = dim < HEAD_DIM
    q, flat_row, in_group = load_group(q_ptr, query, kv_head, dim, in_dim, KV_HEADS, GROUP, ROWS, HEAD_DIM)
    if EARLY:
        wait_for_kernel_before(PDL)

    if WORD_HEADS > 0:
        head = tl.arange(0, WORD_HEADS_P)
        word = tl.arange(0, WORDS)
        row = (sequence * KV_HEADS + kv_head).to(tl.int64) * WORD_HEADS * num_tokens + token
        place = (head.to(tl.int64) * num_tokens * num_words)[:, None] + word[None, :]
        in_words = (head < WORD_HEADS)[:, None] & (word < num_words)[None, :]
        words = tl.load(words_ptr + row * num_words + place, mask=in_words, other=0)
        half = tl.arange(0, 2 * WORDS)
        halves = tl.gather(tl.reduce(words, 0, bitwise_or), half // 2, 0)
        halves = (halves >> half % 2 * 16) & 0xFFFF
        ends = tl.cumsum(_count_bits(halves), 0)
        count = tl.max(ends, 0)
    else:
        first = tl.maximum(position - window + 1, 0) // BLOCK
        count = position // BLOCK - first + 1
    share = (count + splits - 1) // splits
    if WORD_HEADS > 0:
        share = tl.minimum(share, list_width)  # whatever bits the words have behind the last block
    begin = tl.minimum(split * share, count)
    end = tl.minimum(begin + share, count)
    if WORD_HEADS > 0:
        lists += ((query.to(tl.int64) * KV_HEADS + kv_head) * splits + split) * list_width
        _list_blocks(lists, halves, ends, begin, end, 2 * WORDS)

    cache_offset = sequence.to(tl.int64) * sequence_stride + kv_head.to(tl.int64) * head_stride
    bias_row = (query.to(tl.int64) * KV_HEADS + kv_head) * num_blocks

    in_block = tl.arange(0, BLOCK)
    tile = in_block[:, None] * token_stride + dim[None, :]
    acc = tl.zeros([ROWS, DIM], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    peak = tl.full([ROWS], NO_PEAK, tl.float32)
    for number in range(end - begin):
        block = tl.load(lists + number) if WORD_HEADS > 0 else first + begin + number
        key = block * BLOCK + in_block
        visible = (key <= position) & (key > position - window)
        block_offset = cache_offset + (block * BLOCK).to(tl.int64) * token_stride
        in_tile = visible[:, None] & in_dim[None, :]
        k = tl.load(k_ptr + block_offset + tile, mask=in_tile, other=0.0)
        v = tl.load(v_ptr + block_offset + tile, mask=in_tile, other=0.0)
        logits = tl.dot(q, k.T, input_precision=PRECISION) * scale_log2
        if HAS_BIAS:
            logits += tl.load(bias_ptr + bias_row + block) * 1.4426950408889634
        logits = tl.where(visible[None, :], logits, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(logits, 1))
        p = tl.exp2(logits - new_peak[:, None])
        decay = tl.exp2(peak - new_peak)
        total = total * decay + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
        peak = new_peak

    if PARTIAL:
        tl.store(peak_ptr + flat_row * splits + split, peak, mask=in_group)
        tl.store(total_ptr + flat_row * splits + split, total, mask=in_group)
    else:
        acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    out = out_ptr + (flat_row * splits + split)[:, None] * HEAD_DIM + dim[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=in_group[:, None] & in_dim[None, :])


@triton.jit(do_not_specialize=["splits"])
def combine_kernel(
    partial_ptr, peak_ptr, total_ptr, out_ptr, splits,
    SPLITS_P: tl.constexpr, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """COLUMNS channels of one query head: the splits' sums, weighted to one peak."""
    wait_for_kernel_before(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.arange(0, SPLITS_P)
    in_splits = split < splits
    in_tile = in_splits[:, None] & (column < HEAD_DIM)[None, :]
    peak = tl.load(peak_ptr + row * splits + split, mask=in_splits, other=NO_PEAK)
    total = tl.load(total_ptr + row * splits + split, mask=in_splits, other=0.0)
    partial = tl.load(partial_ptr + (row * splits + split)[:, None] * HEAD_DIM + column[None, :], mask=in_tile, other=0)
    weight = tl.exp2(peak - tl.max(peak, 0))
    total = tl.sum(total * weight, 0)
    out = tl.sum(partial * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + row * HEAD_DIM + column, out.to(out_ptr.dtype.element_ty), mask=column < HEAD_DIM)


@triton.jit
def write_token(
    sequence, kv_head, k_ptr, v_ptr, cache_k_ptr, cache_v_ptr, lengths, pooled_ptr, query_ptr, softmax_scale,
    sequence_stride, token_stride, head_stride, pooled_sequence_stride, pooled_stride, pooled_head_stride,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, SIZE: tl.constexpr, SIZE_P: tl.constexpr,
    STRIDE: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """Writes one token of a sequence and KV head and, if it completes a window of SIZE keys, their pooled key.

    SIZE 0: there are no windows. MEAN: a plain mean, else the softmax pooling of ``chunk_summary`` (SIZE_P = SIZE).
    """
    position = tl.load(lengths + sequence)
    dim = tl.arange(0, DIM)
    in_dim = dim < HEAD_DIM
    offset = (sequence.to(tl.int64) * KV_HEADS + kv_head) * HEAD_DIM + dim
    k = tl.load(k_ptr + offset, mask=in_dim, other=0.0)
    v = tl.load(v_ptr + offset, mask=in_dim, other=0.0)
    row = sequence.to(tl.int64) * sequence_stride + kv_head.to(tl.int64) * head_stride + dim
    tl.store(cache_k_ptr + row + position.to(tl.int64) * token_stride, k, mask=in_dim)
    tl.store(cache_v_ptr + row + position.to(tl.int64) * token_stride, v, mask=in_dim)
    if SIZE > 0:
        first = position + 1 - SIZE
        if (first >= 0) & (first % STRIDE == 0):
            token = first + tl.arange(0, SIZE_P)
            # The new key is taken from registers: other threads of the program may not have written it yet.
            old = (token < position)[:, None] & in_dim[None, :]
            keys = tl.load(
                cache_k_ptr + row[None, :] + token.to(tl.int64)[:, None] * token_stride, mask=old, other=0.0
            ).to(tl.float32)
            keys = tl.where((token == position)[:, None], k.to(tl.float32)[None, :], keys)
            if MEAN:
                pooled = tl.sum(keys, 0) / SIZE
            else:
                query = tl.load(query_ptr + kv_head * HEAD_DIM + dim, mask=in_dim, other=0.0).to(tl.float32)
                pooled = tl.sum(pooling_weights(keys, query, softmax_scale)[:, None] * keys, 0)
            target = sequence.to(tl.int64) * pooled_sequence_stride + (first // STRIDE).to(tl.int64) * pooled_stride
            target += kv_head.to(tl.int64) * pooled_head_stride
            tl.store(pooled_ptr + target + dim, pooled.to(pooled_ptr.dtype.element_ty), mask=in_dim)


@triton.jit
def append_kernel(
    k_ptr, v_ptr, cache_k_ptr, cache_v_ptr, lengths, pooled_ptr, query_ptr, softmax_scale,
    sequence_stride, token_stride, head_stride, pooled_sequence_stride, pooled_stride, pooled_head_stride,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, SIZE: tl.constexpr, SIZE_P: tl.constexpr,
    STRIDE: tl.constexpr, MEAN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_kernel_before(PDL)
    write_token(
        tl.program_id(0), tl.program_id(1), k_ptr, v_ptr, cache_k_ptr, cache_v_ptr, lengths, pooled_ptr, query_ptr,
        softmax_scale, sequence_stride, token_stride, head_stride, pooled_sequence_stride, pooled_stride,
        pooled_head_stride, KV_HEADS, HEAD_DIM, DIM, SIZE, SIZE_P, STRIDE, MEAN,
    )  # fmt: skip


@cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def num_splits(rows: int, blocks: int, device: torch.device) -> int:
    """Programs that share the blocks of one query row and KV head.

    Two for every multiprocessor in all hide each other's loads; but what adds a row's parts up reads them one after
    another, and a row that has 32 of them from one for every multiprocessor is faster with those.
    """
    one = processors(device) // rows
    splits = one if one >= 32 else 2 * processors(device) // rows
    return max(1, min(splits, blocks, 256))


def attend(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, words: Tensor | None, bias: Tensor | None, block_size: int,
    window: int | None, scale: float, tokens_per_key: tuple[int, int] = (1, 1), after_routing: bool = False,
) -> Tensor:  # fmt: skip
    """Output [B, T, Hq, D] over the cached k, v [B, S, H, D]; 0 for a query that sees no key.

    ``words``: int32 [B, H or Hq, T, W], of which those of a group's heads are united; None: all blocks in the window.
    ``bias``: float32 [B, T, H, N]. ``tokens_per_key``: size and stride of the windows that compressed keys stand for.
    ``after_routing``: the launch before is ``route``'s last, so that q, contiguous, and lengths are there.
    """
    batch, num_tokens, heads, head_dim = q.shape
    capacity, kv_heads = k.shape[1:3]
    group, blocks = heads // kv_heads, -(-capacity // block_size)
    word_heads = 0 if words is None else words.shape[1] // kv_heads
    num_words = 0 if words is None else words.shape[-1]
    splits = num_splits(batch * num_tokens * kv_heads, blocks, q.device)
    dim = max(16, power_of_2_from(head_dim))
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    partial, peak, total = out, None, None
    if splits > 1:
        sums = torch.empty(q[..., 0].numel() * splits * (head_dim + 2), dtype=torch.float32, device=q.device)
        partial, peak, total = sums.split([len(sums) // (head_dim + 2) * part for part in (head_dim, 1, 1)])
    grid, list_width = (batch * num_tokens, kv_heads, splits), -(-blocks // splits)
    lists = None if words is None else torch.empty(*grid, list_width, dtype=torch.int32, device=q.device)
    tile_bytes = block_size * dim * q.itemsize
    assert block_size * k.stride(1) < 2**31  # offsets in a block are 32-bit numbers
    attention_kernel[grid](
        q.contiguous(), k, v, partial, peak, total, lengths, words, lists, bias, scale * LOG2E, *k.stride()[:3],
        num_tokens, num_words, list_width, blocks, capacity if window is None else window, splits,
        KV_HEADS=kv_heads, GROUP=group, ROWS=max(16, power_of_2_from(group)), WORD_HEADS=word_heads,
        WORD_HEADS_P=power_of_2_from(max(1, word_heads)), WORDS=power_of_2_from(max(1, num_words)),
        HAS_BIAS=bias is not None, BLOCK=block_size, HEAD_DIM=head_dim, DIM=dim, PARTIAL=splits > 1,
        PRECISION=precision(q.dtype), SIZE=tokens_per_key[0], STRIDE=tokens_per_key[1],
        EARLY=after_routing, num_warps=4 if tile_bytes <= 16384 else 8,
        num_stages=4 if tile_bytes <= 16384 else 2 if tile_bytes <= 32768 else 1,
        **overlapped_launch(q.device),
    )  # fmt: skip
    if splits > 1:
        columns = min(32, dim)
        combine_kernel[(batch * num_tokens * heads, -(-head_dim // columns))](
            partial, peak, total, out, splits, SPLITS_P=power_of_2_from(splits), HEAD_DIM=head_dim,
            COLUMNS=columns, num_warps=4, **overlapped_launch(q.device),
        )  # fmt: skip
    return out


def append(
    k: Tensor, v: Tensor, cache_k: Tensor, cache_v: Tensor, lengths: Tensor, *, pooled: Tensor | None = None,
    window: tuple[int, int] = (0, 1), chunk_query: Tensor | None = None,
) -> None:  # fmt: skip
    """Writes one token [B, 1, H, D] behind every length, and the pooled key of a window that it completes.

    ``window``: (size, stride) of what ``pooled`` [B, S / stride, H, D] holds; ``chunk_query`` [H, D] pools as in
    ``chunk_summary``, where the size is a power of two; None is the mean.
    """
    batch, _, kv_heads, head_dim = k.shape
    append_kernel[(batch, kv_heads)](
        k.contiguous(), v.contiguous(), cache_k, cache_v, lengths, pooled,
        None if chunk_query is None else chunk_query.contiguous(), head_dim**-0.5,
        *cache_k.stride()[:3], *((0, 0, 0) if pooled is None else pooled.stride()[:3]),
        KV_HEADS=kv_heads, HEAD_DIM=head_dim, DIM=max(16, power_of_2_from(head_dim)), SIZE=window[0],
        SIZE_P=power_of_2_from(window[0]), STRIDE=window[1], MEAN=chunk_query is None, num_warps=4,
        **overlapped_launch(k.device),
    )  # fmt: skip
