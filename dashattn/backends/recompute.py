"""Decoding by attending anew from every token: for backends that keep nothing but what ``forward`` takes.

The definition of decoding, at O(T^2) and more a token. Shapes: B sequences, T new tokens, D head size.
"""

from torch import Tensor

from dashattn.cache import CacheField, CacheLayout, LayerCache
from dashattn.functional import Output
from dashattn.ops.decode.reference import new_positions


def recompute_layout(num_heads: int, num_kv_heads: int, head_dim: int, hidden_size: int) -> CacheLayout:
    """All that ``forward`` is given for a token."""
    keys, table = CacheField(num_kv_heads, head_dim), CacheField(1, head_dim, table=True)
    fields = {"q": CacheField(num_heads, head_dim), "k": keys, "v": keys, "hidden": CacheField(1, hidden_size)}
    return CacheLayout(1, {**fields, "cos": table, "sin": table})


def recompute(
    forward,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: LayerCache,
    hidden: Tensor | None,
    rope: tuple[Tensor, Tensor] | None,
    *,
    return_stats: bool = False,
) -> Output:
    """Writes new tokens, and attends from all that are there. Arguments and result as of ``AttentionBackend.decode``.

    Args:
        forward: that of the backend; what it returns for a token may depend on this and earlier ones alone.
    """
    new = {"q": q, "k": k, "v": v}
    if hidden is not None:
        new["hidden"] = hidden[:, :, None]
    if rope is not None:
        new |= {name: table[:, :, None] for name, table in zip(("cos", "sin"), rope, strict=True)}
    cache.write(**new)
    longest = max(cache.sequences.host_lengths) + q.shape[1]
    seen = {name: cache[name][:, :longest] for name in new}  # behind a shorter row stands what none of its tokens sees
    result = forward(
        *(seen[name] for name in "qkv"),
        hidden=None if hidden is None else seen["hidden"][:, :, 0],
        rope=None if rope is None else (seen["cos"][:, :, 0], seen["sin"][:, :, 0]),
        return_stats=return_stats,
    )
    out, stats = result if return_stats else (result, None)
    out = out.take_along_dim(new_positions(cache.lengths, q.shape[1])[:, :, None, None], 1)
    return (out, stats) if return_stats else out
