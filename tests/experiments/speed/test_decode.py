"""What the speed benchmark decodes, at toy size: its gate, its rows, and what they become in tables."""

import math
import sys
from dataclasses import replace
from functools import partialmethod
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters

pytest.importorskip("triton")

from dashattn.backends import AttentionShape, InfLLMv2Config, build_backend
from dashattn.cache import DecodeCache
from dashattn.ops.decode.reference import cached_attention
from dashattn.selection import Selection
from experiments.files import SPEED, read_rows
from experiments.sparsity import Found
from experiments.speed import benchmark as speed
from experiments.speed import decode as speed_decode
from experiments.speed import decode_steps
from experiments.speed import report as speed_report
from experiments.speed import rows as speed_rows
from experiments.speed.config import SpeedConfig, check
from experiments.speed.decode_steps import DENSE_BASELINES, Step, assess, build, fill, make_inputs, turn_knob
from experiments.speed.inputs import Shape
from experiments.speed.measure import failed_check
from experiments.speed.methods import SELECTED_BLOCKS, UnavailableError
from experiments.speed.rows import DECODE, DENSE, FLASH_3, FULL, MODEL_DECODE, WHOLE
from models.config import ModelConfig
from models.transformer import Transformer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = Shape(heads=4, kv_heads=2, head_dim=16, chunk_size=32, dtype=torch.float16)
MODEL = ModelConfig(
    hidden_size=32, intermediate_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, max_seq_len=256
)


def make_config(tmp_path, **changes):
    values = {"heads": 4, "kv_heads": 2, "head_dim": 16, "chunk_size": 32, "check_length": 96, "dtype": "fp16"}
    values |= {"lengths": [], "sparsities": [0.4], "backends": ["dash"], "baselines": [], "model": MODEL}
    values |= {"decode": [[128, 2]], "decode_model": [], "output_dir": str(tmp_path)}
    return SpeedConfig(**values | changes)


@pytest.fixture
def rows_of(monkeypatch, tmp_path):
    """rows_of(**changes): the rows of a benchmark whose clock says 6 ms."""

    def rows(**changes):
        monkeypatch.setattr(speed_decode, "LAYERS", (2, 2))
        monkeypatch.setattr(speed_decode, "CHECK_BATCH", 3)
        compile_layers = partialmethod(Transformer.compile_layers, backend="eager")
        monkeypatch.setattr(Transformer, "compile_layers", compile_layers)
        monkeypatch.setattr(speed_decode, "graph_times", lambda call, *_: [call() and 5.0, 7.0, 6.0])
        rows.asked = []

        def measure(call, *rest):
            rows.asked.append(rest)
            return [call() is not None and 5.0, 7.0, 6.0]

        monkeypatch.setattr(speed_decode, "measure", measure)
        config = make_config(tmp_path, **changes)
        check(config)
        speed.run(config, DEVICE, lambda line: None)
        return read_rows(tmp_path / SPEED)

    return rows


@pytest.mark.long
def test_a_layers_rows(rows_of):
    rows = rows_of(backends=["dash", "nsa"], baselines=["flash", "released_dash"], decode=[[160, 2]])
    assert [(row["method"], row["stage"], row["sparsity"], row["status"]) for row in rows] == [
        (FULL, DENSE, None, "ok"),
        ("SDPA flash", DENSE, None, "ok"),
        ("dash", WHOLE, 0.4, "ok"),
        ("nsa", WHOLE, 0.4, "ok"),
        ("released DashAttention", WHOLE, 0.4, "not installed"),
    ]
    for row in rows[:4]:
        assert (row["pass"], row["length"], row["batch"], row["layers"]) == (DECODE, 160, 2, 2)
        assert (row["ms"], row["ms_min"], row["ms_max"]) == (3.0, 2.5, 3.5)  # of one layer
        assert row["errors"]["out"] < 0.002
    assert rows[2]["causal_sparsity"] == pytest.approx(0.4, abs=0.1)
    assert rows[3]["knob"] == 3  # of 5 blocks
    # its own block, of which half is there, and 2 of 4
    assert rows[3]["causal_sparsity"] == pytest.approx(1 - (2 * 32 + 17) / (4 * 32 + 17))


