"""What the speed benchmark runs: this library's kernels and the ones they are compared with.

A method prepares an ``Operation`` for one set of inputs. Whatever it needs is imported there, so that a missing
package costs that method only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dashattn import dash_attention, infllmv2_attention, nsa_attention
from dashattn.ops.block_scores.reference import topk_selection
from dashattn.ops.block_sparse import reference as attention_reference
from dashattn.ops.chunk_summary import reference as summary_reference
from dashattn.ops.compression.reference import compressed_attention, mean_compress
from dashattn.ops.dash_routing import reference as routing_reference
from dashattn.ops.gates.reference import gated_sum
from dashattn.ops.window.reference import window_attention
from dashattn.selection import Selection
from experiments.speed_inputs import Problem, topk_sparsities
from experiments.speed_report import ATTENTION, CUDNN, DENSE, FLASH_3, ROUTING, WHOLE

SELECTED_ROWS = "selected rows"
# Share of (token, KV head) rows whose selection may differ from the reference's.
SELECTION_TOLERANCE = 0.005


class UnavailableError(Exception):
    """A method that cannot run here; ``status`` stands in its row."""

    def __init__(self, status: str, detail: str):
        super().__init__(detail)
        self.status = status


@dataclass(frozen=True)
class Operation:
    """A method on one set of inputs.

    Attributes:
        forward: the call that is timed.
        leaves: tensors to differentiate by, by name; empty: there is no backward.
        reference: what forward and gradients should be, on float32 copies, in the order output, ``leaves``.
            None: the result is a selection and has no gradient.
        selections: the kernel's selection and the reference's, where the method selects.
        causal_sparsity: where it is not that of the problem's selection.
    """

    forward: Callable[[], Tensor | Selection]
    leaves: dict[str, Tensor]
    reference: Callable[[], list[Tensor]] | None = None
    selections: Callable[[], tuple[Selection, Selection]] | None = None
    causal_sparsity: float | None = None

    def errors(self, grad: Tensor) -> dict[str, float]:
        """Relative RMS errors of output and gradients, and the share of rows selected otherwise."""
        errors = {}
        if self.selections is not None:
            kernel, reference = (s.words for s in self.selections())
            width = min(kernel.shape[-1], reference.shape[-1])
            differ = (kernel[..., :width] != reference[..., :width]).any(-1)
            errors[SELECTED_ROWS] = differ.float().mean().item()
        if self.reference is not None:
            results = self.results(grad)
            expected = self.reference()
            for name, result, wanted in zip(["out", *self.leaves], results, expected, strict=True):
                errors[name] = relative_error(result, wanted)
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


def _leaves(problem: Problem, **more: Tensor) -> dict[str, Tensor]:
    tensors = {"q": problem.q, "k": problem.k, "v": problem.v, **more}
    return {name: x.detach().requires_grad_() for name, x in tensors.items()}


def _reference(problem: Problem, leaves: dict[str, Tensor], attend: Callable[..., Tensor]) -> list[Tensor]:
    """Output and gradients of ``attend`` on float32 copies of the leaves."""
    copies = [x.detach().float().requires_grad_() for x in leaves.values()]
    out = attend(*copies)
    return [out.detach(), *torch.autograd.grad(out, copies, problem.grad.float())]


def _need(package: str) -> None:
    if find_spec(package) is None:
        raise UnavailableError("not installed", f"the package {package} is not installed")


def _everything(problem: Problem) -> Selection:
    blocks = -(-problem.length // problem.shape.chunk_size)
    size = (1, problem.length, problem.shape.kv_heads, blocks)
    return Selection.from_mask(torch.ones(size, dtype=torch.bool, device=problem.q.device), problem.shape.chunk_size)


def _given_selection(problem: Problem, attend: Callable[..., Tensor], selection: Selection | None) -> Operation:
    """``attend(q, k, v)`` against the reference over a selection (None: dense), forward and gradients."""
    leaves = _leaves(problem)

    def reference():
        given = _everything(problem) if selection is None else selection
        return _reference(problem, leaves, lambda q, k, v: attention_reference.block_sparse_attention(q, k, v, given))

    return Operation(lambda: attend(*leaves.values()), leaves, reference)


def block_sparse(problem: Problem) -> Operation:
    """The block-sparse attention stage alone, the selection prepared."""
    from dashattn.ops.block_sparse.triton import block_sparse_attention

    selection = problem.selection
    return _given_selection(problem, lambda q, k, v: block_sparse_attention(q, k, v, selection), selection)


def dash_routing(problem: Problem) -> Operation:
    """Chunk summaries and selection, as a forward with a negligible prior does them."""
    from dashattn.ops.chunk_summary.triton import chunk_summary
    from dashattn.ops.dash_routing.triton import dash_routing

    options = {"chunk_size": problem.shape.chunk_size, "router_scale": problem.router_scale, "prior": "none"}

    def summarise():
        return chunk_summary(problem.k, problem.chunk_query, chunk_size=problem.shape.chunk_size)

    def forward():
        return dash_routing(problem.q, summarise(), **options)[0]

    def selections():
        return forward(), routing_reference.dash_routing(problem.q.float(), summarise(), **options)[0]

    return Operation(forward, {}, selections=selections)


def dash_whole(problem: Problem) -> Operation:
    """DashAttention: summaries, routing and attention with the tempered prior."""
    size = problem.shape.chunk_size
    options = {"chunk_size": size, "router_scale": problem.router_scale}
    leaves = _leaves(problem, chunk_query=problem.chunk_query)
    route = dash_routing(problem)

    def forward():
        return dash_attention(*leaves.values(), impl="triton", **options)

    def attend_reference(q, k, v, chunk_query):
        summaries = summary_reference.chunk_summary(k, chunk_query, chunk_size=size)
        # rounding the summaries to k's dtype is part of the definition
        summaries = summaries + (summaries.to(problem.k.dtype).float() - summaries).detach()
        _, bias = routing_reference.dash_routing(q, summaries, **options)
        return attention_reference.block_sparse_attention(q, k, v, route.forward(), bias)

    def reference():
        return _reference(problem, leaves, attend_reference)

    return Operation(forward, leaves, reference, selections=route.selections)


WINDOWS = {"kernel_size": 32, "kernel_stride": 16}


def _topk(problem: Problem, forced: int) -> tuple[int, float]:
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
    topk, sparsity = _topk(problem, window + 2)
    leaves = _leaves(problem)

    def forward():
        return infllmv2_attention(
            *leaves.values(), block_size=size, window_size=window * size, topk=topk, impl="triton"
        )

    def selections():
        blocks = {"pooling": "max", "block_size": size, "topk": topk, "init_blocks": 1, "local_blocks": window + 1}
        return _top_blocks(problem, None, **blocks)

    def reference():
        selection, _ = selections()
        return _reference(
            problem, leaves, lambda q, k, v: attention_reference.block_sparse_attention(q, k, v, selection)
        )

    return Operation(forward, leaves, reference, selections, causal_sparsity=sparsity)


def nsa_whole(problem: Problem) -> Operation:
    """NSA's three branches; mean-pooled keys and values stand for the learned compression, gates are one half.

    The sparsity is that of the selected branch: its window of 512 keys is not counted.
    """
    size = problem.shape.chunk_size
    topk, sparsity = _topk(problem, 3)
    scale = problem.shape.head_dim**-0.5
    compressed = [mean_compress(x, **WINDOWS) for x in (problem.k, problem.v)]
    gates = torch.full((*problem.q.shape[:3], 3), 0.5, dtype=problem.q.dtype, device=problem.q.device)
    leaves = _leaves(problem, compressed_k=compressed[0], compressed_v=compressed[1], gates=gates)
    options = {"scale": scale, "cu_seqlens": None}

    def forward():
        return nsa_attention(*leaves.values(), block_size=size, topk=topk, impl="triton")

    def selections():
        from dashattn.ops.band import triton as band

        _, lse = band.compressed_attention(problem.q, *compressed, **WINDOWS, **options)
        blocks = {"pooling": "weighted", "block_size": size, "topk": topk, "init_blocks": 1, "local_blocks": 2}
        return _top_blocks(problem, lse, **blocks)

    def reference():
        selection, _ = selections()

        def attend(q, k, v, compressed_k, compressed_v, gates):
            branches = [
                compressed_attention(q, compressed_k, compressed_v, lambda p: None, **WINDOWS, **options)[0],
                attention_reference.block_sparse_attention(q, k, v, selection),
                window_attention(q, k, v, window_size=512, scale=scale),
            ]
            return gated_sum(gates, branches)

        return _reference(problem, leaves, attend)

    return Operation(forward, leaves, reference, selections, causal_sparsity=sparsity)


def _sdpa(backend: SDPBackend) -> Callable[[Problem], Operation]:
    def attend(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel([backend]):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2)

    return lambda problem: _given_selection(problem, attend, None)


def flash_attention_3(problem: Problem) -> Operation:
    """FlashAttention-3 for PyTorch."""
    _need("flash_attn_interface")
    from flash_attn_interface import flash_attn_func

    def attend(q, k, v):
        out = flash_attn_func(q, k, v, causal=True)
        return out[0] if isinstance(out, tuple) else out  # older releases return the log-normaliser, too

    return _given_selection(problem, attend, None)


def fla_nsa(problem: Problem) -> Operation:
    """The selected branch of flash-linear-attention's NSA, given our selection."""
    _need("fla")
    from fla.ops.nsa.parallel import parallel_nsa

    counts, indices = block_lists(problem.selection)
    most = indices.shape[-1]
    indices = F.pad(indices, (0, (1 << (most - 1).bit_length()) - most))  # its kernels take powers of two
    size = problem.shape.chunk_size

    def attend(q, k, v):
        return parallel_nsa(q=q, k=k, v=v, block_indices=indices, block_counts=counts, block_size=size)

    return _given_selection(problem, attend, problem.selection)


