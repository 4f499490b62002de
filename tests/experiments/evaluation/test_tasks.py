"""Tasks on a trained checkpoint: what their rows say, against the model and against counting by hand."""

from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import models.generate
from dashattn.backends import DashConfig
from dashattn.backends.dash import DashBackend
from dashattn.routing import Routing
from dashattn.selection import Selection
from dashattn.stats import AttentionStats
from data import IGNORE, Batch, build_data
from data.tasks.material import Material, read_haystack
from experiments.evaluation import select
from experiments.evaluation.config import EvaluateConfig
from experiments.evaluation.evaluate import evaluate, find_target
from experiments.evaluation.select import build_tasks
from experiments.evaluation.target import build_model, validation_stream
from experiments.evaluation.tasks import base, decoding, generated, routing
from experiments.evaluation.tasks.base import Setting, SparsityTally
from experiments.evaluation.tasks.decoding import token_ms
from experiments.evaluation.tasks.generated import GeneratedTask
from experiments.evaluation.tasks.routing import (
    Marks,
    Measured,
    Probe,
    RoutingTask,
    block_masks,
    mqar_probes,
    observe,
    score_routing,
    text_probes,
)
from experiments.evaluation.tasks.streams import SCORES, MQARForm, Tally, data_at, first_queries
from experiments.files import read_rows
from experiments.intervals import ratio_stderr
from models import ModelConfig, Transformer


def run(run_dir, **options):
    config = EvaluateConfig(run=str(run_dir), device="cpu", **options)
    return list(evaluate(config, find_target(config)))


def setting(run_dir):
    target = find_target(EvaluateConfig(run=str(run_dir), device="cpu"))
    return target, Setting(build_model(target), torch.device("cpu"), None, "step", run_dir)


def answering(right):
    """A stand-in for generation that knows the references of the prompts that ``right`` names by their number."""
    calls, whole = [], models.generate.generate

    def generate(model, prompts, *, max_new_tokens, stop_tokens, on_stats):
        whole(model, prompts, max_new_tokens=1, on_stats=on_stats)
        calls.append(len(prompts))
        generate.ends = max_new_tokens, stop_tokens
        return [right(sum(calls[:-1]) + i) for i in range(len(prompts))]

    return generate, calls


def test_a_generated_task_end_to_end(text_run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Transformer, "hidden_states", None)  # prompts are read once, into the cache
        (row,) = run(text_run, tasks=["vt"], lengths=[512], rows=2)
    assert (row["task"], row["metric"], row["length"], row["rows"], row["variant"]) == ("vt", "match", 512, 2, None)
    assert row["differs"] is None or row["differs"].startswith(("example", "no example"))
    assert 0 <= row["score"] <= 1
    assert 0 < row["causal_sparsity"] < 1
    (path,) = (text_run / "predictions").glob("*.jsonl")
    assert [len(answer["references"]) for answer in read_rows(path)] == [5, 5]
    # The sparsity is that of the prompts, each as it stands alone.
    target, at = setting(text_run)
    config = EvaluateConfig(run=str(text_run), tasks=["vt"], lengths=[512], rows=2)
    (task,) = build_tasks(config, target)
    prompts = [task.encoder.encode(sample) for sample in task.set.samples]
    assert len(set(map(len, prompts))) == 2
    tally = SparsityTally()
    for ids in prompts:
        tally.add(at.model(torch.tensor([ids]), return_stats=True).stats, packed=False)
    assert row["causal_sparsity"] == pytest.approx(tally.columns()["causal_sparsity"])
    assert row["active_tokens"] == pytest.approx(tally.columns()["active_tokens"])
    assert run(text_run, tasks=["vt"], lengths=[512], rows=2) == []


