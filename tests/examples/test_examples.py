"""What stands in examples/ runs, at smoke size. The packages of it are tested in tests/experiments/test_plugins.py."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import nbformat
import pytest
from nbclient import NotebookClient

from experiments.files import read_rows
from tests import forked
from tests.checkpoints import make_folder
from tests.plugins import EXAMPLES, ROOT

FOLDER = ROOT / "examples"
README = (FOLDER / "README.md").read_text()
NOTEBOOK = FOLDER / "checkpoint_to_dashattention.ipynb"


def read_notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_the_notebook_is_one_without_outputs_that_would_age():
    notebook = read_notebook()
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.source for cell in cells if cell.outputs or cell.execution_count] == []
    for cell in cells:
        ast.parse(cell.source)
    assert [cell.metadata.get("tags") for cell in cells][:2] == [["parameters"], None]


def test_the_index_names_all_that_is_here():
    linked = set(re.findall(r"\]\(([^)/]+)[^)]*\)", README))
    here = {path.name for path in FOLDER.iterdir()} - {"README.md", "__pycache__"}
    assert linked == here


@pytest.mark.slow
def test_the_notebook_runs_at_smoke_size(tmp_path):
    """In a kernel of Jupyter, with other values behind its own."""
    checkpoint = make_folder(tmp_path / "checkpoint", initializer_range=0.2)
    text = ["data=python_stdlib", "data.pack=plain", "data.max_bytes=400000", "data.validation_rows=2"]
    values = dict(
        CHECKPOINT=str(checkpoint),
        OUTPUT=str(tmp_path / "out"),
        DATA=[*text, "data.validation_fraction=0.3", f"cache_dir={tmp_path / 'cache'}"],
        LENGTH=1024,
        STEPS=3,
        ATTENTION=["attention=dash_sink", "attention.chunk_size=16"],
        SPARSITIES=[0.5, 0.75],
        ROWS=2,
        MORE=["rows_per_batch=2", "log_every=1", "stats_every=1", "optim.warmup_steps=1", "threads=1"],
    )
    notebook = read_notebook()
    (index,) = (i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
    own = ast.parse(notebook.cells[index].source)
    assert {node.targets[0].id for node in own.body} == set(values)
    given = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    notebook.cells.insert(index + 1, nbformat.v4.new_code_cell(given))
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": FOLDER}}).execute()
    said = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    assert float(re.search(r"largest difference of 1024 tokens' logits: (\S+)", said)[1]) < 1e-3
    assert re.search(r"step +3 +loss [\d.]+ +sparsity 7\d\.\d%", said)
    assert "\x1b[2K" not in said  # bars are for terminals, whatever Jupyter says of colours
    rows = {name: read_rows(tmp_path / "out" / name / "results.jsonl") for name in ("dense", "untrained", "trained")}
    assert {name: len(found) for name, found in rows.items()} == {"dense": 3, "untrained": 6, "trained": 6}
    for row in (*rows["untrained"], *rows["trained"]):
        assert row["causal_sparsity"] == pytest.approx(row["target_sparsity"], abs=0.1)
    pictures = [output for cell in notebook.cells for output in cell.get("outputs", ()) if "image/png" in str(output)]
    assert len(pictures) == 1
    assert json.loads((tmp_path / "out/export/config.json").read_text())["attention"]["name"] == "dash"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The packages, as pip installs them."""
    source, site = (tmp_path_factory.mktemp(name) for name in ("source", "site"))
    copies = [shutil.copytree(folder, source / folder.name) for folder in EXAMPLES]  # pip builds in them
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(site))
    subprocess.run([sys.executable, "-m", "pip", "install", *options, *map(str, copies)], check=True, timeout=120)
    return site


SMALL = {
    "train.py": ["steps=6", "data.max_bytes=2000000", "threads=1"],
    "evaluate.py": ["rows=1", "threads=1"],
    "experiments.evaluation.generate": ["max_new_tokens=3", "threads=1"],
    "experiments.sweep": [
        "jobs=1",
        "studies.recall.train=['experiment=pareto_recall','logger=off','steps=2','optim.warmup_steps=1',"
        "'rows_per_batch=2','data.validation_rows=2']",
    ],
    "experiments.figures.pareto": [],
}


@pytest.mark.slow
def test_every_command_of_the_index_runs(installed, tmp_path):
    """In their order, one after the other."""
    blocks = "".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL))
    first, *commands = map(shlex.split, blocks.splitlines())
    assert first[:2] == ["pip", "install"]
    assert [word for word in first if word.startswith("examples/")] == [f"examples/{p.name}" for p in EXAMPLES]
    env = {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", "DASHATTN_CACHE": str(tmp_path / "cache")}
    for python, *words in commands:
        assert python == "python"
        what = words[1] if words[0] == "-m" else words[0]
        words = [word.replace("outputs/", f"{tmp_path}/") for word in words] + SMALL[what]
        if what == "train.py":
            words.append(f"run_dir={tmp_path}/debug-streaming")
        if what == "experiments.sweep":
            words.append(f"output_dir={tmp_path}/own")
        done = forked.run(*words, env=env)
        assert done.returncode == 0, done.stdout + done.stderr
    assert {row["task"] for row in read_rows(tmp_path / "debug-streaming/results.jsonl")} == {"loss", "latest_value"}
    assert (tmp_path / "own/pareto.png").stat().st_size > 10_000
    assert os.listdir(tmp_path / "own").count("recall-window-knob2-seed0") == 1
