"""Exports with parameters that their attention learned, in transformers, held to our own model."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache

from dashattn.backends import DashConfig, IndexerConfig, NSAConfig
from dashattn.integrations.transformers import register
from experiments.training.weights import find_weights, load_weights
from models import Transformer
from models.generate import generate
from models.hf import read_attention, read_config, write_folder
from tests.dashattn.transformers_models import (
    CHUNKS,
    IDS,
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


NSA = NSAConfig(**WINDOWS)
MINICPM = NSAConfig(**WINDOWS | {"topk": 4, "window_size": 0}, variant="minicpm")
INDEXER = IndexerConfig(block_size=4, index_size=8, topk=6)
WITH_PARAMETERS = {
    "nsa": NSA,
    "nsa_minicpm": MINICPM,
    "nsa, first layer": NSAConfig(**WINDOWS, layers={"1": "full"}),
    "indexer": INDEXER,
    "indexer, prior": IndexerConfig(block_size=4, index_size=8, topk=6, gradient="prior", index_pooling="mean"),
    "dash, learnable alpha": DashConfig(chunk_size=4, router_scale=3.0, alpha_mode="learnable"),
}


def with_parameters(folder, path, attention):
    """A model whose attention's parameters all have values that count, and its export."""
    model = Transformer(read_config(folder), attention)
    load_weights(model, find_weights(folder))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for backend in model.backends:
            for key, parameter in backend.named_parameters():
                # An index of larger ones is sure of a single block.
                parameter.normal_(std=0.1 if "index" in key else 0.5, generator=generator)
    write_folder(path, model.config, model.state_dict(), attention)
    return model.eval()


@pytest.fixture(scope="module")
def pairs(folders, tmp_path_factory):
    """Our model of an attention with parameters of its own, and its export in transformers; made once."""
    made = {}

    def pair(name):
        if name not in made:
            path = tmp_path_factory.mktemp("pair") / "export"
            model = with_parameters(folders(), path, WITH_PARAMETERS[name])
            made[name] = model, AutoModelForCausalLM.from_pretrained(path).eval()
        return made[name]

    return pair


@pytest.mark.parametrize("name", WITH_PARAMETERS)
@torch.no_grad()
def test_an_export_has_the_parameters_of_its_attention(folders, pairs, tmp_path, name):
    model, loaded = pairs(name)
    logits = model(IDS).logits
    torch.testing.assert_close(loaded(IDS).logits, logits, rtol=1e-5, atol=1e-5 * logits.abs().amax().item())
    untrained = Transformer(model.config, WITH_PARAMETERS[name])
    load_weights(untrained, find_weights(folders()))
    assert (untrained.eval()(IDS).logits - logits).abs().amax() > 0.1, "the parameters change nothing"
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()(IDS).logits, loaded(IDS).logits)
    back = Transformer(read_config(tmp_path / "again"), read_attention(tmp_path / "again"))
    load_weights(back, find_weights(tmp_path / "again"))
    assert torch.equal(back.eval()(IDS).logits, logits)


@pytest.mark.parametrize("kind", ["qwen3", "olmo2", "smollm3"])
@pytest.mark.parametrize("attention", [NSA, INDEXER], ids=["nsa", "indexer"])
@torch.no_grad()
def test_every_architecture_has_the_parameters(folders, tmp_path, kind, attention):
    """Whose attention reads a norm's output, or none's."""
    model = with_parameters(folders(kind), tmp_path / "export", attention).double()
    logits = model(IDS).logits
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export").double().eval()
    # In double precision as far as transformers goes, whose norms are in single.
    torch.testing.assert_close(loaded(IDS).logits, logits, rtol=1e-4, atol=1e-4 * logits.abs().amax().item())


@pytest.mark.parametrize("name", WITH_PARAMETERS)
def test_parameters_of_an_export_continue_ragged_prompts(pairs, name):
    model, loaded = pairs(name)
    ids, mask = padded("left", LENGTHS)
    if "indexer" in name:
        with pytest.raises(ValueError, match=r"hidden states of cached tokens.*pass use_cache=False"):
            new_tokens(loaded, ids, 2, attention_mask=mask)
    generated = new_tokens(loaded, ids, 24, attention_mask=mask, use_cache="indexer" not in name)
    assert generated.tolist() == generate(model, unpadded(), max_new_tokens=24)