def test_what_tasks_are_built_with(text_run, monkeypatch, tmp_path):
    """How many samples where nobody says, of which seed and text, and in which order."""
    built = []

    def build_set(name, encoder, **options):
        built.append((name, encoder.name, options))
        task = SimpleNamespace(name=name)
        return SimpleNamespace(
            task=task, length=options["length"], seed=options["seed"], samples=[], key="k", differs=None
        )

    def harness(name, tokenizer, **options):
        built.append((name, tokenizer, options))
        return SimpleNamespace(names=(name,))

    monkeypatch.setattr(select, "build_set", build_set)
    monkeypatch.setattr(select, "HarnessTask", harness)
    (tmp_path / "words.txt").write_text("some words to hide a needle in\n" * 9)
    options = {"tasks": ["routing", "vt", "lm_eval/a", "niah", "vt", "loss", "lm_eval/a"], "lengths": [600, 512, 600]}
    options |= {"probes": ["niah_single_2"], "samples_seed": 7, "haystack": str(tmp_path / "words.txt")}
    options |= {"harness_fewshot": 2, "harness_path": "~/tasks", "rows_per_batch": 3, "device": "cpu"}
    monkeypatch.setenv("HOME", "/home/me")
    config = EvaluateConfig(run=str(text_run), **options)
    target = find_target(config)
    tasks = build_tasks(config, target)
    assert [task.names for task in tasks] == 2 * [("loss",), ("vt",), ("niah",), ("lm_eval/a",), ("routing",)]
    assert [(name, options.get("count"), options["length"]) for name, _, options in built] == [
        (name, count, length)
        for length in (600, 512)
        for name, count in (("vt", 100), ("niah", 100), ("lm_eval/a", None), ("niah_single_2", 32))
    ]
    assert {options["seed"] for name, _, options in built if name != "lm_eval/a"} == {7}
    materials = [options["material"] for name, _, options in built if name in ("niah", "niah_single_2")]
    assert all(material is materials[0] for material in materials)  # read once
    assert materials[0].haystack == read_haystack(tmp_path / "words.txt").haystack
    variants = [task.columns["variant"] for task in tasks if hasattr(task, "columns")]
    assert variants == 2 * [None, *["samples_seed=7"] * 3]  # loss, vt, niah, routing
    by_template = generated.GeneratedTask(tasks[1].set, SimpleNamespace(name="chatml"), 1)
    assert by_template.columns["variant"] == "template=chatml, samples_seed=7"
    _, tokenizer, given = built[2]
    assert tokenizer is target.tokenizer
    assert given == {
        "length": 600,
        "rows": None,
        "rows_per_batch": 3,
        "fewshot": 2,
        "include_path": "/home/me/tasks",
        "chat": False,
    }
    built.clear()
    config.rows, config.lengths = 5, [512]
    build_tasks(config, target)
    assert [options.get("count", options.get("rows")) for _, _, options in built] == [5] * 4
    # By the tokenizer's template; in files of each task's own, or held-out text in which samples begin anywhere.
    built.clear()
    read = []
    monkeypatch.setattr(select, "held_out_text", lambda *asked: read.append(asked) or Material())
    monkeypatch.setattr(select, "PromptEncoder", lambda tokenizer, template: SimpleNamespace(name=template))
    config.tasks, config.lengths, config.template = ["qa_1", "qa_2", "niah", "lm_eval/a"], [512, 700, 600], "tokenizer"
    config.haystack, config.squad, config.hotpotqa = None, "~/dev.json", None
    build_tasks(config, target)
    first, other, needle, asked, *_ = built
    assert [one[1] for one in (first, other, needle)] == ["tokenizer"] * 3
    assert [one[2]["material"] for one in (first, other)] == [Material(squad=Path("/home/me/dev.json")), Material()]
    assert asked[2]["chat"]
    assert read == [(target.train.data, 4 * 700)]
    built.clear()
    config.tasks, config.squad, config.hotpotqa = ["qa_2"], None, "hotpot.json"
    build_tasks(config, target)
    assert built[0][2]["material"] == Material(hotpotqa=Path("hotpot.json"))


def test_an_interrupted_task_goes_on_from_the_answers_it_has(text_run, monkeypatch):
    def failing(index):
        if index == 4:
            raise KeyboardInterrupt
        return []

    generate, calls = answering(failing)
    monkeypatch.setattr(base, "generate", generate)
    options = {"tasks": ["niah_single_1"], "lengths": [512], "rows": 5, "rows_per_batch": 1}
    with pytest.raises(KeyboardInterrupt):
        run(text_run, **options)
    assert calls == [4, 1]  # four prompts where one row would go
    (path,) = (text_run / "predictions").glob("*.jsonl")
    assert [answer["index"] for answer in read_rows(path)] == [0, 1, 2, 3]
    (task,) = build_tasks(EvaluateConfig(run=str(text_run), **options), setting(text_run)[0])
    right = task.encoder.tokenizer.encode(task.set.samples[4].references[0])
    generate, calls = answering(lambda index: [] if index else right)
    monkeypatch.setattr(base, "generate", generate)
    (row,) = run(text_run, **options)
    assert calls == [1]
    assert generate.ends == (task.set.task.max_new_tokens, task.encoder.stop_tokens)
    assert (row["score"], row["stderr"], row["samples"]) == (0.2, ratio_stderr([0, 0, 0, 0, 1], [1] * 5), 5)
    assert row["by_sample"] == [0, 0, 0, 0, 1]
    # Another knob is another set of answers, and so are other samples.
    assert [row["knob"] for row in run(text_run, **options, knobs=[20.0, 30.0])] == [30.0]
    assert calls == [1, 4, 1]
    (other,) = run(text_run, **options, samples_seed=1)
    assert calls == [1, 4, 1, 4, 1]
    assert other["set"] != row["set"] == task.set.key


