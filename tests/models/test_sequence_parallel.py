"""Ranks that share their rows compute what one alone does."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sequence_cases import CASES, compute

from models.sequence_parallel import SequenceParallel
from tests import forked

HERE = Path(__file__).parent
QUICK = [name for name, case in CASES.items() if not case.compiled]


def run_ranks(folder, world_size, names):
    """Results of every rank, for all cases in one launch: starting costs more than computing."""
    done = forked.run(HERE / "sequence_cases.py", folder, *names, processes=world_size)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(world_size)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_ranks(tmp_path_factory.mktemp("ranks"), 3, QUICK)


def assert_as_one_alone(name, results):
    case = CASES[name]
    alone = compute(case)
    shares = [results[rank][name] for rank in range(case.size)]
    for key, expected in alone.items():
        parts = [share[key] for share in shares]
        if key == "active":
            assert all(torch.equal(part, expected) for part in parts)
        elif key == "token_losses":
            torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-5, atol=1e-5)
        else:  # the loss, and the gradients
            assert expected.abs().max() > 0, key
            # Not 0: the softmax does not see a bias of all compressed keys, whose gradient is rounding alone.
            error = (sum(parts) - expected).norm()
            assert error < 1e-5 * expected.norm() + 1e-7, f"{key}: {error} of {expected.norm()}"


@pytest.mark.parametrize("name", QUICK)
def test_ranks_that_share_a_row_compute_what_one_does(results, name):
    assert_as_one_alone(name, results)


@pytest.mark.slow
def test_compiled_ranks_do_too(tmp_path):
    (name,) = CASES.keys() - QUICK
    assert_as_one_alone(name, run_ranks(tmp_path, 2, [name]))


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (6, 1), (6, 2), (6, 6), (12, 4)])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
def test_each_rank_attends_for_the_groups_of_its_own_heads(heads, kv_heads, size):
    if heads % size:
        return
    group = heads // kv_heads
    for rank in range(size):
        share = SequenceParallel(SimpleNamespace(size=lambda: size, rank=lambda rank=rank: rank), heads, kv_heads)
        own = range(heads)[rank * heads // size : (rank + 1) * heads // size]
        groups = sorted({head // group for head in own})
        assert share.kv_heads == slice(groups[0], groups[-1] + 1)
        assert share.query_heads == slice(group * groups[0], group * (groups[-1] + 1))
        assert range(heads)[share.query_heads][share._own] == own
        assert share.kv_weights == [sum(head // group == g for head in own) / heads for g in groups]


def test_what_cannot_be_shared_is_refused():
    three = SimpleNamespace(size=lambda: 3, rank=lambda: 1)
    with pytest.raises(ValueError, match=r"num_heads=4 cannot be shared .* divisor"):
        SequenceParallel(three, num_heads=4, num_kv_heads=2)
    shared = SequenceParallel(three, num_heads=6, num_kv_heads=2)
    assert shared.part(torch.arange(12)[None]).tolist() == [[4, 5, 6, 7]]
    with pytest.raises(ValueError, match=r"13 tokens cannot be shared .* multiple"):
        shared.part(torch.arange(13)[None])
