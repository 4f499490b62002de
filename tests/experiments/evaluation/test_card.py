"""What an export's README.md says, from files made by hand."""

import json
from types import SimpleNamespace

import pytest

from dashattn.backends import FullConfig, OracleConfig
from experiments.evaluation import card


@pytest.fixture
def make_target(tmp_path, monkeypatch):
    """make_target(attention, file=what it holds ...): what is exported, of three steps."""
    monkeypatch.setattr(card, "read_state", lambda checkpoint: {"step": 3, "tokens": 12345})

    def make(attention, **files):
        for name, rows in files.items():
            text = json.dumps(rows) if isinstance(rows, dict) else "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / f"{name}.json{'' if isinstance(rows, dict) else 'l'}").write_text(text)
        train = SimpleNamespace(name="mine", attention=attention, data=SimpleNamespace(name="text", seq_len=64))
        return SimpleNamespace(checkpoint=tmp_path / "step-3", home=tmp_path, run_dir=tmp_path, train=train)

    return make


def test_the_card_of_a_dense_run(make_target):
    start = {"init_from": {"weights": "/a/b/smollm2"}, "data": {"source": "hub", "documents": 7, "tokens": 99, "x": 1}}
    assert card.model_card(make_target(FullConfig(), start=start, git={"sha": "abc", "dirty": True}), dense=False) == (
        "# mine\n\nStep 3, 12,345 tokens of training.\n\nBegan with the weights of smollm2.\n\n"
        "## Attention\n\n`full`, exact causal attention.\n\n"
        "## Data\n\n- text, rows of 64 tokens\n- source: hub\n- documents: 7\n- tokens: 99\n\n"
        "## Code\n\nCommit abc, with changes that it does not hold.\n"
    )


def test_the_card_of_a_sparse_run(make_target):
    """Its sparsity is the validation rows' at the knob and of the checkpoint; else the last one of training."""
    attention = OracleConfig(topk=8)
    target = make_target(attention)
    options = [f"- {name}: {value}\n" for name, value in vars(attention).items() if name != "name"]
    assert "- topk: 8\n" in options
    page = (
        "# mine\n\nStep 3, 12,345 tokens of training.\n\n## Attention\n\n`oracle`:\n\n" + "".join(options) + "\n"
        "Causal sparsity, the share of earlier keys that is not read:\n\n{}\n\n## How to load it\n\n{}\n\n"
        "## Data\n\n- text, rows of 64 tokens\n\n## Code\n\nCommit {}.\n"
    )
    assert card.model_card(target, dense=False) == page.format("- not measured", card._HOW, "not known")
    metrics = [{"step": step, "split": "train", "causal_sparsity": step / 10} for step in (1, 2)]
    make_target(attention, metrics=[*metrics, {"step": 3, "split": "validation"}], git={"sha": "abc", "dirty": False})
    trained = page.format("- 20.0% of training rows, at step 2", card._WARNING, "abc")
    assert card.model_card(target, dense=True) == trained
    row = {"task": "loss", "checkpoint": "step-3", "knob": 8, "trained_knob": 8, "metric": "nats", "score": 1.0}
    row |= {"label": "oracle", "data": "text", "length": 128, "causal_sparsity": 0.5}
    others = [row | other for other in ({"task": "recall"}, {"checkpoint": "step-2"}, {"knob": 7})]
    others = [other | {"length": 256} for other in others]
    others.append(row | {"variant": "pairs_max=8", "causal_sparsity": 0.75})  # another task than it was trained on
    make_target(attention, results=[row, *others, row | {"length": 64, "causal_sparsity": 0.25}])
    both = "- 25.0% of validation rows of 64 tokens\n- 50.0% of validation rows of 128 tokens"
    assert card.model_card(target, dense=False) == page.format(both, card._HOW, "abc")
