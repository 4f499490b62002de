"""The transformer against transformers' Llama and Qwen3, and what holds for every backend."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_rope import turned_by_definition

from dashattn.backends import DashConfig, FullConfig, IndexerConfig, InfLLMv2Config, NSAConfig, full
from data.packing import Row, collate
from experiments.training.engine import forward
from models import ModelConfig, RopeConfig, Transformer
from models.rope import rope_tables

VOCAB = 61
SHAPE = ModelConfig(
    vocab_size=VOCAB,
    hidden_size=48,
    intermediate_size=80,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    max_seq_len=128,
    init_std=0.1,  # far from the initial near-uniform prediction, so that errors show
)
# Blocks small enough that every backend drops keys within a few dozen tokens.
NSA_SIZES = dict(block_size=8, kernel_size=4, kernel_stride=2, topk=4, window_size=8)
BACKENDS = {
    "full": FullConfig(),
    "dash": DashConfig(chunk_size=8),
    "dash, rotated summaries": DashConfig(chunk_size=8, summary_rope="mean"),
    "dash, one router": DashConfig(chunk_size=8, prior="raw", layers={"1": {"share_selection_from": 0}}),
    "hils": DashConfig(chunk_size=8, selector="topk", topk=3, prior="mass"),
    "infllmv2": InfLLMv2Config(block_size=8, kernel_size=4, kernel_stride=2, topk=4, window_size=8),
    "nsa": NSAConfig(**NSA_SIZES),
    "nsa, own k and v": NSAConfig(**NSA_SIZES, shared_kv=False),
}
every_backend = pytest.mark.parametrize("attention", BACKENDS.values(), ids=BACKENDS.keys())


def build(attention=None, seed=0, **changes) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(replace(SHAPE, **changes), attention or FullConfig())


def tokens(batch, length, seed=1):
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_loss_is_the_mean_over_valid_labels():
    model = build()
    input_ids, labels = tokens(2, 9), tokens(2, 9, seed=2)
    labels[0, :5] = -100
    output = model(input_ids, labels=labels)
    log_probs = model(input_ids).logits.log_softmax(-1)
    expected = [-log_probs[b, t, labels[b, t]] for b in range(2) for t in range(9) if labels[b, t] >= 0]
    assert output.logits is None
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, torch.stack(expected).mean())
    torch.testing.assert_close(output.token_losses[labels >= 0], torch.stack(expected))
    assert (output.token_losses[labels < 0] == 0).all()


def test_loss_without_valid_labels_is_zero_and_has_zero_gradients():
    model = build()
    loss = model(tokens(1, 4), labels=torch.full((1, 4), -100)).loss
    loss.backward()
    assert loss == 0
    assert all((p.grad == 0).all() for p in model.parameters())


@pytest.mark.parametrize("autocast", [False, True])
@every_backend
def test_bfloat16_gives_a_float32_loss_near_the_exact_one(attention, autocast):
    model = build(attention)
    input_ids, labels = tokens(2, 16), tokens(2, 16, seed=2)
    exact = model(input_ids, labels=labels).loss
    if not autocast:
        model = model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(input_ids, labels=labels).loss
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0)
    assert all(p.grad.isfinite().all() for p in model.parameters())


@every_backend
def test_changing_the_future_changes_nothing_before(attention):
    model = build(attention)
    input_ids = tokens(1, 50)
    changed = input_ids.clone()
    changed[:, 33:] = (changed[:, 33:] + 1) % VOCAB
    with torch.no_grad():
        before, after = model(input_ids).logits, model(changed).logits
    torch.testing.assert_close(after[:, :33], before[:, :33], atol=1e-5, rtol=0)
    assert (after[:, 33:] - before[:, 33:]).abs().amax(-1).min() > 1e-3


@every_backend
def test_packed_documents_equal_documents_alone(attention):
    model = build(attention)
    documents = [tokens(1, length, seed=length) for length in (1, 30, 7, 45)]
    cu_seqlens = torch.tensor([0, 1, 31, 38, 83], dtype=torch.int32)
    packed = torch.cat(documents, dim=1)
    position_ids = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
    with torch.no_grad():
        alone = torch.cat([model(document).logits for document in documents], dim=1)
        torch.testing.assert_close(model(packed, cu_seqlens=cu_seqlens).logits, alone, atol=1e-5, rtol=0)
        given = model(packed, cu_seqlens=cu_seqlens, max_seqlen=45, position_ids=position_ids).logits
        torch.testing.assert_close(given, alone, atol=1e-5, rtol=0)


def test_dense_attention_is_told_the_longest_document(monkeypatch):
    told = []
    monkeypatch.setattr(full, "full_attention", lambda q, k, v, *, max_seqlen, **_: told.append(max_seqlen) or q)
    model = build(DashConfig(chunk_size=8, layers={"1": "full"}))
    rows = [Row(np.arange(30), np.arange(30), np.array([0, 11])), Row(np.arange(30), np.arange(30), np.array([0, 23]))]
    batch = collate(rows, "documents")
    forward(model, batch, torch.device("cpu"))
    assert told == [23]


def test_the_auxiliary_loss_is_the_sum_of_the_layers():
    model, losses = build(IndexerConfig(block_size=4, index_size=6, topk=8, kl_weight=0.5), num_layers=3), []
    for backend in model.backends:
        whole = backend.forward_with_loss
        backend.forward_with_loss = lambda *qkv, whole=whole, **options: (
            losses.append(whole(*qkv, **options)) or losses[-1]
        )
    output = model(tokens(1, 40), labels=tokens(1, 40, seed=2))
    assert len(losses) == 3
    torch.testing.assert_close(output.auxiliary_loss, sum(loss for _, loss in losses), atol=0, rtol=1e-5)
    assert output.auxiliary_loss > 0
    with torch.no_grad():
        assert model(tokens(1, 40), labels=tokens(1, 40, seed=2)).auxiliary_loss is None


def test_packed_documents_are_one_row():
    with pytest.raises(ValueError, match="flatten the documents into one row"):
        build()(tokens(2, 4), cu_seqlens=torch.tensor([0, 4], dtype=torch.int32))


def test_initial_values_outside_the_backends_are_the_same_for_all():
    reference = build().state_dict()
    for attention in BACKENDS.values():
        state = build(attention).state_dict()
        shared = {name for name in state if ".backend." not in name}
        assert shared == reference.keys()
        assert all(torch.equal(state[name], reference[name]) for name in shared)


def test_initial_standard_deviations():
    model = build(hidden_size=256, num_layers=8, init_std=0.02, embedding_init_std=1.0, qkv_bias=True)
    into_residual = 0.02 / (2 * 8) ** 0.5
    layer = model.layers[3]
    for weight, std in [
        (model.embedding.weight, 1.0),
        (model.lm_head.weight, 0.02),
        (layer.attention.q_proj.weight, 0.02),
        (layer.attention.o_proj.weight, into_residual),
        (layer.mlp.up_proj.weight, 0.02),
        (layer.mlp.down_proj.weight, into_residual),
    ]:
        assert weight.std().item() == pytest.approx(std, rel=0.05)
    assert (layer.mlp_norm.weight == 1).all()
    biases = [parameter for name, parameter in model.named_parameters() if name.endswith("bias")]
    assert len(biases) == 8 * 3
    assert all((bias == 0).all() for bias in biases)
    weight = build(hidden_size=256, init_std=0.02).embedding.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.05), "without a value of its own"


def test_tied_embeddings_are_one_tensor():
    model = build(tie_embeddings=True)
    assert "lm_head.weight" not in model.state_dict()
    input_ids = tokens(1, 5)
    model(input_ids, labels=tokens(1, 5, seed=2)).loss.backward()
    unused = [v for v in range(VOCAB) if v not in input_ids]
    assert (model.embedding.weight.grad[unused] != 0).any()  # reached through the output head alone


def test_scales_multiply_embeddings_branches_and_logits():
    plain, input_ids = build(), tokens(1, 7)
    scaled = build(embedding_scale=3.0, residual_scale=0.5, logit_scale=0.25)
    with torch.no_grad():
        x = plain.embedding(input_ids) * 3.0
        rope = (torch.ones(7, 32), torch.zeros(7, 32))
        for layer in plain.layers:
            x = x + 0.5 * layer.attention(layer.attention_norm(x), rope, None, False)[0]
            x = x + 0.5 * layer.mlp(layer.mlp_norm(x))
        expected = F.linear(plain.norm(x), plain.lm_head.weight) * 0.25
        logits = scaled(input_ids, position_ids=torch.zeros(7, dtype=torch.long)).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_a_layer_without_rope_hands_its_backend_tables_that_turn_nothing():
    model, input_ids, given = build(BACKENDS["nsa, own k and v"], no_rope_layers=[1]), tokens(1, 20), []
    for backend in model.backends:
        backend.register_forward_pre_hook(lambda _, args, options: given.append(options["rope"]), with_kwargs=True)
    model(input_ids)
    assert (given[0][0] != 1).any()
    assert (given[1][0] == 1).all()
    assert (given[1][1] == 0).all()


def test_a_document_is_turned_from_its_beginning_and_only_within_the_longest_period():
    model = build(num_layers=1, rope=RopeConfig(max_period=100)).double()
    input_ids, given, cu_seqlens = tokens(1, 30), {}, torch.tensor([0, 11, 30], dtype=torch.int32)
    (backend,) = model.backends
    backend.register_forward_pre_hook(lambda _, args: given.update(zip("qk", args, strict=False)))
    model(input_ids, cu_seqlens=cu_seqlens)
    attention = model.layers[0].attention
    block_input = model.layers[0].attention_norm(model.embedding(input_ids))
    for name, projection in (("q", attention.q_proj), ("k", attention.k_proj)):
        heads_THD = projection(block_input)[0].unflatten(-1, (-1, 32))
        for head in range(heads_THD.shape[1]):
            documents = heads_THD[:, head].split([11, 19])
            expected = torch.cat([turned_by_definition(document, model.config) for document in documents])
            torch.testing.assert_close(given[name][0, :, head], expected, atol=1e-6, rtol=0)


@every_backend
def test_statistics_come_from_every_layer(attention):
    model = build(attention)
    input_ids = tokens(2, 40)
    output = model(input_ids, return_stats=True)
    assert len(output.stats) == SHAPE.num_layers
    for stats in output.stats:
        assert stats.active_tokens.shape == (2, 40, SHAPE.num_kv_heads)
        assert 0 <= stats.causal_sparsity() < 1
    assert model(input_ids).stats is None
    assert model.hidden_states(input_ids)[1] is None
    torch.testing.assert_close(model(input_ids).logits, output.logits)


@every_backend
def test_every_parameter_is_trained(attention):
    model = build(attention)
    model(tokens(1, 60), labels=tokens(1, 60, seed=2)).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_backends_get_the_input_of_the_attention_block_and_the_tables():
    model, input_ids, given = build(BACKENDS["nsa, own k and v"]), tokens(1, 20), {}
    model.backends[0].register_forward_pre_hook(lambda _, args, options: given.update(options), with_kwargs=True)
    model(input_ids)
    block_input = model.layers[0].attention_norm(model.embedding(input_ids))
    torch.testing.assert_close(given["hidden"], block_input, atol=0, rtol=0)
    for table, expected in zip(given["rope"], rope_tables(model.config, torch.arange(20)), strict=True):
        torch.testing.assert_close(table, expected, atol=0, rtol=0)


def test_step_reaches_every_backend(monkeypatch):
    model, seen = build(), []
    for backend in model.backends:
        monkeypatch.setattr(backend, "set_step", seen.append)
    model.set_step(7)
    assert seen == [7] * SHAPE.num_layers


def test_knob_reaches_every_backend():
    torch.manual_seed(0)
    model, input_ids = build(BACKENDS["dash"]), tokens(1, 64)
    sparsities = []
    for knob in (1.0, 1000.0):
        model.set_knob(knob)
        with torch.no_grad():
            stats = model(input_ids, return_stats=True).stats
        sparsities.append([layer.causal_sparsity().item() for layer in stats])
    assert all(sparse > dense for dense, sparse in zip(*sparsities, strict=True))
    with pytest.raises(ValueError, match="knob"):
        build(FullConfig()).set_knob(1.0)
