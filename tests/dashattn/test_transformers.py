"""transformers' models with the attentions of this library, held to our own model of the same weights."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache

from dashattn.backends import DashConfig, FullConfig, NSAConfig
from dashattn.integrations.transformers import MODEL_TYPES, PRESETS, register
from dashattn.integrations.transformers_rows import rows
from experiments.training.weights import find_weights, load_weights
from models import Transformer
from models.generate import generate
from models.hf import read_attention, read_config, write_folder
from tests.dashattn.transformers_models import (
    IDS,
    LENGTH,
    LENGTHS,
    OPTIONS,
    WINDOWS,
    assert_close,
    folders_in,
    new_tokens,
    padded,
    theirs,
    unpadded,
)


@pytest.fixture(scope="module", autouse=True)
def _registered():
    register()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return folders_in(tmp_path_factory)


def ours(folder, name, **options):
    preset = PRESETS[name]
    config = type(preset)(**vars(preset) | OPTIONS[name] | options)
    model = Transformer(read_config(folder), config)
    load_weights(model, find_weights(folder))
    return model.eval()


@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_a_prompt_has_our_logits(folders, name):
    logits = theirs(folders(), name)(IDS).logits
    assert_close(logits, ours(folders(), name)(IDS).logits)
    dense = theirs(folders(), "sdpa")(IDS).logits
    assert (logits - dense).abs().amax() > 0.1, "nothing was left out"


@pytest.mark.parametrize("kind", MODEL_TYPES)
@torch.no_grad()
def test_every_architecture(folders, kind):
    assert_close(theirs(folders(kind), "dash_sink")(IDS).logits, ours(folders(kind), "dash_sink")(IDS).logits)


@pytest.mark.parametrize("name", ["dash_sink", "infllmv2", "sink_window"])
def test_64_greedy_tokens_are_ours(folders, name):
    """Of prompts of different length, padded on the left."""
    ids, mask = padded("left", LENGTHS)
    generated = new_tokens(theirs(folders(), name), ids, 64, attention_mask=mask)
    assert generated.tolist() == generate(ours(folders(), name), unpadded(), max_new_tokens=64)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"cache_implementation": "static"}], ids=["beams", "static"])
def test_another_cache_or_search_generates_what_no_cache_does(folders, options):
    model = theirs(folders(), "dash_sink")
    ids, mask = padded("left", LENGTHS)
    call = {"attention_mask": mask, "num_beams": options.get("num_beams", 1)}
    expected = new_tokens(model, ids, 16, **call, use_cache=False)
    assert torch.equal(new_tokens(model, ids, 16, **call | options), expected)


def test_rows_end_where_a_longer_cache_is_still_empty():
    """Whole rows, with a mask of ones or none: the first column, the one behind the last, and the first new one."""
    for mask in (None, torch.ones(2, 5, dtype=torch.int64)):
        assert rows(2, 5, 5, attention_mask=mask) is None
        assert rows(2, 2, 5, 3, attention_mask=mask) is None
        assert rows(2, 5, 9, attention_mask=mask)[:, 0, 0].tolist() == 2 * [[0, 5, 0]]
        assert rows(2, 2, 9, 3, attention_mask=mask)[:, 0, 0].tolist() == 2 * [[0, 5, 3]]


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("chunks", [(30, 20), (1, 7, 42), (8, 8, 34)], ids=str)
@torch.no_grad()
def test_several_tokens_at_a_time_behind_a_cache(folders, name, chunks):
    model = theirs(folders(), name)
    cache = DynamicCache(config=model.config)
    logits = [model(ids, past_key_values=cache).logits for ids in IDS.split(chunks, dim=1)]
    assert_close(torch.cat(logits, 1), model(IDS).logits)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_rows_have_the_logits_they_have_alone(folders, name, side):
    """Whether position_ids count the padding or not."""
    model = theirs(folders(), name)
    ids, mask = padded(side, LENGTHS)
    for positions in (None, (mask.cumsum(1) - 1).clamp(min=0)):
        logits = model(ids, attention_mask=mask, position_ids=positions).logits
        for row, n in enumerate(LENGTHS):
            assert_close(logits[row][mask[row].bool()], model(IDS[:1, :n]).logits[0])


@torch.no_grad()
def test_a_row_that_begins_among_new_tokens(folders):
    """A padded prompt that is read in pieces, of which the first holds no token of the second row."""
    model, cache = theirs(folders(), "dash_sink"), DynamicCache()
    ids, mask = padded("left", [30, 7])
    logits = [
        model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache).logits for a, b in [(0, 20), (20, 30)]
    ]
    logits = torch.cat(logits, 1)
    assert_close(logits[0], model(IDS[:1, :30]).logits[0])
    assert_close(logits[1, -7:], model(IDS[:1, :7]).logits[0])


@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_packed_documents_have_the_logits_they_have_alone(folders, name):
    model, lengths = theirs(folders(), name), [[20, 9, 21], [43, 7]]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    logits = model(IDS, position_ids=positions, use_cache=False).logits
    for row, counts in enumerate(lengths):
        for own, document in zip(logits[row].split(counts), IDS[row].split(counts), strict=True):
            assert_close(own, model(document[None]).logits[0])


def test_gradients_pass_through_a_cache_too(folders):
    model = theirs(folders(), "dash_sink")

    def gradient(read):
        model.zero_grad()
        read().square().sum().backward()
        return model.model.layers[0].self_attn.k_proj.weight.grad.clone()

    def in_pieces():
        cache = DynamicCache()
        return torch.cat([model(ids, past_key_values=cache).logits for ids in IDS.split(25, dim=1)], 1)

    whole = gradient(lambda: model(IDS).logits)
    torch.testing.assert_close(gradient(in_pieces), whole, rtol=1e-3, atol=1e-3 * whole.abs().amax().item())


@torch.no_grad()
def test_options_are_read_from_the_configuration(folders, tmp_path):
    """A knob turns between two forward passes, and a saved folder keeps its options."""
    model = theirs(folders(), "dash")
    sparse = model(IDS).logits
    model.config.dashattn = OPTIONS["dash"] | {"router_scale": 1e-3}
    assert (model(IDS).logits - sparse).abs().amax() > 0.1
    model.config.dashattn = OPTIONS["dash"]
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="dash").eval()
    assert json.loads((tmp_path / "config.json").read_text())["dashattn"] == OPTIONS["dash"]
    assert_close(again(IDS).logits, sparse)


@torch.no_grad()
def test_layers_may_differ(folders):
    layers = {"0": "full"}
    logits = theirs(folders(), "dash_sink", layers=layers)(IDS).logits
    assert_close(logits, ours(folders(), "dash_sink", layers=layers)(IDS).logits)
    assert (logits - theirs(folders(), "dash_sink")(IDS).logits).abs().amax() > 0.1


HOLE = torch.ones_like(IDS)
HOLE[1, 20] = 0
RESTART = torch.arange(LENGTH).remainder(20)[None]


@pytest.mark.parametrize(
    ("name", "options", "call", "words"),
    [
        ("nsa", {}, {}, "nsa has parameters of its own .* choose dash_sink"),
        ("indexer", {}, {}, "indexer has parameters of its own .* choose dash_sink"),
        ("dash", {"alpha_mode": "learnable"}, {}, r"\(alpha_logit\)"),
        ("dash", {"alpha_mode": "scheduled", "alpha_steps": 5}, {}, "alpha_mode=fixed"),
        ("dash", {"summary_keys": "unrotated"}, {}, "summary_keys=rotated"),
        ("dash", {"layers": {"1": {"summary_rope": "mean"}}}, {}, "summary_rope=none"),
        ("dash", {"layers": {"1": {"share_selection_from": 0}}}, {}, "leave share_selection_from out of layers"),
        ("dash", {"topk_blocks": 3}, {}, "has no option topk_blocks; it has .*chunk_size"),
        ("dash", {"target_sparsity": 0.5}, {}, "has no option target_sparsity"),
        ("dash", {"router_scale": float("nan")}, {}, "router_scale must be a positive finite"),
        ("dash", {}, {"attention_mask": HOLE}, "has holes .*padding_side"),
        ("dash", {}, {"attention_mask": torch.ones(2, 1, LENGTH, LENGTH)}, "takes attention_mask .B, S."),
        ("dash", {}, {"attention_mask": HOLE[:, :9]}, "a column for each of 50 tokens"),
        ("dash", {}, {"position_ids": RESTART}, "pass use_cache=False"),
        ("dash", {}, {"position_ids": RESTART, "attention_mask": padded("left", [50, 45])[1]}, "count on from 0"),
        ("dash", {}, {"cu_seq_lens_q": torch.tensor([0, 100])}, "pass position_ids alone"),
        ("dash", {}, {"output_attentions": True}, "output_attentions=False"),
        ("dash", {}, {"is_causal": False}, "is causal"),
    ],
)
@torch.no_grad()
def test_what_is_not_computed_is_refused(folders, name, options, call, words):
    model = theirs(folders(), name, **options)
    with pytest.raises(ValueError, match=words) as refusal:
        model(IDS, **call)
    assert "\n" not in str(refusal.value)


@torch.no_grad()
def test_a_sliding_window_that_rows_outgrow_is_refused(folders):
    model = AutoModelForCausalLM.from_pretrained(folders("mistral"), attn_implementation="dash", sliding_window=30)
    model(IDS[:, :30])
    with pytest.raises(ValueError, match="rows of 31 tokens outgrow the sliding window of 30"):
        model(IDS[:, :31])
    with pytest.raises(ValueError, match="sliding_window=None"):
        new_tokens(model, IDS[:, :28], 8)


def test_dropout_is_refused(folders):
    model = AutoModelForCausalLM.from_pretrained(folders(), attn_implementation="dash", attention_dropout=0.1)
    with pytest.raises(ValueError, match="attention_dropout=0"):
        model.train()(IDS)


def test_a_layer_that_is_called_by_itself_is_causal(folders):
    layer = theirs(folders(), "dash").model.layers[0].self_attn
    q = torch.zeros(1, 4, 5, 8)
    with pytest.raises(ValueError, match="'dash' is causal"):
        transformers.AttentionInterface()["dash"](layer, q, q[:, :2], q[:, :2], None, is_causal=False)


def test_another_architecture_is_refused():
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=310)
    config = transformers.Gemma2Config(**shape, num_key_value_heads=2, head_dim=8)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="dash")
    with pytest.raises(ValueError, match="not gemma2: choose 'sdpa'"):
        model(IDS)


def exported(folder, path, name, **options):
    """A run's model with chunk queries that were learned, and its export."""
    model = ours(folder, name, **options)
    with torch.no_grad():
        for backend in model.backends:
            if hasattr(backend, "chunk_query"):
                backend.chunk_query.normal_(std=2.0, generator=torch.Generator().manual_seed(1))
    write_folder(path, model.config, model.state_dict(), model.attention)
    return model


