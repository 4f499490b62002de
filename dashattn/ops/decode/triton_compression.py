"""NSA's compression of a window, when the token that decoding has just written completes one.

With the operations of ``nsa.MeanMLP`` a step launches some forty kernels a layer, in all but one of ``kernel_stride``
steps for nothing. Here programs whose sequence completes no window return; those of the others read the weights once.

Shapes: B sequences, S tokens of capacity, H KV heads, D head size. caches [B, S, H, D]; outs [B, S / STRIDE, H, D]; of
the MLP: position [SIZE, D], up [D, SIZE D], down [D, D].
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dashattn.ops.tiles import overlapped_launch, power_of_2_from, wait_for_kernel_before


@triton.jit
def _matrix_vector(weight_ptr, row_stride, x, in_dim, DIM: tl.constexpr):
    """weight [D, D] (rows ``row_stride`` apart) times x, in float32."""
    dim = tl.arange(0, DIM)
    in_tile = in_dim[:, None] & in_dim[None, :]
    weight = tl.load(weight_ptr + dim[:, None] * row_stride + dim[None, :], mask=in_tile, other=0.0)
    return tl.sum(weight.to(tl.float32) * x.to(tl.float32)[None, :], 1)


@triton.jit
def _compress(
    cache_ptr, position_ptr, up_ptr, up_bias_ptr, down_ptr, down_bias_ptr, out_ptr, token_stride,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """mean + down(silu(up(window + position))) of SIZE tokens from ``cache_ptr`` on, rounded where PyTorch rounds."""
    dim = tl.arange(0, DIM)
    in_dim = dim < HEAD_DIM
    dtype = out_ptr.dtype.element_ty
    mean = tl.zeros([DIM], tl.float32)
    hidden = tl.zeros([DIM], tl.float32)
    for token in range(SIZE):
        x = tl.load(cache_ptr + dim, mask=in_dim, other=0.0).to(tl.float32)
        cache_ptr += token_stride
        mean += x
        x += tl.load(position_ptr + token * HEAD_DIM + dim, mask=in_dim, other=0.0).to(tl.float32)
        hidden += _matrix_vector(up_ptr + token * HEAD_DIM, SIZE * HEAD_DIM, x.to(dtype), in_dim, DIM)
    hidden += tl.load(up_bias_ptr + dim, mask=in_dim, other=0.0).to(tl.float32)
    hidden = hidden.to(dtype).to(tl.float32)
    hidden = (hidden * tl.sigmoid(hidden)).to(dtype)
    out = _matrix_vector(down_ptr, HEAD_DIM, hidden, in_dim, DIM)
    out += tl.load(down_bias_ptr + dim, mask=in_dim, other=0.0).to(tl.float32)
    out = (mean / SIZE).to(dtype).to(tl.float32) + out.to(dtype).to(tl.float32)
    tl.store(out_ptr + dim, out.to(dtype), mask=in_dim)


@triton.jit
def compression_kernel(
    k_ptr, k_position, k_up, k_up_bias, k_down, k_down_bias, k_out,
    v_ptr, v_position, v_up, v_up_bias, v_down, v_down_bias, v_out,
    lengths, sequence_stride, token_stride, head_stride, out_sequence_stride, out_stride, out_head_stride,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One sequence and KV head, keys or values."""
    wait_for_kernel_before(PDL)
    sequence = tl.program_id(0)
    kv_head = tl.program_id(1)
    first = tl.load(lengths + sequence) + 1 - SIZE
    if (first < 0) | (first % STRIDE != 0):
        return
    source = sequence.to(tl.int64) * sequence_stride + first.to(tl.int64) * token_stride
    source += kv_head.to(tl.int64) * head_stride
    target = sequence.to(tl.int64) * out_sequence_stride + (first // STRIDE).to(tl.int64) * out_stride
    target += kv_head.to(tl.int64) * out_head_stride
    if tl.program_id(2) == 0:
        _compress(
            k_ptr + source, k_position, k_up, k_up_bias, k_down, k_down_bias, k_out + target, token_stride, HEAD_DIM,
            DIM, SIZE,
        )  # fmt: skip
    else:
        _compress(
            v_ptr + source, v_position, v_up, v_up_bias, v_down, v_down_bias, v_out + target, token_stride, HEAD_DIM,
            DIM, SIZE,
        )  # fmt: skip


def compress_window(
    caches: Sequence[Tensor], compressions: Sequence[torch.nn.Module], outs: Sequence[Tensor], lengths: Tensor,
    kernel_size: int, kernel_stride: int,
) -> None:  # fmt: skip
    """Writes the compressed key and value of the window that ends at each sequence's newest token, if one does.

    Args:
        caches: keys and values [B, S, H, D], the token at ``lengths`` written.
        compressions: a ``MeanMLP`` each, in the caches' dtype.
        outs: compressed keys and values [B, S / kernel_stride, H, D].
    """
    arguments = []
    for cache, mlp, out in zip(caches, compressions, outs, strict=True):
        weights = (mlp.position, mlp.up.weight, mlp.up.bias, mlp.down.weight, mlp.down.bias)
        arguments += [cache, *(w.detach().contiguous() for w in weights), out]
    cache, out = caches[0], outs[0]
    batch, _, kv_heads, head_dim = cache.shape
    compression_kernel[(batch, kv_heads, 2)](
        *arguments, lengths, *cache.stride()[:3], *out.stride()[:3], HEAD_DIM=head_dim,
        DIM=power_of_2_from(head_dim), SIZE=kernel_size, STRIDE=kernel_stride, num_warps=8,
        **overlapped_launch(cache.device),
    )  # fmt: skip
