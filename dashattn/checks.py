"""Argument checks of the public functions. Every refusal says what was given and what is allowed."""

import torch
from torch import Tensor

from dashattn.fields import NON_NEGATIVE_INT, POSITIVE, POSITIVE_INT
from dashattn.ops.block_scores.reference import POOLINGS
from dashattn.ops.dash_routing.reference import PRIOR_HEADS, PRIORS, SELECTORS
from dashattn.ops.entmax.reference import MAX_ALPHA, MIN_ALPHA
from dashattn.ops.indexer.reference import POOLINGS as INDEX_POOLINGS

SELECTS = ("topk", "top_p")
INDEX_SELECTORS = ("topk", "topp")
INDEX_GRADIENTS = ("kl", "prior")
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
ALPHA_RANGE = f"alpha must lie in [{MIN_ALPHA}, {MAX_ALPHA}]"


def check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    check(value in allowed, f"{name} must be one of {', '.join(allowed)}; got {value!r}")


# The message is made only when a number is refused: torch.compile cannot format one that it keeps symbolic.


def check_positive_int(**values: int) -> None:
    for name, value in values.items():
        POSITIVE_INT.check(name, value)


def check_non_negative_int(**values: int) -> None:
    for name, value in values.items():
        NON_NEGATIVE_INT.check(name, value)


def check_positive(**values: float) -> None:
    for name, value in values.items():
        POSITIVE.check(name, value)


def knob_value(name: str, value: float | Tensor) -> float | None:
    """A knob of the router as a number; None where torch.compile keeps it symbolic: it was checked where it was set."""
    if not isinstance(value, Tensor):
        return value
    check(
        value.ndim == 0 and value.device.type == "cpu" and value.dtype == torch.float64,
        f"a {name} that is a tensor must be float64 [] on the CPU; got {value.dtype} {tuple(value.shape)} on "
        f"{value.device}",
    )
    return None if torch.compiler.is_compiling() else value.item()


def check_alpha(alpha: float | Tensor, num_heads: int | None = None) -> None:
    """Values of a tensor on a GPU are checked there, and nobody waits: outside the range CUDA stops with an error."""
    if isinstance(alpha, Tensor):
        check(
            alpha.ndim == 0 or (alpha.ndim == 1 and alpha.shape[0] == num_heads),
            f"alpha must be a float or have one entry per query head ({num_heads}); got shape {tuple(alpha.shape)}",
        )
        values = alpha.detach().float()  # the float32 next to 1.01 lies below it
        inside = (values.clamp(MIN_ALPHA, MAX_ALPHA) == values).all()
        if alpha.device.type == "cpu" and not torch.compiler.is_compiling():
            check(bool(inside), f"{ALPHA_RANGE}; got {alpha.tolist()}")
        else:
            torch._assert_async(inside, ALPHA_RANGE)
    elif not MIN_ALPHA <= alpha <= MAX_ALPHA:
        raise ValueError(f"{ALPHA_RANGE}; got {alpha}")


def check_like(name: str, x: Tensor, q: Tensor) -> None:
    if x.device != q.device:
        raise ValueError(f"{name} is on {x.device}, q on {q.device}; move them to one device")
    if x.dtype != q.dtype:
        raise ValueError(f"{name} is {x.dtype}, q is {q.dtype}; cast them to one dtype")


def check_qkv(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> None:
    """Messages are made where something is refused only: short calls are as long as the host takes."""
    q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
    for name, x, shape in (("q", q, q_shape), ("k", k, k_shape), ("v", v, v_shape)):
        if len(shape) != 4:
            raise ValueError(f"{name} must have 4 dimensions [B, T, heads, D]; got shape {tuple(shape)}")
        if 0 in shape:
            raise ValueError(f"{name} must not be empty; got shape {tuple(shape)}")
        if x is not q:
            check_like(name, x, q)
    if q.dtype not in FLOAT_DTYPES:
        raise ValueError(f"q, k and v must be bf16, fp16, fp32 or fp64; got {q.dtype}")
    if k_shape != v_shape:
        raise ValueError(f"k and v must have one shape; got {tuple(k_shape)} and {tuple(v_shape)}")
    batch, length, heads, dim = q_shape
    kv_batch, kv_length, kv_heads, kv_dim = k_shape
    if (batch, length, dim) != (kv_batch, kv_length, kv_dim):
        raise ValueError(
            f"q and k must agree in batch, length and head size; got {tuple(q_shape)} and {tuple(k_shape)}"
        )
    if heads % kv_heads:
        raise ValueError(
            f"the number of query heads must be a multiple of the number of KV heads; got {heads} and {kv_heads}"
        )
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, q)


def check_max_seqlen(max_seqlen: int, cu_seqlens: Tensor | None) -> None:
    """On a GPU it is checked there, and nobody waits: below the longest document CUDA stops with an error."""
    check(cu_seqlens is not None, "max_seqlen is the length of the longest packed document: pass cu_seqlens, too")
    lengths = cu_seqlens.diff()
    is_bound = (lengths <= max_seqlen).all()
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        check(bool(is_bound), f"max_seqlen={max_seqlen} is below the length of a document, {lengths.tolist()}")
    else:
        torch._assert_async(is_bound, "max_seqlen is below the length of a document")


