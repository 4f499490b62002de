"""Attention by layer: its notation, and a model that mixes backends."""

import pytest
import torch

from dashattn.backends import BACKENDS, DashConfig, FullConfig, InfLLMv2Config
from dashattn.backends.layers import layer_configs
from models import ModelConfig, Transformer

SHAPE = ModelConfig(
    hidden_size=24, intermediate_size=32, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8, max_seq_len=64,
    vocab_size=50,
)  # fmt: skip
DASH = DashConfig(chunk_size=4, router_scale=1e4, prior="raw")


def names(layers, count=6, chosen=DASH):
    config = type(chosen)(**{**vars(chosen), "layers": layers})
    return [own.name for own, _ in layer_configs(config, count, BACKENDS)]


def sources(layers, count=6, chosen=DASH):
    config = type(chosen)(**{**vars(chosen), "layers": layers})
    return [source for _, source in layer_configs(config, count, BACKENDS)]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (None, "dddddd"),
        ({}, "dddddd"),
        ({"0-1": "full"}, "ffdddd"),
        ({"*/3": "full"}, "fddfdd"),
        ({"1-5/2": "full"}, "dfdfdf"),
        ({"0 5": "full"}, "fddddf"),
        ({"0-1": "full", "*": "dash"}, "ffdddd"),
        ({2: "full"}, "ddfddd"),
        ({"0": "full", "0-2": "sink_window"}, "fssddd"),
    ],
)
def test_the_notation(layers, expected):
    assert "".join(name[0] for name in names(layers)) == expected


def test_options_change_the_chosen_backend_or_name_another():
    config = DashConfig(
        impl="reference", layers={"0": {"chunk_size": 32}, "1": {"name": "sink_window", "local_blocks": 2}}
    )
    first, second, third = (own for own, _ in layer_configs(config, 3, BACKENDS))
    assert (first.name, first.chunk_size, third.chunk_size) == ("dash", 32, 64)
    assert (second.local_blocks, second.impl) == (2, "reference")
    assert not first.layers
    assert not third.layers


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ({"0-1": "full"}, [None] * 6),
        ({"1-5": {"share_selection_from": 0}}, [None, 0, 0, 0, 0, 0]),
        (
            {"*/3": "dash", "*": {"share_selection_from": -1}},
            [None, 0, 0, None, 3, 3],
        ),  # what is taken over is handed on
        ({"2": {"share_selection_from": -2}, "4": {"share_selection_from": 2}}, [None, None, 0, None, 0, None]),
        ({"1": "full", "3-5/2": {"share_selection_from": -1}}, [None, None, None, 2, None, 4]),
    ],
)
def test_layers_take_over_the_selection_of_earlier_ones(layers, expected):
    assert sources(layers) == expected


def test_a_layer_that_takes_a_selection_over_has_the_options_of_its_source():
    layers = {
        "0": {"chunk_size": 32},
        "1": {"share_selection_from": 0},
        "2": "infllmv2",
        "3": {"share_selection_from": 2},
    }
    configs = [own for own, _ in layer_configs(DashConfig(layers=layers), 4, BACKENDS)]
    assert configs[0] == configs[1]
    assert configs[2] == configs[3]
    assert (configs[1].chunk_size, configs[3].name) == (32, "infllmv2")


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"6": "full"}, "the model's layers are 0 to 5"),
        ({"4-2": "full"}, "layers are 0 to 5"),
        ({"first": "full"}, "give layers as 3, 0-1"),
        ({"*/0": "full"}, "a step is at least 1"),
        ({"": "full"}, "empty key"),
        ({"0": "dense"}, "no backend is called 'dense'; choose one of full"),
        ({"0": {"block_size": 3}}, "dash has no option block_size"),
        ({"0": {"selector": "topk"}}, "its knob would be topk, that of the others router_scale"),
        ({"0": {"layers": {}}}, "has no option layers"),
        ({"0": {"chunk_size": "big"}}, "is no int"),
        ({"0": {"chunk_size": True}}, "is no int"),
        ({"0": {"router_scale": -1.0}}, "router_scale must be a positive"),
        ({"0": 3}, "a backend's name or a mapping"),
        ("full", "give a mapping"),
        ({"*": {"share_selection_from": -1}}, "names layer -1 for layer 0: take an earlier one"),
        ({"1": {"share_selection_from": 1}}, "names layer 1 for layer 1: take an earlier one"),
        ({"1": {"share_selection_from": 5}}, "names layer 5 for layer 1: take an earlier one"),
        ({"1": {"share_selection_from": True}}, "share_selection_from=True is no layer"),
        ({"1": {"share_selection_from": "0"}}, "share_selection_from='0' is no layer"),
        ({"1": {"share_selection_from": float("nan")}}, "share_selection_from=nan is no layer"),
        ({"1": {"share_selection_from": 0, "chunk_size": 8}}, "with the options of that one: leave out chunk_size"),
    ],
)
def test_what_cannot_be_is_named(layers, message):
    with pytest.raises(ValueError, match=message):
        names(layers)


