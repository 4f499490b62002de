"""Decoding against a cache: the same outputs as one prefill, whatever was done to the cache in between."""

import random

import pytest
import torch
from test_backends import CONFIGS, SHAPE, build

from dashattn.backends import AttentionShape, DashConfig, build_backend

CAPACITY = 45
each_config = pytest.mark.parametrize(
    "config",
    [*CONFIGS.values(), DashConfig(chunk_size=8, router_scale=2.0, prior="raw", prior_heads="head")],
    ids=[*CONFIGS, "dash head"],
)


class Sequences:
    """Random tokens, kept as one list of inputs per sequence; each token is seen by the cache and by ``forward``."""

    def __init__(self, config, batch, dtype=torch.float64, seed=0):
        torch.manual_seed(seed)
        self.backend = build(config).to(dtype)
        self.cache = self.backend.new_cache(batch, CAPACITY, dtype=dtype, device="cpu")
        self.dtype = dtype
        self.rows = [[] for _ in range(batch)]

    def step(self, counts):
        """Decodes counts[b] new tokens of every row b, padded to the largest, and returns each row's outputs."""
        tokens = [[self.make_token() for _ in range(max(counts))] for _ in counts]
        lengths = torch.tensor(self.cache.host_lengths)[:, None]
        q, k, v, hidden = (torch.stack([torch.stack(x) for x in part]) for part in self.parts(tokens))
        rope = rope_tables(lengths + torch.arange(max(counts)), self.dtype)
        out = self.backend.decode(q, k, v, self.cache.layers[0], hidden=hidden, rope=rope)
        self.cache.advance(counts)
        for row, new, count in zip(self.rows, tokens, counts, strict=True):
            row += new[:count]
        return [out[b, :count] for b, count in enumerate(counts)]

    def make_token(self):
        heads = (SHAPE.num_heads, SHAPE.num_kv_heads, SHAPE.num_kv_heads)
        qkv = [torch.randn(h, SHAPE.head_dim, dtype=self.dtype) for h in heads]
        return *qkv, torch.randn(SHAPE.hidden_size, dtype=self.dtype)

    def parts(self, rows):
        return [[[token[part] for token in row] for row in rows] for part in range(4)]

    def prefill(self, row):
        q, k, v, hidden = (torch.stack(part[0])[None] for part in self.parts([self.rows[row]]))
        rope = rope_tables(torch.arange(q.shape[1]), self.dtype)
        return self.backend(q, k, v, hidden=hidden, rope=rope)[0]

    def check(self, outs, tolerance=1e-11):
        """The last outputs of every row against one prefill of all that the row holds."""
        for row, out in enumerate(outs):
            if len(out):
                expected = self.prefill(row)[-len(out) :]
                torch.testing.assert_close(out, expected, rtol=0, atol=tolerance)


def rope_tables(positions, dtype):
    angles = (positions[..., None] / torch.tensor([1.0, 3.0, 10.0, 30.0])).repeat_interleave(2, -1).to(dtype)
    angles = torch.cat([angles[..., ::2], angles[..., ::2]], -1)
    return angles.cos(), angles.sin()


@each_config
def test_token_by_token_equals_one_prefill(config):
    sequences = Sequences(config, batch=2)
    outs = [sequences.step([1, 1]) for _ in range(CAPACITY)]
    for row in range(2):
        together = torch.cat([out[row] for out in outs])
        torch.testing.assert_close(together, sequences.prefill(row), rtol=0, atol=1e-11)


@each_config
def test_prompts_of_a_batch_equal_those_packed_as_documents(config):
    sequences = Sequences(config, batch=3)
    outs = [sequences.step([13, 20, 3]), *(sequences.step([1, 1, 1]) for _ in range(5))]
    rows = [torch.cat([out[row] for out in outs]) for row in range(3)]
    together = [[token for row in sequences.rows for token in row]]
    q, k, v, hidden = (torch.stack(part[0])[None] for part in sequences.parts(together))
    ends = torch.tensor([0, *map(len, sequences.rows)]).cumsum(0, dtype=torch.int32)
    rope = rope_tables(torch.cat([torch.arange(len(row)) for row in rows]), sequences.dtype)
    packed = sequences.backend(q, k, v, hidden=hidden, rope=rope, cu_seqlens=ends)
    torch.testing.assert_close(torch.cat(rows)[None], packed, rtol=0, atol=1e-11)


