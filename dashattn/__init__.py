"""Block-sparse attention backends with one interface: full, DashAttention, InfLLM v2 and NSA."""

from dashattn.functional import dash_attention, full_attention, infllmv2_attention, nsa_attention
from dashattn.stats import AttentionStats, causal_sparsity, paper_sparsity

__version__ = "0.2.0"

__all__ = [
    "AttentionStats",
    "causal_sparsity",
    "dash_attention",
    "full_attention",
    "infllmv2_attention",
    "nsa_attention",
    "paper_sparsity",
]
