"""Preparation: shards that are the same however they came to be, and that are not believed when damaged."""

import gzip
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from concurrent.futures.process import BrokenProcessPool
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from data import DamagedShardError, DataSourceError, build_tokenizer, files
from data import prepared as prepared_module
from data.corpora import Document, iterate_documents, split_of
from data.prepared import prepare
from data.shards import ShardWriter, TokenizedPart, read_summary
from data.tokenizer import TextTokenizer
from tests import forked


@pytest.fixture
def small_shards(monkeypatch):
    """A dozen shards of the toy corpus instead of one."""
    monkeypatch.setattr(prepared_module, "SHARD_TOKENS", 3000)
    monkeypatch.setattr(prepared_module, "TASK_DOCUMENTS", 5)


@pytest.fixture
def tokenizer(text_config, tmp_path):
    return build_tokenizer(text_config(bos_token="<s>"), tmp_path / "tokenizer")


@pytest.fixture
def make(text_config, tokenizer, tmp_path):
    """Prepares the toy corpus in the cache folder of that name; keyword arguments override the config's fields."""

    def prepare_in(cache="cache", verify=False, workers=1, **config):
        config = text_config(**config)
        return prepare(config, config, tokenizer, tmp_path / cache, verify=verify, workers=workers)

    return prepare_in


def entry(tmp_path, cache="cache"):
    (folder,) = [path for path in (tmp_path / cache / "tokens").iterdir() if path.is_dir()]
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def documents_of(part, tokenizer):
    tokens, ends = part.window(0, len(part))
    documents = [document.tolist() for document in np.split(tokens, ends[:-1])]
    assert {(document[0], document[-1]) for document in documents} == {(tokenizer.bos_id, tokenizer.eos_id)}
    return [tokenizer.decode(document[1:-1]) for document in documents]


def test_splits_hold_every_document_once_and_are_disjoint(make, text_config, tokenizer, small_shards, tmp_path):
    prepared = make()
    assert len(list(entry(tmp_path).glob("shard-*"))) > 5
    stored = {"train": prepared.training[0], "validation": prepared.validation}
    expected = {"train": [], "validation": []}
    for document in iterate_documents(text_config()):
        expected[split_of(document.text, 0.2)].append(document.text)
    for name, part in stored.items():
        assert documents_of(part, tokenizer) == expected[name]
        assert part.num_documents == len(expected[name])
        assert part.num_bytes == sum(len(text.encode()) for text in expected[name])
    assert not set(expected["train"]) & set(expected["validation"])
    covered = [read_summary(shard)["documents"] for shard in entry(tmp_path).glob("shard-*")]
    complete = json.loads((entry(tmp_path) / "complete.json").read_text())
    assert sum(covered) == complete["documents"] == sum(map(len, expected.values()))
    assert complete["tokens"] == sum(map(len, stored.values()))
    assert (complete["shards"], complete["dtype"]) == (len(covered), "uint16")


def test_a_task_is_closed_by_as_many_documents_or_characters(tokenizer, monkeypatch):
    monkeypatch.setattr(prepared_module, "TASK_DOCUMENTS", 4)
    monkeypatch.setattr(prepared_module, "TASK_CHARACTERS", 20)
    recipe = prepared_module.Recipe(tokenizer, 0.0, ("train",), (), None)
    documents = [Document("", "x" * size) for size in (9, 10, 1, 1, 1, 1, 1, 40, 5)]
    tasks = [(covered, [len(text) for _, text in task]) for covered, task in prepared_module._tasks(documents, recipe)]
    assert tasks == [(3, [9, 10, 1]), (4, [1, 1, 1, 1]), (1, [40]), (1, [5])]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_a_token_takes_the_bytes_that_the_largest_one_needs(vocab_size, dtype):
    assert prepared_module._dtype(SimpleNamespace(vocab_size=vocab_size)) == dtype


def test_windows_over_shards_are_those_of_the_whole(make, small_shards):
    part = make().training[0]
    tokens, ends = (array.copy() for array in part.window(0, len(part)))
    generator = np.random.default_rng(0)
    for start in generator.integers(0, len(part) - 1, 200):
        stop = min(start + generator.integers(1, 7000), len(part))
        window, inside = part.window(start, stop)
        assert np.array_equal(window, tokens[start:stop])
        assert np.array_equal(inside, ends[(ends > start) & (ends <= stop)] - start)


