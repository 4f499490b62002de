"""How operations are timed, with a clock and a GPU made by hand: which calls are inside, what is divided by what."""

import json
import subprocess
import sys
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.special import softmax

from experiments.files import ROOT
from experiments.speed import measure
from experiments.speed.inputs import Problem
from experiments.speed.methods import Operation, UnavailableError, explain


class Gpu:
    """A queue that works off what is asked of it; times in milliseconds, memory in MiB."""

    def __init__(self, monkeypatch):
        self.now, self.log, self.allocated, self.peak = 0.0, [], 100, 100
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = gpu.now

            def elapsed_time(self, end):
                assert gpu.log[-1] == "synchronize"
                return end.at - self.at

        for name, stand_in in {
            "Event": Event,
            "synchronize": lambda: gpu.log.append("synchronize"),
            "reset_peak_memory_stats": lambda: setattr(gpu, "peak", gpu.allocated),
            "memory_allocated": lambda: gpu.allocated * 2**20,
            "max_memory_allocated": lambda: gpu.peak * 2**20,
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(measure.time, "perf_counter", lambda: gpu.now / 1e3)

    def call(self, *durations):
        """A call that takes these times, one after the other."""
        left = iter(durations)

        def work():
            self.log.append("call")
            self.now += next(left)
            self.allocated, self.peak = 130, max(self.peak, 150)
            return "result"

        return work


@pytest.fixture
def gpu(monkeypatch):
    return Gpu(monkeypatch)


def test_events_stand_around_each_repetition_and_warm_up_counts_nothing(gpu):
    assert measure.measure(gpu.call(100.0, 50.0, 1.0, 2.0, 4.0), warmup=2, repetitions=3) == [1.0, 2.0, 4.0]
    assert gpu.log == ["call", "call", "synchronize", "call", "call", "call", "synchronize"]


def test_calls_alone_wait_for_what_is_before_and_for_their_end(gpu):
    assert measure.call_ms(gpu.call(5.0, 1.0, 2.0), 3) == pytest.approx(2.0)
    assert gpu.log == ["synchronize", "call", "synchronize"] * 3


def test_replays_of_a_graph_leave_out_its_capture(gpu, monkeypatch):
    class Graph:
        replay = staticmethod(gpu.call(7.0, 3.0, 1.0, 2.0))

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: pytest.MonkeyPatch.context())
    assert measure.graph_times(lambda: "captured", 1, 3) == [3.0, 1.0, 2.0]
    Graph.replay = staticmethod(gpu.call(7.0, 3.0, 1.0, 2.0))
    assert measure.graph_ms(lambda: "captured", 3) == 2.0

    def waits():
        raise RuntimeError("operation not permitted when stream is capturing")

    assert measure.graph_ms(waits, 3) is None


def test_memory_beside_what_a_call_began_with_and_returns(gpu):
    assert measure.extra_mib(gpu.call(1.0)) == 20  # at most 150, of which 100 before and 30 of the result
    assert gpu.log == ["synchronize", "call", "synchronize"]


def test_passes_are_those_an_operation_has():
    x = torch.ones(2, requires_grad=True)
    problem = Problem(None, x, x, x, torch.tensor([1.0, 10.0]), None)
    both = measure.passes(Operation(lambda: 3 * x, {"q": x}), problem)
    assert not both["forward"]().requires_grad
    out, (gradient,) = both["forward+backward"]()
    assert (out.tolist(), gradient.tolist()) == ([3, 3], [3, 30])
    assert list(measure.passes(Operation(lambda: 3 * x, {}), problem)) == ["forward"]


