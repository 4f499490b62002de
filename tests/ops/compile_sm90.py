"""Compiles the kernels for sm_90 on a machine without a GPU, and prints one line of JSON for each.

Run as a script, by test_sm90_compile.py: the tests around it have Triton in its interpreter. The launch code runs as it
is, on small CPU tensors, with every launch turned into a compilation; of each tuned kernel, for each of its options.
"""

import json

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from dashattn.backends.nsa import MeanMLP
from dashattn.ops import tuning
from dashattn.ops.band import triton as band
from dashattn.ops.block_scores.triton import select_blocks
from dashattn.ops.block_sparse import hopper
from dashattn.ops.block_sparse import triton as attention
from dashattn.ops.block_sparse.schedule import tile_lists
from dashattn.ops.compression.reference import num_windows
from dashattn.ops.dash_attention.triton import dash_attention
from dashattn.ops.decode import triton as decode
from dashattn.ops.decode import triton_attention, triton_compression, triton_routing, triton_selection
from dashattn.ops.gates.triton import gated_sum
from dashattn.ops.tiles import geometry
from dashattn.selection import Selection


class Hopper:
    """What Triton asks of a driver before it compiles."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


kernels = []
launch = JITFunction.run


def compile_only(self, *args, grid=None, warmup=False, **options):
    kernels.append(launch(self, *args, grid=grid, warmup=True, **options))


def compile_options(run, options, call):
    """In place of the first option that fits: of every kernel once all of them."""
    for option in options[:1] if call["kernel"] in compiled_options else options:
        run(option)
    compiled_options.add(call["kernel"])
    return options[0]


compiled_options = set()
tuning._launch_first_that_fits = compile_options
triton.runtime.driver.set_active(Hopper())
JITFunction.run = compile_only
for module in (triton_attention, triton_compression, triton_routing, triton_selection):
    module.overlapped_launch = lambda device: {"PDL": True, "launch_pdl": True}

heads, kv_heads, dim, chunk = 32, 2, 128, 64


def make(length, heads):
    return torch.randn(1, length, heads, dim, dtype=torch.bfloat16)


def prefill_and_training(length):
    q, k, v = make(length, heads).requires_grad_(), make(length, kv_heads), make(length, kv_heads)
    chunk_query = torch.zeros(kv_heads, dim, requires_grad=True)
    # The second has every branch of the router.
    for options in ({}, {"prior": "raw", "alpha": torch.full((heads,), 1.3, requires_grad=True)}):
        out, _ = dash_attention(q, k, v, chunk_query, chunk_size=chunk, **options)
        out.backward(out)
    geo = geometry(q, kv_heads, None)
    mask = torch.ones(1, length, kv_heads, -(-length // chunk), dtype=torch.bool)
    words = attention.flatten_words(Selection.from_mask(mask, chunk).words)
    lists = tile_lists(words, geo, chunk, geo.tile_tokens(128))
    hopper.forward(q.detach()[0], k[0], v[0], None, lists, geo, chunk, 0.1)
    windows = dict(kernel_size=32, kernel_stride=16, scale=0.1, cu_seqlens=None)
    compressed = [make(num_windows(length, 32, 16), kv_heads) for _ in range(2)]
    compressed_out, lse = band.compressed_attention(q, *compressed, **windows)
    window_out = band.window_attention(q, k, v, window_size=100, scale=0.1)
    out = gated_sum(torch.ones(1, length, heads, 2), [compressed_out, window_out])
    out.backward(out)
    blocks = dict(pooling="max", block_size=chunk, topk=2, init_blocks=0, local_blocks=1)
    select_blocks(q, compressed[0], lse, **windows, **blocks)


prefill_and_training(256)
known = set(map(id, kernels))
for length in (1, 300, 2064):  # Triton would take 1 for a constant, and multiples of 16 for a case of their own
    prefill_and_training(length)
again = {kernel.metadata.name for kernel in kernels if id(kernel) not in known}

capacity = 256
q, k, v, summaries = (make(length, h) for length, h in ((1, heads), *[(capacity, kv_heads)] * 2, (4, kv_heads)))
compressed = [make(capacity // 16, kv_heads) for _ in range(2)]
lengths = torch.tensor([200], dtype=torch.int32)
mlps = [MeanMLP(32, dim).bfloat16() for _ in range(2)]
decode.append(k[:, :1], v[:, :1], k, v, lengths, pooled=summaries, window=(chunk, chunk), chunk_query=k[0, 0])
decode.compress_window([k, v], mlps, compressed, lengths, 32, 16)
options = dict(chunk_size=chunk, alpha=1.7, router_scale=1.0, prior="raw", sigma=1.0)
new = decode.NewToken(k[:, :1], v[:, :1], k, v, k[0, 0])
decode.routed_attention(q, k, v, summaries, lengths, **options, new=new)
options = dict(kernel_size=32, kernel_stride=16, block_size=64, topk=2, init_blocks=0, local_blocks=1)
decode.cached_window_routing(q, *compressed, lengths, pooling="max", **options)

# The largest tiles there are: a block of them is walked in parts.
q = torch.randn(1, 256, 8, 256, requires_grad=True)
everything = Selection.from_mask(torch.ones(1, 256, 2, 2, dtype=torch.bool), 128)
out = attention.block_sparse_attention(q, q[:, :, :2], q[:, :, :2], everything)
out.backward(out)

for kernel in {id(kernel): kernel for kernel in kernels}.values():
    report = dict(
        name=kernel.metadata.name,
        shared=kernel.metadata.shared,
        options=dict(warps=kernel.metadata.num_warps, stages=kernel.metadata.num_stages),
        wgmma="wgmma.mma_async" in kernel.asm["ptx"],
        tma="cp.async.bulk.tensor" in kernel.asm["ptx"],
        again=kernel.metadata.name in again,
    )
    print(json.dumps(report))
