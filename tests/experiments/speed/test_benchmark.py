"""The speed benchmark without a GPU: its inputs, its correctness gate, and tables and figures from rows."""

import math
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException

from dashattn.backends import build_backend
from dashattn.ops.block_scores.reference import topk_selection
from dashattn.ops.block_sparse.reference import block_sparse_attention
from dashattn.ops.chunk_summary.reference import chunk_summary
from dashattn.ops.compression.reference import compressed_attention, mean_compress
from dashattn.ops.dash_routing import reference as dash_reference
from dashattn.ops.dash_routing.reference import dash_routing
from dashattn.ops.indexer import reference as indexer_reference
from dashattn.stats import selection_stats
from experiments.files import SPEED, append_rows, read_rows
from experiments.plots import pyplot
from experiments.schema import to_config
from experiments.speed import benchmark as speed
from experiments.speed import inputs, methods
from experiments.speed import report as speed_report
from experiments.speed import rows as speed_rows
from experiments.speed.config import SpeedConfig, check
from experiments.speed.inputs import (
    NEIGHBOURS,
    PATTERNS,
    Shape,
    causal_sparsity,
    make_problem,
    make_qkv,
    topk_sparsities,
    with_selection,
)
from experiments.speed.measure import failed_check
from experiments.speed.methods import Method, Operation, UnavailableError, given_selection, nearest_knob
from experiments.speed.peers import block_lists
from experiments.speed.rows import (
    ATTENTION,
    BOTH,
    CUDNN,
    DECODE,
    DENSE,
    FLASH_3,
    FORWARD,
    FULL,
    MODEL_DECODE,
    ROUTING,
    WHOLE,
)
from tests import forked
from tests.shown import assert_as_expected, shown

ROOT = Path(__file__).parents[3]
SHAPE = Shape(heads=4, kv_heads=2, head_dim=16, chunk_size=16, dtype=torch.float32)
GROUP = Shape(heads=2, kv_heads=1, head_dim=16, chunk_size=16, dtype=torch.float32)


def make_config(tmp_path, **changes):
    values = {"heads": 4, "kv_heads": 2, "head_dim": 16, "chunk_size": 16, "check_length": 96}
    values |= {"lengths": [64, 128], "sparsities": [0.5], "patterns": ["clustered"], "backends": ["dash"]}
    values |= {"decode": [], "decode_model": [], "baselines": [], "output_dir": str(tmp_path)}
    return SpeedConfig(**values | changes)


# inputs


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("length", [256, 200])
def test_recipes(pattern, length):
    q, k, v = make_qkv(pattern, length, SHAPE, seed=0, device="cpu")
    assert q.shape == (1, length, 4, 16)
    assert k.shape == v.shape == (1, length, 2, 16)
    assert q.std() == pytest.approx(1, abs=0.1)
    assert k.std() == pytest.approx((1 + 0.7**2) ** 0.5, abs=0.1)
    neighbours, strangers = (q[0, 0] * q[0, 1]).mean(), (q[0, 0] * q[0, NEIGHBOURS]).mean()
    assert neighbours == pytest.approx(PATTERNS[pattern] ** 2, abs=0.45)
    assert strangers == pytest.approx(0, abs=0.45)
    same_chunk = torch.nn.functional.cosine_similarity(k[0, :64].flatten(1), k[0, 1:65].flatten(1))
    assert same_chunk.view(4, 16)[:, :15].mean() == pytest.approx(1 / 1.49, abs=0.15)
    assert same_chunk.view(4, 16)[:, 15].mean() == pytest.approx(0, abs=0.25)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("target", "init_chunks"), [(0.4, 0), (0.6, 0), (0.6, 1)])
def test_the_reference_selects_the_sparsity_asked_for(pattern, target, init_chunks, monkeypatch):
    monkeypatch.setattr(inputs, "_ROWS", 384)  # of which the last are fewer
    problem = with_selection(make_problem(pattern, 1000, target, SHAPE, device="cpu"), init_chunks)
    summaries = chunk_summary(problem.k, problem.chunk_query, chunk_size=16)
    options = {"chunk_size": 16, "router_scale": problem.router_scale, "init_chunks": init_chunks}
    selection, _ = dash_routing(problem.q, summaries, **options)
    assert (selection.words != problem.selection.words).any(-1).float().mean() < 0.005
    measured = selection_stats(selection, torch.zeros(1, 1000, dtype=torch.int32), None).causal_sparsity()
    assert problem.causal_sparsity == pytest.approx(measured.item(), abs=1e-3)
    own = selection_stats(problem.selection, torch.zeros(1, 1000, dtype=torch.int32), None).causal_sparsity()
    assert problem.causal_sparsity == pytest.approx(own.item(), abs=1e-6)
    assert problem.causal_sparsity == pytest.approx(target, abs=0.02)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_only_shared_neighbours_select_the_same(pattern):
    shape = Shape(heads=4, kv_heads=2, head_dim=16, chunk_size=64, dtype=torch.float32)
    problem = make_problem(pattern, 640, 0.5, shape, device="cpu")
    words = problem.selection.words.unflatten(2, (-1, NEIGHBOURS))
    same = (words == words[:, :, :, :1]).all(-1).float().mean()
    assert (same == 1) == (pattern == "shared")


def test_a_sparsity_out_of_reach_is_missed_not_hidden():
    problem = make_problem("iid", 128, 0.95, SHAPE, device="cpu")
    assert 0.1 < problem.causal_sparsity < 0.95


def test_where_the_router_scale_is_looked_for(monkeypatch):
    """Halving of its logarithm within its ends, on about a thousand tokens."""
    asked = []

    def measured(value):
        return lambda scale: asked.append(scale) or value(scale)

    assert inputs.bisect_scale(measured(lambda scale: 0.0), 0.5) == pytest.approx(200, rel=1e-4)
    assert asked[:2] == pytest.approx([10**0.5, (10**0.5 * 200) ** 0.5])
    assert len(asked) == 18
    assert inputs.bisect_scale(lambda scale: 1.0, 0.5) == pytest.approx(0.05, rel=1e-4)
    assert inputs.bisect_scale(lambda scale: scale / 8, 0.5) == pytest.approx(4, rel=1e-4)
    tokens = []
    monkeypatch.setattr(inputs, "bisect_scale", lambda sparsity, target: sparsity(1.0))
    monkeypatch.setattr(inputs, "select", lambda q, summaries, scale, some, *sizes: tokens.append(some.tolist()))
    monkeypatch.setattr(inputs, "causal_sparsity", lambda *_: 0.5)
    for length in (5, 2000, 4096):
        inputs.find_router_scale(torch.zeros(1, length, 1, 1), None, 0.5, 16)
    assert tokens == [[4], [*range(7, 2000)], [*range(7, 4096, 4)]]


