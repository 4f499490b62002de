"""Documents packed into rows of equal length.

The documents of a split, each opened by the token that begins one, if there is such a token, and closed by the
end-of-document token, form one stream of tokens; row i is its tokens ``[i * seq_len, (i + 1) * seq_len)``. A document
that does not fit continues in the next row, as a segment of its own: attention and positions start afresh there. The
target of a row's last token is still the document's next token, so every token but the first of each document is a
target exactly once. The last token of a document has no target. The last row of a split is filled up with
end-of-document tokens that are no targets.
"""

from typing import NamedTuple

import numpy as np
import torch

from data.batch import IGNORE, Batch


class Row(NamedTuple):
    tokens: np.ndarray  # int64 [seq_len]
    labels: np.ndarray  # int64 [seq_len]
    starts: np.ndarray  # int64 [segments], where a segment begins; the first is 0


def cut_row(tokens: np.ndarray, ends: np.ndarray, seq_len: int, eos_id: int) -> Row:
    """A row of a stream of documents.

    Args:
        tokens: integers [1 ... seq_len + 1], the row's tokens and the one that follows; fewer at the stream's end.
        ends: int64, increasing in [1, seq_len + 1]: the distances from the row's start at which documents end.
    """
    size = min(len(tokens), seq_len)
    assert size > 0, "a row begins inside the stream"
    row_tokens = np.full(seq_len, eos_id, dtype=np.int64)
    row_tokens[:size] = tokens[:size]
    labels = np.full(seq_len, IGNORE, dtype=np.int64)
    labels[: len(tokens) - 1] = tokens[1:]
    # A document's last token has no target; the next document begins after it if the row goes on.
    boundaries = ends[ends <= size]
    labels[boundaries - 1] = IGNORE
    starts = np.concatenate([np.zeros(1, np.int64), boundaries[boundaries < seq_len]])
    return Row(row_tokens, labels, starts)


def positions(starts: np.ndarray, length: int) -> np.ndarray:
    """int64 [length]: distance of each token from the start of its segment."""
    return np.arange(length) - np.repeat(starts, np.diff(starts, append=length))


def collate(rows: list[Row], pack: str) -> Batch:
    """``documents``: one packed row of B = 1, T = rows * seq_len with cu_seqlens. ``plain``: B = rows, no
    boundaries."""
    seq_len = len(rows[0].tokens)
    tokens = np.stack([row.tokens for row in rows])
    labels = np.stack([row.labels for row in rows])
    if pack == "plain":
        position_ids = np.broadcast_to(np.arange(seq_len), tokens.shape).copy()
        return Batch(torch.from_numpy(tokens), torch.from_numpy(labels), torch.from_numpy(position_ids))
    starts = np.concatenate([row.starts + index * seq_len for index, row in enumerate(rows)])
    boundaries = np.append(starts, tokens.size)
    return Batch(
        input_ids=torch.from_numpy(tokens.reshape(1, -1)),
        labels=torch.from_numpy(labels.reshape(1, -1)),
        position_ids=torch.from_numpy(positions(starts, tokens.size)[None]),
        cu_seqlens=torch.from_numpy(boundaries.astype(np.int32)),
        max_seqlen=int(np.diff(boundaries).max()),
    )
