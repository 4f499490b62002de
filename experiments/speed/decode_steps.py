"""One token's attention against full caches: what the speed benchmark decodes with, and what it should give.

Caches are filled, not prefilled: keys are those of ``make_keys``, values Gaussian, and what a backend derives from them
it derives itself. The sparsity of NSA is that of its selected branch: its window is not counted.

Shapes: B sequences, S tokens of capacity, Hq query heads, H KV heads, D head size.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dashattn.backends import AttentionBackend, AttentionConfig, AttentionShape, build_backend
from dashattn.cache import DecodeCache, LayerCache
from dashattn.ops.chunk_summary.reference import chunk_summary
from dashattn.ops.decode import reference
from dashattn.selection import Selection
from experiments.speed.inputs import Shape, causal_sparsity, make_keys
from experiments.speed.methods import SELECTED_BLOCKS, nearest_knob, relative_error, variant
from experiments.speed.peers import RELEASED, SDPA_FLASH, need
from experiments.speed.rows import CUDNN
from models.transformer import Transformer

Selections = tuple[Selection, Selection]  # made by the kernels, and by the reference


@dataclass(frozen=True)
class Inputs:
    """A new token, the same in all layers, and what lies before it.

    Attributes:
        lengths: tokens before the new one, of each sequence.
        caches: keys and values of each layer, [B, S, H, D].
        q, k, v: [B, 1, Hq or H, D].
        hidden: [B, 1, Hq * D].
    """

    shape: Shape
    lengths: Sequence[int]
    caches: Sequence[tuple[Tensor, Tensor]]
    q: Tensor
    k: Tensor
    v: Tensor
    hidden: Tensor

    @property
    def device_lengths(self) -> Tensor:
        return torch.tensor(self.lengths, dtype=torch.int32, device=self.q.device)


def make_inputs(shape: Shape, layers: int, capacity: int, lengths: Sequence[int], seed: int, device: str) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)
    batch, head_dim = len(lengths), shape.head_dim

    def gaussian(*size: int) -> Tensor:
        return torch.randn(batch, *size, generator=generator, device=device).to(shape.dtype)

    caches = [
        (make_keys(generator, batch, capacity, shape), gaussian(capacity, shape.kv_heads, head_dim))
        for _ in range(layers)
    ]
    q, k, v = (gaussian(1, heads, head_dim) for heads in (shape.heads, shape.kv_heads, shape.kv_heads))
    return Inputs(shape, lengths, caches, q, k, v, gaussian(1, shape.heads * head_dim))


@dataclass(frozen=True)
class Step:
    """A method on one set of inputs.

    Attributes:
        run: the token's attention in all layers, one after the other; outputs [B, 1, Hq, D].
        expected: what ``run`` should give, and where the method selects, what it and the reference select.
    """

    run: Callable[[], list[Tensor]]
    expected: Callable[[], tuple[list[Tensor], list[Selections]]]

    def check(self, lengths: Tensor) -> tuple[dict[str, float], float | None]:
        """Relative RMS error of the outputs and the share of blocks selected otherwise; and the causal sparsity."""
        outs = self.run()
        expected, selections = self.expected()
        return assess(outs, expected, selections, lengths)


def assess(
    outs: list[Tensor], expected: list[Tensor], selections: list[Selections], lengths: Tensor
) -> tuple[dict[str, float], float | None]:
    """Relative RMS error of the outputs, the share of blocks selected otherwise, and the causal sparsity."""
    errors = {"out": relative_error(torch.stack(outs), torch.stack(expected))}
    if not selections:
        return errors, None
    made, wanted = (torch.cat([s.mask()[:, 0] for s in chosen]) for chosen in zip(*selections, strict=True))
    errors[SELECTED_BLOCKS] = ((made != wanted).sum() / wanted.sum()).item()
    return errors, causal_sparsity(made, lengths.repeat(len(selections)), selections[0][0].block_size)


# this library


def new_config(name: str, chunk_size: int) -> AttentionConfig:
    """A backend's options; its sparsity knob is set later."""
    return replace(variant(name, chunk_size), impl="triton")


def fill(
    backends: Iterable[AttentionBackend],
    cache: DecodeCache,
    caches: Iterable[tuple[Tensor, Tensor]],
    lengths: Sequence[int],
) -> None:
    """Writes every layer's keys and values, and then cuts the sequences to their lengths."""
    for backend, layer, (k, v) in zip(backends, cache.layers, caches, strict=True):
        backend.write(k, v, layer)
    cache.advance(lengths)


