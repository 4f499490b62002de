"""Hugging Face folders, with transformers as the other side."""

import contextlib
import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from dashattn.backends import DashConfig, FullConfig
from experiments.training.weights import find_weights, load_weights
from models import ModelConfig, RopeConfig, Transformer
from models.hf import is_hf_folder, read_config, write_folder
from models.hf.families import FAMILIES
from models.hf.weights import digest_of, read_tensors, weight_files

SHAPE = dict(
    vocab_size=61,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=128,
    initializer_range=0.1,
    rms_norm_eps=1e-2,  # far from transformers' default, so that a lost one shows
)
OWN_IDS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=None)  # transformers' defaults lie outside the vocabulary
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 5e4}
LLAMA3 = {
    **{"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 5e5},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
LONGROPE = {
    **{"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4},
    **{"short_factor": [1.0 + 0.1 * i for i in range(16)], "long_factor": [2.0 + 0.2 * i for i in range(16)]},
}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
LLAMA, QWEN3 = (LlamaConfig, LlamaForCausalLM), (Qwen3Config, Qwen3ForCausalLM)
SMOLLM3 = (SmolLM3Config, SmolLM3ForCausalLM)
HEADS = {"head_dim": 32}
# Configuration, model, changes, and the family it is written back as where that is another.
KINDS = {
    "llama": (*LLAMA, HEADS, None),
    "llama, tied": (*LLAMA, HEADS | {"tie_word_embeddings": True}, None),
    "llama, linear": (*LLAMA, HEADS | {"rope_parameters": LINEAR}, None),
    "llama 3": (*LLAMA, HEADS | {"rope_parameters": LLAMA3}, None),
    "llama, longrope": (*LLAMA, HEADS | {"rope_parameters": LONGROPE}, None),
    "mistral": (MistralConfig, MistralForCausalLM, HEADS | {"sliding_window": None}, "llama"),
    "mistral, window": (MistralConfig, MistralForCausalLM, HEADS | {"sliding_window": 128}, "llama"),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}, None),
    "qwen2, tied, yarn": (
        *(Qwen2Config, Qwen2ForCausalLM),
        {"tie_word_embeddings": True, "rope_parameters": YARN | {"attention_factor": 0.9}},
        None,
    ),
    "qwen3": (*QWEN3, HEADS, None),
    "qwen3, tied, yarn": (*QWEN3, HEADS | {"tie_word_embeddings": True, "rope_parameters": YARN}, None),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM, {}, None),
    "smollm3": (*SMOLLM3, {"num_hidden_layers": 4, "no_rope_layer_interval": 2}, None),
    "smollm3, one list": (
        *SMOLLM3,
        {"no_rope_layers": [0, 1], "tie_word_embeddings": False, "rope_parameters": YARN},
        None,
    ),
}
PHI3 = (Phi3Config, Phi3ForCausalLM)
PARTIAL = {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.75}
PARTIAL_LONGROPE = LONGROPE | {
    **{"partial_rotary_factor": 0.75, "short_factor": [1.0, 1.3, 1.6], "long_factor": [1.5, 2.0, 4.0]},
}
KINDS |= {
    "phi3": (*PHI3, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}, "llama"),
    "phi3, a part of a head": (*PHI3, {"rope_parameters": PARTIAL, "tie_word_embeddings": True}, None),
    "phi3, longrope": (
        *PHI3,
        {"rope_parameters": PARTIAL_LONGROPE, "original_max_position_embeddings": 32, "sliding_window": 200},
        None,
    ),
}
INPUT_IDS = torch.arange(2 * 70).view(2, 70) % 61


def save(folder, kind="llama", **options):
    """A random model of transformers, with norms that are not all 1 and biases that are not 0, and its folder."""
    config_class, model_class, changes, _ = KINDS[kind]
    torch.manual_seed(0)
    model = model_class(config_class(**SHAPE | OWN_IDS | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            if name.endswith("bias"):
                parameter.uniform_(-0.5, 0.5)
    model.save_pretrained(folder, **options)
    return model


def read(folder, attention=None, config=None):
    model = Transformer(config or read_config(folder), attention or FullConfig())
    return model, load_weights(model, find_weights(folder)).new_parameters


def edit(folder, **values):
    """Change values of config.json; ``...`` takes one out."""
    path = folder / "config.json"
    changed = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in changed.items() if value is not ...}))


