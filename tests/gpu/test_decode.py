"""Decode kernels at real sizes and types against the references; the decode step in a CUDA graph."""

import pytest
import torch

pytest.importorskip("triton")

from test_generate import PROMPTS, greedy_without_cache
from test_kernels import BF16, FP16, FP32, TOLERANCE, random, relative_error
from test_transformer import build, tokens

from dashattn.backends import DashConfig, FullConfig, InfLLMv2Config, NSAConfig
from dashattn.ops.chunk_summary.reference import chunk_summary
from dashattn.ops.decode import reference, triton_routing
from dashattn.ops.decode import triton as kernels
from dashattn.ops.matvec import reference as plain_products
from dashattn.ops.matvec import triton as products
from dashattn.selection import Selection
from models import RopeConfig
from models.generate import generate

SIZES = dict(block_size=16, kernel_size=8, kernel_stride=4, topk=4)


def make_cache(lengths, capacity, kv_heads, head_dim, dtype):
    k, v = (random(len(lengths), capacity, kv_heads, head_dim, dtype=dtype) for _ in range(2))
    return k, v, torch.tensor(lengths, dtype=torch.int32, device="cuda")


@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8, 16, 32])
def test_group_sizes(group):
    check_routed(group, 2, 128, 64, BF16, 1, [70, 4000])


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("chunk_size", [16, 32, 64, 128])
def test_head_and_chunk_sizes(head_dim, chunk_size):
    check_routed(4, 2, head_dim, chunk_size, BF16, 2, [1000])


@pytest.mark.parametrize("dtype", [FP16, FP32])
@pytest.mark.parametrize("num_tokens", [1, 5])
def test_types(dtype, num_tokens):
    check_routed(16, 2, 128, 64, dtype, num_tokens, [0, 63, 64, 5000])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"alpha": 1.2},
        {"alpha": 1.03},
        {"prior": "none"},
        {"prior": "tempered", "sigma": 2.0},
        {"init_chunks": 1},
        {"init_chunks": 2, "local_chunks": 3, "prior": "tempered"},
        {"init_chunks": 2046, "local_chunks": 1},
        {"selector": "topk", "topk": 200, "init_chunks": 1},
        {"selector": "topk", "topk": 60, "prior": "tempered", "sigma": 2.0},
        {"selector": "topp", "top_p": 0.6, "init_chunks": 1},
        {"selector": "topp", "top_p": 0.9, "prior": "tempered", "sigma": 2.0, "local_chunks": 3},
    ],
)
def test_long_sequences_and_options(options):
    check_routed(16, 2, 128, 64, BF16, 1, [131_000], **options)


