"""What an evaluation holds at once: a chunk of logits, and as many rows as the memory allows."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import models.loss
from experiments.evaluation.config import EvaluateConfig
from experiments.evaluation.evaluate import evaluate, find_target
from experiments.evaluation.tasks import routing
from experiments.evaluation.tasks.base import SparsityTally, count, halving, in_parts, quantiles
from experiments.files import read_rows
from models import Transformer
from tests.experiments.test_host_memory import limited

NO_ROOM = "CUDA out of memory. Tried to allocate 24.00 GiB."
WHEN = ("date", "seconds")


def run(run_dir, **options):
    config = EvaluateConfig(run=str(run_dir), device="cpu", **options)
    rows = list(evaluate(config, find_target(config)))
    (run_dir / "results.jsonl").unlink()
    for path in run_dir.glob("predictions/*"):
        path.unlink()
    return [{key: value for key, value in row.items() if key not in WHEN} for row in rows]


class Logits(TorchDispatchMode):
    """The most elements of any tensor as wide as the vocabulary."""

    def __init__(self, vocab_size):
        super().__init__()
        self.vocab_size, self.numel = vocab_size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        # Not the embedding, transposed for a product.
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for x in out if isinstance(out, tuple | list) else (out,):
            is_new = isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given
            if is_new and x.ndim and x.shape[-1] == self.vocab_size:
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize(
    ("fixture", "tasks"),
    [
        ("text_run", ["loss", "position", "sparsity", "decode", "niah_single_1", "routing"]),
        ("recall_run", ["loss", "recall", "routing"]),
    ],
)
def test_no_task_holds_more_logits_than_a_chunk(request, monkeypatch, fixture, tasks):
    run_dir = request.getfixturevalue(fixture)
    options = dict(tasks=tasks, rows=4, rows_per_batch=4, probes=["niah_single_1"])
    options |= {"lengths": [600]} if fixture == "text_run" else {}
    whole = run(run_dir, **options)
    vocab_size = find_target(EvaluateConfig(run=str(run_dir), device="cpu")).train.model.vocab_size
    monkeypatch.setattr(models.loss, "CHUNK_LOGITS", 3 * vocab_size)
    monkeypatch.setattr(routing, "CHUNK_LOGITS", 1)
    with Logits(vocab_size) as seen:
        chunked = run(run_dir, **options)
    assert 3 * vocab_size <= seen.numel <= 4 * vocab_size  # a chunk, or the next token's of four prompts
    for row, expected in zip(chunked, whole, strict=True):
        assert row["task"] == expected["task"]
        if row["task"] != "decode":
            assert row["score"] == pytest.approx(expected["score"], abs=1e-5)


@pytest.mark.parametrize(
    ("fixture", "tasks"), [("text_run", ["loss", "position", "sparsity"]), ("recall_run", ["recall", "loss"])]
)
@pytest.mark.parametrize("call", [1, 2])
def test_where_memory_ends_half_the_rows_go_on_and_give_the_same(request, monkeypatch, capsys, fixture, tasks, call):
    """Also if it ends in the middle: nothing is counted twice."""
    run_dir = request.getfixturevalue(fixture)
    expected = run(run_dir, tasks=tasks, rows=6, rows_per_batch=2)
    forward, calls = Transformer.forward, []

    def failing(self, input_ids, **options):
        calls.append(len(input_ids))
        if len(calls) == call:
            raise torch.OutOfMemoryError(NO_ROOM)
        return forward(self, input_ids, **options)

    monkeypatch.setattr(Transformer, "forward", failing)
    assert run(run_dir, tasks=tasks, rows=6, rows_per_batch=4) == expected
    assert capsys.readouterr().err == "out of memory: going on with 2 rows at once\n"


def test_a_knob_is_found_with_half_the_rows(recall_run, monkeypatch, capsys):
    options = dict(tasks=["loss"], sparsities=[0.4], rows=4)
    expected = run(recall_run, rows_per_batch=2, **options)
    (recall_run / "calibrations.jsonl").unlink()
    forward = Transformer.forward

    def failing(self, input_ids, **given):
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError(NO_ROOM)
        return forward(self, input_ids, **given)

    monkeypatch.setattr(Transformer, "forward", failing)
    assert run(recall_run, rows_per_batch=4, **options) == expected
    assert capsys.readouterr().err.count("going on with 2 rows at once") == 2  # the search, and the task


def test_a_knob_is_found_on_the_same_rows_however_many_go_at_once(recall_run):
    found = []
    for rows_per_batch in (16, 5):
        run(recall_run, tasks=["loss"], sparsities=[0.4], rows=4, rows_per_batch=rows_per_batch)
        (kept,) = read_rows(recall_run / "calibrations.jsonl")
        found.append((kept["rows"], kept["knob"], kept["tried"]))
        (recall_run / "calibrations.jsonl").unlink()
    assert found[0][0] == 16
    assert found[0] == found[1]


def test_memory_that_ends_while_scores_are_added_counts_nothing_twice(recall_run, monkeypatch):
    expected = run(recall_run, tasks=["recall", "loss"], rows=6, rows_per_batch=2)
    add, calls = SparsityTally.add, []

    def failing(self, *args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise torch.OutOfMemoryError(NO_ROOM)
        return add(self, *args, **options)

    monkeypatch.setattr(SparsityTally, "add", failing)
    assert run(recall_run, tasks=["recall", "loss"], rows=6, rows_per_batch=4) == expected


def test_generation_goes_on_with_half_the_prompts(text_run, monkeypatch, capsys):
    expected = run(text_run, tasks=["niah_single_1"], lengths=[600], rows=6, rows_per_batch=2)  # all at once
    decode, calls = Transformer.decode, Counter()

    def failing(self, input_ids, *args, **options):
        calls[len(input_ids)] += 1
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError(NO_ROOM)
        return decode(self, input_ids, *args, **options)

    monkeypatch.setattr(Transformer, "decode", failing)
    assert run(text_run, tasks=["niah_single_1"], lengths=[600], rows=6, rows_per_batch=1) == expected
    assert calls[4] == 1
    assert capsys.readouterr().err == "out of memory: going on with 2 rows at once\n"


def test_memory_that_does_not_suffice_for_one_row_is_said(text_run, monkeypatch):
    def failing(self, *args, **options):
        raise torch.OutOfMemoryError(NO_ROOM)

    for name in ("hidden_states", "decode"):
        monkeypatch.setattr(Transformer, name, failing)
    for task in ("loss", "niah_single_1", "routing"):
        with pytest.raises(ValueError, match=r"24\.00 GiB\. One row at once is too much: take shorter ones"):
            run(text_run, tasks=[task], lengths=[600], rows=2, probes=["niah_single_1"])


def test_memory_of_the_host_ends_as_that_of_a_gpu_does(capsys):
    def work(rows, most):
        if rows > most:
            torch.empty(2**60, dtype=torch.uint8)  # of no machine
        return rows

    assert halving(lambda rows: work(rows, 3), 8) == (2, 2)
    assert capsys.readouterr().err.endswith("out of memory: going on with 2 rows at once\n")
    with pytest.raises(ValueError, match=r"One row at once is too much: take shorter ones .*, or free memory"):
        halving(lambda rows: work(rows, 0), 2)
    with pytest.raises(RuntimeError, match="shape"):
        halving(lambda rows: torch.ones(rows).view(3, 5), 2)


def test_an_evaluation_goes_on_with_the_rows_that_a_machine_has_memory_for(recall_run):
    asked = [f"run={recall_run}", "device=cpu", "tasks=[recall]", "rows=1024", "rows_per_batch=1024"]
    done = limited("evaluate.py", asked, mib=128)  # half of what all rows take at once, and far more than some need
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("out of memory: going on with 512 rows at once\n")


def test_parts_stay_as_small_as_memory_made_them():
    def work(part):
        if len(part) > 3:
            raise torch.OutOfMemoryError(NO_ROOM)
        return sum(part)

    assert list(in_parts(range(10), 7, work)) == [
        (range(0, 3), 3),
        (range(3, 6), 12),
        (range(6, 9), 21),
        (range(9, 10), 9),
    ]
    assert halving(lambda rows: work(range(rows)), 8) == (1, 2)
    assert list(in_parts([], 7, work)) == []


def test_quantiles_of_counts_are_those_of_the_numbers():
    numbers = torch.randint(50, (777,), generator=torch.Generator().manual_seed(0))
    counts = None
    for part in numbers.split(100):
        counts = count(part, counts)
    assert torch.equal(counts, numbers.bincount())
    ordered = numbers.sort().values.tolist()
    assert quantiles(counts) == tuple(ordered[round(share * 776)] for share in (0.1, 0.5, 0.9))
    assert quantiles(count(torch.tensor([7.0]))) == (7, 7, 7)