@torch.no_grad()
def assert_same_logits(ours, theirs):
    expected = theirs(INPUT_IDS).logits
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(ours(INPUT_IDS).logits, expected, atol=1e-5 * scale, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers_there_and_back(tmp_path, kind):
    theirs = save(tmp_path / "theirs", kind)
    ours, new = read(tmp_path / "theirs")
    assert new == []
    assert_same_logits(ours, theirs)
    assert write_folder(tmp_path / "back", ours.config, ours.state_dict(), FullConfig()) == []
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back", local_files_only=True)
    assert back.config.model_type == (KINDS[kind][3] or theirs.config.model_type)
    assert back.config.rms_norm_eps == 1e-2
    assert (back.config.bos_token_id, back.config.eos_token_id) == (None, None)  # where none are told
    assert_same_logits(ours, back)
    assert read_config(tmp_path / "back") == ours.config


def test_every_family_has_a_row_above():
    transformers_has = {KINDS[kind][0].model_type for kind in KINDS}
    assert FAMILIES.keys() - transformers_has == {"minicpm"}


def minicpm(folder, **values):
    """A folder as MiniCPM's, and transformers' Llama that computes the same: its multipliers moved into the weights."""
    scales = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 16}
    theirs = save(folder, "llama, longrope")
    edit(folder, model_type="minicpm", architectures=["MiniCPMForCausalLM"], **scales | values)
    with torch.no_grad():
        theirs.model.embed_tokens.weight *= scales["scale_emb"]
        theirs.lm_head.weight *= scales["dim_model_base"] / SHAPE["hidden_size"]
        for layer in theirs.model.layers:
            for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
                projection.weight *= scales["scale_depth"] / math.sqrt(SHAPE["num_hidden_layers"])
    return theirs


def test_minicpm_scales_embeddings_branches_and_logits(tmp_path):
    theirs = minicpm(tmp_path / "theirs", tie_word_embeddings=False)
    ours, _ = read(tmp_path / "theirs")
    assert_same_logits(ours, theirs)
    write_folder(tmp_path / "back", ours.config, ours.state_dict(), FullConfig())
    assert_same_logits(read(tmp_path / "back")[0], theirs)
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (written["model_type"], written["scale_emb"], written["dim_model_base"]) == ("minicpm", 12, 16)
    assert written["scale_depth"] == pytest.approx(1.4, rel=1e-12)
    edit(tmp_path / "theirs", tie_word_embeddings=...)
    assert read_config(tmp_path / "theirs").tie_embeddings
    edit(tmp_path / "theirs", scale_depth=...)
    with pytest.raises(ValueError, match="has no 'scale_depth'"):
        read_config(tmp_path / "theirs")


@pytest.mark.parametrize(
    ("kind", "key", "field", "value"),
    [
        ("qwen3", "head_dim", "head_dim", 128),
        ("mistral", "num_key_value_heads", "num_kv_heads", 8),
        ("olmo2", "rms_norm_eps", "norm_eps", 1e-5),
        ("qwen2", "rms_norm_eps", "norm_eps", 1e-6),
        ("smollm3", "tie_word_embeddings", "tie_embeddings", True),
        ("llama", "num_key_value_heads", "num_kv_heads", 8),
    ],
)
def test_what_config_json_does_not_say_is_the_architectures_default(tmp_path, kind, key, field, value):
    save(tmp_path, kind)
    edit(tmp_path, **{key: ..., "num_attention_heads": 8})
    assert getattr(read_config(tmp_path), field) == value


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "olmo2", "smollm3", "phi3"])
def test_all_that_config_json_need_not_say_is_what_transformers_takes(tmp_path, kind):
    said = {"vocab_size": 61, "hidden_size": 4096, "intermediate_size": 80, "num_hidden_layers": 9}
    said |= {"num_attention_heads": 32, "max_position_embeddings": 10**6, "use_sliding_window": kind.startswith("qwen")}
    (tmp_path / "config.json").write_text(json.dumps(said | {"model_type": kind}))
    ours, theirs = read_config(tmp_path), KINDS[kind][0](**said)
    assert ours == ModelConfig(
        **{"vocab_size": 61, "hidden_size": 4096, "intermediate_size": 80, "num_layers": 9, "num_heads": 32},
        num_kv_heads=theirs.num_key_value_heads,
        head_dim=getattr(theirs, "head_dim", None) or 4096 // 32,
        max_seq_len=min(10**6, getattr(theirs, "sliding_window", None) or 10**6),
        rope=RopeConfig(theta=theirs.rope_parameters["rope_theta"]),
        no_rope_layers=[layer for layer, turns in enumerate(getattr(theirs, "no_rope_layers", [])) if not turns],
        norm_eps=theirs.rms_norm_eps,
        norm_position="post" if kind == "olmo2" else "pre",
        qk_norm={"qwen3": "head", "olmo2": "width"}.get(kind, "none"),
        qkv_bias=kind == "qwen2",
        tie_embeddings=theirs.tie_word_embeddings,
    )


