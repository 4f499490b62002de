"""Data sets on the hub, known by their commit."""

import shutil

import datasets
import pytest

from data import corpora
from data.config import CorpusConfig
from data.corpora import corpus_fingerprint, iterate_documents
from data.files import DataSourceError
from data.hub import commit_of
from tests.fake_hub import FIRST, PATH, SECOND, FakeHub


@pytest.fixture(autouse=True)
def _nothing_is_known():
    commit_of.cache_clear()
    yield
    commit_of.cache_clear()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    return FakeHub(tmp_path, monkeypatch, {FIRST: [" one\n", None, "", "two"], SECOND: ["three"]})


def corpus(**values):
    return CorpusConfig(source="hub", path=PATH, **values)


def texts(config):
    return [document.text for document in iterate_documents(config)]


@pytest.mark.parametrize("max_documents", [None, 9])
def test_a_branch_that_moved_is_another_corpus(hub, tmp_path, max_documents):
    config = corpus(max_documents=max_documents)
    before = corpus_fingerprint(config, tmp_path)
    assert texts(config) == [" one\n", "two"]
    hub.main = SECOND
    assert (texts(config), corpus_fingerprint(config, tmp_path)) == ([" one\n", "two"], before), "not within a process"
    hub.move()
    assert texts(config) == ["three"]
    assert corpus_fingerprint(config, tmp_path) != before
    of_then = corpus(max_documents=max_documents, revision=FIRST)
    assert (texts(of_then), corpus_fingerprint(of_then, tmp_path)) == ([" one\n", "two"], before)
    assert corpus_fingerprint(corpus(max_documents=max_documents, revision="main"), tmp_path) != before


def test_a_data_set_may_not_know_its_columns_before_it_is_read(monkeypatch):
    rows = datasets.IterableDataset.from_generator(lambda: iter([{"text": "a"}]))
    assert rows.column_names is None
    monkeypatch.setattr(corpora, "open_hub", lambda corpus, streaming: rows)
    assert texts(corpus()) == ["a"]


def test_what_is_read_of_a_data_set_is_what_was_named(hub, tmp_path):
    """All of it is downloaded as usual, which later serves offline, and of a capped one only the head."""
    assert texts(corpus(config_name="en", hub_split="test")) == [" one\n", "two"]
    assert texts(corpus(max_documents=2, hub_split="test")) == [" one\n", "two"]
    assert texts(corpus(max_bytes=1)) == [" one\n"]
    assert hub.read == [("en", "test", "downloaded"), (None, "test", "streamed"), (None, "train", "streamed")]
    with pytest.raises(ValueError, match=r"data\.text_column='body' is not among the columns \['text'\]"):
        texts(corpus(text_column="body"))
    changes = ({}, {"config_name": "en"}, {"hub_split": "test"}, {"revision": SECOND}, {"text_column": "body"})
    assert len({corpus_fingerprint(corpus(**change), tmp_path) for change in changes}) == len(changes)


def test_without_a_network_it_is_the_commit_that_was_seen_last(hub, tmp_path):
    before = corpus_fingerprint(corpus(), tmp_path)
    hub.disconnect()
    assert corpus_fingerprint(corpus(), tmp_path) == before
    with pytest.raises(DataSourceError, match=r"Cannot resolve revision 'v2'.*data\.revision=COMMIT"):
        corpus_fingerprint(corpus(revision="v2"), tmp_path)


def test_without_a_network_the_copy_on_this_machine_tells_its_commit(hub, tmp_path, monkeypatch):
    """``datasets`` keeps it under the commit."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    (tmp_path / "x.jsonl").write_text('{"text": "kept"}\n')
    datasets.load_dataset("json", data_files=str(tmp_path / "x.jsonl"), cache_dir=str(tmp_path / "built"))
    (built,) = (path.parent for path in (tmp_path / "built").rglob("dataset_info.json"))
    shutil.copytree(built, tmp_path / "datasets" / "someone___waters" / "default" / "0.0.0" / SECOND)
    hub.disconnect()
    known = corpus_fingerprint(corpus(revision=SECOND), tmp_path)
    assert corpus_fingerprint(corpus(), tmp_path) == known != corpus_fingerprint(corpus(revision=FIRST), tmp_path)
    with pytest.raises(DataSourceError, match=f"at commit {SECOND}, and the hub cannot be reached for {FIRST}"):
        texts(corpus(revision=FIRST))


def test_a_directory_is_no_data_set_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone" / "waters").mkdir(parents=True)
    with pytest.raises(DataSourceError, match=r"data.path=someone/waters is a directory.*data\.source=files"):
        corpus_fingerprint(corpus(), tmp_path)
