"""RULER's aggregation tasks (arXiv 2404.06654, section 3.3; templates and counts: github.com/NVIDIA/RULER).

cwe, common words: a numbered list in which 10 words occur 30 times and the others 3 times; the 10 are asked for. Below
4096 tokens they occur 6 times and once. A solved example of 20 (below 4096) or 40 words goes before.

fwe, frequent words: coded words of six letters whose frequency falls with the square of their rank (zeta, alpha 2);
the first rank is the filler "...", and ranks 2 to 4 are asked for.
"""

import itertools
import math
import string
from dataclasses import dataclass
from random import Random

from data.tasks.material import Material, all_words, distinct
from data.tasks.sample import Draw, Form, Sample, Sized, TextTask, each_sample

COMMON = 10
CWE_PROMPT = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?"
)
CWE_PREFIX = " Answer: The top 10 words that appear most often in the list are:"


@dataclass(frozen=True)
class Counts:
    """How often the common and the other words occur, and the same for the example of ``example_words`` words."""

    common: int
    others: int
    example_words: int
    example_common: int
    example_others: int


LONG = Counts(30, 3, 40, 10, 3)
SHORT = Counts(6, 1, 20, 3, 1)  # RULER's below 4096 tokens
SHORTER = Counts(4, 1, 12, 2, 1)
ALONE = Counts(3, 1, 0, 0, 0)
SHORTEST = Counts(2, 1, 0, 0, 0)


def _numbered(words: list[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, start=1))


def _list(rng: Random, words: list[str], common: int, others: int) -> str:
    entries = words[:COMMON] * common + words[COMMON:] * others
    rng.shuffle(entries)
    return _numbered(entries)


def _draw_cwe(material: Material, rng: Random, counts: Counts) -> Draw:
    vocabulary = all_words()
    example = ""
    if counts.example_words:
        words = rng.sample(vocabulary, counts.example_words)
        context = _list(rng, words, counts.example_common, counts.example_others)
        example = f"{CWE_PROMPT.format(context=context)}{CWE_PREFIX} {_numbered(words[:COMMON])}\n"
    order = rng.sample(vocabulary, len(vocabulary))
    child = rng.getrandbits(64)

    def make(size: int) -> Sample:
        rng = Random(f"{child}/{size}")
        words = order[: COMMON + size]
        # The longest lists need more words than there are; RULER then takes a larger list, ours are pairs of words.
        words += distinct(rng, "words", COMMON + size - len(words))
        prompt = example + CWE_PROMPT.format(context=_list(rng, words, counts.common, counts.others))
        return Sample(prompt, CWE_PREFIX, words[:COMMON])

    return Sized(make, least=1)


def _cwe_form(counts: Counts, differs: str | None = None) -> Form:
    return Form(each_sample("cwe", lambda material, rng: _draw_cwe(material, rng, counts)), differs)


def cwe_forms(length: int) -> list[Form]:
    shorter = [
        _cwe_form(SHORTER, "4 : 1 repetitions, example of 12 words"),
        _cwe_form(ALONE, "3 : 1 repetitions, no example"),
        _cwe_form(SHORTEST, "2 : 1 repetitions, no example"),
    ]
    if length < 4096:
        return [_cwe_form(SHORT), *shorter]
    # Lists of more tokens than this have used up the words.
    many = "adjective-noun pairs where the words run out" if length > 65536 else None
    return [_cwe_form(LONG, many), _cwe_form(SHORT, "6 : 1 repetitions, example of 20 words"), *shorter]


FWE_PROMPT = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
    "three most frequently appeared words in the above coded text?"
)
FWE_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"
FWE_NEW_TOKENS = 50
ZETA_2 = math.pi**2 / 6


def frequencies(size: int, ranks: int) -> list[int]:
    """How often the word of each rank occurs in a text of about ``size`` words."""
    return [int(size * rank**-2 / ZETA_2) for rank in range(1, ranks + 1)]


def _draw_fwe(material: Material, rng: Random, ranks: int) -> Draw:
    coded: dict[str, None] = {}
    while len(coded) < ranks - 1:
        coded["".join(rng.choices(string.ascii_lowercase, k=6))] = None
    vocabulary = ["...", *coded]
    child = rng.getrandbits(64)

    def make(size: int) -> Sample:
        counts = frequencies(size, ranks)
        words = [word for word, count in zip(vocabulary, counts, strict=True) for _ in range(count)]
        Random(f"{child}/{size}").shuffle(words)
        return Sample(FWE_PROMPT.format(context=" ".join(words)), FWE_PREFIX, vocabulary[1:4])

    # The first size from which the fourth word is more frequent than the fifth, as the answer says.
    least = next(n for n in itertools.count() if (c := frequencies(n, 5))[3] > c[4])
    return Sized(make, least=least)


def fwe_forms(length: int) -> list[Form]:
    ranks = max((length - FWE_NEW_TOKENS) // 50, 5)
    return [Form(each_sample("fwe", lambda material, rng: _draw_fwe(material, rng, ranks)))]


COMMON_WORDS = TextTask("cwe", "all", 120, cwe_forms)
FREQUENT_WORDS = TextTask("fwe", "all", FWE_NEW_TOKENS, fwe_forms)
