"""What an evaluation says at its end, and on the way there."""

import re

from hydra import compose, initialize_config_dir

import evaluate as command
from experiments.evaluation.config import EvaluateConfig
from experiments.evaluation.display import Display, line, notes, place_of
from experiments.evaluation.evaluate import Evaluation, find_target
from experiments.files import CONFIGS

ROW = {
    **{"task": "vt", "metric": "match", "score": 0.5, "position": None, "stderr": 0.1, "samples": 25, "rows": 25},
    **{"length": 512, "knob": 2.0, "knob_name": "topk", "target_sparsity": None, "causal_sparsity": 0.75},
}


def test_the_table_has_every_score_with_its_interval(capsys):
    rows = [
        ROW,
        ROW | {"knob": 4.0, "causal_sparsity": 0.5, "score": 0.25, "stderr": None, "samples": None, "metric": "nats"},
        ROW | {"task": "position", "metric": "nats", "score": 2.0, "position": [4, 7], "causal_sparsity": 0.7},
        ROW | {"task": "lm_eval/a", "part": "[b]", "knob": 4.0, "causal_sparsity": 0.5},
        ROW | {"task": "niah", "target_sparsity": 0.9, "sparsity_count": "paper", "differs": "haystack: none"},
    ]
    Display().show_table(rows)
    said = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert said[:2] == [
        "topk 2 topk 4 for 0.9 (paper)",
        "task length 70.0% to 75.0% left out 50.0% left out 75.0% left out",
    ]
    assert said[3:8] == [
        "vt match 512 0.500 [0.318, 0.682] - -",
        "vt nats 512 - 0.2500 -",
        "position 4-7 512 2.0000 [1.7936, 2.2064] - -",
        "lm_eval/a match part [b] 512 - 0.500 [0.318, 0.682] -",
        "niah match 512 - - 0.500 [0.318, 0.682]",
    ]
    assert said[8:] == [
        "[low, high]: 95% confidence interval over rows, prompts or questions; "
        "of vt nats it is not known how samples scatter",
        "niah differs from the original task: haystack: none",
    ]


def test_scores_without_an_interval_are_named_by_their_task_where_none_of_it_has_one():
    bare = ROW | {"stderr": None, "samples": None, "metric": "nats"}
    rows = [ROW, bare, *(bare | {"task": "routing", "metric": metric} for metric in ("recall", "entropy"))]
    assert notes([bare]) == []
    assert notes(rows) == [
        "[low, high]: 95% confidence interval over rows, prompts or questions; "
        "of routing, vt nats it is not known how samples scatter"
    ]


def test_lines_that_come_with_rows(capsys):
    asked = {"target_sparsity": 0.75, "sparsity_count": "paper", "knob": 3.14159}
    told = {
        "vt match 0.500 [0.318, 0.682]  512 tokens  topk 2  causal sparsity 75.0%": {},
        "loss 3.0000 [2.7936, 3.2064]  512 tokens  topk 3.142  for 75.0% (paper)  causal sparsity 75.0%": (
            {"task": "loss", "metric": "nats", "score": 3.0} | asked
        ),
        "niah match depth 0 0.500  64 tokens  causal sparsity 0.0%": (
            {"task": "niah", "depth": 0.0, "knob": None, "causal_sparsity": 0.0, "length": 64} | {"samples": 0}
        ),
        "routing recall 0-1 probe vt relevant 2 depth 0.5 part a variant b 0.500 [0.294, 0.706]  512 tokens  topk 2  "
        "causal sparsity 75.0%": (
            {"task": "routing", "metric": "recall", "position": [0, 1], "probe": "vt", "relevant": 2, "depth": 0.5}
            | {"part": "a", "variant": "b"}
        ),
        "recall 0.500 [0.318, 0.682]  512 tokens  topk 2  causal sparsity 75.0%": (
            {"task": "recall", "metric": "accuracy"}
        ),
    }
    display, shown = Display(), []
    with display:
        for share, (text, changes) in zip((0.25, 0.25, 0.5, 0.5, 1.0), told.items(), strict=True):
            assert line(ROW | changes).replace("depth 0.0", "depth 0") == text
            display.advance(share)
            display.show(ROW | changes)
            shown.append(f"{line(ROW | changes)}  ({share:.0%} done{', ETA -:--:--' if share < 1 else ''})")
    said = re.sub(r"ETA [\d:-]+\)", "ETA -:--:--)", capsys.readouterr().out)
    assert said.splitlines() == shown
    assert [place_of(ROW | changes) for changes in ({}, asked, {"knob": None})] == [
        "topk 2",
        "for 0.75 (paper)",
        "no knob",
    ]
    display.show_table([ROW | {"untrained": "/b"}, ROW | {"untrained": "/a", "length": 8}, ROW | {"untrained": "/a"}])
    assert capsys.readouterr().out.splitlines()[-2:] == [
        f"nothing was trained: the weights are those of /{name}" for name in "ab"
    ]


def test_it_is_whole_also_where_nothing_was_new(recall_run, capsys):
    config = EvaluateConfig(run=str(recall_run), tasks=["loss"], knobs=[1.0, 5.0], device="cpu")
    first = list(Evaluation(config, find_target(config)).run())
    config.tasks, config.knobs = ["recall", "loss"], [5.0, 1.0]
    again = Evaluation(config, find_target(config))
    new = list(again.run())
    assert [(row["task"], row["knob"]) for row in new] == [("recall", 5.0), ("recall", 1.0)]
    order = [(row["task"], row["knob"]) for row in again.rows()]
    assert sorted(order) == [(task, knob) for task in ("loss", "recall") for knob in (1.0, 5.0)]
    assert [knob for _, knob in order] == [5.0, 5.0, 1.0, 1.0]
    assert [row for row in again.rows() if row["task"] == "loss"] == first[::-1]
    assert list(again.run()) == []
    config.tasks = ["loss"]
    assert Evaluation(config, find_target(config)).rows() == first[::-1]
    config.label = "of another name"
    assert Evaluation(config, find_target(config)).rows() == []


def test_the_command_shows_what_it_made_and_all_that_was_asked_for(recall_run, capsys, monkeypatch):
    limited, threads = [], []
    monkeypatch.setattr(command, "limit_memory", limited.append)
    monkeypatch.setattr(command.torch, "set_num_threads", threads.append)
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        asked = compose("evaluate", [f"run={recall_run}", "device=cpu", "threads=1", "tasks=[loss]", "knobs=[1,5]"])
    for new in (2, 0):
        capsys.readouterr()
        command.main.__wrapped__(asked)
        said = capsys.readouterr().out.splitlines()
        assert said[-1] == f"{new} new rows in {recall_run / 'results.jsonl'}"
        assert [line.split()[0] for line in said if line.startswith("loss")] == ["loss"] * new
        assert sum("router_scale 1" in line and "router_scale 5" in line for line in said) == 1  # the table's head
    assert (limited, threads) == (["cpu"] * 2, [1] * 2)


def test_progress_goes_from_nothing_to_all_with_every_batch(text_run):
    config = EvaluateConfig(run=str(text_run), tasks=["loss", "json_kv", "routing"], knobs=[1.0, 20.0], device="cpu")
    config.rows, config.rows_per_batch, config.lengths, config.probes = 4, 1, [512], ["niah_single_1"]
    shares = []
    list(Evaluation(config, find_target(config)).run(lambda share: shares.append(round(share, 9))))
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert len(set(shares)) == 2 * (4 + 1 + 4)  # four prompts of json_kv go at once
