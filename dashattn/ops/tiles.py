"""What the Triton kernels share: how the rows of a tile map to tokens and heads, and documents to tiles.

The batch is flattened: [B, T, H, D] is [n, H, D] with n = B * T tokens, and every sequence (or packed document) is a
range ``documents[d] .. documents[d + 1]`` of them. A tile never crosses a document. Tile ``i`` of document ``d`` has
the slot ``documents[d] // size + d + i``: a closed form, with room for every tile, so that the grid ``n // size + M``
needs no synchronisation with the device (slots past a document's last tile stay idle).

The rows of a query tile are (token, head of the group). Where a kernel sums over the group, or has no registers left,
the group is padded to a power of two; elsewhere as many tokens as fit lie side by side: of 64 rows a group of 7 leaves
one idle, and not eight.

Shapes: B batch, T tokens, n = B T, M documents, Hq query heads, H KV heads, D head size. In kernels GROUP = Hq / H and
GROUP_P is that padded, ROWS the rows of a tile, HEAD_DIM = D and DIM is that padded; a name in capitals is a constant
of the compiled kernel.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LOG2E = 1.4426950408889634


@triton.jit
def locate_tile(documents, slot, num_documents, SIZE: tl.constexpr):
    """(document, its first token, its end, index of the tile in it) of a slot; the tile may lie past the end."""
    low = 0
    high = num_documents
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(documents + middle) // SIZE + middle <= slot
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    start = tl.load(documents + low)
    end = tl.load(documents + low + 1)
    return low, start, end, slot - (start // SIZE + low)


@triton.jit
def query_rows(start, end, first, kv_head, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, PER_TOKEN: tl.constexpr,
               TOKENS: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):  # fmt: skip
    """Rows of the query tile that begins at position ``first`` of the document ``start .. end``.

    Returns each row's position, query head, whether it stands for a query, its number in [n * Hq], and its entries'
    offsets in [n * Hq, D] with the mask of those that exist. ``PER_TOKEN``: rows of a token, GROUP or GROUP_P.
    """
    row = tl.arange(0, ROWS)
    position = first + row // PER_TOKEN
    query_head = kv_head * GROUP + row % PER_TOKEN
    valid = (start + position < end) & (row % PER_TOKEN < GROUP) & (row < TOKENS * PER_TOKEN)
    flat_row = (start + position).to(tl.int64) * (KV_HEADS * GROUP) + query_head
    dim = tl.arange(0, DIM)
    in_tile = valid[:, None] & (dim < HEAD_DIM)[None, :]
    return position, query_head, valid, flat_row, flat_row[:, None] * HEAD_DIM + dim[None, :], in_tile


@triton.jit
def bitwise_or(a, b):
    return a | b


@triton.jit
def ones_below(count):
    """A word whose lowest ``count`` bits, none or all perhaps, are ones."""
    return tl.where(count >= 32, -1, (1 << tl.minimum(tl.maximum(count, 0), 31)) - 1)


@triton.jit
def wait_for_kernel_before(PDL: tl.constexpr):
    """In a kernel that may be launched before the one before it has ended: waits for that, and lets the next come."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@cache
def overlapped_launch(device: torch.device) -> dict:
    """Launch options and constant of kernels that begin with ``wait_for_kernel_before``.

    A chain of kernels of a few microseconds is made of launches: from Hopper on the next one can be under way.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9:
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


def power_of_2_from(x: int) -> int:
    """The smallest power of two that is at least x; a fraction of the host time of Triton's own."""
    return 1 << (x - 1).bit_length()


@dataclass(frozen=True)
class Geometry:
    """Sizes of a call, after flattening.

    ``documents`` is int32 [M + 1] on the device; ``uniform``: their common length, where the host knows one.
    """

    documents: Tensor
    uniform: int | None
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def longest(self) -> int:
        """Upper bound of a document's tokens."""
        return self.tokens if self.uniform is None else self.uniform

    @property
    def padded_group(self) -> int:
        return power_of_2_from(self.group)

    @property
    def padded_dim(self) -> int:
        return max(16, power_of_2_from(self.head_dim))

    @property
    def num_documents(self) -> int:
        return self.documents.shape[0] - 1

    def slots(self, size: int) -> int:
        """Upper bound of the number of tiles of ``size`` tokens over all documents."""
        return self.tokens // size + self.num_documents

    def tile_tokens(self, rows: int, most: int = 64) -> int:
        """Tokens of a tile of about ``rows`` rows; ``most`` is 64 where their choices are the bits of one integer."""
        return max(1, min(most, rows // self.group))

    def padded_tile_tokens(self, rows: int, most: int = 64) -> int:
        """As ``tile_tokens``, a power of two, where groups are padded."""
        return max(1, min(most, rows // self.padded_group))

    def tile(self, rows: int, packed: bool = True, most: int = 64) -> dict[str, int]:
        """Constants of kernels that take either: rows of a token, of a tile of about ``rows``, and its tokens."""
        per_token, tokens = self.padded_group, self.padded_tile_tokens(rows, most)
        if packed:
            per_token, tokens = self.group, self.tile_tokens(rows, most)
        return dict(PER_TOKEN=per_token, ROWS=power_of_2_from(tokens * per_token), TOKENS=tokens)


def geometry(q: Tensor, kv_heads: int, cu_seqlens: Tensor | None) -> Geometry:
    batch, length, heads, head_dim = q.shape
    if batch * length * heads >= 2**31:  # positions and numbers of tiles are 32-bit numbers
        raise ValueError(
            f"the Triton kernels take fewer than 2**31 tokens times query heads, not {batch} x {length} x {heads}: "
            "split the batch or the heads"
        )
    if cu_seqlens is not None:
        return Geometry(cu_seqlens.to(torch.int32), None, batch * length, heads, kv_heads, head_dim)
    return Geometry(multiples(length, batch, q.device), length, batch * length, heads, kv_heads, head_dim)


# A tensor core cuts off what it adds to a float32 sum, by 2 ** -24 of the sum on average (Fasi et al. 2021,
# doi 10.7717/peerj-cs.330), and adds 16 rows at a time: a sum of so many is 1e-3 too small on average, less than the
# rounding of bfloat16. It grows with the rows, of which a key of a long context has millions.
SUMMED_ROWS = 2**19


def query_splits(programs: int, rows: int) -> int:
    """Parts of the queries of which each of ``programs`` by key makes a sum of its own, to be added in their order.

    So many that the 132 multiprocessors of an H100 or H200 are evenly busy, and that no sum is of too many of the
    ``rows`` that a key can meet.
    """
    return max(1, min(64, max(1024 // programs, -(-rows // SUMMED_ROWS))))


def multiples(step: int, count: int, device: torch.device) -> Tensor:
    """0, step, ..., count * step: int32 [count + 1]."""
    if step == 0:
        return torch.zeros(count + 1, dtype=torch.int32, device=device)
    return torch.arange(0, (count + 1) * step, step, dtype=torch.int32, device=device)


def flatten_tokens(x: Tensor) -> Tensor:
    """[B, T, H, D] -> contiguous [B * T, H, D], aligned for the tensor memory accelerator."""
    x = x.flatten(0, 1).contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()