def test_topk_sparsities_count_what_is_read():
    found = dict(topk_sparsities(100, 16))
    assert list(found) == [1, 2, 3, 4, 5, 6, 7]
    assert found[7] == 0
    tokens = torch.arange(100)
    block = torch.arange(7)
    for topk, sparsity in found.items():  # the newest blocks stand for the best ones
        own = (tokens // 16)[:, None, None]
        mask = ((block <= own) & (block > own - topk)).expand(100, 1, 7)
        assert sparsity == pytest.approx(causal_sparsity(mask, tokens, 16))


def test_block_lists_hold_the_selection():
    problem = make_problem("iid", 100, 0.3, SHAPE, device="cpu")
    counts, blocks = block_lists(problem.selection)
    mask = problem.selection.mask()
    for token in (0, 17, 99):
        for head in range(2):
            count = counts[0, token, head]
            assert blocks[0, token, head, :count].tolist() == mask[0, token, head].nonzero().flatten().tolist()
            assert not blocks[0, token, head, count:].any()


# correctness gate


def test_dash_sink_is_dash_with_the_first_chunk_forced():
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    problem = make_problem("clustered", 160, 0.4, GROUP, seed=1, device=device)
    operations = [method.prepare(problem) for method in speed.BACKENDS["dash_sink"]]
    sink = with_selection(problem, 1)
    for operation in operations:
        errors = operation.errors(problem.grad)
        assert errors.pop("selected rows") == 0
        assert max(errors.values(), default=0) < 1e-3
        assert operation.causal_sparsity == sink.causal_sparsity == pytest.approx(0.4, abs=0.05)
        assert operation.router_scale == sink.router_scale != problem.router_scale
        assert operation.selections()[0].mask()[..., 0].all()
    assert not problem.selection.mask()[..., 0].all()


def test_the_distance_from_the_edge_is_that_of_the_groups_highest_head():
    """By hand: scores (.4, 0) have z = (.8, .6), and (3, 0) have (1, -.5); a token's own chunk is no candidate."""
    summaries = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])[None, :, None]
    q = torch.zeros(1, 6, 2, 3)
    q[0, 4:, 0, 0], q[0, 4:, 1, 0] = 0.4, 3.0
    distances = [inputs.edge_distance(x * 3**0.5, summaries, 1.0, 2)[0, :, 0] for x in (q, q[:, :, :1], q[:, :, 1:])]
    for distance, expected in zip(distances, (0.6, 0.6, 0.5), strict=True):
        assert distance[:2].tolist() == [math.inf] * 2
        assert distance[2:].tolist() == pytest.approx([1, 1, expected, expected])
    assert inputs.edge_distance(q * 3**0.5, summaries, 2.0, 2, init_chunks=1)[0, 4, 0] == pytest.approx(1)