@pytest.mark.parametrize(("length", "batch", "layers"), [(65536, 2, 8), (65536, 4, 6), (2048, 1, 32)])
def test_layers_read_more_than_a_cache_of_the_gpu(tmp_path, monkeypatch, length, batch, layers):
    """128 MiB, of 512 bytes a token and of a quarter of the tokens; at least 6 layers, and 32 at most."""
    made = []
    monkeypatch.setattr(speed_decode, "make_inputs", lambda shape, layers, *_: made.append(layers))
    config, shape = make_config(tmp_path, sparsities=[0.5, 0.75]), Shape(8, 4, 32, 64, torch.float16)
    decoding = speed_decode.Decoding(config, shape, "cpu", math.inf)
    monkeypatch.setattr(decoding, "layer", lambda make, *_: {"made": make()})
    assert len(list(decoding.layers(length, batch))) == 3
    assert made == [layers]


def test_a_layers_gates_and_clock(tmp_path, monkeypatch):
    """Eight sequences of up to the check's length first, then the case itself; the time is a layer's share."""
    made, timed, checked = [], [], []
    monkeypatch.setattr(speed_decode, "make_inputs", lambda *args: made.append(args) or inputs("small"))
    monkeypatch.setattr(
        speed_decode, "graph_times", lambda call, *rest: timed.append((call(), *rest)) or [8.0, 4.0, 5.0]
    )

    def inputs(name):
        return SimpleNamespace(shape=SHAPE, caches=[None] * 4, device_lengths=name)

    def layer(is_ours, repetitions=12, **errors):
        def prepare(given, target):
            def check(lengths):
                checked.append((lengths, target))
                return {"out": errors.get(lengths, 0.001)}, 0.75

            return SimpleNamespace(check=check, run=lambda: f"run {given.device_lengths}"), 3

        config = make_config(tmp_path, check_length=72, seed=5, repetitions=repetitions)
        for seen in (made, timed, checked):
            seen.clear()
        decoding = speed_decode.Decoding(config, SHAPE, "cpu", math.inf)
        return decoding.layer(lambda: inputs("large"), prepare, 0.5, is_ours)

    values = {"errors": {"out": 0.001}, "causal_sparsity": 0.75, "knob": 3, "layers": 4}
    times = {"status": "ok", "ms": 1.25, "ms_min": 1.0, "ms_max": 2.0}
    assert layer(True) == values | times
    assert made == [(SHAPE, 1, 72, [0, 10, 20, 30, 40, 50, 60, 71], 6, "cpu")]
    assert checked == [("small", 0.5), ("large", 0.5)]
    assert timed == [("run large", 3, 40)]
    layer(True, repetitions=99)
    assert timed == [("run large", 3, 99)]
    assert layer(False) == values | times
    assert (made, checked) == ([], [("large", 0.5)])
    failed = {"status": "failed check", "detail": "out off by 0.01, allowed 0.005"}
    assert layer(True, small=0.01) == failed | {"errors": {"out": 0.01}}
    assert layer(True, large=0.01) == values | failed | {"errors": {"out": 0.01}}
    assert layer(False, large=0.01)["status"] == "ok"  # others' kernels may round more
    assert layer(False, large=0.03)["detail"] == "out off by 0.03, allowed 0.02"
    assert timed == []