@each_config
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(3, 3), (7, 1), (16, 2)])
def test_groups_of_other_sizes(config, num_heads, num_kv_heads):
    """Documents that are packed, alone, and decoded; the other tests have groups of three."""
    shape = AttentionShape(SHAPE.hidden_size, num_heads, num_kv_heads, SHAPE.head_dim)
    backend, length, ends = build(config, shape), 43, [0, 12, 43]
    q, k, v = (torch.randn(1, length, heads, 8, dtype=torch.float64) for heads in (num_heads, *[num_kv_heads] * 2))
    hidden = torch.randn(1, length, SHAPE.hidden_size, dtype=torch.float64)
    position = torch.cat([torch.arange(12), torch.arange(31)])
    rope, cu_seqlens = rope_tables(position, torch.float64), torch.tensor(ends, dtype=torch.int32)
    packed = backend(q, k, v, hidden=hidden, rope=rope, cu_seqlens=cu_seqlens)
    document = slice(12, length)
    inputs = [x[:, document] for x in (q, k, v)]
    options = {"hidden": hidden[:, document], "rope": tuple(table[document] for table in rope)}
    alone, stats = backend(*inputs, **options, return_stats=True)
    torch.testing.assert_close(packed[:, document], alone, rtol=0, atol=1e-12)
    assert stats.active_tokens.shape == (1, 31, num_kv_heads)
    cache, outs = backend.new_cache(1, 31, dtype=torch.float64, device="cpu"), []
    for begin, end in ((0, 17), (17, 18), (18, 27), (27, 31)):
        part = slice(begin, end)
        given = {"hidden": options["hidden"][:, part], "rope": tuple(table[part][None] for table in options["rope"])}
        outs.append(backend.decode(*(x[:, part] for x in inputs), cache.layers[0], **given))
        cache.advance(end - begin)
    torch.testing.assert_close(torch.cat(outs, dim=1), alone, rtol=0, atol=1e-11)


@each_config
def test_ragged_batch_in_pieces(config, monkeypatch):
    """More new tokens than a tile of queries has."""
    monkeypatch.setattr("dashattn.ops.block_sparse.reference.QUERY_TILE", 8)
    sequences = Sequences(config, batch=3)
    for counts in ([5, 17, 1], [1, 1, 1], [9, 0, 3], [1, 1, 1], [0, 20, 11]):
        sequences.check(sequences.step(counts))


def random_operation(sequences, generator):
    """One of the cache's operations, on the cache and on the lists; returns what a step put out."""
    cache, batch = sequences.cache, len(sequences.rows)
    kind = generator.choice(["one", "one", "several", "several", "truncate", "reorder", "reset", "select"])
    room = CAPACITY - max(cache.host_lengths)
    if kind == "one" and room:
        return sequences.step([1] * batch)
    if kind == "several" and room:
        return sequences.step([generator.randint(0, min(room, 19)) for _ in range(batch - 1)] + [min(room, 19)])
    if kind == "truncate":
        lengths = [generator.randint(0, length) for length in cache.host_lengths]
        cache.truncate(lengths)
        sequences.rows = [row[:length] for row, length in zip(sequences.rows, lengths, strict=True)]
    if kind in ("reorder", "select"):
        rows = [generator.randrange(batch) for _ in range(batch if kind == "reorder" else generator.randint(1, 4))]
        if kind == "reorder":
            cache.reorder(rows)
        else:
            sequences.cache = cache.select(rows)
        sequences.rows = [list(sequences.rows[row]) for row in rows]
    if kind == "reset":
        row = generator.randrange(batch)
        cache.reset([row])
        sequences.rows[row] = []
    return []


def soak(config, steps, dtype=torch.float64):
    sequences, generator = Sequences(config, batch=3, dtype=dtype), random.Random(0)
    checked = 0
    for _ in range(steps):
        outs = random_operation(sequences, generator)
        sequences.check(outs)
        checked += sum(map(len, outs))
        assert sequences.cache.host_lengths == sequences.cache.lengths.tolist() == list(map(len, sequences.rows))
    return checked


@each_config
def test_random_operations_on_the_cache(config):
    assert soak(config, 60) > 100


@pytest.mark.slow
@pytest.mark.timeout(3600)
@each_config
def test_a_long_soak_of_random_operations(config):
    steps = 50_000 // len(CONFIGS)
    assert soak(config, steps) > steps