@pytest.mark.parametrize("kind", ["llama", "qwen3", "olmo2", "phi3", "smollm3"])
@torch.no_grad()
def test_an_export_loads_with_its_options_and_chunk_queries(folders, tmp_path, kind):
    model = exported(folders(kind), tmp_path / "export", "dash_sink")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    logits = model(IDS).logits
    assert_close(loaded(IDS).logits, logits)
    assert (logits - ours(folders(kind), "dash_sink")(IDS).logits).abs().amax() > 0.1, "the queries change nothing"
    loaded.save_pretrained(tmp_path / "again")
    assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()(IDS).logits, logits)
    back = Transformer(read_config(tmp_path / "again"), read_attention(tmp_path / "again"))
    load_weights(back, find_weights(tmp_path / "again"))
    assert_close(back(IDS).logits, logits)


@pytest.mark.parametrize("name", ["dash_topk", "infllmv2", "sink_window"])
def test_an_export_continues_ragged_prompts_as_we_do(folders, tmp_path, name):
    model = exported(folders(), tmp_path / "export", name, layers={"1": "full"} if name == "infllmv2" else None)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    ids, mask = padded("left", LENGTHS)
    generated = new_tokens(loaded, ids, 24, attention_mask=mask)
    assert generated.tolist() == generate(model, unpadded(), max_new_tokens=24)


