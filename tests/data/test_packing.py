import contextlib
import itertools

import numpy as np
import pytest
import torch

from data.batch import IGNORE, check_placement
from data.packing import collate, cut_row, positions

EOS = 0


def random_documents(generator, count=30, longest=50):
    """Documents of distinct tokens 1, 2, ... that end with EOS; some are EOS alone."""
    lengths = generator.integers(0, longest, count)
    tokens, first = [], 1
    for length in lengths:
        tokens.append(np.append(np.arange(first, first + length), EOS))
        first += length
    return tokens


def pack(documents, seq_len):
    tokens = np.concatenate(documents)
    ends = np.cumsum([len(document) for document in documents])
    return [
        cut_row(
            tokens[start : start + seq_len + 1],
            ends[(ends > start) & (ends <= start + seq_len + 1)] - start,
            seq_len,
            EOS,
        )
        for start in range(0, len(tokens), seq_len)
    ]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("seq_len", [2, 7, 16, 1000])
def test_every_token_is_an_input_once_and_all_but_first_ones_are_targets_once(seed, seq_len):
    documents = random_documents(np.random.default_rng(seed))
    rows = pack(documents, seq_len)
    stream = np.concatenate(documents)
    inputs = np.concatenate([row.tokens for row in rows])
    assert (inputs[: len(stream)] == stream).all()
    assert (inputs[len(stream) :] == EOS).all()
    labels = np.concatenate([row.labels for row in rows])
    expected = np.concatenate([np.append(document[1:], IGNORE) for document in documents])
    assert (labels[: len(stream)] == expected).all()
    assert (labels[len(stream) :] == IGNORE).all()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("seq_len", [2, 7, 16])
def test_segments_hold_one_document_each(seed, seq_len):
    documents = random_documents(np.random.default_rng(seed))
    rows = pack(documents, seq_len)
    batch = collate(rows, "documents")
    total = len(rows) * seq_len
    assert batch.input_ids.shape == batch.labels.shape == batch.position_ids.shape == (1, total)
    boundaries = batch.cu_seqlens.tolist()
    assert boundaries[0] == 0
    assert boundaries[-1] == total
    assert set(range(0, total, seq_len)) <= set(boundaries), "a row end is a document end"
    owner = np.repeat(np.arange(len(documents)), [len(document) for document in documents])
    for start, stop in itertools.pairwise(boundaries):
        assert start < stop
        assert batch.position_ids[0, start:stop].tolist() == list(range(stop - start))
        assert len(set(owner[start:stop])) <= 1
    # ... and a document is cut nowhere but at row ends.
    document_starts = {sum(map(len, documents[:index])) for index in range(len(documents) + 1)}
    assert set(boundaries) == document_starts | set(range(0, total + 1, seq_len))
    assert batch.max_seqlen == max(stop - start for start, stop in itertools.pairwise(boundaries))


def test_plain_has_the_same_tokens_and_targets_without_boundaries():
    rows = pack(random_documents(np.random.default_rng(0)), 16)
    packed, plain = collate(rows, "documents"), collate(rows, "plain")
    assert plain.cu_seqlens is None
    assert plain.input_ids.shape == (len(rows), 16)
    assert (plain.input_ids.flatten() == packed.input_ids[0]).all()
    assert (plain.labels.flatten() == packed.labels[0]).all()
    assert (plain.position_ids == np.arange(16)).all()


def test_positions_restart():
    assert positions(np.array([0, 3, 4]), 6).tolist() == [0, 1, 2, 0, 0, 1]


@pytest.mark.parametrize("how", ["documents", "plain"])
def test_a_batch_that_is_moved_or_pinned_keeps_everything(how, monkeypatch):
    batch = collate(pack(random_documents(np.random.default_rng(0)), 16), how)
    batch.sources = ("a", "b")
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)  # which needs a GPU
    for moved in (batch.to("cpu"), batch.pin_memory()):
        for field, value in vars(batch).items():
            kept = getattr(moved, field)
            assert torch.equal(kept, value) if isinstance(value, torch.Tensor) else kept == value, field
        assert moved.num_tokens == batch.input_ids.numel()
        assert moved.num_targets == int((batch.labels >= 0).sum())
    assert batch.to("meta").labels.device.type == "meta"
    assert {tensor.dtype for tensor in (batch.input_ids, batch.labels, batch.position_ids)} == {torch.int64}


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        (("train", 1, 0, 1), None),
        (("train", 1, 3, 4, 3), None),  # of validation alone
        (("validation", 1, 1, 2, 2), None),
        (("validation", 9, 0, 1), None),
        (("test", 1, 0, 1), "split='test' is unknown; choose train or validation"),
        (("train", 0, 0, 1), "rows=0 per micro-batch; give at least 1"),
        (("train", 1, -1, 1), "rank=-1 is outside world_size=1"),
        (("train", 1, 2, 2), "rank=2 is outside world_size=2"),
        (("validation", 1, 1, 2, 1), "1 validation rows cannot be shared by 2 ranks; raise"),
    ],
)
def test_what_no_stream_can_serve(placement, message):
    with contextlib.nullcontext() if message is None else pytest.raises(ValueError, match=message):
        check_placement(*placement)
