import hashlib
import json
import random
import re
from collections import Counter

import pytest

from data import TextDataConfig
from data.config import MOST_FACTS
from data.corpora import iterate_documents, open_dataset
from data.recall import FORMS, RECALL_VERSION, _pairs, recall_document
from data.tasks.json_kv import INSTRUCTION

BEGINNINGS = {"chains": "Memorize and track", "commons": "Below is", "frequents": "Read the following"}
STATED = re.compile(r"One of the special magic (?:numbers|uuids) for (\S+) is: (\S+)\.")
ASKED = re.compile(r"for ([^?]+) mentioned in the provided text (?:is|are) (.+)\.$", re.MULTILINE)


def documents(count=200, **sizes):
    sizes = {"facts_min": 3, "facts_max": 12, "hay_max": 20} | sizes
    return [recall_document(0, index, **sizes) for index in range(count)]


def form_of(document):
    for form, beginning in BEGINNINGS.items():
        if document.startswith(beginning):
            return form
    if document.startswith("{"):
        return "json"
    return "pairs" if STATED.search(document) is None else "needles"


def of_form(form, **sizes):
    return [document for document in documents(600, **sizes) if form_of(document) == form]


def test_forms_come_as_often_as_said():
    counts = Counter(map(form_of, documents(2000)))
    counts["counts"] = counts.pop("commons") + counts.pop("frequents")
    total = sum(FORMS.values())
    assert counts.keys() == FORMS.keys()
    assert all(counts[form] == pytest.approx(2000 * share / total, rel=0.2) for form, share in FORMS.items())


def test_pairs_repeat_what_followed_a_name():
    lengths = set()
    for document in of_form("pairs"):
        names = document.split(" ")
        if any(name.isalpha() and len(name) > 1 for name in names):
            continue  # words may be several
        stated = dict(zip(names[::2], (value.strip() for value in names[1::2]), strict=True))
        lengths.add(len(stated))
        assert all(stated[name] == value.strip() for name, value in zip(names[::2], names[1::2], strict=True))
        assert len(names) == 2 * 5 * len(stated)
    assert lengths == set(range(5, 15))


def test_json_documents_ask_in_the_words_of_json_kv():
    sizes, recited = [], 0
    for document in of_form("json"):
        stated, asked = document.split("\n\n", 1)
        stated = json.loads(stated)
        if asked.startswith("{"):
            recited += 1
            asked = json.loads(asked)
        else:
            assert asked.startswith(f"{INSTRUCTION}\n\n")
            asked = dict(re.findall(r"Key: (\S+)\nCorresponding value: (\S+)\n\n", asked))
        assert asked.items() <= stated.items()
        sizes.append((len(asked), len(stated) - len(asked)))
    assert (min(sizes)[0], max(sizes)[0]) == (3, 12)
    assert {others for _, others in sizes} == set(range(7))
    assert 0.15 < recited / len(sizes) < 0.45


def test_needles_are_asked_for_in_the_words_of_ruler():
    values_of_a_question = set()
    for document in of_form("needles"):
        held = {}
        for key, value in STATED.findall(document):
            held.setdefault(key, []).append(value)
        asked = ASKED.findall(document)
        if not asked:
            context, recited = document.strip().rsplit("\n\n", 1)
            assert set(STATED.findall(recited)) <= set(STATED.findall(context))
            continue
        for keys, values in asked:
            keys, values = (re.split(r", and |, ", names) for names in (keys, values))
            # In the order of the context, one key after another.
            assert values == [value for key in keys for value in held[key]]
            values_of_a_question.add(len(values))
    assert {1, 2, 4} < values_of_a_question


def test_chains_are_asked_for_from_their_value():
    for document in of_form("chains"):
        values, held = {}, {}
        for name, value in re.findall(r"^VAR (\w+) = (.+?) ?$", document, re.MULTILINE):
            values[name] = values[value.removeprefix("VAR ")] if value.startswith("VAR") else value
            held.setdefault(values[name], []).append(name)
        answers = re.findall(r"(\d+) variables are assigned the value (\d+), they are: (.+)", document)
        assert {value: names.split() for _, value, names in answers} == held
        assert all(int(count) == len(held[value]) for count, value, _ in answers)


def test_the_most_frequent_words_are_asked_for():
    for document in of_form("commons"):
        context, answer = document.rsplit("\nQuestion", 1)
        words = re.findall(r"\d+\. ([^\d\n]+?)(?= \d+\.|$)", context.rsplit("\n", 1)[1])
        found = re.findall(r"\d+\. ([^\d\n]+?)(?= \d+\.|\n)", answer)
        assert {word for word, _ in Counter(words).most_common(10)} == set(found)
    for document in of_form("frequents"):
        words = re.findall(r"\b[a-z]{6}\b", document.partition("coded words. ")[2].partition("\nQuestion")[0])
        assert document.split(": ")[-1].split() == [word for word, _ in Counter(words).most_common(3)]


def test_hay_is_bounded_and_may_be_none():
    count = [len(STATED.findall(document)) for document in of_form("needles", facts_max=3, hay_max=0)]
    assert set(count) == {3, 6}  # recited ones stand twice
    assert max(document.count("The grass is green.") for document in documents(600)) == 20


@pytest.mark.parametrize("facts", [24, 25, 89, MOST_FACTS])
def test_pairs_may_be_as_many_as_a_configuration_takes(facts):
    for seed in range(20):
        assert _pairs(random.Random(seed), facts, hay=0).count(" ") >= 2 * 5 * (2 + facts) - 1


def test_a_document_depends_on_seed_and_index_alone():
    assert recall_document(1, 7, 3, 20, 9) == recall_document(1, 7, 3, 20, 9)
    assert len({recall_document(seed, index, 3, 20, 9) for seed in range(3) for index in range(50)}) == 150
    whole = "".join(documents(50)).encode()
    # Another value: raise RECALL_VERSION, so that no cache mixes documents of two kinds, and put it here.
    assert (RECALL_VERSION, hashlib.blake2b(whole, digest_size=4).hexdigest()) == (2, "585d83df")


def test_as_a_corpus():
    config = TextDataConfig(
        name="x", seq_len=8, source="recall", max_documents=30, recall_seed=2, facts_max=9, hay_max=5
    )
    assert [document.text for document in iterate_documents(config)] == [
        recall_document(2, index, 1, 9, 5) for index in range(30)
    ]
    streamed = [row["text"] for row in open_dataset(config)]
    assert streamed == [document.text for document in iterate_documents(config)]
    with pytest.raises(ValueError, match=r"needs data\.max_documents"):
        TextDataConfig(name="x", seq_len=8, source="recall")
