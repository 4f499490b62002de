"""Every command of the README runs, the long ones at smoke size; a command without a test here fails."""

import importlib
import io
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from rich.console import Console

import dashattn
from experiments import signals
from experiments.schema import to_config
from experiments.sparsity import TOLERANCE
from experiments.sweep.__main__ import run_sweep
from tests import forked
from tests.checkpoints import make_folder

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def _lines(block):
    return block.replace("\\\n", " ").splitlines()


def readme_commands():
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in _lines(block)]
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    inline = re.findall(r"`((?:python|torchrun|deepspeed|pytest|pip|make)\s[^`]*)`", prose)
    commands = {" ".join(line.split()) for line in [*lines, *inline]}
    return {command for command in commands if command and not command.startswith("source ")}


def run(*command, env=None, timeout=600):
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | (env or {}), capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def python(*arguments):
    done = forked.run(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


TRAIN = "python train.py experiment=debug attention=dash attention.chunk_size=8 attention.target_sparsity=0.75"
EVALUATE = "python evaluate.py run=outputs/debug-dash tasks=[loss,position] knobs=[10,100,1000]"

# What a test below stands for; the README's ``...`` are its own.
TESTED = {
    "make install",  # this
    "make pareto",
    "make test",  # this
    "make test-all",  # this, and what is marked slow
    "make test-crash",  # experiments/training/test_crash.py, data/test_prepared.py
    "make test-gpu",  # on a GPU
    "make docs",  # test_docs.py
    "pytest tests/gpu/test_two_gpus.py",  # on two
    "make figures",  # experiments/figures/test_figures.py
    TRAIN,
    EVALUATE,
    # experiments/evaluation/test_generate.py
    'python -m experiments.evaluation.generate run=outputs/debug-dash prompt="import os"',
    "python -m experiments.sweep sweep=smoke",
    "python -m experiments.figures.pareto outputs/smoke",
    "python train.py --cfg job",
    "python -m experiments.speed",  # on a GPU; refusal without one: experiments/speed/test_benchmark.py
    "python -m experiments.speed --config-name speed_shapes",  # likewise
    "python -m experiments.speed --config-name speed_peers",  # likewise
    "python -m experiments.speed.report results/speed_h100",
    "torchrun --standalone --nproc-per-node 8 train.py model=350m data=hub deepspeed=zero2 ...",  # test_train_cli.py
    "deepspeed --no_local_rank --num_gpus 8 train.py ...",  # test_train_cli.py
    "python -m experiments.throughput",  # experiments/throughput/test_steps.py
    "python -m experiments.throughput.scaling",  # experiments/throughput/test_scaling.py
    "pip install .",
    "pip install --editable '.[train]'",  # experiments/test_cli.py
    "python -m data.collect corpora/notes.jsonl ~/notes '*.deb'",  # data/test_collect.py
    "python -m experiments.training.prepare data=mixture",  # experiments/training/test_prepare.py
    # models/test_hf.py, experiments/training/test_train.py
    "python -m experiments.evaluation.export outputs/debug-dash outputs/debug-hf",
    # test_configs.py
    "python train.py experiment=continue_pretraining init_from=smollm2 attention=dash_sink "
    "attention.target_sparsity=0.75",
    # test_configs.py, experiments/training/test_auxiliary_loss.py
    "python train.py model=checkpoint init_from=smollm2 attention=indexer attention.warmup_steps=150 "
    "optim.train_only=router",
    "INIT_FROM=smollm2 python -m experiments.sweep sweep=real_model jobs=3",  # test_configs.py
    # experiments/test_identity.py
    "python train.py optim=wsd steps=20000 save_every=1000 keep_checkpoints=0 name=trunk ...",
    "python train.py optim=wsd steps=10000 branch_from=outputs/trunk@8000 name=branch ...",
    # experiments/evaluation/test_folder.py
    "python evaluate.py run=smollm2 attention=dash_sink sparsities=[0.5,0.75] data=real_text",
    # experiments/test_origin.py
    "python -m experiments.evaluation.export --dense outputs/debug-dash outputs/debug-dense-hf",
    # experiments/test_plan.py
    "dashattn plan model=8b model.vocab_size=73448 data.seq_len=32768 rows_per_batch=64 activation_checkpointing=true "
    "attention=dash sparsity=0.75 gpus=64 gpu=H200",
    "dashattn plan sweep=from_scratch gpu=H100",
    "python train.py launcher=slurm launcher.partition=gpu ...",  # slurm/
    "python -m experiments.sweep sweep=pareto launcher=slurm",  # slurm/
    "python -m experiments.sweep.status outputs/pareto",  # slurm/
    # experiments/evaluation/test_tasks.py
    "python evaluate.py run=outputs/debug-dash tasks=[niah_single_1,vt,routing] lengths=[1024] rows=4",
    # experiments/evaluation/test_harness.py
    "python -m experiments.evaluation.harness --model dashattn --model_args run=outputs/debug-dash "
    "--tasks lambada_openai",
    "python -m experiments.sweep.collect outputs/smoke results/smoke",  # experiments/figures/test_figures.py
    # experiments/figures/test_figures.py, experiments/sweep/test_sweep.py
    "python -m experiments.sweep.collect --restore results/frontier_h100 outputs/frontier",
    # experiments/figures/test_run_page.py
    "python -m experiments.figures.run_page outputs/debug-dash outputs/debug-full",
}


def test_every_command_is_tested():
    assert readme_commands() == TESTED


def test_every_setting_exists():
    """A recipe's settings compose with one of the entry points."""
    entries = {"train": "train", "evaluate": "evaluate"}
    entries |= {"generate": "experiments.evaluation.generate", "sweep": "experiments.sweep.__main__"}
    for module in entries.values():
        importlib.import_module(module)  # registers its schema

    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    codes = [code.strip("'") for code in re.findall(r"`([^`]*)`", prose)]
    words = {word for code in codes for word in ([code] if '"' in code else code.split())}
    settings = {word for word in words if re.fullmatch(r"[a-z_][a-z_.]*=[^\s].*", word)}
    settings -= {'impl="reference"', 'impl="auto"', "use_cache=False"}  # arguments of functions
    assert len(settings) > 10

    def composes(setting, entry):
        choices = ["attention=dash"] if setting.startswith("attention.") else []
        if entry == "sweep" and not setting.startswith("sweep="):
            choices = ["sweep=smoke"]
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"), suppress(HydraException):
            return compose(entry, [*choices, setting]) is not None

    assert [setting for setting in settings if not any(composes(setting, entry) for entry in entries)] == []


def test_the_notebook_is_an_index():
    """Short, and a line leads to every folder's notes."""
    log = (ROOT / "LOG.md").read_text()
    assert len(log.splitlines()) <= 150
    notes = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("results/*/NOTES.md")}
    assert set(re.findall(r"\]\((.*?)\)", log)) == notes