def xunhao_nsa(problem: Problem) -> Operation:
    """The selected branch of XunhaoLai's native-sparse-attention-triton, given our selection."""
    _need("native_sparse_attention")
    from native_sparse_attention.ops import topk_sparse_attention

    counts, indices = block_lists(problem.selection)
    padding = torch.arange(indices.shape[-1], device=indices.device) >= counts[..., None]
    topk = indices.masked_fill(padding, -1)[0].transpose(0, 1).int().contiguous()
    cu_seqlens = torch.tensor([0, problem.length], dtype=torch.int32, device=topk.device)
    size = problem.shape.chunk_size

    def attend(q, k, v):
        return topk_sparse_attention(q[0], k[0], v[0], topk, size, cu_seqlens)[None]

    return _given_selection(problem, attend, problem.selection)


def block_lists(selection: Selection) -> tuple[Tensor, Tensor]:
    """A selection as lists: counts int64 [B, T, H]; ascending blocks int64 [B, T, H, most], 0 past the count."""
    parts = []
    for words in selection.words.split(4096, dim=2):  # the sort below takes 8 bytes a block
        mask = Selection(words, selection.block_size).mask()
        order = mask.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices
        count = mask.sum(-1)
        order = order[..., : max(1, count.max())]
        inside = torch.arange(order.shape[-1], device=order.device) < count[..., None]
        parts.append((count, order.masked_fill(~inside, 0)))
    most = max(order.shape[-1] for _, order in parts)
    counts = torch.cat([count for count, _ in parts], dim=1)
    return counts, torch.cat([F.pad(order, (0, most - order.shape[-1])) for _, order in parts], dim=1)


