import hashlib
import json
import re

import pytest

from data import TextDataConfig
from data.corpora import iterate_documents
from data.recall import recall_document


def documents(count=200, **range_of_facts):
    facts = {"facts_min": 3, "facts_max": 20} | range_of_facts
    return [recall_document(0, index, **facts) for index in range(count)]


def facts_of(document):
    """(stated, asked): from name to value, or to the set of names for assignments, read as a reader would."""
    stated_text, asked_text = document.strip().split("\n\n")
    if document.startswith("{"):
        return json.loads(stated_text), dict(re.findall(r'Key: "(\w+)" Value: "(\w+)"', asked_text))
    if document.startswith("VAR"):
        values, held_by = {}, {}
        for name, value in re.findall(r"VAR (\w+) = (.+)", stated_text):
            values[name] = values[value.removeprefix("VAR ")] if value.startswith("VAR") else value
            held_by.setdefault(values[name], set()).add(name)
        asked = re.findall(r"(\d+) is the value of: (.+)", asked_text)
        return held_by, {number: set(names.split()) for number, names in asked}
    return (
        dict(re.findall(r"magic numbers for ([a-z ]+\d+) is: (\d+)", stated_text)),
        dict(re.findall(r"magic number for ([a-z ]+\d+) is (\d+)", asked_text)),
    )


def test_every_fact_is_asked_for_and_answered_right():
    sizes = []
    for document in documents():
        stated, asked = facts_of(document)
        assert stated == asked != {}
        sizes.append(sum(len(value) if isinstance(value, set) else 1 for value in stated.values()))
    assert (min(sizes), max(sizes)) == (3, 20)


def test_the_three_forms_come_about_as_often():
    starts = [document[0] for document in documents(600)]
    assert all(
        150 < count < 250
        for count in (starts.count("{"), starts.count("V"), 600 - starts.count("{") - starts.count("V"))
    )


def test_questions_are_not_in_the_order_of_the_facts():
    document = next(document for document in documents(facts_min=20) if document.startswith("{"))
    stated, asked = facts_of(document)
    assert list(stated) != list(asked)


def test_a_document_depends_on_seed_and_index_alone():
    assert recall_document(1, 7, 3, 20) == recall_document(1, 7, 3, 20)
    assert len({recall_document(seed, index, 3, 20) for seed in range(3) for index in range(50)}) == 150
    whole = "".join(documents(50)).encode()
    # Another value: raise RECALL_VERSION, so that no cache mixes documents of two kinds, and put it here.
    assert hashlib.blake2b(whole, digest_size=4).hexdigest() == "1a6e21fc"


def test_as_a_corpus():
    config = TextDataConfig(name="x", seq_len=8, source="recall", max_documents=30, recall_seed=2, facts_max=9)
    assert [document.text for document in iterate_documents(config)] == [
        recall_document(2, index, 4, 9) for index in range(30)
    ]
    with pytest.raises(ValueError, match=r"needs data\.max_documents"):
        TextDataConfig(name="x", seq_len=8, source="recall")
