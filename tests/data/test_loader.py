import contextlib
import itertools
import json
import random
import shutil
from collections import Counter

import datasets
import numpy as np
import pytest
import torch

from data import DataSourceError, TextDataConfig, build_data
from data.cache import build_once, fingerprint, from_checked_json, to_checked_json
from data.corpora import split_of
from data.prepared import unigram_cross_entropy
from tests import forked


@pytest.fixture
def make_stream(text_config, tmp_path):
    """Builds streams over the toy corpus with a shared cache; keyword arguments of the config go in ``config``."""

    def make(split="train", seed=0, rows=3, rank=0, world_size=1, **config):
        return build_data(
            text_config(**config),
            split=split,
            seed=seed,
            rows=rows,
            rank=rank,
            world_size=world_size,
            cache_dir=tmp_path / "cache",
        )

    return make


def assert_same(ours, theirs):
    assert torch.equal(ours.input_ids, theirs.input_ids)
    assert torch.equal(ours.labels, theirs.labels)
    assert torch.equal(ours.position_ids, theirs.position_ids)
    assert (ours.cu_seqlens is None) == (theirs.cu_seqlens is None)
    if ours.cu_seqlens is not None:
        assert torch.equal(ours.cu_seqlens, theirs.cu_seqlens)


def take(stream, count):
    return list(itertools.islice(stream, count))


def tokens_of(stream):
    """All tokens of a prepared stream's only component."""
    ((_, part, _),) = stream.components
    return part.window(0, len(part))[0]


def rows_of(batches, seq_len=64):
    return [tuple(row) for batch in batches for row in batch.input_ids.view(-1, seq_len).tolist()]


def test_an_epoch_reads_every_row_once_and_the_next_in_another_order(make_stream):
    stream = make_stream(rows=1)
    rows = stream.describe()["rows"]
    first, second = rows_of(take(stream, rows)), rows_of(take(stream, rows))
    assert Counter(first) == Counter(second)
    assert first != second
    assert first != rows_of(take(make_stream(rows=1, seed=1), rows))
    # An order that goes on after a resume: it is of (seed, epoch, component), and of nothing else.
    tokens = tokens_of(stream)
    orders = np.concatenate([np.random.default_rng([0, epoch, 0]).permutation(rows) for epoch in range(2)])
    expected = [tokens[64 * row : 64 * row + 64].tolist() for row in orders]
    assert all(list(row[: len(e)]) == e for row, e in zip(first + second, expected, strict=True))
    assert first == rows_of(take(make_stream(rows=1), rows))


@pytest.mark.parametrize("streaming", [False, True])
def test_every_document_begins_with_its_token_if_there_is_one(make_stream, streaming):
    for bos_token in (None, "<s>"):
        stream = make_stream(rows=30, streaming=streaming, bos_token=bos_token)
        tokens = next(stream).input_ids.flatten().tolist()
        begin, end = stream.tokenizer.backend.token_to_id("<s>"), stream.tokenizer.eos_id
        found = [index for index, token in enumerate(tokens) if token == begin]
        if bos_token is None:
            assert begin is None
            assert found == []
            continue
        # Streamed rows come in the corpus's order, prepared ones in another: a row may begin inside a document.
        ends = [index + 1 for index, token in enumerate(tokens[:-1]) if token == end and (index + 1) % 64]
        assert len(ends) > 10
        assert {index for index in found if index % 64} == set(ends)


@pytest.mark.parametrize("pack", ["documents", "plain"])
def test_batch_shapes(make_stream, pack):
    batch = next(make_stream(rows=3, pack=pack))
    if pack == "documents":
        assert batch.input_ids.shape == (1, 192)
        assert batch.cu_seqlens.dtype == torch.int32
        assert {0, 64, 128, 192} <= set(batch.cu_seqlens.tolist())
    else:
        assert batch.input_ids.shape == (3, 64)
        assert batch.cu_seqlens is None


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_ranks_partition_the_rows_of_one_rank(make_stream, split, streaming):
    config = {"streaming": streaming, "validation_rows": 12}
    alone = make_stream(split, rows=4, **config)
    ranks = [make_stream(split, rows=2, rank=rank, world_size=2, **config) for rank in range(2)]
    for _ in range(3):
        expected = rows_of([next(alone)])
        assert rows_of([next(rank) for rank in ranks]) == expected
        assert alone.state_dict() == ranks[0].state_dict() == ranks[1].state_dict()


