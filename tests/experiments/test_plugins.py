"""Backends and tasks of packages outside the tree: those of examples/ go the whole way, and what is wrong with others
is said in a line."""

import json
import re
import sys
from dataclasses import replace

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.object_type import ObjectType
from hydra.errors import CompactHydraException
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM

from dashattn import plugins
from dashattn.backends import BACKENDS, AttentionShape, SinkWindowConfig, build_backend
from dashattn.integrations.transformers import register
from data.task_sets import OTHERS, SUITES, TEXT_TASKS
from experiments import backend_source
from experiments.config import load_config, to_train_config
from experiments.evaluation.config import EvaluateConfig, check_tasks, register_evaluate_config
from experiments.evaluation.evaluate import check_request, evaluate, find_target
from experiments.evaluation.generate import GenerateConfig, run_generation
from experiments.evaluation.tasks.decoding import DECODE
from experiments.evaluation.tasks.streams import STREAM_TASKS
from experiments.files import CONFIGS
from experiments.help import advice, help_page
from experiments.provenance import environment
from experiments.schema import to_config
from experiments.sweep.cells import cells, register_sweep_config
from experiments.training.check import check
from experiments.training.weights import find_weights, load_weights
from models import Transformer
from models.generate import generate
from models.hf import read_config
from tests.checkpoints import make_folder
from tests.plugins import EXAMPLES, ROOT, install, write_metadata
from train import train

