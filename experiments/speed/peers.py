"""The kernels of others that the speed benchmark compares with. Each needs a package of its own, imported when used."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dashattn.ops.block_sparse import reference as attention_reference
from dashattn.ops.compression.reference import compressed_attention, mean_compress
from dashattn.selection import Selection
from experiments.speed.inputs import Problem
from experiments.speed.methods import (
    WINDOWS,
    Method,
    Operation,
    UnavailableError,
    given_selection,
    leaves_of,
    nearest_topk,
    on_copies,
)
from experiments.speed.rows import ATTENTION, CUDNN, DENSE, FLASH_3, WHOLE

SDPA_FLASH, RELEASED = "SDPA flash", "released DashAttention"
# Tokens and keys of FlexAttention's tiles. Its backward takes no tiles of 64 keys on Hopper: at head sizes of 64 to 128
# its one configuration reads 128 keys at once, and is dropped before any ``kernel_options`` could say otherwise.
FLEX_TILE = 128


def need(package: str) -> None:
    """Raises UnavailableError where it is not installed."""
    if find_spec(package) is None:
        raise UnavailableError("not installed", f"the package {package} is not installed")


def _sdpa(backend: SDPBackend) -> Callable[[Problem], Operation]:
    def attend(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel([backend]):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2)

    return lambda problem: given_selection(problem, attend, None)


def flash_attention_3(problem: Problem) -> Operation:
    """FlashAttention-3 for PyTorch."""
    need("flash_attn_interface")
    from flash_attn_interface import flash_attn_func

    def attend(q, k, v):
        out = flash_attn_func(q, k, v, causal=True)
        return out[0] if isinstance(out, tuple) else out  # older releases return the log-normaliser, too

    return given_selection(problem, attend, None)


def fla_nsa(problem: Problem) -> Operation:
    """The selected branch of flash-linear-attention's NSA, given our selection."""
    need("fla")
    from fla.ops.nsa.parallel import parallel_nsa

    counts, indices = block_lists(problem.selection)
    most = indices.shape[-1]
    indices = F.pad(indices, (0, (1 << (most - 1).bit_length()) - most))  # its kernels take powers of two
    size = problem.shape.chunk_size

    def attend(q, k, v):
        return parallel_nsa(q=q, k=k, v=v, block_indices=indices, block_counts=counts, block_size=size)

    return given_selection(problem, attend, problem.selection)


def xunhao_nsa(problem: Problem) -> Operation:
    """The selected branch of XunhaoLai's native-sparse-attention-triton, given our selection."""
    need("native_sparse_attention")
    from native_sparse_attention.ops import topk_sparse_attention

    counts, indices = block_lists(problem.selection)
    padding = torch.arange(indices.shape[-1], device=indices.device) >= counts[..., None]
    topk = indices.masked_fill(padding, -1)[0].transpose(0, 1).int().contiguous()
    cu_seqlens = torch.tensor([0, problem.length], dtype=torch.int32, device=topk.device)
    size = problem.shape.chunk_size

    def attend(q, k, v):
        return topk_sparse_attention(q[0], k[0], v[0], topk, size, cu_seqlens)[None]

    return given_selection(problem, attend, problem.selection)


