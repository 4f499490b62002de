"""FLOPs and parameters against counts by hand and against torch's own counter."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dashattn.backends import DashConfig, FullConfig, IndexerConfig, InfLLMv2Config, NSAConfig
from models import ModelConfig, Transformer
from models.flops import count_parameters, flops_per_token, layer_reads, matmul_parameters

# Small numbers, so that every count can be checked by eye; backends take no head size below 32.
CONFIG = ModelConfig(
    vocab_size=10,
    hidden_size=8,
    intermediate_size=12,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    max_seq_len=64,
)
Q_AND_O, K_AND_V, MLP, TABLE = 2 * 8 * 128, 2 * 8 * 64, 3 * 8 * 12, 10 * 8


def test_parameters_by_hand():
    layer = Q_AND_O + K_AND_V + MLP
    norms = 3 * 2 * 8 + 8
    assert count_parameters(Transformer(CONFIG, FullConfig())) == 3 * layer + norms + 2 * TABLE
    tied = Transformer(replace(CONFIG, tie_embeddings=True), FullConfig())
    assert count_parameters(tied) == 3 * layer + norms + TABLE
    assert matmul_parameters(CONFIG) == matmul_parameters(replace(CONFIG, tie_embeddings=True)) == 3 * layer + TABLE


def test_dense_flops_by_hand():
    flops = flops_per_token(Transformer(CONFIG, FullConfig()), seq_len=4)
    assert flops.matmul == 2 * (3 * (Q_AND_O + K_AND_V + MLP) + TABLE)
    # 3 layers, 4 query heads; tokens read 1, 2, 3 and 4 keys; 32 multiply-adds for q.k and 32 for the value.
    assert flops.attention == 3 * 4 * (1 + 2 + 3 + 4) / 4 * (2 * 32 + 2 * 32)
    assert flops.routing == 0
    assert flops.forward == flops.matmul + flops.attention
    assert flops.train == 3 * flops.forward


HEADS, READS = 3 * 4 * 32, {"active_tokens": 20.0, "routing_reads": 3.0}  # channels of all layers' query heads


def test_dash_flops_by_hand():
    flops = flops_per_token(Transformer(CONFIG, DashConfig()), 64, **READS)
    assert flops.matmul == 2 * matmul_parameters(CONFIG)
    assert flops.attention == HEADS * 20 * (2 + 2)
    assert flops.routing == HEADS * 3 * 2
    assert flops.backward == 2 * flops.forward
    silent = flops_per_token(Transformer(CONFIG, DashConfig()), 64)
    assert (silent.attention, silent.routing) == (HEADS * 32.5 * 4, 0), "as dense, which scores nothing"


@pytest.mark.parametrize("attention", [InfLLMv2Config(), DashConfig(prior="none")], ids=lambda config: config.name)
def test_routing_without_a_gradient(attention):
    flops = flops_per_token(Transformer(CONFIG, attention), 64, **READS)
    assert flops.routing == HEADS * 3 * 2
    assert flops.backward == 2 * (flops.matmul + flops.attention)


@pytest.mark.parametrize("gradient", ["kl", "prior"])
def test_indexer_flops_by_hand(gradient):
    """An index query for each KV head, and gradients of the index's input for the prior alone."""
    flops = flops_per_token(Transformer(CONFIG, IndexerConfig(index_size=6, gradient=gradient)), 64, **READS)
    kv_heads, layers = CONFIG.num_kv_heads, CONFIG.num_layers
    index = 2 * layers * CONFIG.hidden_size * 6 * (kv_heads + 1)
    assert flops.routing == 2 * layers * kv_heads * 6 * 3
    assert flops.matmul == 2 * matmul_parameters(CONFIG) + index
    assert flops.backward == 2 * flops.forward - (index if gradient == "kl" else 0)


@pytest.mark.parametrize("shared_kv", [True, False])
def test_nsa_flops_by_hand(shared_kv):
    flops = flops_per_token(Transformer(CONFIG, NSAConfig(shared_kv=shared_kv)), 64, **READS)
    assert flops.routing == HEADS * 3 * (2 + 2)  # the compressed branch has values too
    gate, own_kv = 8 * 3 * 4, 0 if shared_kv else 8 * 4 * 2 * 32
    mlp = 2 * (32 * 32 * 32 + 32 * 32)  # keys and values: 32 tokens of 32 channels -> 32 -> 32, per KV head and window
    assert flops.matmul == 2 * (matmul_parameters(CONFIG) + 3 * (gate + own_kv + 2 * mlp / 16))
    assert flops.backward == 2 * flops.forward


