"""Our checkpoint under lm-evaluation-harness, offline: tasks of a local file, against the model asked directly."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from statistics import stdev
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir
from tokenizers import Tokenizer

import train
from dashattn.backends import DashConfig
from data import TextTokenizer
from experiments.evaluation.config import EvaluateConfig
from experiments.evaluation.evaluate import evaluate, find_target
from experiments.evaluation.export import export
from experiments.evaluation.lm_eval_options import GenerationOptions, read_options
from experiments.schema import to_config
from models import ModelConfig, Transformer
from models.generate import Sampling

pytest.importorskip("lm_eval")
import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.config import evaluate_config
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import TaskIndex

from experiments.evaluation import harness, lm_eval_task
from experiments.evaluation.harness import HarnessModel
from experiments.evaluation.lm_eval_task import HarnessTask
from experiments.evaluation.tasks import base

ROOT = Path(__file__).parents[3]
DOCUMENTS = [
    {
        "text": f"import module_{i}\nfor x in range({i}):\n    print(x)\n",
        "choices": ["def", " return", "= 1"],
        "gold": i % 3,
    }
    for i in range(5)
]
TASKS = {
    "tiny_choice": """
output_type: multiple_choice
doc_to_text: text
doc_to_choice: choices
doc_to_target: gold
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "tiny_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
""",
    "tiny_generate": """
output_type: generate_until
doc_to_text: text
doc_to_target: "x"
generation_kwargs: {until: ["\\n"], max_gen_toks: 3}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


@pytest.fixture(autouse=True)
def _one_of_lm_evals_own_tasks(monkeypatch):
    """It reads ten thousand files for each list of its tasks: four seconds."""
    files = TaskIndex._iter_yaml_files

    def few_files(root):
        return files(root / "hellaswag" if root == Path(lm_eval.tasks.__file__).parent else root)

    monkeypatch.setattr(TaskIndex, "_iter_yaml_files", staticmethod(few_files))


@pytest.fixture
def task_dir(tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    for name, body in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(head + body)
    return folder


@pytest.fixture
def run_dir(tiny_overrides):
    overrides, run_dir = tiny_overrides(
        "text", "steps=1", "optim.warmup_steps=0", "attention=dash", "attention.chunk_size=2"
    )
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        train.train(to_config(compose("train", overrides)))
    return run_dir


def requests(kind, *arguments):
    return [Instance(kind, {}, args, 0) for args in arguments]


def cached_by(lm):
    """What lm_eval is given for its cache, by what was asked."""
    cached = {}
    lm.cache_hook.add_partial = lambda kind, asked, answer: cached.update({(kind, str(asked)): answer})
    return cached


def log_p(model, ids):
    """Log-probability of each token after the first."""
    with torch.no_grad():
        logits_TV = model(torch.tensor([ids])).logits[0, :-1].double()
    return logits_TV.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0], logits_TV.argmax(-1).tolist()


def test_log_likelihoods_are_the_models_own(run_dir, monkeypatch):
    lm = HarnessModel(str(run_dir), device="cpu", batch_size=3)
    pairs = [("import os", "\nimport sys"), ("", "class A"), ("for x ", "in y"), ("a" * 900, " = b"), ("def f", "(x):")]
    cached, lengths, forward = cached_by(lm), [], Transformer.forward
    with monkeypatch.context() as patch:  # how long each row is without what fills it up
        patch.setattr(
            Transformer,
            "forward",
            lambda *ids, **given: lengths.extend(given["lengths"].tolist()) or forward(*ids, **given),
        )
        results = lm.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    assert cached == {("loglikelihood", str(pair)): result for pair, result in zip(pairs, results, strict=True)}
    for (context, continuation), (total, _) in zip(pairs, results, strict=True):
        context_ids = lm.tok_encode(context.rstrip()) or [lm.eot_token_id]
        ids = context_ids + lm.tok_encode(context + continuation)[len(context_ids) if context else 0 :]
        scored = len(ids) - len(context_ids)
        ids = ids[-(lm.max_length + 1) :]
        lengths.remove(len(ids) - 1)
        expected, _ = log_p(lm.model, ids)
        assert total == pytest.approx(expected[-scored:].sum().item(), abs=1e-3)
    assert lengths == []
    context = lm.tok_encode("import os")
    _, greedy = log_p(lm.model, [*context, 0])
    turned = HarnessModel(str(run_dir), knob=3.0, device="cpu").model
    assert {backend.config.router_scale for backend in turned.backends} == {3}
    ((_, is_greedy),) = lm._loglikelihood_tokens([(None, context, [greedy[-1]])], disable_tqdm=True)
    ((_, is_other),) = lm._loglikelihood_tokens([(None, context, [greedy[-1] - 1])], disable_tqdm=True)
    assert (is_greedy, is_other) == (True, False)


