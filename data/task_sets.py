"""Sets of samples by task name, fitted to a length in tokens, generated once and cached."""

import itertools
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from dashattn.plugins import Registry
from data.cache import build_once, fingerprint
from data.config import CorpusConfig, PackedDataConfig
from data.corpora import iterate_documents, split_of
from data.prompts import PromptEncoder
from data.tasks.aggregation import COMMON_WORDS, FREQUENT_WORDS
from data.tasks.json_kv import JSON_KV
from data.tasks.material import Material, all_words
from data.tasks.niah import HEAT_MAP, NIAH, NIAH_VALUES
from data.tasks.question_answering import QUESTION_ANSWERING
from data.tasks.sample import Form, Sample, TextTask, fit
from data.tasks.tracing import TRACKING

GENERATOR_VERSION = 1  # raise it when a generator gives other samples than before
SHORTEST = 512  # tokens

_RULER = [*NIAH, TRACKING, COMMON_WORDS, FREQUENT_WORDS, *QUESTION_ANSWERING]
SUITES = {"ruler": [task.name for task in _RULER], "niah_values": [task.name for task in NIAH_VALUES]}
OTHERS = ("loss", "position", "recall", "sparsity", "routing", "decode")  # that evaluate.py knows and are no text tasks


def _checked(name: str, found: object) -> TextTask:
    """What a package calls a task of this name. Raises ValueError where it is none."""
    if not isinstance(found, TextTask):
        raise ValueError(f"it must be a TextTask of data.tasks.sample; it is {found!r}")
    if found.name != name:
        raise ValueError(f"its name must be {name!r}, as the entry point is called; it is {found.name!r}")
    return found


TEXT_TASKS: Registry[TextTask] = Registry(
    "dashattn.tasks",
    {task.name: task for task in [*_RULER, HEAT_MAP, *NIAH_VALUES, JSON_KV]},
    _checked,
    reserved=(*SUITES, *OTHERS),
)


@dataclass(frozen=True)
class TaskSet:
    """Samples of one task at one length.

    Attributes:
        seed: the samples were drawn with.
        key: differs with the samples; those of the cache are found by it.
        differs: how they depart from the task's published definition; None if they do not.
    """

    task: TextTask
    length: int
    seed: int
    key: str
    differs: str | None
    samples: list[Sample]


def held_out_text(config: PackedDataConfig, num_words: int) -> Material:
    """A haystack of at least ``num_words`` words, if there are as many, from the validation documents of the corpora,
    one after another. Generated recall documents stay out: needles look like them.

    Raises:
        ValueError: there are none.
    """
    words: list[str] = []
    for corpus in haystack_corpora(config):
        for document in iterate_documents(corpus):
            if split_of(document.text, config.validation_fraction) == "validation":
                words += document.text.split()
            if len(words) >= num_words:
                break
    if not words:
        raise _no_haystack(config)
    return Material(haystack=tuple(words), haystack_name=f"held-out text of {config.name}")


def haystack_corpora(config: PackedDataConfig) -> list[CorpusConfig]:
    """Those whose held-out text a haystack may be made of. Raises ValueError if there is none."""
    found = [corpus for corpus, _ in config.parts.values() if corpus.source != "recall"]
    if not found:
        raise _no_haystack(config)
    return found


def _no_haystack(config: PackedDataConfig) -> ValueError:
    return ValueError(f"data.name={config.name} has no held-out text for a haystack: give haystack=FILE")


def check_set(name: str, length: int, *, has_material: bool) -> None:
    """Refuses a task that samples of ``length`` tokens cannot be made of.

    Raises:
        ValueError: too short a length, or nothing to make them from.
    """
    if length < SHORTEST:
        raise ValueError(f"length={length}: {name} needs at least {SHORTEST} tokens")
    if not has_material:
        raise ValueError(f"task {name} needs {TEXT_TASKS[name].needs}=FILE")


def build_set(
    name: str, encoder: PromptEncoder, *, length: int, count: int, seed: int, material: Material, cache_dir: Path
) -> TaskSet:
    """``count`` samples of a task whose prompt and answer fit into ``length`` tokens; from the cache when there.

    A package's task may make others tomorrow, and nobody would tell: it makes them each time, and they are known by
    what they are.

    Raises:
        ValueError: no such task, too short a length for it, or nothing to make it from.
    """
    task = TEXT_TASKS[name]
    check_set(name, length, has_material=material.has(task.needs))
    if name not in TEXT_TASKS.own:
        differs, samples = generate(task, encoder, length=length, count=count, seed=seed, material=material)
        key = fingerprint(
            *(name, task.match, task.max_new_tokens, length, encoder.tokenizer.fingerprint(), encoder.key),
            *(json.dumps(asdict(sample)) for sample in samples),
        )
        return TaskSet(task, length, seed, key, differs, samples)
    key = fingerprint(
        *(GENERATOR_VERSION, name, encoder.tokenizer.fingerprint(), encoder.key, length, count, seed),
        *(all_words(), material.fingerprint(task.needs)),
    )

    def build(folder: Path) -> None:
        differs, samples = generate(task, encoder, length=length, count=count, seed=seed, material=material)
        rows = [{"differs": differs, "samples": len(samples)}, *map(asdict, samples)]
        (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    folder = build_once(cache_dir / "tasks" / f"{name}-{length}-{key}", build)
    try:
        head, *rows = map(json.loads, (folder / "samples.jsonl").read_text(encoding="utf-8").split("\n")[:-1])
        if head.get("samples", len(rows)) != len(rows):
            raise ValueError(f"{len(rows)} samples of {head['samples']}")
        return TaskSet(task, length, seed, key, head["differs"], [Sample(**row) for row in rows])
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder} is damaged ({error}): remove it, and its samples are made again") from None


def generate(
    task: TextTask, encoder: PromptEncoder, *, length: int, count: int, seed: int, material: Material
) -> tuple[str | None, list[Sample]]:
    """(how the set differs from the published one, samples), in the first of the task's forms that fits."""
    budget = length - task.max_new_tokens
    for form in task.forms(length):
        samples = _fill(form, encoder, budget, count, seed, material)
        if samples is not None:
            haystack = material.haystack_name if task.needs == "haystack" else None
            differs = [form.differs, haystack and f"haystack: {haystack}"]
            return "; ".join(filter(None, differs)) or None, samples
    raise ValueError(
        f"{count} samples of {task.name} do not fit into {length} tokens with this tokenizer "
        f"({task.max_new_tokens} of them for the answer): raise lengths, or leave the task out"
    )


def _fill(
    form: Form, encoder: PromptEncoder, budget: int, count: int, seed: int, material: Material
) -> list[Sample] | None:
    def fitted() -> Iterable[Sample | None]:
        for draw in form.draws(material, seed):
            sample = fit(draw, lambda sample: len(encoder.encode(sample)), budget)
            if sample is not None or not form.may_skip:
                yield sample

    samples = []
    for sample in itertools.islice(fitted(), count):
        if sample is None:
            return None
        samples.append(sample)
    return samples if len(samples) == count else None
