"""Others' kernels, with stand-ins that compute by the reference what they are given: that it is our selection, in the
layout which each of them takes."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from dashattn.ops.block_sparse.reference import block_sparse_attention
from dashattn.ops.chunk_summary.reference import chunk_summary
from dashattn.ops.compression.reference import compressed_attention
from dashattn.ops.dash_routing.reference import dash_routing
from dashattn.selection import Selection
from experiments.speed import peers
from experiments.speed.inputs import Shape, make_problem

SHAPE = Shape(heads=4, kv_heads=2, head_dim=16, chunk_size=16, dtype=torch.float32)


@pytest.fixture
def install(monkeypatch):
    """install(name, function=...): a package of these functions."""

    def add(name, **functions):
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:depth]), ModuleType(".".join(parts[:depth])))
        vars(sys.modules[name]).update(functions)

    monkeypatch.setattr(peers, "find_spec", lambda name: sys.modules.get(name))
    return add


def of_lists(q, k, v, blocks, is_there, size):
    """Attention over lists of blocks, [T, H, most]."""
    mask = torch.zeros(*blocks.shape[:2], -(-len(q[0]) // size) + 1, dtype=torch.bool)
    mask.scatter_(2, blocks.long().where(is_there, mask.shape[2] - 1), True)
    return block_sparse_attention(q, k, v, Selection.from_mask(mask[None, ..., :-1], size))


def held(method, problem):
    operation = method.prepare(problem)
    errors = operation.errors(problem.grad)
    assert set(errors) == {"out", *operation.leaves}
    assert max(errors.values()) < 1e-4
    return operation


def test_lists_of_blocks_are_our_selection(install):
    problem = make_problem("iid", 150, 0.4, SHAPE, device="cpu")
    seen = []

    def parallel_nsa(q, k, v, block_indices, block_counts, block_size):
        seen.append(block_indices.shape[-1])
        there = torch.arange(block_indices.shape[-1]) < block_counts[..., None]
        return of_lists(q, k, v, block_indices[0], there[0], block_size)

    def topk_sparse_attention(q, k, v, topk, size, cu_seqlens):
        assert (topk.dtype, topk.shape[:2]) == (torch.int32, (2, 150))
        assert (cu_seqlens.dtype, cu_seqlens.tolist()) == (torch.int32, [0, 150])
        blocks = topk.transpose(0, 1)
        return of_lists(q[None], k[None], v[None], blocks, blocks >= 0, size)[0]

    install("fla.ops.nsa.parallel", parallel_nsa=parallel_nsa)
    install("native_sparse_attention.ops", topk_sparse_attention=topk_sparse_attention, compressed_attention=None)
    held(peers.BASELINES["fla_nsa"][0], problem)
    held(peers.BASELINES["xunhao_nsa"][0], problem)
    most = problem.selection.mask().sum(-1).max().item()
    assert set(seen) == {1 << (most - 1).bit_length()}  # its kernels take powers of two


def test_two_branches_that_select_for_themselves(install):
    problem = make_problem("iid", 150, 0.4, SHAPE, device="cpu")

    def compressed(q, compressed_k, compressed_v, kernel, stride, size, topk, cu_tokens, cu_windows, length, windows):
        assert (kernel, stride, size, length, windows) == (32, 16, 16, 150, (150 - 32) // 16 + 1)
        assert (cu_tokens.tolist(), cu_windows.tolist()) == ([0, length], [0, windows])
        assert cu_tokens.dtype == cu_windows.dtype == torch.int32
        own = torch.arange(length) // size
        blocks = (own[:, None] - torch.arange(topk)).clamp(min=-1).expand(2, length, topk)  # the newest ones
        options = {"kernel_size": kernel, "kernel_stride": stride, "scale": 0.25, "cu_seqlens": None}
        out = compressed_attention(q[None], compressed_k[None], compressed_v[None], lambda p: None, **options)[0]
        return out[0], blocks

    def topk_sparse_attention(q, k, v, topk, size, cu_seqlens):
        blocks = topk.transpose(0, 1)
        return of_lists(q[None], k[None], v[None], blocks, blocks >= 0, size)[0]

    functions = {"topk_sparse_attention": topk_sparse_attention, "compressed_attention": compressed}
    install("native_sparse_attention.ops", **functions)
    operation = held(peers.BASELINES["xunhao_nsa"][1], problem)
    assert operation.causal_sparsity == pytest.approx(0.4, abs=0.06)


def test_two_branches_with_as_many_blocks_of_every_token(install):
    problem = make_problem("iid", 150, 0.4, SHAPE, device="cpu")
    options, state = {"kernel_size": 32, "kernel_stride": 16, "scale": 0.25, "cu_seqlens": None}, {}

    class NSAHelper:
        set_hyperparameters = staticmethod(lambda **given: state.update(given))
        init_cu_seqlens = staticmethod(lambda given: state.update(cu_seqlens=given.tolist(), dtype=given.dtype))

    def compress_attn(q, compressed_k, compressed_v, sm_scale):
        assert sm_scale == 0.25
        out, _ = compressed_attention(q[None], compressed_k[None], compressed_v[None], lambda p: None, **options)
        return out[0], "lse"

    def slc_topk_indices(q, compressed_k, lse, sm_scale, scale_slc_p):
        assert (lse, sm_scale, scale_slc_p) == ("lse", 0.25, True)
        assert not torch.is_grad_enabled()
        blocks = torch.arange(150)[:, None] // 16 - torch.arange(state["top_n"])
        return torch.where(blocks >= 0, blocks, 99).int().expand(2, -1, -1), None  # anything behind those there are

    def select_attn(q, k, v, blocks, sm_scale):
        assert sm_scale == 0.25
        blocks = blocks.transpose(0, 1)
        there = torch.arange(blocks.shape[2]) < torch.arange(150)[:, None, None] // 16 + 1
        return of_lists(q[None], k[None], v[None], blocks, there, 16)[0]

    functions = {"compress_attn": compress_attn, "slc_topk_indices": slc_topk_indices, "select_attn": select_attn}
    install("flash_nsa", NSAHelper=NSAHelper, **functions)
    operation = held(peers.BASELINES["scalable_nsa"][0], problem)
    assert operation.causal_sparsity == pytest.approx(0.4, abs=0.06)
    sizes = {"kernel_size": 32, "stride": 16, "block_size": 16, "num_init_blocks": 1, "num_local_blocks": 2}
    assert state.pop("top_n") > 3
    assert state == sizes | {"cu_seqlens": [0, 150], "dtype": torch.int32}


def dense_flex(q, k, v, *, block_mask, enable_gqa, kernel_options):
    """What FlexAttention computes of a mask: lists of whole tiles, and of tiles that the mask function cuts."""
    assert enable_gqa
    tokens, keys = block_mask.BLOCK_SIZE
    length = q.shape[2]
    place = torch.arange(length)
    read = torch.zeros(len(q), length, length, dtype=torch.bool)
    for head in range(len(q)):
        for tile in range(-(-length // tokens)):
            inside = slice(tile * tokens, min(length, (tile + 1) * tokens))
            for counts, lists, whole in (
                (block_mask.kv_num_blocks, block_mask.kv_indices, False),
                (block_mask.full_kv_num_blocks, block_mask.full_kv_indices, True),
            ):
                assert lists.dtype == counts.dtype == torch.int32
                for other in lists[head, 0, tile, : counts[head, 0, tile]].tolist():
                    beside = slice(other * keys, min(length, (other + 1) * keys))
                    cut = block_mask.mask_mod(torch.tensor(head), None, place[inside, None], place[None, beside])
                    assert cut.all() == whole
                    assert cut.any()
                    assert not read[head, inside, beside].any()
                    read[head, inside, beside] = cut
    return scaled_dot_product_attention(q, k, v, attn_mask=read[:, None], enable_gqa=True)


@pytest.mark.parametrize("pattern", ["shared", "iid"])
@pytest.mark.parametrize("name", ["flex_attention", "flash_attention_4"])
def test_tiles_of_flex_attention_are_our_selection(install, monkeypatch, name, pattern):
    problem = make_problem(pattern, 300, 0.4, SHAPE, device="cpu")
    asked = []

    def compiled(function, dynamic):
        assert (function.__name__, dynamic) == ("flex_attention", False)
        return lambda *inputs, kernel_options, **options: (
            asked.append(kernel_options) or dense_flex(*inputs, kernel_options=kernel_options, **options)
        )

    monkeypatch.setattr(torch, "compile", compiled)
    install("flash_attn.cute")
    held(peers.BASELINES[name][0], problem)
    assert asked[0] == ({"BACKEND": "FLASH"} if name == "flash_attention_4" else {})


@pytest.mark.parametrize("tile", [16, 32, 64])
def test_a_tile_is_read_where_any_token_reads_and_whole_where_all_do(tile):
    mask = torch.rand(1, 150, 2, 10) < 0.3
    mask[:, 64:128, :, :4] = True
    mask[..., 0] = True  # by each token of the first tile, too, of which most have not seen all of it
    mask &= (torch.arange(150)[:, None, None] // 16 >= torch.arange(10))[None]
    some, every = peers.tiles_of(Selection.from_mask(mask, 16), 150, tile)
    read = mask[0].transpose(0, 1).repeat_interleave(16, dim=2)[..., :150] & torch.ones(150, 150).tril().bool()
    for head in range(2):
        for row in range(-(-150 // tile)):
            for column in range(-(-150 // tile)):
                inside = read[head, row * tile : (row + 1) * tile, column * tile : (column + 1) * tile]
                assert some[head, row, column] == inside.any()
                assert every[head, row, column] == (inside.all() and inside.shape == (tile, tile))
    assert every.any()


@pytest.mark.parametrize("with_normaliser", [False, True])
def test_flash_attention_3_is_causal_attention(install, with_normaliser):
    problem = make_problem("iid", 70, None, SHAPE, device="cpu")

    def flash_attn_func(q, k, v, causal):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2)
        return (out, None) if with_normaliser else out

    install("flash_attn_interface", flash_attn_func=flash_attn_func)
    held(peers.BASELINES["flash_attention_3"][0], problem)


def test_the_authors_package_selects_with_our_scale(install):
    problem = make_problem("iid", 150, 0.4, SHAPE, device="cpu")
    options = {}

    def route(q, summaries):
        return dash_routing(q, summaries, chunk_size=16, router_scale=1.0, prior="none")[0]

    def summarise(k, chunk_query, size, cu_seqlens):
        assert cu_seqlens is None
        return chunk_summary(k.transpose(1, 2), chunk_query, chunk_size=size)

    def score_blocks(q, summaries, size, cu_seqlens, *, estimate_diag, sigma):
        assert (size, cu_seqlens, estimate_diag, sigma) == (16, None, True, 1e6)
        return route(q.transpose(1, 2), summaries).words, None

    def dash_attn(**given):
        options.update(given)

        def attend(q, k, v, chunk_query):
            scaled = given["scaling_factor"] * q.transpose(1, 2)
            selection = route(scaled, summarise(k, chunk_query, given["chunk_size"], None))
            return block_sparse_attention(*(x.transpose(1, 2) for x in (q, k, v)), selection).transpose(1, 2)

        return attend

    prefill = SimpleNamespace(summarize_chunk=summarise, score_blocks=score_blocks)
    install("dash_attn", dash_attn=dash_attn, prefill=prefill)
    precision = torch.get_float32_matmul_precision()
    operation = peers.BASELINES["released_dash"][0].prepare(problem)
    assert operation.errors(problem.grad) == {"out": pytest.approx(0, abs=1e-5)}
    assert torch.get_float32_matmul_precision() == precision
    assert options == {
        "chunk_size": 16,
        "enable_gqa": True,
        "estimate_diagonal": True,
        "scaling_factor": problem.router_scale,
        "max_chunks": 512,
    }