def test_the_length_before_an_extension_need_not_be_said(tmp_path):
    """Phi-3 has one of its own."""
    save(tmp_path, "phi3, longrope")
    name = "original_max_position_embeddings"
    rope = {key: value for key, value in PARTIAL_LONGROPE.items() if key != name}
    edit(tmp_path, **{name: ...}, rope_parameters=rope)
    assert read_config(tmp_path).rope.original_max_seq_len == Phi3Config().original_max_position_embeddings
    save(tmp_path / "llama")
    edit(tmp_path / "llama", rope_parameters={key: value for key, value in YARN.items() if key != name})
    assert read_config(tmp_path / "llama").rope.original_max_seq_len == SHAPE["max_position_embeddings"]


def test_without_a_list_every_so_manieth_layer_is_not_rotated(tmp_path):
    save(tmp_path, "smollm3")
    edit(tmp_path, no_rope_layers=..., no_rope_layer_interval=3)
    assert read_config(tmp_path).no_rope_layers == [2]  # of 0 to 3


def test_a_window_counts_above_its_length_only(tmp_path):
    theirs = save(tmp_path, "mistral")
    edit(tmp_path, sliding_window=80)
    config = read_config(tmp_path)
    assert config.max_seq_len == 80
    assert_same_logits(read(tmp_path)[0], theirs)
    with pytest.raises(ValueError, match=r"sliding_window 80.*set model\.max_seq_len=80"):
        read(tmp_path, config=replace(config, max_seq_len=81))
    edit(tmp_path, sliding_window=200)
    assert read_config(tmp_path).max_seq_len == 128, "beyond the context it says nothing"
    edit(tmp_path, sliding_window=..., max_position_embeddings=32768)
    assert read_config(tmp_path).max_seq_len == 4096  # Mistral's own default
    save(tmp_path / "qwen2", "qwen2")
    edit(tmp_path / "qwen2", sliding_window=64, use_sliding_window=False)
    assert read_config(tmp_path / "qwen2").max_seq_len == 128
    edit(tmp_path / "qwen2", use_sliding_window=True, layer_types=...)
    assert read_config(tmp_path / "qwen2").max_seq_len == 64
    for layers, said, length in (("full", True, 128), ("sliding", True, 64), ("sliding", ..., 64), ("full", ..., 128)):
        layer_types = ["full_attention", f"{layers}_attention"]
        edit(tmp_path / "qwen2", use_sliding_window=said, layer_types=layer_types)
        assert read_config(tmp_path / "qwen2").max_seq_len == length


def test_the_temperature_of_longrope_does_not_follow_the_length_a_run_chooses(tmp_path):
    """Where the file has no factor, it is their context length over the original one."""
    theirs = save(tmp_path, "llama, longrope")
    edit(tmp_path, rope_parameters={key: value for key, value in LONGROPE.items() if key != "factor"})
    config = read_config(tmp_path)
    assert config.rope.factor == 4.0
    for length in (128, 512, 96):
        assert_same_logits(read(tmp_path, config=replace(config, max_seq_len=length))[0], theirs)
    implied = replace(config, rope=replace(config.rope, factor=None))
    assert_same_logits(read(tmp_path, config=implied)[0], theirs)
    with pytest.raises(ValueError, match=r"set model\.rope\.factor=4\.0"):
        read(tmp_path, config=replace(implied, max_seq_len=512))


