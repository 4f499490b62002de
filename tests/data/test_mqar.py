import hashlib
import itertools
import json

import numpy as np
import pytest
import torch

from data import IGNORE, MQARDataConfig, build_data
from data.mqar import generate


def mqar_config(**overrides):
    return MQARDataConfig(**({"name": "mqar", "seq_len": 128, "pairs_min": 16, "pairs_max": 16} | overrides))


def draw(config, split="train", seed=0, first=0, count=64, length=None):
    return generate(config, seed=seed, split=split, first=first, count=count, length=length)


def pairs_of(config, row):
    """{key: value} and the pairs' positions in the first half of one sample."""
    first_value = config.num_fillers + config.num_keys
    half = row[: len(row) // 2]
    places = np.flatnonzero((half >= config.num_fillers) & (half < first_value))
    keys = half[places]
    assert len(set(keys)) == len(keys), "keys are unique in a sample"
    assert (half[places + 1] >= first_value).all()
    assert (half >= first_value).sum() == len(places), "values occur only after keys"
    return dict(zip(keys, half[places + 1], strict=True)), places


@pytest.mark.parametrize("placement", ["spread", "clustered"])
@pytest.mark.parametrize("pairs", [(1, 1), (16, 16), (32, 32), (2, 20)])
@pytest.mark.parametrize(("density", "show_answers"), [(1.0, True), (0.3, True), (1.0, False)])
def test_invariants(placement, pairs, density, show_answers):
    config = mqar_config(
        placement=placement, pairs_min=pairs[0], pairs_max=pairs[1], query_density=density, show_answers=show_answers
    )
    first_value = config.num_fillers + config.num_keys
    input_ids, labels = draw(config)
    assert input_ids.dtype == labels.dtype == np.int64
    counts = set()
    for row, label in zip(input_ids, labels, strict=True):
        answers, places = pairs_of(config, row)
        counts.add(len(answers))
        queries = np.flatnonzero(label != IGNORE)
        assert len(queries) == round(32 * density)
        assert (queries >= 64).all()
        assert (queries % 2 == 0).all()
        assert [answers[key] for key in row[queries]] == label[queries].tolist()
        if show_answers:
            assert (row[queries + 1] == label[queries]).all()
        used = np.concatenate([places, places + 1, queries, queries + 1 if show_answers else queries])
        filler = np.delete(row, used)
        assert (filler < config.num_fillers).all(), "neither keys nor values among the filler"
    assert input_ids.min() >= 0
    assert input_ids.max() < first_value + config.num_values
    assert min(counts) >= pairs[0]
    assert max(counts) <= pairs[1]
    assert (len(counts) > 5) == (pairs[0] != pairs[1])


def test_placements():
    for count in (4, 16, 32):
        config = mqar_config(pairs_min=count, pairs_max=count, placement="clustered")
        for row in draw(config)[0]:
            assert pairs_of(config, row)[1].tolist() == list(range(0, 2 * count, 2))
        config = mqar_config(pairs_min=count, pairs_max=count, placement="spread")
        places = np.array([pairs_of(config, row)[1] for row in draw(config)[0]])
        stretch = 64 // count
        assert (places // stretch == np.arange(count)).all(), "one pair in each equal stretch"
        if count < 32:
            assert len(np.unique(places[:, 0])) > 1, "and at random in it"


def test_samples_depend_on_seed_split_and_index_alone():
    config = mqar_config()
    whole = draw(config, count=20)[0]
    assert (np.concatenate([draw(config, first=i, count=1)[0] for i in range(20)]) == whole).all()
    assert len({row.tobytes() for row in whole}) == 20
    others = [draw(config, seed=1), draw(config, split="validation"), draw(config, first=64)]
    seen = {row.tobytes() for row in draw(config)[0]}
    for input_ids, _ in others:
        assert not seen & {row.tobytes() for row in input_ids}


@pytest.mark.parametrize(
    ("options", "digests"),
    [
        ({}, ("1d775c8d", "241a72c7")),
        ({"placement": "clustered", "show_answers": False, "query_density": 0.4}, ("3b3d8539", "12f88a0e")),
        ({"pairs_min": 3, "pairs_max": 20}, ("9779cf85", "d78282aa")),
    ],
    ids=str,
)
def test_samples_have_not_changed(options, digests):
    """Rows of runs are compared over years: those of a seed must have been the same."""
    for split, expected in zip(("train", "validation"), digests, strict=True):
        found = hashlib.blake2b(digest_size=4)
        for length in (128, 64):
            for array in draw(mqar_config(**options), split, seed=3, first=5, count=7, length=length):
                found.update(array.tobytes())
        assert found.hexdigest() == expected


def test_all_keys_values_and_fillers_are_drawn_evenly():
    config = mqar_config()
    input_ids, labels = draw(config, count=2000)
    counts = np.bincount(labels[labels != IGNORE], minlength=144)
    assert (counts[:80] == 0).all()
    assert counts[80:].min() > 0.8 * counts[80:].mean()
    asked = np.bincount(input_ids[labels != IGNORE], minlength=144)
    assert asked[16:80].min() > 0.8 * asked[16:80].mean()
    assert np.bincount(input_ids.flatten(), minlength=144)[:16].min() > 0


def test_curriculum_keeps_tokens_per_batch_and_scales_pairs():
    config = mqar_config(curriculum_lengths=[32, 64], curriculum_batches=[2, 3])
    stream = build_data(config, split="train", seed=0, rows=4)
    batches = list(itertools.islice(stream, 8))
    assert [tuple(batch.input_ids.shape) for batch in batches] == [(16, 32)] * 2 + [(8, 64)] * 3 + [(4, 128)] * 3
    firsts = [0, 16, 0, 8, 16, 0, 4, 8]  # none is seen twice
    for batch, first in zip(batches, firsts, strict=True):
        rows, length = batch.input_ids.shape
        input_ids, labels = draw(config, first=first, count=rows, length=length)
        assert (batch.input_ids.numpy() == input_ids).all()
        assert (batch.labels.numpy() == labels).all()
    for length in (32, 64):
        row = draw(config, length=length, count=1)[0][0]
        assert len(pairs_of(config, row)[0]) == 16 * length // 128
    validation = build_data(config, split="validation", seed=0, rows=4)
    for index, batch in enumerate(validation):
        assert (batch.input_ids.numpy() == draw(config, "validation", first=4 * index, count=4)[0]).all()
    assert index == 63


@pytest.mark.parametrize("consumed", [0, 1, 2, 4, 5, 9])
def test_resume_is_exact(consumed):
    config = mqar_config(curriculum_lengths=[32, 64], curriculum_batches=[2, 3])
    stream = build_data(config, split="train", seed=3, rows=4)
    for _ in range(consumed):
        next(stream)
    state = json.loads(json.dumps(stream.state_dict()))
    assert state.keys() == {"seq_len", "seed", "vocab_size", "batches", "samples", "batch_rows"}
    resumed = build_data(config, split="train", seed=3, rows=4)
    resumed.load_state_dict(state)
    for ours, theirs in zip(itertools.islice(stream, 6), itertools.islice(resumed, 6), strict=True):
        assert torch.equal(ours.input_ids, theirs.input_ids)
        assert torch.equal(ours.labels, theirs.labels)
    with pytest.raises(ValueError, match="seed is 4"):
        build_data(config, split="train", seed=4, rows=4).load_state_dict(state)


def test_ranks_share_the_samples_of_one_rank():
    config = mqar_config(curriculum_lengths=[64], curriculum_batches=[2], validation_rows=20)
    for split, batches in (("train", 5), ("validation", 3)):
        alone = build_data(config, split=split, seed=0, rows=8)
        ranks = [build_data(config, split=split, seed=0, rows=4, rank=r, world_size=2) for r in range(2)]
        for _ in range(batches):
            expected = next(alone)
            shares = [next(rank) for rank in ranks]
            assert torch.equal(torch.cat([share.input_ids for share in shares]), expected.input_ids)


def test_resume_with_another_number_of_ranks():
    """A curriculum counts micro-batches: it goes on only where those keep their size over all ranks."""
    config = mqar_config(curriculum_lengths=[64], curriculum_batches=[2])
    alone = build_data(config, split="train", seed=0, rows=8)
    next(alone)
    state = alone.state_dict()
    ranks = [build_data(config, split="train", seed=0, rows=4, rank=r, world_size=2) for r in range(2)]
    for rank in ranks:
        rank.load_state_dict(state)
    for _ in range(3):
        expected = next(alone)
        assert torch.equal(torch.cat([next(rank).input_ids for rank in ranks]), expected.input_ids)
    plain = [build_data(mqar_config(), split="train", seed=0, rows=rows) for rows in (8, 16)]
    next(plain[0])
    plain[1].load_state_dict(plain[0].state_dict())
    assert torch.equal(next(plain[1]).input_ids[:8], next(plain[0]).input_ids), "goes on in rows of any number"
    with pytest.raises(ValueError, match="had 8 rows over all ranks, and have 16 now"):
        build_data(config, split="train", seed=0, rows=8, world_size=2).load_state_dict(state)


def test_validation_is_finite_repeats_and_ignores_the_seed():
    config = mqar_config(validation_rows=10)
    stream = build_data(config, split="validation", seed=0, rows=4)
    first, second = list(stream), list(stream)
    other = list(build_data(config, split="validation", seed=1, rows=4))
    assert [len(batch.input_ids) for batch in first] == [4, 4, 2]
    for a, b, c in zip(first, second, other, strict=True):
        assert torch.equal(a.input_ids, b.input_ids)
        assert torch.equal(a.input_ids, c.input_ids)
    elsewhere = build_data(mqar_config(validation_seed=1), split="validation", seed=0, rows=4)
    assert not torch.equal(next(elsewhere).input_ids, first[0].input_ids)


def test_batch_layout():
    batch = next(build_data(mqar_config(), split="train", seed=0, rows=3))
    assert batch.cu_seqlens is None
    assert batch.input_ids.dtype == batch.labels.dtype == batch.position_ids.dtype == torch.int64
    assert (batch.position_ids == torch.arange(128)).all()


def test_description():
    config = mqar_config(pairs_min=2, pairs_max=20)
    described = {"task": "mqar", "seq_len": 128, "vocab_size": 16 + 64 + 64, "pairs_min": 2, "pairs_max": 20}
    for split in ("train", "validation"):
        assert build_data(config, split=split, seed=0, rows=4).describe() == described | {"split": split}
