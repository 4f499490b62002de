"""Data sets on the Hugging Face hub, which are known by the commit that is read: a branch moves."""

import functools
import os
from collections.abc import Mapping
from dataclasses import replace

from data.config import CorpusConfig, DataConfig, MixtureDataConfig, PackedDataConfig
from data.files import DataSourceError


@functools.cache
def commit_of(path: str, config_name: str | None, revision: str | None) -> str:
    """The commit of a branch or tag, None = the main branch; a process takes it to stay.

    Where the hub cannot be reached it is the one that was seen there last, else that of the copy which ``datasets``
    keeps on this machine.

    Raises:
        DataSourceError: there is none of these, or ``path`` is a directory.
        Exception: of the hub's kinds: there is no such data set or revision, or no right to it.
    """
    from huggingface_hub import resolve_revision
    from huggingface_hub.errors import RevisionResolutionError

    if os.path.isdir(path):
        raise DataSourceError(
            f"data.path={path} is a directory, which would be read in place of a data set on the hub: name its files, "
            f"data.source=files 'data.files=[{path}/**/*.parquet]'"
        )
    try:
        return resolve_revision(path, repo_type="dataset", revision=revision).resolved
    except RevisionResolutionError as error:
        try:
            return _builder(path, config_name, revision).hash
        except Exception:  # of many kinds, which say less than the first one
            raise DataSourceError(
                f"data.path={path!r}: {error} Go online once, or name the commit, data.revision=COMMIT; config.yaml of "
                "a run has it"
            ) from None


def open_hub(corpus: CorpusConfig, *, streaming: bool):
    """The data set at its commit, as ``datasets`` has it.

    Raises:
        DataSourceError: the hub cannot be reached, and the copy on this machine is of another commit.
    """
    commit = commit_of(corpus.path, corpus.config_name, corpus.revision)
    builder = _builder(corpus.path, corpus.config_name, commit)
    if builder.hash != commit:
        raise DataSourceError(
            f"data.path={corpus.path!r} is on this machine at commit {builder.hash}, and the hub cannot be reached for "
            f"{commit}: go online, or set data.revision={builder.hash}"
        )
    if streaming:
        return builder.as_streaming_dataset(split=corpus.hub_split)
    builder.download_and_prepare()
    return builder.as_dataset(split=corpus.hub_split)


def pinned(data: DataConfig, began: Mapping[str, str | None]) -> DataConfig:
    """``data`` with the commits of what they read from the hub.

    Args:
        began: of a run that began before, by the names of its corpora: its own where no revision is named now.
    """

    def pin(name: str, corpus: CorpusConfig) -> CorpusConfig:
        if corpus.source != "hub":
            return corpus
        revision = began.get(name) if corpus.revision is None else corpus.revision
        return replace(corpus, revision=commit_of(corpus.path, corpus.config_name, revision))

    if isinstance(data, MixtureDataConfig):
        return replace(data, corpora={name: pin(name, corpus) for name, corpus in data.corpora.items()})
    return pin(data.name, data) if isinstance(data, PackedDataConfig) else data


def _builder(path: str, config_name: str | None, revision: str | None):
    """Its ``hash`` is the commit."""
    import datasets  # takes seconds

    return datasets.load_dataset_builder(path, config_name, revision=revision)