def turn_knob(
    backends: Sequence[AttentionBackend],
    queries: Sequence[Tensor],
    layers: Sequence[LayerCache],
    hidden: Sequence[Tensor],
    target: float,
) -> float:
    """Turns the sparsity knob of all layers to where their causal sparsity comes closest to the target.

    Args:
        queries, layers, hidden: each layer's, of tokens that are written already.

    Returns:
        The knob.

    Raises:
        UnavailableError: there is nothing to choose; forced blocks may leave less sparsity than the target.
    """
    lengths = layers[0].lengths

    def sparsity(knob: float) -> float:
        found = Selected()
        for backend, q, layer, x in zip(backends, queries, layers, hidden, strict=True):
            backend.set_knob(knob)
            backend.attend(q, layer, hidden=x, operations=found)
        masks = torch.cat([selection.mask()[:, 0] for selection in found.selections])
        return causal_sparsity(masks, lengths.repeat(len(backends)), backends[0].block_size)

    knob = nearest_knob(sparsity, target, backends[0].config, layers[0]["k"].shape[1]).knob
    for backend in backends:
        backend.set_knob(knob)
    return knob


def build(name: str, inputs: Inputs, target: float | None) -> tuple[Step, float | None]:
    """A backend's step with filled caches, and its knob. Every layer has parameters of its own."""
    shape, device = inputs.shape, inputs.q.device
    sizes = AttentionShape(shape.heads * shape.head_dim, shape.heads, shape.kv_heads, shape.head_dim)
    config = new_config(name, shape.chunk_size)
    backends = [build_backend(config, sizes).to(device, shape.dtype) for _ in inputs.caches]
    batch, capacity = inputs.caches[0][0].shape[:2]
    layouts = [backend.cache_layout() for backend in backends]
    cache = DecodeCache(layouts, batch, capacity, dtype=shape.dtype, device=device)
    fill(backends, cache, inputs.caches, inputs.lengths)
    knob = None
    if target is not None:
        queries, hidden = ([x] * len(backends) for x in (inputs.q, inputs.hidden))
        knob = turn_knob(backends, queries, cache.layers, hidden, target)

    def run():
        return [
            backend.decode(inputs.q, inputs.k, inputs.v, layer, hidden=inputs.hidden)
            for backend, layer in zip(backends, cache.layers, strict=True)
        ]

    def expected():
        return expected_of(
            (backend, inputs.q, layer, inputs.hidden) for backend, layer in zip(backends, cache.layers, strict=True)
        )

    return Step(run, expected), knob


def expected_of(
    layers: Iterable[tuple[AttentionBackend, Tensor, LayerCache, Tensor]],
) -> tuple[list[Tensor], list[Selections]]:
    """What decoding tokens that are written already should give, given the kernels' selections."""
    outs, selections = [], []
    for backend, q, layer, hidden in layers:
        operations = GivenSelection()
        outs.append(backend.attend(q, layer, hidden=hidden, operations=operations))
        selections += operations.selections or [(selection, selection) for selection in operations.attended]
    return outs, selections


class Selected:
    """The reference's operations of decoding; keeps the selections that are attended to."""

    cached_dash_routing = staticmethod(reference.cached_dash_routing)
    cached_window_routing = staticmethod(reference.cached_window_routing)
    gated_sum = staticmethod(reference.gated_sum)

    def __init__(self):
        self.selections: list[Selection] = []

    def cached_attention(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, selection=None, *rest, **options):
        if selection is not None:
            self.selections.append(selection)
        return reference.cached_attention(q, k, v, lengths, selection, *rest, **options)


class GivenSelection:
    """The reference's operations of decoding, except that the kernels of a router select.

    Attributes:
        selections: those kernels' and the reference's; empty for a backend that has none.
        attended: what was attended to.
    """

    gated_sum = staticmethod(reference.gated_sum)

    def __init__(self):
        self.selections: list[Selections] = []
        self.attended: list[Selection] = []

    def cached_attention(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, selection=None, *rest, **options):
        if selection is not None:
            self.attended.append(selection)
        return reference.cached_attention(q, k, v, lengths, selection, *rest, **options)

    def cached_window_routing(self, q: Tensor, compressed_k: Tensor, compressed_v: Tensor | None, lengths, **options):
        from dashattn.ops.decode import triton as kernels

        out, wanted = reference.cached_window_routing(q, compressed_k, compressed_v, lengths, **options)
        _, made = kernels.cached_window_routing(q, compressed_k, None, lengths, **options)
        self.selections.append((made, wanted))
        return out, made

    def cached_dash_routing(
        self, q: Tensor, summaries: Tensor, lengths: Tensor, *, chunk_size, router_scale, **options
    ):
        """The chunks that a group selects, of entmax the union of those of its heads; without a tempered prior."""
        from dashattn.ops.decode import triton as kernels

        route = partial(reference.cached_dash_routing, q, summaries, lengths)
        options |= {"chunk_size": chunk_size, "router_scale": router_scale}
        # A softmax's prior of every candidate: the kernels' selection may hold one that the reference's does not.
        forced = options["init_chunks"], options["local_chunks"]
        bias = route(**options | {"topk": summaries.shape[1] + sum(forced) + 1, "top_p": 1.0})[1]
        scale = router_scale * q.shape[-1] ** -0.5
        if options["selector"] == "entmax":
            words, _ = kernels.route(q.contiguous(), summaries, lengths, None, chunk_size, scale, False, None, forced)
        else:
            bound = options["topk"], options["top_p"] if options["selector"] == "topp" else None
            words, _ = kernels.route_by_softmax(
                q.contiguous(), summaries, lengths, chunk_size, scale, *bound, False, None, forced
            )
        mask = Selection(words, chunk_size).mask().unflatten(2, (summaries.shape[2], -1)).any(3)
        made = Selection.from_mask(mask, chunk_size)
        self.selections.append((made, route(**options | {"prior": "none"})[0]))
        return made, bias if options["prior"] == "raw" else None