def check_cu_seqlens(cu_seqlens: Tensor, q: Tensor) -> None:
    check(q.shape[0] == 1, f"cu_seqlens packs the documents of one row: B must be 1; got {q.shape[0]}")
    check(
        cu_seqlens.dtype == torch.int32 and cu_seqlens.ndim == 1 and len(cu_seqlens) >= 2,
        f"cu_seqlens must be int32 [N + 1]; got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}",
    )
    check(cu_seqlens.device == q.device, f"cu_seqlens is on {cu_seqlens.device}, q on {q.device}")
    if cu_seqlens.device.type == "cpu":  # on a GPU, reading the values would stall the stream
        check(
            cu_seqlens[0] == 0 and cu_seqlens[-1] == q.shape[1] and bool((cu_seqlens.diff() >= 0).all()),
            f"cu_seqlens must rise from 0 to T = {q.shape[1]}; got {cu_seqlens.tolist()}",
        )


def check_shape(name: str, x: Tensor, expected: tuple[int, ...]) -> None:
    check(tuple(x.shape) == expected, f"{name} must have shape {expected}; got {tuple(x.shape)}")


def check_windows(kernel_size: int, kernel_stride: int, block_size: int) -> None:
    """Windows of compressed keys against selection blocks (InfLLM v2, NSA)."""
    check_positive_int(kernel_size=kernel_size, kernel_stride=kernel_stride, block_size=block_size)
    check(
        kernel_size % kernel_stride == 0 and block_size % kernel_stride == 0,
        "kernel_size and block_size must be multiples of kernel_stride; "
        f"got {kernel_size}, {block_size} and {kernel_stride}",
    )


def check_topk(topk: int, init_blocks: int, local_blocks: int, mend: str) -> None:
    check_positive_int(topk=topk)
    check_non_negative_int(init_blocks=init_blocks)
    forced = init_blocks + local_blocks
    check(
        topk >= forced,
        f"topk counts the forced blocks too: topk {topk} < {forced} ({init_blocks} initial, {local_blocks} local "
        f"with the token's own); {mend}",
    )


def check_dash(
    chunk_size, selector, router_scale, topk, top_p, prior, sigma, prior_heads, init_chunks, local_chunks
) -> None:
    """Options of DashAttention but for alpha, for the function and its config alike."""
    check_positive_int(chunk_size=chunk_size)
    check_choice("selector", selector, SELECTORS)
    check_choice("prior", prior, PRIORS)
    check_positive(sigma=sigma)
    check_choice("prior_heads", prior_heads, PRIOR_HEADS)
    check(
        prior != "mass" or prior_heads == "group",
        f"prior=mass has the scores of every query head for itself, and no prior_heads={prior_heads}: set "
        "prior_heads=group",
    )
    check_non_negative_int(init_chunks=init_chunks, local_chunks=local_chunks)
    router_scale, top_p = knob_value("router_scale", router_scale), knob_value("top_p", top_p)
    if router_scale is not None:
        check_positive(router_scale=router_scale)
    if top_p is not None:
        check_top_p(top_p)
    moving, topk = isinstance(topk, Tensor), knob_value("topk", topk)
    if topk is not None:
        topk = int(topk) if moving and topk.is_integer() else topk
        forced = (init_chunks, local_chunks + 1) if selector == "topk" else (0, 0)
        check_topk(topk, *forced, "raise topk or lower init_chunks or local_chunks")


def check_infllmv2(block_size, kernel_size, kernel_stride, topk, init_blocks, window_size) -> None:
    """Sizes of InfLLM v2, for the function and its config alike."""
    check_windows(kernel_size, kernel_stride, block_size)
    check_non_negative_int(window_size=window_size)
    check(
        window_size % block_size == 0,
        f"window_size must be a multiple of block_size ({block_size}); got {window_size}",
    )
    check_topk(topk, init_blocks, window_size // block_size + 1, "raise topk or shrink window_size")


def check_nsa(pooling, block_size, kernel_size, kernel_stride, topk, init_blocks, local_blocks, window_size) -> None:
    """Sizes of NSA, for the function and its config alike."""
    check_choice("pooling", pooling, POOLINGS)
    check_windows(kernel_size, kernel_stride, block_size)
    check_non_negative_int(window_size=window_size)
    check_positive_int(local_blocks=local_blocks)
    check_topk(topk, init_blocks, local_blocks, "raise topk or force fewer blocks")


def check_forced(block_size: int, init_blocks: int, local_blocks: int) -> None:
    """ValueError for sizes that no selection can have."""
    check_positive_int(block_size=block_size)
    check_non_negative_int(init_blocks=init_blocks, local_blocks=local_blocks)


def check_oracle(select: str, topk: int, top_p: float, block_size: int, init_blocks: int, local_blocks: int) -> None:
    """ValueError for options that ``oracle_attention`` cannot have."""
    check_forced(block_size, init_blocks, local_blocks)
    check_choice("select", select, SELECTS)
    check_positive_int(topk=topk)
    forced = init_blocks + local_blocks + 1
    check(
        select != "topk" or topk >= forced,
        f"topk={topk} is below the {forced} forced blocks: raise topk, or lower init_blocks or local_blocks",
    )
    check_top_p(top_p)


def check_top_p(top_p: float) -> None:
    if not isinstance(top_p, int | float) or isinstance(top_p, bool) or not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1]; got {top_p!r}")


def check_indexer(
    block_size: int,
    index_pooling: str,
    selector: str,
    topk: int,
    top_p: float,
    init_blocks: int,
    local_blocks: int,
    gradient: str,
) -> None:
    """ValueError for options that ``indexer_attention`` cannot have."""
    check_forced(block_size, init_blocks, local_blocks)
    check_choice("index_pooling", index_pooling, INDEX_POOLINGS)
    check_choice("selector", selector, INDEX_SELECTORS)
    check_choice("gradient", gradient, INDEX_GRADIENTS)
    if selector == "topk":
        check_topk(topk, init_blocks, local_blocks + 1, "raise topk or force fewer blocks")
    check_top_p(top_p)
