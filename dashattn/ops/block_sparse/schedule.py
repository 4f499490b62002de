"""Work lists of the block-sparse kernels, built on the device from the bit masks.

Query side (forward, and backward of q): for every tile of neighbouring tokens the union of their blocks, and per block
one bit a token. Key side (backward of k and v): for every block the tokens that chose it, so that no tile of that
kernel holds a row that did not.

Both are made without a word to the host: every list has a place of its own, at an offset in closed form, with room for
all that it could hold. To count first and pack the lists would make the launch wait for the device, at every call. Both
are ascending, which costs a prefix sum a step and puts the entries that need a causal mask at one end: the kernels that
walk them have one loop with the mask and one without.

Shapes: n = B T tokens laid out flat, M documents, H KV heads, N blocks of BLOCK keys, W words of 32 blocks. words
int32 [H, n, W], as in ``Selection`` but flat; a slot is the place of a tile of tokens, or of a block, among those of
all documents (``tiles``); documents int32 [M + 1].
"""

import sys
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from dashattn.ops.tiles import Geometry, bitwise_or, locate_tile, ones_below, power_of_2_from


@triton.jit
def _choice(bit, half, TOKENS_P: tl.constexpr, WORDS: tl.constexpr, dtype: tl.constexpr):
    """For every block one bit a token, of the ``half``-th 64 tokens; ``bit`` [TOKENS_P, WORDS, 32] has them in 32s."""
    if TOKENS_P <= 32:
        return tl.reshape(tl.reduce(bit, 0, bitwise_or), (32 * WORDS,))
    else:
        part = tl.arange(0, TOKENS_P // 32)[:, None]
        parts = tl.reduce(tl.reshape(bit, (TOKENS_P // 32, 32, 32 * WORDS)), 1, bitwise_or)
        low = tl.sum(tl.where(part == 2 * half, parts, 0), 0)
        high = tl.sum(tl.where(part == 2 * half + 1, parts, 0), 0)
        return (high.to(dtype) << 32) | (low.to(dtype) & 0xFFFFFFFF)


@triton.jit(do_not_specialize=["num_tokens", "num_words", "num_slots", "num_documents"])
def _tile_list_kernel(
    words, documents, blocks, choices, counts, num_tokens, num_words, num_slots, num_documents,
    TOKENS: tl.constexpr, TOKENS_P: tl.constexpr, BLOCK: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0)
    kv_head = tl.program_id(1)
    _, start, end, index = locate_tile(documents, slot, num_documents, TOKENS)
    token = tl.arange(0, TOKENS_P)
    position = index * TOKENS + token
    valid = (token < TOKENS) & (start + position < end)
    own = tl.where(valid, position // BLOCK, -1)  # a token past the document's end has no block, and so none before it
    list_row = kv_head.to(tl.int64) * num_slots + slot
    row = list_row * (num_words * 32)
    past_end = (index * TOKENS) // BLOCK  # blocks before this one lie wholly in the past of every token
    last = tl.max(own, 0)

    word_ptr = words + (kv_head.to(tl.int64) * num_tokens + start + position) * num_words
    lane = tl.arange(0, 32)
    total = 0
    past = 0
    # Words up to the last token's own block: what a selection says of the future is not looked at.
    for word in range(0, last // 32 + 1, WORDS):
        column = word + tl.arange(0, WORDS)
        w = tl.load(word_ptr[:, None] + column[None, :], mask=valid[:, None] & (column < num_words)[None, :], other=0)
        w &= ones_below(own[:, None] + 1 - 32 * column[None, :])
        # Turned around: from a word a token, with a bit a block, to a word a block, with a bit a token of the tile.
        bit = ((w[:, :, None] >> lane[None, None, :]) & 1) << (token % 32)[:, None, None]
        choice = _choice(bit, 0, TOKENS_P, WORDS, choices.dtype.element_ty)
        second = choice
        if TOKENS > 64:
            second = _choice(bit, 1, TOKENS_P, WORDS, choices.dtype.element_ty)
        chosen = ((choice | second) != 0).to(tl.int32)
        block = word * 32 + tl.arange(0, 32 * WORDS)
        place = total + tl.cumsum(chosen, 0) - 1
        tl.store(blocks + row + place, block, mask=chosen != 0)
        tl.store(choices + row * ((TOKENS + 63) // 64) + place, choice, mask=chosen != 0)
        if TOKENS > 64:
            tl.store(choices + row * 2 + num_words * 32 + place, second, mask=chosen != 0)
        total += tl.sum(chosen, 0)
        past += tl.sum(tl.where(block < past_end, chosen, 0), 0)
    tl.store(counts + list_row * 2, past)
    tl.store(counts + list_row * 2 + 1, total)


@triton.jit
def key_list_start(document_base, kv_head, capacity, block, length, BLOCK: tl.constexpr):
    """Where the list of a document's block begins: each has room for the tokens from the block's first one on."""
    block = block.to(tl.int64)
    return kv_head.to(tl.int64) * capacity + document_base + block * length - BLOCK * (block * (block - 1) // 2)


@triton.jit(
    do_not_specialize=["num_tokens", "num_words", "num_slots", "num_documents", "capacity", "num_windows", "window"]
)
def _key_list_kernel(
    words, documents, bases, tokens, counts, offsets, num_tokens, num_words, num_slots, num_documents, capacity,
    num_windows, window,
    BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0)
    kv_head = tl.program_id(1)
    document, start, end, block = locate_tile(documents, slot, num_documents, BLOCK)
    first = start + block * BLOCK
    base = key_list_start(tl.load(bases + document), kv_head, capacity, block, end - start, BLOCK)
    lane = tl.arange(0, STEP)
    word_ptr = words + (kv_head.to(tl.int64) * num_words + block // 32) * num_tokens
    row = kv_head.to(tl.int64) * num_slots + slot
    total = 0
    near = 0
    # In steps that begin at multiples of STEP, which divides a window: so a window's first token is a step's first one,
    # and the number of tokens listed before it is known there. Tokens before the block cannot have chosen it.
    for begin in range(first // STEP * STEP, end, STEP):
        tl.store(offsets + row * num_windows + begin // window, total, mask=begin % window == 0)
        token = begin + lane
        valid = (token >= first) & (token < end) & (block // 32 < num_words)
        w = tl.load(word_ptr + token, mask=valid, other=0)
        chosen = (w >> (block % 32)) & 1
        tl.store(tokens + base + total + tl.cumsum(chosen, 0) - 1, token, mask=chosen != 0)
        total += tl.sum(chosen, 0)
        near += tl.sum(tl.where(token < first + BLOCK, chosen, 0), 0)
    tl.store(counts + row * 2, near)
    tl.store(counts + row * 2 + 1, total)


@dataclass(frozen=True)
class TileLists:
    """Blocks chosen by any token of a query tile, ascending.

    Attributes:
        blocks: int32 [H, slots, N]; undefined past the count.
        choices: int32 or int64 [H, slots, N]: bit i is set iff token i of the tile reads the block. Of tiles of more
            than 64 tokens [H, slots, 2, N], the first 64 and the others.
        counts: int32 [H, slots, 2]: blocks wholly in the past of the tile (they come first), and all blocks.
        tokens: tokens of a tile.
    """

    blocks: Tensor
    choices: Tensor
    counts: Tensor
    tokens: int


@dataclass(frozen=True)
class KeyLists:
    """Tokens that chose a block, ascending.

    Attributes:
        tokens: int32 [H, capacity], flat token indices.
        bases: int64 [M]: where the lists of a document begin; ``key_list_start`` has the rest.
        counts: int32 [H, slots, 2]: tokens inside the block itself (they come first), and all tokens.
        offsets: int32 [H, slots, windows]: tokens of the list before each window; undefined up to the block's own.
        window: tokens of a window; windows count from the first token of the batch.
    """

    tokens: Tensor
    bases: Tensor
    counts: Tensor
    offsets: Tensor
    window: int


def words_bytes(geo: Geometry, num_words: int) -> int:
    """Of the selection, [H, n, W]."""
    return 4 * geo.kv_heads * geo.tokens * num_words


def bias_bytes(geo: Geometry, heads: int, num_blocks: int) -> int:
    """Of a bias or its gradient, float32 [n, H or Hq, N]."""
    return 4 * geo.tokens * heads * num_blocks


def tile_list_bytes(geo: Geometry, num_words: int, tile_tokens: int) -> int:
    """What ``tile_lists`` allocates."""
    lists = geo.kv_heads * geo.slots(tile_tokens)
    return lists * num_words * 32 * (4 + max(4, power_of_2_from(tile_tokens) // 8)) + 8 * lists


def key_list_bytes(geo: Geometry, block_size: int, window: int) -> int:
    """What ``key_lists`` returns, the few bytes a document apart."""
    lists = geo.kv_heads * geo.slots(block_size)
    return 4 * (geo.kv_heads * max(1, _key_capacity(geo, block_size)) + lists * (2 + -(-geo.tokens // window)))


def check_room(num_bytes: int, geo: Geometry, device: torch.device) -> None:
    """Raises ValueError where a device can never hold what grows with the square of the length.

    Where it only holds too much else, PyTorch's allocator says so.
    """
    room = device_bytes(device)
    if num_bytes > room:
        raise ValueError(
            f"the selected blocks of {geo.tokens} tokens and {geo.kv_heads} KV heads take {num_bytes} bytes, the device"
            f" has {room}: take larger blocks, shorter sequences, or fewer sequences or KV heads on a device"
        )


@cache
def device_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else sys.maxsize


def _choice_dtype(tile_tokens: int) -> torch.dtype:
    """One bit a token."""
    return torch.int32 if tile_tokens <= 32 else torch.int64


def _room(length, block_size: int):
    """Of a document's key lists: the tokens from each block's first one on. Their sum over blocks is an arithmetic
    series, T ** 2 / (2 BLOCK) entries for a long document."""
    blocks = (length + block_size - 1) // block_size
    return blocks * length - block_size * (blocks * (blocks - 1) // 2)


def _key_capacity(geo: Geometry, block_size: int) -> int:
    """Room for the key lists of one head.

    Lengths of packed documents stay on the device; no split of the tokens needs more room than a single document.
    """
    if geo.uniform is None:
        return _room(geo.tokens, block_size)
    return _room(geo.uniform, block_size) * geo.num_documents


def tile_lists(words: Tensor, geo: Geometry, block_size: int, tile_tokens: int) -> TileLists:
    """``words``: int32 [H, n, W]. Bits above a token's own block are ignored."""
    slots, width, padded = geo.slots(tile_tokens), words.shape[-1], power_of_2_from(tile_tokens)
    shape = (geo.kv_heads, slots, width * 32)
    blocks = torch.empty(shape, dtype=torch.int32, device=words.device)
    halves = (2,) if tile_tokens > 64 else ()
    choices = torch.empty(*shape[:2], *halves, shape[2], dtype=_choice_dtype(tile_tokens), device=words.device)
    counts = torch.empty(geo.kv_heads, slots, 2, dtype=torch.int32, device=words.device)
    _tile_list_kernel[(slots, geo.kv_heads)](
        words, geo.documents, blocks, choices, counts, geo.tokens, width, slots, geo.num_documents,
        TOKENS=tile_tokens, TOKENS_P=padded, BLOCK=block_size, WORDS=max(1, min(16, 256 // padded)), num_warps=4,
    )  # fmt: skip
    return TileLists(blocks, choices, counts, tile_tokens)


def key_lists(words: Tensor, geo: Geometry, block_size: int, window: int) -> KeyLists:
    """``window``: a power of two."""
    slots = geo.slots(block_size)
    if geo.uniform is not None:
        bases = torch.arange(geo.num_documents, device=words.device) * _room(geo.uniform, block_size)
    else:
        needed = _room(geo.documents.diff().long(), block_size)
        bases = needed.cumsum(0) - needed
    tokens = torch.empty(geo.kv_heads, max(1, _key_capacity(geo, block_size)), dtype=torch.int32, device=words.device)
    counts = torch.empty(geo.kv_heads, slots, 2, dtype=torch.int32, device=words.device)
    offsets = torch.empty(geo.kv_heads, slots, -(-geo.tokens // window), dtype=torch.int32, device=words.device)
    # Every block reads a word of every token after it: side by side, or each is a sector of its own.
    _key_list_kernel[(slots, geo.kv_heads)](
        words.transpose(1, 2).contiguous(), geo.documents, bases, tokens, counts, offsets, geo.tokens, words.shape[-1],
        slots, geo.num_documents, tokens.shape[1], offsets.shape[-1], window,
        BLOCK=block_size, STEP=min(1024, window), num_warps=4,
    )  # fmt: skip
    return KeyLists(tokens, bases, counts, offsets, window)