def test_floats_that_are_rounded_to_float32_are_equal(tmp_path):
    save(tmp_path, "llama, longrope")
    config = read_config(tmp_path)
    rounded = [torch.tensor(value).item() for value in config.rope.long_factor]
    assert rounded != config.rope.long_factor
    edit(tmp_path, rms_norm_eps=torch.tensor(1e-2).item(), rope_parameters=LONGROPE | {"long_factor": rounded})
    assert read(tmp_path, config=config)[1] == []
    with pytest.raises(ValueError, match=r"set model\.norm_eps=0\.00999999977"):
        read(tmp_path, config=replace(config, norm_eps=1.001e-2))
    for other in ([*rounded[:-1], 9.0], [1.0, *rounded[1:]]):
        with pytest.raises(ValueError, match=r"set model\.rope\.long_factor=\[2\.0,2\.2"):
            read(tmp_path, config=replace(config, rope=replace(config.rope, long_factor=other)))


def test_a_folder_of_several_files_and_the_old_names_of_rope(tmp_path):
    theirs = save(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"] = dict(reversed(index["weight_map"].items()))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weight_files(tmp_path) == sorted(tmp_path.glob("*.safetensors"))
    edit(tmp_path, rope_parameters=None, rope_theta=10000.0, rope_scaling=None)
    assert_same_logits(read(tmp_path)[0], theirs)
    old = {"type": "linear", "factor": 4.0}  # which wins over the new name, and says no theta
    edit(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 5.0}, rope_scaling=old)
    assert read_config(tmp_path).rope == RopeConfig(scaling="linear", factor=4.0)
    edit(tmp_path, rope_parameters=None, rope_scaling=None)
    for number in (2, 3):
        next(tmp_path.glob(f"model-0000{number}*")).unlink()
    with pytest.raises(ValueError, match=r"has no model-00002\S+, model-00003\S+: copy .*safetensors only"):
        read(tmp_path)


def test_the_index_says_which_file_a_tensor_is_read_from(tmp_path):
    theirs = save(tmp_path, max_shard_size="40KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    name = "model.norm.weight"
    files = sorted(set(index["weight_map"].values()))
    for file in files:  # others hold a stale copy
        if file != index["weight_map"][name]:
            tensors = load_file(tmp_path / file)
            save_file(tensors | {name: torch.zeros(SHAPE["hidden_size"])}, tmp_path / file)
    assert_same_logits(read(tmp_path)[0], theirs)
    other = next(file for file in files if file != index["weight_map"]["lm_head.weight"])
    index["weight_map"]["lm_head.weight"] = other
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"has no tensor lm_head\.weight"):
        read(tmp_path)
    for damaged in (
        "[]",
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": "../b"}}',
        "\xff",
        "{",
    ):
        (tmp_path / "model.safetensors.index.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"index\.json"):
            read(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_and_written(tmp_path, dtype):
    save(tmp_path / "theirs").to(dtype).save_pretrained(tmp_path / "theirs")
    ours, _ = read(tmp_path / "theirs")
    assert_same_logits(ours, AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32))
    write_folder(
        tmp_path / "back", ours.config, {name: x.to(dtype) for name, x in ours.state_dict().items()}, FullConfig()
    )
    assert {x.dtype for x in load_file(tmp_path / "back" / "model.safetensors").values()} == {dtype}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto").dtype == dtype


def rewrite(folder, **tensors):
    path = folder / "model.safetensors"
    merged = load_file(path) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in merged.items() if tensor is not None}, path)


