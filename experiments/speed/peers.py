"""The kernels of others that the speed benchmark compares with. Each needs a package of its own, imported when used."""

from collections.abc import Callable
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


def xunhao_nsa_whole(problem: Problem) -> Operation:
    """Its compressed and its selected attention; compression by the mean and gates of one half, as in ``nsa_whole``.

    Its window branch is FlashAttention-2's and left out.
    """
    need("native_sparse_attention")
    from native_sparse_attention.ops import compressed_attention as attend_compressed
    from native_sparse_attention.ops import topk_sparse_attention

    size, length = problem.shape.chunk_size, problem.length
    topk, sparsity = nearest_topk(problem, 3)
    compressed = [mean_compress(x, **WINDOWS) for x in (problem.k, problem.v)]
    leaves = leaves_of(problem, compressed_k=compressed[0], compressed_v=compressed[1])
    windows = compressed[0].shape[1]
    cu_tokens, cu_windows = torch.tensor([[0, length], [0, windows]], dtype=torch.int32, device=problem.q.device)

    def route(q, compressed_k, compressed_v):
        kinds = (*WINDOWS.values(), size, topk, cu_tokens, cu_windows, length, windows)
        return attend_compressed(q[0], compressed_k[0], compressed_v[0], *kinds)

    def forward():
        q, k, v, compressed_k, compressed_v = leaves.values()
        out, blocks = route(q, compressed_k, compressed_v)
        return 0.5 * (out + topk_sparse_attention(q[0], k[0], v[0], blocks, size, cu_tokens))[None]

    def reference(grad):
        with torch.no_grad():
            _, blocks = route(problem.q, *compressed)
        none = -(-length // size)  # where the lists of early tokens are padded
        mask = torch.zeros(*blocks.shape[:2], none + 1, dtype=torch.bool, device=blocks.device)
        mask.scatter_(2, blocks.long().where(blocks >= 0, none), True)
        selection = Selection.from_mask(mask[None, ..., :none].transpose(1, 2), size)

        def attend(q, k, v, compressed_k, compressed_v):
            options = {**WINDOWS, "scale": problem.shape.head_dim**-0.5, "cu_seqlens": None}
            out, _ = compressed_attention(q, compressed_k, compressed_v, lambda p: None, **options)
            return 0.5 * (out + attention_reference.block_sparse_attention(q, k, v, selection))

        return on_copies(leaves, grad, attend)

    return Operation(forward, leaves, reference, causal_sparsity=sparsity)


def block_lists(selection: Selection) -> tuple[Tensor, Tensor]:
    """A selection as lists: counts int64 [B, T, H]; ascending blocks int64 [B, T, H, most], 0 past the count."""
    parts = []
    for words in selection.words.split(4096, dim=2):  # the sort below takes 8 bytes a block
        mask = Selection(words, selection.block_size).mask()
        order = mask.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices
        count = mask.sum(-1)
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
    "released_dash": [Method(RELEASED, WHOLE, released_dash)],
}
