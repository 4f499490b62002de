"""Every operation at sizes that compute-sanitizer gets through in minutes. From the repository's root:

    PYTHONPATH=. PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/gpu/small_run.py

Without PyTorch's cache of memory every tensor is an allocation, past whose end memcheck sees what is touched; in the
cache other tensors follow. All four backends decode, then the three sparse ones go forward and backward.
"""

import time

import torch
from torch import Tensor

from dashattn import dash_attention, infllmv2_attention
from dashattn.backends import (
    AttentionConfig,
    AttentionShape,
    DashConfig,
    FullConfig,
    InfLLMv2Config,
    NSAConfig,
    build_backend,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
WINDOWS = {"block_size": 16, "kernel_size": 8, "kernel_stride": 4, "topk": 4, "window_size": 32}


class SmallRun:
    """On a device. For Triton's interpreter ``shrink`` divides the lengths, and ``dtype`` replaces all others."""

    def __init__(self, device: str, shrink: int = 1, dtype: torch.dtype | None = None) -> None:
        self.device, self.shrink, self.dtype = device, shrink, dtype
        self.start = time.perf_counter()

    def run(self) -> None:
        self.decode(FullConfig())
        self.decode(DashConfig(impl="triton", chunk_size=16, prior="raw"))
        self.decode(DashConfig(impl="triton", chunk_size=64, alpha=1.3, sigma=1.0))
        self.decode(DashConfig(impl="triton", chunk_size=16, prior="raw", init_chunks=1, local_chunks=1))
        self.decode(InfLLMv2Config(impl="triton", **WINDOWS))
        self.decode(NSAConfig(impl="triton", **WINDOWS))

        self.dash([700], 32, 2, 128, BF16, chunk_size=64, router_scale=4.0)
        self.dash([500], 6, 2, 64, FP16, chunk_size=16, router_scale=2.0, prior="raw")
        self.dash([400], 7, 1, 96, BF16, chunk_size=32, sigma=1.0, alpha=1.7)
        self.dash([33, 1, 256, 310], 4, 4, 32, BF16, chunk_size=16)
        self.dash([33, 1, 256, 310], 3, 1, 64, BF16, chunk_size=16, prior="raw", init_chunks=1, local_chunks=1)
        self.dash([300], 4, 2, 256, FP32, chunk_size=64)
        self.infllmv2(600, 8, 2, 64, BF16)
        self.nsa(600, 8, 2, 64, BF16)

    def decode(self, config: AttentionConfig) -> None:
        """Three sequences, from prompts of unequal lengths on: a token at a time, and once several."""
        dtype = self.dtype or BF16
        backend = build_backend(config, AttentionShape(256, 4, 2, 64)).to(self.device, dtype)
        cache = backend.new_cache(3, max(64, self.short(400)), dtype=dtype, device=self.device)
        for new in (self.short(150), 1, self.short(37), *[1] * self.short(70)):
            q, k, v = (self.random(3, new, heads, 64, dtype=dtype) for heads in (4, 2, 2))
            backend.decode(q, k, v, cache.layers[0], hidden=self.random(3, new, 256, dtype=dtype))
            cache.advance([new, max(1, new - 3), max(1, new // 2)])
        self.say(f"{config.name} decodes")

    def dash(self, documents: list[int], heads: int, kv_heads: int, dim: int, dtype: torch.dtype, **options) -> None:
        lengths = [self.short(length) for length in documents]
        if len(lengths) > 1:
            ends = torch.tensor([0, *lengths]).cumsum(0)
            options["cu_seqlens"] = ends.to(self.device, torch.int32)
        q, k, v = self.leaves(sum(lengths), heads, kv_heads, dim, dtype)
        chunk_query = torch.zeros(kv_heads, dim, device=self.device, requires_grad=True)
        dash_attention(q, k, v, chunk_query, impl="triton", **options).sum().backward()
        self.say(f"dash, {heads} heads of {dim}, {options}")

    def infllmv2(self, length: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
        q, k, v = self.leaves(self.short(length), heads, kv_heads, dim, dtype)
        infllmv2_attention(q, k, v, impl="triton", block_size=64, topk=4, window_size=64).sum().backward()
        self.say("infllmv2")

    def nsa(self, length: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
        shape = AttentionShape(heads * dim, heads, kv_heads, dim)
        backend = build_backend(NSAConfig(impl="triton", topk=4), shape).to(self.device, self.dtype or dtype)
        q, k, v = self.leaves(self.short(length), heads, kv_heads, dim, dtype)
        hidden = self.random(1, self.short(length), shape.hidden_size, dtype=dtype)
        backend(q, k, v, hidden=hidden).sum().backward()
        self.say("nsa")

    def short(self, length: int) -> int:
        return max(1, length // self.shrink)

    def random(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype or dtype)

    def leaves(self, length: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
        """q, k and v of one row."""
        return [self.random(1, length, n, dim, dtype=dtype).requires_grad_() for n in (heads, kv_heads, kv_heads)]

    def say(self, what: str) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        print(f"{time.perf_counter() - self.start:.0f} s  {what}", flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    SmallRun("cuda").run()