def test_bounds_of_each_error():
    bound = {"out": 0.01, "q": 0.01, "chunk_query": 0.02, "selected rows": 0.005, "selected blocks": 0.005}
    assert measure.failed_check(bound, "forward+backward", 0.01) == {}
    over = {name: 1.1 * value for name, value in bound.items()}
    said = "out off by 0.011, allowed 0.01; {}selected rows off by 0.0055, allowed 0.005{}"
    gradients = "q off by 0.011, allowed 0.01; chunk_query off by 0.022, allowed 0.02; "
    blocks = "; selected blocks off by 0.0055, allowed 0.005"
    assert measure.failed_check(over, "forward", 0.01) == {"status": "failed check", "detail": said.format("", "")}
    for name in ("forward+backward", "decode"):
        assert measure.failed_check(over, name, 0.01)["detail"] == said.format(gradients, blocks)
    assert measure.failed_check({"out": float("nan")}, "forward", 0.01)["detail"] == "out off by nan, allowed 0.01"


def test_a_process_of_its_own_says_what_it_found_and_how_it_ended(monkeypatch):
    asked = []

    def run(command, **options):
        asked.append((command, options))
        found = next(ends)
        if isinstance(found, Exception):
            raise found
        return SimpleNamespace(**found)

    monkeypatch.setattr(measure.subprocess, "run", run)
    late = subprocess.TimeoutExpired("x", 1.0, output=b'{"b": 2}\n{"c"')
    ends = iter(
        (
            {"stdout": 'warning\n{"a": 1}\n{"half', "stderr": "", "returncode": 0},
            {"stdout": "", "stderr": "first\nlast " + "x" * 400 + "\n", "returncode": 1},
            {"stdout": "", "stderr": " \n", "returncode": -9},
            late,
            subprocess.TimeoutExpired("x", 1.0),
        )
    )
    assert measure.run_jax({"lengths": [8]}, 30.0) == ([{"a": 1}], "")
    command, options = asked[0]
    assert command == [sys.executable, "-m", "experiments.speed.jax_flash3", '{"lengths": [8]}']
    assert (options["timeout"], options["cwd"], options["text"]) == (30.0, ROOT, True)
    assert options["env"]["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    assert measure.run_jax({}, -5.0) == ([], "last " + "x" * 295)
    assert asked[-1][1]["timeout"] == 1.0
    assert measure.run_jax({}, 1.0) == ([], "exit code -9")
    assert measure.run_jax({}, 1.0) == ([{"b": 2}], "out of time")
    assert measure.run_jax({}, 1.0) == ([], "out of time")


def test_what_has_no_time_says_why():
    assert explain(UnavailableError("not installed", "no fla")) == ("not installed", "no fla")
    assert explain(torch.OutOfMemoryError("CUDA out of memory")) == ("out of memory", "")
    assert explain(ValueError("x" * 400)) == ("error", "ValueError: " + "x" * 300)


@pytest.fixture
def flash3(monkeypatch, request):
    """``jax_flash3`` with NumPy in place of JAX: attention takes a millisecond, by which its input grows, and decoding
    as many as its splits are away from 6."""
    clock, splits_tried, capability = [0.0], [], getattr(request, "param", "9.0")

    def attend(q, *rest, **options):
        clock[0] += 1e-3
        return q + 1

    def attend_cache(q, k, v, num_splits):
        splits_tried.append(num_splits)
        clock[0] += 1e-3 * (1 + abs(num_splits - 6))
        return q + 1

    def vjp(function, *inputs):
        return function(*inputs), lambda grad: list(inputs)

    def normal(key, size, dtype):
        return np.full(size, float(key))

    jax = SimpleNamespace(
        random=SimpleNamespace(PRNGKey=lambda seed: seed, split=lambda key, n: range(key, key + n), normal=normal),
        jit=lambda function: function,
        vjp=vjp,
        block_until_ready=lambda x: x,
        nn=SimpleNamespace(softmax=softmax),
        devices=lambda: [SimpleNamespace(core_count=24, compute_capability=capability)],
    )
    numpy = SimpleNamespace(**vars(np) | {"bfloat16": "bf16", "float16": "fp16"})
    package = SimpleNamespace(flash_mha=attend, flash_mha_with_kvcache=attend_cache)
    for name, module in {"jax": jax, "jax.numpy": numpy, "flash_attn3_jax": package}.items():
        monkeypatch.setitem(sys.modules, name, module)
    jax.numpy = numpy
    monkeypatch.delitem(sys.modules, "experiments.speed.jax_flash3", raising=False)
    module = import_module("experiments.speed.jax_flash3")
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    yield module, splits_tried
    sys.modules.pop("experiments.speed.jax_flash3")


OPTIONS = {"heads": 4, "kv_heads": 2, "head_dim": 8, "dtype": "bf16", "seed": 3, "warmup": 1, "repetitions": 3}
OPTIONS |= {"package": "flash_attn3_jax"}


def test_flash_attention_3_is_timed_in_chains_and_told_for_one_call(flash3, capsys):
    module, _ = flash3
    q, k, v, grad = module.inputs(16, OPTIONS)
    assert [x.shape for x in (q, k, v, grad)] == [(1, 16, 4, 8), (1, 16, 2, 8), (1, 16, 2, 8), (1, 16, 4, 8)]
    assert [x.flat[0] for x in (q, k, v, grad)] == [3, 4, 5, 6]  # a key each
    for backward in (False, True):
        assert module.measure(backward, (q, k, v, grad), OPTIONS) == pytest.approx([1.0] * 3)
    module.prefill(OPTIONS | {"lengths": [16, 32]})
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["length"], row["pass"]) for row in rows] == [(n, p) for n in (16, 32) for p in module.PASSES]
    assert [row["ms"] for row in rows] == pytest.approx([1.0] * 4)
    assert module.row_of([3.0, 1.0, 2.5]) == {"ms": 2.5, "ms_min": 1.0, "ms_max": 3.0}


