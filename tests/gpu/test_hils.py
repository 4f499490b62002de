"""HiLS on a GPU: attention in kernels under a bias that PyTorch makes for every query head, and generation."""

import pytest
import torch

pytest.importorskip("triton")

from test_generate import PROMPTS, greedy_without_cache
from test_kernels import relative_error
from test_transformer import build

from dashattn import dash_attention
from dashattn.backends import DashConfig
from models.generate import generate

LENGTH = 3000


@pytest.mark.parametrize("is_packed", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize("selector", [{"selector": "topk", "topk": 12}, {"selector": "topp", "top_p": 0.5}], ids=str)
def test_forward_and_gradients(selector, is_packed):
    """Against PyTorch in float32; but for the few rows, in which chunks have nearly one score."""
    tensors = [torch.randn(1, LENGTH, heads, 64, device="cuda").bfloat16() for heads in (16, 2, 2)]
    tensors.append(torch.randn(2, 64, device="cuda").bfloat16())
    documents = torch.tensor([0, 131, 1700, LENGTH], dtype=torch.int32, device="cuda") if is_packed else None
    weight, results = torch.randn(1, LENGTH, 16, 64, device="cuda"), []
    for impl, dtype in (("triton", torch.bfloat16), ("reference", torch.float32)):
        leaves = [x.to(dtype).requires_grad_() for x in tensors]
        options = {"prior": "mass", "init_chunks": 1, "impl": impl, "cu_seqlens": documents, "return_stats": True}
        out, stats = dash_attention(*leaves, **selector, **options)
        results.append((stats.active_tokens, out, *torch.autograd.grad((out.float() * weight).sum(), leaves)))
    (active, *found), (wanted, *expected) = results
    assert (active != wanted).float().mean() < 0.01
    for ours, theirs in zip(found, expected, strict=True):
        assert relative_error(ours, theirs) < 5e-2


def test_generation_in_a_cuda_graph_equals_generation_without_a_cache():
    model = build(DashConfig(chunk_size=16, selector="topk", topk=3, prior="mass", init_chunks=1)).cuda()
    expected = [greedy_without_cache(model, prompt, 12) for prompt in PROMPTS]
    assert generate(model, PROMPTS, max_new_tokens=12) == expected