def test_nsa_minicpm_flops_by_hand():
    config = NSAConfig(variant="minicpm", window_size=0)
    flops = flops_per_token(Transformer(CONFIG, config), 64, **READS)
    mlp, gate = 64 * 128 + 128 * 2, 4 * 32 * 2  # per channel and window; per token
    assert flops.matmul == 2 * (matmul_parameters(CONFIG) + 3 * (gate + 2 * 32 * mlp / 16))


def test_projections_equal_the_counter_of_torch():
    """Forward and backward; matrix products only, which leaves the attention kernel out."""
    model, length = Transformer(CONFIG, FullConfig()), 16
    input_ids = torch.arange(length)[None] % 10
    for layer in model.layers:  # attention without products, so that the counter sees the rest alone
        layer.attention.backend.forward = lambda q, k, v, **_: q * k.sum() * v.sum()
    counter = FlopCounterMode(display=False)
    with counter:
        model(input_ids)
    flops = flops_per_token(model, length)
    assert counter.get_total_flops() == length * flops.matmul
    with counter:
        model(input_ids, labels=input_ids).loss.backward()
    assert counter.get_total_flops() == 3 * length * flops.matmul


def test_a_whole_training_step_equals_the_counter_of_torch():
    """Attention included, as products of matrices. They multiply keys of the future, too: every token all of them."""
    model, length = Transformer(CONFIG, FullConfig()), 16
    input_ids = torch.arange(length)[None] % 10
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(input_ids, labels=input_ids).loss.backward()
    assert counter.get_total_flops() == length * flops_per_token(model, length, active_tokens=length).train


def test_measured_reads_of_dense_attention_give_the_dense_count():
    model, length = Transformer(CONFIG, FullConfig()), 16
    input_ids = torch.arange(length)[None] % 10
    active_tokens, routing_reads = layer_reads(model(input_ids, return_stats=True).stats)
    assert (set(active_tokens), set(routing_reads)) == ({(length + 1) / 2}, {0})
    measured = flops_per_token(model, length, active_tokens=active_tokens, routing_reads=routing_reads)
    assert measured == flops_per_token(model, length)


def test_measured_reads_of_packed_documents():
    model = Transformer(CONFIG, FullConfig())
    cu_seqlens = torch.tensor([0, 2, 6], dtype=torch.int32)
    stats = model(torch.zeros(1, 6, dtype=torch.long), cu_seqlens=cu_seqlens, return_stats=True).stats
    active_tokens, routing_reads = layer_reads(stats)
    assert active_tokens == pytest.approx([(1 + 2 + 1 + 2 + 3 + 4) / 6] * CONFIG.num_layers)
    assert routing_reads == [0] * CONFIG.num_layers


def test_measured_reads_of_sparse_attention_cost_less():
    torch.manual_seed(0)
    model = Transformer(replace(CONFIG, init_std=1.0), DashConfig(chunk_size=8, router_scale=1000.0))
    input_ids = torch.randint(10, (1, 64))
    active_tokens, routing_reads = layer_reads(model(input_ids, return_stats=True).stats)
    # Token t scores the t // 8 complete chunks before its own.
    assert routing_reads == pytest.approx([sum(t // 8 for t in range(64)) / 64] * CONFIG.num_layers)
    sparse = flops_per_token(model, 64, active_tokens=active_tokens, routing_reads=routing_reads)
    assert sparse.attention < flops_per_token(model, 64).attention


def test_every_layer_counts_what_it_is():
    """The first layer dense, the others scoring summaries: by layer, and in the sum."""
    model = Transformer(CONFIG, DashConfig(layers={"0": "full"}))
    flops = flops_per_token(model, 64, active_tokens=[30.0, 10.0, 20.0], routing_reads=[0.0, 3.0, 4.0])
    channels = HEADS / CONFIG.num_layers
    assert flops.attention == 4 * channels * 60
    assert flops.routing == 2 * channels * 7
