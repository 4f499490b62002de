"""Dense attention on a GPU, with the kernels that training takes."""

import pytest
import torch

from dashattn import full_attention
from dashattn.documents import per_document

BF16 = torch.bfloat16
LENGTHS = [1, 300, 0, 64, 900, 7]


def gradients(function, inputs, grad):
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def exact(q, k, v):
    scores = torch.einsum("bthgd,bshd->bhgts", q.unflatten(2, (k.shape[2], -1)), k) * q.shape[-1] ** -0.5
    future = torch.ones(q.shape[1], q.shape[1], device=q.device, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, float("-inf")).softmax(-1)
    return torch.einsum("bhgts,bshd->bthgd", weights, v).flatten(2, 3)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    ("lengths", "max_seqlen"),
    [(None, None), (LENGTHS, None), (LENGTHS, 900)],
    ids=["one document", "packed", "packed, max_seqlen"],
)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(16, 4, 64), (8, 8, 128), (6, 2, 96)])
def test_output_and_gradients(heads, kv_heads, head_dim, lengths, max_seqlen, compiled):
    torch._dynamo.reset()
    length = 1272
    cu_seqlens = None
    if lengths is not None:
        cu_seqlens = torch.tensor([0, *lengths], device="cuda").cumsum(0, dtype=torch.int32)
    inputs = [
        torch.randn(1, length, h, head_dim, device="cuda", dtype=BF16, requires_grad=True)
        for h in (heads, kv_heads, kv_heads)
    ]
    grad = torch.randn_like(inputs[0])
    attend = torch.compile(full_attention, fullgraph=True) if compiled else full_attention
    found = gradients(lambda *qkv: attend(*qkv, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen), inputs, grad)
    expected = gradients(
        lambda *qkv: torch.cat(per_document(exact, cu_seqlens, *qkv), 1),
        [x.detach().double().requires_grad_() for x in inputs],
        grad.double(),
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert ((ours.double() - theirs).norm() / theirs.norm()).item() < 1e-2


@pytest.mark.parametrize(("length", "takes_cudnn"), [(1280, True), (1272, False)], ids=["a row", "a prompt"])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (8, 8, 128)])
def test_output_without_gradients(heads, kv_heads, head_dim, length, takes_cudnn):
    q, k, v = (torch.randn(3, length, h, head_dim, device="cuda", dtype=BF16) for h in (heads, kv_heads, kv_heads))
    with torch.inference_mode(), torch.profiler.profile() as profile:
        out = full_attention(q, k, v)
    kernels = " ".join(event.key for event in profile.key_averages() if event.self_device_time_total)
    assert ("cudnn" in kernels) == takes_cudnn, kernels
    expected = exact(q.double(), k.double(), v.double())
    assert ((out.double() - expected).norm() / expected.norm()).item() < 1e-2
    group = heads // kv_heads
    with torch.inference_mode():
        last = full_attention(q[2:, :, -group:], k[2:, :, -1:], v[2:, :, -1:])
    assert ((out[2:, :, -group:] - last).norm() / last.norm()).item() < 1e-2