def test_a_selection_weighed_by_the_layers_own_keys_is_not_handed_on():
    with pytest.raises(ValueError, match="its attention is dash with prior=mass: share_selection_from works with"):
        build({"1": {"share_selection_from": 0}}, DashConfig(chunk_size=4, prior="mass"))


@pytest.mark.parametrize("name", ["full", "nsa", "sink_window"])
def test_an_attention_without_a_selection_to_hand_on_is_refused(name):
    layers = {"1": name, "2": {"share_selection_from": 1}}
    with pytest.raises(ValueError, match=f"layer 1 has no selection .* its attention is {name}: .* dash, indexer$"):
        build(layers)


def build(layers, chosen=DASH):
    torch.manual_seed(0)
    return Transformer(SHAPE, type(chosen)(**{**vars(chosen), "layers": layers})).double()


def test_a_layer_has_the_parameters_and_the_reads_of_its_backend():
    model = build({"0 2": "full"})
    own = {name.split(".")[1] for name, _ in model.named_parameters() if "chunk_query" in name}
    assert own == {"1", "3"}
    stats = model(torch.arange(40)[None], return_stats=True).stats
    sparsities = [float(layer.causal_sparsity()) for layer in stats]
    assert sparsities[0] == sparsities[2] == 0
    assert min(sparsities[1], sparsities[3]) > 0.1
    assert [int(layer.routing_reads.sum()) > 0 for layer in stats] == [False, True, False, True]


def test_layers_all_alike_are_the_backend_itself():
    mixed, dense = build({"*": "full"}), build({}, FullConfig())
    ids = torch.arange(30)[None]
    torch.testing.assert_close(mixed(ids).logits, dense(ids).logits, rtol=0, atol=0)


def test_the_knob_turns_the_chosen_layers_alone():
    window = {"name": "sink_window", "block_size": 4, "local_blocks": 2}
    infllm = InfLLMv2Config(block_size=4, kernel_size=2, kernel_stride=1, topk=8, window_size=4)
    model = build({"0": "full", "1": window, "2": {"topk": 9}}, infllm)
    model.set_knob(5)
    assert [getattr(b.config, b.config.knob) for b in model.backends[1:]] == [2, 5, 5]
    dense = build({"0": "dash"}, FullConfig())
    assert (dense.turned, model.turned) == ([], [model.backends[2], model.backends[3]])
    with pytest.raises(ValueError, match="no sparsity knob"):
        dense.set_knob(1)


def test_decoding_a_mixed_model_equals_its_forward():
    window = {"name": "sink_window", "block_size": 8, "init_blocks": 0, "local_blocks": 1}
    model = build({"0": "full", "1": window, "2": {"chunk_size": 8}})
    ids = torch.randint(50, (2, 29))
    cache = model.new_cache(2, 32)
    steps = []
    for start, end in ((0, 13), *((t, t + 1) for t in range(13, 29))):
        steps.append(model.decode(ids[:, start:end], cache))
        cache.advance(end - start)
    torch.testing.assert_close(torch.cat(steps, 1), model(ids).logits, rtol=0, atol=1e-10)
