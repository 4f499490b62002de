"""Attention to what an earlier layer selected: ``share_selection_from`` of ``dashattn.backends.layers``.

Selections that several layers use are found in neighbouring layers of trained models (TidalDecode, arXiv 2410.05076;
IndexCache, arXiv 2603.12201). There the later layers take blocks alone; here they take the router's bias with them,
without which DashAttention's prior would be another one in every layer.
"""

from dataclasses import replace

from dashattn.backends.base import ALL_HEADS, AttentionBackend
from dashattn.backends.options import AttentionConfig
from dashattn.functional import unsupported_priors
from dashattn.selected import selected_attention
from dashattn.selection import Selection


class SharingBackend(AttentionBackend):
    """Attends to what layer ``source`` returned as ``Chosen``, which ``forward`` and ``decode`` take as ``taken``.

    No parameters, nothing in the cache beside keys and values, and no routing reads. ``config`` is the source's, knob
    included, which turns what the source selects.
    """

    def __init__(self, config: AttentionConfig, shape, source: int):
        if unsupported_priors(getattr(config, "prior_heads", "group")):
            config = replace(config, impl="reference")  # as the source, which has told who asked for kernels
        super().__init__(config, shape)
        self.source = source

    def forward(self, q, k, v, *, taken, hidden=None, rope=None, cu_seqlens=None, return_stats=False, share=ALL_HEADS):
        call = {"cu_seqlens": cu_seqlens, "impl": self.config.impl, "return_stats": return_stats}
        return selected_attention(q, k, v, Selection(taken.words, self.block_size), taken.bias, **call)

    @property
    def block_size(self):
        return getattr(self.config, self.config.blocks)

    def summaries_scored(self, length):
        return 0.0