def test_a_whole_models_rows(rows_of, monkeypatch):
    """The step that is timed is the compiled one, at each sparsity; heads are the model's."""
    counters.clear()
    filled, fill_all = [], speed_decode.fill
    monkeypatch.setattr(speed_decode, "fill", lambda *args: filled.append(args[-1]) or fill_all(*args))
    rows = rows_of(decode=[], decode_model=[[128, 3]], sparsities=[0.3, 0.4], heads=8, kv_heads=8, head_dim=32)
    assert filled == [[112] * 3] * 2  # half a chunk short of the length; once for all sparsities
    assert rows_of.asked == [(3, 40)] * 3
    assert [(row["method"], row["pass"], row["status"], row["compiled"]) for row in rows] == [
        (FULL, MODEL_DECODE, "ok", True),
        ("dash", MODEL_DECODE, "ok", True),
        ("dash", MODEL_DECODE, "ok", True),
    ]
    assert rows[1]["causal_sparsity"] < rows[2]["causal_sparsity"]
    assert counters["frames"]["ok"] > 0
    assert {row["tokens_per_second"] for row in rows} == {3 / 6e-3}
    assert {tuple(row[name] for name in ("heads", "kv_heads", "head_dim", "layers")) for row in rows} == {(4, 2, 16, 2)}
    assert rows[0]["parameters"] > 2 * speed_decode.VOCABULARY * MODEL.hidden_size


def test_backends_and_the_reference_agree_on_infllmv2():
    inputs = make_inputs(replace(SHAPE, chunk_size=64), 1, 1216, [1000], 0, DEVICE)
    step, topk = build("infllmv2", inputs, 0.9)
    errors, sparsity = step.check(inputs.device_lengths)
    assert topk == 18  # what is forced
    assert errors[SELECTED_BLOCKS] == 0
    assert errors["out"] < 0.002
    assert sparsity == 0  # 16 blocks are there


def test_the_sparsity_that_a_knob_has_is_of_all_layers_and_sequences(monkeypatch):
    """Of two sequences that end at 40 and 100 the blocks of 16, with topk 4: the own one and three before it."""
    shape = AttentionShape(32, 2, 2, 16)
    config = InfLLMv2Config(kernel_size=8, kernel_stride=4, block_size=16, window_size=16, topk=9, impl="reference")
    backends = [build_backend(config, shape) for _ in range(3)]
    cache = DecodeCache([backend.cache_layout() for backend in backends], 2, 128, dtype=torch.float32, device="cpu")
    fill(backends, cache, [tuple(torch.randn(2, 2, 128, 2, 16)) for _ in backends], [40, 100])
    found = []

    def nearest(measure, *_):
        found.append(measure(4))
        return Found(4, found[0], {})

    monkeypatch.setattr(decode_steps, "nearest_knob", nearest)
    queries = [torch.randn(2, 1, 2, 16) for _ in backends]
    assert turn_knob(backends, queries, cache.layers, [None] * 3, 0.5) == 4
    assert {backend.config.topk for backend in backends} == {4}
    assert found == [pytest.approx(1 - ((2 * 16 + 9) + (3 * 16 + 5)) / (41 + 101))]


def test_dash_sink_reads_the_first_chunk_at_the_sparsity_asked_for():
    inputs = make_inputs(SHAPE, 2, 512, [500], 0, DEVICE)
    step, _ = build("dash_sink", inputs, 0.5)
    errors, sparsity = step.check(inputs.device_lengths)
    assert errors[SELECTED_BLOCKS] == 0
    assert errors["out"] < 0.002
    assert sparsity == pytest.approx(0.5, abs=0.06)
    _, selections = step.expected()
    assert all(made.mask()[..., 0].all() for made, _ in selections)


@pytest.mark.parametrize("name", ["dash_topk", "dash_topp"])
def test_other_selectors_read_as_much_as_asked_for(name):
    inputs = make_inputs(SHAPE, 2, 512, [500], 0, DEVICE)
    step, _ = build(name, inputs, 0.5)
    errors, sparsity = step.check(inputs.device_lengths)
    assert errors[SELECTED_BLOCKS] == 0
    assert errors["out"] < 0.002
    assert sparsity == pytest.approx(0.5, abs=0.06)