def test_length_buckets_hold_documents_of_their_length_and_none_is_lost(make, tokenizer, small_shards):
    whole = make("whole").training[0]
    buckets = make("buckets", length_buckets=[8, 200]).training
    lengths = {}
    for index, part in buckets.items():
        _, ends = part.window(0, len(part))
        lengths[index] = np.diff(ends, prepend=0)
    assert max(lengths[0]) < 8 <= min(lengths[1]) <= max(lengths[1]) < 200 <= min(lengths[2])
    found = [text for part in buckets.values() for text in documents_of(part, tokenizer)]
    assert sorted(found) == sorted(documents_of(whole, tokenizer))


def test_workers_write_what_one_process_writes(make, small_shards, monkeypatch, tmp_path):
    alone = make("alone")
    monkeypatch.setattr(prepared_module, "POOL_TASKS", 1)
    assert make("pool", workers=2).fingerprint == alone.fingerprint
    assert contents(entry(tmp_path, "pool")) == contents(entry(tmp_path, "alone"))


PREPARE = """
import json, sys, time
from pathlib import Path
from data import TextDataConfig, prepared
from data.tokenizer import TextTokenizer
from tests import forked

if __name__ == "__main__":
    config, cache, tokenizer, workers = json.loads(sys.argv[1])
    prepared.SHARD_TOKENS, prepared.TASK_DOCUMENTS = 3000, 5
    prepared.POOL_TASKS = 1
    inner = prepared._tasks
    def slow(*arguments):
        for task in inner(*arguments):
            time.sleep(0.05)
            yield task
    prepared._tasks = slow
    config = TextDataConfig(**config)
    prepared.prepare(config, config, TextTokenizer.load(tokenizer, config.eos_token), cache, workers=workers)
"""


@pytest.mark.parametrize(("workers", "kills"), [(1, 1), (2, 1), pytest.param(2, 30, marks=pytest.mark.slow)])
def test_killed_preparation_goes_on_to_the_same_bytes(
    make, text_config, tokenizer, small_shards, tmp_path, workers, kills
):
    make("whole")
    whole = contents(entry(tmp_path, "whole"))
    tokenizer.save_folder(tmp_path / "kept")
    script, cache = tmp_path / "script.py", tmp_path / "cache"
    script.write_text(PREPARE)
    arguments = [vars(text_config()), str(cache), str(tmp_path / "kept"), workers]
    randomness, ended = random.Random(workers), False
    while kills or ended:
        if ended:  # all was done before the kill
            shutil.rmtree(cache)
        shards = len(list(cache.glob("tokens/*/shard-*"))) + 1 + randomness.randrange(2)
        process = forked.Process([sys.executable, script, json.dumps(arguments)])
        try:
            deadline = time.monotonic() + 120
            while len(list(cache.glob("tokens/*/shard-*"))) < shards and process.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            time.sleep(randomness.random() * 0.3)
            workers_alive = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        finally:
            process.kill()
            process.wait()
        assert process.returncode in (0, -signal.SIGKILL)
        interrupted = contents(entry(tmp_path))
        ended = "complete.json" in interrupted
        if ended:
            continue
        kills -= 1
        assert all(whole[name] == data for name, data in interrupted.items() if name.startswith("shard-"))
        assert (workers == 2) == bool(workers_alive)
        assert not psutil.wait_procs(workers_alive, timeout=30)[1], "workers end with their parent"
    make()
    assert contents(entry(tmp_path)) == whole


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def pickled(path):
    """The right numbers, in a notation that runs code when it is read."""
    arrays = dict(np.load(path))
    np.savez(path, **arrays | {"ends": arrays["ends"].astype(object)})


