"""Every kernel of the package, launched on small CPU tensors and only compiled, for Hopper: no GPU is needed.

For scripts: the tests around them have Triton in its interpreter. The launch code runs as it is.
"""

import torch
import triton
import triton.compiler
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from dashattn.backends.nsa import MeanMLP
from dashattn.ops.band import triton as band
from dashattn.ops.block_scores.triton import select_blocks
from dashattn.ops.block_sparse import hopper, hopper_backward
from dashattn.ops.block_sparse import triton as attention
from dashattn.ops.block_sparse.schedule import key_lists, tile_lists
from dashattn.ops.compression.reference import num_windows
from dashattn.ops.dash_attention.triton import dash_attention
from dashattn.ops.decode import triton as decode
from dashattn.ops.decode import triton_attention, triton_compression, triton_routing, triton_selection
from dashattn.ops.gates.share import Share
from dashattn.ops.gates.triton import gated_sum
from dashattn.ops.indexer import triton as indexer
from dashattn.ops.matvec import triton as matvec
from dashattn.ops.nsa_attention.triton import nsa_forward
from dashattn.ops.tiles import geometry
from dashattn.selection import Selection

CHUNK = 64


class Hopper:
    """What Triton asks of a driver before it compiles."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


def compile_launches(then) -> None:
    """From now on every launch is a compilation, whose result goes to ``then``."""
    run = JITFunction.run

    def compile_only(self, *args, grid=None, warmup=False, **options):
        then(run(self, *args, grid=grid, warmup=True, **options))

    triton.runtime.driver.set_active(Hopper())
    JITFunction.run = compile_only
    for module in (triton_attention, triton_compression, triton_routing, triton_selection, matvec):
        module.overlapped_launch = lambda device: {"PDL": True, "launch_pdl": True}


def make(length, heads, dim):
    return torch.randn(1, length, heads, dim, dtype=torch.bfloat16)


def prefill_and_training(length, heads, kv_heads, dim, init_chunks=0):
    q, k, v = (make(length, h, dim) for h in (heads, kv_heads, kv_heads))
    q.requires_grad_()
    chunk_query = torch.zeros(kv_heads, dim, requires_grad=True)
    for options in (
        {},
        {"prior": "raw", "alpha": torch.full((heads,), 1.3, requires_grad=True)},  # every branch of entmax's router
        {"prior": "raw", "selector": "topk", "topk": 20},
        {"sigma": 1.0, "selector": "topp"},
    ):
        out, _ = dash_attention(q, k, v, chunk_query, chunk_size=CHUNK, init_chunks=init_chunks, **options)
        out.backward(out)
    everything = Selection.from_mask(torch.ones(1, length, kv_heads, -(-length // CHUNK), dtype=torch.bool), CHUNK)
    bias = torch.zeros(1, length, heads, -(-length // CHUNK), requires_grad=True)
    selected_out = attention.block_sparse_attention(q, k, v, everything, bias)
    selected_out.backward(selected_out)
    windows = dict(kernel_size=32, kernel_stride=16, scale=0.1, cu_seqlens=None)
    compressed = [make(num_windows(length, 32, 16), kv_heads, dim) for _ in range(2)]
    compressed_out, lse = band.compressed_attention(q, *compressed, **windows)
    window_out = band.window_attention(q, k, v, window_size=100, scale=0.1)
    out = gated_sum(torch.ones(1, length, heads, 3), [compressed_out, selected_out.detach(), window_out])
    out.backward(out)
    for pooling in ("max", "weighted"):
        blocks = dict(pooling=pooling, block_size=CHUNK, topk=2, init_blocks=0, local_blocks=1)
        select_blocks(q, compressed[0], lse, **windows, **blocks)
    gates = torch.ones(1, length, heads, 3, dtype=q.dtype)
    nsa_forward(q.detach(), k, v, *compressed, gates, k, v, window_size=100, **windows, **blocks)


def hopper_sizes():
    """Every block size and head size, groups and none, the bias with the most heads: registers are given by hand."""
    for dim, heads in ((64, 6), (128, 6), (128, 2)):
        for block in (32, 64, 128):
            q, k, v = (make(128, h, dim) for h in (heads, 2, 2))
            geo = geometry(q, 2, None)
            everything = Selection.from_mask(torch.ones(1, 128, 2, 128 // block, dtype=torch.bool), block)
            words = attention.flatten_words(everything.words)
            lists = tile_lists(words, geo, block, hopper.tile_tokens(geo, block))
            bias = torch.zeros(128, heads, 128 // block)
            hopper.forward(q[0], k[0], v[0], bias, lists, geo, block, 0.1)
            if block == dim:
                _hopper_backward(q, k, v, words, bias, geo, block)


def _hopper_backward(q, k, v, words, bias, geo, block):
    lists, rows = key_lists(words, geo, block, 256), torch.zeros(q.shape[1:3])
    common = (q[0], k[0], v[0], bias, q[0], rows, rows, lists, geo, block, 0.1)
    if hopper_backward.fused(geo):
        hopper_backward.gradients(*common, torch.zeros_like(bias))
    else:
        hopper_backward.key_grad(*common)


def index_selection(length, kv_heads):
    """Groups of one query head, and as many windows to a block as there are tokens."""
    index_q, index_k = make(length, kv_heads, 64), make(length, 1, 64).squeeze(2)
    options = dict(block_size=CHUNK, selector="topk", topk=3, top_p=1.0, init_blocks=0, local_blocks=0, prior=False)
    indexer.index_routing(index_q, index_k, pooling="max", **options, cu_seqlens=None)


def hopper_attention(length, heads, kv_heads, dim):
    """``dim``: 64 or 128."""
    q, k, v = (make(length, h, dim) for h in (heads, kv_heads, kv_heads))
    geo = geometry(q, kv_heads, None)
    mask = torch.ones(1, length, kv_heads, -(-length // CHUNK), dtype=torch.bool)
    words = attention.flatten_words(Selection.from_mask(mask, CHUNK).words)
    lists = tile_lists(words, geo, CHUNK, hopper.tile_tokens(geo, CHUNK))
    for bias_heads in (0, kv_heads, heads):
        bias = torch.zeros(length, bias_heads, mask.shape[-1]) if bias_heads else None
        share = None if bias_heads else Share(make(length, heads, 3)[0], 1, q[0])  # NSA's, which has no bias
        hopper.forward(q[0], k[0], v[0], bias, lists, geo, CHUNK, 0.1, share)
        if bias_heads == kv_heads:
            _hopper_backward(q, k, v, words, bias, geo, CHUNK)


def decoding(heads, kv_heads, dim):
    capacity = 256
    q, k, v, summaries = (
        make(length, h, dim) for length, h in ((1, heads), *[(capacity, kv_heads)] * 2, (4, kv_heads))
    )
    compressed = [make(capacity // 16, kv_heads, dim) for _ in range(2)]
    lengths = torch.tensor([200], dtype=torch.int32)
    mlps = [MeanMLP(32, dim).bfloat16() for _ in range(2)]
    decode.append(k[:, :1], v[:, :1], k, v, lengths, pooled=summaries, window=(CHUNK, CHUNK), chunk_query=k[0, 0])
    decode.append(k[:, :1], v[:, :1], k, v, lengths, pooled=compressed[0], window=(32, 16))
    decode.compress_window([k, v], mlps, compressed, lengths, 32, 16)
    new = decode.NewToken(k[:, :1], v[:, :1], k, v, k[0, 0])
    for options in (
        dict(alpha=1.7, prior="raw"),
        dict(alpha=1.5, prior="tempered"),
        dict(selector="topk", topk=2, prior="raw"),
        dict(selector="topp", top_p=0.7, prior="tempered"),
    ):
        options |= dict(chunk_size=CHUNK, router_scale=1.0, sigma=1.0, new=new)
        decode.routed_attention(q, k, v, summaries, lengths, **options)
    decode.cached_attention(q, k, v, lengths)
    decode.cached_attention(q, k, v, lengths, Selection(torch.ones(1, kv_heads, 1, 1, dtype=torch.int32), CHUNK))
    for pooling in ("max", "weighted"):
        options = dict(kernel_size=32, kernel_stride=16, block_size=64, topk=2, init_blocks=0, local_blocks=1)
        decode.cached_window_routing(q, *compressed, lengths, pooling=pooling, **options)
    x, weights = make(1, 1, dim), [make(1, count * dim, dim)[0, 0] for count in (heads, kv_heads, kv_heads)]
    norm = torch.ones(dim, dtype=x.dtype), 1e-5
    for turns_by in (None, (torch.ones(1, dim), torch.zeros(1, dim))):
        matvec.heads(x, weights, dim, norm, turns_by)
    matvec.swiglu(x, *weights[1:], norm)
    matvec.product(x, weights[0], onto=make(1, 1, heads * dim))


def largest_tiles():
    """A block of them is walked in parts."""
    q = torch.randn(1, 256, 8, 256, requires_grad=True)
    everything = Selection.from_mask(torch.ones(1, 256, 2, 2, dtype=torch.bool), 128)
    out = attention.block_sparse_attention(q, q[:, :, :2], q[:, :, :2], everything)
    out.backward(out)