@pytest.mark.parametrize("name", WITH_PARAMETERS)
@torch.no_grad()
def test_parameters_of_an_export_meet_padding_and_packing(pairs, name):
    _, loaded = pairs(name)
    for side in ("left", "right"):
        ids, mask = padded(side, LENGTHS)
        logits = loaded(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        for row, n in enumerate(LENGTHS):
            assert_close(logits[row][mask[row].bool()], loaded(IDS[:1, :n]).logits[0])
    positions = torch.cat([torch.arange(n) for n in (20, 9, 21)])[None].expand(2, -1)
    logits = loaded(IDS, position_ids=positions, use_cache=False).logits
    for own, document in zip(logits.split((20, 9, 21), 1), IDS.split((20, 9, 21), 1), strict=True):
        assert_close(own, loaded(document).logits)


@pytest.mark.parametrize("attention", [NSA, DashConfig(**CHUNKS)], ids=["nsa", "dash"])
@torch.no_grad()
def test_learned_parameters_refuse_positions_that_count_the_padding(folders, tmp_path, attention):
    with_parameters(folders(), tmp_path / "export", attention)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    ids, mask = padded("left", LENGTHS)
    with pytest.raises(ValueError, match=r"pass position_ids=\(attention_mask.cumsum"):
        loaded(ids, attention_mask=mask)


@pytest.mark.parametrize("name", ["nsa", "nsa_minicpm", "dash, learnable alpha"])
def test_several_tokens_behind_a_cache_with_parameters(pairs, name):
    _, loaded = pairs(name)

    def in_pieces():
        cache = DynamicCache(config=loaded.config)
        return torch.cat([loaded(ids, past_key_values=cache).logits for ids in IDS.split((1, 7, 42), dim=1)], 1)

    with torch.no_grad():
        whole = loaded(IDS).logits
        assert_close(in_pieces(), whole)
    learned = [x for x in loaded.parameters() if x.requires_grad]
    loaded.requires_grad_(False)
    own = loaded.model.layers[1].self_attn.backend
    try:  # gradients reach what alone learns
        own.requires_grad_(True)
        logits = in_pieces()
        assert_close(logits, whole)
        pieces = torch.autograd.grad(logits.square().mean(), list(own.parameters()))
        wanted = torch.autograd.grad(loaded(IDS).logits.square().mean(), list(own.parameters()))
        scale = max(x.abs().amax().item() for x in wanted)
        torch.testing.assert_close(pieces, wanted, rtol=1e-3, atol=1e-4 * scale)
    finally:
        for x in learned:
            x.requires_grad_(True)


@pytest.mark.parametrize("name", ["nsa", "nsa_minicpm", "indexer, prior", "dash, learnable alpha"])
def test_parameters_of_an_export_learn_as_ours(pairs, name):
    model, loaded = pairs(name)
    for each in (loaded, AutoModelForCausalLM.from_config(loaded.config)):
        assert all(x.requires_grad for x in each.parameters())
    for each in (model, loaded):
        each.zero_grad()
        each(IDS).logits.square().mean().backward()
    for ours_, theirs_ in zip(model.backends, loaded.model.layers, strict=True):
        given = {key: x.grad for key, x in theirs_.self_attn.backend.named_parameters()}
        wanted = {key: x.grad for key, x in ours_.named_parameters() if key != "chunk_query"}
        scale = max(x.abs().amax().item() for x in wanted.values())
        assert scale > 0
        torch.testing.assert_close(given, wanted, rtol=1e-3, atol=1e-4 * scale)


def test_an_index_that_could_not_learn_is_refused(pairs):
    _, loaded = pairs("indexer")
    some = [next(layer.self_attn.backend.parameters()) for layer in loaded.model.layers]
    loaded.train()
    try:
        for wanted in (True, False):  # all of its parameters, and all but one
            for x in some:
                x.requires_grad_(wanted)
            with pytest.raises(ValueError, match=r"or freeze the parameters of self_attn\.backend"):
                loaded(IDS)
    finally:
        loaded.eval()
        for x in some:
            x.requires_grad_(True)


@torch.no_grad()
def test_parameters_are_of_one_attention(folders, tmp_path):
    """Another attention may be given to such an export, unless it has parameters; options that change their shapes are
    refused, and missing ones."""
    path = tmp_path / "export"
    with_parameters(folders(), path, NSA)
    for name in ("sdpa", "sink_window"):
        loaded = AutoModelForCausalLM.from_pretrained(path, attn_implementation=name).eval()
        loaded.config.dashattn = OPTIONS.get(name, {})
        assert_close(loaded(IDS).logits, theirs(folders(), name)(IDS).logits)
    with pytest.raises(ValueError, match="indexer has parameters of its own"):
        AutoModelForCausalLM.from_pretrained(path, attn_implementation="indexer")(IDS)
    loaded = AutoModelForCausalLM.from_pretrained(path)
    loaded.config.attention["kernel_size"] = 6
    with pytest.raises(ValueError, match="not that of the layer's parameters"):
        loaded(IDS)
    weights = load_file(path / "model.safetensors")
    del weights["model.layers.1.self_attn.backend.gate.weight"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"has no model.layers.1.self_attn.backend.gate.weight: export the run again"):
        AutoModelForCausalLM.from_pretrained(path)


def test_channels_in_another_order_are_refused(folders, tmp_path):
    model = Transformer(read_config(folders("phi3")), NSA)
    model.config.rope.partial_rotary_factor = 0.5
    write_folder(tmp_path / "export", model.config, model.state_dict(), NSA)
    with pytest.raises(ValueError, match="channels in another order: read the folder"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "export")
