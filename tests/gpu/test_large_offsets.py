"""The last head and the last sequence among others against the same alone, where offsets pass 2**31.

Every size says which product it is of that passes. The tests take up to 110 GB, one at a time.
"""

import pytest
import torch

pytest.importorskip("triton")

from dashattn import dash_attention, nsa_attention
from dashattn.ops.block_scores.triton import select_blocks
from dashattn.ops.block_sparse.triton import block_sparse_attention
from dashattn.ops.compression.reference import mean_compress
from dashattn.ops.dash_routing.triton import dash_routing
from dashattn.ops.decode import triton as decode
from dashattn.ops.true_mass.triton import block_masses
from dashattn.selection import Selection

LIMIT = 2**31
NEEDED = 120e9  # bytes
# Sums over tokens are split otherwise for fewer heads or tokens; a wrong offset gives 4e-2 and more.
GRAD_TOLERANCE = 2e-3
WINDOWS = {"kernel_size": 32, "kernel_stride": 16}


@pytest.fixture(autouse=True)
def _large_device():
    total = torch.cuda.get_device_properties(0).total_memory
    if total < NEEDED:
        pytest.skip(f"needs a GPU of {NEEDED / 1e9:.0f} GB, this one has {total / 1e9:.0f}")
    yield
    torch.cuda.empty_cache()


def gaussian(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, device="cuda", dtype=dtype)


def inputs_for(batch, length, heads, kv_heads, dim):
    """q, k, v and the gradient of the output."""
    q, k, v, grad = (gaussian(batch, length, h, dim) for h in (heads, kv_heads, kv_heads, heads))
    return [q, k, v], grad


