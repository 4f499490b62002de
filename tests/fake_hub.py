"""A Hugging Face hub of one data set, whose branch moves; nothing goes over a network."""

from types import SimpleNamespace

import datasets
import huggingface_hub
from huggingface_hub.errors import OfflineModeIsEnabled

from data.hub import commit_of

PATH = "someone/waters"
FIRST, SECOND = "a" * 40, "b" * 40


class FakeHub:
    """Attributes:
    main: commit of the branch.
    texts: documents by commit.
    is_online: whether it can be reached.
    read: what was asked for, as (configuration, split, "downloaded" or "streamed").
    """

    def __init__(self, tmp_path, monkeypatch, texts):
        self.main, self.texts, self.is_online, self.read = FIRST, texts, True, []
        self.load, self.monkeypatch = datasets.load_dataset_builder, monkeypatch
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda api, *_, **asked: self._info(**asked))
        monkeypatch.setattr(datasets, "load_dataset_builder", self._builder)
        commit_of.cache_clear()

    def move(self):
        """The branch moves, and another process looks at it."""
        self.main = SECOND
        commit_of.cache_clear()

    def disconnect(self):
        self.is_online = False
        self.monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)  # nothing is tried again and again
        commit_of.cache_clear()

    def _info(self, repo_type=None, revision=None, **_):
        assert repo_type == "dataset"
        if not self.is_online:
            raise OfflineModeIsEnabled("no network")
        return SimpleNamespace(sha=self.main if revision in (None, "main") else revision)

    def _builder(self, path, config_name=None, revision=None):
        assert path == PATH
        if not self.is_online:
            return self.load(path, config_name)
        data = datasets.Dataset.from_dict({"text": self.texts[revision]})
        streamed = data.to_iterable_dataset()
        return SimpleNamespace(
            hash=revision,
            download_and_prepare=lambda: None,
            as_dataset=lambda split: self.read.append((config_name, split, "downloaded")) or data,
            as_streaming_dataset=lambda split: self.read.append((config_name, split, "streamed")) or streamed,
        )
