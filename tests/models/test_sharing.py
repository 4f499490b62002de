"""Layers that take over the selection of an earlier one."""

from dataclasses import replace

import pytest
import torch

from dashattn.backends import DashConfig, IndexerConfig, InfLLMv2Config, SharingBackend
from models import ModelConfig, Transformer

SHAPE = ModelConfig(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=32,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_seq_len=256,
    init_std=0.3,
)
LAYERS = {"*/3": {}, "*": {"share_selection_from": -1}}  # 0 for 1 and 2, and 3 for none
DASH = DashConfig(chunk_size=8, router_scale=8.0, prior="raw", layers=LAYERS)
CONFIGS = {
    "dash": DASH,
    "dash, tempered, by head": replace(DASH, prior="tempered", sigma=1.0, prior_heads="head"),
    "dash, unrotated": replace(DASH, summary_keys="unrotated", alpha_mode="learnable", init_chunks=1),
    "dash_topk": replace(DASH, selector="topk", topk=3),
    "dash_topp": replace(DASH, selector="topp", top_p=0.5),
    "moba": replace(DASH, selector="topk", topk=3, prior="none", learn_summary=False),
    "infllmv2": InfLLMv2Config(block_size=8, kernel_size=4, kernel_stride=2, topk=3, window_size=0, layers=LAYERS),
    "indexer": IndexerConfig(block_size=8, index_size=6, topk=3, local_blocks=0, layers=LAYERS),
    "indexer, prior": IndexerConfig(
        block_size=8, index_size=6, selector="topp", top_p=0.5, gradient="prior", layers=LAYERS
    ),
}
each_config = pytest.mark.parametrize("attention", CONFIGS.values(), ids=CONFIGS.keys())


def build(attention, **changes):
    torch.manual_seed(0)
    model = Transformer(replace(SHAPE, **changes), attention)
    for backend in model.backends:
        for parameter in backend.parameters():  # away from zero, which would hide a gradient
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model


def gradients(model, input_ids, **options):
    output = model(input_ids, labels=input_ids, **options)
    loss = output.loss + (0 if output.auxiliary_loss is None else output.auxiliary_loss)
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


@each_config
def test_a_router_in_every_third_layer(attention):
    model = build(attention)
    assert [isinstance(backend, SharingBackend) for backend in model.backends] == [False, True, True, False]
    assert not [
        name
        for name, _ in model.named_parameters()
        if name.startswith(("layers.1.attention.b", "layers.2.attention.b"))
    ]
    handed, taken = [], []
    model.backends[0].register_forward_hook(lambda _, inputs, out: handed.append(out[1]))
    for backend in model.backends[1:3]:
        backend.register_forward_pre_hook(lambda _, inputs, options: taken.append(options["taken"]), with_kwargs=True)
    with torch.no_grad():
        stats = model(torch.randint(50, (2, 61)), return_stats=True).stats
    assert all(given.words is handed[0].words and given.bias is handed[0].bias for given in taken)
    assert len(taken) == 2
    has_bias = (
        getattr(attention, "prior", None) in ("raw", "tempered") or getattr(attention, "gradient", None) == "prior"
    )
    assert (taken[0].bias is not None) == has_bias
    assert all(torch.equal(stats[0].active_tokens, stats[layer].active_tokens) for layer in (1, 2))
    assert [int(layer.routing_reads.sum()) > 0 for layer in stats] == [True, False, False, True]
    assert stats[0].causal_sparsity() > 0.05


@each_config
def test_decoding_equals_one_forward(attention):
    model, input_ids = build(attention).double(), torch.randint(50, (2, 41))
    cache = model.new_cache(2, 41)
    assert [set(layer.tensors) == {"k", "v"} for layer in cache.layers] == [False, True, True, False]
    logits = []
    for piece in input_ids.split([11, 1, 1, 9, 1, 1, 17], dim=1):
        logits.append(model.decode(piece, cache))
        cache.advance(piece.shape[1])
    # Rotary tables are float32.
    torch.testing.assert_close(torch.cat(logits, dim=1), model(input_ids).logits, atol=3e-6, rtol=0)


@each_config
def test_packed_documents_and_checkpointed_activations(attention):
    model = build(attention).double()
    documents = [torch.randint(50, (1, length)) for length in (1, 30, 7, 25)]
    packed, cu_seqlens = torch.cat(documents, dim=1), torch.tensor([0, 1, 31, 38, 63], dtype=torch.int32)
    alone = torch.cat([model(document).logits for document in documents], dim=1)
    torch.testing.assert_close(model(packed, cu_seqlens=cu_seqlens).logits, alone, atol=1e-10, rtol=0)
    results = []
    for model.checkpoint_activations in (False, True):
        model.zero_grad()
        results.append(gradients(model, packed, cu_seqlens=cu_seqlens))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("attention", [CONFIGS["dash"], CONFIGS["indexer, prior"]], ids=["dash", "indexer"])
def test_layers_that_take_over_teach_the_router(attention):
    """Where its own layer cannot: its output is cut off."""
    model, input_ids = build(attention), torch.randint(50, (1, 61))
    torch.nn.init.zeros_(model.layers[0].attention.o_proj.weight)
    gradients(model, input_ids)
    norms = [max(p.grad.abs().max() for p in model.backends[layer].parameters()) for layer in (0, 3)]
    assert min(norms) > 1e-6


def test_the_knob_turns_what_all_of_them_read():
    model, input_ids = build(DASH), torch.randint(50, (1, 61))
    assert len(model.turned) == 4
    read = []
    for knob in (1.0, 40.0):
        model.set_knob(knob)
        read.append([float(layer.causal_sparsity()) for layer in model(input_ids, return_stats=True).stats])
    assert all(dense < sparse for dense, sparse in zip(*read, strict=True))
