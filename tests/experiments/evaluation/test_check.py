"""What an evaluation is refused for before its run is trained."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir

from dashattn.backends import DashConfig, FullConfig, InfLLMv2Config, SinkWindowConfig
from data import MQARDataConfig
from data.prompts import OWN_TEMPLATE
from experiments.config import to_train_config
from experiments.evaluation import lm_eval_task
from experiments.evaluation.check import check_ahead
from experiments.evaluation.config import EvaluateConfig
from experiments.evaluation.tasks.streams import MQARForm
from experiments.files import CONFIGS
from tests.checkpoints import make_folder

WINDOW = DashConfig(init_chunks=1, local_chunks=4)


@pytest.fixture(scope="module")
def text():
    """Trains on packed documents, with four query heads and two KV heads."""
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        return to_train_config(compose("train", ["experiment=debug", "attention=dash"]))


@pytest.fixture(scope="module")
def mqar(text):
    data = MQARDataConfig(name="mqar", seq_len=64, pairs_min=4, pairs_max=8, validation_rows=4)
    return replace(text, data=data, attention=DashConfig(chunk_size=8))


def asked(**options):
    return EvaluateConfig(**{"run": "outputs/run"} | options)


BLOCKS = InfLLMv2Config(window_size=64)  # a window of its own block and the one before, and the first one


@pytest.mark.parametrize(
    ("attention", "options", "message"),
    [
        # Of the attention.
        (WINDOW, {"sparsities": [0.5, 0.95], "lengths": [32768, 8192]}, "0.95 cannot be had: at 8192 .* reaches 0.900"),
        (DashConfig(layers={1: "full"}), {"sparsities": [0.99], "lengths": [8192]}, "0.99 cannot be had: at 8192"),
        (DashConfig(layers={"*": "full"}), {"sparsities": [0.5]}, r"attention\.layers leaves none of them"),
        (DashConfig(layers={"*": "full"}), {"knobs": [1.0]}, r"attention\.layers leaves none of them"),
        (DashConfig(), {"sparsities": []}, "sparsities=.. names none"),
        (DashConfig(), {"knobs": []}, "knobs=.. names none: give at least one, or null"),
        (DashConfig(), {"knobs": [1.0], "sparsities": [0.5]}, "give one of them"),
        (DashConfig(), {"sparsities": [0.5], "sparsity_count": "paper"}, "use sparsity_count=causal"),
        (DashConfig(), {"knobs": [1.0, 0.0]}, "router_scale must be a positive finite number"),
        (FullConfig(), {"knobs": [1.0]}, "attention=full has no sparsity knob"),
        (FullConfig(), {"sparsities": [0.5]}, "attention=full has no sparsity knob"),
        (BLOCKS, {"knobs": [3.0, 2.0]}, "topk counts the forced blocks too: topk 2 < 3"),
        (BLOCKS, {"knobs": [3.5]}, "topk must be an integer; got 3.5"),
        (replace(BLOCKS, layers={0: {"window_size": 192}}), {"knobs": [3.0]}, "topk 3 < 5"),
        (SinkWindowConfig(), {"knobs": [2.0**31]}, "local_blocks must be an integer"),
        (DashConfig(), {"attention": FullConfig()}, "the run outputs/run has its own, leave it out"),
        # Of tasks.
        (DashConfig(), {"tasks": ["lsos"]}, "tasks=.*did you mean loss"),
        (DashConfig(), {"tasks": []}, "tasks=.*: choose from"),
        (DashConfig(), {"tasks": ["recall"]}, "task recall needs a run trained on MQAR"),
        (DashConfig(), {"mqar": MQARForm(pairs_max=4)}, r"mqar\.\* needs a run trained on MQAR"),
        (DashConfig(), {"tasks": ["routing"], "probes": ["fwe"]}, "choose generated tasks whose answer stands in one"),
        (
            DashConfig(),
            {"tasks": ["lm_eval/no_such"], "template": "chatml"},
            "template=chatml is not for lm_eval/no_su",
        ),
        # Of lengths.
        (DashConfig(), {"lengths": []}, "lengths=.*: give at least one"),
        (DashConfig(), {"lengths": [64, 1]}, r"rows of lengths=1 cannot be made: data\.seq_len must be at least 2"),
        (DashConfig(), {"tasks": ["vt"], "lengths": [1024, 511]}, "length=511: vt needs at least 512 tokens"),
        (DashConfig(), {"tasks": ["routing"], "lengths": [256]}, "length=256: niah_single_2 needs at least 512"),
        (
            DashConfig(),
            {"tasks": ["loss", "ruler"], "lengths": [64, 256]},
            "nothing of ruler can be had: length=64: nia",
        ),
        (
            DashConfig(),
            {"tasks": ["routing"], "probes": ["niah_values"], "lengths": [256]},
            "nothing of niah_values can",
        ),
        # Of files, and of the tokenizer, which is still to be trained.
        (DashConfig(), {"tasks": ["qa_1"], "lengths": [1024]}, "task qa_1 needs squad=FILE"),
        (
            DashConfig(),
            {"tasks": ["qa_2"], "lengths": [1024], "hotpotqa": "no.json"},
            "no.json does not exist: give hot",
        ),
        (
            DashConfig(),
            {"tasks": ["niah"], "lengths": [1024], "haystack": "no.txt"},
            "no.txt does not exist: give hays",
        ),
        (DashConfig(), {"template": "chatml"}, r"template=chatml needs the tokens <\|im_start\|>, <\|im_end\|>, which"),
        (DashConfig(), {"template": OWN_TEMPLATE}, "the tokenizer .* has no chat template"),
    ],
)
def test_an_evaluation_that_would_end_without_rows_is_refused(text, attention, options, message):
    config = replace(text, attention=attention)
    with pytest.raises(ValueError, match=message) as error:
        check_ahead(asked(**options), config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": [64, 66]}, r"rows of lengths=66 cannot be made: .* must be a multiple of 4"),
        ({"lengths": [16]}, r"rows of lengths=16 cannot be made: .*pairs_max=8 does not fit"),
        ({"mqar": MQARForm(pairs_max=32), "tasks": ["routing"]}, r"rows of lengths=64 .*pairs_max=32 does not fit"),
        ({"mqar": MQARForm(pairs_max=2), "tasks": ["decode"]}, r"pairs_max=2 is below data\.pairs_min=4"),
        ({"tasks": ["loss", "niah"]}, "tasks niah are in text and need a run trained on text"),
        ({"tasks": ["lm_eval/arc_easy"]}, "tasks lm_eval/arc_easy are in text"),
    ],
)
def test_so_is_one_of_rows_that_cannot_be_generated(mqar, options, message):
    with pytest.raises(ValueError, match=message):
        check_ahead(asked(**options), mqar)


def test_what_can_be_asked_passes(text, mqar, tmp_path):
    assert check_ahead(asked(tasks=["recall", "routing", "decode"], lengths=[32, 128]), mqar) == []
    named = {"tasks": ["loss", "niah", "routing", "ruler"], "lengths": [1024]}  # of ruler what has no file is left out
    assert check_ahead(asked(**named, sparsities=[0.7]), text) == []
    (tmp_path / "essays.txt").write_text("prose")
    assert check_ahead(asked(**named, haystack=str(tmp_path / "essays.txt"), knobs=[1.0]), text) == []
    assert check_ahead(asked(tasks=["ruler", "niah_values"], lengths=[256, 512]), replace(text)) == []


def test_needles_need_text_to_lie_in(text, tmp_path):
    recall = replace(text, data=replace(text.data, source="recall", max_documents=9))
    named = {"tasks": ["niah_single_1", "niah_single_2"], "lengths": [1024]}
    with pytest.raises(ValueError, match=r"has no held-out text for a haystack: give haystack=FILE"):
        check_ahead(asked(**named), recall)
    (tmp_path / "essays.txt").write_text("prose")
    assert check_ahead(asked(**named, haystack=str(tmp_path / "essays.txt")), recall) == []
    assert check_ahead(asked(tasks=["niah_single_1"], lengths=[1024]), recall) == []  # among noise


def test_a_template_is_held_to_the_tokenizer_that_is_at_hand(text, tmp_path):
    folder = make_folder(tmp_path / "tiny")
    config = replace(text, data=replace(text.data, tokenizer=str(folder)))
    with pytest.raises(ValueError, match="template=llama3 needs the tokens"):
        check_ahead(asked(template="llama3"), config)
    assert check_ahead(asked(template="mistral"), config) == []
    elsewhere = replace(text, data=replace(text.data, tokenizer="owner/on-the-hub"))
    assert check_ahead(asked(template="llama3"), elsewhere) == []


def test_a_task_of_lm_eval_is_looked_up(text, monkeypatch, tmp_path):
    looked = []

    def task_manager(include_path):
        looked.append(include_path)
        return SimpleNamespace(all_tasks=["arc_easy"])

    monkeypatch.setattr(lm_eval_task, "task_manager", task_manager)
    assert check_ahead(asked(tasks=["loss", "lm_eval/arc_easy"], harness_path=str(tmp_path)), text) == []
    with pytest.raises(ValueError, match=r"lm_eval has no task no_such: .*; harness_path adds yours"):
        check_ahead(asked(tasks=["lm_eval/no_such"]), text)
    assert looked == [str(tmp_path), None]


def test_moved_text_is_that_of_the_run(text):
    with pytest.raises(ValueError, match="says of a run where the files of its corpora lie now"):
        check_ahead(asked(data=text.data), text)


def test_a_sparsity_that_the_weights_decide_on_is_noted(text):
    """At 8192 tokens six chunks of 64 are forced, and each of a group's query heads chooses one beside them."""
    model = replace(text.model, num_heads=9, num_kv_heads=3, hidden_size=144)
    train = replace(text, attention=WINDOW, model=model)
    sizes = {"lengths": [32768, 8192], "tasks": ["loss"]}
    assert check_ahead(asked(sparsities=[0.9, 0.5, 0.75], **sizes), train) == [
        "a sparsity of 0.9 may not be had: at 8192 tokens attention=dash reaches 0.871 to 0.900, the more the 3 query "
        "heads of a group choose alike. Lower the target, or force fewer or smaller blocks"
    ]
    alone = replace(train, model=replace(model, num_kv_heads=9))
    assert check_ahead(asked(sparsities=[0.9], **sizes), alone) == []
    together = replace(train, attention=replace(WINDOW, selector="topk"))
    assert check_ahead(asked(sparsities=[0.9], **sizes), together) == []