def test_a_tasks_rows_are_known_by_shots_and_template(monkeypatch):
    asked = []
    monkeypatch.setattr(
        lm_eval_task, "task_manager", lambda path: asked.append(path) or SimpleNamespace(all_tasks=["x"])
    )
    monkeypatch.setattr(lm_eval_task, "chat_tokenizer", asked.append)
    options = {"length": 5, "rows_per_batch": 2, "include_path": "/tasks"}
    for rows, fewshot, chat, variant in (
        (None, None, False, None),
        (7, 0, False, "0-shot"),
        (7, None, True, "template=tokenizer"),
        (None, 2, True, "2-shot, template=tokenizer"),
    ):
        task = HarnessTask("lm_eval/x", "its tokenizer", rows=rows, fewshot=fewshot, chat=chat, **options)
        assert (task.names, task.task, task.fewshot) == (("lm_eval/x",), "x", fewshot)
        assert task.columns == {"length": 5, "rows": rows, "variant": variant}
        assert asked == ["its tokenizer", "/tasks"][1 - chat :]
        asked.clear()
    with pytest.raises(ValueError, match=r"lm_eval has no task y: .lm_eval ls tasks. lists them"):
        HarnessTask("lm_eval/y", None, rows=None, fewshot=None, **options)


def test_what_lm_eval_asks_for_is_located(monkeypatch):
    asked = []

    def locate(run, device, length):
        asked.append((run, device, length))
        raise ValueError("none here")

    monkeypatch.setattr(harness, "locate_model", locate)
    for options in ({}, {"device": "cuda:0", "max_length": 9, "batch_size": "1"}, {"device": "cpu", "knob": 2.0}):
        with pytest.raises(ValueError, match="none here"):
            HarnessModel("outputs/a", **options)
    assert asked == [("outputs/a", "auto", None), ("outputs/a", "cuda", 9), ("outputs/a", "cpu", None)]
    for batch_size in ("auto", 0, "-1", 1.5):
        with pytest.raises(ValueError, match=f"batch_size={batch_size}: a number of rows is needed, at least 1"):
            HarnessModel("outputs/a", batch_size=batch_size)


def test_a_context_of_white_space_is_none(run_dir):
    lm = HarnessModel(str(run_dir), device="cpu", batch_size=3, max_length=20)
    pairs = [(" ", "class A"), ("import os", "\nimport sys")]
    (blank, _), _ = lm.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    ids = [lm.eot_token_id, *lm.tok_encode(" class A")]
    assert blank == pytest.approx(log_p(lm.model, ids)[0].sum().item(), abs=1e-3)
    with pytest.raises(ValueError, match=r"a continuation has \d+ tokens, more than max_length=20"):
        lm.loglikelihood(requests("loglikelihood", ("x", " = 1" * 40)), disable_tqdm=True)


def test_rolling_predicts_every_token_once(run_dir):
    lm = HarnessModel(str(run_dir), device="cpu", max_length=16)
    texts = ("".join(document["text"] for document in DOCUMENTS), DOCUMENTS[1]["text"])
    cached = cached_by(lm)
    totals = lm.loglikelihood_rolling(requests("loglikelihood_rolling", *((x,) for x in texts)), disable_tqdm=True)
    assert cached == {("loglikelihood_rolling", str((x,))): total for x, total in zip(texts, totals, strict=True)}
    for text, total in zip(texts, totals, strict=True):
        ids = [lm.eot_token_id, *lm.tok_encode(text)]
        expected, position = 0.0, 1
        while position < len(ids):  # windows of 16 targets, the last one with what context fits
            last = min(position + 16, len(ids))
            first = max(0, last - 17)
            expected += log_p(lm.model, ids[first:last])[0][-(last - position) :].sum().item()
            position = last
        assert len(ids) > (40 if text == texts[0] else 16)
        assert total == pytest.approx(expected, abs=1e-3)