register_sweep_config()
register_evaluate_config()
MODULES = ("streaming_backend", "latest_value_task", "of_others")


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder where Python finds packages."""
    path = tmp_path / "site"
    path.mkdir()
    monkeypatch.syspath_prepend(path)
    for registry in (BACKENDS, TEXT_TASKS):
        monkeypatch.setattr(registry, "_loaded", {})
    # What Hydra made of a package that another test had is not to be met again.
    monkeypatch.setattr(ConfigLoaderImpl, "load_configuration", ConfigLoaderImpl.load_configuration.__wrapped__)
    yield path
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def examples(site):
    for source in EXAMPLES:
        install(source, site)


def composed(*overrides, name="train"):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose(name, list(overrides))


def test_it_is_trained_evaluated_resumed_and_generated_from(examples, make_config, capsys):
    options = ("attention=streaming", "attention.window=16", "attention.sink_tokens=2", "data.pack=plain")
    run_dir = train(make_config("run", *options, "stats_every=4"))
    assert load_config(run_dir / "config.yaml").attention == BACKENDS["streaming"][0](window=16, sink_tokens=2)
    assert json.loads((run_dir / "environment.json").read_text())["packages"]["streaming-backend"] == "0.1"
    asked = dict(run=str(run_dir), device="cpu", lengths=[512], rows=1)
    losses = EvaluateConfig(**asked, tasks=["loss"], knobs=[1, 512])
    narrow, whole = evaluate(losses, find_target(losses))
    # A window of one token, and two tokens at the beginning: 1, 2, then 3 keys.
    assert narrow["causal_sparsity"] == pytest.approx(1 - (1 + 2 + 510 * 3) / sum(range(1, 513)))
    assert whole["causal_sparsity"] == 0
    assert (whole["backend"], whole["knob_name"], whole["trained_knob"]) == ("streaming", "window", 16)
    task = EvaluateConfig(**asked, tasks=["latest_value"])
    (row,) = evaluate(task, find_target(task))
    assert (row["task"], row["differs"], row["knob"]) == ("latest_value", None, 16)
    assert list(evaluate(task, find_target(task))) == []  # its samples are known again
    run_generation(GenerateConfig(str(run_dir), "import os", max_new_tokens=4, threads=1))
    assert "4 in all" in capsys.readouterr().err


def test_the_example_attends_to_what_it_says(examples):
    """Token by token, for packed documents; each key counts once."""
    kind, _ = BACKENDS["streaming"]
    backend = build_backend(kind(window=3, sink_tokens=2), AttentionShape(32, 4, 2, 8))
    q, k, v = (torch.randn(1, 15, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    out, stats = backend(q, k, v, cu_seqlens=torch.tensor([0, 4, 15], dtype=torch.int32), return_stats=True)
    for start, end in ((0, 4), (4, 15)):
        for token in range(start, end):
            keys = [key for key in range(start, token + 1) if key > token - 3 or key < start + 2]
            assert stats.active_tokens[0, token].tolist() == [len(keys)] * 2
            for head in range(4):
                p = (k[0, keys, head // 2] @ q[0, token, head] / 8**0.5).softmax(0)
                torch.testing.assert_close(out[0, token, head], p @ v[0, keys, head // 2])
    assert kind().least_active(9).tolist() == [1, 2, 3, 4, *[5] * 5]


def test_the_example_task_asks_for_the_latest_value(examples):
    task = TEXT_TASKS["latest_value"]
    (form,) = task.forms(1024)
    for draw, _ in zip(form.draws(None, 0), range(3), strict=False):
        small, large = draw(20), draw(60)
        lines = large.prompt.split("\n\n")[1].split("\n")
        assert len(lines) == 60
        assert lines[:20] == small.prompt.split("\n\n")[1].split("\n")
        name = large.answer_prefix.split()[3]
        assert [line for line in lines if f" {name} " in line][-1] == large.evidence[0]
        assert large.score(f" {large.references[0]}.", task.match) == 1


def test_it_is_one_of_those_of_transformers(examples, tmp_path):
    register()
    folder = make_folder(tmp_path / "checkpoint", initializer_range=0.4)
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="streaming").eval()
    theirs.config.dashattn = {"window": 5, "sink_tokens": 1}
    ours = Transformer(read_config(folder), BACKENDS["streaming"][0](window=5, sink_tokens=1)).eval()
    load_weights(ours, find_weights(folder))
    prompt = torch.randint(2, 300, (1, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(theirs(prompt).logits, ours(prompt).logits, atol=2e-4, rtol=2e-4)
    options = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    out = theirs.generate(prompt, use_cache=False, **options)
    assert out[0, 30:].tolist() == generate(ours, prompt.tolist(), max_new_tokens=6)[0]
    with pytest.raises(ValueError, match="attn_implementation='streaming' has no cache: pass use_cache=False"):
        theirs.generate(prompt, **options)


def test_only_what_is_asked_for_is_looked_up_and_imported(examples, monkeypatch):
    assert {"streaming", "dash"} <= set(BACKENDS)
    assert {"latest_value", "niah"} <= set(TEXT_TASKS)
    assert "attention: full, checkpoint" in (page := help_page("train"))
    assert ", sink_window, streaming\n" in page
    told = "attention=streaming: of the package streaming-backend, which explains its options in streaming_backend"
    assert told in help_page("train", ["attention=streaming"])
    assert not {"streaming_backend", "latest_value_task"} & set(sys.modules)
    presets = sorted(path.stem for path in (ROOT / "configs/attention").glob("*.yaml"))
    with monkeypatch.context() as patched:
        patched.setattr(plugins, "entry_points", None)  # looking would raise a TypeError
        for name in ("full", "dash_sink"):
            train_config = to_train_config(composed(f"attention={name}"))
        check_tasks(EvaluateConfig(run="run", tasks=["loss", "decode", "routing", "ruler"]), train_config)
    # What has a name in configs/ or in an evaluation is not to be had by another package.
    assert all(BACKENDS.is_ours(name) for name in (*presets, "attention"))
    assert set(OTHERS) == {*STREAM_TASKS, "routing", DECODE}
    assert all(TEXT_TASKS.is_ours(name) for name in (*SUITES, *OTHERS))


def test_what_does_not_exist_is_told_what_does(examples):
    with pytest.raises(CompactHydraException, match=r"(?s)Could not find 'attention/straming'.*\tstreaming\n"):
        composed("attention=straming")
    config = to_train_config(composed())
    with pytest.raises(ValueError, match="did you mean latest_value"):
        check_tasks(EvaluateConfig(run="run", tasks=["last_value"]), config)


def test_layers_and_files_of_values_know_it(examples, tmp_path):
    (tmp_path / "attention").mkdir()
    (tmp_path / "attention/mine.yaml").write_text("defaults: [streaming_schema, _self_]\nwindow: 7\n")
    cfg = composed(f"hydra.searchpath=[file://{tmp_path}]", "attention=mine", "attention.layers={0:full}")
    config = to_train_config(cfg)
    assert (config.attention.window, OmegaConf.get_type(cfg.attention)) == (7, BACKENDS["streaming"][0])
    evaluation = to_config(composed("run=folder", "attention=streaming", "attention.window=7", name="evaluate"))
    assert evaluation.attention == replace(config.attention, layers=None)
    shape = dict(vocab_size=50, num_layers=2, hidden_size=32, num_heads=2, num_kv_heads=1, head_dim=16)
    model = type(config.model)(**shape, intermediate_size=32, max_seq_len=64)
    assert [one.config.name for one in Transformer(model, config.attention).backends] == ["full", "streaming"]
    layers = replace(SinkWindowConfig(), layers={"1": "streaming"})
    assert [one.config.name for one in Transformer(model, layers).backends] == ["sink_window", "streaming"]


GOOD = """
from dataclasses import dataclass
from dashattn.backends import AttentionBackend, AttentionConfig
from dashattn.fields import Line

@dataclass
class Config(AttentionConfig):
    name: Line = "theirs"

