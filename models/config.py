"""Shape of a decoder-only transformer: the dataclasses behind configs/model/*.yaml."""

import math
from dataclasses import dataclass, field
from typing import Annotated

from dashattn.fields import MOST_FLOAT, Checked, NonNegativeInt, OneOf, PositiveFloat, PositiveInt, PositiveShare, Range

# Which fields each RoPE scaling must be given, and which it may be given besides.
_ROPE_REQUIRED = {
    "none": set(),
    "linear": {"factor"},
    "llama3": {"factor", "original_max_seq_len", "low_freq_factor", "high_freq_factor"},
    "yarn": {"factor", "original_max_seq_len"},
    "longrope": {"original_max_seq_len", "short_factor", "long_factor"},
}
_ROPE_OPTIONAL = {
    # Not with a scaling: what that slows are the slow pairs, which are not turned at all.
    "none": {"max_period"},
    "yarn": {"attention_factor", "beta_fast", "beta_slow"},
    "longrope": {"factor", "attention_factor"},
}


@dataclass
class RopeConfig(Checked, at="model.rope"):
    """Rotary position embedding. The parameters mean what they mean in Hugging Face configs.

    Raises ValueError when ``scaling`` is unknown, lacks a parameter, or is given one that it would ignore.
    """

    # Base of the angles; larger turns slower.
    theta: Annotated[float, Range(float, 1, MOST_FLOAT, "above 1; 10000 is the usual base", but=(1,))] = 10000.0
    scaling: Annotated[str, OneOf(tuple(_ROPE_REQUIRED))] = "none"  # how the angles change for longer rows
    factor: PositiveFloat | None = None  # context extension; longrope: null = max_seq_len / original_max_seq_len
    original_max_seq_len: PositiveInt | None = None  # length of the first pretraining stage, in tokens
    low_freq_factor: PositiveFloat | None = None  # llama3
    high_freq_factor: PositiveFloat | None = None  # llama3
    beta_fast: PositiveFloat | None = None  # yarn, null = 32 rotations over the original length
    beta_slow: PositiveFloat | None = None  # yarn, null = 1
    # longrope, one a channel pair that is turned, up to original_max_seq_len tokens; and for longer sequences.
    short_factor: list[PositiveFloat] | None = None
    long_factor: list[PositiveFloat] | None = None  # as short_factor, for longer sequences
    # yarn and longrope: multiplies cos and sin; null = the published formula.
    attention_factor: PositiveFloat | None = None
    # Tokens. A channel pair that takes more of them for one turn is not turned, and what it holds is content without a
    # position (HoPE, arXiv 2410.21216): the length of the training rows, which longer rows leave as it is. null = none.
    max_period: PositiveInt | None = None
    partial_rotary_factor: PositiveShare | None = None  # share of a head's channels that are turned at all; null = 1

    def __post_init__(self):
        super().__post_init__()
        required = _ROPE_REQUIRED[self.scaling]
        for name in _ROPE_PARAMETERS:
            value = getattr(self, name)
            if value is None and name in required:
                raise ValueError(f"rope.scaling={self.scaling} needs rope.{name}: set it")
            if value is None:
                continue
            if name not in required | _ROPE_OPTIONAL.get(self.scaling, set()) | {"partial_rotary_factor"}:
                raise ValueError(
                    f"rope.scaling={self.scaling} does not use rope.{name}: set rope.{name}=null or change rope.scaling"
                )
            if value == []:
                raise ValueError(f"rope.{name} is empty: it needs a number for each channel pair")
        if self.scaling == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"rope.high_freq_factor={self.high_freq_factor} must exceed "
                f"rope.low_freq_factor={self.low_freq_factor}: Llama 3 uses 4 and 1"
            )
        if self.scaling == "longrope" and self.original_max_seq_len == 1 and self.attention_factor is None:
            raise ValueError(
                "rope.original_max_seq_len=1 has no attention factor, which divides by its logarithm: give the length "
                "of the first pretraining stage, in tokens, or rope.attention_factor"
            )
        if self.max_period is not None and self.max_period < 2 * math.pi:
            raise ValueError(
                f"rope.max_period={self.max_period} is below one turn of the fastest channel pair, 6.28 tokens: give "
                "the length of the training rows, or null to turn all"
            )


