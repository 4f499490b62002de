"""What the generators draw from: words, text for haystacks, and question-answering files of the user's."""

import functools
import json
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from random import Random
from uuid import UUID

from data.cache import fingerprint

ESSAYS = "PaulGrahamEssays.json"  # as RULER names and stores them: {"text": ...}


@dataclass(frozen=True)
class Material:
    """Sources beside the word lists.

    Attributes:
        haystack: prose that needles are hidden in, whitespace-separated words; empty if there is none.
        haystack_name: what stands in for RULER's essays; None if it is those.
        squad: SQuAD's development set (JSON), for qa_1.
        hotpotqa: HotpotQA's development set with distractors (JSON), for qa_2.
    """

    haystack: tuple[str, ...] = ()
    haystack_name: str | None = None
    squad: Path | None = None
    hotpotqa: Path | None = None

    def fingerprint(self, needs: str | None) -> str | None:
        """Of the source that a task ``needs``."""
        if needs == "haystack":
            return fingerprint(self.haystack, self.haystack_name)
        return None if needs is None else fingerprint(getattr(self, needs).read_text(encoding="utf-8"))

    def has(self, needs: str | None) -> bool:
        return needs is None or bool(getattr(self, needs))


def read_haystack(path: Path) -> Material:
    """A haystack from a text file, or from RULER's JSON of essays. ValueError if there is none."""
    if not path.exists():
        raise ValueError(f"haystack={path} does not exist: give a text file")
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            text = json.loads(text)["text"]
    except (OSError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f'haystack={path} cannot be read ({error!r}): give a text file, or JSON {{"text": ...}}'
        ) from None
    words = tuple(text.split())
    if not words:
        raise ValueError(f"haystack={path} is empty: give a text file with prose in it")
    return Material(haystack=words, haystack_name=None if path.name == ESSAYS else path.name)


def sentences(text: str) -> list[str]:
    """Split at the white space after a full stop, question or exclamation mark."""
    return re.split(r"(?<=[.!?])\s+", text)


@functools.cache
def word_list(kind: str) -> tuple[str, ...]:
    """The nouns, adjectives or verbs of the package wonderwords, RULER's source; sorted, without duplicates."""
    text = (resources.files("wonderwords.assets") / f"{kind}list.txt").read_text(encoding="utf-8")
    return tuple(sorted({line.strip() for line in text.splitlines() if line.strip()}))


@functools.cache
def all_words() -> tuple[str, ...]:
    return tuple(sorted({word for kind in ("noun", "adjective", "verb") for word in word_list(kind)}))


def random_pair(rng: Random) -> str:
    """An adjective-noun such as "quiet-river"."""
    return f"{rng.choice(word_list('adjective'))}-{rng.choice(word_list('noun'))}"


def random_number(rng: Random) -> str:
    """Seven digits."""
    return str(rng.randint(1_000_000, 9_999_999))


def random_uuid(rng: Random) -> str:
    return str(UUID(int=rng.getrandbits(128), version=4))


RANDOM = {"words": random_pair, "numbers": random_number, "uuids": random_uuid}


def distinct(rng: Random, kind: str, count: int, taken: set[str] = frozenset()) -> list[str]:
    """``count`` different words, numbers or uuids, none of them in ``taken``."""
    found: dict[str, None] = {}
    while len(found) < count:
        value = RANDOM[kind](rng)
        if value not in taken:
            found[value] = None
    return list(found)