@pytest.fixture
def at_the_edge(monkeypatch):
    """DashAttention as the benchmark checks it, with the float64 definition in the kernels' place, where a chunk of one
    token is so near the edge of the support that float32 loses its place; and ways to get the chunk query wrong."""
    problem = make_problem("clustered", 200, 0.4, replace(GROUP, kv_heads=1), seed=1, device="cpu")
    summaries = chunk_summary(problem.k, problem.chunk_query, chunk_size=16)

    def nearest(scale, dtype=torch.float64):
        return inputs.edge_distance(problem.q.to(dtype), summaries.to(dtype), scale, 16)

    token = nearest(problem.router_scale).flatten().argmin()
    scales = torch.linspace(0.9, 1.1, 4001, dtype=torch.float64) * problem.router_scale
    for _ in range(4):  # its distance is smallest at one of these; then closer around that one
        found = torch.stack([nearest(float(scale))[0, token, 0] for scale in scales[:: len(scales) // 40]])
        best, width = scales[:: len(scales) // 40][found.argmin()], scales[len(scales) // 40] - scales[0]
        scales = torch.linspace(-1, 1, 41, dtype=torch.float64) * width + best
    problem = replace(problem, router_scale=float(best))
    pooled, wrong = methods.summary_reference.chunk_summary, {}

    def exact(q, k, v, chunk_query, *, impl, chunk_size, router_scale, init_chunks):
        q, k, v, chunk_query = (x.double() for x in (q, k, v, chunk_query))
        factor = wrong.get("factor", 1.0)
        found = pooled(k, factor * chunk_query + (1 - factor) * chunk_query.detach(), chunk_size=chunk_size)
        if "chunk" in wrong:
            found = torch.cat([found[:, :3], found[:, 3:4].detach(), found[:, 4:]], dim=1)
        options = {"chunk_size": chunk_size, "router_scale": router_scale, "init_chunks": init_chunks}
        return block_sparse_attention(q, k, v, *dash_routing(q, found, **options)).float()

    route = dash_routing(problem.q.double(), summaries.double(), chunk_size=16, router_scale=problem.router_scale)[0]
    monkeypatch.setattr(methods, "dash_attention", exact)
    monkeypatch.setattr(methods, "dash_routing", lambda *_: Operation(lambda: route, {}))
    operation = methods.dash_whole(problem)
    return lambda rows=operation.decided, **how: (
        wrong.update(how) or replace(operation, decided=rows).errors(problem.grad)
    )


def test_a_token_at_the_edge_of_the_support_does_not_hide_what_the_chunk_query_gets(at_the_edge):
    assert at_the_edge(rows=None)["chunk_query"] > 0.01  # float32 against float64, nothing wrong
    assert at_the_edge()["chunk_query"] < 1e-4


@pytest.mark.parametrize("how", [{"factor": -1.0}, {"factor": 0.9}, {"chunk": 3}], ids=str)
def test_a_wrong_gradient_of_the_chunk_query_fails_the_check(at_the_edge, how):
    failed = failed_check(at_the_edge(**how), BOTH, 0.005)
    assert "chunk_query off by" in failed["detail"]


@pytest.mark.parametrize("name", ["dash_topk", "dash_topp"])
def test_other_selectors_are_held_to_the_reference_at_the_sparsity_asked_for(name, monkeypatch):
    pytest.importorskip("triton")
    found = []

    def nearest_once(*args):
        """Routing and the whole are asked for the same sparsity."""
        found.append(found[0] if found else nearest_knob(*args))
        return found[0]

    monkeypatch.setattr(methods, "nearest_knob", nearest_once)
    problem = make_problem("clustered", 160, 0.4, GROUP, device="cuda" if torch.cuda.is_available() else "cpu")
    for method in speed.BACKENDS[name]:
        operation = method.prepare(problem)
        errors = operation.errors(problem.grad)
        assert errors.pop("selected rows") == 0
        assert max(errors.values(), default=0) < 1e-3
        assert operation.causal_sparsity == pytest.approx(0.4, abs=0.06)
        assert operation.router_scale == methods.variant(name, 16).router_scale


def test_names_and_stages_of_what_is_timed():
    """A method's row is found by them, and a ratio by the stage."""

    def lines(table):
        return {name: [(method.name, method.stage) for method in found] for name, found in table.items()}

    assert lines(methods.OPERATIONS) == {
        "dash": [("block-sparse", ATTENTION), ("dash", ROUTING), ("dash", WHOLE)],
        **{name: [(name, ROUTING), (name, WHOLE)] for name in ("dash_sink", "dash_topk", "dash_topp")},
        **{name: [(name, WHOLE)] for name in ("infllmv2", "nsa")},
    }
    others = methods.BACKENDS.keys() - methods.OPERATIONS.keys()
    assert {"moba", "hils", "indexer", "sink_window", "oracle"} <= others
    assert all(lines(methods.BACKENDS)[name] == [(name, WHOLE)] for name in others)
    assert lines(speed.BASELINES) == {
        "flash_attention_3": [(FLASH_3, DENSE)],
        "cudnn": [(CUDNN, DENSE)],
        "flash": [("SDPA flash", DENSE)],
        "fla_nsa": [("fla NSA", ATTENTION)],
        "xunhao_nsa": [("XunhaoLai NSA", ATTENTION), ("XunhaoLai NSA, no window", WHOLE)],
        "scalable_nsa": [("Scalable-Flash-NSA, no window", WHOLE)],
        "released_dash": [("released DashAttention", WHOLE)],
        "flex_attention": [("FlexAttention", ATTENTION)],
        "flash_attention_4": [("FlashAttention-4, block-sparse", ATTENTION)],
    }


@pytest.mark.parametrize(("name", "length", "target"), [("infllmv2", 1600, 0.1), ("nsa", 400, 0.2)])
def test_what_windows_select_is_held_to_the_definition_of_the_backend(name, length, target, monkeypatch):
    """The kernels' places are taken by the references, which the operation and what it should give then agree on."""
    pytest.importorskip("triton")
    from dashattn.ops.band import triton as band
    from dashattn.ops.block_scores import triton as scores

    def select_blocks(q, compressed_k, lse, *, scale, cu_seqlens, kernel_size, kernel_stride, **blocks):
        sizes = {"kernel_size": kernel_size, "kernel_stride": kernel_stride}
        select = partial(topk_selection, **sizes, **blocks)
        return compressed_attention(q, compressed_k, None, select, scale=scale, cu_seqlens=cu_seqlens, **sizes)[1][0]

    attention = f"{name}_attention"
    whole = getattr(methods, attention)
    monkeypatch.setattr(methods, attention, lambda *args, impl, **options: whole(*args, impl="reference", **options))
    monkeypatch.setattr(scores, "select_blocks", select_blocks)
    monkeypatch.setattr(band, "compressed_attention", lambda *args, **options: (None, None))
    shape = replace(GROUP, chunk_size=64)
    problem = make_problem("clustered", length, target, shape, device="cpu")
    ((method,),) = (methods.OPERATIONS[name],)
    forced, nearest = [], methods.nearest_topk
    monkeypatch.setattr(methods, "nearest_topk", lambda p, blocks: forced.append(blocks) or nearest(p, blocks))
    operation = method.prepare(problem)
    assert forced == [{"infllmv2": 1024 // 64 + 2, "nsa": 3}[name]]
    for key in {"compressed_k", "compressed_v"} & operation.leaves.keys():
        pooled = mean_compress(getattr(problem, key[-1]), **methods.WINDOWS)
        torch.testing.assert_close(operation.leaves[key].detach(), pooled)
    errors = operation.errors(problem.grad)
    assert set(errors) == {"selected rows", "out", *operation.leaves}
    assert max(errors.values()) < 1e-4
    kernels, _ = operation.selections()
    read = selection_stats(kernels, torch.zeros(1, length, dtype=torch.int32), None).causal_sparsity().item()
    assert operation.causal_sparsity == pytest.approx(read, abs=1e-6)
    assert read == pytest.approx(target, abs=0.06)
    with pytest.raises(UnavailableError, match="forced blocks are all that the sequence has"):
        method.prepare(make_problem("clustered", 128, 0.1, shape, device="cpu"))


def kernel(factor=1.0, gradient=1.0):
    """A method whose output and gradients are off by these factors."""

    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx, out):
            return out * factor

        @staticmethod
        def backward(ctx, grad):
            return grad * gradient

    def prepare(problem):
        def attend(q, k, v):
            return Kernel.apply(block_sparse_attention(q, k, v, problem.selection))

        return given_selection(problem, attend, problem.selection)

    return Method("kernel", WHOLE, prepare)


@pytest.fixture
def rows_of(monkeypatch, tmp_path):
    """rows_of(method): the rows of a benchmark of that one method, and the number of calls that were timed."""

    def rows(*methods, ms=2.0, extra_mib=lambda call: 5.0, **changes):
        timed, rows.asked = [], []

        def measure(call, *rest):
            rows.asked.append(rest)
            return [timed.append(call()) or ms / 2, 1.5 * ms, ms]

        monkeypatch.setitem(speed.BACKENDS, "dash", list(methods))
        monkeypatch.setattr(speed, "measure", measure)
        monkeypatch.setattr(speed, "extra_mib", extra_mib)
        monkeypatch.setattr(speed, "call_ms", lambda call, *_: 2.5)
        monkeypatch.setattr(speed, "graph_ms", lambda call, *_: 1.5)
        lines = []
        speed.run(make_config(tmp_path, dtype="bf16", **changes), "cpu", lines.append)
        found = read_rows(tmp_path / SPEED)
        assert len(lines) == len(found)
        rows.said = lines
        return found, len(timed)

    return rows


def test_what_is_right_is_timed(rows_of):
    rows, timed = rows_of(kernel())
    assert [(row["length"], row["pass"], row["status"]) for row in rows] == [
        (length, name, "ok") for length in (64, 128) for name in (FORWARD, BOTH)
    ]
    assert timed == 4
    assert rows_of.asked == [(3, 12)] * 4  # calls before, calls timed
    assert {(row["ms"], row["call_ms"], row["graph_ms"]) for row in rows} == {(2.0, 2.5, 1.5)}
    assert {row["extra_mib"] for row in rows} == {5.0}
    assert set(rows[0]["errors"]) == {"out", "q", "k", "v"}
    assert max(rows[0]["errors"].values()) < 0.005
    assert 0 < rows[0]["causal_sparsity"] < rows[-1]["causal_sparsity"] < 0.6
    assert rows_of.said == [
        f"{length:7}  clustered 50%   whole      kernel                  {name:16}  2 ms"
        for length in (64, 128)
        for name in (FORWARD, BOTH)
    ]
    options = {"heads": 4, "kv_heads": 2, "head_dim": 16, "chunk_size": 16, "dtype": "bf16", "seed": 0}
    told = options | {"repetitions": 12, "pattern": "clustered", "sparsity": 0.5, "stage": WHOLE, "method": "kernel"}
    told |= {"detail": "", "ms_min": 1.0, "ms_max": 3.0, "length": 64, "pass": FORWARD}
    assert {name: rows[0][name] for name in told} == told
    assert rows[0]["router_scale"] > 0
    assert {"run", "device", "git_sha", "dirty", "versions", "date"} <= rows[0].keys()


def test_each_shape_is_measured(rows_of):
    rows, _ = rows_of(kernel(), shapes=[[6, 2, 16], [2, 2, 8]], lengths=[64])
    assert [(row["heads"], row["kv_heads"], row["head_dim"]) for row in rows] == [(6, 2, 16)] * 2 + [(2, 2, 8)] * 2


def test_a_wrong_output_is_not_timed(rows_of):
    rows, timed = rows_of(kernel(factor=1.02))
    assert {row["status"] for row in rows} == {"failed check"}
    assert "out off by 0.02" in rows[0]["detail"]
    assert timed == 0


def test_others_kernels_may_round_more(rows_of, monkeypatch):
    monkeypatch.setitem(speed.BASELINES, "fla_nsa", [kernel(factor=1.01)])
    monkeypatch.setitem(speed.BASELINES, "cudnn", [replace(kernel(factor=1.01), name=CUDNN)])
    rows, timed = rows_of(kernel(factor=1.01), baselines=["fla_nsa", "cudnn"], lengths=[64])
    assert [row["status"] for row in rows] == [*["ok"] * 4, *["failed check"] * 2]
    assert timed == 4
    assert [row["call_ms"] for row in rows[:4]] == [2.5] * 4
    assert [row["graph_ms"] for row in rows[:4]] == [None, None, 1.5, 1.5]  # others' may wait inside


@pytest.mark.parametrize("gradient", [0.98, float("nan")])
def test_a_wrong_gradient_keeps_the_backward_from_being_timed(rows_of, gradient):
    rows, timed = rows_of(kernel(gradient=gradient))
    assert {(row["pass"], row["status"]) for row in rows} == {(FORWARD, "ok"), (BOTH, "failed check")}
    assert timed == 2


def test_an_output_that_is_nan_without_gradients_alone_is_wrong():
    x = torch.ones(2, requires_grad=True)
    operation = Operation(lambda: x * (1.0 if torch.is_grad_enabled() else math.nan), {"x": x}, lambda grad: [x, x])
    assert operation.errors(torch.ones(2)) == {"out": math.inf, "x": 0}


def test_selections_may_differ_in_few_rows():
    assert not failed_check({"selected rows": 0.004}, FORWARD, 0.005)
    assert failed_check({"selected rows": 0.006, "out": 0.001}, FORWARD, 0.005)


def test_what_cannot_run_has_a_row_and_stops_no_other(rows_of):
    calls = []

    def absent(problem):
        raise UnavailableError("not installed", "the package fast is not installed")

    def broken(problem):
        calls.append(problem)
        raise RuntimeError("no such instruction")

    def greedy(problem):
        raise torch.OutOfMemoryError

    others = [Method(prepare.__name__, ATTENTION, prepare) for prepare in (absent, broken, greedy)]
    rows, timed = rows_of(*others, kernel())
    statuses = ("not installed", "error", "out of memory", "ok")
    assert [row["status"] for row in rows] == [status for status in statuses for _ in range(2)] * 2
    assert rows[2]["detail"] == "RuntimeError: no such instruction"
    absent_row = {"ms": None, "ms_min": None, "ms_max": None, "call_ms": None, "graph_ms": None, "extra_mib": None}
    assert {name: rows[0][name] for name in absent_row} == absent_row
    assert (rows[0]["causal_sparsity"], rows[0]["router_scale"], rows[0]["errors"]) == (None, None, {})
    said = (
        "     64  clustered 50%   attention  absent                  forward           not installed the package fast"
    )
    assert rows_of.said[0] == f"{said} is not installed"
    assert timed == 4
    assert len(calls) == 1  # a check that broke is not tried again at every length


@pytest.mark.parametrize(("ms", "others"), [(49.9, (2.5, 1.5)), (50.0, (None, None))])
def test_of_long_calls_the_hosts_share_is_nothing(rows_of, ms, others):
    rows, _ = rows_of(kernel(), ms=ms, lengths=[64])
    assert {(row["ms"], row["call_ms"], row["graph_ms"]) for row in rows} == {(ms, *others)}


def test_a_pass_that_does_not_fit_leaves_the_other(rows_of):
    calls = []

    def extra_mib(call):
        calls.append(call)
        if len(calls) == 2:
            raise torch.OutOfMemoryError
        return 5.0

    rows, _ = rows_of(kernel(), extra_mib=extra_mib, lengths=[64])
    assert [(row["pass"], row["status"], row["ms"]) for row in rows] == [
        (FORWARD, "ok", 2.0),
        (BOTH, "out of memory", None),
    ]


def test_an_operation_says_what_it_is(rows_of):
    """Its sparsity and its router's scale where they are not the problem's; without leaves it has no backward."""

    def prepare(problem):
        out = problem.q.float()
        return Operation(lambda: out, {}, lambda grad: [out], causal_sparsity=0.25, router_scale=7.0)

    rows, timed = rows_of(Method("own", WHOLE, prepare), lengths=[64])
    assert [(row["pass"], row["status"]) for row in rows] == [(FORWARD, "ok"), (BOTH, "no backward")]
    assert {(row["causal_sparsity"], row["router_scale"]) for row in rows} == {(0.25, 7.0)}
    assert timed == 1


def test_each_input_is_checked_once_at_the_length_of_the_check(rows_of):
    seen, method = [], kernel()
    seeing = replace(method, prepare=lambda problem: seen.append(problem.length) or method.prepare(problem))
    rows, _ = rows_of(seeing, patterns=["clustered", "iid"], lengths=[128, 64, 128])
    assert seen == [96, 64, 96, 64, 128, 128]
    assert [(row["length"], row["pattern"]) for row in rows[::2]] == [
        (length, pattern) for length in (64, 128) for pattern in ("clustered", "iid")
    ]


def test_all_shapes_share_the_time(tmp_path, monkeypatch):
    monkeypatch.setattr(speed.Benchmark, "rows", lambda self: iter([self.deadline]))
    first, second = speed.measured(make_config(tmp_path, shapes=[[4, 2, 16], [2, 2, 16]]), "cpu")
    assert first == second


def test_what_is_out_of_time_has_a_row(rows_of):
    rows, timed = rows_of(kernel(), time_budget=1e-9)
    assert {row["status"] for row in rows} == {"out of time"}
    assert timed == 0


def test_baselines_that_are_not_installed_have_rows(rows_of):
    packages = ["flash_attention_3", "fla_nsa", "xunhao_nsa", "scalable_nsa", "released_dash", "flash_attention_4"]
    rows, _ = rows_of(baselines=packages)
    assert {row["method"] for row in rows if row["status"] == "not installed"} == {
        "FlashAttention-3",
        "FlashAttention-4, block-sparse",
        "Scalable-Flash-NSA, no window",
        "fla NSA",
        "XunhaoLai NSA",
        "XunhaoLai NSA, no window",
        "released DashAttention",
    }


def test_flash_attention_3_through_jax(monkeypatch, tmp_path):
    errors = {"out": 0.002, "q": 0.003, "k": 0.003, "v": 0.2}
    replies = [{"errors": errors, "jax": "0.8", "package": "0.1"}]
    replies += [{"length": 64, "pass": name, "ms": 1.0, "ms_min": 0.9, "ms_max": 1.1} for name in (FORWARD, BOTH)]
    replies += [{"length": 128, "pass": FORWARD, "error": "out of memory"}]
    monkeypatch.setattr(speed, "find_spec", lambda name: None if name == "flash_attn_interface" else name)
    asked = []
    monkeypatch.setattr(speed, "run_jax", lambda options, seconds: asked.append(options) or (replies, "killed"))
    config = make_config(tmp_path, baselines=["flash_attention_3"], backends=[])
    rows = list(speed.Benchmark(config, "cpu").rows())
    assert [(row["length"], row["pass"], row["status"]) for row in rows] == [
        (64, FORWARD, "ok"),
        (64, BOTH, "failed check"),
        (128, FORWARD, "error"),
        (128, BOTH, "failed check"),
    ]
    assert (rows[0]["stage"], rows[0]["ms"], rows[0]["extra_mib"]) == (DENSE, 1.0, None)
    assert [rows[0][name] for name in ("ms_min", "ms_max", "detail")] == [0.9, 1.1, "dew_flash_attn 0.1, JAX 0.8"]
    assert [row["detail"] for row in rows[1:]] == [
        "v off by 0.2, allowed 0.02",
        "out of memory",
        "v off by 0.2, allowed 0.02",
    ]
    assert {(row["method"], row["pattern"], row["sparsity"]) for row in rows} == {(FLASH_3, None, None)}
    assert asked == [
        {"heads": 4, "kv_heads": 2, "head_dim": 16, "dtype": "bf16", "seed": 0, "warmup": 3, "repetitions": 12}
        | {"lengths": [64, 128], "check_length": 96, "package": "dew_flash_attn"}
    ]


@pytest.mark.parametrize(
    ("head_dim", "installed", "taken"),
    [
        (128, {"jax", "flash_attn3_jax", "dew_flash_attn"}, "flash_attn3_jax"),
        (128, {"jax", "dew_flash_attn"}, "dew_flash_attn"),
        (64, {"jax", "flash_attn3_jax", "dew_flash_attn"}, "dew_flash_attn"),
        (64, {"jax", "flash_attn3_jax"}, None),
        (128, {"flash_attn3_jax", "dew_flash_attn"}, None),
    ],
)
def test_flash_attention_3_comes_from_the_port_that_has_such_heads(monkeypatch, tmp_path, head_dim, installed, taken):
    monkeypatch.setattr(speed, "find_spec", lambda name: name if name in installed else None)
    asked = []
    monkeypatch.setattr(speed, "run_jax", lambda options, seconds: asked.append(options["package"]) or ([], "killed"))
    config = make_config(tmp_path, baselines=["flash_attention_3"], backends=[], head_dim=head_dim)
    rows = list(speed.Benchmark(config, "cpu").rows())
    assert asked == ([] if taken is None else [taken])
    assert {row["status"] for row in rows} == {"not installed" if taken is None else "error"}
    if taken is None:
        names = "flash_attn3_jax or dew_flash_attn" if head_dim == 128 else "dew_flash_attn"
        assert rows[0]["detail"] == f"neither flash_attn_interface nor JAX with {names} is installed"


def test_a_backend_without_a_line_of_its_own_is_timed_as_its_module():
    problem = make_problem("iid", 512, 0.5, Shape(4, 2, 16, 32, torch.float32), seed=0, device="cpu")
    (method,) = speed.BACKENDS["sink_window"]
    operation = method.prepare(problem)
    assert (method.name, method.stage) == ("sink_window", WHOLE)
    assert operation.causal_sparsity == pytest.approx(0.5, abs=0.05)
    assert all(error < 1e-5 for error in operation.errors(problem.grad).values())


@pytest.fixture
def errors_of_module(monkeypatch):
    """The errors of a backend timed as its module, of which what stands for the kernels has other scores or outputs."""

    def errors(name, scores=lambda x: x, out=lambda x: x, dtype=torch.float32):
        def build(config, sizes):
            module = build_backend(config, sizes)
            if config.impl != "reference":
                module.forward = partial(attend, module.forward)
            return module

        def attend(forward, *args, **options):
            with monkeypatch.context() as patched:
                for place in (dash_reference, indexer_reference):
                    patched.setattr(place, "chunk_probabilities", lambda x, *a, **o: choose(scores(x), *a, **o))
                found = forward(*args, **options)
            return found if options.get("return_stats") else out(found)

        choose = dash_reference.chunk_probabilities
        monkeypatch.setattr(methods, "build_backend", build)
        problem = make_problem("iid", 512, 0.5, replace(SHAPE, chunk_size=32, dtype=dtype), seed=0, device="cpu")
        (method,) = speed.BACKENDS[name]
        return method.prepare(problem).errors(problem.grad)

    return errors


def nearly(scores, noise=2e-3):
    return scores + noise * scores.std() * torch.randn(scores.shape, generator=torch.Generator().manual_seed(0))


ROUTED = pytest.mark.parametrize("name", ["moba", "indexer", "hils"])


@pytest.mark.parametrize(("name", "noise"), [("moba", 3e-3), ("indexer", 2e-3), ("hils", 5e-3)])
def test_a_module_may_break_near_ties_otherwise(name, noise, errors_of_module):
    errors = errors_of_module(name, partial(nearly, noise=noise))
    assert 0 < errors.pop("selected rows") < 0.005
    assert all(error < 1e-5 for error in errors.values())
    errors = errors_of_module(name, dtype=torch.bfloat16)  # what is rounded on the way to the scores is no error
    assert max(errors.values()) < 0.001


@ROUTED
@pytest.mark.parametrize("scores", [torch.neg, partial(nearly, noise=0.1), lambda x: x.roll(1, -1)])
def test_a_module_that_selects_wrongly_fails_the_check(name, scores, errors_of_module):
    errors = errors_of_module(name, scores)
    for what in (FORWARD, BOTH):
        assert "selected rows off by" in failed_check(errors, what, 0.005)["detail"]


@ROUTED
@pytest.mark.parametrize("out", [lambda x: 1.01 * x, lambda x: torch.cat([x[:, :-1], x[:, -1:] * math.nan], dim=1)])
def test_a_module_whose_output_is_wrong_fails_the_check(name, out, errors_of_module):
    errors = errors_of_module(name, nearly, out)
    assert errors["selected rows"] < 0.005
    assert "out off by" in failed_check(errors, FORWARD, 0.005)["detail"]
    assert all(f"{leaf} off by" in failed_check(errors, BOTH, 0.005)["detail"] for leaf in "qkv")


def test_blocks_are_told_from_values_that_name_them():
    """More blocks than a value has channels."""
    problem = make_problem("iid", 300, 0.5, replace(SHAPE, dtype=torch.bfloat16), device="cpu")
    found = methods.blocks_read(problem, lambda q, k, v: block_sparse_attention(q, k, v, problem.selection))
    assert torch.equal(found.words, problem.selection.words)


# configuration


def composed(*overrides, name="speed"):
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return to_config(compose(name, list(overrides)))


def test_the_configuration_composes():
    config = composed()
    check(config)
    assert config.lengths[0] == 1024
    assert config.lengths[-1] == 131072
    with pytest.raises(ConfigCompositionException):
        composed("length=[3]")
    for name in ("speed_shapes", "speed_peers"):
        check(composed(name=name))


@pytest.mark.parametrize(
    ("override", "mend"),
    [
        ("patterns=[iid,random]", "shared, clustered, iid"),
        ("backends=[full]", "dash, dash_sink, dash_topk, dash_topp, infllmv2, nsa"),
        ("baselines=[fa2]", "flash_attention_3"),
        ("dtype=fp32", "bf16, fp16"),
        ("lengths=[1024,0]", "must be a positive integer"),
        ("decode=[[1024]]", "tokens, sequences"),
        ("decode_model=[[32,1]]", "at least a chunk"),
        ("~model", "model=1b"),
        ("sparsities=[90]", "a share of the keys"),
        ("heads=3", "multiple of kv_heads"),
        ("shapes=[[9,2,64]]", "heads=9 is no multiple of kv_heads=2"),
        ("shapes=[[9,3]]", r"shapes has \[9, 3\]: .query heads, KV heads, head size. are needed"),
        ("+length=3", "--cfg job"),
    ],
)
def test_what_cannot_be_measured_is_refused(override, mend):
    with pytest.raises(ValueError, match=mend):
        check(composed(override))


def test_something_is_left_to_measure(tmp_path):
    check(make_config(tmp_path))
    check(make_config(tmp_path, lengths=[], decode=[[64, 1]]))
    for changes, mend in (
        ({"sparsities": [0.5, 0.0]}, "lie between 0 and 1"),
        ({"lengths": []}, "nothing to measure"),
        ({"decode_model": [[64, 1]]}, "decode_model needs a model"),
    ):
        with pytest.raises(ValueError, match=mend):
            check(make_config(tmp_path, **changes))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_ends_in_one_message(tmp_path):
    done = forked.run("-m", "experiments.speed", f"output_dir={tmp_path / 'speed'}")
    assert done.returncode == 1
    assert "GPU" in done.stderr
    assert f"experiments.speed.report {tmp_path / 'speed'}" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "speed").exists()
    done = forked.run("-m", "experiments.speed", "heads=3", "kv_heads=2")
    assert (done.returncode, "heads=3 is no multiple of kv_heads=2" in done.stderr) == (1, True)


def test_it_imports_without_what_only_training_needs():
    absent = ("deepspeed", "datasets", "tokenizers", "safetensors", "wandb", "psutil", "rich", "triton")
    code = f"import sys; sys.modules.update(dict.fromkeys({absent!r})); import experiments.speed.benchmark"
    # PyTorch itself looks for triton; what it finds is not this test's concern
    code = code.replace("import sys;", "import sys, torch;")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# report


def make_row(method, ms, length=1024, name=FORWARD, pattern="clustered", sparsity=0.75, stage=WHOLE, **changes):
    if stage == DENSE:
        pattern = sparsity = None
    return {
        **{"run": "a", "device": "some GPU", "versions": {"torch": "2"}, "git_sha": "0123456789abcdef", "dirty": False},
        **{"heads": 32, "kv_heads": 2, "head_dim": 128, "chunk_size": 64, "dtype": "bf16", "seed": 0},
        **{"date": "2026-01-01T00:00:00+0000", "length": length, "pattern": pattern, "sparsity": sparsity},
        **{"causal_sparsity": sparsity, "router_scale": 4.0, "stage": stage, "method": method, "pass": name},
        **{"status": "ok", "detail": "", "ms": ms, "ms_min": ms and ms / 2, "ms_max": ms and 2 * ms, "errors": {}},
        **{"extra_mib": 10.0 if name == FORWARD else 30.0} | changes,
    }


def a_run(run="a", flash_3=True):
    rows = []
    for name, factor in ((FORWARD, 1), (BOTH, 3)):
        for length, dense, whole in ((1024, 1.0, 2.0), (4096, 16.0, 8.0), (16384, 256.0, 64.0)):
            common = {"length": length, "name": name, "run": run}
            rows.append(make_row(CUDNN, dense * factor * 2, stage=DENSE, **common))
            if flash_3:
                rows.append(make_row(FLASH_3, dense * factor, stage=DENSE, **common, extra_mib=None))
            rows.append(make_row("dash", whole * factor, **common))
            rows.append(make_row("dash", whole * factor * 100, pattern="iid", **common))
    return rows


def ratios(rows):
    return {
        (row["method"], row["length"], row["pass"]): row["ratio"]
        for row in speed_rows.with_ratios(rows)
        if row["pattern"] != "iid"
    }


def test_ratios_are_to_flash_attention_3():
    found = ratios(a_run())
    assert found["dash", 4096, FORWARD] == pytest.approx(2)
    assert found["dash", 1024, BOTH] == pytest.approx(0.5)
    assert found[CUDNN, 1024, FORWARD] == pytest.approx(0.5)


def test_without_flash_attention_3_they_are_to_a_share_of_cudnn():
    rows = a_run(flash_3=False)
    found = ratios(rows)
    assert found["dash", 4096, FORWARD] == pytest.approx(4 * 0.95)
    assert found["dash", 4096, BOTH] == pytest.approx(4 * 0.90)
    assert "cuDNN x 0.90, cuDNN x 0.95" in speed_report.to_markdown(rows)


def test_ratios_are_within_one_run():
    alone = make_row("dash", 1.0, length=4096, run="b")
    assert ratios([*a_run(), alone])["dash", 4096, FORWARD] is None
    assert ratios([alone, *a_run()])["dash", 4096, FORWARD] == pytest.approx(2)


def test_a_failed_check_unsays_what_was_measured_and_running_out_of_time_does_not():
    failed, late = (make_row("dash", None, status=status) for status in ("failed check", "out of time"))
    rows = [make_row("dash", 1.0)]
    assert speed_rows.newest([*rows, failed]) == [failed]
    assert speed_rows.newest([*rows, late]) == rows


def test_rows_of_other_cases_are_neither_superseded_nor_compared():
    shape = {"device": "x", "heads": 16, "kv_heads": 4, "head_dim": 64, "chunk_size": 32, "dtype": "fp16"}
    shape |= {"length": 2048, "batch": 2, "pass": BOTH}
    dense, sparse = make_row(FLASH_3, 1.0, stage=DENSE), make_row("dash", 2.0)
    for name, value in (shape | {"run": "b"}).items():
        found = speed_rows.with_ratios([dense, sparse | {name: value}])
        assert [row["ratio"] for row in found] == [1.0, None], name
    for name, value in (shape | {"pattern": "iid", "sparsity": 0.9, "stage": ROUTING, "method": "nsa"}).items():
        rows = [sparse, sparse | {name: value}]
        assert speed_rows.newest(rows) == rows, name
    assert speed_rows.newest([sparse, sparse | {"run": "b"}]) == [sparse | {"run": "b"}]


@pytest.mark.parametrize(
    ("line", "length"),
    [
        ([(1024, 0.5), (4096, 2.0)], "2k"),
        ([(1024, 0.5), (4096, 1.0)], "4k"),
        ([(1024, 2.0), (2048, 0.5), (8192, 2.0)], "4k"),
        ([(1024, 1.5), (4096, 2.0)], "1k or less"),
        ([(1024, 2.0), (4096, 0.9)], "not reached"),
        ([(1024, 1.0)], "1k or less"),
        ([], "not measured"),
    ],
)
def test_break_even(line, length):
    assert speed_report.break_even(line) == length


def test_table():
    rows = a_run()
    absent = {"stage": ATTENTION, "status": "not installed", "detail": "no | fla"}
    rows += [make_row("fla NSA", None, length, name, **absent) for length in (1024, 4096) for name in (FORWARD, BOTH)]
    rows.append(make_row("fla NSA", None, 4096, pattern="iid", **absent))
    table = speed_report.to_markdown(rows)
    assert "| 4k | clustered 75% | 75.0% | whole | dash | 8 (2.00x) | 24 (2.00x) | 10 MiB | 30 MiB |" in table
    assert "| 4k | any |  | dense | FlashAttention-3 | 16 (1.00x) | 48 (1.00x) |  |  |" in table
    assert "| dash | clustered 75% | 2k | 2k |" in table
    assert "| dash | iid 75% | not reached | not reached |" in table
    why = "| fla NSA | attention | not installed: no / fla |"
    assert f"{why} forward, forward+backward | clustered 75% | 1k, 4k |" in table
    assert f"{why} forward | iid 75% | 4k |" in table
    assert "commit 0123456789," in table


def test_short_calls_stand_beside_their_graphs():
    rows = [make_row(FLASH_3, 2.0, stage=DENSE, call_ms=9.0), make_row("dash", 4.0, graph_ms=1.0)]
    table = speed_report.to_markdown(rows)
    assert "4 (0.50x), 1 (2.00x)" in table
    assert "not reached, 1k or less as a CUDA graph" in table


def test_graphs_are_compared_with_graphs():
    rows = [make_row(CUDNN, 2.0, stage=DENSE, graph_ms=1.6), make_row("dash", 4.0, graph_ms=0.5)]
    assert "4 (0.47x), 0.5 (3.04x)" in speed_report.to_markdown(rows)


def test_shapes_stand_beside_each_other():
    """Each against the fastest dense attention of its own run and shape, by the same clock."""
    rows = []
    for run, heads, factor in (("a", 32, 1), ("b", 16, 10)):
        common = {"run": run, "heads": heads}
        rows += [
            make_row(CUDNN, 3.0 * factor, stage=DENSE, call_ms=4.0 * factor, graph_ms=2.0 * factor, **common),
            make_row(FLASH_3, 5.0 * factor, stage=DENSE, **common),
            make_row("dash", 1.0, call_ms=2.0, graph_ms=0.5, **common),
            make_row("nsa", 8.0, call_ms=8.0, graph_ms=4.0, **common),
            make_row(CUDNN, 0.5, 2048, stage=DENSE, **common),
            make_row("SDPA flash", 0.5, stage=DENSE, **common | {"run": "another"}),
        ]
    table = speed_report.to_markdown(rows)
    assert "| heads / KV heads of size | FlashAttention-3 | SDPA cuDNN | SDPA flash | dash | nsa |" in table
    assert "| 32 / 2 of 128 | 5 /  | 4 /  |  /  | 2.00x / ; 4.00x /  | 0.50x / ; 0.50x /  |" in table
    assert "| 16 / 2 of 128 | 50 /  | 40 /  |  /  | 20.00x / ; 40.00x /  | 5.00x / ; 5.00x /  |" in table
    assert "several models" not in speed_report.to_markdown([row for row in rows if row["heads"] == 32])


def test_the_whole_report(tmp_path, capsys, monkeypatch):
    """Two devices, heads of two models, decoding, and what was not measured; table and figures are in ``expected``,
    checked by hand."""
    figures = []
    monkeypatch.setattr(speed_report, "save", lambda figure, path: figures.append((path.name, shown(figure))))
    other = {
        "device": "another GPU",
        "dirty": True,
        "git_sha": None,
        "versions": {"torch": "2", "triton": "3", "x": None},
    }
    short = {"length": 512, "causal_sparsity": 0.5, "extra_mib": None, "graph_ms": 0.25}
    rows = [
        *a_run(),
        make_row("dash", 1.0, **short | {"length": 1024, "sparsity": 0.9, "graph_ms": 0.5}),
        make_row("dash", 0.5, **short),
        make_row("routing of dash", 0.125, stage=ROUTING, graph_ms=0.0625),
        make_row(FLASH_3, 0.5, 512, stage=DENSE, graph_ms=0.125),
        make_row("nsa", None, 1024, status="error", detail="RuntimeError:\nno | such"),
        make_row("nsa", None, 4096, BOTH, sparsity=0.9, status="error", detail="RuntimeError:\nno | such"),
        make_row("nsa", None, 8192, status="out of time"),
        make_row("nsa", 12.0, 4096, BOTH),
        *(row | other for row in a_run("b", flash_3=False) if row["length"] < 16384),
        make_row("dash", 3.0, run="c", heads=16, kv_heads=16, head_dim=64, call_ms=4.0, causal_sparsity=0.725),
        make_row(FLASH_3, 6.0, run="c", heads=16, kv_heads=16, head_dim=64, stage=DENSE),
    ]
    for length, batch, dense, ms in ((32768, 1, 0.25, 0.125), (32768, 16, 4.0, 1.0), (131072, 1, 1.0, 0.25)):
        common = {"length": length, "batch": batch, "name": DECODE, "layers": 8, "extra_mib": None}
        if batch > 1:
            rows.append(make_row(CUDNN, 99.0, stage=DENSE, **common))  # of which no share stands for another
        elif length > 32768:
            rows.append(make_row(FLASH_3, 0.5, stage=DENSE, **common))
        rows += [make_row(FULL, dense, stage=DENSE, **common)]
        rows += [make_row("dash", ms, **common | {"layers": 6}, sparsity=0.9)]
        rows += [make_row("nsa", None, **common, status="failed check", detail="out off by 0.5, allowed 0.02")]
    common = {"length": 32768, "batch": 2, "name": MODEL_DECODE, "layers": 16, "parameters": 1_234_567_890}
    common |= {"extra_mib": None, "tokens_per_second": 400.0}
    rows += [make_row(FULL, 5.0, stage=DENSE, **common)]
    rows += [make_row("dash", 2.5, **common | {"tokens_per_second": 800.0}, compiled=True)]
    append_rows(tmp_path / SPEED, rows)
    speed_report.main([str(tmp_path)])
    table = (tmp_path / "speed.md").read_text()
    assert capsys.readouterr().out == f"{table}\n{tmp_path / 'speed.png'} and .pdf, speed.md\n"
    pyplot().close("all")
    drawn = "\n".join(line for name, lines in figures for line in (name, *lines))
    for name, text in (("report.md", table), ("report.txt", drawn)):
        assert_as_expected(text, Path(__file__).parent / "expected" / name, tmp_path)


def test_a_report_without_rows_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        speed_report.main([str(tmp_path)])
    assert end.value.code == 1
    assert "no rows" in capsys.readouterr().err


def test_rows_are_appended_whole_and_half_a_row_is_dropped(tmp_path):
    path = tmp_path / SPEED
    append_rows(path, [{"a": 1}])
    with path.open("a") as file:
        file.write('{"a": 2')
    assert read_rows(path) == [{"a": 1}]
    append_rows(path, [{"a": 3}])
    assert read_rows(path) == [{"a": 1}, {"a": 3}]