def test_generation_stops_at_the_first_stop_string(run_dir, monkeypatch):
    lm = HarnessModel(str(run_dir), device="cpu", max_length=40, batch_size=2)
    seen = []

    whole = base.generate

    def generate(model, prompts, *, max_new_tokens, stop_tokens, sampling, seeds, on_stats):
        whole(model, prompts, max_new_tokens=1, on_stats=on_stats)
        seen.append((len(prompts), max(map(len, prompts)), max_new_tokens, stop_tokens, sampling.temperature))
        return [lm.tok_encode("one\ntwo; three") for _ in prompts]

    monkeypatch.setattr(base, "generate", generate)
    options = [{"until": ["\n"]}, {"until": [";", "tw"]}, {"until": [], "stop": ["three", ""]}, {"until": "three"}]
    options[3] |= {"do_sample": True, "temperature": 0.7}
    arguments = [("x = 1 " * 60, {**o, "max_gen_toks": 9}) for o in options]
    cached = cached_by(lm)
    texts = lm.generate_until(requests("generate_until", *arguments), disable_tqdm=True)
    assert cached == {("generate_until", str(asked)): text for asked, text in zip(arguments, texts, strict=True)}
    assert texts == ["one", "one\n", "one\ntwo; ", "one\ntwo; "]
    assert seen == [(rows, 31, 9, [lm.eot_token_id], temperature) for rows, temperature in ((2, 0), (1, 0), (1, 0.7))]
    with pytest.raises(ValueError, match="leaves no room"):
        lm.generate_until(requests("generate_until", ("x", {"max_gen_toks": 40})), disable_tqdm=True)


def test_samples_differ_and_depend_on_nothing_but_seed_prompt_and_repetition(run_dir):
    lm = HarnessModel(str(run_dir), device="cpu", batch_size=3)
    lm.model.double()
    sampled = {"do_sample": True, "temperature": 1.5, "max_gen_toks": 12}

    def texts(*arguments):
        return lm.generate_until(requests("generate_until", *arguments), disable_tqdm=True)

    eight = texts(*[("import os", sampled)] * 8)
    assert len(set(eight)) == 8
    lm.batch_size = 2
    among_others = texts(("x", sampled), ("import os", sampled), ("def f(", sampled), ("import os", sampled))
    assert [among_others[1], among_others[3]] == eight[:2]
    assert texts(("import os", sampled | {"seed": 1}))[0] not in eight
    assert texts(("import os", sampled | {"top_k": 1})) == texts(("import os", {"max_new_tokens": 12}))
    assert texts(("", {"max_new_tokens": 12})) == texts((lm.tokenizer.eos_token, {"max_new_tokens": 12}))
    assert texts(("import os", sampled | {"repetition_penalty": 3.0}))[0] != eight[0]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (256, (), Sampling(), 0)),
        ({"until": "a", "stop": ["b"], "seed": 7, "temperature": 0.0}, (256, ("a", "b"), Sampling(), 7)),
        ({"max_new_tokens": 5, "do_sample": False, "temperature": 1.0, "num_beams": 1}, (5, (), Sampling(), 0)),
        ({"max_gen_toks": 5.0, "max_tokens": 5, "temperature": 0.8, "do_sample": True}, (5, (), Sampling(0.8), 0)),
        ({"max_completion_tokens": 5, "do_sample": True, "top_k": None}, (5, (), Sampling(1.0), 0)),
        (
            {"do_sample": True, "temperature": 0.2, "top_p": 0.95, "top_k": 40, "repetition_penalty": 1.2},
            (256, (), Sampling(0.2, 0.95, 40, 1.2), 0),
        ),
        ({"repetition_penalty": 1.2}, (256, (), Sampling(repetition_penalty=1.2), 0)),
    ],
)
def test_generation_options_are_honoured(given, expected):
    assert read_options(given) == GenerationOptions(*expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"min_p": 0.1, "untill": []}, "no generation option min_p, untill"),
        ({"num_beams": 4}, "no beam search"),
        ({"max_gen_toks": 5, "max_new_tokens": 6}, "max_gen_toks=5, max_new_tokens=6 contradict"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"max_gen_toks": float("nan")}, "max_gen_toks=nan"),
        ({"temperature": 0.7, "do_sample": False}, "temperature=0.7 would have no effect: add do_sample=True"),
        ({"temperature": 0.7}, "temperature=0.7 would have no effect: add do_sample=True"),
        ({"top_p": 0.9}, "top_p=0.9 would have no effect"),
        ({"top_k": 5, "temperature": 0}, "top_k=5 would have no effect"),
        ({"do_sample": True, "temperature": 0.0}, "temperature=0.0"),
        ({"do_sample": True, "temperature": float("inf")}, "temperature=inf"),
        ({"do_sample": True, "top_p": float("nan")}, "top_p=nan"),
        ({"do_sample": True, "top_k": 2.5}, "top_k=2.5"),
        ({"do_sample": "maybe"}, "do_sample='maybe'"),
        ({"temperature": "hot"}, "temperature='hot'"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"seed": -1}, "seed=-1"),
        ({"until": [3]}, "must be texts"),
        ({"until": 3}, "must be texts"),
        ({"stop": {"text": 3}}, "must be texts"),
        ({"max_gen_toks": [5]}, r"max_gen_toks=\[5\]"),
    ],
)
def test_other_generation_options_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        read_options(given)


CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def chat_model(run_dir, tmp_path):
    """The run's model with room for two more tokens, and a tokenizer with the template CHAT."""
    lm = HarnessModel(str(run_dir), device="cpu")
    folder = tmp_path / "chat"
    folder.mkdir()
    lm.tokenizer.save(folder / "tokenizer.json")
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    backend.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>", "chat_template": CHAT}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = TextTokenizer.load(str(folder), lm.tokenizer.eos_token)
    model = Transformer(replace(lm.model.config, vocab_size=tokenizer.vocab_size), DashConfig(chunk_size=2)).eval()
    return HarnessModel.of(model, tokenizer, 2, 60)


def test_chats_are_put_by_the_tokenizers_own_template(chat_model, monkeypatch):
    lm, ends = chat_model, chat_model.tokenizer.backend.token_to_id("<|im_end|>")
    assert lm.stop_tokens == [lm.eot_token_id]
    assert lm.prefix_token_id == lm.tokenizer.backend.token_to_id("<|im_start|>")
    assert lm.chat_template(True) == CHAT
    history = [{"role": "user", "content": "x = 1"}]
    text = lm.apply_chat_template(history)
    assert text == "<|im_start|>user\nx = 1<|im_end|>\n<|im_start|>assistant\n"
    begun = [*history, {"role": "assistant", "content": "The"}]
    assert lm.apply_chat_template(begun, add_generation_prompt=False) == f"{text}The"
    assert lm.tok_encode(text).count(ends) == 1
    assert lm.tokenizer.decode(lm.tok_encode(text)) == text
    assert lm.stop_tokens == [lm.eot_token_id, ends]
    with pytest.raises(ValueError, match="no chat template 'other'"):
        lm.chat_template("other")
    monkeypatch.setattr(lm.chat_tokenizer, "chat_template", "{{ raise_exception('no system') }}")
    lm.chat_template(True)
    with pytest.raises(ValueError, match="refuses this history: no system"):
        lm.apply_chat_template(history)


def test_a_template_is_chosen_by_its_name(chat_model):
    named = [{"name": "default", "template": CHAT}, {"name": "tools", "template": "{{ messages[0]['content'] }}!"}]
    chat_model.tokenizer.settings["chat_template"] = named
    assert chat_model.chat_template(True) == CHAT
    assert chat_model.chat_template("tools") == named[1]["template"]
    assert chat_model.apply_chat_template([{"role": "user", "content": "x"}]) == "x!"
    with pytest.raises(ValueError, match=r"no chat template 'other', its names are \['default', 'tools'\]"):
        chat_model.chat_template("other")


def test_a_task_in_chats(chat_model, task_dir, monkeypatch):
    prompts = []
    whole = base.generate

    def generate(model, batch, **options):
        prompts.extend(batch)
        return whole(model, batch, **options)

    monkeypatch.setattr(base, "generate", generate)
    lm_eval.simple_evaluate(
        chat_model,
        tasks=["tiny_generate"],
        limit=2,
        task_manager=TaskManager(include_path=str(task_dir)),
        apply_chat_template=True,
        bootstrap_iters=0,
    )
    assert sorted(chat_model.tokenizer.decode(prompt) for prompt in prompts) == [
        f"<|im_start|>user\n{document['text']}<|im_end|>\n<|im_start|>assistant\n" for document in DOCUMENTS[:2]
    ]


def test_a_tokenizer_without_a_template_is_refused(run_dir):
    with pytest.raises(ValueError, match=r"has no chat template: set data\.tokenizer"):
        HarnessModel(str(run_dir), device="cpu").chat_template(True)