def test_harmless_variations_load(tmp_path):
    theirs = save(tmp_path / "buffers")
    buffers = {f"model__layers__{i}__self_attn__rotary_emb__inv_freq": torch.ones(16) for i in range(2)}
    rewrite(tmp_path / "buffers", **buffers, model__rotary_emb__inv_freq=torch.ones(16))
    assert_same_logits(read(tmp_path / "buffers")[0], theirs)

    tied = save(tmp_path / "tied", "llama, tied")
    table = tied.lm_head.weight.detach()
    rewrite(tmp_path / "tied", model__embed_tokens__weight=None, lm_head__weight=table.clone())
    assert_same_logits(read(tmp_path / "tied")[0], tied)

    yarn = save(tmp_path / "yarn", "qwen3, tied, yarn")
    edit(tmp_path / "yarn", rope_parameters=YARN | {"finetuned": True, "truncate": True})
    assert_same_logits(read(tmp_path / "yarn")[0], yarn)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.ones(48, dtype=torch.int8), "norm.weight is int8"),
        (torch.ones(48).to(torch.float8_e4m3fn), "norm.weight is float8_e4m3fn"),
        (torch.ones(48, dtype=torch.complex64), "norm.weight is complex64"),
        (torch.full((48,), torch.nan), "norm.weight has values that are not finite"),
        (torch.full((48,), torch.inf, dtype=torch.float16), "norm.weight has values that are not finite"),
    ],
    ids=["int8", "float8", "complex", "nan", "inf"],
)
def test_weights_that_are_no_finite_floats_are_named(tmp_path, tensor, message):
    save(tmp_path)
    rewrite(tmp_path, model__norm__weight=tensor)
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


def test_pointers_and_truncated_files_are_named_with_their_size(tmp_path):
    save(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    for size in (0, 4, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=rf"model\.safetensors is .*{size} bytes"):
            read(tmp_path)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 538090408\n"
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_text(pointer)
        with pytest.raises(ValueError, match=rf"{name} is the pointer of Git LFS \(\d+ bytes\).*538090408 bytes"):
            read(tmp_path)


JUNK = (None, True, -1, 0, 2.5, math.nan, math.inf, 10**30, "x", [], [1], {}, {"a": None})


@pytest.mark.parametrize("kind", ["llama, longrope", "smollm3", "mistral, window"])
def test_a_malformed_config_gets_one_line(tmp_path, kind):
    save(tmp_path, kind)
    whole = json.loads((tmp_path / "config.json").read_text())
    rope = whole["rope_parameters"]
    cases = [{key: junk} for key in whole for junk in JUNK]
    cases += [{"rope_parameters": rope | {key: junk}} for key in rope for junk in JUNK]
    for case in cases:
        edit(tmp_path, **whole | case)
        with contextlib.suppress(ValueError):  # what can be, and a key that does not matter, are no errors
            assert 0 < read_config(tmp_path).norm_eps < math.inf, case
    for text in ("", "{", "[]", "3", "\xff\xfe", "[" * 100_000):
        (tmp_path / "config.json").write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match=r"config\.json"):
            read_config(tmp_path)


