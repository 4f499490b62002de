"""A corpus tokenised once and kept on disk, so that all runs of a sweep read the same tokens.

    CACHE/tokens/KEY/shard-00000/ ...   see data/shards.py
    CACHE/tokens/KEY/complete.json      there when all shards are: their number, the dtype, documents and tokens

One process reads the documents in order; worker processes tokenise stretches of them; shards are written in order.
What is in a shard depends on the corpus and the tokenizer alone, so that a preparation that was killed goes on after
its last shard, and one with a shard missing makes that one again, to the same bytes in both cases.
"""

import bisect
import collections
import contextlib
import itertools
import multiprocessing
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock
from tokenizers import Tokenizer

from data.cache import fingerprint, from_checked_json, to_checked_json
from data.config import CorpusConfig, PackedDataConfig
from data.corpora import Document, corpus_fingerprint, iterate_documents, split_of
from data.files import LeftOut, check_bad_rows, tell
from data.shards import DamagedShardError, ShardWriter, TokenizedPart, read_summary, shard_name, sync
from data.tokenizer import TextTokenizer

FORMAT_VERSION = 2  # raise it when the files or the tokens in them change
COMPLETE = "complete.json"
SHARD_TOKENS = 2**27  # a shard is closed with the task that brings it here: what a kill loses at most
TASK_DOCUMENTS, TASK_CHARACTERS = 256, 2**20  # a task for a worker is closed by the document that brings it here
POOL_TASKS = 32  # a corpus of fewer tasks is not worth the start of workers
PROGRESS_SECONDS = 30
VALIDATION = "validation"


@dataclass(frozen=True)
class Recipe:
    """What decides the tokens of a cache entry, given its corpus."""

    tokenizer: TextTokenizer
    validation_fraction: float
    splits: tuple[str, ...]
    length_buckets: tuple[int, ...]
    max_tokens: int | None

    def training_parts(self) -> list[str]:
        """Names of the training split's length buckets; none if it is not asked for."""
        return [f"train-{bucket}" for bucket in range(len(self.length_buckets) + 1)] if "train" in self.splits else []

    def parts(self) -> list[str]:
        """Names of what a shard may hold."""
        return [*self.training_parts(), VALIDATION]

    def fingerprint(self, corpus: CorpusConfig, cache_dir: str | Path) -> str:
        return fingerprint(
            *(FORMAT_VERSION, SHARD_TOKENS, TASK_DOCUMENTS, TASK_CHARACTERS, corpus_fingerprint(corpus, cache_dir)),
            *(self.tokenizer.fingerprint(), self.validation_fraction, self.splits, self.length_buckets),
            self.max_tokens,
        )


@dataclass(frozen=True)
class PreparedCorpus:
    fingerprint: str
    training: dict[int, TokenizedPart]  # the length buckets that hold documents
    validation: TokenizedPart


def prepare(
    corpus: CorpusConfig,
    config: PackedDataConfig,
    tokenizer: TextTokenizer,
    cache_dir: str | Path,
    *,
    splits: tuple[str, ...] = ("train", VALIDATION),
    max_tokens: int | None = None,
    workers: int | None = None,
    verify: bool = False,
) -> PreparedCorpus:
    """Tokenise ``splits`` of the corpus, or find them in the cache. Many processes may ask for it at once.

    Args:
        max_tokens: stop once the splits hold as many.
        workers: processes that tokenise, None = one for each CPU this process may use.
        verify: check every byte of what is in the cache, and make damaged shards again.

    Raises:
        ValueError: a split has no document, or the cache cannot be written.
        DataSourceError: the corpus cannot be read to its end.
        DamagedShardError: a shard is cut short, or lost.
    """
    buckets = tuple(config.length_buckets) if "train" in splits else ()
    recipe = Recipe(tokenizer, config.validation_fraction, splits, buckets, max_tokens)
    key = recipe.fingerprint(corpus, cache_dir)
    folder = Path(cache_dir) / "tokens" / key
    if verify or _read_complete(folder) is None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_name(key + ".lock")):
                if verify:
                    _remove_damaged(folder, recipe)
                if _read_complete(folder) is None:
                    _write_shards(folder, corpus, recipe, workers or usable_cpus())
        except OSError as error:
            raise ValueError(
                f"{folder} cannot be written ({error}): make room, or choose another cache_dir; finished shards stay, "
                "and the same command goes on after them"
            ) from error
    _check_left_out(_read_complete(folder), corpus)
    parts = _load(folder, recipe)
    training = {index: parts[name] for index, name in enumerate(recipe.training_parts()) if len(parts[name])}
    for split, found in (("train", training), (VALIDATION, len(parts[VALIDATION]))):
        if split in splits and not found:
            raise ValueError(
                f"the corpus has no {split} document; take more of it, change "
                f"data.validation_fraction={config.validation_fraction}, or make more documents of large text files "
                f"(data.document_separator={corpus.document_separator!r} with one that they have, or a smaller "
                f"data.document_bytes={corpus.document_bytes})"
            )
    return PreparedCorpus(key, training, parts[VALIDATION])


