"""Layers that take a selection over, on a GPU: kernels at real sizes, and a step in a CUDA graph."""

import pytest
import torch

pytest.importorskip("triton")

from test_generate import PROMPTS, greedy_without_cache
from test_kernels import relative_error
from test_transformer import build

from dashattn.backends import AttentionShape, DashConfig, IndexerConfig, InfLLMv2Config, SharingBackend, build_backend
from models.generate import generate

SHAPE = AttentionShape(hidden_size=256, num_heads=16, num_kv_heads=2, head_dim=64)
LENGTH = 3000
CONFIGS = {
    "dash raw": DashConfig(router_scale=8.0, prior="raw"),
    "dash": DashConfig(router_scale=8.0, init_chunks=1),
    "dash topk": DashConfig(selector="topk", topk=12, prior="raw", init_chunks=1),
    "dash topp": DashConfig(selector="topp", top_p=0.7, prior="raw"),
    "infllmv2": InfLLMv2Config(topk=12, window_size=256),
    "indexer": IndexerConfig(topk=12),
}


@pytest.mark.parametrize("is_packed", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_forward_and_gradients(name, is_packed):
    """Of both layers, against the reference in float32 with the selection that the kernels made."""
    heads = (16, 2, 2, 16, 2, 2)
    tensors = [torch.randn(1, LENGTH, h, 64, device="cuda").bfloat16().requires_grad_() for h in heads]
    hidden = torch.randn(1, LENGTH, 256, device="cuda").bfloat16()
    documents = torch.tensor([0, 131, 1700, LENGTH], dtype=torch.int32, device="cuda") if is_packed else None
    router = build_backend(CONFIGS[name], SHAPE).cuda().bfloat16()
    sharing = SharingBackend(CONFIGS[name], SHAPE, source=0)
    _, taken = router(*tensors[:3], hidden=hidden, cu_seqlens=documents, return_selection=True)
    shared = sharing(*tensors[3:], taken=taken, cu_seqlens=documents)
    weight = torch.randn_like(shared)
    leaves = tensors[3:] + ([] if taken.bias is None else [taken.bias])
    grads = torch.autograd.grad((shared * weight).sum(), leaves, retain_graph=True)

    bias = None if taken.bias is None else taken.bias.detach().float().requires_grad_()
    wide = [x.detach().float().requires_grad_() for x in tensors[3:]]
    reference = SharingBackend(type(CONFIGS[name])(impl="reference", **sizes(CONFIGS[name])), SHAPE, source=0)
    expected = reference(*wide, taken=taken._replace(bias=bias), cu_seqlens=documents)
    wanted = torch.autograd.grad((expected * weight).sum(), wide + ([] if bias is None else [bias]))
    assert relative_error(shared, expected) < 5e-3
    for ours, theirs in zip(grads, wanted, strict=True):
        assert relative_error(ours, theirs) < 2e-2
    if bias is not None:  # and from there to the router's inputs
        reached = torch.autograd.grad((shared * weight).sum(), tensors[:2])
        assert all(0 < x.float().norm() < float("inf") for x in reached)


def sizes(config):
    return {config.blocks: getattr(config, config.blocks)}


LAYERS = {"1": {"share_selection_from": 0}}


@pytest.mark.parametrize(
    "attention",
    [
        DashConfig(chunk_size=16, router_scale=20.0, layers=LAYERS),
        DashConfig(chunk_size=16, router_scale=4.0, prior="raw", init_chunks=1, layers=LAYERS),
        DashConfig(chunk_size=16, router_scale=4.0, prior="raw", summary_keys="unrotated", layers=LAYERS),
        DashConfig(chunk_size=16, selector="topk", topk=3, prior="raw", layers=LAYERS),
        InfLLMv2Config(block_size=16, kernel_size=8, kernel_stride=4, topk=4, window_size=16, layers=LAYERS),
    ],
    ids=["dash", "dash raw", "dash unrotated", "dash topk", "infllmv2"],
)
def test_generation_in_a_cuda_graph_equals_generation_without_a_cache(attention):
    model = build(attention).cuda()
    expected = [greedy_without_cache(model, prompt, 12) for prompt in PROMPTS]
    assert generate(model, PROMPTS, max_new_tokens=12) == expected