def test_right_answers_score_and_the_heat_map_has_a_row_for_every_depth(text_run, monkeypatch):
    target, _ = setting(text_run)
    options = {"tasks": ["niah"], "lengths": [512], "rows": 22, "rows_per_batch": 2}
    (task,) = build_tasks(EvaluateConfig(run=str(text_run), **options), target)
    tokenizer, samples = task.encoder.tokenizer, task.set.samples
    # Right for the first eleven, one of each depth, and at depth 0 for the second, too.
    generate, _ = answering(
        lambda index: tokenizer.encode(f"It is {samples[index].references[0]}!") if index < 12 else [0]
    )
    monkeypatch.setattr(base, "generate", generate)
    clock = count(100.0, 0.5)  # half a second from one look to the next, of which a batch takes two
    monkeypatch.setattr(generated, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    rows = run(text_run, **options)
    assert [row["seconds"] for row in rows] == pytest.approx([3 * 0.5] * 11)  # batches of 8, 8 and 6
    (path,) = (text_run / "predictions").glob("*.jsonl")
    assert [answer["seconds"] for answer in read_rows(path)] == pytest.approx([0.5 / 8] * 16 + [0.5 / 6] * 6)
    assert [(row["depth"], row["score"]) for row in rows] == [(0.0, 1.0), *((i / 10, 0.5) for i in range(1, 11))]
    assert [(row["stderr"], row["samples"]) for row in rows] == [(0, 2), *[(ratio_stderr([1, 0], [1, 1]), 2)] * 10]
    template = GeneratedTask(task.set, SimpleNamespace(name="chatml"), 1).columns
    assert (template["variant"], rows[0]["variant"]) == ("template=chatml", None)
    assert {row["differs"] for row in rows} == {"haystack: held-out text of python_stdlib"}


def test_a_suite_leaves_out_what_cannot_be_and_says_so(text_run, monkeypatch, capsys):
    generate, _ = answering(lambda index: [])
    monkeypatch.setattr(base, "generate", generate)
    rows = run(text_run, tasks=["ruler"], lengths=[600], rows=1)
    assert [row["task"] for row in rows][:2] == ["niah_single_1", "niah_single_2"]
    left_out = capsys.readouterr().err
    assert "task qa_1 needs squad=FILE" in left_out
    assert len(rows) + left_out.count("left out") == 13
    with pytest.raises(ValueError, match="task qa_1 needs squad=FILE"):
        run(text_run, tasks=["qa_1"], lengths=[600], rows=1)


def test_loss_at_another_length_is_the_models_own(text_run):
    rows = run(text_run, tasks=["loss"], lengths=[32, 128], rows=3)
    assert [row["length"] for row in rows] == [32, 128]
    target, at = setting(text_run)
    for row in rows:
        data = data_at(target.train.data, row["length"], 3, MQARForm())
        (batch,) = build_data(data, split="validation", seed=0, rows=3, cache_dir=target.train.cache_dir)
        with torch.no_grad():
            output = at.model(
                batch.input_ids, labels=batch.labels, position_ids=batch.position_ids, cu_seqlens=batch.cu_seqlens
            )
        assert row["score"] == pytest.approx(output.loss.item(), abs=1e-5)


def test_sparsity_by_layer_head_and_position(text_run):
    whole, *bins = run(text_run, tasks=["sparsity"])
    assert len(whole["per_head"]) == 2
    flat = [value for layer in whole["per_head"] for value in layer]
    assert sum(flat) / len(flat) == pytest.approx(whole["score"])
    assert whole["score"] == whole["causal_sparsity"]
    assert [row["position"] for row in bins] == [[0, 0], [1, 1], [2, 3], [4, 7], [8, 15], [16, 31], [32, 63]]
    for row in bins:
        assert row["p10"] <= row["score"] <= row["p90"] <= row["position"][1] + 1
    assert bins[0]["score"] == 1
    per_head = torch.tensor([[0.5, 0.25]])
    sparsity = SimpleNamespace(per_head=lambda: per_head, columns=lambda: {"causal_sparsity": 0.375})
    counts = {2: torch.tensor([0, 4, 2, 5]), 1: torch.tensor([0, 3])}  # of 11 numbers, four are 1
    whole, *bins = SCORES["sparsity"](SimpleNamespace(sparsity=sparsity, bin_active=counts))
    assert whole == base.row("sparsity", "causal_sparsity", 0.375, per_head=per_head.tolist())
    assert bins == [
        base.row("sparsity", "active_tokens", 1, p10=1, p90=1, position=[1, 1]),
        base.row("sparsity", "active_tokens", 2, p10=1, p90=3, position=[2, 3]),
    ]


def test_sums_of_what_was_read_by_hand():
    """Two passes of two rows of three tokens, in a layer that reads one key a token and in a dense one."""
    positions = torch.arange(3).expand(2, 3)
    one, dense = torch.ones(2, 3, 2, dtype=torch.int32), (positions + 1)[..., None].expand(2, 3, 2)
    layers = [AttentionStats(one, positions, torch.full((2, 3), 5)), AttentionStats(dense, positions, 0 * positions)]
    tally = SparsityTally()
    for _ in range(2):
        tally.add(layers, packed=False)
    expected = {
        "causal_sparsity": 0.25,
        "causal_sparsity_per_layer": [0.5, 0.0],
        "paper_sparsity": None,
        "active_tokens": 1.5,
        "active_tokens_per_layer": [1.0, 2.0],
        "routing_reads": 2.5,
        "routing_reads_per_layer": [5.0, 0.0],
    }
    assert tally.columns() == SparsityTally.of([tally.record()]).columns() == expected
    assert SparsityTally.of([tally.record(), tally.record()]).tokens == 2 * tally.tokens == 24


@pytest.mark.parametrize("batches", [(3,), (2, 1), (1, 1, 1)])
def test_every_row_weighs_alike_in_the_papers_sparsity_whatever_batches_it_comes_in(batches):
    """Rows of one token more than it leaves out, in two layers: of that token's N keys so many are read."""
    length, read = 4097, torch.tensor([[1, 10, 100], [3, 20, 200]])
    active_LBTH = torch.ones(2, 3, length, 1, dtype=torch.int32)
    active_LBTH[:, :, -1, 0] = read
    tally = SparsityTally()
    for active_BTH in zip(*(x.split(batches) for x in active_LBTH), strict=True):
        positions = torch.arange(length).expand(len(active_BTH[0]), length)
        tally.add([AttentionStats(active, positions, 0 * positions) for active in active_BTH], packed=False)
    expected = 1 - read.sum().item() / 6 / length
    assert tally.columns()["paper_sparsity"] == pytest.approx(expected, abs=1e-6)


def test_the_time_of_a_token_is_measured_at_every_length_and_knob(recall_run, text_run, monkeypatch):
    seen = []

    def timed(model, ids_BT):
        seen.append(ids_BT.shape[1])
        return token_ms(model, ids_BT)

    monkeypatch.setattr(decoding, "token_ms", timed)
    for path, lengths in ((recall_run, [64, 128]), (text_run, [40])):
        rows = run(path, tasks=["decode"], lengths=lengths, knobs=[1.0, 30.0])
        assert [(row["knob"], row["length"]) for row in rows] == [(k, n) for k in (1.0, 30.0) for n in lengths]
        assert all(row["score"] > 0 and row["metric"] == "ms" for row in rows)
        assert rows[0]["causal_sparsity"] < rows[-1]["causal_sparsity"] or path == text_run
    assert seen == [64, 128, 64, 128, 40, 40]
    assert run(text_run, tasks=["decode"], lengths=[40], knobs=[1.0]) == []
    for module in ("select", "evaluate"):
        monkeypatch.setattr(f"experiments.evaluation.{module}.device_name", lambda device: "another one")
    (other,) = run(text_run, tasks=["decode"], lengths=[40], knobs=[1.0])
    assert other["device"] == "another one"


def test_a_token_takes_the_median_of_steps_that_all_stand_at_the_end_of_the_prompt(recall_run, monkeypatch):
    """Time goes by in the step alone: 1 s in the first three, and in the others as much as tokens are in the cache, but
    for some of them."""
    _, at = setting(recall_run)
    clock, inner, steps = [0.0], decoding.decode_step, []

    def decode_step(model, cache):
        step = inner(model, cache)

        def slow(token_B):
            steps.append(token_B.tolist())
            clock[0] += 1 if len(steps) <= 3 + 9 else 1e-3 * cache.host_lengths[0]
            return step(token_B)

        return slow

    monkeypatch.setattr(decoding, "decode_step", decode_step)
    monkeypatch.setattr(decoding.time, "perf_counter", lambda: clock[0])
    assert decoding.token_ms(at.model, torch.arange(48)[None]) == pytest.approx(48)
    assert steps == [[47]] * 23


def test_forms_of_mqar_are_rows_of_their_own(recall_run):
    (trained,) = run(recall_run, tasks=["recall"])
    form = MQARForm(pairs_min=2, pairs_max=4, placement="clustered")
    (other,) = run(recall_run, tasks=["recall"], mqar=form)
    assert (trained["variant"], other["variant"]) == (None, "pairs_min=2, pairs_max=4, placement=clustered")
    assert run(recall_run, tasks=["recall"], mqar=form) == []
    (longer,) = run(recall_run, tasks=["recall"], lengths=[256])
    assert (longer["length"], longer["variant"]) == (256, None)
    target = find_target(EvaluateConfig(run=str(recall_run)))
    data = data_at(target.train.data, 256, 6, MQARForm())
    assert (data.seq_len, data.pairs_max, data.curriculum_lengths) == (256, 8, [])
    (task,) = build_tasks(EvaluateConfig(run=str(recall_run), tasks=["routing"], mqar=form), target)
    assert task.columns == {"length": 64, "rows": 32, "variant": other["variant"], "probe": "mqar"}
    assert {len(probe.needed) for probe in task.probes} <= {2, 3, 4}


def test_a_query_is_the_first_where_no_earlier_position_asked_for_its_token():
    ids = torch.tensor([[5, 3, 5, 5, 0, 3, 3], [1, 1, 1, 1, 1, 1, 1]])
    asked = torch.tensor([[0, 1, 1, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0, 1]]).bool()
    assert first_queries(ids, asked).int().tolist() == [[0, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1]]
    # Those alone are counted, as asked and as answered right.
    tally = Tally(["recall"])
    tally.sparsity = SimpleNamespace(add=lambda stats, packed: None)
    likeliest = torch.tensor([[1, 1, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]]).bool()
    output = SimpleNamespace(token_losses=torch.zeros(2, 7), is_likeliest=likeliest, stats=None)
    tally.add(Batch(ids, torch.where(asked, 7, IGNORE), torch.zeros_like(ids)), output)
    assert tally.recalled == [(1, 2), (1, 1)]
    expected = base.row("recall", "accuracy", 2 / 3, stderr=ratio_stderr([1, 1], [2, 1]), samples=2)
    assert list(SCORES["recall"](tally)) == [expected]


def test_probes_of_a_text_ask_for_every_token_of_its_references():
    """Which follow the prompt as a list; each is looked for in its own evidence where there are as many."""
    encoder = SimpleNamespace(
        encode=lambda sample: [1, 2, 3],
        evidence=lambda sample: [(0, 1), (1, 3)],
        tokenizer=SimpleNamespace(encode=lambda text: list(text)),
    )
    samples = [SimpleNamespace(references=["a", "bc"])]
    (both,) = text_probes(SimpleNamespace(samples=samples, task=SimpleNamespace(match="all")), encoder)
    assert both.input_ids == [1, 2, 3, *" a, bc"]
    assert both.queries == [2, 3, 4, 5, 6, 7]  # before each of these tokens
    assert both.evidence == 2 * [[(0, 1)]] + 4 * [[(1, 3)]]
    (one,) = text_probes(SimpleNamespace(samples=samples, task=SimpleNamespace(match="any")), encoder)
    assert (one.input_ids, one.queries) == ([1, 2, 3, *" a"], [2, 3])
    assert one.evidence == 2 * [[(0, 1), (1, 3)]]


def test_mqar_probes_point_at_the_pair_of_each_first_query(recall_run):
    target, _ = setting(recall_run)
    stream = validation_stream(target)
    (batch,) = build_data(target.train.data, split="validation", seed=3, rows=6)
    probes = list(mqar_probes(stream, target.train.data))
    assert len(probes) == 6
    for probe, ids, labels in zip(probes, batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
        assert probe.input_ids == ids
        assert len({ids[t] for t in probe.queries}) == len(probe.queries)
        for t, ((first, last),) in zip(probe.queries, probe.evidence, strict=True):
            assert last == first + 2 <= 32
            assert ids[first : first + 2] == [ids[t], labels[t]]
        assert {span for (span,) in probe.evidence} <= set(probe.needed)
        assert all(last <= 32 for _, last in probe.needed)


def test_routing_rows_of_mqar(recall_run):
    rows = run(recall_run, tasks=["routing"], rows=3)
    by_metric = {row["metric"]: row for row in rows if row["metric"] != "active_blocks"}
    assert {row["probe"] for row in rows} == {"mqar"}
    for metric in ("recall", "precision", "mass_recall", "mass_precision", "relevant_mass", "topk_recall"):
        assert 0 <= by_metric[metric]["score"] <= 1
        assert len(by_metric[metric]["per_head"]) == 2
    assert by_metric["entropy"]["score"] <= by_metric["softmax_entropy"]["score"] + 1e-6
    blocks = [row for row in rows if row["metric"] == "active_blocks"]
    for row in blocks:
        assert row["relevant"] >= 1
        assert row["p10"] <= row["p90"]
    (task,) = build_tasks(EvaluateConfig(run=str(recall_run), tasks=["routing"], rows=3), setting(recall_run)[0])
    heads = sum(map(len, by_metric["recall"]["per_head"]))
    assert sum(row["counted"] for row in blocks) == heads * sum(len(probe.queries) for probe in task.probes)
    assert {row["rows"] for row in rows} == {3}
    assert run(recall_run, tasks=["routing"], rows=3) == []


def test_rows_of_routing_by_hand(monkeypatch):
    """Of two probes, in two layers of two KV heads, of which one is asked nothing, and a probe that asks nothing."""
    layers = [{"recall": torch.tensor([[1.0, 2.0], [2, 4]]).double()}] * 2
    last = [{"recall": torch.tensor([[2.0, 0.0], [6, 0]]).double()}] * 2
    none = [{"recall": torch.zeros(2, 2).double()}] * 2
    probes = {"a": (layers, 2, [0, 1, 3]), "b": (last, 1, [2]), "c": (none, 0, [5])}

    def observe(setting, probe, measured):
        scores, needed, blocks = probes[probe]
        measured.add(scores)
        measured.active[needed] = base.count(torch.tensor(blocks))
        measured.sparsity = SimpleNamespace(columns=lambda: {"causal_sparsity": 0.5})

    monkeypatch.setattr(routing, "observe", observe)
    task = RoutingTask("vt", list(probes), {"length": 64, "rows": None, "variant": "v"})
    assert task.columns == {"length": 64, "rows": 3, "variant": "v", "probe": "vt"}
    shares = []
    recall, *blocks = task.run(SimpleNamespace(advance=shares.append), ("routing",))
    assert shares == [1 / 3, 2 / 3, 1]
    known = {"stderr": ratio_stderr([6, 4], [12, 12]), "samples": 2, "per_head": [[3 / 8, 2 / 4]] * 2}
    assert recall == {"causal_sparsity": 0.5} | base.row("routing", "recall", 10 / 24, **known)
    assert blocks == [
        {"causal_sparsity": 0.5} | base.row("routing", "active_blocks", score, relevant=needed, **found)
        for needed, score, found in (
            (0, 5, {"p10": 5, "p90": 5, "counted": 1}),
            (1, 2, {"p10": 2, "p90": 2, "counted": 1}),
            (2, 4 / 3, {"p10": 0, "p90": 3, "counted": 3}),
        )
    ]


def test_blocks_that_hold_a_token_of_a_span():
    """Blocks of four tokens, at whose borders spans begin and end; spans that overlap, that are alike, and none."""
    spans = [[(0, 4)], [(3, 5)], [(4, 8), (8, 9)], [(1, 11), (2, 6), (2, 6)], [], [(15, 16), (7, 8)]]
    masks = block_masks(spans, 4, 4).int().tolist()
    assert masks == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0], [0, 1, 0, 1]]
    assert not block_masks([[], []], 4, 4).any()