def released_dash(problem: Problem) -> Operation:
    """The DashAttention authors' package: a forward without backward, with its own routing."""
    _need("dash_attn")
    precision = torch.get_float32_matmul_precision()
    import dash_attn
    from dash_attn import prefill

    torch.set_float32_matmul_precision(precision)  # their import lowers it, our references need all of float32
    size, chunks = problem.shape.chunk_size, -(-problem.length // problem.shape.chunk_size)
    model = dash_attn.dash_attn(
        chunk_size=size,
        enable_gqa=True,
        estimate_diagonal=True,
        scaling_factor=problem.router_scale,
        max_chunks=max(512, chunks + 1),
    )
    q, k, v = (x.transpose(1, 2).contiguous() for x in (problem.q, problem.k, problem.v))
    chunk_query = problem.chunk_query.to(q.dtype)

    def own_selection():
        summaries = prefill.summarize_chunk(k, chunk_query, size, None)
        words, _ = prefill.score_blocks(q * problem.router_scale, summaries, size, None, estimate_diag=True, sigma=1e6)
        return Selection(words, size)

    def reference():
        inputs = (x.float() for x in (problem.q, problem.k, problem.v))
        return [attention_reference.block_sparse_attention(*inputs, own_selection())]

    return Operation(lambda: model(q, k, v, chunk_query).transpose(1, 2), {}, reference)


# The names that the configuration takes.
BACKENDS = {
    "dash": [
        Method("block-sparse", ATTENTION, block_sparse),
        Method("dash", ROUTING, dash_routing),
        Method("dash", WHOLE, dash_whole),
    ],
    "infllmv2": [Method("infllmv2", WHOLE, infllmv2_whole)],
    "nsa": [Method("nsa", WHOLE, nsa_whole)],
}
BASELINES = {
    "flash_attention_3": [Method(FLASH_3, DENSE, flash_attention_3)],
    "cudnn": [Method(CUDNN, DENSE, _sdpa(SDPBackend.CUDNN_ATTENTION))],
    "flash": [Method("SDPA flash", DENSE, _sdpa(SDPBackend.FLASH_ATTENTION))],
    "fla_nsa": [Method("fla NSA", ATTENTION, fla_nsa)],
    "xunhao_nsa": [Method("XunhaoLai NSA", ATTENTION, xunhao_nsa)],
    "released_dash": [Method("released DashAttention", WHOLE, released_dash)],
}
