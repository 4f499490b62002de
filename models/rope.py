"""Rotary position embedding: tables of cosines and sines for ``dashattn.rope.apply_rope``.

T tokens, D head size, R channels that are turned. Channel i turns together with channel i + D/2 (the "rotate half"
convention of Llama checkpoints). Pairs that are not turned, by ``partial_rotary_factor`` all from R/2 on, have a cosine
of 1 and a sine of 0, so that whoever turns, or turns back, need not know of them. Everything is computed in float32
from the configuration at each call: a buffer would be rounded when the model is cast to bfloat16.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from models.config import ModelConfig


def rope_tables(
    config: ModelConfig, position_ids: Tensor, cu_seqlens: Tensor | None = None, *, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(cos, sin), float32, each [..., T, D] for integer ``position_ids`` [..., T].

    ``cu_seqlens`` and ``lengths`` matter to longrope only, whose factors depend on the length of the sequence a token
    belongs to: each sequence chooses for itself, as it would alone.

    Args:
        cu_seqlens: int32 [N + 1], boundaries of packed documents; None = each row is a sequence.
        lengths: integer [B], tokens of each row without the padding at its end; None = rows have none.
    """
    positions = position_ids[..., None].float()
    angles = positions * inverse_frequencies(config, device=position_ids.device)
    if config.rope.scaling == "longrope":
        if cu_seqlens is not None:
            document_lengths = cu_seqlens.diff()
            lengths = document_lengths.repeat_interleave(document_lengths, output_size=position_ids.shape[-1])
        elif lengths is not None:
            lengths = lengths[:, None]
        else:
            lengths = position_ids.amax(-1, keepdim=True) + 1
        long_angles = positions * inverse_frequencies(config, long=True, device=position_ids.device)
        angles = torch.where((lengths > config.rope.original_max_seq_len)[..., None], long_angles, angles)
    scale, rest = attention_factor(config), (0, (config.head_dim - config.rotary_dim) // 2)
    cos, sin = F.pad(angles.cos() * scale, rest, value=1.0), F.pad(angles.sin() * scale, rest)
    return torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)


def no_rotation(rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Tables of the same shape as ``rope`` that leave q and k as they are."""
    cos, sin = rope
    return torch.ones_like(cos), torch.zeros_like(sin)


def inverse_frequencies(config: ModelConfig, *, long: bool = False, device=None) -> Tensor:
    """Radians per token of each channel pair, float32 [R/2]. ``long``: longrope's second list."""
    rope, rotary_dim = config.rope, config.rotary_dim
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=device) / rotary_dim
    frequencies = rope.theta**-exponents
    if rope.max_period is not None:
        return torch.where(2 * math.pi / frequencies <= rope.max_period, frequencies, 0.0)
    if rope.scaling == "linear":
        return frequencies / rope.factor
    if rope.scaling == "longrope":
        factors = rope.long_factor if long else rope.short_factor
        return frequencies / torch.tensor(factors, dtype=torch.float32, device=device)
    if rope.scaling == "llama3":
        # Pairs that turn often within the original length stay; those that turn rarely slow down by ``factor``.
        rotations = rope.original_max_seq_len * frequencies / (2 * math.pi)
        kept = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        return torch.lerp(frequencies / rope.factor, frequencies, kept.clamp(0, 1))
    if rope.scaling == "yarn":
        # The same idea, linear in the pair's index between those that turn beta_fast and beta_slow times.
        low = max(math.floor(_pair_turning(config, rope.beta_fast or 32.0)), 0)
        high = min(math.ceil(_pair_turning(config, rope.beta_slow or 1.0)), rotary_dim - 1)
        index = torch.arange(rotary_dim // 2, dtype=torch.float32, device=device)
        slowed = ((index - low) / ((high - low) or 1e-3)).clamp(0, 1)  # as transformers, also where high is below low
        return torch.lerp(frequencies, frequencies / _extension(config), slowed)
    return frequencies


def attention_factor(config: ModelConfig) -> float:
    """What cos and sin are multiplied by, so that attention keeps its temperature over a longer context."""
    rope = config.rope
    if rope.scaling not in ("yarn", "longrope"):
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    log_extension = math.log(max(_extension(config), 1.0))
    if rope.scaling == "yarn":  # arXiv 2309.00071, section 3.4
        return 1 + 0.1 * log_extension
    return math.sqrt(1 + log_extension / math.log(rope.original_max_seq_len))  # LongRoPE, as Phi-3 and MiniCPM use it


def _extension(config: ModelConfig) -> float:
    """How many times longer than in the first pretraining stage the context is."""
    return config.rope.factor or config.max_seq_len / config.rope.original_max_seq_len


def _pair_turning(config: ModelConfig, rotations: float) -> float:
    """Index (a real number) of the channel pair that turns ``rotations`` times within the original length."""
    wavelength = config.rope.original_max_seq_len / rotations
    return config.rotary_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(config.rope.theta))