def test_the_authors_package_decodes_over_what_it_selects(monkeypatch):
    """With a stand-in that selects every other block and attends by the reference."""
    inputs, scales = make_inputs(SHAPE, 2, 160, [140, 140], 0, "cpu"), []
    mask = torch.tensor([True, False, True, False, True]).expand(2, 1, 2, 5)

    def score_blocks(q, pooled, size, *, estimate_diag, sigma):
        assert (pooled.shape, size, estimate_diag, sigma) == ((2, 2, 4, 16), 32, True, 1e6)  # of whole chunks
        scales.append((q / inputs.q.transpose(1, 2)).mean().item())
        return Selection.from_mask(mask, 32).words, "its prior"

    def full_attn(q, k, v, words, size, cu_seqlens, prior):
        assert (k.shape, v.shape, cu_seqlens, prior) == ((2, 2, 141, 16), (2, 2, 141, 16), None, "its prior")
        tensors = (x.transpose(1, 2) for x in (q, k, v))
        return cached_attention(*tensors, inputs.device_lengths, Selection(words, size)).transpose(1, 2)

    package = ModuleType("dash_attn")
    package.decoding = SimpleNamespace(score_blocks=score_blocks, full_attn=full_attn)
    monkeypatch.setitem(sys.modules, "dash_attn", package)
    monkeypatch.setattr(decode_steps, "need", lambda name: None)
    monkeypatch.setattr(decode_steps, "build", lambda name, inputs, target: (name, 2.0 if target == 0.4 else None))
    step, scale = decode_steps.released_dash(inputs, 0.4)
    errors, sparsity = step.check(inputs.device_lengths)
    assert (scale, set(scales)) == (2.0, {2.0})
    assert errors == {"out": pytest.approx(0, abs=1e-3), SELECTED_BLOCKS: 0}
    assert sparsity == pytest.approx(1 - (2 * 32 + 13) / 141)


# correctness gate


def test_what_is_wrong_is_not_timed(rows_of, monkeypatch):
    def prepare(inputs, target):
        step, _ = DENSE_BASELINES["flash"][1](inputs, target)
        return Step(lambda: [out * 1.03 for out in step.run()], step.expected), None

    monkeypatch.setitem(DENSE_BASELINES, "cudnn", ("off", prepare))
    rows = rows_of(backends=[], baselines=["cudnn"])
    (wrong,) = (row for row in rows if row["method"] == "off")
    assert (wrong["status"], wrong["ms"]) == ("failed check", None)
    assert "out off by 0.03" in wrong["detail"]


def test_a_kernel_that_misses_a_block_is_caught(rows_of, monkeypatch):
    from dashattn.ops.decode import triton as kernels

    attend = kernels.attend

    def shortened(q, k, v, lengths, words, *rest, **options):
        return attend(q, k, v, lengths, words if words is None else words & ~1, *rest, **options)

    monkeypatch.setattr(kernels, "attend", shortened)
    assert {row["method"]: row["status"] for row in rows_of()} == {FULL: "ok", "dash": "failed check"}


def test_few_blocks_may_be_selected_otherwise():
    mask = torch.zeros(1, 1, 2, 300, dtype=torch.bool)
    mask[..., :150] = True
    other = mask.clone()
    other[0, 0, 0, 149] = False
    made, wanted = (Selection.from_mask(m, 32) for m in (other, mask))
    ones = [torch.ones(1, 1, 4, 16)]
    errors, sparsity = assess(ones, ones, [(made, wanted)], torch.tensor([300 * 32 - 1]))
    assert errors == {"out": 0, SELECTED_BLOCKS: pytest.approx(1 / 300)}
    assert sparsity == pytest.approx(1 - 149.5 / 300)
    assert not failed_check(errors, DECODE, 0.005)
    assert failed_check(errors | {SELECTED_BLOCKS: 0.006}, DECODE, 0.005)
    assert failed_check(errors | {"out": math.inf}, DECODE, 0.005)


