"""A text task: samples that are a prompt, the beginning of its answer, and what the answer must contain."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Protocol

from data.tasks.material import Material


@dataclass(frozen=True)
class Sample:
    """One question.

    Attributes:
        prompt: what the user's turn says.
        answer_prefix: the beginning of the answer, which the model continues.
        references: what a right answer contains.
        evidence: the parts of ``prompt`` that hold the answer, each found there once; empty where all of it does.
        depth: where the only piece of evidence stands in the context, 0 (its beginning) to 1; None for several.
    """

    prompt: str
    answer_prefix: str
    references: list[str]
    evidence: list[str] = field(default_factory=list)
    depth: float | None = None

    def score(self, prediction: str, match: str) -> float:
        """Share of the references that occur in ``prediction``, letters of either case alike; with match "any": 1.0
        when one does."""
        found = [reference.lower() in prediction.lower() for reference in self.references]
        return float(any(found)) if match == "any" else sum(found) / len(found)


class Draw(Protocol):
    """One sample that waits for its size: all random choices but those of the haystack's size are made."""

    least: int
    most: int | None  # None: no bound

    def __call__(self, size: int) -> Sample: ...


@dataclass(frozen=True)
class Sized:
    """A ``Draw`` from a function."""

    make: Callable[[int], Sample]
    least: int = 0
    most: int | None = None

    def __call__(self, size: int) -> Sample:
        return self.make(size)


@dataclass(frozen=True)
class Form:
    """One way of posing a task.

    Attributes:
        draws: samples of a seed, one after another.
        differs: how it departs from the task's published definition; None if it does not.
        may_skip: a sample that does not fit into the length makes way for the next, instead of ruling the form out.
    """

    draws: Callable[[Material, int], Iterator[Draw]]
    differs: str | None = None
    may_skip: bool = False


@dataclass(frozen=True)
class TextTask:
    """A task by name.

    Attributes:
        match: all | any, see ``Sample.score``.
        max_new_tokens: of the answer; the prompt leaves room for them within the length.
        forms: for a length, the ways to pose it, the published one first; the first that fits is taken.
        needs: haystack | squad | hotpotqa | None, what it reads of the material.
    """

    name: str
    match: str
    max_new_tokens: int
    forms: Callable[[int], Sequence[Form]]
    needs: str | None = None


def each_sample(name: str, make: Callable[[Material, Random], Draw]) -> Callable[[Material, int], Iterator[Draw]]:
    """An endless ``Form.draws`` in which every sample has a random generator, and so permutations, of its own."""

    def draws(material: Material, seed: int) -> Iterator[Draw]:
        index = 0
        while True:
            yield make(material, Random(f"{name}/{seed}/{index}"))
            index += 1

    return draws


def fit(draw: Draw, tokens: Callable[[Sample], int], budget: int) -> Sample | None:
    """The sample with the largest haystack found that has at most ``budget`` tokens; None if the least has more.

    Sizes between one that fits and one that does not are tried by interpolation, until the room left is less than
    one unit of haystack takes.
    """
    low, best = draw.least, draw(draw.least)
    used = first = tokens(best)
    if used > budget:
        return None
    high = None  # the smallest size known not to fit
    guess = max(low + 1, 2 * low)
    for _ in range(40):
        if draw.most is not None:
            guess = min(guess, draw.most)
        if guess <= low or (high is not None and high - low <= 1):
            break
        sample = draw(guess)
        count = tokens(sample)
        per_unit = max((count - first) / (guess - draw.least), 0.25)
        if count <= budget:
            low, best, used = guess, sample, count
        else:
            high = guess
        if budget - used < per_unit:
            break
        # Aim a little low: a step that fits counts, one that does not only narrows.
        guess = max(low + 1, low + int(0.98 * (budget - used) / per_unit))
        if high is not None and guess >= high:
            guess = (low + high) // 2
    return best
