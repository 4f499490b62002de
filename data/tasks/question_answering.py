"""RULER's question answering (arXiv 2404.06654, section 3.4; template: github.com/NVIDIA/RULER): the documents of a
question among others of the same data set, from files that the user has. A question whose own documents do not fit
into the length is passed over.

qa_1: SQuAD's development set (dev-v2.0.json or dev-v1.1.json); other paragraphs of the same article come first.
qa_2: HotpotQA's development set with distractors (hotpot_dev_distractor_v1.json).
"""

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from data.tasks.material import Material
from data.tasks.sample import Draw, Form, Sample, Sized, TextTask

PROMPT = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "The following are given documents.\n\n{context}\n\nAnswer the question based on the given documents. Only give me "
    "the answer and do not output any other words.\n\nQuestion: {question}"
)
PREFIX = " Answer:"


@dataclass(frozen=True)
class Question:
    """``own`` and ``near`` are indices of documents: those it is about, and those that are added first."""

    text: str
    answers: list[str]
    own: list[int]
    near: list[int]


@functools.cache
def read_squad(path: Path) -> tuple[list[Question], list[str]]:
    """Questions and all documents. ValueError if the file is of another layout."""
    articles = _load(path, "squad")
    try:
        paragraphs = [[p["context"] for p in article["paragraphs"]] for article in articles["data"]]
        documents = sorted({text for article in paragraphs for text in article})
        index = {text: i for i, text in enumerate(documents)}
        questions = [
            Question(
                qa["question"],
                [answer["text"] for answer in qa["answers"]],
                [index[p["context"]]],
                [index[text] for text in dict.fromkeys(texts) if text != p["context"]],
            )
            for article, texts in zip(articles["data"], paragraphs, strict=True)
            for p in article["paragraphs"]
            for qa in p["qas"]
            if not qa.get("is_impossible", False)
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(f"squad={path} is not laid out as SQuAD's dev-v2.0.json: {error!r}") from None
    return questions, documents


@functools.cache
def read_hotpotqa(path: Path) -> tuple[list[Question], list[str]]:
    """Questions and all documents. ValueError if the file is of another layout."""
    entries = _load(path, "hotpotqa")
    try:
        texts = [[f"{title}\n{''.join(parts)}" for title, parts in entry["context"]] for entry in entries]
        documents = sorted({text for entry in texts for text in entry})
        index = {text: i for i, text in enumerate(documents)}
        questions = [
            Question(entry["question"], [entry["answer"]], [index[text] for text in dict.fromkeys(own)], [])
            for entry, own in zip(entries, texts, strict=True)
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"hotpotqa={path} is not laid out as HotpotQA's hotpot_dev_distractor_v1.json: {error!r}"
        ) from None
    return questions, documents


def _load(path: Path, name: str):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{name}={path} cannot be read ({error}): give the data set's JSON file") from None


READERS = {"squad": read_squad, "hotpotqa": read_hotpotqa}


def _draw(question: Question, documents: list[str], rng: Random) -> Draw:
    near = rng.sample(question.near, len(question.near))
    known = {*question.own, *question.near}
    others = rng.sample(range(len(documents)), len(documents))
    order = [*question.own, *near, *(i for i in others if i not in known)]
    child = rng.getrandbits(64)

    def make(size: int) -> Sample:
        chosen = order[:size]
        Random(f"{child}/{size}").shuffle(chosen)
        context = "\n\n".join(f"Document {i}:\n{documents[j]}" for i, j in enumerate(chosen, start=1))
        prompt = PROMPT.format(context=context, question=question.text)
        return Sample(prompt, PREFIX, question.answers, [documents[j] for j in question.own])

    return Sized(make, least=len(question.own), most=len(order))


def _task(name: str, source: str) -> TextTask:
    def draws(material: Material, seed: int) -> Iterator[Draw]:
        questions, documents = READERS[source](getattr(material, source))
        for index, question in enumerate(questions):
            yield _draw(question, documents, Random(f"{name}/{seed}/{index}"))

    return TextTask(name, "any", 32, lambda length: [Form(draws, may_skip=True)], needs=source)


QUESTION_ANSWERING = [_task("qa_1", "squad"), _task("qa_2", "hotpotqa")]