@pytest.mark.long
def test_rows_from_evaluate(run_dir, task_dir):
    names = [f"lm_eval/{name}" for name in TASKS]
    config = EvaluateConfig(
        run=str(run_dir), tasks=names, knobs=[1.0, 30.0], device="cpu", harness_path=str(task_dir), rows=4
    )
    rows = list(evaluate(config, find_target(config)))
    metrics = {row["task"]: row["metric"] for row in rows}
    assert metrics == dict(zip(names, ("acc", "byte_perplexity", "exact_match"), strict=True))
    assert [row["knob"] for row in rows] == [1.0] * 3 + [30.0] * 3
    assert {row["rows"] for row in rows} == {row["samples"] for row in rows} == {4}
    right = 4 * rows[0]["score"]
    assert rows[0]["stderr"] == pytest.approx(stdev([1] * round(right) + [0] * round(4 - right)) / 2)
    assert [row["stderr"] is None for row in rows[:3]] == [False, True, False]  # lm_eval has none for a perplexity
    assert rows[0]["causal_sparsity"] < rows[3]["causal_sparsity"]
    assert list(evaluate(config, find_target(config))) == []
    config.template = "tokenizer"
    find_target(config)  # that it has no template, the task says
    config.template = "chatml"
    with pytest.raises(ValueError, match="template=chatml is not for lm_eval/tiny_choice: template=tokenizer"):
        find_target(config)
    config.template, config.tasks = "base", ["lm_eval/none"]
    with pytest.raises(ValueError, match="lm_eval has no task none"):
        list(evaluate(config, find_target(config)))
    assert "hellaswag" in lm_eval_task.task_manager(str(task_dir)).all_tasks  # beside those of the folder


def test_lm_evals_own_command_line(run_dir, task_dir, tmp_path, monkeypatch, capsys):
    """Without ``--device``, where lm_eval would take a GPU."""
    command = ["--model", "dashattn", "--model_args", f"run={run_dir},knob=4.0", "--batch_size", "2", "--limit", "3"]
    command += ["--tasks", "tiny_choice", "--include_path", str(task_dir), "--output_path", str(tmp_path)]
    monkeypatch.setattr(evaluate_config, "EvaluatorConfig", evaluate_config.EvaluatorConfig)  # ``main`` replaces it
    monkeypatch.setattr("sys.argv", ["harness", *command])
    limited = []
    monkeypatch.setattr(harness, "limit_memory", limited.append)
    harness.main()
    assert limited == ["auto"]
    said = capsys.readouterr().out.splitlines()
    table = [[cell.strip() for cell in line.split("|")] for line in said if line.startswith("|")]
    assert table[0][1:5] == ["Tasks", "Version", "Filter", "n-shot"]
    assert [row[1] for row in table[2:]] == ["tiny_choice"]
    (path,) = tmp_path.rglob("results_*.json")
    assert 0 <= json.loads(path.read_text())["results"]["tiny_choice"]["acc,none"] <= 1
    monkeypatch.setattr("sys.argv", ["harness", *command[:3], "run=/nonexistent", *command[4:]])
    with pytest.raises(SystemExit, match="1"):
        harness.main()
    assert re.search("error: .*/nonexistent.*", capsys.readouterr().err)


def test_an_exported_folder_answers_as_its_run(run_dir, task_dir, tmp_path):
    """By lm_eval's own model arguments and by evaluate.py, without any text."""
    folder = tmp_path / "exported"
    export(run_dir, folder)
    asked = requests("loglikelihood", *((document["text"], " = 1") for document in DOCUMENTS))
    run, exported = (HarnessModel(str(place), device="cpu") for place in (run_dir, folder))
    assert exported.loglikelihood(asked, disable_tqdm=True) == run.loglikelihood(asked, disable_tqdm=True)
    assert exported.tok_encode("import os") == run.tok_encode("import os")
    same = {"tasks": ["lm_eval/tiny_choice"], "device": "cpu", "harness_path": str(task_dir), "lengths": [64]}
    rows = []
    for place in (run_dir, folder):
        config = EvaluateConfig(run=str(place), output=str(tmp_path / place.name), **same)
        rows += evaluate(config, find_target(config))
    assert rows[0]["score"] == rows[1]["score"]
    assert [row["label"] for row in rows] == ["dash", "dash, exported"]


