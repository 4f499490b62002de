"""config.json of a Hugging Face folder <-> ``ModelConfig``."""

import json
import math
from dataclasses import fields, replace
from pathlib import Path

from models.config import ModelConfig, RopeConfig
from models.hf.families import DEFAULTS, FAMILIES, Family
from models.hf.files import CONFIG, read_json

# Our field -> their key, of what has the same meaning in every family.
_KEYS = {
    **{"vocab_size": "vocab_size", "hidden_size": "hidden_size", "intermediate_size": "intermediate_size"},
    **{"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads"},
    **{"head_dim": "head_dim", "max_seq_len": "max_position_embeddings", "norm_eps": "rms_norm_eps"},
    "tie_embeddings": "tie_word_embeddings",
}
# Our name of a RoPE parameter -> theirs, for each scaling besides ``none``; ``factor`` has one name.
_ORIGINAL = {"original_max_seq_len": "original_max_position_embeddings"}
_ROPE = {
    "linear": {},
    "llama3": {name: name for name in ("low_freq_factor", "high_freq_factor")} | _ORIGINAL,
    "yarn": {name: name for name in ("beta_fast", "beta_slow", "attention_factor")} | _ORIGINAL,
    "longrope": {name: name for name in ("short_factor", "long_factor", "attention_factor")} | _ORIGINAL,
}
# Values of RoPE parameters that change nothing: ``finetuned`` tells how yarn's weights came to be.
_ROPE_HARMLESS = {"finetuned": (True, False), "truncate": (True,)}
# Of a ModelConfig, what a run that starts from a checkpoint is free to choose.
_FREE = ("max_seq_len", "init_std", "embedding_init_std")


def is_hf_folder(path: Path) -> bool:
    """Whether a folder is a Hugging Face checkpoint."""
    return (path / CONFIG).is_file()


def read_theirs(folder: Path) -> tuple[dict, Family]:
    """What config.json holds, with the family's defaults where it is silent, and the family.

    Raises:
        ValueError: no JSON object, or an architecture that has no row here.
    """
    given = read_json(folder / CONFIG)
    kind = given.get("base_model_type", given.get("model_type"))
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(
            f"{folder}: model_type {kind!r} has no counterpart here: {', '.join(FAMILIES)} have one "
            "(models/hf/families.py)"
        )
    family = FAMILIES[kind]
    return DEFAULTS | family.defaults | given, family


def read_config(folder: Path) -> ModelConfig:
    """The model that a folder's config.json describes.

    A sliding window changes nothing up to its length, so that length is then the model's context.

    Raises:
        ValueError: it describes what this project's model does not compute, or nothing that can be; the message names
            all of it.
    """
    theirs, family = read_theirs(folder)
    problems = _not_computed(theirs)
    values, rope = {}, None
    try:
        rope = _read_rope(theirs, family)
    except ValueError as error:
        problems.append(str(error))
    try:
        values = _read_shape(theirs) | family.fixed | family.derived(theirs)
    except ValueError as error:
        problems.append(str(error))
    except KeyError as error:
        problems.append(f"{CONFIG} has no {error}: is the folder complete?")
    except (TypeError, ZeroDivisionError):
        problems.append(f"{CONFIG} has values of wrong types")
    if problems:
        raise ValueError(f"{folder} cannot be mapped: {'; '.join(problems)}")
    window = _window(theirs, family)
    if window is not None:
        values["max_seq_len"] = min(values["max_seq_len"], window)
    try:
        return ModelConfig(**values, rope=rope)
    except ValueError as error:
        raise ValueError(f"{folder} cannot be mapped: {error}") from None


def _not_computed(theirs: dict) -> list[str]:
    kinds = {"full_attention", "sliding_attention"}
    layer_types = theirs.get("layer_types") or []
    unknown = set(map(str, layer_types)) - kinds if isinstance(layer_types, list) else {str(layer_types)}
    slides = not unknown and "sliding_attention" in layer_types
    return [
        message
        for wrong, message in (
            (theirs["hidden_act"] != "silu", f"hidden_act {theirs['hidden_act']!r}, only silu is here"),
            (theirs.get("attention_bias"), "attention_bias: the output projection has no bias here"),
            (theirs.get("mlp_bias"), "mlp_bias: projections of the MLP have no biases here"),
            (slides and not theirs.get("sliding_window"), "layer_types has sliding_attention without a sliding_window"),
            (unknown, f"layer_types {', '.join(sorted(unknown))}: only {' and '.join(sorted(kinds))} are here"),
            (theirs.get("quantization_config"), "quantization_config: weights must be 16 or 32 bit floats"),
        )
        if wrong
    ]


