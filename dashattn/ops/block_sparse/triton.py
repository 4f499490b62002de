"""Block-sparse attention on the GPU: ``reference.py``'s function with Triton kernels, as PyTorch custom operators.

Shapes: B batch, T tokens, Hq query heads, H KV heads, D head size, N blocks, W words of 32 blocks. A suffix ``_nHD``
stands for a tensor laid out flat, n = B T.
"""

from types import ModuleType

import torch
from torch import Tensor

from dashattn.ops.block_sparse.dq_sums import sums_bytes
from dashattn.ops.block_sparse.schedule import (
    TileLists,
    bias_bytes,
    check_room,
    key_list_bytes,
    key_lists,
    tile_list_bytes,
    tile_lists,
    words_bytes,
)
from dashattn.ops.block_sparse.triton_backward import (
    delta,
    key_grad,
    key_grad_options,
    key_grad_window,
    query_grad,
    query_grad_options,
)
from dashattn.ops.block_sparse.triton_forward import forward, forward_options
from dashattn.ops.gates.share import Share
from dashattn.ops.operators import operator
from dashattn.ops.tiles import Geometry, flatten_tokens, geometry
from dashattn.selection import Selection


def flatten_words(words: Tensor) -> Tensor:
    """[B, H, T, W] -> [H, B * T, W]; a view when B is 1."""
    return words.transpose(0, 1).flatten(1, 2).contiguous()


def attend(
    q: Tensor, k: Tensor, v: Tensor, words: Tensor, bias: Tensor | None, geo: Geometry, block_size: int, scale: float,
    share: Share | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The forward on flat, contiguous tensors with the fastest kernel there is for them.

    With a ``share`` its ``out``, to which the output is added, times its gate.
    """
    hopper = _hopper(q, geo, block_size, bias is not None)
    lists = tile_lists(words, geo, block_size, _forward_tile(hopper, q, geo, block_size))
    if hopper is not None:
        return hopper.forward(q, k, v, bias, lists, geo, block_size, scale, share)
    options = forward_options(geo.padded_dim, block_size, q.itemsize)
    out, lse = forward(q, k, v, bias, lists, geo, block_size, scale, options)
    if share is not None:
        out = share.out.addcmul_(share.gates[..., share.branch, None], out)
    return out, lse


def _hopper(q: Tensor, geo: Geometry, block_size: int, has_bias: bool) -> ModuleType | None:
    """The kernel for Hopper, where it takes the call."""
    if not q.is_cuda:
        return None
    from dashattn.ops.block_sparse import hopper  # Gluon has no interpreter and asks for a GPU

    return hopper if hopper.supported(q, geo, block_size, has_bias) else None


def _hopper_backward(q: Tensor, geo: Geometry, block_size: int) -> ModuleType | None:
    """The backward's kernel for Hopper, where it takes the call and torch is not to be deterministic."""
    if not q.is_cuda or torch.are_deterministic_algorithms_enabled():
        return None
    from dashattn.ops.block_sparse import hopper_backward

    return hopper_backward if hopper_backward.supported(q, geo, block_size) else None


def gradients(
    q: Tensor, k: Tensor, v: Tensor, words: Tensor, bias: Tensor | None, do: Tensor, out: Tensor, lse: Tensor,
    geo: Geometry, block_size: int, scale: float, bias_grad: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, TileLists | None]:  # fmt: skip
    """The backward on flat, contiguous tensors with the fastest kernels there are for them.

    Returns dq, dk and dv, and the lists by query where it made any. ``bias_grad``: float32 [n, H or Hq, N], whose
    selected entries are written.
    """
    delta_nH = delta(out, do)
    by_key = key_grad_options(geo.padded_dim, block_size, q.itemsize)
    key_list = key_lists(words, geo, block_size, key_grad_window(geo, block_size, q.itemsize, by_key["keys"]))
    common = (q, k, v, bias, do, lse, delta_nH, key_list, geo, block_size, scale)
    hopper = _hopper_backward(q, geo, block_size)
    if hopper is not None and hopper.fused(geo):
        return *hopper.gradients(*common, bias_grad), None
    dk, dv = key_grad(*common, by_key) if hopper is None else hopper.key_grad(*common)
    del key_list, common
    by_query = query_grad_options(geo.padded_dim, block_size, q.itemsize)
    lists = tile_lists(words, geo, block_size, geo.padded_tile_tokens(by_query["rows"]))
    dq = query_grad(q, k, v, bias, do, lse, delta_nH, lists, geo, block_size, scale, bias_grad, by_query)
    return dq, dk, dv, lists


def _forward_tile(hopper: ModuleType | None, q: Tensor, geo: Geometry, block_size: int) -> int:
    """Tokens of a query tile."""
    if hopper is not None:
        return hopper.tile_tokens(geo, block_size)
    return geo.tile_tokens(forward_options(geo.padded_dim, block_size, q.itemsize)["rows"])


def check_forward_room(
    q: Tensor, geo: Geometry, block_size: int, num_words: int, bias_blocks: int, has_bias: bool
) -> None:
    """Raises ValueError where lists and biases can never fit. ``bias_blocks``: of a bias of the forward's own, or 0."""
    needed = words_bytes(geo, num_words) + bias_bytes(geo, geo.kv_heads, bias_blocks)
    tile = _forward_tile(_hopper(q, geo, block_size, has_bias), q, geo, block_size)
    check_room(needed + tile_list_bytes(geo, num_words, tile), geo, q.device)


def check_backward_room(
    q: Tensor, geo: Geometry, block_size: int, num_words: int, bias_blocks: int, grad_heads: int, grad_blocks: int
) -> None:
    """As ``check_forward_room``; the gradient of the bias is [n, ``grad_heads``, ``grad_blocks``]. On Hopper the
    sums of dq count, too, which stand beside the lists by key."""
    keys = key_grad_options(geo.padded_dim, block_size, q.itemsize)["keys"]
    window = key_grad_window(geo, block_size, q.itemsize, keys)
    tile = geo.padded_tile_tokens(query_grad_options(geo.padded_dim, block_size, q.itemsize)["rows"])
    by_query = tile_list_bytes(geo, num_words, tile)
    sums = 0
    if _hopper_backward(q, geo, block_size) is not None:
        sums = geo.tokens * sums_bytes(geo.heads, geo.kv_heads, geo.head_dim, block_size, q.itemsize)
    turned = words_bytes(geo, num_words)  # for the key lists, and gone when the sums come
    by_key = key_list_bytes(geo, block_size, window) + max(turned, sums)
    biases = bias_bytes(geo, geo.kv_heads, bias_blocks) + bias_bytes(geo, grad_heads, grad_blocks)
    check_room(words_bytes(geo, num_words) + biases + max(by_query, by_key), geo, q.device)


def check_kernels_fit(q: Tensor, block_size: int) -> None:
    """Raises ValueError for what the reference takes and the kernels do not."""
    head_dim = q.shape[-1]
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"the Triton kernels take bfloat16, float16 and float32, not {q.dtype}: use impl='reference'")
    if head_dim > 256 or head_dim % 8:
        raise ValueError(f"the Triton kernels take head sizes up to 256 in steps of 8, not {head_dim}")
    if block_size not in (16, 32, 64, 128):
        raise ValueError(f"the Triton kernels take blocks of 16, 32, 64 or 128 keys, not {block_size}")


