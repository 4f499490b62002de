"""The Triton kernels of block-sparse attention against the reference, on the CPU through Triton's interpreter.

Sizes are tiny (an inner iteration takes milliseconds there), and bfloat16 is left to tests/gpu: the interpreter
computes it wrongly.
"""

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime import interpreter

from dashattn.ops.block_sparse import reference
from dashattn.ops.block_sparse import triton as kernels
from dashattn.ops.block_sparse.schedule import key_lists, tile_lists
from dashattn.ops.tiles import geometry
from dashattn.selection import Selection

if torch.cuda.is_available():
    pytest.skip("tests/gpu covers the kernels where there is a GPU", allow_module_level=True)


def relative_error(x, expected):
    return ((x - expected).norm() / expected.norm().clamp_min(1e-20)).item()


def run(attention, q, k, v, selection, bias, grad, cu_seqlens):
    inputs = [x.detach().clone().requires_grad_() for x in (q, k, v, *(() if bias is None else (bias,)))]
    out = attention(*inputs[:3], selection, *inputs[3:], cu_seqlens=cu_seqlens)
    return out.detach(), *torch.autograd.grad(out, inputs, grad)


@pytest.mark.parametrize(
    ("batch", "length", "group", "kv_heads", "head_dim", "block_size", "bias_heads", "dtype"),
    [
        (1, 37, 1, 1, 16, 16, "query", torch.float32),
        (2, 35, 3, 1, 72, 16, "kv", torch.float32),  # key gradients with the group padded
        (1, 40, 4, 2, 32, 32, None, torch.float32),
        (1, 33, 7, 1, 24, 16, "query", torch.float32),
        (1, 1, 2, 1, 16, 16, "kv", torch.float32),
        (1, 200, 1, 1, 160, 128, "kv", torch.float32),
        (1, 37, 2, 1, 32, 16, None, torch.float16),
    ],
)
def test_forward_and_gradients_agree_with_the_reference(
    batch, length, group, kv_heads, head_dim, block_size, bias_heads, dtype
):
    num_blocks = -(-length // block_size)
    q, grad = (torch.randn(batch, length, group * kv_heads, head_dim).to(dtype) for _ in range(2))
    k, v = (torch.randn(batch, length, kv_heads, head_dim).to(dtype) for _ in range(2))
    selection = Selection.from_mask(torch.rand(batch, length, kv_heads, num_blocks) < 0.5, block_size)
    bias = None
    if bias_heads is not None:
        bias = torch.randn(batch, length, kv_heads * (group if bias_heads == "query" else 1), num_blocks)
        bias[torch.rand_like(bias) < 0.2] = -torch.inf
    expected = run(reference.block_sparse_attention, q, k, v, selection, bias, grad, None)
    results = run(kernels.block_sparse_attention, q, k, v, selection, bias, grad, None)
    for result, wanted in zip(results, expected, strict=True):
        assert result.dtype == wanted.dtype
        assert relative_error(result, wanted) < (1e-3 if dtype == torch.float16 else 3e-5)


def test_packed_documents_and_non_contiguous_inputs():
    cu_seqlens = torch.tensor([0, 1, 1, 20, 44], dtype=torch.int32)
    q, grad = (torch.randn(1, 2, 44, 16).transpose(1, 2) for _ in range(2))
    k, v = torch.randn(1, 44, 1, 32).chunk(2, dim=-1)
    bias = torch.randn(1, 3, 1, 44).transpose(1, 3)
    selection = Selection.from_mask(torch.rand(1, 44, 1, 3) < 0.5, 16)
    expected = run(reference.block_sparse_attention, q, k, v, selection, bias, grad, cu_seqlens)
    results = run(kernels.block_sparse_attention, q, k, v, selection, bias, grad, cu_seqlens)
    for result, wanted in zip(results, expected, strict=True):
        assert relative_error(result, wanted) < 1e-5


def test_a_token_that_selects_nothing_gives_zero_and_no_gradient():
    q, k, v = (torch.randn(1, 20, 1, 16, requires_grad=True) for _ in range(3))
    mask = torch.ones(1, 20, 1, 2, dtype=torch.bool)
    mask[:, 5] = False
    out = kernels.block_sparse_attention(q, k, v, Selection.from_mask(mask, 16))
    assert out[:, 5].abs().max() == 0
    dq, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
    assert dq[:, 5].abs().max() == 0
    assert all(x.isfinite().all() for x in (dq, dk, dv))


def test_a_block_that_a_token_leaves_out_does_not_move_its_softmax():
    """Its neighbours in the tile choose the block, whose logits exceed the others by 160, base 2."""
    q, k, v, grad = (torch.randn(1, 48, heads, 16) for heads in (2, 1, 1, 2))
    q[..., 0] = 4.0
    k[..., 0] = 0.0
    k[:, 16:32, :, 0] = 111.0
    mask = torch.ones(1, 48, 1, 3, dtype=torch.bool)
    mask[:, ::2, :, 1] = False
    selection = Selection.from_mask(mask, 16)
    expected = run(reference.block_sparse_attention, q, k, v, selection, None, grad, None)
    results = run(kernels.block_sparse_attention, q, k, v, selection, None, grad, None)
    for result, wanted in zip(results, expected, strict=True):
        assert relative_error(result, wanted) < 1e-3  # dq: differences of large numbers
    own = torch.einsum("thd,sd->hts", q[0, ::2], k[0, :16, 0]) / 4  # of the second block's even tokens: block 0 alone
    alone = torch.einsum("hts,sd->thd", own[:, 8:16].softmax(-1), v[0, :16, 0])
    assert relative_error(results[0][0, 16:32:2], alone) < 3e-5


# A choice is 32 bits, 64, or two times 64; the longest ends in the first block of a third word.
@pytest.mark.parametrize(("size", "end"), [(8, 580), (42, 580), (128, 1055)])
def test_lists_hold_exactly_the_selected_pairs(size, end):
    cu_seqlens = torch.tensor([0, 30, end], dtype=torch.int32)
    selection = Selection.from_mask(torch.rand(1, end, 2, 70) < 0.15, 16)
    geo = geometry(torch.empty(1, end, 2, 16), 2, cu_seqlens)
    words = kernels.flatten_words(selection.words)
    position = torch.cat([torch.arange(30), torch.arange(end - 30)])
    allowed = selection.mask()[0] & (torch.arange(96) <= (position // 16)[:, None, None])  # [T, H, N]
    expected = {tuple(x) for x in allowed.nonzero().tolist()}

    tiles = tile_lists(words, geo, 16, size)
    by_tile = set()
    for head in range(2):
        for slot in range(geo.slots(size)):
            document = 0 if slot < 30 // size + 1 else 1
            first = (0, 30)[document] + (slot - (0, 30 // size + 1)[document]) * size
            for entry in range(tiles.counts[head, slot, 1]):
                block, halves = tiles.blocks[head, slot, entry].item(), tiles.choices[head, slot, ..., entry].tolist()
                choices = halves if isinstance(halves, list) else [halves]
                by_tile |= {(first + i, head, block) for i in range(size) if choices[i // 64] >> i % 64 & 1}
    assert by_tile == expected

    keys = key_lists(words, geo, 16, 32)
    by_key = set()
    for head in range(2):
        for slot in range(geo.slots(16)):
            document = 0 if slot < 30 // 16 + 1 else 1
            block = slot - (0, 30 // 16 + 1)[document]
            if block * 16 >= (30, end - 30)[document]:
                continue
            base = keys.bases[document] + block * (30, end - 30)[document] - 16 * (block * (block - 1) // 2)
            count = keys.counts[head, slot, 1]
            tokens = keys.tokens[head, base : base + count]
            by_key |= {(t, head, block) for t in tokens.tolist()}
            first = (0, 30)[document] + block * 16
            for window in range(first // 32 + 1, ((30, end)[document] - 1) // 32 + 1):
                assert keys.offsets[head, slot, window] == (tokens < 32 * window).sum()
    assert by_key == expected


@pytest.mark.timeout(120)
@pytest.mark.parametrize("backwards", [False, True])
def test_windows_add_up(monkeypatch, backwards):
    """The key gradient in windows of 16 tokens, across documents; whichever program the device starts first."""
    monkeypatch.setattr(kernels, "key_grad_window", lambda *_: 16)
    if backwards:
        builder = interpreter.interpreter_builder
        start = builder.set_grid_idx
        monkeypatch.setattr(builder, "set_grid_idx", lambda x, y, z: start(builder.grid_dim[0] - 1 - x, y, z))
    q, k, v = (torch.randn(1, 75, heads, 16) for heads in (2, 1, 1))
    cu_seqlens = torch.tensor([0, 3, 20, 75], dtype=torch.int32)
    selection = Selection.from_mask(torch.rand(1, 75, 1, 5) < 0.5, 16)
    expected, results = (
        run(function.block_sparse_attention, q, k, v, selection, None, torch.ones_like(q), cu_seqlens)
        for function in (reference, kernels)
    )
    for result, wanted in zip(results, expected, strict=True):
        assert relative_error(result, wanted) < 3e-5


def test_operator_is_registered_properly():
    q, k, v = (torch.randn(1, 20, 1, 16, requires_grad=True) for _ in range(3))
    words = Selection.from_mask(torch.rand(1, 20, 1, 2) < 0.5, 16).words
    bias = torch.randn(1, 20, 1, 2, requires_grad=True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.dashattn.block_sparse_forward.default, (q, k, v, words, bias, None, 16, 0.25),
                          test_utils=checks)  # fmt: skip