def last(x, part, kv_heads):
    """The last ``head`` (with its group's query heads) or ``sequence`` of [B, T, H or Hq, ...]."""
    return x[-1:] if part == "sequence" else x[:, :, -(x.shape[2] // kv_heads) :]


def compare(attend, tensors, grad, part, chunk_query=None):
    """``attend`` of all ``tensors``, q, k and what else is [B, T, H or Hq, ...], then of the last alone.

    ``chunk_query``: [H, D], an argument behind them.
    """
    kv_heads = tensors[1].shape[2]
    *among, of_query = [*run(attend, tensors, grad, chunk_query), None][: len(tensors) + 2]
    among = [last(x, part, kv_heads).clone() for x in among]
    if chunk_query is not None and part == "head":  # else its gradient is a sum over all sequences
        chunk_query = chunk_query[-1:]
        among.append(of_query[-1:])
    tensors, grad = ([last(x, part, kv_heads).contiguous() for x in group] for group in (tensors, [grad]))
    torch.cuda.empty_cache()
    alone = run(attend, tensors, *grad, chunk_query)
    assert torch.equal(among[0], alone[0])
    for number, (x, expected) in enumerate(zip(among[1:], alone[1:], strict=False)):
        error = ((x.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-20)).item()
        assert error < GRAD_TOLERANCE, f"gradient of argument {number} off by {error:.2g}"


def run(attend, tensors, grad, chunk_query):
    inputs = [x.detach().requires_grad_() for x in tensors]
    if chunk_query is not None:
        inputs.append(chunk_query.detach().requires_grad_())
    out = attend(*inputs)
    grads = torch.autograd.grad(out, inputs, grad, materialize_grads=True)
    return [out.detach(), *grads]


@pytest.mark.parametrize(
    ("group", "kv_heads", "prior", "selector"),
    [
        (1, 8, "raw", "entmax"),  # key lists and biases, 7 heads of 2**29 and 2**30
        (32, 5, "raw", "entmax"),  # lists of the query tiles, Hopper's too, and entries of q
        (32, 5, "raw", "topk"),  # the same in the kernels of a softmax: MoBA's, and those of the indexer of means
    ],
)
def test_dash_attention_of_the_last_head(group, kv_heads, prior, selector):
    length, chunk, dim = 262_144, 64, 64
    assert (kv_heads - 1) * length**2 // (2 * chunk) >= LIMIT
    assert group == 1 or length * group * kv_heads * dim >= LIMIT
    tensors, grad = inputs_for(1, length, group * kv_heads, kv_heads, dim)
    check_dash_attention(tensors, grad, "head", chunk, prior, selector)


@pytest.mark.parametrize(
    ("group", "kv_heads", "chunk", "prior"),
    [
        (1, 16, 128, "tempered"),  # entries of q, k and v
        (16, 1, 64, "raw"),  # entries of q, on Hopper's own kernel
    ],
)
def test_dash_attention_of_the_last_sequence(group, kv_heads, chunk, prior):
    batch, length, dim = 132, 16_384, 64
    assert (batch - 1) * length * group * kv_heads * dim >= LIMIT
    tensors, grad = inputs_for(batch, length, group * kv_heads, kv_heads, dim)
    check_dash_attention(tensors, grad, "sequence", chunk, prior)


def check_dash_attention(tensors, grad, part, chunk, prior, selector="entmax"):
    chunk_query = 0.2 * gaussian(*tensors[1].shape[2:], dtype=torch.float32)

    def attend(q, k, v, r):
        options = dict(chunk_size=chunk, selector=selector, topk=24, router_scale=30.0, prior=prior)
        return dash_attention(q, k, v, r, **options, impl="triton")

    compare(attend, tensors, grad, part, chunk_query)


def test_selections_of_the_last_head():
    """Words, of which the last head's begin past 2**31, by all routers, forward alone."""
    length, block, kv_heads, dim = 524_288, 16, 5, 32
    assert (kv_heads - 1) * length * length // block // 32 >= LIMIT
    q, k, pairs = (gaussian(1, length, heads, dim) for heads in (kv_heads, kv_heads, 2 * kv_heads))
    compressed = mean_compress(k, kernel_size=16, kernel_stride=16)

    def dash(q, summaries):
        return dash_routing(q, summaries, chunk_size=block, router_scale=30.0, prior="none")[0].words

    def topk(q, compressed):
        sizes = dict(kernel_size=16, kernel_stride=16, block_size=block, topk=20, init_blocks=1, local_blocks=2)
        return select_blocks(q, compressed, None, **sizes, pooling="max", scale=dim**-0.5, cu_seqlens=None).words

    def sharp(q, summaries):
        """Of groups, whose probabilities are 0 in float32: by both passes of the selection."""
        options = dict(chunk_size=block, selector="topk", topk=20, router_scale=1000.0, prior="none")
        return dash_routing(q, summaries, **options)[0].words

    for route, queries in ((dash, q), (topk, q), (sharp, pairs)):
        among = route(queries, compressed)[:, -1].clone()
        torch.cuda.empty_cache()
        alone = route(last(queries, "head", kv_heads).contiguous(), compressed[:, :, -1:].contiguous())[:, 0]
        assert alone.any()
        assert torch.equal(among, alone)


def test_masses_of_the_last_head():
    """Lists of the query tiles, entries of q and of the masses, in the kernel of dq by query."""
    length, block, group, kv_heads, dim = 262_144, 64, 32, 5, 64
    blocks = length // block
    assert min(length * group * kv_heads * dim, (kv_heads - 1) * length * blocks) >= LIMIT
    (q, k, _), _ = inputs_for(1, length, group * kv_heads, kv_heads, dim)
    words = torch.zeros(1, kv_heads, length, blocks // 32, dtype=torch.int32, device="cuda")
    token = torch.arange(length, device="cuda")
    own = token // block
    for chosen in (own * 0, own // 2, own):
        words[:, :, token, chosen // 32] |= (1 << chosen % 32).int()
    lse = torch.full(q.shape[:3], 6.0, device="cuda")
    among = block_masses(q, k, Selection(words, block), lse)[:, :, -1].clone()
    torch.cuda.empty_cache()
    q, lse = (last(x, "head", kv_heads).contiguous() for x in (q, lse))
    alone = block_masses(q, k[:, :, -1:].contiguous(), Selection(words[:, -1:].contiguous(), block), lse)[:, :, 0]
    assert (alone > 0).sum(-1).min() >= 1
    assert torch.equal(among, alone)


@pytest.mark.parametrize(
    ("batch", "length", "group", "kv_heads", "part"),
    [
        (1, 262_144, 1, 8, "head"),  # key lists
        (132, 16_384, 1, 16, "sequence"),  # entries of q, k and v
    ],
)
def test_infllmv2_attention(batch, length, group, kv_heads, part):
    """Its kernels, for the same mean-pooled keys: PyTorch adds up otherwise for another number of heads."""
    tensors, grad = inputs_for(batch, length, group * kv_heads, kv_heads, 64)
    tensors.append(mean_compress(tensors[1], **WINDOWS))
    blocks = dict(block_size=64, topk=24, init_blocks=1, local_blocks=17, pooling="max")

    def attend(q, k, v, compressed_k):
        selection = select_blocks(q, compressed_k, **WINDOWS, **blocks, scale=0.125, cu_seqlens=None)
        return block_sparse_attention(q, k, v, selection)

    compare(attend, tensors, grad, part)


@pytest.mark.parametrize(
    ("batch", "length", "group", "kv_heads", "part"),
    [
        (1, 262_144, 1, 8, "head"),  # key lists
        (132, 16_384, 8, 2, "sequence"),  # entries of q and of the branches
    ],
)
def test_nsa_attention(batch, length, group, kv_heads, part):
    tensors, grad = inputs_for(batch, length, group * kv_heads, kv_heads, 64)
    assert part == "head" or (batch - 1) * length * group * kv_heads * 64 >= LIMIT
    tensors += [mean_compress(x, **WINDOWS) for x in tensors[1:]]
    tensors.append(torch.rand(*grad.shape[:3], 3, device="cuda").bfloat16())

    def attend(*tensors):
        return nsa_attention(*tensors, impl="triton")

    compare(attend, tensors, grad, part)


@pytest.mark.parametrize(
    ("batch", "length", "group", "kv_heads", "part"),
    [
        (1, 262_144, 8, 33, "head"),  # lists of the query tiles, of 16 tokens and all blocks
        (132, 16_384, 8, 2, "sequence"),  # entries of q and of the branches' sum
    ],
)
def test_nsa_attention_without_gradients(batch, length, group, kv_heads, part):
    """One operator, whose branches add to one output."""
    (q, k, v), _ = inputs_for(batch, length, group * kv_heads, kv_heads, 64)
    assert ((kv_heads - 1) * length**2 // (16 * 64) if part == "head" else (batch - 1) * q[0].numel()) >= LIMIT
    tensors = [q, k, v, *(mean_compress(x, **WINDOWS) for x in (k, v))]
    tensors.append(torch.rand(*q.shape[:3], 3, device="cuda").bfloat16())
    with torch.no_grad():
        among = last(nsa_attention(*tensors, impl="triton"), part, kv_heads).clone()
        tensors = [last(x, part, kv_heads).contiguous() for x in tensors]
        torch.cuda.empty_cache()
        alone = nsa_attention(*tensors, impl="triton")
    assert torch.equal(among, alone)


def test_decoding_of_the_last_sequence_and_head():
    """Entries of the caches: a token is written, its chunk summarised, both are read."""
    batch, kv_heads, group, capacity, dim, chunk = 40, 8, 4, 65_536, 128, 64
    assert (batch - 1) * kv_heads * capacity * dim >= LIMIT
    tokens, heads = capacity - chunk - 1, group * kv_heads
    q, new_k, new_v = (gaussian(batch, 1, h, dim) for h in (heads, kv_heads, kv_heads))
    k, v = (gaussian(batch, kv_heads, capacity, dim).transpose(1, 2) for _ in range(2))
    chunks = capacity // chunk
    summaries = gaussian(batch, kv_heads, chunks, dim).transpose(1, 2)
    for row in range(batch):
        summaries[row] = k[row].unflatten(0, (chunks, chunk)).float().mean(1)
    chunk_query = torch.zeros(kv_heads, dim, device="cuda")
    lengths = torch.full((batch,), tokens, dtype=torch.int32, device="cuda")
    options = dict(chunk_size=chunk, alpha=1.5, router_scale=10.0, prior="raw", sigma=1.0)

    def step(rows, heads_from):
        """Of a part of the sequences and KV heads, in copies of the caches where it is not all of them."""
        query = q[rows, :, heads_from * group :].contiguous()
        part = [x[rows, :, heads_from:] for x in (k, v, summaries, new_k, new_v)]
        if heads_from or rows.start:
            part = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in part]
        ks, vs, pooled, token_k, token_v = part
        new = decode.NewToken(token_k, token_v, ks, vs, chunk_query[heads_from:])
        out = decode.routed_attention(query, ks, vs, pooled, lengths[rows], **options, new=new)
        dense = decode.cached_attention(query, ks, vs, lengths[rows])
        written = [x[-1, tokens, -1] for x in (ks, vs)] + [pooled[-1, tokens // chunk, -1]]
        return [x[-1, :, -group:] for x in (out, dense)] + [x.clone() for x in written]

    alone = step(slice(batch - 1, batch), kv_heads - 1)
    among = step(slice(0, batch), 0)
    for x, expected in zip(among, alone, strict=True):
        # programs share the blocks of one sequence otherwise than those of many
        torch.testing.assert_close(x.float(), expected.float(), atol=2e-3, rtol=2e-2)
    torch.testing.assert_close(among[2], new_k[-1, 0, -1])
    torch.testing.assert_close(among[3], new_v[-1, 0, -1])


def test_decode_routing_of_the_last_sequence():
    """Products of many new tokens with many chunks."""
    batch, num_tokens, heads, capacity, dim, chunk = 72, 256, 32, 262_144, 16, 64
    assert (batch - 1) * num_tokens * heads * (capacity // chunk) >= LIMIT
    q = gaussian(batch, num_tokens, heads, dim)
    k, v = (gaussian(batch, 1, capacity, dim).transpose(1, 2) for _ in range(2))
    summaries = gaussian(batch, 1, capacity // chunk, dim).transpose(1, 2)
    lengths = torch.full((batch,), capacity - num_tokens, dtype=torch.int32, device="cuda")
    options = dict(chunk_size=chunk, alpha=1.5, router_scale=30.0, prior="raw", sigma=1.0)
    among = decode.routed_attention(q, k, v, summaries, lengths, **options)[-1:].clone()
    torch.cuda.empty_cache()
    parts = (x[-1:].contiguous() for x in (q, k, v, summaries))
    alone = decode.routed_attention(*parts, lengths[-1:], **options)
    torch.testing.assert_close(among.float(), alone.float(), atol=2e-3, rtol=2e-2)


def test_topk_decoding_of_the_last_sequence():
    """Products of many new tokens with many windows."""
    batch, num_tokens, heads, capacity, dim = 20, 256, 32, 262_144, 16
    assert (batch - 1) * num_tokens * heads * (capacity // 16) >= LIMIT
    q = gaussian(batch, num_tokens, heads, dim)
    compressed = gaussian(batch, 1, capacity // 16, dim).transpose(1, 2)
    lengths = torch.full((batch,), capacity - num_tokens, dtype=torch.int32, device="cuda")
    options = dict(**WINDOWS, block_size=64, pooling="max", topk=32, init_blocks=1, local_blocks=2)
    _, among = decode.cached_window_routing(q, compressed, None, lengths, **options)
    last_words = among.words[-1:].clone()
    _, alone = decode.cached_window_routing(q[-1:], compressed[-1:], None, lengths[-1:], **options)
    assert torch.equal(last_words, alone.words)