def _read_shape(theirs: dict) -> dict:
    heads = _integer(theirs, "num_attention_heads")
    if theirs.get("num_key_value_heads") is None:
        theirs = theirs | {"num_key_value_heads": heads}
    if theirs.get("head_dim") is None:
        theirs = theirs | {"head_dim": _integer(theirs, "hidden_size") // heads}
    if not isinstance(theirs["tie_word_embeddings"], bool):
        raise ValueError(f"tie_word_embeddings={theirs['tie_word_embeddings']!r} must be true or false")
    special = {"norm_eps": _real(theirs, "rms_norm_eps"), "tie_embeddings": theirs["tie_word_embeddings"]}
    return {ours: _integer(theirs, key) for ours, key in _KEYS.items() if ours not in special} | special


def _integer(theirs: dict, key: str) -> int:
    value = theirs[key]
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        raise ValueError(f"{key}={value!r} must be a positive integer")
    return value


def _real(theirs: dict, key: str) -> float:
    value = theirs[key]
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"{key}={value!r} must be a positive finite number")
    return float(value)


def _window(theirs: dict, family: Family) -> int | None:
    """Length of the sliding window of any layer; None = every layer sees the whole context."""
    layer_types = theirs.get("layer_types")
    if layer_types and not family.has_window and "sliding_attention" not in layer_types:
        return None
    slides = family.has_window or theirs.get("use_sliding_window") or layer_types
    if not slides or theirs.get("sliding_window") is None:
        return None
    return _integer(theirs, "sliding_window")


def _read_rope(theirs: dict, family: Family) -> RopeConfig:
    """From ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (before), which wins in both."""
    given = theirs.get("rope_scaling") or theirs.get("rope_parameters") or {}
    if not isinstance(given, dict):
        raise ValueError(f"rope parameters {given!r} are no object")
    given = dict(given)
    theta = _real({"rope_theta": theirs["rope_theta"]} | given, "rope_theta")
    given.pop("rope_theta", None)
    kinds = [given.pop(key) for key in ("rope_type", "type") if given.get(key) is not None] or ["default"]
    given = {key: value for key, value in given.items() if value is not None}
    kind = kinds[0]
    partial = given.pop("partial_rotary_factor", theirs.get("partial_rotary_factor")) or 1.0
    if partial != 1.0 and not family.partial_rotary:
        raise ValueError(f"partial_rotary_factor {partial!r}: {family.architecture} turns whole heads")
    if kind != "default" and kind not in list(_ROPE):
        raise ValueError(f"rope type {kind!r}: only default, {', '.join(_ROPE)} are here")
    names = {} if kind == "default" else {"factor": "factor", **_ROPE[kind]}
    if "original_max_seq_len" in names:  # absent: the context length before any extension
        name = names["original_max_seq_len"]
        said = [values[name] for values in (given, theirs) if values.get(name)]
        if said[1:] and said[0] != said[1]:  # which of them counts depends on the version of transformers
            raise ValueError(f"{name} is {said[0]} among the rope parameters and {said[1]} beside them: set one")
        given[name] = said[0] if said else _integer(theirs, "max_position_embeddings")
    values = {}
    if partial != 1.0:
        values["partial_rotary_factor"] = _real({"partial_rotary_factor": partial}, "partial_rotary_factor")
    for ours, name in names.items():
        if name not in given:
            continue
        value = given.pop(name)
        if ours in ("short_factor", "long_factor"):
            if not isinstance(value, list):
                raise ValueError(f"{name}={value!r} must be a list")
            values[ours] = [_real({name: item}, name) for item in value]
        else:
            values[ours] = (_integer if ours in _ORIGINAL else _real)({name: value}, name)
    ignored = sorted(key for key, value in given.items() if value not in _ROPE_HARMLESS.get(key, ()))
    if ignored:
        raise ValueError(f"rope parameters {', '.join(ignored)} of type {kind}")
    if kind == "longrope" and "factor" not in values:  # of their context length, whatever length a run chooses
        values["factor"] = _integer(theirs, "max_position_embeddings") / values["original_max_seq_len"]
    return RopeConfig(theta=theta, scaling="none" if kind == "default" else kind, **values)


def check_same_model(config: ModelConfig, folder: Path) -> None:
    """Refuse a model that would compute something else with the folder's weights. Free is what ``check_continues``
    leaves free, and the context length up to a sliding window.

    Raises:
        ValueError: with the overrides that make the two agree.
    """
    window = _window(*read_theirs(folder))
    if window is not None and config.max_seq_len > window:
        raise ValueError(
            f"{folder} has sliding_window {window}, and every layer sees the whole context here: set "
            f"model.max_seq_len={window}, within which that is the same"
        )
    check_continues(config, read_config(folder), folder)


