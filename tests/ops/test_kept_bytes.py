"""What backends say that their kernels keep for the backward pass, against what autograd saves."""

import pytest
import torch

pytest.importorskip("triton")

from dashattn.backends import AttentionShape, DashConfig, InfLLMv2Config, NSAConfig, SinkWindowConfig, build_backend
from dashattn.ops.block_sparse import schedule
from dashattn.ops.tiles import Geometry

LENGTH, HEADS, KV_HEADS, DIM = 64, 4, 2, 16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


SIZES = dict(impl="triton", block_size=16, kernel_size=8, kernel_stride=4, topk=3)


@pytest.mark.parametrize(
    "config",
    [
        DashConfig(impl="triton", chunk_size=16, prior="raw"),
        DashConfig(impl="triton", chunk_size=16, selector="topk", topk=3, prior="mass"),
        InfLLMv2Config(**SIZES, window_size=16),
        SinkWindowConfig(impl="triton", block_size=16, local_blocks=1),
        NSAConfig(**SIZES, window_size=20, shared_kv=False),
        NSAConfig(**SIZES, window_size=0, variant="minicpm"),
    ],
    ids=lambda config: " ".join(str(getattr(config, name, "")) for name in ("name", "prior", "variant")).strip(),
)
def test_kept_bytes_are_those_that_autograd_saves(config):
    backend = build_backend(config, AttentionShape(64, HEADS, KV_HEADS, DIM)).to(DEVICE)
    shapes = [(1, LENGTH, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    qkv = [torch.randn(shape, device=DEVICE, requires_grad=True) for shape in shapes]
    extra = {"hidden": torch.randn(1, LENGTH, 64, device=DEVICE), "rope": torch.randn(2, LENGTH, DIM, device=DEVICE)}
    saved = {}

    def pack(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = backend(*qkv, **extra)
    for x in (*qkv, out, *extra.values(), *backend.parameters()):
        saved.pop(x.untyped_storage().data_ptr(), None)
    # Beside numbers that do not grow with the row: a scale, alpha.
    kept = sum(size for size in saved.values() if size >= LENGTH)
    said = backend.kept_bytes(LENGTH, 4) * LENGTH
    if config.name == "nsa":  # a bound: a row has a window less than strides, and the sigmoid keeps its result alone
        assert kept < said < 1.15 * kept
    else:
        assert said == pytest.approx(kept, rel=1e-6)


def test_scratch_has_the_lists_of_the_kernels():
    """Nothing is allocated: 2**17 tokens, 2 KV heads, blocks of 64."""
    length, block = 2**17, 64
    geo = Geometry(torch.tensor([0, length], dtype=torch.int32), length, length, 32, 2, 128)
    backend = build_backend(InfLLMv2Config(), AttentionShape(4096, 32, 2, 128))
    lists = schedule.key_list_bytes(geo, block, 2048)
    assert backend.scratch_bytes(length, 2) * length == pytest.approx(lists, rel=0.02)
    with_prior = build_backend(DashConfig(), AttentionShape(4096, 32, 2, 128))
    small = build_backend(InfLLMv2Config(), AttentionShape(2048, 32, 2, 64))  # heads of 64: sums of dq in float32
    assert small.scratch_bytes(length, 2) - backend.scratch_bytes(length, 2) == 4 * 32 * 64
    priors = with_prior.scratch_bytes(length, 2) * length - backend.scratch_bytes(length, 2) * length
    assert priors == schedule.bias_bytes(geo, 2, length // block)
