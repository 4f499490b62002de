"""Inputs of the speed benchmark: keys and queries of a known pattern, and the router scale that reaches a sparsity.

Shapes: T tokens, Hq query heads, H KV heads, G = Hq / H, D head size, C chunk size, n complete chunks, N chunks.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dashattn.ops.chunk_summary.reference import chunk_summary
from dashattn.ops.dash_routing.reference import candidate_chunks, chunk_scores
from dashattn.ops.entmax.reference import entmax
from dashattn.selection import Selection

# Share of a query that it has in common with the others of its 64 tokens and head.
PATTERNS = {"shared": 1.0, "clustered": 0.97, "iid": 0.0}
NEIGHBOURS = 64
KEY_NOISE = 0.7
SCALES = (0.05, 200.0)
SINK_CHUNKS = 1  # first chunks that dash_sink forces, as in configs/attention/dash_sink.yaml
_SAMPLE = 1024  # tokens that the bisection looks at
_ROWS = 1024  # tokens whose scores are held at a time


@dataclass(frozen=True)
class Shape:
    """Sizes and type of one attention layer."""

    heads: int
    kv_heads: int
    head_dim: int
    chunk_size: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Problem:
    """One set of inputs.

    Attributes:
        q, k, v: [1, T, Hq or H, D].
        grad: of the output, [1, T, Hq, D].
        chunk_query: zeros [H, D], float32: summaries are the means of the chunks.
        target: causal sparsity asked for; None for dense attention, and then the last three are None, too.
        init_chunks: first chunks that DashAttention forces.
        router_scale: reaches the target, or comes closest to it.
        selection: the chunks that the reference's router selects with it.
        causal_sparsity: of that selection.
    """

    shape: Shape
    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    chunk_query: Tensor
    target: float | None = None
    init_chunks: int = 0
    router_scale: float | None = None
    selection: Selection | None = None
    causal_sparsity: float | None = None

    @property
    def length(self) -> int:
        return self.q.shape[1]


def make_qkv(pattern: str, length: int, shape: Shape, seed: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Gaussian queries, keys and values.

    Keys are one vector per chunk plus 0.7 times noise. Queries are ``rho`` times one vector per 64 tokens and head plus
    ``sqrt(1 - rho ** 2)`` times noise, ``rho`` as in ``PATTERNS``.
    """
    generator = torch.Generator(device).manual_seed(seed)
    rho = PATTERNS[pattern]
    k = make_keys(generator, 1, length, shape)
    q = _grouped(generator, NEIGHBOURS, (1, length, shape.heads, shape.head_dim), rho, (1 - rho**2) ** 0.5)
    v = torch.randn(1, length, shape.kv_heads, shape.head_dim, generator=generator, device=device)
    return q.to(shape.dtype).contiguous(), k, v.to(shape.dtype)


def make_keys(generator: torch.Generator, batch: int, length: int, shape: Shape) -> Tensor:
    """The keys of ``make_qkv``, [batch, T, H, D]."""
    size = (batch, length, shape.kv_heads, shape.head_dim)
    return _grouped(generator, shape.chunk_size, size, 1.0, KEY_NOISE).to(shape.dtype).contiguous()