def test_flash_attention_3_says_which_package_it_is_of(flash3, capsys, monkeypatch):
    module, _ = flash3
    monkeypatch.setattr(module, "packages_distributions", lambda: {"flash_attn3_jax": ["wheel-of-a-port"]})
    monkeypatch.setattr(module, "version", {"wheel-of-a-port": "0.3", "jax": "0.11"}.get)
    monkeypatch.setattr(module, "errors", lambda options: {"out": 0.001})
    module.main(OPTIONS | {"lengths": [16]})
    first, *rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert first == {"errors": {"out": 0.001}, "jax": "0.11", "package": "0.3"}
    assert [row["pass"] for row in rows] == list(module.PASSES)


@pytest.mark.parametrize("flash3", ["8.0"], indirect=True)
def test_another_flash_attention_is_not_taken_for_the_third(flash3):
    with pytest.raises(SystemExit, match=r"compute capability 9\.0; this GPU's is 8\.0"):
        flash3[0].main(OPTIONS | {"lengths": [16]})


def test_the_reference_of_flash_attention_3_is_causal_attention(flash3):
    tensors = [torch.randn(2, 5, heads, 8) for heads in (4, 2, 2)]
    q, k, v = (x.transpose(1, 2) for x in tensors)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    found = flash3[0].attend_reference(*(x.numpy() for x in tensors))
    np.testing.assert_allclose(found, wanted.transpose(1, 2).numpy(), atol=1e-5)


def test_flash_attention_3_decodes_with_the_splits_that_are_fastest(flash3, capsys):
    """Of 24 processors, 2 sequences and 2 KV heads: 6 programs each, and half, twice and four times as many."""
    module, splits_tried = flash3
    options = OPTIONS | {"layers": 5, "decode": [[32, 2]]}
    q, caches = module.decode_inputs(32, 2, 5, options)
    assert (q.shape, len(caches)) == ((2, 1, 4, 8), 5)
    assert {x.shape for cache in caches for x in cache} == {(2, 32, 2, 8)}
    assert sorted(x.flat[0] for cache in caches for x in cache) == list(range(4, 14))
    splits, times = module.measure_decode(32, 2, options)
    assert set(splits_tried) == {3, 6, 12, 24}
    assert (splits, times) == (6, pytest.approx([1.0] * 3))  # of a layer
    module.decode(options)
    (row,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert row == {"length": 32, "batch": 2, "splits": 6} | dict.fromkeys(
        ("ms", "ms_min", "ms_max"), pytest.approx(1.0)
    )