def check_continues(config: ModelConfig, theirs: ModelConfig, origin: Path) -> None:
    """Refuse a model that would compute something else with weights of the model ``theirs``.

    Free are the context length, and how positions go on: where theirs scales no RoPE, a scaling and ``max_period``, and
    where the context is longer than its own, a larger theta. Floats are compared as float32: a config.json may hold
    that rounding of ours.

    Args:
        origin: of the weights, for the message.

    Raises:
        ValueError: with the overrides that make the two agree.
    """
    theirs = replace(theirs, rope=_with_factor(theirs))
    ours = replace(config, rope=_with_factor(config), **{name: getattr(theirs, name) for name in _FREE})
    if config.max_seq_len > theirs.max_seq_len and ours.rope.theta > theirs.rope.theta:
        ours = replace(ours, rope=replace(ours.rope, theta=theirs.rope.theta))
    if (theirs.rope.scaling, theirs.rope.max_period) == ("none", None) and _same(ours.rope.theta, theirs.rope.theta):
        partial = {"partial_rotary_factor": ours.rope.partial_rotary_factor}
        ours = replace(ours, rope=replace(theirs.rope, **partial))
    different = [
        f"{prefix}.{item.name}={json.dumps(getattr(want, item.name)).replace(' ', '')}"
        for prefix, have, want in (("model", ours, theirs), ("model.rope", ours.rope, theirs.rope))
        for item in fields(want)
        if item.name != "rope" and not _same(getattr(have, item.name), getattr(want, item.name))
    ]
    if different:
        raise ValueError(f"the model is not the one in {origin}: set {' '.join(different)}, or take model=checkpoint")


def _with_factor(config: ModelConfig) -> RopeConfig:
    """Its RoPE, longrope's factor said."""
    rope = config.rope
    if rope.scaling != "longrope" or rope.factor is not None:
        return rope
    return replace(rope, factor=config.max_seq_len / rope.original_max_seq_len)


def _same(a, b) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=2**-24)
    return a == b


def their_config(config: ModelConfig, dtype: str) -> dict:
    """config.json of a model: of the first family in whose shape it fits.

    Raises:
        ValueError: it fits none.
    """
    kind = family_of(config)
    rope = config.rope
    scaling = None
    if rope.scaling != "none":
        names = {"factor": "factor", **_ROPE[rope.scaling]}
        values = {theirs: getattr(rope, ours) for ours, theirs in names.items()}
        scaling = {"rope_type": rope.scaling, **{key: value for key, value in values.items() if value is not None}}
    return {
        "architectures": [FAMILIES[kind].architecture],
        "model_type": kind,
        **{theirs: getattr(config, ours) for ours, theirs in _KEYS.items()},
        "hidden_act": "silu",
        "attention_bias": False,
        "rope_theta": rope.theta,  # transformers before 5 reads these two, later ones as well
        "rope_scaling": scaling,
        "torch_dtype": dtype,
        "pad_token_id": None,  # else transformers takes the family's, which may lie outside of the vocabulary
        **FAMILIES[kind].described(config),
    }


def family_of(config: ModelConfig) -> str:
    """``model_type`` of the first family whose models compute what ``config`` does.

    Raises:
        ValueError: there is none.
    """
    plain = ModelConfig(**{item.name: getattr(config, item.name) for item in fields(config) if item.name in _SHARED})
    rope, partial = config.rope, config.rotary_dim < config.head_dim
    for kind, family in FAMILIES.items():
        if rope.max_period is not None or (partial and rope.scaling not in family.partial_rotary):
            continue
        if family.even_width and config.hidden_size % config.num_heads:
            continue
        shape = {"num_hidden_layers": config.num_layers, "hidden_size": config.hidden_size}
        values = family.fixed | family.derived(shape | family.defaults | family.described(config))
        same = replace(plain, **values)
        if all(_same(getattr(same, item.name), getattr(config, item.name)) for item in fields(config)):
            return kind
    special = [f"model.rope.{name}={getattr(rope, name)}" for name in _RARE_ROPE if getattr(rope, name) is not None]
    special += [f"model.rope.scaling={rope.scaling}"] if partial else []
    special += [
        f"model.{item.name}={getattr(config, item.name)}"
        for item in fields(config)
        if getattr(config, item.name) != getattr(plain, item.name)
    ]
    raise ValueError(
        f"no architecture of {', '.join(FAMILIES)} has {' and '.join(special)}: such a model cannot be exported"
    )


# Fields of a ModelConfig that every family has, with any value.
_SHARED = (*_KEYS, "rope", "init_std", "embedding_init_std")
# Of a RopeConfig, what not every family has.
_RARE_ROPE = ("max_period", "partial_rotary_factor")