def check_routed(group, kv_heads, head_dim, chunk_size, dtype, num_tokens, lengths, **options):
    capacity = -(-(max(lengths) + num_tokens) // chunk_size) * chunk_size
    k, v, lengths = make_cache(lengths, capacity, kv_heads, head_dim, dtype)
    q = random(len(lengths), num_tokens, group * kv_heads, head_dim, dtype=dtype)
    summaries = chunk_summary(k, torch.zeros(kv_heads, head_dim, device="cuda"), chunk_size=chunk_size)
    options = dict(alpha=1.5, router_scale=20.0, prior="raw", sigma=1.0) | options
    out = kernels.routed_attention(q, k, v, summaries, lengths, chunk_size=chunk_size, **options)

    wide = [x.float() for x in (q, k, v, summaries)]
    wanted, _ = reference.cached_dash_routing(
        wide[0], wide[3], lengths, chunk_size=chunk_size, prior_heads="group", **options
    )
    alpha = None if options["alpha"] == 1.5 else torch.full((q.shape[2],), options["alpha"], device="cuda")
    sigma = options["sigma"] if options["prior"] == "tempered" else None
    has_bias = options["prior"] != "none"
    forced = options.get("init_chunks", 0), options.get("local_chunks", 0)
    scale = 20.0 * head_dim**-0.5
    kind = has_bias, sigma, forced
    if "selector" in options:
        bound = options.get("topk", 0), options.get("top_p")
        words, bias = kernels.route_by_softmax(q, summaries, lengths, chunk_size, scale, *bound, *kind)
    else:
        words, bias = kernels.route(q, summaries, lengths, alpha, chunk_size, scale, *kind)
    own = Selection(words, chunk_size).mask().unflatten(2, (kv_heads, -1)).any(3)
    differs = (own != wanted.mask()).any(-1)
    assert differs.float().mean() <= max(0.005, 1 / differs.numel())
    selection = Selection.from_mask(own[..., : summaries.shape[1]], chunk_size)
    expected = reference.cached_attention(*wide[:3], lengths, selection, bias)
    assert relative_error(out, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("window", [None, 512])
def test_offsets_past_2_31_elements(window):
    lengths = [100] * 69 + [131_000]
    k = torch.zeros(70, 131_072, 2, 128, dtype=BF16, device="cuda")
    k[-1].normal_()
    v = k.flip(1)
    lengths = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    q = random(70, 1, 32, 128, dtype=BF16)
    out = kernels.cached_attention(q, k, v, lengths, window_size=window)
    expected = reference.cached_attention(
        q[-1:].float(), k[-1:].float(), v[-1:].float(), lengths[-1:], window_size=window
    )
    assert relative_error(out[-1:], expected) < TOLERANCE[BF16]


@pytest.mark.parametrize("num_chunks", [1, 5, 32, 33, 64, 200])
@pytest.mark.parametrize("alpha", [None, 1.3])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.timeout(120, method="thread")
def test_thresholds_of_many_rows(num_chunks, alpha, fused, monkeypatch):
    """So many that, with few chunks, threads which do not agree that a row is solved would wait for others for ever.

    Where the compiler fuses multiply-adds, their sums do differ.
    """
    if fused:
        kernel = triton_routing.threshold_kernel
        grid = (3000 * 6,)

        def fuse(*args, **options):
            kernel[grid](*args, **options | {"enable_fp_fusion": True})

        monkeypatch.setattr(triton_routing, "threshold_kernel", {grid: fuse})
    heads = 6
    alpha = None if alpha is None else torch.full((heads,), alpha, device="cuda")
    lengths = torch.randint(16 * num_chunks, (3000,), dtype=torch.int32, device="cuda")
    q, summaries = random(3000, 1, heads, 64, dtype=BF16), random(3000, num_chunks, 2, 64, dtype=BF16)
    words, bias = kernels.route(q, summaries, lengths, alpha, 16, 1.0, True, None)
    past = (torch.arange(num_chunks, device="cuda") < (lengths // 16)[:, None])[:, None, None]
    support = Selection(words, 16).mask()[..., :num_chunks].unflatten(2, (2, 3)).any(3) & past
    total = torch.where(support, bias.exp(), 0.0).sum(-1)
    torch.testing.assert_close(total, past.any(-1).float().expand_as(total), rtol=0, atol=1e-4)


RAGGED = dict(hidden_size=384, num_layers=6, num_heads=6, head_dim=64, max_seq_len=1024)


@pytest.mark.parametrize(
    "attention",
    [
        FullConfig(),
        DashConfig(chunk_size=16, router_scale=4.0, prior="raw"),
        DashConfig(chunk_size=16, router_scale=4.0, prior="raw", init_chunks=1, local_chunks=2),
        DashConfig(chunk_size=16, router_scale=4.0),
        DashConfig(chunk_size=16, selector="topk", topk=6, prior="raw", init_chunks=1),
        DashConfig(chunk_size=16, selector="topp", top_p=0.6),
        InfLLMv2Config(block_size=16, kernel_size=8, kernel_stride=4, topk=8, window_size=16),
        NSAConfig(block_size=16, kernel_size=8, kernel_stride=4, topk=8, window_size=32),
    ],
    ids=["full", "dash raw", "dash sink", "dash", "dash topk", "dash topp", "infllmv2", "nsa"],
)
@pytest.mark.parametrize("longest", [100, 400, 900])
def test_many_prompts_of_all_lengths(attention, longest):
    """Every token is the likeliest of one forward over prompt and continuation; but for the few whose selection, of
    scores that nearly equal each other, is another."""
    model = build(attention, **RAGGED).cuda()
    prompts = [tokens(1, 1 + longest * row // 33, seed=row)[0].tolist() for row in range(33)]
    continuations = generate(model, prompts, max_new_tokens=100)
    unlikely = []
    for prompt, continuation in zip(prompts, continuations, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + continuation], device="cuda")).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(continuation, device="cuda")[:, None])[:, 0]
        unlikely += (logits.amax(1) - chosen > 1e-3 * logits.std()).tolist()
    assert sum(unlikely) <= 0.005 * len(unlikely)


@pytest.mark.parametrize(
    "attention",
    [
        FullConfig(),
        DashConfig(chunk_size=16, router_scale=20.0),
        DashConfig(chunk_size=16, router_scale=20.0, init_chunks=1),
        DashConfig(chunk_size=16, router_scale=20.0, summary_keys="unrotated"),
        DashConfig(chunk_size=16, prior="raw", alpha_mode="learnable", summary_rope="mean"),
        DashConfig(chunk_size=16, prior_heads="head"),
        InfLLMv2Config(**SIZES, window_size=16),
        NSAConfig(**SIZES, window_size=20),
        NSAConfig(**SIZES, window_size=20, shared_kv=False),
        NSAConfig(**SIZES, window_size=0, variant="minicpm"),
    ],
    ids=[
        "full",
        "dash",
        "dash sink",
        "dash unrotated",
        "dash rope",
        "dash head",
        "infllmv2",
        "nsa",
        "nsa own kv",
        "nsa minicpm",
    ],
)
def test_generation_in_a_cuda_graph_equals_generation_without_a_cache(attention):
    model = build(attention).cuda()
    expected = [greedy_without_cache(model, prompt, 40) for prompt in PROMPTS]
    assert generate(model, PROMPTS, max_new_tokens=40) == expected


@pytest.mark.parametrize(
    "attention", [FullConfig(), DashConfig(chunk_size=16, summary_rope="mean")], ids=["full", "dash"]
)
def test_longrope_turns_each_row_by_its_own_length_in_a_cuda_graph(attention):
    factors = {"short_factor": [1.0] * 16, "long_factor": [4.0] * 16, "original_max_seq_len": 24, "factor": 4.0}
    model = build(attention, rope=RopeConfig(scaling="longrope", **factors)).cuda()
    expected = [greedy_without_cache(model, prompt, 40) for prompt in PROMPTS]
    assert generate(model, PROMPTS, max_new_tokens=40) == expected
    assert generate(model, PROMPTS[:1], max_new_tokens=5) == [expected[0][:5]]


@pytest.mark.parametrize("pooling", ["max", "weighted"])
@pytest.mark.parametrize("topk", [18, 64, 4000])
def test_selection_from_compressed_keys_of_long_sequences(pooling, topk):
    windows = 131_072 // 16
    compressed_k, compressed_v = (random(2, windows, 2, 128, dtype=BF16) for _ in range(2))
    lengths = torch.tensor([130_990, 20_000], dtype=torch.int32, device="cuda")
    q = random(2, 1, 32, 128, dtype=BF16)
    options = dict(block_size=64, kernel_size=32, kernel_stride=16, pooling=pooling, topk=topk)
    options |= dict(init_blocks=1, local_blocks=17)
    out, selection = kernels.cached_window_routing(q, compressed_k, compressed_v, lengths, **options)
    wide = [x.float() for x in (q, compressed_k, compressed_v)]
    expected_out, expected = reference.cached_window_routing(*wide, lengths, **options)
    assert relative_error(out, expected_out) < TOLERANCE[BF16]
    # Of nearly equal scores at the bound either may be taken.
    assert (selection.mask() != expected.mask()).sum() <= 2 * 4
    assert torch.equal(selection.mask().sum(-1), expected.mask().sum(-1))


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize(("columns", "outputs"), [(576, 1536), (2048, 6144), (6144, 2048), (14336, 4096)])
def test_products_of_a_token_at_real_sizes(columns, outputs, dtype):
    """In a CUDA graph as decoding has them, each behind the other."""
    x, onto = random(1, 1, columns, dtype=dtype), random(1, 1, outputs, dtype=dtype)
    norm = random(columns, dtype=dtype) + 1, 1e-5
    q, k, v, gate, up = (
        random(rows, columns, dtype=dtype) / columns**0.5 for rows in (1024, 256, 256, outputs, outputs)
    )
    rope = (random(1, 1, 64, dtype=FP32), random(1, 1, 64, dtype=FP32))

    def run(products, x, q, k, v, gate, up, onto, norm):
        heads = products.heads(x, [q, k, v], 64, norm, rope)
        return *heads, products.swiglu(x, gate, up, norm), products.product(x, gate, None, onto, 0.5)

    tensors = x, q, k, v, gate, up, onto
    run(products, *tensors, norm)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(products, *tensors, norm)
    graph.replay()
    expected = run(plain_products, *(tensor.double() for tensor in tensors), (norm[0].double(), norm[1]))
    for ours, wanted in zip(found, expected, strict=True):
        assert relative_error(ours, wanted) < TOLERANCE[dtype]