@pytest.mark.parametrize("streaming", [False, True])
def test_another_number_of_ranks_goes_on_with_the_same_rows(make_stream, streaming):
    """Training changes from 2 ranks to 3, 1 and 4: the steps of 12 rows stay those of one rank."""
    expected = take(make_stream(rows=12, streaming=streaming), 8)
    state = None
    for step, ranks in enumerate((2, 2, 3, 3, 1, 1, 4, 4)):
        if step % 2 == 0:
            share = {"world_size": ranks, "streaming": streaming}
            streams = [make_stream(rows=12 // ranks, rank=rank, **share) for rank in range(ranks)]
            for stream in streams if state else ():
                stream.load_state_dict(json.loads(json.dumps(state)))
        assert rows_of([next(stream) for stream in streams]) == rows_of([expected[step]])
        states = [stream.state_dict() for stream in streams]
        assert all(other == states[0] for other in states)
        state = states[0]


def test_the_rows_of_an_epoch_are_shared_without_loss_or_repetition(make_stream):
    """Three ranks, an epoch that their micro-batches do not divide: what is over belongs to the next epoch."""
    ranks = [make_stream(rows=2, rank=rank, world_size=3) for rank in range(3)]
    epoch = ranks[0].describe()["rows"]
    assert epoch % 6
    rows = [row for _ in range(epoch // 6 + 1) for rank in ranks for row in rows_of([next(rank)])]
    every = Counter(rows_of(take(make_stream(rows=1, seed=5), epoch)))
    assert Counter(rows[:epoch]) == every
    assert not Counter(rows[epoch:]) - every


def test_validation_is_bounded_repeats_and_ignores_the_seed(make_stream):
    stream = make_stream("validation", rows=4, validation_rows=10)
    first = list(stream)
    assert [batch.num_tokens for batch in first] == [256, 256, 128]
    for seed in (0, 1):
        for ours, theirs in zip(first, make_stream("validation", seed, 4, validation_rows=10), strict=True):
            assert_same(ours, theirs)
    assert rows_of(list(stream)) == rows_of(first)
    shares = [list(make_stream("validation", rows=2, rank=rank, world_size=3, validation_rows=10)) for rank in range(3)]
    steps = list(zip(*shares, strict=True))
    assert [[batch.num_tokens // 64 for batch in step] for step in steps] == [[2] * 3, [1] * 3], (
        "all alike, and no more"
    )
    assert [row for step in steps for row in rows_of(step)] == rows_of(first)[:9]
    everything = make_stream("validation", rows=4, validation_rows=None)
    targets = sum(batch.num_targets for batch in everything)
    ((_, split, _),) = everything.components
    assert targets == len(split) - split.num_documents, "all tokens but each document's first"


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
def test_resume_is_exact(make_stream, streaming, world_size):
    generator = random.Random(0)
    share = {"rank": world_size - 1, "world_size": world_size, "streaming": streaming}
    stream, states, expected = make_stream(**share), [], []
    for _ in range(340):
        states.append(json.dumps(stream.state_dict()))
        expected.append(next(stream))
    for consumed in [0, 1, *(generator.randrange(2, 120) for _ in range(3)), 300]:
        state = json.loads(states[consumed])
        resumed = make_stream(**share)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        for ours, theirs in zip(expected[consumed : consumed + 40], take(resumed, 40), strict=True):
            assert_same(ours, theirs)
    assert resumed.state_dict() == stream.state_dict()
    if streaming:
        assert state["readers"][0]["epoch"] > 0, "the last state lies beyond the first epoch"


def test_a_streamed_epoch_has_the_training_tokens_in_stored_order(make_stream):
    prepared = make_stream(rows=1)
    tokens = tokens_of(prepared)
    streamed = make_stream(rows=1, streaming=True)
    rows = len(tokens) // 64
    batches = take(streamed, rows)
    assert np.array_equal(np.concatenate([batch.input_ids[0] for batch in batches]), tokens[: rows * 64])


def test_streaming_validation_is_prepared_from_the_head(make_stream, monkeypatch):
    monkeypatch.setattr("data.prepared.TASK_DOCUMENTS", 20)
    streamed = make_stream("validation", rows=2, streaming=True, validation_rows=8)
    assert len(list(streamed)) == 4
    whole, head = tokens_of(make_stream("validation", rows=2)), tokens_of(streamed)
    assert np.array_equal(head, whole[: len(head)])
    assert 8 * 64 <= len(head) < len(whole)
    assert streamed.unigram_entropy() is None


def test_a_stream_whose_source_dies_says_so_and_goes_on_after_its_last_state(make_stream, tmp_path):
    """The files lie on a disk that is gone for a while."""
    for index in range(3):
        lines = [json.dumps({"text": f"{index} {line} " + "word " * 30}) for line in range(100)]
        (tmp_path / f"part{index}.jsonl").write_text("\n".join(lines))
    config = {"files": [str(tmp_path / "part*.jsonl")], "streaming": True}
    expected = take(make_stream(**config), 60)
    stream = make_stream(**config)
    (tmp_path / "part1.jsonl").rename(tmp_path / "gone")
    batches = []
    with pytest.raises(DataSourceError, match=r"data\.files=.*cannot be read"):  # noqa: PT012
        for _ in expected:
            state = stream.state_dict()
            batches.append(next(stream))
    (tmp_path / "gone").rename(tmp_path / "part1.jsonl")
    resumed = make_stream(**config)
    resumed.load_state_dict(state)
    batches += take(resumed, 60 - len(batches))
    assert rows_of(batches) == rows_of(expected)


def test_a_file_without_a_document_does_not_end_a_stream(make_stream, corpus, tmp_path):
    """Each file is read by itself, and the corpus has documents in another."""
    (tmp_path / "a.jsonl").write_text("{\n")
    streams = [
        make_stream(streaming=True, files=files) for files in ([str(corpus)], [str(tmp_path / "a.jsonl"), str(corpus)])
    ]
    (alone, beside) = (take(stream, 20) for stream in streams)
    assert rows_of(alone) == rows_of(beside)


def test_rows_without_text_are_no_documents_of_a_stream(make_stream, monkeypatch):
    """Of a data set on the hub, say."""

    def rows(texts):
        return lambda corpus: datasets.IterableDataset.from_generator(lambda: ({"text": text} for text in texts))

    make_stream()
    streams = []
    for texts in (["one two", None, "", "three", None], ["one two", "three"]):
        monkeypatch.setattr("data.text.open_dataset", rows(texts))
        monkeypatch.setattr("data.text.split_of", lambda text, fraction: "train")
        streams.append(rows_of(take(make_stream(streaming=True), 3)))
    assert streams[0] == streams[1]


def test_a_checkpoint_of_other_data_is_refused(make_stream, corpus, tmp_path):
    shutil.copy(corpus, tmp_path / "other.jsonl")
    with (tmp_path / "other.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    make_stream().tokenizer.save(tmp_path / "tokenizer.json")
    weighted = {"length_buckets": [60], "length_weights": [1.0, 2.0]}
    for streaming in (False, True):
        # With tokens that stay as they are, though the documents are others, or come in another proportion.
        config = {"streaming": streaming, "tokenizer": str(tmp_path / "tokenizer.json")}
        state = make_stream(**config).state_dict()
        for change in ({"validation_fraction": 0.3}, {"files": [str(tmp_path / "other.jsonl")]}):
            with pytest.raises(ValueError, match=r"(stream|tokens) is '\w+', the checkpoint's '\w+'\."):
                make_stream(**config | change).load_state_dict(state)
        state = make_stream(streaming=streaming).state_dict()
        changes = [{"seq_len": 32}, {"seed": 1}, {"validation_fraction": 0.3}, {"vocab_size": 310}]
        for change in [*changes, *([] if streaming else [{"max_documents": 100}, {"streaming": True}])]:
            with pytest.raises(ValueError, match="the data differ"):
                make_stream(**{"streaming": streaming} | change).load_state_dict(state)
    with pytest.raises(ValueError, match=r"the data differ from those .*: tokens is"):
        make_stream(**weighted).load_state_dict(make_stream(length_buckets=[60]).state_dict())
    with pytest.raises(
        ValueError, match=r"differ from those .*: seq_len is 64, the checkpoint's 32; seed is 0, .* 1\. "
    ):
        make_stream().load_state_dict(make_stream(seq_len=32, seed=1).state_dict())


def test_a_state_is_what_checkpoints_hold(make_stream):
    """With other names none of those that are there could be gone on with."""
    stream = make_stream(rows=2, world_size=2)
    next(stream)
    assert stream.state_dict() == {"tokens": stream.fingerprint, "seq_len": 64, "seed": 0, "rows": 4}
    assert stream.fingerprint == stream.corpora["toy"].fingerprint, "of one corpus its own"
    streamed = make_stream(streaming=True, seed=3)
    state = streamed.state_dict()
    reader = {"epoch": 0, "dataset": None, "offset": 0}
    assert state == {"stream": streamed.fingerprint, "seq_len": 64, "seed": 3, "rows": 0, "readers": [reader]}


def test_a_run_checks_what_it_reads_and_leaves_the_rest(make_stream, tmp_path):
    make_stream()
    (tokens,) = (tmp_path / "cache" / "tokens").glob("*/shard-00000/validation.tokens")
    tokens.write_bytes(damaged := bytes([tokens.read_bytes()[0] ^ 1]) + tokens.read_bytes()[1:])
    next(make_stream())
    assert tokens.read_bytes() == damaged
    with pytest.raises(ValueError, match="shard-00000 is damaged"):
        list(make_stream("validation", validation_rows=None))


def test_unigram_entropy(make_stream):
    stream = make_stream("validation")
    ((_, training, _),) = make_stream().components
    assert training.target_counts.sum() == len(training) - training.num_documents
    assert 1 < stream.unigram_entropy() < np.log(stream.vocab_size)
    uniform = np.full(8, 1000)
    assert unigram_cross_entropy(uniform, uniform) == pytest.approx(np.log(8))


def test_describe_and_vocabulary(make_stream, corpus):
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    common = {"source": {"toy": "files"}, "shares": [1.0], "seq_len": 64, "vocab_size": 320}
    for split in ("train", "validation"):
        stream = make_stream(split, validation_rows=10)
        own = [text for text in texts if split_of(text, 0.2) == split]
        tokens = sum(len(stream.tokenizer.encode(text)) + 1 for text in own)
        assert json.loads(json.dumps(stream.describe())) == common | {
            "split": split,
            "tokens_fingerprint": stream.state_dict()["tokens"],
            "documents": len(own),
            "tokens": tokens,
            "bytes": sum(len(text.encode()) for text in own),
            "rows": 10 if split == "validation" else -(-tokens // 64),
        }
    stream = make_stream(streaming=True)
    assert stream.vocab_size == stream.tokenizer.vocab_size == 320
    described = {"split": "train", "stream_fingerprint": stream.state_dict()["stream"]}
    assert json.loads(json.dumps(stream.describe())) == common | described


PREPARE = """
import json, sys
from data import DataSourceError, TextDataConfig, build_data

config = TextDataConfig(**json.loads(sys.argv[1]))
stream = build_data(config, split="train", seed=0, rows=2, cache_dir=sys.argv[2])
print(next(stream).input_ids.sum().item(), stream.state_dict()["tokens"])
"""


def test_two_processes_may_prepare_at_once(text_config, tmp_path):
    done = forked.run("-c", PREPARE, json.dumps(vars(text_config())), tmp_path / "cache", processes=2)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == second
    for kind in ("tokens", "tokenizers"):
        assert len([path for path in (tmp_path / "cache" / kind).iterdir() if path.is_dir()]) == 1


def test_a_fingerprint_is_of_the_values_in_whatever_order_they_were_written():
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1}) != fingerprint({"a": 1, "b": [3]})
    assert from_checked_json(to_checked_json({"a": 1, "b": 2}).encode()) == {"a": 1, "b": 2}
    for text, message in (
        (b"[]", "no JSON object"),
        (b"[" * 100_000, "no JSON object"),
        (b'{"check": "0"}', "checksum"),
    ):
        with pytest.raises(ValueError, match=message):
            from_checked_json(text)


def test_build_once_leaves_nothing_half_written(tmp_path, monkeypatch):
    target = tmp_path / "result"

    def fail(folder):
        (folder / "half").write_text("written")
        raise ValueError("interrupted")

    with pytest.raises(ValueError, match="interrupted"):
        build_once(target, fail)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]

    def lose_the_race(folder):  # another process publishes first, on a file system without locks
        target.mkdir()
        (target / "theirs").touch()
        (folder / "ours").touch()

    build_once(target, lose_the_race)
    assert [path.name for path in target.iterdir()] == ["theirs"]

    class Waited(contextlib.nullcontext):  # for one that has built it meanwhile
        def __enter__(self):
            self.enter_result.with_suffix("").mkdir()

    monkeypatch.setattr("data.cache.FileLock", Waited)
    assert build_once(tmp_path / "other", fail) == tmp_path / "other"


def test_python_sources_end_to_end(tmp_path):
    config = TextDataConfig(
        name="python",
        seq_len=128,
        source="python_stdlib",
        max_documents=30,
        validation_fraction=0.3,
        tokenizer_bytes=100_000,
        vocab_size=400,
    )
    stream = build_data(config, split="validation", seed=0, rows=4, cache_dir=tmp_path)
    assert 0 < stream.unigram_entropy() < np.log(400)
    assert next(iter(stream)).input_ids.max() < 400


def test_bad_requests_are_named(make_stream, text_config, tmp_path):
    with pytest.raises(ValueError, match="choose train or validation"):
        make_stream("test")
    with pytest.raises(ValueError, match="outside world_size"):
        make_stream(rank=2, world_size=2)
    with pytest.raises(ValueError, match="cache_dir"):
        build_data(text_config(), split="train", seed=0, rows=1)
    with pytest.raises(ValueError, match=r"raise data\.validation_rows"):
        make_stream("validation", world_size=4, validation_rows=3)
    with pytest.raises(ValueError, match="no validation document"):
        make_stream(validation_fraction=1e-9)
    (tmp_path / "one.txt").write_text("a single document")
    with pytest.raises(ValueError, match="corpus toy has no training document; check its files"):
        make_stream(files=[str(tmp_path / "one.txt")], validation_fraction=0.999999)