def test_knobs_that_cannot_be():
    inputs = make_inputs(SHAPE, 1, 64, [40], 0, DEVICE)
    with pytest.raises(UnavailableError, match="forced"):
        build("nsa", inputs, 0.5)
    # Of 64 blocks all but one are whole: 16 are a quarter of the keys, and 3 are forced.
    inputs = make_inputs(SHAPE, 1, 64 * 32, [64 * 32 - 16], 0, DEVICE)
    assert build("nsa", inputs, 0.75)[1] == 16
    assert build("nsa", inputs, 0.99)[1] == 3


def test_a_backend_without_a_line_of_its_own_is_timed_as_itself(rows_of):
    _, row = rows_of(backends=["sink_window"], sparsities=[0.5], decode=[[16 * 32, 1]])
    assert (row["method"], row["status"], row["errors"]["out"]) == ("sink_window", "ok", pytest.approx(0, abs=1e-3))
    assert (row["knob"], row["causal_sparsity"]) == (
        6,
        pytest.approx(0.5, abs=0.03),
    )  # of 16 blocks 6, the first, its own


def test_out_of_time(rows_of):
    rows = rows_of(time_budget=1e-9, decode_model=[[128, 1], [256, 2]])
    cases = (DECODE, 128, 2), (MODEL_DECODE, 128, 1), (MODEL_DECODE, 256, 2)
    assert [(row["pass"], row["length"], row["batch"], row["method"], row["status"]) for row in rows] == [
        (*case, method, "out of time") for case in cases for method in (FULL, "dash")
    ]
    shape = (MODEL.num_heads, MODEL.num_kv_heads, MODEL.head_dim, MODEL.num_layers)  # of the model, not of the layer
    assert all(tuple(row[name] for name in ("heads", "kv_heads", "head_dim", "layers")) == shape for row in rows[2:])


def test_one_case_that_does_not_fit_leaves_the_others(rows_of, monkeypatch):
    make = speed_decode.make_inputs

    def limited(shape, layers, capacity, *rest):
        if capacity > 128:
            raise torch.OutOfMemoryError
        return make(shape, layers, capacity, *rest)

    monkeypatch.setattr(speed_decode, "make_inputs", limited)
    rows = rows_of(decode=[[512, 1], [128, 1]], backends=[])
    assert [(row["length"], row["status"]) for row in rows] == [(512, "out of memory"), (128, "ok")]


def test_flash_attention_3_through_jax(rows_of, monkeypatch):
    asked = []

    def run_jax(options, seconds):
        asked.append(options)
        times = {"splits": 8, "ms": 0.5, "ms_min": 0.4, "ms_max": 0.6}
        replies = [{"errors": {"out": 0.002}, "jax": "0.8", "package": "0.1"}]
        return [*replies, {"length": 96, "batch": 2} | times, {"length": 96, "batch": 4, "error": "no"}], "killed"

    monkeypatch.setattr(speed_decode, "find_spec", lambda name: name)
    monkeypatch.setattr(speed_decode, "run_jax", run_jax)
    cases = [[96, 2], [96, 4], [64, 1]]
    rows = rows_of(decode=cases, backends=[], baselines=["flash_attention_3"])
    assert [row["status"] for row in rows if row["method"] == FLASH_3] == ["ok", "error", "error"]
    assert [row["detail"] for row in rows if row["method"] == FLASH_3][1:] == ["no", "killed"]
    assert "8 splits" in rows[0]["detail"]
    assert asked == [
        {"heads": 4, "kv_heads": 2, "head_dim": 16, "dtype": "fp16", "seed": 0, "warmup": 3, "repetitions": 12}
        | {"check_length": 96, "decode": cases, "layers": 2, "package": "flash_attn3_jax"}
    ]
    first = {"layers": 2, "ms": 0.5, "ms_min": 0.4, "ms_max": 0.6, "errors": {"out": 0.002}, "batch": 2, "length": 96}
    first |= {"detail": "flash_attn3_jax 0.1, JAX 0.8, 8 splits", "stage": DENSE, "pass": DECODE, "sparsity": None}
    assert {name: rows[0][name] for name in first} == first
    ratios = {row["method"]: row["ratio"] for row in speed_rows.with_ratios(rows) if row["batch"] == 2}
    assert ratios == {FLASH_3: 1, FULL: 0.5 / 3}