def test_marks_of_a_probe():
    """Of evidence only what lies before the query's own block; of what is needed all."""
    probe = Probe([0] * 7, [6, 2], [[(0, 1), (5, 7)], [(1, 4)]], [(0, 3), (5, 6)])
    marks = Marks.of(probe, torch.tensor(probe.queries), 2)
    assert marks.past_PN.int().tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert marks.relevant_PN.int().tolist() == [[1, 0, 1, 0], [1, 0, 0, 0]]
    assert marks.needed == 3


def score(routing, q, k, probe):
    marks = Marks.of(probe, torch.tensor(probe.queries), routing.selection.block_size)
    return score_routing(routing, q, k, marks)


def test_routing_scores_by_hand():
    """Two KV heads of one query head each, four blocks of two tokens; queries at 5 (own block 2) and 7 (own 3)."""
    p = torch.zeros(1, 8, 2, 4)
    p[0, 5, 0] = torch.tensor([0.25, 0.75, 0, 0])
    p[0, 5, 1] = torch.tensor([0, 1.0, 0, 0])
    p[0, 7, 0] = torch.tensor([0, 0.5, 0.5, 0])
    p[0, 7, 1] = torch.tensor([1.0, 0, 0, 0])
    own = torch.nn.functional.one_hot(torch.arange(8) // 2, 4).bool()
    routing = Routing(Selection.from_mask(((p > 0) | own[:, None])[:, [5, 7]], 2), p[:, [5, 7]])
    # Equal keys: dense attention is uniform over the past.
    q, k = torch.randn(1, 8, 2, 4), torch.ones(1, 8, 2, 4)
    probe = Probe(list(range(8)), [5, 7], [[(1, 2)], [(0, 2), (4, 6)]], [(0, 2), (4, 6)])
    scores, active_PH = score(routing, q, k, probe)
    assert active_PH.tolist() == [[2, 1], [2, 1]]
    total = {metric: value.tolist() for metric, (value, _) in scores.items()}
    assert total["recall"] == [1 + 1 / 2, 0 + 1 / 2]
    assert total["precision"] == [1 / 2 + 1 / 2, 0 + 1]
    assert total["relevant_mass"] == [0.25 + 0.5, 0 + 1]
    assert total["support"] == [4, 2]
    assert total["entropy"] == pytest.approx([0.5623351 + 0.6931472, 0], abs=1e-6)
    # Tokens 0-5 and 0-7 weigh alike; block 2's tokens 4, 5 and block 3's 6, 7 are the queries' own.
    assert total["mass_recall"] == pytest.approx([6 / 6 + 6 / 8, 4 / 6 + 4 / 8], abs=1e-6)
    assert total["dense_relevant_mass"] == pytest.approx([2 / 6 + 4 / 8] * 2, abs=1e-6)
    assert all(counts.tolist() == [2, 2] for _, counts in scores.values())
    # Where dense attention looks at block 1 most, at 2 less, at 0 least, of head 0's two blocks all are among the
    # heaviest; head 1 reads one of two and three, at first the heaviest.
    k = torch.tensor([0.0, 2.0, 1.0, 0.0]).repeat_interleave(2)[None, :, None, None].expand(1, 8, 2, 4)
    scores, _ = score(routing, torch.ones(1, 8, 2, 4), k, probe)
    assert scores["mass_precision"][0].tolist() == [2, 1]


def test_forced_blocks_are_read_but_no_choice_of_the_router():
    """Blocks of two tokens, the first forced; queries at tokens 3 and 7, whose routers have no candidate and two."""
    p, logits = torch.zeros(1, 8, 1, 4), torch.full((1, 8, 1, 4), -torch.inf)
    p[0, 7, 0] = torch.tensor([0, 0.75, 0.25, 0])
    logits[0, 7, 0, 1:3] = torch.tensor([0.0, 1.0])
    own = torch.nn.functional.one_hot(torch.arange(8) // 2, 4).bool()
    mask = torch.tensor([True, False, False, False]) | (p > 0.5) | own[:, None]
    routing = Routing(Selection.from_mask(mask[:, [3, 7]], 2), p[:, [3, 7]], logits[:, [3, 7]])
    q = torch.ones(1, 8, 1, 4)
    probe = Probe(list(range(8)), [3, 7], [[(0, 1)], [(0, 1), (4, 6)]], [(0, 1), (4, 6)])
    scores, active_PH = score(routing, q, q, probe)
    assert active_PH.tolist() == [[1], [2]]
    total = {metric: (value.item(), count.item()) for metric, (value, count) in scores.items()}
    assert total["recall"] == (1 + 1 / 2, 2)
    assert total["mass_recall"] == pytest.approx((4 / 4 + 6 / 8, 2))
    assert total["relevant_mass"] == (0.25, 1)
    assert total["support"] == (2, 1)
    assert total["entropy"] == pytest.approx((0.5623351, 1), abs=1e-6)
    assert total["softmax_relevant_mass"] == pytest.approx((0.7310586, 1), abs=1e-6)
    assert total["softmax_entropy"] == pytest.approx((0.5822032, 1), abs=1e-6)
    assert total["topk_recall"] == (1 + 2 / 2, 2)  # block 0, and of blocks 1 and 2 the higher


def test_evidence_in_the_queries_own_block_is_no_question_to_the_router():
    p = torch.zeros(1, 4, 1, 2)
    p[0, 3, 0, 0] = 1
    own = torch.nn.functional.one_hot(torch.arange(4) // 2, 2).bool()
    routing = Routing(Selection.from_mask(((p > 0) | own[:, None])[:, [3]], 2), p[:, [3]])
    q = torch.randn(1, 4, 1, 4)
    scores, _ = score(routing, q, q, Probe([0] * 4, [3], [[(2, 3)]], [(2, 3)]))
    assert scores["recall"][1].tolist() == [0]
    assert scores["mass_recall"][1].tolist() == [1]


def test_a_layer_that_shares_a_selection_holds_it_against_its_own_attention(monkeypatch):
    shape = dict(vocab_size=70, hidden_size=16, intermediate_size=16, num_layers=2, num_heads=2, num_kv_heads=1)
    attention = DashConfig(chunk_size=8, router_scale=30.0, layers={"1": {"share_selection_from": 0}})
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**shape, head_dim=8, max_seq_len=64, init_std=0.5), attention)
    measured = Measured()
    at = SimpleNamespace(model=model, device=torch.device("cpu"))
    probe = Probe(list(range(64)), [40, 63, 50], [[(0, 2)], [(3, 9)], [(8, 9)]], [(0, 2)])
    observe(at, probe, measured)
    (recall, shared_recall), (mass, shared_mass) = measured.sums["recall"], measured.sums["mass_recall"]
    assert recall == shared_recall
    assert mass != shared_mass
    monkeypatch.setattr(routing, "CHUNK_LOGITS", 2 * 2 * 64 + 1)  # two queries at once, and one
    in_parts, route, asked = Measured(), DashBackend.route, []

    def counted(self, *inputs, positions, **options):
        asked.append(positions.tolist())
        return route(self, *inputs, positions=positions, **options)

    monkeypatch.setattr(DashBackend, "route", counted)
    observe(at, probe, in_parts)
    assert asked == [[40, 63], [50]]
    for metric, sums in measured.sums.items():
        torch.testing.assert_close(in_parts.sums[metric], sums)
        assert torch.equal(in_parts.counts[metric], measured.counts[metric])
    assert torch.equal(in_parts.active[1], measured.active[1])
    torch.testing.assert_close(in_parts.probes, measured.probes)


def test_dense_mass_is_the_models_own_attention(recall_run):
    """Reading everything, the router's mass recall is 1 at every layer; and hooks are gone afterwards."""
    _, at = setting(recall_run)
    at.model.set_knob(1e-4)
    measured = Measured()
    probe = Probe(list(range(64)), [40, 63], [[(0, 2)], [(3, 9)]], [(0, 2)])
    observe(at, probe, measured)
    mass = measured.sums["mass_recall"] / measured.counts["mass_recall"]
    assert torch.allclose(mass, torch.ones(2, mass.shape[1]).double(), atol=1e-5)
    assert measured.sums["recall"].eq(2).all()
    assert not any(backend._forward_pre_hooks for backend in at.model.backends)


def test_refusals_of_a_recall_run(recall_run):
    for changes, message in (
        ({"tasks": ["ruler"]}, "tasks ruler are in text and need a run trained on text"),
        ({"tasks": ["loss", "lm_eval/a"]}, "tasks lm_eval/a are in text and need a run trained on text"),
        ({"tasks": ["recall"], "lengths": []}, "give at least one"),
        ({"tasks": ["recall"], "lengths": [30]}, "must be a multiple of 4"),
        ({"tasks": ["recall"], "lengths": [16]}, "data.pairs_max=8 does not fit"),
        ({"tasks": ["recall"], "template": "alpaca"}, "must be one of base"),
    ):
        with pytest.raises(ValueError, match=message):
            run(recall_run, **changes)


def test_a_form_is_what_was_given_if_it_can_be():
    assert MQARForm(pairs_max=8, show_answers=False).given() == {"pairs_max": 8, "show_answers": False}
    with pytest.raises(ValueError, match=r"mqar\.placement must be one of clustered, spread"):
        MQARForm(placement="middle")


def test_refusals_of_a_text_run(text_run):
    for changes, message in (
        ({"tasks": ["loss", "recall"]}, "trained on MQAR, not .*: leave it out, or use loss"),
        ({"mqar": MQARForm(pairs_max=3)}, "trained on MQAR, not .*: leave it out"),
        ({"tasks": ["routing"], "probes": ["vt", "cwe"]}, "whose answer stands in one place"),
        ({"tasks": ["routing"], "probes": ["fwe"]}, "whose answer stands in one place"),
        ({"tasks": ["routing"], "probes": []}, r"probes=\[\]: choose generated tasks"),
        ({"tasks": ["vt"], "lengths": [256]}, "needs at least 512 tokens"),
        ({"tasks": ["routing"], "probes": ["vt"], "lengths": [256]}, "needs at least 512 tokens"),
        ({"tasks": ["vt"], "lengths": [512], "template": "llama3"}, "which the tokenizer lacks"),
        (
            {"tasks": ["niah"], "lengths": [512], "haystack": "/none.txt"},
            "/none.txt does not exist: give haystack=FILE",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            run(text_run, **changes)