@pytest.mark.parametrize(
    "page",
    [*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *ROOT.glob("results/*/NOTES.md")],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_links_lead_somewhere(page):
    text = page.read_text()
    links = re.findall(r"\]\(((?!https?:)[^)#]+)\)", text) + re.findall(r"`(\.\./[\w/.]+)`", text)
    assert [link for link in links if not (page.parent / link).exists()] == []
    modules = [ROOT / name.replace(".", "/") for name in re.findall(r"python -m (experiments[\w.]*)", text)]
    assert [
        path for path in modules if not (path / "__main__.py").exists() and not path.with_suffix(".py").exists()
    ] == []


def test_a_release_has_one_version_and_one_date():
    """As CONTRIBUTING.md says: sections of the change log, the newest first, that of this version on top."""
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {dashattn.__version__}\n" in citation
    assert f"version = {{{dashattn.__version__}}}" in (ROOT / "CITATION.bib").read_text()
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    sections = [re.fullmatch(r"(\d+\.\d+\.\d+), (not yet released|\d{4}-\d\d-\d\d)", line) for line in headings]
    assert all(sections), headings
    versions = [section[1] for section in sections]
    assert versions[0] == dashattn.__version__
    numbers = [tuple(map(int, version.split("."))) for version in versions]
    assert numbers == sorted(set(numbers), reverse=True)
    assert "not yet released" not in [section[2] for section in sections[1:]]
    dated = re.findall(r"^date-released: (.+)$", citation, re.MULTILINE)
    assert dated == [section[2] for section in sections[:1] if section[2] != "not yet released"]
    released = {f"v{section[1]}" for section in sections if section[2] != "not yet released"}
    tags = subprocess.run(
        ["git", "tag", "--list", "v*"], cwd=ROOT, capture_output=True, text=True
    )  # none in an archive
    assert set(tags.stdout.split()) <= released


def test_make_says_what_it_can_make():
    targets = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    said = [line.split(maxsplit=1) for line in run("make", "--silent").splitlines()]
    assert [name for name, _ in said] == targets
    assert ["pareto", "the first frontier: train, evaluate, table and figure; again: finishes what is missing"] in said


def test_figures_are_made_of_folders_with_rows():
    commands = run("make", "--dry-run", "--old-file=.venv/.installed", "figures")
    studies = set(re.findall(r"results/\w+", commands))
    assert studies == {path.parent.relative_to(ROOT).as_posix() for path in ROOT.glob("results/*/*.jsonl")}


@pytest.mark.long
def test_train_then_evaluate(tmp_path):
    small = ("steps=6", "data.max_bytes=2000000", "threads=1", f"run_dir={tmp_path}/debug-dash")
    out = python(*TRAIN.split()[1:], *small)
    (found,) = re.findall(r"has a sparsity of ([\d.]+)% on training rows", out)
    assert abs(float(found) - 75) <= 100 * TOLERANCE  # the rows are the Python sources of this environment
    out = python(*EVALUATE.replace("outputs", str(tmp_path)).split()[1:], "threads=1")
    sparsities = re.findall(r"loss .* router_scale (\w+) .*causal sparsity ([\d.]+)%", out)
    assert [knob for knob, _ in sparsities] == ["10", "100", "1000"]
    assert 60 < float(sparsities[1][1]) < 90  # as the README says: visibly sparse


def test_show_the_configuration():
    assert "attention:" in python("train.py", "--cfg", "job")
    page = python("train.py", "--help")
    assert "attention: full, checkpoint, dash" in page  # the default first
    assert "launcher: null, slurm" in page
    for group in ("attention", "model", "data", "experiment"):
        (choices,) = re.findall(rf"^  {group}: (.*)$", page, re.MULTILINE)
        assert set(choices.split(", ")) >= {path.stem for path in (ROOT / "configs" / group).glob("*.yaml")}


def test_speed_report_from_the_committed_rows(tmp_path):
    shutil.copy(ROOT / "results/speed_h100/speed.jsonl", tmp_path)
    assert "NVIDIA H100" in python("-m", "experiments.speed.report", str(tmp_path))
    assert (tmp_path / "speed.png").stat().st_size > 10_000


@pytest.mark.long
def test_a_sweep_ends_in_a_frontier_and_once_more_trains_nothing(tmp_path, monkeypatch):
    """``make pareto`` at smoke size, without make and the start of its processes."""
    monkeypatch.setattr(signals, "subprocess", SimpleNamespace(Popen=forked.Process))
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = to_config(compose("sweep", ["sweep=smoke", f"output_dir={tmp_path}/smoke"]))
    for status in ("done", "was done"):
        outcomes = run_sweep(config, Console(file=io.StringIO()))
        assert [outcome.status for outcome in outcomes.values()] == [status] * 5, outcomes
    table = python("-m", "experiments.figures.pareto", f"{tmp_path}/smoke")
    for label in ("full", "dash", "infllmv2", "nsa"):
        assert f"| {label} |" in table
    assert (tmp_path / "smoke/pareto.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".venv/.installed").exists(), reason="make would install: run make install first")
def test_make_pareto_killed_and_again(tmp_path):
    """The whole path at smoke size: install (done), sweep, table and figure. Killed after its first cell, it goes on
    with the others; a further call trains nothing."""
    command = ("make", "pareto", "SWEEP=smoke", f"OUTPUT={tmp_path}/smoke")
    killed = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        while not list(tmp_path.glob("smoke/*/cell.json")):
            assert killed.poll() is None
            time.sleep(0.05)
        time.sleep(random.uniform(0, 8))
    finally:
        os.killpg(killed.pid, signal.SIGKILL)  # with its cells, as when the machine dies
        killed.wait()
    first = run(*command)
    left, done = map(int, re.search(r"(\d) cells to do, (\d) done before", first).groups())
    assert done >= 1
    assert left + done == 5
    assert "failed" not in first
    for label in ("full", "dash", "infllmv2", "nsa"):
        assert f"| {label} |" in first
    assert (tmp_path / "smoke/pareto.png").stat().st_size > 10_000
    again = run(*command)
    assert "0 cells to do, 5 done before" in again


def test_a_checkpoint_inside_transformers(tmp_path, monkeypatch):
    monkeypatch.chdir(make_folder(tmp_path / "smollm2").parent)
    (snippet,) = [code for code in blocks("python") if "transformers" in code]
    names = {}
    exec(snippet, names)
    assert names["model"](torch.arange(70)[None]).logits.shape == (1, 70, 310)


def test_the_library_installs_alone(tmp_path, tmp_path_factory):
    """From a source distribution only dashattn is installed; it imports, and the README's snippet runs, with nothing
    else of the project."""
    source, dist = (tmp_path_factory.mktemp(name) for name in ("source", "dist"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "dashattn_command.py"):
        shutil.copy(ROOT / name, source)
    for name in ("dashattn", "models"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = f"from setuptools.build_meta import build_sdist; build_sdist({str(dist)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True, timeout=120)
    (archive,) = dist.iterdir()
    assert archive.name == f"dashattn-{dashattn.__version__}.tar.gz"
    run(
        *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"),
        *("--target", str(tmp_path), str(archive)),
    )
    assert {path.name for path in tmp_path.rglob("*") if path.name in ("py.typed", "tuning.jsonl")} == {
        "py.typed",
        "tuning.jsonl",
    }
    folders = {p.name for p in tmp_path.iterdir() if p.is_dir() and not p.name.endswith(".dist-info")}
    assert folders - {"__pycache__"} == {"dashattn", "bin"}
    # Of the commands it has the name, which says what they need.
    assert (tmp_path / "bin" / "dashattn").exists()
    command = [sys.executable, str(tmp_path / "dashattn_command.py"), "train"]
    refused = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "only the attention library is installed here: clone the repository" in refused.stderr
    (snippet,) = [code for code in blocks("python") if "transformers" not in code]
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{snippet}\nassert 'models' not in sys.modules\n"
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    size, share = re.search(r"(torch.Size.*\)) ([\d.]+)% of the causal keys not read", done.stdout).groups()
    assert size == "torch.Size([1, 1000, 8, 64])"
    assert 70 < float(share) < 80  # as the README says
