"""Compiles the kernels for sm_90 on a machine without a GPU, and prints one line of JSON for each.

Run as a script, by test_sm90_compile.py: the tests around it have Triton in its interpreter. The launch code runs as it
is, on small CPU tensors, with every launch turned into a compilation.
"""

import json

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from dashattn.backends.nsa import MeanMLP
from dashattn.ops.band import triton as band
from dashattn.ops.block_scores.triton import select_blocks
from dashattn.ops.block_sparse import hopper
from dashattn.ops.block_sparse import triton as attention
from dashattn.ops.block_sparse.schedule import tile_lists
from dashattn.ops.dash_attention.triton import dash_attention
from dashattn.ops.decode import triton as decode
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


triton.runtime.driver.set_active(Hopper())
JITFunction.run = compile_only

batch, length, heads, kv_heads, dim, chunk = 1, 256, 32, 2, 128, 64
q = torch.randn(batch, length, heads, dim, dtype=torch.bfloat16, requires_grad=True)
k, v = (torch.randn(batch, length, kv_heads, dim, dtype=torch.bfloat16) for _ in range(2))
summaries = torch.randn(batch, length // chunk, kv_heads, dim, dtype=torch.bfloat16)
chunk_query = torch.zeros(kv_heads, dim, requires_grad=True)
# The second has every branch of the router; the third sizes of 1, which Triton would take for constants.
for options in ({}, {"prior": "raw", "alpha": torch.full((heads,), 1.3, requires_grad=True)}):
    out, _ = dash_attention(q, k, v, chunk_query, chunk_size=chunk, **options)
    out.backward(out)
out, _ = dash_attention(q[:, :1], k[:, :1], v[:, :1], chunk_query, chunk_size=chunk)
out.backward(out)
geo = geometry(q, kv_heads, None)
words = attention.flatten_words(
    Selection.from_mask(torch.ones(batch, length, kv_heads, length // chunk, dtype=torch.bool), chunk).words
)
hopper.forward(q.detach()[0], k[0], v[0], None, tile_lists(words, geo, chunk, geo.tile_tokens(128)), geo, chunk, 0.1)
windows = dict(kernel_size=32, kernel_stride=16, scale=0.1, cu_seqlens=None)
compressed = [torch.randn(batch, 15, kv_heads, dim, dtype=torch.bfloat16) for _ in range(2)]
compressed_out, lse = band.compressed_attention(q, *compressed, **windows)
window_out = band.window_attention(q, k, v, window_size=100, scale=0.1)
out = gated_sum(torch.ones(batch, length, heads, 2), [compressed_out, window_out])
out.backward(out)
blocks = dict(pooling="max", block_size=chunk, topk=2, init_blocks=0, local_blocks=1)
select_blocks(q, compressed[0], lse, **windows, **blocks)

q, k, v, summaries = (x.detach() for x in (q[:, :1], k, v, summaries))
lengths = torch.tensor([200], dtype=torch.int32)
decode.append(k[:, :1], v[:, :1], k, v, lengths, pooled=summaries, window=(chunk, chunk), chunk_query=k[0, 0])
mlps = [MeanMLP(32, dim).bfloat16() for _ in range(2)]
compressed = [torch.randn(batch, length // 16, kv_heads, dim, dtype=torch.bfloat16) for _ in range(2)]
decode.compress_window([k, v], mlps, compressed, lengths, 32, 16)
options = dict(chunk_size=chunk, alpha=1.7, router_scale=1.0, prior="raw", sigma=1.0)
decode.routed_attention(q, k, v, summaries, lengths, **options)
options = dict(kernel_size=32, kernel_stride=16, block_size=64, topk=2, init_blocks=0, local_blocks=1)
decode.cached_window_routing(q, k[:, :16], v[:, :16], lengths, pooling="max", **options)

for kernel in kernels:
    report = dict(
        name=kernel.metadata.name,
        shared=kernel.metadata.shared,
        wgmma="wgmma.mma_async" in kernel.asm["ptx"],
        tma="cp.async.bulk.tensor" in kernel.asm["ptx"],
    )
    print(json.dumps(report))