_ROPE_PARAMETERS = [name for name in RopeConfig.__dataclass_fields__ if name not in ("theta", "scaling")]


Layers = Annotated[int, Range(int, 1, 10_000, "a number of layers from 1 to 10000")]


@dataclass
class ModelConfig(Checked, at="model"):
    """Decoder-only transformer: RMSNorm, SwiGLU, RoPE, grouped-query attention.

    The three ``*_scale`` multipliers are MiniCPM's: embedding_scale = scale_emb, residual_scale = scale_depth /
    sqrt(num_layers), logit_scale = dim_model_base / hidden_size. 1 turns each off.

    Raises ValueError for shapes that cannot be built.
    """

    hidden_size: PositiveInt  # channels of the residual stream
    intermediate_size: PositiveInt  # channels inside the MLP
    num_layers: Layers  # attention and MLP together are one
    num_heads: PositiveInt  # query heads of a layer
    num_kv_heads: PositiveInt  # heads of keys and values, which divide num_heads
    head_dim: PositiveInt  # channels of a head
    max_seq_len: PositiveInt  # tokens the model is meant for; longer inputs run and measure extrapolation
    vocab_size: PositiveInt | None = None  # null = the data's; set before the model is built
    rope: RopeConfig = field(default_factory=RopeConfig)  # rotary position embedding
    # Indices, from 0, of layers whose q and k are not turned.
    no_rope_layers: list[NonNegativeInt] = field(default_factory=list)
    norm_eps: PositiveShare = 1e-5  # added to the mean square in RMSNorm
    # Of a block's input, or of what it adds to the residual stream.
    norm_position: Annotated[str, OneOf(("pre", "post"))] = "pre"
    # RMSNorm before RoPE, over each head, or over all heads at once.
    qk_norm: Annotated[str, OneOf(("none", "head", "width"))] = "none"
    qkv_bias: bool = False  # the projections to q, k and v have one
    tie_embeddings: bool = False  # the output head is the embedding table
    embedding_scale: PositiveFloat = 1.0  # factor of the embeddings
    residual_scale: PositiveFloat = 1.0  # factor of what a block adds to the residual stream
    logit_scale: PositiveFloat = 1.0  # factor of what the output head reads
    init_std: PositiveFloat = 0.02  # of the normal distribution that weights are drawn from
    embedding_init_std: PositiveFloat | None = None  # null = init_std

    def __post_init__(self):
        # What runs were configured with when one kind of QK-norm was all there was.
        self.qk_norm = {"True": "head", "False": "none"}.get(str(self.qk_norm), self.qk_norm)
        super().__post_init__()
        if self.num_heads % self.num_kv_heads:
            divisors = [n for n in range(1, min(self.num_heads, 256) + 1) if self.num_heads % n == 0]
            raise ValueError(
                f"model.num_heads={self.num_heads} is not a multiple of "
                f"model.num_kv_heads={self.num_kv_heads}: choose num_kv_heads among {divisors}"
            )
        for layer in self.no_rope_layers:
            if not 0 <= layer < self.num_layers:
                raise ValueError(f"model.no_rope_layers has {layer}: layers are 0 to {self.num_layers - 1}")
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim={self.head_dim} must be even: RoPE rotates pairs of channels")
        share, channels = self.rope.partial_rotary_factor, self.rotary_dim
        if share is not None and (channels % 2 or channels == 0):
            raise ValueError(
                f"model.rope.partial_rotary_factor={share} turns {channels} of model.head_dim={self.head_dim} "
                "channels: an even number of them is needed"
            )
        for name in ("short_factor", "long_factor"):
            factors = getattr(self.rope, name)
            if factors is not None and len(factors) != channels // 2:
                raise ValueError(
                    f"model.rope.{name} has {len(factors)} values: it needs one for each of {channels // 2} pairs of "
                    "channels that are turned"
                )
        original = self.rope.original_max_seq_len
        if self.rope.scaling == "longrope" and self.rope.factor is None and self.max_seq_len < original:
            raise ValueError(
                f"model.max_seq_len={self.max_seq_len} is below model.rope.original_max_seq_len={original}: "
                "raise max_seq_len or set model.rope.factor"
            )

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that RoPE turns, or would turn without ``max_period``."""
        return int(self.head_dim * (self.rope.partial_rotary_factor or 1.0))