def test_evaluate_puts_tasks_by_the_tokenizers_template(chat_model, task_dir, monkeypatch):
    options = {"length": 64, "rows": 2, "rows_per_batch": 2, "fewshot": 1, "include_path": str(task_dir)}
    for chat, variant in ((False, "1-shot"), (True, "1-shot, template=tokenizer")):
        task = HarnessTask("lm_eval/tiny_choice", chat_model.tokenizer, **options, chat=chat)
        assert (task.chat, task.columns["variant"]) == (chat, variant)
    chat_model.tokenizer.settings.pop("chat_template")
    with pytest.raises(ValueError, match="has no chat template"):
        HarnessTask("lm_eval/tiny_choice", chat_model.tokenizer, **options, chat=True)


def test_a_tasks_scores_are_rows(monkeypatch, capsys):
    """Of a group, too, and of answers that went through filters; what lm_eval prints is no row."""
    results = {
        "group": {"alias": "all", "acc,none": 0.5, "acc_stderr,none": 0.1, "sample_len": 9},
        "part": {"alias": "-", "exact_match,strict": 0.25, "exact_match_stderr,strict": "N/A", "sample_len": 3},
    }
    seen = []

    def simple_evaluate(model, **options):
        seen.append((model.batch_size, model.max_length, options, os.environ["DISABLE_MULTIPROC"]))
        print("a table")
        model.sparsity = SimpleNamespace(columns=lambda: {"causal_sparsity": 0.5})
        return {"results": results}

    index = SimpleNamespace(all_tasks=["group"])
    monkeypatch.setattr(lm_eval, "simple_evaluate", simple_evaluate)
    monkeypatch.setattr(lm_eval_task, "task_manager", lambda path: index)
    monkeypatch.setattr(lm_eval_task, "chat_tokenizer", lambda tokenizer: None)
    shape = dict(vocab_size=9, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1, num_kv_heads=1)
    at = SimpleNamespace(model=Transformer(ModelConfig(**shape, head_dim=8, max_seq_len=32), DashConfig()))
    for fewshot, rows, chat, before in ((None, None, False, None), (2, 7, True, "0")):
        monkeypatch.delenv("DISABLE_MULTIPROC", raising=False)
        if before is not None:
            monkeypatch.setenv("DISABLE_MULTIPROC", before)
        options = {"length": 16, "rows": rows, "rows_per_batch": 3, "include_path": None}
        task = HarnessTask("lm_eval/group", None, **options, fewshot=fewshot, chat=chat)
        found = list(task.run(at, task.names))
        sparsity, name = {"causal_sparsity": 0.5}, "lm_eval/group"
        assert found == [
            sparsity | base.row(name, "acc", 0.5, part=None, stderr=0.1, samples=9),
            sparsity | base.row(name, "exact_match (strict)", 0.25, part="part", stderr=None, samples=3),
        ]
        asked = {"tasks": ["group"], "num_fewshot": fewshot, "limit": rows, "task_manager": index}
        asked |= {"bootstrap_iters": 1000, "log_samples": False, "apply_chat_template": chat}
        assert seen.pop() == (3, 16, asked, "1")
        assert os.environ.get("DISABLE_MULTIPROC") == before
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "a table\n" * 2)


def test_refusals(run_dir):
    for batch_size in ("auto", 0):
        with pytest.raises(ValueError, match=f"batch_size={batch_size}"):
            HarnessModel(str(run_dir), batch_size=batch_size, device="cpu")
    with pytest.raises(ValueError, match="/nonexistent does not exist"):
        HarnessModel("/nonexistent")


def test_requests_go_on_in_smaller_batches_where_memory_ends(run_dir, monkeypatch, capsys):
    pairs = [(document["text"], " = 1") for document in DOCUMENTS]
    arguments = [(document["text"], {"max_gen_toks": 4}) for document in DOCUMENTS]

    def answers(batch_size):
        lm = HarnessModel(str(run_dir), device="cpu", batch_size=batch_size)
        scores = lm.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
        texts = lm.generate_until(requests("generate_until", *arguments), disable_tqdm=True)
        return scores, texts, lm.sparsity.columns()

    expected = answers(2)

    def failing(whole):
        def read(self, input_ids, *args, **options):
            if len(input_ids) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return whole(self, input_ids, *args, **options)

        return read

    for name in ("hidden_states", "decode"):
        monkeypatch.setattr(Transformer, name, failing(getattr(Transformer, name)))
    assert answers(5) == expected
    assert capsys.readouterr().err.count("out of memory: going on with 2 rows at once") == 2
