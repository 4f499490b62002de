"""What transformers' masks and position_ids say of rows: where their tokens stand, and which documents they hold.

Shapes: B rows, T tokens of the query, S keys.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dashattn.checks import check


def rows(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    **_,
) -> Tensor | None:
    """What transformers hands to every layer as its mask: int64 [B, 1, 1, 3], of each row the columns of its first
    token, behind its last one, and of the first new one; None where rows are whole and end with the keys.

    A mask of four dimensions is made by transformers only once; those of others are never int64.
    """
    new = int(q_offset)
    end = new + q_length
    check(kv_offset == 0, "the cache has dropped keys that left a sliding window: set config.sliding_window=None")
    check(not use_vmap, "mask functions of one's own are not computed: choose attn_implementation='sdpa'")
    if attention_mask is None:
        if end == kv_length:
            return None
        return torch.tensor([0, end, new]).expand(batch_size, 1, 1, 3)
    check(
        attention_mask.shape == (batch_size, attention_mask.shape[1]) and attention_mask.shape[1] >= end,
        f"attention_mask must have a column for each of {end} tokens, cached ones too; got "
        f"{tuple(attention_mask.shape)}",
    )
    mask_BS = attention_mask[:, :end].long()
    start_B = mask_BS.argmax(1)
    stop_B = start_B + mask_BS.sum(1)
    column_S = torch.arange(end, device=mask_BS.device)
    check(
        torch.equal(mask_BS.bool(), (column_S >= start_B[:, None]) & (column_S < stop_B[:, None])),
        "attention_mask has holes between a row's tokens: pad prompts on the left (tokenizer.padding_side='left')",
    )
    if end == kv_length and bool(mask_BS.all()):
        return None
    return torch.stack([start_B, stop_B, torch.full_like(start_B, new)], 1)[:, None, None]


def documents(position_BT: Tensor, options: dict) -> Tensor | None:
    """cu_seqlens of all rows behind one another; None where each row is one document."""
    begins_BT = F.pad(position_BT.diff(dim=1) != 1, (1, 0), value=True)
    if int(begins_BT.sum()) == len(begins_BT):
        return None
    check(
        not options.get("use_cache", True),
        "position_ids start anew within a row, and packed documents cannot be continued: pass use_cache=False, or "
        "consecutive position_ids",
    )
    ends = torch.tensor([begins_BT.numel()], device=begins_BT.device)
    return torch.cat([begins_BT.flatten().nonzero()[:, 0], ends]).int()


def check_positions(position_BT: Tensor, rows_B3: Tensor, *, learned: bool) -> None:
    """Refuses packed documents beside padding or a cache, and positions that count padding where something ``learned``
    reads turned keys, which are others then."""
    start_B1, stop_B1, new_B1 = rows_B3.split(1, dim=1)
    column_BT = new_B1 + torch.arange(position_BT.shape[1], device=position_BT.device)
    is_own_BT = (column_BT >= start_B1) & (column_BT < stop_B1)
    shift_BT = column_BT - position_BT
    follows = ((shift_BT == 0) | ~is_own_BT).all(1) | ((shift_BT == start_B1) | ~is_own_BT).all(1)
    check(
        bool(follows.all()),
        "position_ids must count on from 0, padding included or not, in rows that are padded or cached: give packed "
        "documents without either, with use_cache=False",
    )
    check(
        not learned or bool(((shift_BT == start_B1) | ~is_own_BT).all()),
        "an export's learned parameters tell padded rows from others by position_ids that count the padding: pass "
        "position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0)",
    )