def test_new_parameters_are_reported_and_start_at_zero(tmp_path):
    theirs = save(tmp_path / "theirs")
    model, new = read(tmp_path / "theirs", DashConfig(chunk_size=128))
    assert new == [f"layers.{i}.attention.backend.chunk_query" for i in range(2)]
    assert all((backend.chunk_query == 0).all() for backend in model.backends)
    assert_same_logits(model, theirs)  # one chunk: dense attention
    with pytest.raises(ValueError, match="exists"):
        write_folder(tmp_path / "theirs", model.config, model.state_dict(), FullConfig())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma3_text"}, "model_type 'gemma3_text' has no counterpart here: llama, mistral"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types linear_attention"),
        ({"attention_bias": True, "hidden_act": "gelu"}, "hidden_act 'gelu'.*attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        ({"rope_parameters": YARN | {"mscale": 0.7}}, "rope parameters mscale of type yarn"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor 0.5: LlamaForCausalLM turns whole heads",
        ),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope.factor"),
        ({"rope_parameters": {"full_attention": LINEAR}}, "rope parameters full_attention"),
        ({"vocab_size": None}, "vocab_size"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True must be a positive integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be a positive integer"),
        ({"vocab_size": ...}, "has no 'vocab_size'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_mapped_is_named(tmp_path, change, message):
    save(tmp_path)
    edit(tmp_path, **change)
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


def test_a_weights_file_alone_is_read_as_carefully(tmp_path):
    path = tmp_path / "model.safetensors"
    for tensor, message in (
        (torch.ones(3, dtype=torch.int8), "weight is int8"),
        (torch.full((3,), torch.nan), "weight has values that are not finite"),
        (torch.ones(3), "does not fit"),
    ):
        save_file({"weight": tensor}, path)
        with pytest.raises(ValueError, match=message):
            load_weights(torch.nn.Linear(2, 1), find_weights(path))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is cut short or no safetensors file"):
        load_weights(torch.nn.Linear(2, 1), find_weights(path))


def test_missing_and_unexpected_tensors_are_named(tmp_path):
    save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(3)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"layers\.1\.mlp\.up_proj\.weight is not in the file; .*q_proj\.bias is not in"
    ):
        read(tmp_path)


def test_channels_and_fused_projections_come_back_under_a_sparse_attention_too(tmp_path):
    save(tmp_path / "theirs", "phi3, a part of a head")
    attention = DashConfig(chunk_size=8, router_scale=3.0)
    model, _ = read(tmp_path / "theirs", attention)
    with torch.no_grad():
        for backend in model.backends:
            backend.chunk_query.normal_()
    write_folder(tmp_path / "back", model.config, model.state_dict(), attention)
    back, new = read(tmp_path / "back", attention)
    assert new == []
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in back.state_dict().items())
    # In the file the chunk query stands in the order of the keys, so that others pool with it what we do.
    weights = load_file(tmp_path / "back" / "model.safetensors")
    keys = weights["model.layers.0.self_attn.qkv_proj.weight"][48:64]
    theirs = (weights["model.layers.0.self_attn.indexer_q"].view(2, 8, 1) * keys.view(2, 8, -1)).sum(1)
    ours = model.backends[0].chunk_query[..., None] * model.layers[0].attention.k_proj.weight.view(2, 8, -1)
    torch.testing.assert_close(theirs, ours.sum(1))


def test_fused_projections_of_other_sizes_are_named(tmp_path):
    save(tmp_path, "phi3")
    edit(tmp_path, intermediate_size=64)
    with pytest.raises(ValueError, match=r"gate_up_proj\.weight has 160 rows, and config\.json says 128"):
        read(tmp_path)


def test_a_pickle_is_not_opened(tmp_path):
    save(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"has no model\.safetensors: weights are read from safetensors only"):
        read(tmp_path)


def test_tied_tables_that_differ_are_refused(tmp_path):
    save(tmp_path)  # untied
    edit(tmp_path, tie_word_embeddings=True)
    with pytest.raises(ValueError, match="untie"):
        read(tmp_path)


