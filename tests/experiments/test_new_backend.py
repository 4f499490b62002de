"""A backend that nothing here has heard of, added to a copy of the code as the README says, goes the whole way."""

import ast
import csv
import json
from types import SimpleNamespace

import pytest

from dashattn.backends import BACKENDS
from experiments import signals
from experiments.files import ROOT
from experiments.provenance import snapshot
from experiments.sweep import run_cell as sweep
from experiments.sweep.cells import read_plan
from tests import forked
from tests.experiments.conftest import TINY

BACKEND = '''
from dataclasses import dataclass
from typing import ClassVar

import torch

from dashattn.backends.base import ALL_HEADS, AttentionBackend, Capabilities
from dashattn.backends.options import AttentionConfig
from dashattn.fields import Line, PositiveInt
from dashattn.ops.block_sparse.reference import block_sparse_attention
from dashattn.selection import Selection
from dashattn.stats import selection_stats


@dataclass
class LastBlocksConfig(AttentionConfig):
    name: Line = "last_blocks"
    piece_size: PositiveInt = 16
    pieces: PositiveInt = 2

    knob: ClassVar[str | None] = "pieces"
    blocks: ClassVar[str | None] = "piece_size"


class LastBlocksBackend(AttentionBackend):
    """The token's own block and those just before it, ``pieces`` in all."""

    capabilities = Capabilities(packed=False, decode=False)

    def forward(self, q, k, v, *, hidden=None, rope=None, cu_seqlens=None, return_stats=False, share=ALL_HEADS):
        size = self.config.piece_size
        token = torch.arange(q.shape[1], device=q.device) // size
        block = torch.arange(-(-q.shape[1] // size), device=q.device)
        mask_TN = (block <= token[:, None]) & (block > token[:, None] - self.config.pieces)
        selection = Selection.from_mask(mask_TN[None, :, None].expand(q.shape[0], -1, k.shape[2], -1), size)
        out = block_sparse_attention(q, k, v, selection)
        reads = torch.zeros(q.shape[:2], dtype=torch.int32, device=q.device)
        return (out, selection_stats(selection, reads, cu_seqlens)) if return_stats else out
'''
SWEEP = """# @package _global_
name: toy
studies:
  text:
    train: [{train}, data.pack=plain]
    evaluate: ["tasks=[loss,position]"]
    arms:
      mine:
        train: [attention=a_file_of_mine]
        trained_knobs: [2]
        knobs: [1, 4]
"""


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    """A copy of the code with the backend: its module, its line in the registry, its file of values."""
    code = snapshot(tmp_path_factory.mktemp("code"))
    (code / "dashattn/backends/last_blocks.py").write_text(BACKEND)
    registry = code / "dashattn/backends/__init__.py"
    text = registry.read_text()
    head = "from dashattn.backends.nsa import"
    line = '    "full": (FullConfig, FullBackend),\n'
    assert text.count(head) == text.count(line) == 1  # of _OWN
    text = text.replace(head, f"from dashattn.backends.last_blocks import LastBlocksBackend, LastBlocksConfig\n{head}")
    registry.write_text(text.replace(line, f'{line}    "last_blocks": (LastBlocksConfig, LastBlocksBackend),\n'))
    (code / "configs/attention/a_file_of_mine.yaml").write_text("defaults: [last_blocks_schema, _self_]\n")
    return code


PLAN = """
import sys
from pathlib import Path

from hydra import compose, initialize_config_dir

from experiments.files import CONFIGS
from experiments.schema import to_config
from experiments.sweep.cells import cells, register_sweep_config, write_plan

register_sweep_config()
with initialize_config_dir(CONFIGS, version_base="1.3"):
    config = to_config(compose("sweep", sys.argv[1:]))
    write_plan(Path(config.output_dir), cells(config))
"""


def run(code, *arguments):
    done = forked.run(*arguments, cwd=code, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_is_trained_evaluated_and_drawn(code, cache_dir, tmp_path, monkeypatch):
    """A sweep plans its cell in the copy, and runs it from there."""
    train = ", ".join(TINY)
    (code / "configs/sweep/toy.yaml").write_text(SWEEP.format(train=f"{train}, cache_dir={cache_dir}"))
    run(code, "-c", PLAN, "sweep=toy", f"output_dir={tmp_path}")
    (cell,) = read_plan(tmp_path)
    assert "attention.pieces=2" in cell.train
    monkeypatch.setattr(signals, "subprocess", SimpleNamespace(Popen=forked.Process))
    monkeypatch.setattr(sweep, "ROOT", code)
    outcome = sweep.run_cell(cell, tmp_path / "logs", signals.Children())
    assert outcome.status == "done", outcome.message
    (path,) = tmp_path.glob("*/results.jsonl")
    rows = [json.loads(line) for line in path.open()]
    sparsity = {row["knob"]: row["causal_sparsity"] for row in rows if row["task"] == "loss"}
    # Rows of 64 tokens in 4 blocks of 16: all, and the own one only.
    assert sparsity[4] == 0
    assert sparsity[1] == pytest.approx(1 - 4 * sum(range(1, 17)) / sum(range(1, 65)))
    assert {(row["backend"], row["knob_name"], row["trained_knob"]) for row in rows} == {("last_blocks", "pieces", 2)}
    run(code, "-m", "experiments.figures", str(tmp_path / "figures"), str(tmp_path))
    tables = [list(csv.DictReader(file.open())) for file in (tmp_path / "figures").glob("*.csv")]
    assert {row["label"] for table in tables for row in table if "label" in row} == {"mine"}


def test_its_numerics_are_measured(code, tmp_path):
    """The registry is all that the benchmarks know, too."""
    run(code, "-m", "experiments.speed.numerics", str(tmp_path), "100")
    rows = [json.loads(line) for line in (tmp_path / "numerics.jsonl").open()]
    assert {row["tensor"] for row in rows if row["backend"] == "last_blocks"} == {"out", "dq", "dk", "dv"}
    timed = "from experiments.speed.methods import BACKENDS; print(*(m.stage for m in BACKENDS['last_blocks']))"
    assert run(code, "-c", timed) == "whole\n"


def test_what_stands_above_the_attention_library_asks_for_no_backend_by_name():
    """But for dense attention, the control."""
    names, found = set(BACKENDS.own) - {"full"}, []
    paths = [path for folder in ("data", "experiments", "models", "slurm") for path in (ROOT / folder).rglob("*.py")]
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                compared = {x.value for x in ast.walk(node) if isinstance(x, ast.Constant)}
                found += [f"{path}:{node.lineno} {name}" for name in names & compared]
    assert found == []