# what it is compared with


def sdpa(backend: SDPBackend) -> Callable[[Inputs, float | None], tuple[Step, None]]:
    """PyTorch's attention over the keys that are there; the token is not written."""

    def prepare(inputs: Inputs, target: float | None) -> tuple[Step, None]:
        (length,) = set(inputs.lengths)

        def attend(k, v):
            q, k, v = (x.transpose(1, 2) for x in (inputs.q, k[:, : length + 1], v[:, : length + 1]))
            with sdpa_kernel([backend]):
                return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)

        def expected():
            lengths = inputs.device_lengths
            return [reference.cached_attention(inputs.q, k, v, lengths) for k, v in inputs.caches], []

        return Step(lambda: [attend(k, v) for k, v in inputs.caches], expected), None

    return prepare


def released_dash(inputs: Inputs, target: float) -> tuple[Step, float]:
    """Routing and attention of the DashAttention authors' package in its own layout; the token is not written."""
    need("dash_attn")
    precision = torch.get_float32_matmul_precision()
    from dash_attn import decoding

    torch.set_float32_matmul_precision(precision)  # their import lowers it, our references need all of float32
    _, scale = build("dash", inputs, target)
    shape, (length,) = inputs.shape, set(inputs.lengths)
    size, q = shape.chunk_size, inputs.q.transpose(1, 2).contiguous()
    chunk_query = torch.zeros(shape.kv_heads, shape.head_dim, device=q.device)
    summaries, caches = [], []
    for k, v in inputs.caches:
        pooled = chunk_summary(k[:, : length // size * size], chunk_query, chunk_size=size)
        summaries.append(pooled.transpose(1, 2).contiguous())
        caches.append(tuple(x[:, : length + 1].transpose(1, 2).contiguous() for x in (k, v)))

    def route(pooled):
        return decoding.score_blocks(q * scale, pooled, size, estimate_diag=True, sigma=1e6)

    def run():
        outs = []
        for pooled, (k, v) in zip(summaries, caches, strict=True):
            words, prior = route(pooled)
            outs.append(decoding.full_attn(q, k, v, words, size, None, prior).transpose(1, 2))
        return outs

    def expected():
        selections = [Selection(route(pooled)[0], size) for pooled in summaries]
        outs = [
            reference.cached_attention(inputs.q, k, v, inputs.device_lengths, selection)
            for (k, v), selection in zip(inputs.caches, selections, strict=True)
        ]
        return outs, [(selection, selection) for selection in selections]

    return Step(run, expected), scale


DENSE_BASELINES = {
    "cudnn": (CUDNN, sdpa(SDPBackend.CUDNN_ATTENTION)),
    "flash": (SDPA_FLASH, sdpa(SDPBackend.FLASH_ATTENTION)),
}
SPARSE_BASELINES = {"released_dash": (RELEASED, released_dash)}


# a whole model


def recorded_step(
    model: Transformer, cache: DecodeCache, token_B: Tensor
) -> list[tuple[AttentionBackend, Tensor, LayerCache, Tensor, Tensor]]:
    """A step without a graph or compilation: of every layer the backend, q, the cache, hidden and the output."""
    records, own = [], [vars(backend).get("decode") for backend in model.backends]

    def recording(backend):
        decode = backend.decode

        def recorded(q, k, v, layer, **options):
            out = decode(q, k, v, layer, **options)
            records.append((backend, q, layer, options["hidden"], out))
            return out

        return recorded

    for backend in model.backends:
        backend.decode = recording(backend)
    with torch.compiler.set_stance("force_eager"):
        model.decode(token_B[:, None], cache)
    for backend, decode in zip(model.backends, own, strict=True):
        del backend.decode
        if decode is not None:  # of a compiled model
            backend.decode = decode
    return records
