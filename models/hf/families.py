"""Architectures of Hugging Face checkpoints: what a ``model_type`` adds to the common shape, and its tensors' names.

A family is a row of ``FAMILIES``; nothing else names an architecture. Llama's is the plain one, and the others say how
they differ from it. ``minicpm`` has no class in transformers: what it computes is taken from MiniCPM's and MiniCPM4's
reports (arXiv 2404.06395, section 3; arXiv 2506.07900), which multiply embeddings, residual branches and logits.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from models.config import ModelConfig

# Parts of parameter names, ours and theirs; what stands in no row is called the same. A part that begins with a dot
# stands within a layer, any other at the beginning.
_NAMES = (
    ("embedding.", "model.embed_tokens."),
    ("norm.", "model.norm."),
    ("layers.", "model.layers."),
    (".attention_norm.", ".input_layernorm."),
    (".mlp_norm.", ".post_attention_layernorm."),
    (".attention.backend.chunk_query", ".self_attn.indexer_q"),
    (".attention.", ".self_attn."),
)
_POST_NORM_NAMES = tuple(
    {
        ".attention_norm.": (".attention_norm.", ".post_attention_layernorm."),
        ".mlp_norm.": (".mlp_norm.", ".post_feedforward_layernorm."),
    }.get(ours, (ours, theirs))
    for ours, theirs in _NAMES
)


# A projection that some families store as one, by rows -> ours.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@dataclass(frozen=True)
class Family:
    """One ``model_type``.

    Attributes:
        architecture: the class in transformers that its folders name.
        fixed: fields of a ``ModelConfig`` that are so in every model of the family.
        defaults: keys of config.json -> what the family takes where they are absent, besides ``DEFAULTS``.
        names: parts of parameter names, ours and theirs.
        derived: keys of config.json -> fields of a ``ModelConfig`` that take more than a new name, if there are any.
        described: the other way.
        has_window: ``sliding_window`` counts by itself, and not only with ``use_sliding_window``.
        partial_rotary: the RoPE scalings with which it may turn the first channels of a head alone.
        is_fused: the parts of each of ``FUSED`` are one tensor.
        even_width: the residual stream's width must be a multiple of the query heads, whatever size these have.
    """

    architecture: str
    fixed: dict = field(default_factory=dict)
    defaults: dict = field(default_factory=dict)
    names: tuple[tuple[str, str], ...] = _NAMES
    derived: Callable[[dict], dict] = lambda theirs: {}
    described: Callable[[ModelConfig], dict] = lambda config: {}
    has_window: bool = False
    partial_rotary: tuple[str, ...] = ()
    is_fused: bool = False
    even_width: bool = False


def _minicpm_scales(theirs: dict) -> dict:
    return {
        "embedding_scale": float(theirs["scale_emb"]),
        "residual_scale": theirs["scale_depth"] / math.sqrt(theirs["num_hidden_layers"]),
        "logit_scale": theirs["dim_model_base"] / theirs["hidden_size"],
    }


def _minicpm_described(config: ModelConfig) -> dict:
    return {
        "scale_emb": config.embedding_scale,
        "scale_depth": config.residual_scale * math.sqrt(config.num_layers),
        "dim_model_base": config.logit_scale * config.hidden_size,
    }


def _unrotated_layers(theirs: dict) -> dict:
    """In ``no_rope_layers`` of SmolLM3, 1 stands for a layer that has RoPE."""
    layers, interval = range(theirs["num_hidden_layers"]), theirs["no_rope_layer_interval"]
    turns = theirs.get("no_rope_layers") or [(layer + 1) % interval != 0 for layer in layers]
    if not isinstance(turns, list) or len(turns) < len(layers):
        raise ValueError(f"no_rope_layers={turns!r} must hold a number for each of {len(layers)} layers")
    return {"no_rope_layers": [layer for layer in layers if not turns[layer]]}


FAMILIES = {
    "llama": Family("LlamaForCausalLM", even_width=True),
    "mistral": Family(
        "MistralForCausalLM",
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
        described=lambda config: {"sliding_window": None},
        has_window=True,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        fixed={"qkv_bias": True},
        defaults={"num_key_value_heads": 32, "sliding_window": 4096},
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        fixed={"qk_norm": "head"},
        defaults={"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096},
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        fixed={"norm_position": "post", "qk_norm": "width"},
        defaults={"rms_norm_eps": 1e-5},
        names=_POST_NORM_NAMES,
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        defaults={
            **{"num_key_value_heads": 4, "rope_theta": 2e6, "tie_word_embeddings": True, "no_rope_layer_interval": 4},
        },
        derived=_unrotated_layers,
        described=lambda config: {
            "no_rope_layers": [int(layer not in config.no_rope_layers) for layer in range(config.num_layers)]
        },
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        defaults={"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
        described=lambda config: (
            {
                "partial_rotary_factor": config.rope.partial_rotary_factor,
                "original_max_position_embeddings": config.rope.original_max_seq_len or config.max_seq_len,
            }
        ),
        has_window=True,
        partial_rotary=("none", "longrope"),
        is_fused=True,
    ),
    "minicpm": Family(
        "MiniCPMForCausalLM",
        defaults={"tie_word_embeddings": True},
        derived=_minicpm_scales,
        described=_minicpm_described,
    ),
}

# Where a config.json is silent, whatever the family.
DEFAULTS = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False}