def usable_cpus() -> int:
    """CPUs that this process may use: fewer than there are under Slurm or taskset."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _read_complete(folder: Path) -> dict | None:
    """What complete.json holds; None without it, or if it is damaged: then the shards are looked at again."""
    try:
        complete = from_checked_json((folder / COMPLETE).read_bytes())
        told = {"left_out": int(complete.get("left_out", 0)), "first_left_out": str(complete.get("first_left_out"))}
        return {"shards": int(complete["shards"]), "dtype": np.dtype(complete["dtype"]).name, **told}
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, KeyError):
        return None


def _check_left_out(complete: dict, corpus: CorpusConfig) -> None:
    """Tells what was left out when the corpus was prepared, by whomever. Raises DataSourceError if that is too much."""
    if complete["left_out"]:
        which = f"the first of them {complete['first_left_out']}"
        check_bad_rows(complete["left_out"], which, corpus)
        if os.environ.get("RANK", "0") == "0":
            tell(f"left out: {complete['left_out']} rows and files in all, {which}")


def _load(folder: Path, recipe: Recipe) -> dict[str, TokenizedPart]:
    complete = _read_complete(folder)
    shards = [folder / shard_name(index) for index in range(complete["shards"])]
    dtype, vocab_size = np.dtype(complete["dtype"]), recipe.tokenizer.vocab_size
    return {name: TokenizedPart(shards, name, dtype, vocab_size) for name in recipe.parts()}


def _remove_damaged(folder: Path, recipe: Recipe) -> None:
    """Remove shards that are not what was written, and the word that the entry is complete."""
    dtype = _dtype(recipe.tokenizer)
    for shard in sorted(folder.glob("shard-*")):
        try:
            for name in recipe.parts():
                TokenizedPart([shard], name, dtype, recipe.tokenizer.vocab_size).verify()
        except DamagedShardError as error:
            print(f"{shard} is damaged ({error.problem}): it is made again", file=sys.stderr)
            (folder / COMPLETE).unlink(missing_ok=True)
            shutil.rmtree(shard)
    complete = _read_complete(folder)
    if complete and not all((folder / shard_name(index)).exists() for index in range(complete["shards"])):
        (folder / COMPLETE).unlink()


def _dtype(tokenizer: TextTokenizer) -> np.dtype:
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)


# A task is how many documents of the corpus it covers, and those of them that are wanted, as (split, text).
Task = tuple[int, list[tuple[str, str]]]
# Its result: that number, and for each part the documents' tokens, lengths and UTF-8 bytes.
Result = tuple[int, dict[str, tuple[np.ndarray, np.ndarray, int]]]


def _write_shards(folder: Path, corpus: CorpusConfig, recipe: Recipe, workers: int) -> None:
    """Make the shards that are missing, then the file that says that none is."""
    progress, left_out = _Progress(folder), LeftOut(corpus)
    finished = False
    while not finished:
        shards = list(itertools.takewhile(Path.exists, (folder / shard_name(index) for index in itertools.count())))
        summaries = [read_summary(shard) for shard in shards]
        documents = sum(summary["documents"] for summary in summaries)
        tokens = sum(part["tokens"] for summary in summaries for part in summary["parts"].values())
        progress.start(documents, tokens)
        finished = recipe.max_tokens is not None and tokens >= recipe.max_tokens
        if not finished:
            left_out = LeftOut(corpus)  # what comes before the rest is read again
            rest = itertools.islice(iterate_documents(corpus, left_out), documents, None)
            with contextlib.closing(_tokenised(_tasks(rest, recipe), recipe, workers)) as results:
                finished = _write_run(folder, len(shards), results, recipe, progress)
    if recipe.fingerprint(corpus, folder.parents[1]) != folder.name:
        shutil.rmtree(folder)
        raise ValueError("the corpus changed while it was prepared: start again when it stays as it is")
    complete = {"shards": len(list(folder.glob("shard-*"))), "dtype": _dtype(recipe.tokenizer).name}
    for leftover in folder.glob(".shard-*"):  # of processes that were killed
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = folder / f".{COMPLETE}"
    complete |= {"documents": progress.documents, "tokens": progress.tokens}
    if left_out.count:
        complete |= {"left_out": left_out.count, "first_left_out": left_out.first}
    temporary.write_text(to_checked_json(complete))
    sync(temporary)
    os.replace(temporary, folder / COMPLETE)


def _write_run(folder: Path, index: int, results: Iterator[Result], recipe: Recipe, progress: "_Progress") -> bool:
    """Write shards from ``index`` on, up to one that exists. Returns whether the results ended, or suffice."""
    ended = False
    while not ended and not (folder / shard_name(index)).exists():
        covered = 0
        with ShardWriter(folder, index, _dtype(recipe.tokenizer), recipe.tokenizer.vocab_size) as shard:
            while shard.tokens < SHARD_TOKENS and not ended:
                documents, parts = next(results, (0, None))
                for name, (tokens, lengths, num_bytes) in (parts or {}).items():
                    shard.add(name, tokens, lengths, num_bytes)
                    progress.tokens += len(tokens)
                covered += documents
                progress.advance(documents)
                ended = parts is None or (recipe.max_tokens is not None and progress.tokens >= recipe.max_tokens)
            if shard.tokens:
                shard.publish(covered)
        index += 1
    return ended


def _tasks(documents: Iterable[Document], recipe: Recipe) -> Iterator[Task]:
    covered, task, size = 0, [], 0
    for document in documents:
        covered += 1
        split = split_of(document.text, recipe.validation_fraction)
        if split in recipe.splits:
            task.append((split, document.text))
            size += len(document.text)
        if len(task) == TASK_DOCUMENTS or size >= TASK_CHARACTERS:
            yield covered, task
            covered, task, size = 0, [], 0
    if covered:
        yield covered, task


def _tokenised(tasks: Iterator[Task], recipe: Recipe, workers: int) -> Iterator[Result]:
    """The results of the tasks, in their order; a few tasks a worker are read ahead."""
    head = list(itertools.islice(tasks, POOL_TASKS)) if workers > 1 else []
    tasks = itertools.chain(head, tasks)
    if len(head) < POOL_TASKS:
        for covered, task in tasks:
            yield covered, _tokenise(recipe.tokenizer, recipe.length_buckets, task)
        return
    # Not by fork: this process may have threads, and a GPU.
    context = multiprocessing.get_context("spawn")
    tokenizer = recipe.tokenizer
    start = (tokenizer.backend.to_str(), tokenizer.eos_token, tokenizer.bos_token, recipe.length_buckets)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=start)
    waiting: collections.deque[tuple[int, Future]] = collections.deque()
    try:
        for covered, task in tasks:
            waiting.append((covered, pool.submit(_work, task)))
            if len(waiting) > 2 * workers:
                covered, future = waiting.popleft()
                yield covered, future.result()
        for covered, future in waiting:
            yield covered, future.result()
    except BrokenProcessPool as error:
        raise ValueError(
            "a process that tokenises was ended from outside, as where memory is short: free some; finished shards "
            "stay, and the same command goes on after them"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(tokenizer: str, eos_token: str, bos_token: str | None, buckets: tuple[int, ...]) -> None:
    global _work_with
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _work_with = (TextTokenizer(Tokenizer.from_str(tokenizer), eos_token, bos_token=bos_token), buckets)
    # A worker waits for tasks for ever, also when the process that gave them was killed.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(task: list[tuple[str, str]]) -> dict[str, tuple[np.ndarray, np.ndarray, int]]:
    return _tokenise(*_work_with, task)


def _tokenise(
    tokenizer: TextTokenizer, buckets: tuple[int, ...], task: list[tuple[str, str]]
) -> dict[str, tuple[np.ndarray, np.ndarray, int]]:
    parts: dict[str, list[tuple[list[int], int]]] = {}
    for (split, text), ids in zip(task, tokenizer.encode_documents([text for _, text in task]), strict=True):
        name = f"train-{bisect.bisect_right(buckets, len(ids))}" if split == "train" else split
        parts.setdefault(name, []).append((ids, len(text.encode())))
    return {
        name: (
            np.fromiter(itertools.chain.from_iterable(ids for ids, _ in documents), _dtype(tokenizer)),
            np.array([len(ids) for ids, _ in documents]),
            sum(num_bytes for _, num_bytes in documents),
        )
        for name, documents in parts.items()
    }


class _Progress:
    """Says on stderr, now and then, how far a preparation is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def start(self, documents: int, tokens: int) -> None:
        self.documents, self.tokens, self.before = documents, tokens, tokens
        self.started = self.said = time.monotonic()

    def advance(self, documents: int) -> None:
        self.documents += documents
        now = time.monotonic()
        if now - self.said >= PROGRESS_SECONDS:
            self.said = now
            rate = (self.tokens - self.before) / (now - self.started)
            print(
                f"{self.folder}: {self.documents:,} documents, {self.tokens:,} tokens ({rate:,.0f}/s)",
                file=sys.stderr,
                flush=True,
            )


def unigram_cross_entropy(train_counts: np.ndarray, validation_counts: np.ndarray) -> float:
    """Nats per validation target under the training targets' unigram distribution, add-one smoothed."""
    log_probabilities = np.log((train_counts + 1) / (train_counts.sum() + len(train_counts)))
    return float(-(validation_counts * log_probabilities).sum() / validation_counts.sum())