DAMAGES = {
    "truncated": lambda shard: os.truncate(shard / "train-0.tokens", 100),
    "lost": shutil.rmtree,
    "summary": lambda shard: (shard / "shard.json").write_text("{"),
    "summary of another kind": lambda shard: (shard / "shard.json").write_text('{"parts": []}'),
    "token": lambda shard: flip(shard / "train-0.tokens", 2000),
    "ends": lambda shard: flip(shard / "train-0.npz", 150),
    "pickle": lambda shard: pickled(shard / "train-0.npz"),
    "two shards": lambda shard: [flip(path / "train-0.tokens", 9) for path in (shard, shard.with_name("shard-00004"))],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_found_and_made_again(make, corpus, small_shards, tmp_path, capfd, damage):
    corpus.write_text("{\n" + corpus.read_text())  # a row that is left out, once
    make()
    folder = entry(tmp_path)
    whole = contents(folder)
    DAMAGES[damage](folder / "shard-00002")

    def read():
        part = make().training[0]
        part.window(0, len(part))

    with pytest.raises(DamagedShardError, match=r"shard-00002 is damaged .*experiments\.training\.prepare"):
        read()
    make(verify=True)
    assert contents(folder) == whole
    assert damage == "lost" or "shard-00002 is damaged" in capfd.readouterr().err


def test_every_flipped_bit_is_told(tmp_path):
    """Of a small shard, one of 29; or it changes nothing, as in the date of a zip's member."""
    with ShardWriter(tmp_path, 0, np.dtype(np.uint16), 6) as writer:
        writer.add("train-0", np.arange(10) % 6, np.array([4, 6]), 7)
        writer.publish(2)
    shard, told = tmp_path / "shard-00000", Counter()

    def read():
        part = TokenizedPart([shard], "train-0", np.dtype(np.uint16), 6)
        summary = read_summary(shard)
        return *(array.tolist() for array in (*part.window(0, 10), part.target_counts)), part.num_bytes, summary

    whole = read()
    for path in sorted(shard.iterdir()):
        content = path.read_bytes()
        for bit in range(0, 8 * len(content), 29):
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            try:
                assert read() == whole
            except DamagedShardError as error:
                told[path.name] += str(error).startswith(f"{shard} is damaged ({path.stem}")
        path.write_bytes(content)
    assert told["train-0.tokens"] == 6
    assert min(told["train-0.npz"], told["shard.json"]) > 30


def test_a_file_of_another_shard_is_told(tmp_path):
    """It is whole, and of as many documents."""
    for index, lengths in enumerate(([4, 6], [4, 5])):
        with ShardWriter(tmp_path, index, np.dtype(np.uint16), 6) as writer:
            writer.add("train-0", np.arange(sum(lengths)) % 6, np.array(lengths), 7)
            writer.publish(2)
    shutil.copy(tmp_path / "shard-00001" / "train-0.npz", tmp_path / "shard-00000")
    with pytest.raises(DamagedShardError, match=r"train-0\.npz does not fit shard\.json"):
        TokenizedPart([tmp_path / "shard-00000"], "train-0", np.dtype(np.uint16), 6).window(0, 10)


def test_a_shard_of_before_there_were_checksums_is_believed(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("data.shards.sync", synced.append)
    with ShardWriter(tmp_path, 0, np.dtype(np.uint16), 6) as writer:
        writer.add("train-0", np.arange(10) % 6, np.array([4, 6]), 7)
        writer.publish(2)
    shard, written = tmp_path / "shard-00000", writer.temporary
    assert synced[-2:] == [written, tmp_path], "what is published is on the disk, and then its name"
    assert set(synced[:-2]) == {written / path.name for path in shard.iterdir()}
    summary = json.loads((shard / "shard.json").read_text())
    del summary["check"]
    (shard / "shard.json").write_text(json.dumps(summary))
    assert read_summary(shard) == summary


def test_every_block_of_a_large_shard_has_a_check(tmp_path):
    """Two whole blocks of 64 KiB, and the beginning of a third."""
    tokens = np.arange(70_000, dtype=np.int64) % 300
    with ShardWriter(tmp_path, 0, np.dtype(np.uint16), 300) as writer:
        writer.add("train-0", tokens, np.full(7, 10_000), 1)
        writer.publish(7)
    shard = tmp_path / "shard-00000"

    def part():
        return TokenizedPart([shard], "train-0", np.dtype(np.uint16), 300)

    part().verify()
    assert np.array_equal(part().window(0, 70_000)[0], tokens)
    harms = [(65_535, 0, (32_768, 70_000)), (65_536, 65_536, (0, 32_768)), (139_999, 131_072, (0, 65_536))]
    for byte, block, unharmed in harms:
        flip(shard / "train-0.tokens", byte)
        assert np.array_equal(part().window(*unharmed)[0], tokens[slice(*unharmed)])
        for read in (part().verify, lambda byte=byte: part().window(byte // 2, byte // 2 + 1)):
            with pytest.raises(DamagedShardError, match=rf"the 64 KiB at byte {block}\)"):
                read()
        flip(shard / "train-0.tokens", byte)


def test_every_token_is_counted_as_a_target_but_the_first_of_each_document(make, small_shards):
    prepared = make(length_buckets=[60])
    for part in (*prepared.training.values(), prepared.validation):
        tokens, ends = part.window(0, len(part))
        targets = Counter(token for document in np.split(tokens, ends[:-1]) for token in document[1:].tolist())
        assert part.target_counts.tolist() == [targets[token] for token in range(len(part.target_counts))]


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"shards": 3, "dtype": "text"}', '{"shards": 3, "dtype": "uint16", "check": "0"}']
)
def test_a_damaged_word_that_all_is_there_costs_nothing(make, small_shards, tmp_path, content):
    make()
    whole = contents(entry(tmp_path))
    (entry(tmp_path) / "complete.json").write_text(content)
    make()
    assert contents(entry(tmp_path)) == whole


def test_only_what_is_read_is_checked(make, small_shards, tmp_path):
    make()
    flip(entry(tmp_path) / "shard-00002" / "train-0.tokens", 2000)
    part = make().training[0]
    assert len(part.window(0, 1000)[0]) == 1000
    with pytest.raises(DamagedShardError, match=r"train-0\.tokens, the 64 KiB at byte 0"):
        part.window(len(part) // 4, len(part))


def test_preparation_ends_with_the_tokens_that_were_asked_for(text_config, tokenizer, small_shards, tmp_path):
    """At the end of a task, and of no other one if that has exactly as many."""
    config = text_config()

    def tokens(wanted):
        cache = tmp_path / f"cache{wanted}"
        found = prepare(config, config, tokenizer, cache, splits=("validation",), max_tokens=wanted, workers=1)
        complete = json.loads((entry(tmp_path, cache.name) / "complete.json").read_text())
        assert (found.training, len(found.validation)) == ({}, complete["tokens"])
        parts = [read_summary(shard)["parts"] for shard in entry(tmp_path, cache.name).glob("shard-*")]
        assert {name for part in parts for name in part} == {"validation"}
        return complete["tokens"]

    task = tokens(1)
    assert tokens(task) == task < tokens(task + 1)
    recipes = [
        prepared_module.Recipe(tokenizer, 0.2, splits, (), most).fingerprint(config, tmp_path)
        for splits, most in ((("validation",), None), (("validation",), 9), (("train", "validation"), 9))
    ]
    assert len(set(recipes)) == 3, "what is asked for decides what is found in the cache"


def test_a_source_that_dies_leaves_the_finished_shards(make, corpus, small_shards, tmp_path, monkeypatch):
    lines = corpus.read_bytes().splitlines(keepends=True)
    sources = [tmp_path / "first.jsonl.gz", tmp_path / "second.jsonl.gz"]
    for path, part in zip(sources, (lines[:150], lines[150:]), strict=True):
        path.write_bytes(gzip.compress(b"".join(part)))
    paths = [str(path) for path in sources]
    make("whole", files=paths)

    def torn(corpus, left_out):
        for index, document in enumerate(iterate_documents(corpus)):
            if index == 150:
                raise DataSourceError(f"data.files={corpus.files} cannot be read")
            yield document

    with monkeypatch.context() as patch:
        patch.setattr(prepared_module, "iterate_documents", torn)
        with pytest.raises(DataSourceError, match=r"data\.files=.*second.*cannot be read"):
            make(files=paths)
    kept = contents(entry(tmp_path))
    assert "shard-00003/shard.json" in kept
    make(files=paths)
    assert contents(entry(tmp_path)) == contents(entry(tmp_path, "whole"))
    assert kept.items() <= contents(entry(tmp_path)).items()


def test_a_corpus_that_changes_while_it_is_prepared_is_refused(make, corpus, small_shards, tmp_path, monkeypatch):
    def change_then_tokenise(*arguments):
        with corpus.open("a") as file:
            file.write('{"text": "one more"}\n')
        return tokenise(*arguments)

    tokenise = prepared_module._tokenise
    with monkeypatch.context() as patch:
        patch.setattr(prepared_module, "_tokenise", change_then_tokenise)
        with pytest.raises(ValueError, match="changed while it was prepared"):
            make()
    assert not [path for path in (tmp_path / "cache" / "tokens").iterdir() if path.is_dir()]


def test_what_was_left_out_is_told_to_all_who_read_the_tokens(make, tmp_path, corpus, capsys, monkeypatch):
    make()
    assert "left out" not in capsys.readouterr().err
    with corpus.open("a") as file:
        file.write("{\n[]\n")
    make(bad_rows=2)
    names = [f"left out: {corpus}, row {row}:" for row in (241, 242)]
    summary = f"left out: 2 rows and files in all, the first of them {corpus}, row 241: Expecting property name"
    for expected in ([*names, summary], [summary]):
        told = capsys.readouterr().err.splitlines()
        assert len(told) == len(expected)
        assert all(line.startswith(start) for line, start in zip(told, expected, strict=True))
        files.tell.cache_clear()  # as in another process, which finds the tokens
        make(bad_rows=2)
    files.tell.cache_clear()
    capsys.readouterr()
    monkeypatch.setenv("RANK", "1")  # of several, of which the first one tells it
    make(bad_rows=2)
    assert capsys.readouterr().err == ""
    with pytest.raises(DataSourceError, match=r"2 rows or files .*data\.bad_rows=1, the first of them .*, row 241"):
        make(bad_rows=1)


def test_a_worker_that_is_killed_ends_a_preparation_in_a_line(make, small_shards, monkeypatch):
    class Killed:
        def __init__(self, *_, **__):
            pass

        def submit(self, *_):
            raise BrokenProcessPool

        def shutdown(self, **_):
            pass

    monkeypatch.setattr(prepared_module, "ProcessPoolExecutor", Killed)
    monkeypatch.setattr(prepared_module, "POOL_TASKS", 1)
    with pytest.raises(ValueError, match=r"tokenises was ended from outside.* the same command goes on"):
        make(workers=2)


def test_cpus_are_those_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 7}, raising=False)
    assert prepared_module.usable_cpus() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert prepared_module.usable_cpus() == os.cpu_count()


def test_a_cache_that_cannot_be_written_is_named(make, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ValueError, match=r"cannot be written .*another cache_dir"):
        make()


def test_the_rate_of_a_preparation_is_of_what_it_added(capsys, monkeypatch):
    now = 100.0
    monkeypatch.setattr(prepared_module.time, "monotonic", lambda: now)
    progress = prepared_module._Progress("text")
    progress.start(7, 5000)  # were there before
    for tokens, seconds in ((1000, 1.0), (3000, prepared_module.PROGRESS_SECONDS)):
        now += seconds
        progress.tokens += tokens
        progress.advance(10)
    rate = 4000 / (1 + prepared_module.PROGRESS_SECONDS)
    assert capsys.readouterr().err == f"text: 27 documents, 9,000 tokens ({rate:,.0f}/s)\n"


def test_fingerprint_follows_what_decides_the_shards(make, text_config, corpus, tmp_path, monkeypatch):
    base = make().fingerprint
    same = {"seq_len": 32, "validation_rows": 3, "pack": "plain", "name": "other"}
    assert make(**same).fingerprint == base
    assert make(files=[str(shutil.copy(corpus, tmp_path / "copy.jsonl"))]).fingerprint == base
    changes = [{"validation_fraction": 0.3}, {"length_buckets": [100]}, {"max_documents": 100}, {"max_bytes": 10_000}]
    found = {make(**change).fingerprint for change in changes}
    for constant in ("FORMAT_VERSION", "SHARD_TOKENS", "TASK_DOCUMENTS", "TASK_CHARACTERS"):
        with monkeypatch.context() as patch:
            patch.setattr(prepared_module, constant, 1000)
            found.add(make().fingerprint)
    other = build_tokenizer(text_config(vocab_size=300), tmp_path / "tokenizer")
    found.add(prepare(text_config(), text_config(), other, tmp_path / "cache", workers=1).fingerprint)
    with corpus.open("a") as file:
        file.write('{"text": "one more"}\n')
    found.add(make().fingerprint)
    assert len(found | {base}) == len(changes) + 4 + 2 + 1, "all differ"


def test_the_bytes_of_shards_have_not_changed_without_a_new_version(text_config, tmp_path):
    """If this fails, raise FORMAT_VERSION, so that no run mixes shards of two kinds, and pin the new bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<|endoftext|>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.add_special_tokens(["<|endoftext|>"])
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    config = text_config(source="recall", max_documents=40, facts_max=8, files=[], length_buckets=[300])
    prepare(config, config, TextTokenizer(backend, "<|endoftext|>"), tmp_path / "cache", workers=1)
    folder = entry(tmp_path)
    hashes = {
        name: hashlib.blake2b((folder / "shard-00000" / name).read_bytes(), digest_size=4).hexdigest()
        for name in ("train-0.tokens", "train-1.tokens", "validation.tokens", "shard.json")
    }
    assert (prepared_module.FORMAT_VERSION, hashes) == (
        2,
        {
            "train-0.tokens": "406b306e",
            "train-1.tokens": "05eece25",
            "validation.tokens": "e801a8fc",
            "shard.json": "18288249",
        },
    )
