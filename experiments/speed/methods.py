"""What the speed benchmark runs: this library's kernels; those they are compared with are in ``peers``.

A method prepares an ``Operation`` for one set of inputs. Whatever it needs is imported there, so that a missing
package costs that method only.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from dashattn import dash_attention, infllmv2_attention, nsa_attention
from dashattn.backends import BACKENDS as REGISTRY
from dashattn.backends import AttentionConfig, AttentionShape, build_backend
from dashattn.ops.block_scores.reference import topk_selection
from dashattn.ops.block_sparse import reference as attention_reference
from dashattn.ops.chunk_summary import reference as summary_reference
from dashattn.ops.compression.reference import compressed_attention, mean_compress
from dashattn.ops.dash_routing import reference as routing_reference
from dashattn.ops.gates.reference import gated_sum
from dashattn.ops.window.reference import window_attention
from dashattn.selection import Selection
from experiments.sparsity import Found, find_knob
from experiments.speed.inputs import SINK_CHUNKS, Problem, edge_distance, topk_sparsities, with_selection
from experiments.speed.rows import ATTENTION, ROUTING, WHOLE

SELECTED_ROWS, SELECTED_BLOCKS = "selected rows", "selected blocks"
# Share of (token, KV head) rows, or where there are few of them of blocks, that may be selected otherwise than by the
# reference.
SELECTION_TOLERANCE = 0.005
# Distance from the edge of the support (``inputs.edge_distance``) below which float32's scores do not say to three
# digits what the gradient of their logarithms is.
EDGE = 0.01


class UnavailableError(Exception):
    """A method that cannot run here; ``status`` stands in its row."""

    def __init__(self, status: str, detail: str):
        super().__init__(detail)
        self.status = status


def explain(error: Exception) -> tuple[str, str]:
    """(status, detail) of a row that has no time."""
    if isinstance(error, UnavailableError):
        return error.status, str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory", ""
    return "error", f"{type(error).__name__}: {str(error)[:300]}"


@dataclass(frozen=True)
class Operation:
    """A method on one set of inputs.

    Attributes:
        forward: the call that is timed.
        leaves: tensors to differentiate by, by name; empty: there is no backward.
        reference: what forward and gradients should be, on float32 copies, in the order output, ``leaves``; it takes
            the gradient of the output. None: the result is a selection and has no gradient.
        decided: rows of the output [1, T, Hq, 1] whose gradients alone reach ``chunk_query`` when it is compared.
        selections: the kernel's selection and the reference's, where the method selects.
        alike: the reference attends to its own selection: compared are the rows that are selected as the kernel does.
        causal_sparsity: where it is not that of the problem's selection.
        router_scale: where it is not the problem's.
    """

    forward: Callable[[], Tensor | Selection]
    leaves: dict[str, Tensor]
    reference: Callable[[Tensor], list[Tensor]] | None = None
    decided: Callable[[], Tensor] | None = None
    selections: Callable[[], tuple[Selection, Selection]] | None = None
    alike: bool = False
    causal_sparsity: float | None = None
    router_scale: float | None = None

    def errors(self, grad: Tensor) -> dict[str, float]:
        """Relative RMS errors of output and gradients, and the share of rows selected otherwise."""
        errors, rows = {}, 1
        if self.selections is not None:
            kernel, reference = (s.words for s in self.selections())
            width = min(kernel.shape[-1], reference.shape[-1])
            differ = (kernel[..., :width] != reference[..., :width]).any(-1)
            errors[SELECTED_ROWS] = differ.float().mean().item()
            if self.alike:
                group = grad.shape[2] // differ.shape[1]
                rows = ~differ.transpose(1, 2).repeat_interleave(group, dim=2)[..., None]
                grad = grad * rows
        if self.reference is not None:
            results, expected = self.results(grad), self.reference(grad)
            results[0], expected[0] = results[0] * rows, expected[0] * rows
            for name, result, wanted in zip(["out", *self.leaves], results, expected, strict=True):
                errors[name] = relative_error(result, wanted)
            if self.leaves:  # without gradients, as the forward is timed, kernels may be others
                with torch.no_grad():
                    errors["out"] = max(errors["out"], relative_error(self.forward() * rows, expected[0]))
            if self.decided is not None:
                decided, place = grad * self.decided(), list(self.leaves).index("chunk_query") + 1
                result, wanted = self.results(decided)[place], self.reference(decided)[place]
                errors["chunk_query"] = relative_error(result, wanted)
        return errors

    def results(self, grad: Tensor) -> list[Tensor]:
        """Output and gradients."""
        if not self.leaves:
            with torch.no_grad():
                return [self.forward()]
        out = self.forward()
        return [out.detach(), *torch.autograd.grad(out, list(self.leaves.values()), grad)]


@dataclass(frozen=True)
class Method:
    """A line of the table."""

    name: str
    stage: str  # attention | routing | whole | dense
    prepare: Callable[[Problem], Operation]


def relative_error(result: Tensor, expected: Tensor) -> float:
    """RMS of the difference over RMS of what is expected; nan counts as infinite."""
    error = ((result.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-30)).item()
    return error if error == error else float("inf")


def leaves_of(problem: Problem, **more: Tensor) -> dict[str, Tensor]:
    tensors = {"q": problem.q, "k": problem.k, "v": problem.v, **more}
    return {name: x.detach().requires_grad_() for name, x in tensors.items()}


def on_copies(leaves: dict[str, Tensor], grad: Tensor, attend: Callable[..., Tensor]) -> list[Tensor]:
    """Output and gradients of ``attend`` on float32 copies of the leaves; ``grad``: of the output."""
    copies = [x.detach().float().requires_grad_() for x in leaves.values()]
    out = attend(*copies)
    return [out.detach(), *torch.autograd.grad(out, copies, grad.float())]


def _everything(problem: Problem) -> Selection:
    blocks = -(-problem.length // problem.shape.chunk_size)
    size = (1, problem.length, problem.shape.kv_heads, blocks)
    return Selection.from_mask(torch.ones(size, dtype=torch.bool, device=problem.q.device), problem.shape.chunk_size)


def given_selection(problem: Problem, attend: Callable[..., Tensor], selection: Selection | None) -> Operation:
    """``attend(q, k, v)`` against the reference over a selection (None: dense), forward and gradients."""
    leaves = leaves_of(problem)

    def reference(grad):
        given = _everything(problem) if selection is None else selection
        return on_copies(leaves, grad, lambda q, k, v: attention_reference.block_sparse_attention(q, k, v, given))

    return Operation(lambda: attend(*leaves.values()), leaves, reference)


def block_sparse(problem: Problem) -> Operation:
    """The block-sparse attention stage alone, the selection prepared."""
    from dashattn.ops.block_sparse.triton import block_sparse_attention

    selection = problem.selection
    return given_selection(problem, lambda q, k, v: block_sparse_attention(q, k, v, selection), selection)


def dash_options(problem: Problem) -> dict:
    sizes = {"chunk_size": problem.shape.chunk_size, "init_chunks": problem.init_chunks}
    return sizes | {"router_scale": problem.router_scale}


def dash_routing(problem: Problem, **changes) -> Operation:
    """Chunk summaries and selection, as a forward with a negligible prior does them. ``changes``: other options."""
    from dashattn.ops.chunk_summary.triton import chunk_summary
    from dashattn.ops.dash_routing.triton import dash_routing

    options = dash_options(problem) | changes | {"prior": "none"}

    def summarise():
        return chunk_summary(problem.k, problem.chunk_query, chunk_size=problem.shape.chunk_size)

    def forward():
        return dash_routing(problem.q, summarise(), **options)[0]

    def selections():
        return forward(), routing_reference.dash_routing(problem.q.float(), summarise(), **options)[0]

    return Operation(forward, {}, selections=selections)


def dash_whole(problem: Problem, **changes) -> Operation:
    """DashAttention: summaries, routing and attention with the tempered prior. ``changes``: other options."""
    size = problem.shape.chunk_size
    options = dash_options(problem) | changes
    leaves = leaves_of(problem, chunk_query=problem.chunk_query)
    route = dash_routing(problem, **changes)

    def forward():
        return dash_attention(*leaves.values(), impl="triton", **options)

    def attend_reference(q, k, v, chunk_query):
        summaries = summary_reference.chunk_summary(k, chunk_query, chunk_size=size)
        # rounding the summaries to k's dtype is part of the definition
        summaries = summaries + (summaries.to(problem.k.dtype).float() - summaries).detach()
        # A softmax's prior of every candidate: the kernels' selection may hold one that the reference's does not.
        _, bias = routing_reference.dash_routing(q, summaries, **options | {"topk": problem.length, "top_p": 1.0})
        return attention_reference.block_sparse_attention(q, k, v, route.forward(), bias)

    def reference(grad):
        return on_copies(leaves, grad, attend_reference)

    def decided():
        summaries = summary_reference.chunk_summary(problem.k, problem.chunk_query, chunk_size=size)
        distance = edge_distance(problem.q, summaries, problem.router_scale, size, problem.init_chunks)
        rows = (distance > EDGE).repeat_interleave(problem.shape.heads // problem.shape.kv_heads, dim=2)
        return rows[..., None]

    entmax = options.get("selector", "entmax") == "entmax"
    return Operation(forward, leaves, reference, decided if entmax else None, route.selections)


def with_sink(prepare: Callable[[Problem], Operation]) -> Callable[[Problem], Operation]:
    """The same with the first chunk forced, at the sparsity asked for."""

    def prepare_with_sink(problem: Problem) -> Operation:
        problem = with_selection(problem, SINK_CHUNKS)
        found = {"causal_sparsity": problem.causal_sparsity, "router_scale": problem.router_scale}
        return replace(prepare(problem), **found)

    return prepare_with_sink


def with_selector(prepare: Callable[..., Operation], name: str) -> Callable[[Problem], Operation]:
    """The same with the selector of a variant, at the sparsity asked for."""

    def prepare_with_selector(problem: Problem) -> Operation:
        config = variant(name, problem.shape.chunk_size)
        inputs = problem.q, problem.k, problem.v, problem.chunk_query

        def options(knob: float) -> dict:
            chosen = {"selector": config.selector, "prior": config.prior, "router_scale": config.router_scale}
            return chosen | {config.knob: knob}

        def sparsity(knob: float) -> float:
            size = problem.shape.chunk_size
            with torch.no_grad():
                _, stats = dash_attention(*inputs, chunk_size=size, return_stats=True, **options(knob))
            return float(stats.causal_sparsity())

        found = nearest_knob(sparsity, problem.target, config, problem.length)
        operation = prepare(problem, **options(found.knob))
        return replace(operation, causal_sparsity=found.sparsity, router_scale=config.router_scale)

    return prepare_with_selector


WINDOWS = {"kernel_size": 32, "kernel_stride": 16}


def nearest_topk(problem: Problem, forced: int) -> tuple[int, float]:
    """The top-k whose causal sparsity comes closest to the target, and that sparsity."""
    choices = [(k, s) for k, s in topk_sparsities(problem.length, problem.shape.chunk_size) if k > forced]
    if not choices:
        raise UnavailableError("impossible", f"the {forced} forced blocks are all that the sequence has")
    return min(choices, key=lambda choice: abs(choice[1] - problem.target))


def _top_blocks(problem: Problem, lse: Tensor | None, **blocks) -> tuple[Selection, Selection]:
    """The kernel's and the reference's selection by the mean-pooled keys."""
    from dashattn.ops.block_scores.triton import select_blocks

    compressed_k = mean_compress(problem.k, **WINDOWS)
    options = {**WINDOWS, "scale": problem.shape.head_dim**-0.5, "cu_seqlens": None}
    select = partial(topk_selection, **WINDOWS, **blocks)
    _, expected = compressed_attention(problem.q.float(), compressed_k.float(), None, select, **options)
    return select_blocks(problem.q, compressed_k, lse, **options, **blocks), expected[0]


def infllmv2_whole(problem: Problem) -> Operation:
    """InfLLM v2: stage 1 over mean-pooled keys, top-k and attention."""
    size = problem.shape.chunk_size
    window = 1024 // size
    topk, sparsity = nearest_topk(problem, window + 2)
    leaves = leaves_of(problem)

    def forward():
        return infllmv2_attention(
            *leaves.values(), block_size=size, window_size=window * size, topk=topk, impl="triton"
        )

    def selections():
        blocks = {"pooling": "max", "block_size": size, "topk": topk, "init_blocks": 1, "local_blocks": window + 1}
        return _top_blocks(problem, None, **blocks)

    def reference(grad):
        selection, _ = selections()
        return on_copies(leaves, grad, lambda q, k, v: attention_reference.block_sparse_attention(q, k, v, selection))

    return Operation(forward, leaves, reference, selections=selections, causal_sparsity=sparsity)


def nsa_whole(problem: Problem) -> Operation:
    """NSA's three branches; mean-pooled keys and values stand for the learned compression, gates are one half.

    The sparsity is that of the selected branch: its window of 512 keys is not counted.
    """
    size = problem.shape.chunk_size
    topk, sparsity = nearest_topk(problem, 3)
    scale = problem.shape.head_dim**-0.5
    compressed = [mean_compress(x, **WINDOWS) for x in (problem.k, problem.v)]
    gates = torch.full((*problem.q.shape[:3], 3), 0.5, dtype=problem.q.dtype, device=problem.q.device)
    leaves = leaves_of(problem, compressed_k=compressed[0], compressed_v=compressed[1], gates=gates)
    options = {"scale": scale, "cu_seqlens": None}

    def forward():
        return nsa_attention(*leaves.values(), block_size=size, topk=topk, impl="triton")

    def selections():
        from dashattn.ops.band import triton as band

        _, lse = band.compressed_attention(problem.q, *compressed, **WINDOWS, **options)
        blocks = {"pooling": "weighted", "block_size": size, "topk": topk, "init_blocks": 1, "local_blocks": 2}
        return _top_blocks(problem, lse, **blocks)

    def reference(grad):
        selection, _ = selections()

        def attend(q, k, v, compressed_k, compressed_v, gates):
            branches = [
                compressed_attention(q, compressed_k, compressed_v, lambda p: None, **WINDOWS, **options)[0],
                attention_reference.block_sparse_attention(q, k, v, selection),
                window_attention(q, k, v, window_size=512, scale=scale),
            ]
            return gated_sum(gates, branches)

        return on_copies(leaves, grad, attend)

    return Operation(forward, leaves, reference, selections=selections, causal_sparsity=sparsity)


def nearest_knob(sparsity: Callable[[float], float], target: float, config: AttentionConfig, length: int) -> Found:
    """The knob whose ``sparsity`` comes closest to the target at so many tokens.

    Raises:
        UnavailableError: more blocks are forced than there are.
    """
    dense, sparse = config.knob_span(length)
    start = getattr(config, config.knob)
    if isinstance(start, int):  # it counts blocks
        blocks = length // getattr(config, config.blocks)
        if sparse > blocks:
            raise UnavailableError("impossible", "the forced blocks are all that the sequence has")
        start = round((1 - target) * blocks)
    return find_knob(sparsity, target, (dense, sparse), min(max(start, min(dense, sparse)), max(dense, sparse)))


def module_whole(name: str, problem: Problem) -> Operation:
    """A backend of which nothing else is known: its module as it is built, its knob turned to the target.

    The reference is the same module without kernels, of the same type: what a router rounds is part of its definition,
    and float32 would break near ties otherwise. It makes its own selection, and the two are compared; so are outputs
    and gradients of what is selected alike, which are nearly all rows unless the selection fails its check.
    """
    shape, q = problem.shape, problem.q
    sizes = AttentionShape(shape.heads * shape.head_dim, shape.heads, shape.kv_heads, shape.head_dim)
    config = variant(name, shape.chunk_size)
    torch.manual_seed(0)
    backend = build_backend(config, sizes).to(q.device, q.dtype)
    exact = build_backend(replace(config, impl="reference"), sizes).to(q.device, q.dtype)
    exact.load_state_dict(backend.state_dict())
    hidden = torch.randn(*q.shape[:2], sizes.hidden_size, device=q.device).to(q.dtype)
    leaves = leaves_of(problem)

    def sparsity(knob: float) -> float:
        backend.set_knob(knob)
        with torch.no_grad():
            _, stats = backend(problem.q, problem.k, problem.v, hidden=hidden, return_stats=True)
        return float(stats.causal_sparsity())

    found = nearest_knob(sparsity, problem.target, config, problem.length)
    for module in (backend, exact):
        module.set_knob(found.knob)

    def selections():
        return tuple(blocks_read(problem, partial(module, hidden=hidden)) for module in (backend, exact))

    return Operation(
        lambda: backend(*leaves.values(), hidden=hidden),
        leaves,
        reference=Operation(lambda: exact(*leaves.values(), hidden=hidden), leaves).results,
        selections=selections,
        alike=True,
        causal_sparsity=found.sparsity,
    )


@torch.no_grad()
def blocks_read(problem: Problem, attend: Callable[..., Tensor]) -> Selection:
    """The blocks that ``attend(q, k, v)`` gives any weight, for each token and KV head.

    With values that name their block, channel by channel, the output is the weight of each block: what was read is seen
    without a word from the router.
    """
    size, (kv_heads, channels) = problem.shape.chunk_size, problem.v.shape[2:]
    block = torch.arange(problem.length, device=problem.v.device) // size
    masks = []
    for first in range(0, -(-problem.length // size), channels):
        names = block[:, None] == first + torch.arange(channels, device=block.device)
        values = names[None, :, None].expand_as(problem.v).to(problem.v.dtype).contiguous()
        weights = attend(problem.q, problem.k, values)
        masks.append((weights != 0).unflatten(2, (kv_heads, -1)).any(3))
    return Selection.from_mask(torch.cat(masks, dim=-1), size)


_DASH_STAGES = ((ROUTING, dash_routing), (WHOLE, dash_whole))
# What is known of a backend beside its module: operations of its own, and a reference given the kernels' selection.
OPERATIONS = {
    "dash": [
        Method("block-sparse", ATTENTION, block_sparse),
        Method("dash", ROUTING, dash_routing),
        Method("dash", WHOLE, dash_whole),
    ],
    "dash_sink": [Method("dash_sink", stage, with_sink(prepare)) for stage, prepare in _DASH_STAGES],
    **{
        name: [Method(name, stage, with_selector(prepare, name)) for stage, prepare in _DASH_STAGES]
        for name in ("dash_topk", "dash_topp")
    },
    "infllmv2": [Method("infllmv2", WHOLE, infllmv2_whole)],
    "nsa": [Method("nsa", WHOLE, nsa_whole)],
}
# The names that the configuration takes: every sparse variant in the registry.
BACKENDS = OPERATIONS | {
    name: [Method(name, WHOLE, partial(module_whole, name))]
    for kind, _ in REGISTRY.own.values()
    for name, config in kind.variants(64).items()
    if config.knob is not None and name not in OPERATIONS
}


def variant(name: str, chunk_size: int) -> AttentionConfig:
    """The configuration of a name of ``BACKENDS``, or of dense attention, at blocks of ``chunk_size`` keys."""
    kind = next(kind for kind, _ in REGISTRY.own.values() if name in kind.variants(64))
    return kind.variants(chunk_size)[name]
