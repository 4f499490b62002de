"""Decoder-only language models around the attention backends of ``dashattn``."""

from models.config import ModelConfig, RopeConfig
from models.transformer import ModelOutput, Transformer

__all__ = ["ModelConfig", "ModelOutput", "RopeConfig", "Transformer"]