BACKEND = (Config, AttentionBackend)
"""


@pytest.mark.parametrize(
    ("points", "code", "message"),
    [
        ({"theirs": "of_others:BACKEND"}, "import nothing_of_that_name", "No module named 'nothing_of_that_name'"),
        ({"theirs": "of_others:BACKEND"}, "def broken(:", "SyntaxError: "),
        ({"theirs": "of_others:OTHER"}, GOOD, "has no attribute 'OTHER'"),
        ({"theirs": "of_others:Config"}, GOOD, "it must be (a subclass of AttentionConfig, one of AttentionBackend)"),
        ({"theirs": "of_others:BACKEND"}, GOOD.replace('"theirs"', '"mine"'), "Config.name must be 'theirs'"),
        (
            {"theirs": "of_others:BACKEND"},
            GOOD.replace("name: Line", "size: int = 3\n    name: Line"),
            "takes any value",
        ),
        (
            {"theirs": "of_others:BACKEND", "dash": "of_others:BACKEND"},
            GOOD,
            "'dash' among its dashattn.backends, a name of",
        ),
        (
            {"theirs": "of_others:BACKEND", "moba": "of_others:BACKEND"},
            GOOD,
            "'moba' among its dashattn.backends, a name of",
        ),
        ({"theirs": "of_others:BACKEND", "My-Own": "of_others:BACKEND"}, GOOD, "names are made of a-z, 0-9 and _"),
    ],
)
def test_what_is_wrong_with_a_package_is_one_line_that_names_it(site, points, code, message):
    (site / "of_others.py").write_text(code)
    write_metadata(site, "their-package", {"dashattn.backends": points})
    with pytest.raises(ValueError, match="their-package") as raised:
        BACKENDS["theirs"]
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("points", [{"theirs": "of_others:BACKEND"}, {"theirs": "x:y", "dash": "x:y"}])
def test_so_it_is_on_a_command_line(site, points):
    """Of this exception Hydra shows the message alone. Who asks for a backend of ours is not bothered."""
    write_metadata(site, "their-package", {"dashattn.backends": points})
    with pytest.raises(
        CompactHydraException, match=r"of the package their-package|the package their-package has 'dash'"
    ):
        composed("attention=theirs")
    assert composed("attention=dash").attention.name == "dash"


def test_two_packages_with_one_name_are_refused(site):
    for package in ("one", "another"):
        write_metadata(site, package, {"dashattn.tasks": {"theirs": "of_others:TASK"}})
    with pytest.raises(
        ValueError, match=r"the package (one has .* so has another|another has .* so has one): uninstall"
    ):
        TEXT_TASKS["theirs"]


def test_a_task_must_be_one(site):
    (site / "of_others.py").write_text("TASK = 'no task'")
    write_metadata(site, "their-package", {"dashattn.tasks": {"theirs": "of_others:TASK"}})
    with pytest.raises(ValueError, match=r"of the package their-package .*it must be a TextTask of data.tasks.sample"):
        TEXT_TASKS["theirs"]


def test_a_sweep_of_ones_own_composes(examples, tmp_path):
    text = (ROOT / "examples/sweep/own.yaml").read_text()
    commented = re.search(r"(?m)(^ {6}# streaming:\n)(^ {6}#   .*\n)+", text)[0]
    (tmp_path / "sweep").mkdir()
    live = commented.replace("# ", "", 1).replace("#   ", "  ")
    (tmp_path / "sweep/own.yaml").write_text(text.replace(commented, live))
    sweep = to_config(composed(f"hydra.searchpath=[file://{tmp_path}]", "sweep=own", name="sweep"))
    planned = cells(sweep)
    arms = ["base", "full", "dash", "window-knob2", "streaming"]
    assert [cell.name for cell in planned] == [f"recall-{arm}-seed0" for arm in arms]
    for cell in planned:
        assert advice("train", cell.train) is None
        config = check(to_train_config(composed("device=cpu", *cell.train)))
        if cell.evaluate is not None:
            request = to_config(composed(*cell.evaluate, name="evaluate"))
            check_request(request, config)  # sparsities that can be had among them
    assert advice("sweep", ["--config-dir", "examples", "sweep=own"]) is None


def test_hydra_finds_the_backends_of_packages_and_nothing_else_here(monkeypatch):
    monkeypatch.setattr(backend_source, "_plugins", lambda: {"b": None, "a": None, "full": None})
    source = backend_source.BackendSource("dashattn", "dashattn://")
    assert (source.scheme(), source.available()) == ("dashattn", True)
    for kind in (None, ObjectType.CONFIG):
        assert source.list("attention", kind) == ["a", "b", "full"]
    assert source.list("attention", ObjectType.GROUP) == source.list("model", None) == source.list("", None) == []
    assert [path for path in ("attention", "/attention/", "attention/a", "model", "") if source.is_group(path)] == (
        ["attention", "/attention/"]
    )
    paths = ["attention/a", "attention/a.yaml", "attention/b_schema", "attention/full", "attention/c", "attention/"]
    assert [path for path in [*paths, "attention", "model/a"] if source.is_config(path)] == paths[:3]


def test_a_run_says_which_packages_it_may_have_used(examples):
    found = environment("cpu")["packages"]
    assert (found["streaming-backend"], found["latest-value-task"]) == ("0.1", "0.1")