def _grouped(generator: torch.Generator, neighbours: int, size: tuple[int, ...], common: float, noise: float) -> Tensor:
    """[B, T, heads, D]: ``common`` times one Gaussian vector per ``neighbours`` tokens plus ``noise`` times noise."""
    batch, length, *rest = size
    groups = -(-length // neighbours)

    def gaussian(tokens: int) -> Tensor:
        return torch.randn(batch, groups, tokens, *rest, generator=generator, device=generator.device)

    return (common * gaussian(1) + noise * gaussian(neighbours)).flatten(1, 2)[:, :length]


def make_problem(
    pattern: str, length: int, target: float | None, shape: Shape, *, seed: int = 0, device: str = "cuda"
) -> Problem:
    """Inputs of a pattern; with a target also the router scale and the selection that come closest to it."""
    q, k, v = make_qkv(pattern, length, shape, seed, device)
    generator = torch.Generator(device).manual_seed(seed + 1)
    grad = torch.randn(q.shape, generator=generator, device=device).to(q.dtype)
    chunk_query = torch.zeros(shape.kv_heads, shape.head_dim, device=device)
    problem = Problem(shape, q, k, v, grad, chunk_query, target)
    return problem if target is None else with_selection(problem, init_chunks=0)


def with_selection(problem: Problem, init_chunks: int) -> Problem:
    """The problem with its first chunks forced, and the router scale that reaches the target then."""
    size = problem.shape.chunk_size
    summaries = chunk_summary(problem.k, problem.chunk_query, chunk_size=size)
    scale = find_router_scale(problem.q, summaries, problem.target, size, init_chunks)
    selection, sparsity = select_all(problem.q, summaries, scale, size, init_chunks)
    chosen = {"router_scale": scale, "selection": selection, "causal_sparsity": sparsity}
    return replace(problem, init_chunks=init_chunks, **chosen)


def select(
    q: Tensor, summaries: Tensor, router_scale: float, tokens: Tensor, chunk_size: int, init_chunks: int = 0
) -> Tensor:
    """What DashAttention's reference router (alpha 1.5) selects for some of the tokens: bool [t, H, N].

    The reference itself takes whole sequences, whose scores would not fit at 128k.
    """
    length, heads, head_dim = q.shape[1:]
    complete, kv_heads = summaries.shape[1:3]
    own = tokens // chunk_size
    chunk = torch.arange(complete, device=q.device)
    past = chunk < own[:, None]
    candidates = past & (chunk >= init_chunks)
    mask = torch.zeros(len(tokens), kv_heads, -(-length // chunk_size), dtype=torch.bool, device=q.device)
    group = heads // kv_heads
    for head in range(kv_heads):
        q_tGD = q[0, tokens, head * group : (head + 1) * group].float()
        scores = torch.einsum("tgd,nd->tgn", q_tGD, summaries[0, :, head].float()) * (router_scale * head_dim**-0.5)
        _, log_p = entmax(scores, 1.5, candidates[:, None])
        mask[:, head, :complete] = (log_p > -torch.inf).any(1) | (past & ~candidates)
    mask[torch.arange(len(tokens), device=q.device), :, own] = True
    return mask


def edge_distance(q: Tensor, summaries: Tensor, router_scale: float, chunk_size: int, init_chunks: int = 0) -> Tensor:
    """How far a token's candidates are from the edge of its group's support, [B, T, H]; inf without candidates.

    With z = s / 2 - tau, the square root of entmax's p (alpha 1.5), the least over the candidates of |highest z of the
    group|. The gradient of log p is 1 / z: within 1e-5 of the edge float32 does not know its first digit.
    """
    own = torch.arange(q.shape[1], device=q.device) // chunk_size
    candidates = candidate_chunks(own, summaries.shape[1], init_chunks, 0)[:, : summaries.shape[1]]
    scores = chunk_scores(q, summaries, router_scale).masked_fill(~candidates, -torch.inf)
    p, _ = entmax(scores, 1.5)
    z = (scores - scores.amax(-1, keepdim=True)) / 2 + p.amax(-1, keepdim=True).sqrt()
    return z.amax(2).abs().masked_fill(~candidates, torch.inf).amin(-1).transpose(1, 2)


def _active_tokens(mask: Tensor, tokens: Tensor, chunk_size: int) -> Tensor:
    """Keys read, [t, H]: whole past chunks, and the token's own one up to itself."""
    return (mask.sum(-1) - 1) * chunk_size + (tokens % chunk_size + 1)[:, None]


def causal_sparsity(mask: Tensor, tokens: Tensor, chunk_size: int) -> float:
    """1 - keys read / keys in the past, over the given tokens; ``mask`` holds their own chunks."""
    active = _active_tokens(mask, tokens, chunk_size).double().mean(1).sum()
    return 1 - (active / (tokens + 1).sum()).item()


def find_router_scale(q: Tensor, summaries: Tensor, target: float, chunk_size: int, init_chunks: int = 0) -> float:
    """Bisection, on a sample of the tokens; an end of ``SCALES`` where the target lies beyond it.

    Every head keeps one chunk at least, so short sequences do not get sparse with many independent heads.
    """
    length = q.shape[1]
    step = max(1, length // _SAMPLE)
    tokens = torch.arange(min(7, length - 1), length, step, device=q.device)

    def sparsity(scale: float) -> float:
        return causal_sparsity(select(q, summaries, scale, tokens, chunk_size, init_chunks), tokens, chunk_size)

    return bisect_scale(sparsity, target)


def bisect_scale(sparsity: Callable[[float], float], target: float) -> float:
    """The router scale within ``SCALES`` at which the sparsity, which grows with it, comes closest to the target."""
    low, high = SCALES
    for _ in range(18):
        middle = (low * high) ** 0.5
        if sparsity(middle) < target:
            low = middle
        else:
            high = middle
    return (low * high) ** 0.5


def select_all(
    q: Tensor, summaries: Tensor, router_scale: float, chunk_size: int, init_chunks: int = 0
) -> tuple[Selection, float]:
    """The selection of every token, and its causal sparsity."""
    length = q.shape[1]
    parts, active = [], 0.0
    for tokens in torch.arange(length, device=q.device).split(_ROWS):
        mask = select(q, summaries, router_scale, tokens, chunk_size, init_chunks)
        parts.append(Selection.from_mask(mask[None], chunk_size))
        active += _active_tokens(mask, tokens, chunk_size).double().mean(1).sum().item()
    return Selection.concatenate(parts), 1 - active / (length * (length + 1) / 2)


def topk_sparsities(length: int, block_size: int) -> Iterator[tuple[int, float]]:
    """(k, causal sparsity) of every token reading its own block and the k - 1 best ones of its past."""
    own = torch.arange(length) // block_size
    last = (torch.arange(length) % block_size + 1).sum().item()
    for topk in range(1, -(-length // block_size) + 1):
        active = own.clamp(max=topk - 1).sum().item() * block_size + last
        yield topk, 1 - active / (length * (length + 1) / 2)
