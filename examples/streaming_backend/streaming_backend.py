"""An attention from outside the tree: the first tokens of a document and the last ones before each token
(StreamingLLM, arXiv 2309.17453), in plain PyTorch.

    pip install --no-build-isolation --no-deps --editable examples/streaming_backend
    python train.py experiment=debug attention=streaming attention.window=64
    python train.py experiment=debug attention=streaming attention.target_sparsity=0.75

It keeps no cache: to generate, everything is attended from anew for each token, which is right, and slow.

Shapes: B rows, T tokens, S keys, H heads, D head size.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from dashattn.backends import ALL_HEADS, AttentionBackend, AttentionConfig, Capabilities
from dashattn.documents import document_positions
from dashattn.fields import Line, NonNegativeInt, PositiveInt
from dashattn.stats import AttentionStats


@dataclass
class StreamingConfig(AttentionConfig):
    """A window of tokens, and an attention sink."""

    name: Line = "streaming"  # as the entry point is called
    sink_tokens: NonNegativeInt = 4  # first tokens of a document, which all of its tokens read
    window: PositiveInt = 256  # last tokens that a token reads, itself included; the sparsity knob

    knob: ClassVar[str | None] = "window"

    def least_active(self, length):  # at a window of one token, for an early refusal of sparsities that cannot be had
        return (torch.arange(length) + 1).clamp(max=self.sink_tokens + 1)


class StreamingBackend(AttentionBackend):
    """No parameters, no routing, no cache."""

    capabilities = Capabilities(decode=False)

    def forward(self, q, k, v, *, hidden=None, rope=None, cu_seqlens=None, return_stats=False, share=ALL_HEADS):
        sink, window = self.config.sink_tokens, self.config.window
        position_BT = document_positions(cu_seqlens, *q.shape[:2], q.device)
        token_T, position_T = torch.arange(q.shape[1], device=q.device), position_BT[0]  # all rows have the same
        start_T = token_T - position_T  # of each token's document
        age_TS = token_T[:, None] - token_T
        is_own_TS = (age_TS >= 0) & (start_T[:, None] == start_T)
        is_read_TS = is_own_TS & ((age_TS < window) | (position_T < sink))
        q_BHTD, k_BHSD, v_BHSD = (x.transpose(1, 2) for x in (q, k, v))
        out_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHSD, v_BHSD, attn_mask=is_read_TS, enable_gqa=True)
        out_BTHD = out_BHTD.transpose(1, 2)
        if not return_stats:
            return out_BTHD
        seen_BT = position_BT + 1
        active_BT = seen_BT.clamp(max=window) + (seen_BT - window).clamp(0, sink)  # each key once
        active_BTH = active_BT[..., None].expand(-1, -1, k.shape[2])
        return out_BTHD, AttentionStats(active_BTH, position_BT, torch.zeros_like(position_BT))


BACKEND = (StreamingConfig, StreamingBackend)
