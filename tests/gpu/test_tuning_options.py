"""Every launch option that tuning may choose gives what the first one gives, which is what other tests run."""

import pytest
import torch

pytest.importorskip("triton")

from test_kernels import BF16, FP32, random, relative_error

from dashattn.backends import AttentionShape, DashConfig, InfLLMv2Config, NSAConfig, build_backend
from dashattn.ops import tuning

HIDDEN, LENGTH = 48, 300
TOLERANCE = {BF16: 1e-2, FP32: 1e-4}  # they add up in another order


def with_option(number, run, monkeypatch):
    """``run()`` with that option of every kernel, or the last of a shorter list; the first where it does not fit."""

    def launch(run, options, call):
        option = options[min(number, len(options) - 1)]
        try:
            run(option)
        except tuning.OutOfResources:
            option = options[0]
            run(option)
        return option

    with monkeypatch.context() as patch:
        patch.setattr(tuning, "_launch_first_that_fits", launch)
        patch.setattr("dashattn.ops.block_sparse.triton._hopper_backward", lambda *_: None)  # which has no options
        for choices in ("_chosen", "_untimed"):
            patch.setattr(tuning, choices, {})
        return run()


def configurations(block):
    windows = dict(block_size=block, kernel_size=block // 2, kernel_stride=block // 4, topk=4)
    dash = dict(chunk_size=block, router_scale=4.0, prior="raw")
    return {
        "dash": DashConfig(**dash),
        "dash learnable": DashConfig(**dash, alpha_mode="learnable"),
        "infllmv2": InfLLMv2Config(**windows, window_size=block),
        "nsa": NSAConfig(**windows, window_size=40),
    }


@pytest.mark.parametrize("number", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["bf16", "fp32"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("method", configurations(16))
def test_option(method, block, head_dim, dtype, number, monkeypatch):
    backend = build_backend(configurations(block)[method], AttentionShape(HIDDEN, 6, 2, head_dim)).to("cuda", dtype)
    hidden = random(2, LENGTH, HIDDEN, dtype=dtype)
    tensors = [random(2, LENGTH, heads, head_dim, dtype=dtype).requires_grad_() for heads in (6, 2, 2)]
    grad = random(2, LENGTH, 6, head_dim, dtype=dtype)

    def forward_and_backward():
        out = backend(*tensors, hidden=hidden)
        return [out, *torch.autograd.grad(out, [*tensors, *backend.parameters()], grad)]

    first = with_option(0, forward_and_backward, monkeypatch)
    other = with_option(number, forward_and_backward, monkeypatch)
    for x, wanted in zip(other, first, strict=True):
        assert relative_error(x, wanted) < TOLERANCE[dtype]
