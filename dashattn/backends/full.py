"""Dense attention, the control."""

from dataclasses import dataclass

from dashattn.backends.base import ALL_HEADS, AttentionBackend
from dashattn.backends.options import AttentionConfig
from dashattn.fields import Line
from dashattn.functional import full_attention


@dataclass
class FullConfig(AttentionConfig):
    """Dense causal attention; no options."""

    name: Line = "full"


class FullBackend(AttentionBackend):
    """Exact causal softmax attention; no parameters."""

    takes_max_seqlen = True

    def forward(
        self,
        q,
        k,
        v,
        *,
        hidden=None,
        rope=None,
        cu_seqlens=None,
        max_seqlen=None,
        return_stats=False,
        share=ALL_HEADS,
    ):
        documents = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
        return full_attention(q, k, v, **documents, impl=self.config.impl, return_stats=return_stats)

    @property
    def block_size(self):
        return 64

    def _attend(self, q, cache, hidden, operations):
        return operations.cached_attention(q, cache["k"], cache["v"], cache.lengths)