# tables


def make_row(method, ms, batch=1, sparsity=None, **changes):
    row = {"run": "a", "device": "some GPU", "versions": {}, "git_sha": None, "dirty": False, "date": "2026-01-01"}
    row |= {"heads": 32, "kv_heads": 2, "head_dim": 128, "chunk_size": 64, "dtype": "bf16", "length": 131072}
    row |= {"pattern": sparsity and "clustered", "sparsity": sparsity, "causal_sparsity": sparsity, "layers": 6}
    row |= {"stage": WHOLE if sparsity else DENSE, "method": method, "pass": DECODE, "status": "ok", "detail": ""}
    return row | {"batch": batch, "ms": ms, "graph_ms": None, "extra_mib": None} | changes


def some_rows():
    rows = [make_row(FULL, 0.06), make_row("dash", 0.03, sparsity=0.75)]
    rows += [make_row(FULL, 0.9, batch=16), make_row("dash", 0.3, batch=16, sparsity=0.75)]
    model = {"pass": MODEL_DECODE, "heads": 16, "parameters": 1e9}
    rows.append(make_row(FULL, 4.0, **model, tokens_per_second=250.0))
    rows.append(make_row("dash", 2.0, sparsity=0.75, **model, tokens_per_second=500.0, compiled=True))
    return rows


def test_two_models_with_heads_of_one_shape_are_two_tables():
    """The second takes no row of the first's, though all but its layers is alike; measured again it would."""
    model = {"pass": MODEL_DECODE, "heads": 16, "tokens_per_second": 250.0}
    small, large = ({"layers": layers, "parameters": layers * 1e8} for layers in (3, 9))
    rows = [make_row(FULL, ms, **model, **size) for ms, size in ((7.0, small), (1.0, small), (4.0, large))]
    assert speed_rows.newest(rows) == rows[1:]
    table = speed_report.to_markdown(rows)
    assert [line.split(" random")[0] for line in table.splitlines() if "random parameters" in line] == [
        f"Decoding a token, a whole model of {millions}M" for millions in (300, 900)
    ]


def test_table():
    table = speed_report.to_markdown([*some_rows(), make_row(FLASH_3, 0.09)])
    assert "| 128k | 1 | 75.0% | dash | 30.0 | 3.00x | 6 |" in table  # to FlashAttention-3
    assert "| 128k | 16 | 75.0% | dash | 300.0 | 3.00x | 6 |" in table  # to our own, which alone was measured
    assert "| 128k | 1 | 75.0% | dash | 2 | 2.00x | 500 |" in table
    assert "| 128k | 1 |  | full, not compiled | 4 | 1.00x | 250 |" in table
    assert "| 128k | 1 |  | full | 60.0 | 1.50x | 6 |" in table
    assert "forward" not in table


def test_what_was_not_decoded_is_listed():
    rows = [make_row("nsa", None, batch, 0.9, status="out of time", detail="raise time_budget") for batch in (1, 16)]
    table = speed_report.to_markdown([*some_rows(), *rows])
    assert "| nsa | whole | out of time: raise time_budget | decode | clustered 90% | 128k, 128k x 16 |" in table


def test_figure(tmp_path):
    speed_report.draw(some_rows(), tmp_path / "speed")
    assert {path.name for path in tmp_path.iterdir()} == {"speed.png", "speed.pdf"}
    assert speed_report._columns(some_rows()[:4]) == [(DECODE, 0.75)]
