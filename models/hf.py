"""Hugging Face checkpoints: Llama, Mistral and Qwen3 folders read into a ``Transformer``'s weights, and written.

A folder holds config.json and safetensors, one file or several beside model.safetensors.index.json. Nothing else is
read: no pickle, no code. What this project's model does not compute is refused, not approximated.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.config import ModelConfig, RopeConfig

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen3": "Qwen3ForCausalLM"}

# Parts of parameter names, ours -> theirs; what stands in no row is called the same.
_NAMES = (
    ("embedding.", "model.embed_tokens."),
    ("norm.", "model.norm."),
    ("layers.", "model.layers."),
    (".attention_norm.", ".input_layernorm."),
    (".mlp_norm.", ".post_attention_layernorm."),
    (".attention.", ".self_attn."),
)
# Our name of a RoPE parameter -> theirs, for each scaling besides ``none``; ``factor`` has one name.
_ROPE = {
    "linear": {},
    "llama3": {
        **{name: name for name in ("low_freq_factor", "high_freq_factor")},
        "original_max_seq_len": "original_max_position_embeddings",
    },
    "yarn": {
        **{name: name for name in ("beta_fast", "beta_slow", "attention_factor")},
        "original_max_seq_len": "original_max_position_embeddings",
    },
    "longrope": {
        **{name: name for name in ("short_factor", "long_factor", "attention_factor")},
        "original_max_seq_len": "original_max_position_embeddings",
    },
}
# Of a ModelConfig, what a run that starts from a checkpoint is free to choose.
_FREE = ("max_seq_len", "init_std", "embedding_init_std")


def is_hf_folder(path: Path) -> bool:
    """Whether a folder is a Hugging Face checkpoint."""
    return (path / CONFIG).is_file()


def read_config(folder: Path) -> ModelConfig:
    """The shape that a folder's config.json describes.

    Raises:
        ValueError: it describes what this project's model does not compute; the message names all of it.
    """
    theirs = _read_json(folder / CONFIG)
    kind = theirs.get("model_type")
    if kind not in ARCHITECTURES:
        raise ValueError(f"{folder}: model_type {kind!r} cannot be mapped: only {', '.join(ARCHITECTURES)} can")
    layer_types = set(theirs.get("layer_types") or ["full_attention"])
    window = theirs.get("sliding_window") if kind == "mistral" or theirs.get("use_sliding_window") else None
    problems = [
        message
        for wrong, message in (
            (theirs.get("hidden_act", "silu") != "silu", f"hidden_act {theirs.get('hidden_act')!r}, only silu is here"),
            (theirs.get("attention_bias"), "attention_bias: projections have no biases here"),
            (theirs.get("mlp_bias"), "mlp_bias: projections have no biases here"),
            (window is not None, f"sliding_window {window}: every layer sees the whole context here"),
            (layer_types != {"full_attention"}, f"layer_types {sorted(layer_types)}: all must be full_attention"),
            (theirs.get("quantization_config"), "quantization_config: weights must be 16 or 32 bit floats"),
        )
        if wrong
    ]
    try:
        rope = _read_rope(theirs)
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise ValueError(f"{folder} cannot be mapped: {'; '.join(problems)}")
    try:
        heads = theirs["num_attention_heads"]
        return ModelConfig(
            vocab_size=theirs["vocab_size"],
            hidden_size=theirs["hidden_size"],
            intermediate_size=theirs["intermediate_size"],
            num_layers=theirs["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=theirs.get("num_key_value_heads") or heads,
            head_dim=theirs.get("head_dim") or theirs["hidden_size"] // heads,
            max_seq_len=theirs["max_position_embeddings"],
            rope=rope,
            norm_eps=theirs["rms_norm_eps"],
            qk_norm=kind == "qwen3",
            tie_embeddings=theirs.get("tie_word_embeddings", False),
        )
    except KeyError as error:
        raise ValueError(f"{folder / CONFIG} has no {error}: is the folder complete?") from None


def _read_rope(theirs: dict) -> RopeConfig:
    """From ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (before)."""
    given = dict(theirs.get("rope_parameters") or theirs.get("rope_scaling") or {})
    theta = given.pop("rope_theta", theirs.get("rope_theta", 10000.0))
    kinds = {given.pop(key) for key in ("rope_type", "type") if key in given} or {"default"}
    kind = kinds.pop()
    if given.pop("partial_rotary_factor", theirs.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError("partial_rotary_factor: RoPE turns whole heads here")
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind not in _ROPE:
        raise ValueError(f"rope type {kind!r}: only default, {', '.join(_ROPE)} are here")
    names = {"factor": "factor", **_ROPE[kind]}
    if "original_max_seq_len" in names:  # absent or null: the context length before any extension
        name = names["original_max_seq_len"]
        given[name] = given.get(name) or theirs.get(name) or theirs["max_position_embeddings"]
    values = {ours: given.pop(name) for ours, name in names.items() if given.get(name) is not None}
    ignored = sorted(key for key, value in given.items() if value is not None)
    if ignored:
        raise ValueError(f"rope parameters {', '.join(ignored)} of type {kind}")
    return RopeConfig(theta=theta, scaling=kind, **values)


def check_same_model(config: ModelConfig, folder: Path) -> None:
    """Refuse a model that would compute something else with the folder's weights.

    Free are the context length, and a RoPE scaling where the checkpoint has none: that extends its context.

    Raises:
        ValueError: with the overrides that make the two agree.
    """
    theirs = read_config(folder)
    ours = replace(config, **{name: getattr(theirs, name) for name in _FREE})
    if theirs.rope.scaling == "none" and ours.rope.theta == theirs.rope.theta:
        ours = replace(ours, rope=theirs.rope)
    different = [
        f"{prefix}.{item.name}={json.dumps(getattr(want, item.name))}"
        for prefix, have, want in (("model", ours, theirs), ("model.rope", ours.rope, theirs.rope))
        for item in fields(want)
        if item.name != "rope" and getattr(have, item.name) != getattr(want, item.name)
    ]
    if different:
        raise ValueError(f"the model is not the one in {folder}: set {' '.join(different)}")


def read_weights(folder: Path, config: ModelConfig) -> dict[str, Tensor]:
    """A folder's tensors under our names; a tensor that has no name here keeps its own.

    Raises:
        ValueError: the model of ``config`` is another one, or files are missing or not safetensors.
    """
    check_same_model(config, folder)
    files = [folder / WEIGHTS]
    if (folder / INDEX).exists():
        names = sorted(set(_read_json(folder / INDEX)["weight_map"].values()))
        files = [folder / Path(name).name for name in names]
    missing = [path.name for path in files if not path.exists()]
    if missing:
        raise ValueError(f"{folder} has no {', '.join(missing)}: weights are read from safetensors only")
    weights = {}
    for path in files:
        weights |= {_our_name(name): tensor for name, tensor in load_file(path).items()}
    if config.tie_embeddings:
        head = weights.pop("lm_head.weight", None)  # some folders hold the tied table twice
        if head is not None and not torch.equal(head, weights.get("embedding.weight", head)):
            raise ValueError(f"{folder} ties its embeddings, but lm_head.weight is another table: untie them")
    return weights


def write_folder(folder: Path, config: ModelConfig, weights: dict[str, Tensor]) -> list[str]:
    """Write a Llama folder, or with QK-norm a Qwen3 one, that transformers loads; weights keep their dtype.

    Args:
        weights: consolidated weights of a ``Transformer`` of the shape ``config``.

    Returns:
        Names of the weights left out: those of the attention backends, of which transformers' dense attention has none.

    Raises:
        ValueError: the folder exists, or the model has what those architectures have not.
    """
    for name in ("embedding_scale", "residual_scale", "logit_scale"):
        if getattr(config, name) != 1.0:
            raise ValueError(
                f"model.{name}={getattr(config, name)}: Llama and Qwen3 have no such scale, only 1 exports"
            )
    if folder.exists():
        raise ValueError(f"{folder} exists: give a new folder")
    left_out = sorted(name for name in weights if ".attention.backend." in name)
    tensors = {_their_name(name): tensor for name, tensor in weights.items() if name not in left_out}
    temporary = folder.with_name(f".{folder.name}.tmp")
    temporary.mkdir(parents=True)
    save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
    dtype = str(tensors["model.embed_tokens.weight"].dtype).removeprefix("torch.")
    (temporary / CONFIG).write_text(json.dumps(_their_config(config, dtype), indent=2) + "\n")
    temporary.rename(folder)
    return left_out


def _their_config(config: ModelConfig, dtype: str) -> dict:
    kind = "qwen3" if config.qk_norm else "llama"
    rope = config.rope
    scaling = None
    if rope.scaling != "none":
        values = {
            "factor": rope.factor,
            **{theirs: getattr(rope, ours) for ours, theirs in _ROPE[rope.scaling].items()},
        }
        scaling = {"rope_type": rope.scaling, **{key: value for key, value in values.items() if value is not None}}
    return {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "rope_theta": rope.theta,  # transformers before 5 reads these two, later ones as well
        "rope_scaling": scaling,
        "torch_dtype": dtype,
        # The embedding of a token that starts or ends a text is the tokenizer's to say.
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _their_name(name: str) -> str:
    return _rename(name, _NAMES)


def _our_name(name: str) -> str:
    return _rename(name, [(theirs, ours) for ours, theirs in _NAMES])


def _rename(name: str, table: Iterable[tuple[str, str]]) -> str:
    """Replace a prefix, and parts that begin with a dot wherever they stand."""
    for old, new in table:
        pattern = re.escape(old) if old.startswith(".") else "^" + re.escape(old)
        name = re.sub(pattern, new, name, count=1)
    return name


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON ({error})") from None