def _two_branches(
    problem: Problem,
    compressed: Sequence[Tensor],
    route: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    select: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    sparsity: float,
    chosen: Callable[[Tensor], Tensor] = lambda blocks: blocks,
) -> Operation:
    """Compressed and selected attention, each with a gate of one half; a window, dense in all packages, is left out.

    Args:
        compressed: keys and values [1, windows, Hkv, D], their means as in ``nsa_whole``.
        route: of q [T, Hq, D] and both: the compressed branch, and blocks [Hkv, T, topk].
        select: the selected branch, of q, k, v [T, H, D] and those blocks.
        sparsity: causal, of the selected branch.
        chosen: the blocks with what is none of them below 0.
    """
    leaves = leaves_of(problem, compressed_k=compressed[0], compressed_v=compressed[1])

    def forward():
        q, k, v, compressed_k, compressed_v = (x[0] for x in leaves.values())
        out, blocks = route(q, compressed_k, compressed_v)
        return 0.5 * (out + select(q, k, v, blocks))[None]

    def reference(grad):
        with torch.no_grad():
            blocks = chosen(route(problem.q[0], compressed[0][0], compressed[1][0])[1])
        none = -(-problem.length // problem.shape.chunk_size)
        mask = torch.zeros(*blocks.shape[:2], none + 1, dtype=torch.bool, device=blocks.device)
        mask.scatter_(2, blocks.long().where(blocks >= 0, none), True)
        selection = Selection.from_mask(mask[None, ..., :none].transpose(1, 2), problem.shape.chunk_size)

        def attend(q, k, v, compressed_k, compressed_v):
            options = {**WINDOWS, "scale": problem.shape.head_dim**-0.5, "cu_seqlens": None}
            out, _ = compressed_attention(q, compressed_k, compressed_v, lambda p: None, **options)
            return 0.5 * (out + attention_reference.block_sparse_attention(q, k, v, selection))

        return on_copies(leaves, grad, attend)

    return Operation(forward, leaves, reference, causal_sparsity=sparsity)


def xunhao_nsa_whole(problem: Problem) -> Operation:
    """Its compressed and its selected attention. The lists of early tokens are padded with -1."""
    need("native_sparse_attention")
    from native_sparse_attention.ops import compressed_attention as attend_compressed
    from native_sparse_attention.ops import topk_sparse_attention

    size, length = problem.shape.chunk_size, problem.length
    topk, sparsity = nearest_topk(problem, 3)
    compressed = [mean_compress(x, **WINDOWS) for x in (problem.k, problem.v)]
    windows = compressed[0].shape[1]
    cu_tokens, cu_windows = torch.tensor([[0, length], [0, windows]], dtype=torch.int32, device=problem.q.device)

    def route(q, compressed_k, compressed_v):
        kinds = (*WINDOWS.values(), size, topk, cu_tokens, cu_windows, length, windows)
        return attend_compressed(q, compressed_k, compressed_v, *kinds)

    def select(q, k, v, blocks):
        return topk_sparse_attention(q, k, v, blocks, size, cu_tokens)

    return _two_branches(problem, compressed, route, select, sparsity)


def scalable_nsa_whole(problem: Problem) -> Operation:
    """The compressed and the selected attention of Scalable-Flash-Native-Sparse-Attention.

    Its selected branch alone takes as many blocks of every token, and so none of our selections.
    """
    need("flash_nsa")
    from flash_nsa import NSAHelper, compress_attn, select_attn, slc_topk_indices

    size, length = problem.shape.chunk_size, problem.length
    topk, sparsity = nearest_topk(problem, 3)
    compressed = [mean_compress(x, **WINDOWS) for x in (problem.k, problem.v)]
    scale = problem.shape.head_dim**-0.5
    kinds = {"block_size": size, "top_n": topk, "num_init_blocks": 1, "num_local_blocks": 2}
    cu_seqlens = torch.tensor([0, length], dtype=torch.int32, device=problem.q.device)

    def route(q, compressed_k, compressed_v):
        # Its options are the process's: another problem may have set others.
        NSAHelper.set_hyperparameters(kernel_size=WINDOWS["kernel_size"], stride=WINDOWS["kernel_stride"], **kinds)
        NSAHelper.init_cu_seqlens(cu_seqlens)
        out, lse = compress_attn(q, compressed_k, compressed_v, sm_scale=scale)
        with torch.no_grad():
            blocks, _ = slc_topk_indices(q, compressed_k, lse, sm_scale=scale, scale_slc_p=True)
        return out, blocks

    def select(q, k, v, blocks):
        return select_attn(q, k, v, blocks, sm_scale=scale)

    def chosen(blocks):  # as many as a token has seen
        seen = torch.arange(length, device=blocks.device) // size + 1
        return blocks.masked_fill(torch.arange(blocks.shape[2], device=blocks.device) >= seen[:, None], -1)

    return _two_branches(problem, compressed, route, select, sparsity, chosen)


def flex_attention(problem: Problem, **kernel_options) -> Operation:
    """PyTorch's FlexAttention over our selection: square tiles of which any token chose any key, with the tokens' words
    as the mask of all but those that are read whole. KV heads stand where it has sequences, so that each has lists of
    its own."""
    from torch.nn.attention.flex_attention import BlockMask
    from torch.nn.attention.flex_attention import flex_attention as attend_flex

    size, length = problem.shape.chunk_size, problem.length
    words_HTW = problem.selection.words[0]

    def is_read(head, _, token, key):
        block = key // size
        return ((words_HTW[head, token, block // 32] >> (block % 32)) & 1 > 0) & (token >= key)

    some, every = (x.unsqueeze(1) for x in tiles_of(problem.selection, length, FLEX_TILE))
    partly, wholly = ([x.int() for x in _listed(tiles)] for tiles in (some & ~every, every))
    mask = BlockMask.from_kv_blocks(
        *partly, *wholly, BLOCK_SIZE=FLEX_TILE, mask_mod=is_read, seq_lengths=(length, length)
    )
    torch._dynamo.reset()  # it compiles once a problem: more than a few and it would be left uncompiled
    compiled = torch.compile(attend_flex, dynamic=False)

    def attend(q, k, v):
        q_HGTD = q[0].unflatten(1, (k.shape[2], -1)).permute(1, 2, 0, 3)
        k_HTD, v_HTD = (x[0].transpose(0, 1).unsqueeze(1) for x in (k, v))
        out = compiled(q_HGTD, k_HTD, v_HTD, block_mask=mask, enable_gqa=True, kernel_options=kernel_options)
        return out.permute(2, 0, 1, 3).flatten(1, 2)[None]

    return given_selection(problem, attend, problem.selection)


def flash_attention_4(problem: Problem) -> Operation:
    """FlashAttention-4's block-sparse kernels, as FlexAttention calls them."""
    need("flash_attn")
    need("flash_attn.cute")
    return flex_attention(problem, BACKEND="FLASH")


def tiles_of(selection: Selection, length: int, tile: int) -> tuple[Tensor, Tensor]:
    """Tiles [Hkv, N, N] of ``tile`` tokens and keys, which are whole blocks: those of which some token reads some key,
    and those of which every token reads every key."""
    blocks = -(-length // selection.block_size)
    mask_HTB = selection.mask()[0, ..., :blocks].transpose(0, 1)
    mask_HTB = F.pad(mask_HTB, (0, -blocks % (tile // selection.block_size), 0, -length % tile))
    tiles_HNtNb = mask_HTB.unflatten(2, (-1, tile // selection.block_size)).unflatten(1, (-1, tile))
    below_the_diagonal = torch.ones(tiles_HNtNb.shape[1::2], dtype=torch.bool, device=mask_HTB.device).tril(-1)
    return tiles_HNtNb.any(4).any(2), tiles_HNtNb.all(4).all(2) & below_the_diagonal


def _listed(mask: Tensor) -> tuple[Tensor, Tensor]:
    """How many are true along the last dimension, and where: ascending, in front of all others. int64."""
    return mask.sum(-1), mask.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices


def block_lists(selection: Selection) -> tuple[Tensor, Tensor]:
    """A selection as lists: counts int64 [B, T, H]; ascending blocks int64 [B, T, H, most], 0 past the count."""
    parts = []
    for words in selection.words.split(4096, dim=2):  # the sort below takes 8 bytes a block
        count, order = _listed(Selection(words, selection.block_size).mask())
        order = order[..., : max(1, count.max())]
        inside = torch.arange(order.shape[-1], device=order.device) < count[..., None]
        parts.append((count, order.masked_fill(~inside, 0)))
    most = max(order.shape[-1] for _, order in parts)
    counts = torch.cat([count for count, _ in parts], dim=1)
    return counts, torch.cat([F.pad(order, (0, most - order.shape[-1])) for _, order in parts], dim=1)


def released_dash(problem: Problem) -> Operation:
    """The DashAttention authors' package: a forward without backward, with its own routing."""
    need("dash_attn")
    precision = torch.get_float32_matmul_precision()
    import dash_attn
    from dash_attn import prefill

    torch.set_float32_matmul_precision(precision)  # their import lowers it, our references need all of float32
    size, chunks = problem.shape.chunk_size, -(-problem.length // problem.shape.chunk_size)
    model = dash_attn.dash_attn(
        chunk_size=size,
        enable_gqa=True,
        estimate_diagonal=True,
        scaling_factor=problem.router_scale,
        max_chunks=max(512, chunks + 1),
    )
    q, k, v = (x.transpose(1, 2).contiguous() for x in (problem.q, problem.k, problem.v))
    chunk_query = problem.chunk_query.to(q.dtype)

    def own_selection():
        summaries = prefill.summarize_chunk(k, chunk_query, size, None)
        words, _ = prefill.score_blocks(q * problem.router_scale, summaries, size, None, estimate_diag=True, sigma=1e6)
        return Selection(words, size)

    def reference(grad):
        inputs = (x.float() for x in (problem.q, problem.k, problem.v))
        return [attention_reference.block_sparse_attention(*inputs, own_selection())]

    return Operation(lambda: model(q, k, v, chunk_query).transpose(1, 2), {}, reference)


# The names that the configuration takes.
BASELINES = {
    "flash_attention_3": [Method(FLASH_3, DENSE, flash_attention_3)],
    "cudnn": [Method(CUDNN, DENSE, _sdpa(SDPBackend.CUDNN_ATTENTION))],
    "flash": [Method(SDPA_FLASH, DENSE, _sdpa(SDPBackend.FLASH_ATTENTION))],
    "fla_nsa": [Method("fla NSA", ATTENTION, fla_nsa)],
    "xunhao_nsa": [
        Method("XunhaoLai NSA", ATTENTION, xunhao_nsa),
        Method("XunhaoLai NSA, no window", WHOLE, xunhao_nsa_whole),
    ],
    "scalable_nsa": [Method("Scalable-Flash-NSA, no window", WHOLE, scalable_nsa_whole)],
    "released_dash": [Method(RELEASED, WHOLE, released_dash)],
    "flex_attention": [Method("FlexAttention", ATTENTION, flex_attention)],
    "flash_attention_4": [Method("FlashAttention-4, block-sparse", ATTENTION, flash_attention_4)],
}
# The others compile for some seconds a problem.
READY = ("flash_attention_3", "cudnn", "flash", "fla_nsa", "xunhao_nsa", "scalable_nsa", "released_dash")