@each_config
def test_what_lies_past_the_lengths_is_never_read(config):
    outs = []
    for garbage in (False, True):
        sequences = Sequences(config, batch=2)
        sequences.step([19, 11])
        sequences.cache.truncate([13, 0])
        if garbage:
            for name, tensor in sequences.cache.layers[0].tensors.items():
                per_row = sequences.backend.cache_layout().fields[name].tokens_per_row
                for row, length in enumerate(sequences.cache.host_lengths):
                    tensor[row, -(-length // per_row) :] = torch.nan
        torch.manual_seed(1)
        outs.append([sequences.step(counts) for counts in ([1, 1], [7, 2], [1, 1])])
    for out, expected in zip(outs[1], outs[0], strict=True):
        torch.testing.assert_close(out, expected, rtol=0, atol=0)


def test_sequences_that_share_a_prefix_grow_apart():
    sequences = Sequences(CONFIGS["dash"], batch=1)
    sequences.step([21])
    prefix = sequences.cache
    sequences.cache, sequences.rows = prefix.select([0, 0, 0]), [list(sequences.rows[0]) for _ in range(3)]
    for _ in range(9):
        sequences.check(sequences.step([1, 1, 1]))
    assert prefix.host_lengths == [21]
    assert prefix.lengths.tolist() == [21]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lower_precisions(dtype):
    sequences = Sequences(CONFIGS["infllmv2"], batch=2, dtype=dtype)
    outs = [sequences.step([1, 1]) for _ in range(30)]
    assert outs[0][0].dtype == dtype
    together = torch.cat([out[0] for out in outs])
    torch.testing.assert_close(together, sequences.prefill(0), rtol=0, atol=1e-2 if dtype == torch.bfloat16 else 1e-5)


def filled(lengths):
    sequences = Sequences(CONFIGS["dash rope"], batch=len(lengths))
    sequences.step(lengths)
    return sequences


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda s: s.step([1, 5]), "larger capacity"),
        (lambda s: s.cache.advance(5), "capacity of 45"),
        (lambda s: s.cache.advance([-1, 0]), "must not be negative"),
        (lambda s: s.cache.advance([1]), "one entry per sequence"),
        (lambda s: s.cache.truncate([4, 4]), "truncate shortens"),
        (lambda s: s.cache.truncate([4]), "one entry per sequence"),
        (lambda s: s.cache.reorder([0, 2]), "from 0 to 1"),
        (lambda s: s.cache.reset([2]), "from 0 to 1"),
        (lambda s: s.cache.reorder([0, -1]), "from 0 to 1"),
        (lambda s: s.cache.reset([-1]), "from 0 to 1"),
        (lambda s: s.cache.select([-1]), "from 0 to 1"),
        (lambda s: s.cache.select([]), "at least one"),
        (lambda s: decode(s, batch=3), r"k must have shape \(2, 1, 2, 8\)"),
        (lambda s: decode(s, dtype=torch.float32), "cast them to one dtype"),
        (lambda s: decode(s), "pass rope"),
        (lambda s: s.backend.new_cache(1, 0, dtype=torch.float32, device="cpu"), "capacity must be a positive"),
    ],
)
def test_refusals_leave_the_cache_as_it_is(act, message):
    sequences = filled([3, 41])
    before = {name: tensor.clone() for name, tensor in sequences.cache.layers[0].tensors.items()}
    with pytest.raises(ValueError, match=message):
        act(sequences)
    assert sequences.cache.host_lengths == sequences.cache.lengths.tolist() == [3, 41]
    assert all(torch.equal(tensor, before[name]) for name, tensor in sequences.cache.layers[0].tensors.items())


def decode(sequences, batch=2, dtype=torch.float64):
    q, k, v = (torch.randn(batch, 1, heads, SHAPE.head_dim, dtype=dtype) for heads in (6, 2, 2))
    return sequences.backend.decode(q, k, v, sequences.cache.layers[0])


def test_a_capacity_need_not_be_a_multiple_of_the_blocks():
    backend = build_backend(CONFIGS["dash"], SHAPE)
    cache = backend.new_cache(1, 9, dtype=torch.float32, device="cpu")
    assert cache.layers[0]["k"].shape[1] == 16
    assert cache.layers[0]["summaries"].shape[1] == 2
    kept = [cache.lengths, *cache.layers[0].tensors.values()]
    addresses = [x.data_ptr() for x in kept]
    for act in (cache.advance, lambda: cache.advance([7]), lambda: cache.truncate([2]), lambda: cache.reorder([0])):
        act()
    cache.reset()
    now = [cache.lengths, *cache.layers[0].tensors.values()]
    assert [x.data_ptr() for x in now] == addresses, "where a CUDA graph finds them"
    cache.check_room(9)
    with pytest.raises(ValueError, match="holds 9"):
        cache.check_room(10)


@pytest.mark.parametrize(("dtype", "tables"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_tables_alone_are_kept_in_float32_at_least(dtype, tables):
    """Those of rotation, of what is cached."""
    for name, config in CONFIGS.items():
        cache = build_backend(config, SHAPE).new_cache(2, 9, dtype=dtype, device="cpu").layers[0]
        kinds = {key: x.dtype for key, x in cache.tensors.items()}
        assert kinds == {key: tables if key in ("cos", "sin") else dtype for key in kinds}, name


def test_a_cache_has_a_row_for_what_is_kept_of_each_token_or_block_or_window():
    """And none more, which nobody would read."""
    rows = {"summaries": 8, "index_means": 8, "compressed_k": 32, "compressed_v": 32}
    for name, config in CONFIGS.items():
        cache = build_backend(config, SHAPE).new_cache(2, 64, dtype=torch.bfloat16, device="cpu").layers[0]
        for key, tensor in cache.tensors.items():
            assert tensor.shape[1] == rows.get(key, 64), (name, key)
