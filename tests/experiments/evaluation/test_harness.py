"""Our checkpoint under lm-evaluation-harness, offline: tasks of a local file, against the model asked directly."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

import train
from experiments.config import to_config
from experiments.evaluation.config import EvaluateConfig
from experiments.evaluation.evaluate import evaluate, find_target

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance

from experiments.evaluation import harness
from experiments.evaluation.harness import HarnessModel

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


def log_p(model, ids):
    """Log-probability of each token after the first."""
    with torch.no_grad():
        logits_TV = model(torch.tensor([ids])).logits[0, :-1].double()
    return logits_TV.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0], logits_TV.argmax(-1).tolist()


def test_log_likelihoods_are_the_models_own(run_dir):
    lm = HarnessModel(str(run_dir), device="cpu", batch_size=3)
    pairs = [("import os", "\nimport sys"), ("", "class A"), ("for x ", "in y"), ("a" * 900, " = b"), ("def f", "(x):")]
    results = lm.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    for (context, continuation), (total, _) in zip(pairs, results, strict=True):
        context_ids = lm.tok_encode(context.rstrip()) or [lm.eot_token_id]
        ids = context_ids + lm.tok_encode(context + continuation)[len(context_ids) if context else 0 :]
        scored = len(ids) - len(context_ids)
        ids = ids[-(lm.max_length + 1) :]
        expected, _ = log_p(lm.model, ids)
        assert total == pytest.approx(expected[-scored:].sum().item(), abs=1e-3)
    context = lm.tok_encode("import os")
    _, greedy = log_p(lm.model, [*context, 0])
    ((_, is_greedy),) = lm._loglikelihood_tokens([(None, context, [greedy[-1]])], disable_tqdm=True)
    ((_, is_other),) = lm._loglikelihood_tokens([(None, context, [greedy[-1] - 1])], disable_tqdm=True)
    assert (is_greedy, is_other) == (True, False)


def test_rolling_predicts_every_token_once(run_dir):
    lm = HarnessModel(str(run_dir), device="cpu", max_length=16)
    text = "".join(document["text"] for document in DOCUMENTS)
    (total,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)), disable_tqdm=True)
    ids = [lm.eot_token_id, *lm.tok_encode(text)]
    expected, position = 0.0, 1
    while position < len(ids):  # windows of 16 targets, the last one with what context fits
        last = min(position + 16, len(ids))
        first = max(0, last - 17)
        expected += log_p(lm.model, ids[first:last])[0][-(last - position) :].sum().item()
        position = last
    assert len(ids) > 40
    assert total == pytest.approx(expected, abs=1e-3)


def test_generation_stops_at_the_first_stop_string(run_dir, monkeypatch):
    lm = HarnessModel(str(run_dir), device="cpu", max_length=40, batch_size=2)
    seen = []

    def generate(model, prompts, *, max_new_tokens, stop_tokens, temperature, top_p):
        seen.append((len(prompts), max(map(len, prompts)), max_new_tokens, stop_tokens, temperature))
        return [lm.tok_encode("one\ntwo; three") for _ in prompts]

    monkeypatch.setattr(harness, "generate", generate)
    options = [{"until": ["\n"]}, {"until": [";", "tw"]}, {"until": []}, {"until": "three", "do_sample": True}]
    arguments = [("x = 1 " * 60, {**o, "max_gen_toks": 9, "temperature": 0.7}) for o in options]
    texts = lm.generate_until(requests("generate_until", *arguments), disable_tqdm=True)
    assert texts == ["one", "one\n", "one\ntwo; three", "one\ntwo; "]
    assert seen == [
        (2, 31, 9, [lm.eot_token_id], 0.0),
        (1, 31, 9, [lm.eot_token_id], 0.0),
        (
            1,
            31,
            9,
            [lm.eot_token_id],
            0.7,
        ),
    ]
    with pytest.raises(ValueError, match="leaves no room"):
        lm.generate_until(requests("generate_until", ("x", {"max_gen_toks": 40})), disable_tqdm=True)


def test_rows_from_evaluate(run_dir, task_dir):
    names = [f"lm_eval/{name}" for name in TASKS]
    config = EvaluateConfig(
        run=str(run_dir), tasks=names, knobs=[1.0, 30.0], device="cpu", harness_path=str(task_dir), rows=4
    )
    rows = list(evaluate(config, find_target(config)))
    metrics = {row["task"]: row["metric"] for row in rows}
    assert metrics == dict(zip(names, ("acc", "byte_perplexity", "exact_match"), strict=True))
    assert [row["knob"] for row in rows] == [1.0] * 3 + [30.0] * 3
    assert {row["rows"] for row in rows} == {4}
    assert rows[0]["causal_sparsity"] < rows[3]["causal_sparsity"]
    assert list(evaluate(config, find_target(config))) == []
    config.tasks = ["lm_eval/none"]
    with pytest.raises(ValueError, match="lm_eval has no task none"):
        list(evaluate(config, find_target(config)))


@pytest.mark.slow
def test_lm_evals_own_command_line(run_dir, task_dir, tmp_path):
    command = (
        *("--model", "dashattn", "--model_args", f"run={run_dir},knob=4.0", "--batch_size", "2", "--device", "cpu"),
        *("--tasks", "tiny_choice", "--include_path", str(task_dir), "--limit", "2", "--output_path", str(tmp_path)),
    )
    done = subprocess.run(
        [sys.executable, "-m", "experiments.evaluation.harness", *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "tiny_choice" in done.stdout
    (path,) = tmp_path.rglob("results_*.json")
    assert 0 <= json.loads(path.read_text())["results"]["tiny_choice"]["acc,none"] <= 1


def test_refusals(run_dir):
    with pytest.raises(ValueError, match="batch_size=auto"):
        HarnessModel(str(run_dir), batch_size="auto", device="cpu")
    with pytest.raises(ValueError, match="no intact weights in"):
        HarnessModel("/nonexistent")