@operator("block_sparse_forward")
def _forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    words: Tensor,
    block_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    geo = geometry(q, k.shape[2], cu_seqlens)
    check_forward_room(q, geo, block_size, words.shape[-1], 0, block_bias is not None)
    bias = None if block_bias is None else block_bias.flatten(0, 1).contiguous()
    out, lse = attend(*map(flatten_tokens, (q, k, v)), flatten_words(words), bias, geo, block_size, scale)
    return out.view(q.shape), lse.view(q.shape[:3])


@_forward_op.register_fake
def _(q, k, v, words, block_bias, cu_seqlens, block_size, scale):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@operator("block_sparse_backward")
def _backward_op(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    words: Tensor,
    block_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    out: Tensor,
    lse: Tensor,
    block_size: int,
    scale: float,
    bias_heads: int,
    bias_blocks: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv and the bias gradient, float32 [B, T, bias_heads, bias_blocks] (0 where not selected)."""
    geo = geometry(q, k.shape[2], cu_seqlens)
    check_backward_room(q, geo, block_size, words.shape[-1], 0, bias_heads, bias_blocks)
    flat = (flatten_tokens(x) for x in (q, k, v))
    bias = None if block_bias is None else block_bias.flatten(0, 1).contiguous()
    bias_grad = q.new_zeros(geo.tokens, bias_heads, bias_blocks, dtype=torch.float32)
    dq, dk, dv, _ = gradients(
        *flat, flatten_words(words), bias, flatten_tokens(grad), flatten_tokens(out), lse.flatten(0, 1).contiguous(),
        geo, block_size, scale, bias_grad if bias_heads else None,
    )  # fmt: skip
    return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape), bias_grad.view(*q.shape[:2], bias_heads, bias_blocks)


@_backward_op.register_fake
def _(grad, q, k, v, words, block_bias, cu_seqlens, out, lse, block_size, scale, bias_heads, bias_blocks):
    bias_grad = q.new_empty(*q.shape[:2], bias_heads, bias_blocks, dtype=torch.float32)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), bias_grad


def _setup_context(ctx, inputs, output):
    q, k, v, words, block_bias, cu_seqlens, ctx.block_size, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, words, block_bias, cu_seqlens, *output)


def _backward(ctx, grad, _grad_lse):
    q, k, v, words, block_bias, cu_seqlens, out, lse = ctx.saved_tensors
    bias_heads, bias_blocks = (0, 0) if not ctx.needs_input_grad[4] else block_bias.shape[2:]
    dq, dk, dv, dbias = _backward_op(
        grad, q, k, v, words, block_bias, cu_seqlens, out, lse, ctx.block_size, ctx.scale, bias_heads, bias_blocks
    )
    return dq, dk, dv, None, dbias.to(block_bias.dtype) if bias_heads else None, None, None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection,
    block_bias: Tensor | None = None,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """As ``reference.block_sparse_attention``; blocks of 16, 32, 64 or 128 keys, head sizes 16 to 256, no float64.

    In torch's deterministic mode the backward sums in a fixed order: equal inputs give equal gradients. On Hopper dq is
    otherwise added up in whatever order its parts come (``hopper_backward.fused``).
    """
    return attention_and_normalisers(q, k, v, selection, block_bias, scale=scale, cu_seqlens=cu_seqlens)[0]


def attention_and_normalisers(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection,
    block_bias: Tensor | None = None,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``block_sparse_attention``, and its log-normalisers: float32 [B, T, Hq], to base 2, without gradient."""
    check_kernels_fit(q, selection.block_size)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse = _forward_op(q, k, v, selection.words, block_bias, cu_seqlens, selection.block_size, scale)
    return out, lse.detach()