def test_the_model_must_be_the_folders_and_the_message_says_how(tmp_path):
    save(tmp_path, "qwen3")
    theirs = read_config(tmp_path)
    other = replace(theirs, qk_norm="none", rope=RopeConfig(theta=5.0))
    with pytest.raises(ValueError, match=r"set model\.qk_norm=\"head\" model\.rope\.theta=10000\.0"):
        read(tmp_path, config=other)
    # How positions go on is the user's choice, but not in which part of a head they are.
    longer = replace(theirs, max_seq_len=512, rope=RopeConfig(scaling="yarn", factor=4.0, original_max_seq_len=128))
    assert read(tmp_path, config=longer)[1] == []
    assert read(tmp_path, config=replace(theirs, max_seq_len=512, rope=RopeConfig(theta=4e4)))[1] == []
    assert read(tmp_path, config=replace(theirs, rope=RopeConfig(max_period=100)))[1] == []
    for changes in ({"rope": RopeConfig(theta=4e4)}, {"rope": RopeConfig(theta=5e3), "max_seq_len": 512}):
        with pytest.raises(ValueError, match=r"set model\.rope\.theta=10000\.0"):
            read(tmp_path, config=replace(theirs, **changes))
    with pytest.raises(ValueError, match=r"set model\.rope\.partial_rotary_factor=null"):
        read(tmp_path, config=replace(theirs, rope=RopeConfig(partial_rotary_factor=0.5)))
    save(tmp_path / "yarn", "qwen3, tied, yarn")
    with pytest.raises(ValueError, match=r"set model\.rope\.scaling=\"yarn\""):
        read(tmp_path / "yarn", config=replace(read_config(tmp_path / "yarn"), rope=RopeConfig(theta=5e4)))


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    save(tmp_path / "theirs")
    model, _ = read(tmp_path / "theirs")
    new, seen = tmp_path / "deep" / "new", []

    def more(folder, error=None):
        seen.append((new.exists(), sorted(path.name for path in folder.iterdir())))
        (folder / "more.json").write_text("{}")
        if error is not None:
            raise error

    for error in (OSError(28, "No space left on device"), SafetensorError("no space")):
        with pytest.raises(ValueError, match=r"new cannot be written \(.*o space.*\): make room"):
            write_folder(
                *(new, model.config, model.state_dict(), FullConfig()),
                write_more=lambda folder, error=error: more(folder, error),
            )
        assert list(new.parent.iterdir()) == []
    ids = {"bos_token_id": None, "eos_token_id": 7}
    write_folder(new, model.config, model.state_dict(), FullConfig(), token_ids=ids, write_more=more)
    assert seen == [(False, ["config.json", "model.safetensors"])] * 3
    assert [path.name for path in new.parent.iterdir()] == ["new"]
    assert sorted(path.name for path in new.iterdir()) == ["config.json", "model.safetensors", "more.json"]
    assert (new / "model.safetensors").stat().st_mode == (new / "config.json").stat().st_mode
    with safe_open(new / "model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert file.metadata() == {"format": "pt", "sha256": digest_of(tensors)}
    x = torch.arange(6, dtype=torch.int16)
    others = ({"a": x}, {"b": x}, {"a": x.view(2, 3)}, {"a": x.view(torch.float16)}, {"a": x + 1}, {"a": x, "b": x[:0]})
    assert len(set(map(digest_of, others))) == len(others)
    changed = tensors | {"model.norm.weight": tensors["model.norm.weight"] + 1}
    save_file(changed, new / "changed.safetensors", metadata={"format": "pt", "sha256": digest_of(tensors)})
    with pytest.raises(ValueError, match=r"changed\.safetensors holds other weights than were written"):
        read_tensors(new / "changed.safetensors")
    save_file(changed, new / "changed.safetensors", metadata={"format": "pt"})  # by another program, on purpose
    assert torch.equal(read_tensors(new / "changed.safetensors")["model.norm.weight"], changed["model.norm.weight"])
    written = json.loads((new / "config.json").read_text())
    assert written == {
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "attention_bias": False},
        **{"vocab_size": 61, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "head_dim": 32},
        **{"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-2},
        **{"tie_word_embeddings": False, "rope_theta": 10000.0, "rope_scaling": None, "torch_dtype": "float32"},
        **{"pad_token_id": None, "bos_token_id": None, "eos_token_id": 7},
    }


def test_a_model_of_no_family_is_not_exported(tmp_path):
    save(tmp_path / "theirs", "qwen2")
    model, _ = read(tmp_path / "theirs")
    with pytest.raises(ValueError, match=r"has model\.qkv_bias=True and model\.logit_scale=0\.5"):
        write_folder(tmp_path / "back", replace(model.config, logit_scale=0.5), model.state_dict(), FullConfig())
    longest, linear = {"max_period": 100}, {"partial_rotary_factor": 0.5, "scaling": "linear", "factor": 2.0}
    for values, message in (
        (longest, r"has model\.rope\.max_period=100"),
        (linear, r"has model\.rope\.partial_rotary_factor=0\.5 and model\.rope\.scaling=linear"),
    ):
        config = replace(model.config, qkv_bias=False, rope=replace(model.config.rope, **values))
        with pytest.raises(ValueError, match=rf"{message}: such a model cannot be exported"):
            write_folder(tmp_path / "back", config, model.state_dict(), FullConfig())
    assert not is_hf_folder(tmp_path / "back")