def test_chunk_queries_that_are_missing_are_refused(folders, tmp_path):
    exported(folders(), tmp_path / "export", "dash")
    weights = load_file(tmp_path / "export" / "model.safetensors")
    del weights["model.layers.1.self_attn.indexer_q"]
    save_file(weights, tmp_path / "export" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"has no model.layers.1.self_attn.indexer_q: export the run again"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "export")


def test_chunk_queries_of_an_export_learn(folders, tmp_path):
    exported(folders(), tmp_path / "export", "dash", prior="raw")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    loaded(IDS, labels=IDS).loss.backward()
    assert all(layer.self_attn.indexer_q.grad.abs().amax() > 0 for layer in loaded.model.layers)


@torch.no_grad()
def test_an_export_may_be_read_otherwise(folders, tmp_path):
    exported(folders(), tmp_path / "export", "dash")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "export", attn_implementation="sdpa").eval()
    assert_close(dense(IDS).logits, theirs(folders(), "sdpa")(IDS).logits)
    window = AutoModelForCausalLM.from_pretrained(tmp_path / "export", attn_implementation="sink_window").eval()
    window.config.dashattn = OPTIONS["sink_window"]
    assert_close(window(IDS).logits, theirs(folders(), "sink_window")(IDS).logits)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    loaded.config.dashattn = {"router_scale": 2.0}
    with pytest.raises(ValueError, match=r"config\.attention"):
        loaded(IDS)


@pytest.mark.parametrize(
    ("attention", "words"),
    [
        (NSAConfig(**WINDOWS, shared_kv=False), "shared_kv=false needs the rotary tables"),
        (FullConfig(layers={"1": "dash"}), "attention 'full' does not run in transformers"),
        (DashConfig(alpha_mode="scheduled", alpha_steps=3), "alpha_mode=fixed"),
        (DashConfig(layers={"1": {"share_selection_from": 0}}), "leave share_selection_from out of layers"),
    ],
    ids=["own keys", "full", "scheduled", "shared"],
)
def test_an_export_that_cannot_be_read_is_refused(folders, tmp_path, attention, words):
    model = Transformer(read_config(folders()), attention)
    write_folder(tmp_path / "export", model.config, model.state_dict(), attention)
    with pytest.raises(ValueError, match=words):
        AutoModelForCausalLM.from_pretrained(tmp_path / "export")
