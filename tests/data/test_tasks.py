"""The generated tasks against their published definitions (RULER: arXiv 2404.06654 and github.com/NVIDIA/RULER)."""

import hashlib
import json
import re
from collections import Counter
from copy import copy
from dataclasses import asdict, replace
from random import Random
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, processors

from data import MixtureDataConfig
from data.config import MixedCorpusConfig
from data.corpora import split_of
from data.prompts import TEMPLATES, PromptEncoder
from data.task_sets import GENERATOR_VERSION, SUITES, TEXT_TASKS, TaskSet, build_set, generate, held_out_text
from data.tasks.aggregation import frequencies
from data.tasks.material import Material, all_words, read_haystack, sentences, word_list
from data.tasks.niah import DEPTHS, HEAT_DEPTHS, NOISE
from data.tasks.question_answering import read_hotpotqa, read_squad
from data.tasks.sample import Form, Sample, Sized, TextTask, each_sample, fit
from data.tokenizer import TextTokenizer, train_bpe

NEEDLE = re.compile(r"One of the special magic (\w+) for (\S+) is: (\S+)\.")
PROSE = [f"{Random(i).choice(word_list('noun')).capitalize()} number {i} is here." for i in range(400)]
MATERIAL = Material(haystack=tuple(" ".join(PROSE).split()), haystack_name="prose of the test")


@pytest.fixture(scope="module")
def tokenizer():
    texts = [" ".join(all_words()), " ".join(PROSE), NOISE, *(f"{i}" for i in range(2000))]
    return TextTokenizer(train_bpe(iter(texts), 3000, "<eos>"), "<eos>")


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return PromptEncoder(tokenizer)


def samples_of(name, encoder, length=1024, count=4, material=MATERIAL, seed=0):
    return generate(TEXT_TASKS[name], encoder, length=length, count=count, seed=seed, material=material)


# keys, values of a key, keys asked for; haystack; kinds of key and value: RULER's synthetic.yaml
DEFINITIONS = {
    "niah_single_1": (1, 1, 1, "noise", "words", "numbers"),
    "niah_single_2": (1, 1, 1, "essay", "words", "numbers"),
    "niah_single_3": (1, 1, 1, "essay", "words", "uuids"),
    "niah_multikey_1": (4, 1, 1, "essay", "words", "numbers"),
    "niah_multikey_2": (1, 1, 1, "needle", "words", "numbers"),
    "niah_multikey_3": (1, 1, 1, "needle", "uuids", "uuids"),
    "niah_multivalue": (1, 4, 1, "essay", "words", "numbers"),
    "niah_multiquery": (4, 1, 4, "essay", "words", "numbers"),
}
SPELLING = {
    "words": re.compile(r"[^\d]+-[^\d]+"),
    "numbers": re.compile(r"[1-9]\d{6}"),
    "uuids": re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"),
}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_needles_are_as_many_and_of_the_kind_that_ruler_says(name, encoder):
    keys, values, asked, haystack, key_kind, value_kind = DEFINITIONS[name]
    differs, samples = samples_of(name, encoder)
    assert differs == ("haystack: prose of the test" if haystack == "essay" else None)
    for sample in samples:
        found = NEEDLE.findall(sample.prompt)
        assert {kind for kind, _, _ in found} == {value_kind}
        if haystack == "needle":
            assert len(found) > 5
            assert len({key for _, key, _ in found}) == len(found)
        else:
            assert len(found) == keys * values
            assert Counter(key for _, key, _ in found).most_common()[-1][1] == values
        for _, key, value in found:
            assert SPELLING[key_kind].fullmatch(key)
            assert SPELLING[value_kind].fullmatch(value)
        assert (NOISE in sample.prompt) == (haystack == "noise")
        # The answer is every value of every key that is asked for, in the question and in the answer's beginning.
        question = sample.prompt.rsplit("\n", 1)[1]
        queried = [key for _, key, _ in found if key in question]
        assert len(set(queried)) == asked
        assert all(key in sample.answer_prefix for key in queried)
        assert sorted(sample.references) == sorted(value for _, key, value in found if key in queried)
        assert [NEEDLE.findall(piece)[0][2] for piece in sample.evidence] == sample.references
        assert (sample.depth is None) == (len(sample.references) > 1)


def test_the_question_is_in_the_singular_where_one_answer_is_asked_for(encoder):
    (single,), (many,) = (samples_of(name, encoder, count=1)[1] for name in ("niah_single_2", "niah_multiquery"))
    assert single.prompt.startswith("A special magic number is hidden within the following text.")
    assert re.search(r"What is the special magic number for \S+ mentioned in the provided text\?$", single.prompt)
    assert single.answer_prefix.endswith("mentioned in the provided text is")
    assert many.prompt.startswith("Some special magic numbers are hidden within the following text.")
    assert re.search(r"for \S+, \S+, \S+, and \S+ mentioned in the provided text\?$", many.prompt)
    assert many.answer_prefix.endswith("mentioned in the provided text are")


def test_needles_in_prose_stand_at_rulers_forty_depths(encoder):
    assert (len(DEPTHS), DEPTHS[0], DEPTHS[1], DEPTHS[-1]) == (40, 0, 3, 100)
    for sample in samples_of("niah_multikey_1", encoder, count=8)[1]:
        context = sample.prompt.split("\n")[1]
        kinds = [bool(NEEDLE.match(sentence)) for sentence in sentences(context)]
        places = [sum(not needle for needle in kinds[:i]) for i, needle in enumerate(kinds) if needle]
        assert len(places) == 4
        assert set(places) <= {int(kinds.count(False) * depth / 100) for depth in DEPTHS}


def test_the_heat_map_walks_through_its_depths(encoder):
    _, samples = samples_of("niah", encoder, count=22)
    assert [sample.depth for sample in samples] == 2 * HEAT_DEPTHS
    for sample in samples:
        context = sample.prompt.split("\n")[1]
        assert context.index(sample.evidence[0]) / len(context) == pytest.approx(sample.depth, abs=0.08)
        assert context.startswith(sample.evidence[0]) == (sample.depth == 0.0)
        assert context.endswith(sample.evidence[0]) == (sample.depth == 1.0)


@pytest.mark.parametrize("values", [1, 2, 4, 8, 16])
def test_values_of_one_key_are_spread_over_needles(values, encoder):
    _, (sample,) = samples_of(f"niah_values_{values}", encoder, length=2048, count=1)
    assert len(sample.references) == len(sample.evidence) == values


def test_variable_tracking_is_one_chain_of_four_hops(encoder):
    differs, samples = samples_of("vt", encoder)
    assert differs is None
    for sample in samples:
        example, question = sample.prompt.split("\n\nMemorize and track", 1)
        assert len(sample.references) == 5
        lines = re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)", question)
        value = re.search(r"assigned the value (\d{5}) in the text above\.$", question)[1]
        assert lines == list(zip(sample.references, [value, *sample.references[:-1]], strict=True))  # in this order
        assert f"5 variables are assigned the value {value}" in sample.answer_prefix
        # A solved example of the same kind, with names of three letters, goes before.
        names = [name for name, _ in re.findall(r"VAR ([A-Z]{3}) = (?:VAR )?(\w+)", example)]
        assert example.endswith(" ".join(names))
        assert (len(names), example.count(NOISE)) == (5, 5)


@pytest.mark.parametrize(
    ("length", "common", "others", "example"),
    [(4096, 30, 3, (40, 10, 3)), (2048, 6, 1, (20, 3, 1))],
)
def test_common_words_occur_as_often_as_ruler_says(length, common, others, example, encoder):
    differs, samples = samples_of("cwe", encoder, length=length, count=2)
    assert differs is None
    for sample in samples:
        first, second = (
            Counter(re.findall(r"\d+\. (.+?)(?= \d+\. |\n|$)", text.split("\n", 1)[1].split("\nQuestion")[0]))
            for text in ("x\n" + sample.prompt.split("\n", 1)[1], sample.prompt.split("Below is", 2)[2])
        )
        assert len(sample.references) == 10
        assert {second[word] for word in sample.references} == {common}
        assert {n for word, n in second.items() if word not in sample.references} == {others}
        words, common_there, others_there = example
        assert Counter(first.values()) == {common_there: 10, others_there: words - 10}


def test_frequent_words_fall_with_the_square_of_their_rank(encoder):
    assert frequencies(1000, 5) == [607, 151, 67, 37, 24]  # 1000 / (rank**2 * 1.6449), rounded down
    for sample in samples_of("fwe", encoder, length=2048)[1]:
        text = sample.prompt.split("coded words. ", 1)[1].split("\nQuestion")[0]
        counts = Counter(text.split(" "))
        ranked = counts.most_common()
        assert ranked[0][0] == "..."
        assert {word for word, _ in ranked[1:4]} == set(sample.references)
        assert counts[sample.references[2]] > ranked[4][1]
        assert all(re.fullmatch("[a-z]{6}", word) for word in counts if word != "...")
        assert any(frequencies(size, 4) == [n for _, n in ranked[:4]] for size in range(2048))


SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": f"Paragraph {a}{p} says that the colour is {a}{p}-blue.",
                    "qas": [
                        {"question": f"What is {a}{p}?", "answers": [{"text": f"{a}{p}-blue"}, {"text": "blue"}]},
                        {"question": "Nothing?", "answers": [], "is_impossible": True},
                    ],
                }
                for p in range(6)
            ]
        }
        for a in "xyz"
    ]
}
DOCUMENTS = (0, 1, 2), (0, 1, 2, 2)  # of a question, and of the last one
HOTPOT = [
    {
        "question": f"Who is {i}?",
        "answer": f"person {i}",
        "context": [
            [f"Title {i}{j}", [f"Sentence {i}{j}.", " More."] * (300 if i == 0 else 1)] for j in DOCUMENTS[i == 5]
        ],
    }
    for i in range(6)
]


@pytest.fixture
def qa_files(tmp_path):
    paths = {}
    for name, content in (("squad", SQUAD), ("hotpotqa", HOTPOT)):
        paths[name] = tmp_path / f"{name}.json"
        paths[name].write_text(json.dumps(content))
    return Material(**paths)


def test_squad_questions_come_with_their_paragraph_and_its_article_first(qa_files, encoder):
    _, samples = samples_of("qa_1", encoder, length=512, material=qa_files)
    assert [sample.references for sample in samples] == [[f"x{p}-blue", "blue"] for p in range(4)]
    orders = set()
    for p, sample in enumerate(samples):
        documents = re.findall(r"Document (\d+):\nParagraph (..)", sample.prompt)
        assert [int(number) for number, _ in documents] == list(range(1, len(documents) + 1))
        chosen = [name for _, name in documents]
        assert f"x{p}" in chosen
        assert len(chosen) < 6 or {f"x{i}" for i in range(6)} <= set(chosen)  # before those of other articles
        assert sample.evidence == [f"Paragraph x{p} says that the colour is x{p}-blue."]
        orders.add(tuple(chosen))
    assert len(orders) == 4
    # In an order that every process has, whatever its hashes of texts are.
    draws = TEXT_TASKS["qa_1"].forms(512)[0].draws(qa_files, 0)
    assert {(draw.least, draw.most) for draw in draws} == {(1, 18)}, "its paragraph, and all there are"
    for read, path in ((read_squad, qa_files.squad), (read_hotpotqa, qa_files.hotpotqa)):
        assert read(path)[1] == sorted(read(path)[1])
    assert samples[0].score("It is BLUE.", TEXT_TASKS["qa_1"].match) == 1


def test_a_question_whose_documents_do_not_fit_is_passed_over(qa_files, encoder):
    _, samples = samples_of("qa_2", encoder, length=512, material=qa_files)
    assert [sample.references for sample in samples] == [[f"person {i}"] for i in range(1, 5)]
    assert all(len(sample.evidence) == 3 for sample in samples)
    assert len(read_hotpotqa(qa_files.hotpotqa)[0][5].own) == 3, "what is there twice is one document"
    with pytest.raises(ValueError, match="6 samples of qa_2 do not fit into 512"):
        samples_of("qa_2", encoder, length=512, material=qa_files, count=6)


def test_other_files_are_refused(tmp_path, encoder):
    path = tmp_path / "x.json"
    path.write_text('{"data": [1]}')
    for name, source in (("qa_1", "squad"), ("qa_2", "hotpotqa")):
        with pytest.raises(ValueError, match="not laid out as"):
            samples_of(name, encoder, material=Material(**{source: path}))
    with pytest.raises(ValueError, match="cannot be read"):
        samples_of("qa_1", encoder, material=Material(squad=tmp_path / "none.json"))


def test_json_recall_asks_for_one_key_of_the_object(encoder):
    differs, samples = samples_of("json_kv", encoder, length=2048)
    assert differs is None
    for sample in samples:
        pairs = json.loads(sample.prompt.split("\n\n")[0])
        shown = re.findall(r"Key: (\S+)\nCorresponding value: (\S+)\n", sample.prompt)
        asked = sample.prompt.rsplit("Key: ", 1)[1]
        assert len(shown) == 2
        assert all(pairs[key] == value and key != asked for key, value in shown)
        assert [pairs[asked]] == sample.references
        assert sample.prompt.index(sample.evidence[0]) == pytest.approx(sample.depth * len(json.dumps(pairs)), abs=90)
    for examples, form in enumerate(reversed(TEXT_TASKS["json_kv"].forms(512))):
        draws = form.draws(MATERIAL, 0)
        for draw in (next(draws) for _ in range(20)):  # as small as can be: all other keys are shown
            keys = re.findall(r"Key: (\S+)", draw(draw.least).prompt)
            assert len(set(keys)) == len(keys) == draw.least == examples + 1


# Of samples in every form of a task. Another value: raise GENERATOR_VERSION, so that no cache mixes samples of two
# kinds, and put it here.
SAMPLES = {
    "niah_single_1": "b9eb0886",
    "niah_single_2": "dc93292e",
    "niah_single_3": "d95f534e",
    "niah_multikey_1": "8a83f77d",
    "niah_multikey_2": "7c78bfd3",
    "niah_multikey_3": "d68bf01b",
    "niah_multivalue": "91ab1553",
    "niah_multiquery": "6cea2d3e",
    "vt": "5d353d64",
    "cwe": "a8811b41",
    "fwe": "20ed075c",
    "niah": "1e05ac7a",
    "niah_values_1": "4455afd2",
    "niah_values_2": "0a14b15f",
    "niah_values_4": "68f0f541",
    "niah_values_8": "7a276d16",
    "niah_values_16": "edb11fe0",
    "json_kv": "78a16376",
    "qa_1": "467f7fdc",
    "qa_2": "24d87e81",
}


def test_samples_have_not_changed_without_a_new_version(qa_files):
    assert SAMPLES.keys() == TEXT_TASKS.keys()
    material = replace(MATERIAL, squad=qa_files.squad, hotpotqa=qa_files.hotpotqa)
    letters = SimpleNamespace(encode=lambda sample: range(len(sample.prompt + sample.answer_prefix) // 4))
    found = {}
    for name in SAMPLES:
        rows = []
        for length in (1000, 4096):
            differs, samples = samples_of(name, letters, length=length, count=2, material=material)
            rows += [differs, *map(asdict, samples)]
        for form in TEXT_TASKS[name].forms(4096):
            draw = next(form.draws(material, 1))
            rows += [form.differs, draw.least, draw.most, *(asdict(draw(draw.least + size)) for size in (0, 50))]
        found[name] = hashlib.blake2b(json.dumps(rows).encode(), digest_size=4).hexdigest()
    assert (GENERATOR_VERSION, found) == (1, SAMPLES)


def test_forms_by_length():
    """The published one first, but where lists are longer than there are words."""
    published = {length: TEXT_TASKS["cwe"].forms(length)[0].differs for length in (4095, 4096, 65_536, 65_537)}
    assert published == {4095: None, 4096: None, 65_536: None, 65_537: "adjective-noun pairs where the words run out"}
    assert [len(TEXT_TASKS["cwe"].forms(length)) for length in (4095, 4096)] == [4, 5]


def test_scores():
    sample = Sample("", "", ["Seven", "eight"])
    assert sample.score("It is SEVENTEEN", "all") == 0.5
    assert sample.score("seven, eight", "all") == 1
    assert (sample.score("eight", "any"), sample.score("nine", "any")) == (1, 0)


def test_the_thirteen_and_their_new_tokens():
    assert len(SUITES["ruler"]) == 13
    expected = {"vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}
    for name in SUITES["ruler"]:
        task = TEXT_TASKS[name]
        assert task.max_new_tokens == expected.get(name, 128)
        assert task.match == ("any" if name.startswith("qa") else "all")


@pytest.mark.parametrize("length", [512, 1000, 4096])
def test_prompt_and_answer_fit_the_length_and_nearly_fill_it(length, encoder):
    for name, task in TEXT_TASKS.items():
        if task.needs in ("squad", "hotpotqa") or (name == "niah_values_16" and length == 512):
            continue
        _, samples = samples_of(name, encoder, length=length, count=2)
        for sample in samples:
            used = len(encoder.encode(sample)) + task.max_new_tokens
            unit = 90 if name in ("json_kv", "niah_multikey_3") else 40
            assert length - unit <= used <= length, name


def test_every_sample_has_places_of_its_own(encoder):
    for name in ("niah_single_1", "niah_multikey_2", "vt", "cwe", "fwe"):
        _, samples = samples_of(name, encoder, length=2048, count=6)
        places = {sample.prompt.index(sample.references[0]) for sample in samples}
        assert len(places) > 3, name
        assert len({sample.prompt for sample in samples}) == 6


def test_what_cannot_fit_is_refused_and_never_loops(tokenizer, encoder, tmp_path):
    options = {"count": 1, "seed": 0, "material": MATERIAL, "cache_dir": tmp_path}
    with pytest.raises(ValueError, match="needs at least 512 tokens"):
        build_set("vt", encoder, length=511, **options)
    with pytest.raises(ValueError, match="task qa_1 needs squad=FILE"):
        build_set("qa_1", encoder, length=512, **options)
    bytes_only = PromptEncoder(TextTokenizer(train_bpe(iter(["x"]), 257, "<eos>"), "<eos>"))
    with pytest.raises(ValueError, match="do not fit into 512 tokens with this tokenizer"):
        build_set("cwe", bytes_only, length=512, **options)


def test_a_smaller_form_says_so():
    bytes_only = PromptEncoder(TextTokenizer(train_bpe(iter(["x"]), 257, "<eos>"), "<eos>"))
    differs, _ = samples_of("cwe", bytes_only, length=1300, count=1)
    assert differs == "3 : 1 repetitions, no example"
    differs, _ = samples_of("niah_single_2", bytes_only, length=1024, count=1)
    assert differs == "haystack: prose of the test"


def test_fit_never_exceeds_the_budget_whatever_units_cost():
    generator = Random(0)
    for _ in range(200):
        costs = [generator.choice([1, 1, 5, 40]) for _ in range(500)]
        base, budget = generator.randint(0, 50), generator.randint(10, 3000)
        most = generator.choice([None, 30])
        draw = Sized(lambda size: Sample(str(size), "", []), most=most)

        def tokens(sample, base=base, costs=costs):
            size = int(sample.prompt)
            return base + sum(costs[:size]) + 40 * max(0, size - 500)

        sample = fit(draw, tokens, budget)
        if base > budget:
            assert sample is None
        else:
            assert tokens(sample) <= budget
            larger = Sample(str(int(sample.prompt) + 1), "", [])
            assert int(sample.prompt) == most or tokens(sample) > budget - 41 or tokens(larger) > budget
    assert fit(Sized(lambda size: Sample(str(size), "", [])), lambda sample: 7 + int(sample.prompt), 7).prompt == "0"


def test_sets_are_made_once_and_again_for_another_seed(encoder, tmp_path, monkeypatch):
    options = {"length": 600, "count": 2, "material": MATERIAL, "cache_dir": tmp_path}
    made = build_set("niah_single_2", encoder, seed=0, **options)
    assert isinstance(made, TaskSet)
    other = build_set("niah_single_2", encoder, seed=1, **options)
    assert made.samples != other.samples
    assert (made.seed, other.seed) == (0, 1)
    monkeypatch.setattr("data.task_sets.generate", None)
    assert build_set("niah_single_2", encoder, seed=0, **options) == made
    templated, other_tokens = copy(encoder), copy(encoder)
    templated.key = "another template"
    other_tokens.tokenizer = TextTokenizer(encoder.tokenizer.backend, "a")
    materials = [replace(MATERIAL, haystack=MATERIAL.haystack[1:]), replace(MATERIAL, haystack_name=None)]
    changes = [{"count": 1}, {"length": 601}, {"seed": 2}, {"encoder": templated}, {"encoder": other_tokens}]
    for change in [*changes, *({"material": material} for material in materials)]:
        with pytest.raises(TypeError):  # it would be made anew
            build_set("niah_single_2", **{"encoder": encoder, "seed": 0, **options} | change)
    for version in ("GENERATOR_VERSION", "all_words"):
        with monkeypatch.context() as patch:
            patch.setattr(f"data.task_sets.{version}", {"all_words": lambda: ()}.get(version, 99))
            with pytest.raises(TypeError):
                build_set("niah_single_2", encoder, seed=0, **options)


def test_a_packages_sets_are_known_by_all_that_they_are(encoder, tmp_path, monkeypatch):
    class OfPackages(dict):
        own = ()

    def key(name="toy", by=encoder, references=("a",), length=600, **changes):
        sample = Sample("What?", " That:", list(references))
        form = Form(each_sample(name, lambda material, rng: Sized(lambda size: sample, most=0)))
        fields = {"match": "all", "max_new_tokens": 9, "forms": lambda length: [form]}
        monkeypatch.setattr("data.task_sets.TEXT_TASKS", OfPackages({name: TextTask(name, **fields | changes)}))
        options = {"length": length, "count": 1, "seed": 0, "material": MATERIAL, "cache_dir": tmp_path}
        return build_set(name, by, **options).key

    templated, other_tokens = copy(encoder), copy(encoder)
    templated.key = "another template"
    other_tokens.tokenizer = TextTokenizer(encoder.tokenizer.backend, "a")
    changes = [{"name": "other"}, {"by": templated}, {"by": other_tokens}, {"references": ("b",)}, {"length": 601}]
    changes += [{"match": "any"}, {"max_new_tokens": 8}]
    assert key() == key()
    assert len({key(), *(key(**change) for change in changes)}) == 1 + len(changes)


CUT = '{"differs": null, "samples": 1}\n{"prompt"'  # a disk that lost the rest


@pytest.mark.parametrize("content", ["", "{\n", "[]\n", "{}\n", '{"differs": null}\n{"prompt": 1}\n', CUT])
def test_a_damaged_set_is_named_with_the_mend(encoder, tmp_path, content):
    options = {"length": 600, "count": 1, "seed": 0, "material": MATERIAL, "cache_dir": tmp_path}
    build_set("niah_single_2", encoder, **options)
    (samples,) = tmp_path.rglob("samples.jsonl")
    samples.write_text(content)
    with pytest.raises(ValueError, match=r"niah_single_2-600-\w+ is damaged .*: remove it"):
        build_set("niah_single_2", encoder, **options)


def test_evidence_is_found_in_the_tokens(tokenizer, encoder):
    backend = Tokenizer.from_str(tokenizer.backend.to_str())
    backend.add_special_tokens(["<s>"])
    begin = [("<s>", backend.token_to_id("<s>"))]
    backend.post_processor = processors.TemplateProcessing(single="<s> <s> $A", special_tokens=begin)
    begun = PromptEncoder(TextTokenizer(backend, "<eos>", bos_token="<s>"))
    for name in ("niah_multiquery", "vt", "json_kv"):
        _, samples = samples_of(name, encoder, count=2)
        for sample in samples:
            ids = encoder.encode(sample)
            assert begun.encode(sample) == [begun.tokenizer.bos_id, *ids]
            assert begun.evidence(sample) == [(first + 1, last + 1) for first, last in encoder.evidence(sample)]
            for piece, (first, last) in zip(sample.evidence, encoder.evidence(sample), strict=True):
                text = tokenizer.decode(ids[first:last])
                assert piece.strip() in text
                assert len(text) <= len(piece) + 12


def test_chat_models_get_their_turns_in_special_tokens(encoder):
    backend = train_bpe(iter([" ".join(all_words())]), 2000, "<eos>")
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    chat = PromptEncoder(TextTokenizer(backend, "<eos>"), "chatml")
    start, end = (backend.token_to_id(marker) for marker in ("<|im_start|>", "<|im_end|>"))
    sample = Sample("Say <|im_end|> here: 12345", " The answer is", ["x"], ["12345"])
    ids = chat.encode(sample)
    assert (ids.count(start), ids.count(end)) == (2, 1)  # the one in the user's words is no token
    assert chat.tokenizer.decode(ids) == (
        "<|im_start|>user\nSay <|im_end|> here: 12345<|im_end|>\n<|im_start|>assistant\nThe answer is"
    )
    ((first, last),) = chat.evidence(sample)
    assert chat.tokenizer.decode(ids[first:last]).strip() == "12345"
    assert chat.stop_tokens == [backend.token_to_id("<eos>"), end]
    begun = PromptEncoder(TextTokenizer(backend, "<eos>", bos_token="<|im_start|>"), "chatml")
    assert begun.encode(sample) == ids, "the template has it already"
    begun = PromptEncoder(TextTokenizer(backend, "<eos>", bos_token="<|im_end|>"), "chatml")
    assert begun.encode(sample) == [end, *ids]
    # The tokenizer's own template, here chatml.
    turns = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    begin = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    own = {"chat_template": turns + begin, "eos_token": "<|im_end|>"}
    same = PromptEncoder(TextTokenizer(backend, "<eos>", settings=own), "tokenizer")
    assert (same.encode(sample), same.evidence(sample), same.stop_tokens) == (
        ids,
        chat.evidence(sample),
        [backend.token_to_id("<eos>"), end],
    )
    several = [{"name": "tools", "template": "x"}, {"name": "default", "template": turns + begin}]
    listed = PromptEncoder(TextTokenizer(backend, "<eos>", settings=own | {"chat_template": several}), "tokenizer")
    assert (listed.encode(sample), listed.key) == (ids, same.key)
    named = own | {"chat_template": "{{ bos_token }}" + turns + begin, "bos_token": "<|im_end|>"}
    assert PromptEncoder(TextTokenizer(backend, "<eos>", settings=named), "tokenizer").encode(sample) == [end, *ids]
    other = PromptEncoder(TextTokenizer(backend, "<eos>", settings=own | {"chat_template": turns}), "tokenizer")
    assert other.key != same.key, "samples and answers under another template are others"
    with pytest.raises(ValueError, match="has no chat template"):
        PromptEncoder(chat.tokenizer, "tokenizer")
    for wrong, said in (("{{ raise_exception('no') }}", "refuses one turn"), ("{{ 1 }}", "a user's turn 0 times")):
        with pytest.raises(ValueError, match=said):
            PromptEncoder(TextTokenizer(backend, "<eos>", settings={"chat_template": wrong}), "tokenizer")
    with pytest.raises(ValueError, match="template=llama3 needs the tokens"):
        PromptEncoder(chat.tokenizer, "llama3")
    with pytest.raises(ValueError, match="choose one of base"):
        PromptEncoder(chat.tokenizer, "alpaca")


def test_every_template_says_what_its_models_were_trained_on():
    markers = {marker for template in TEMPLATES.values() for marker in template.markers}
    backend = train_bpe(iter(["Say it: The answer is"]), 300, "<eos>")
    backend.add_special_tokens(sorted(markers))
    sample, said, ends = Sample("Say it: ", " The answer is ", ["x"]), {}, {}
    for name in TEMPLATES:
        encoder = PromptEncoder(TextTokenizer(backend, "<eos>"), name)
        ids = encoder.encode(sample)
        said[name], ends[name] = encoder.tokenizer.decode(ids), encoder.stop_tokens
        assert {backend.token_to_id(marker) for marker in encoder.template.markers} <= set(ids)
        assert encoder.key == encoder.name == name
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    assert said == {
        "base": "Say it:  The answer is",
        "chatml": "<|im_start|>user\nSay it: <|im_end|>\n<|im_start|>assistant\nThe answer is",
        "llama3": f"<|begin_of_text|>{head.format('user')}Say it: <|eot_id|>{head.format('assistant')}The answer is",
        "mistral": "[INST] Say it:  [/INST]The answer is",
    }
    end, eot = backend.token_to_id("<|im_end|>"), backend.token_to_id("<|eot_id|>")
    eos = backend.token_to_id("<eos>")
    assert ends == {"base": [eos], "chatml": [eos, end], "llama3": [eos, eot], "mistral": [eos]}


def test_held_out_text_is_of_validation_documents_and_of_no_recall_corpus(corpus):
    corpora = {
        "recall": MixedCorpusConfig(source="recall", max_documents=50),
        "toy": MixedCorpusConfig(source="files", files=[str(corpus)]),
    }
    config = MixtureDataConfig(name="mix", seq_len=64, corpora=corpora, validation_fraction=0.2, vocab_size=300)
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    held_out = [text for text in texts if split_of(text, 0.2) == "validation"]
    assert held_out_text(config, 10**9).haystack == tuple(" ".join(held_out).split())
    few = held_out_text(config, 100)
    assert 100 <= len(few.haystack) < 600
    assert few.haystack_name == "held-out text of mix"
    only_recall = MixtureDataConfig(name="mix", seq_len=64, corpora={"recall": corpora["recall"]}, vocab_size=300)
    with pytest.raises(ValueError, match="no held-out text"):
        held_out_text(only_recall, 100)


def test_haystacks_from_files(tmp_path):
    (tmp_path / "PaulGrahamEssays.json").write_text('{"text": "One  two.\\nThree"}')
    (tmp_path / "mine.txt").write_text("One two.")
    essays, mine = read_haystack(tmp_path / "PaulGrahamEssays.json"), read_haystack(tmp_path / "mine.txt")
    assert (essays.haystack, essays.haystack_name) == (("One", "two.", "Three"), None)
    assert mine.haystack_name == "mine.txt"
    (tmp_path / "other.json").write_text('{"text": "One"}')
    assert read_haystack(tmp_path / "other.json").haystack_name == "other.json"  # not the published one
    (tmp_path / "empty.txt").write_text(" ")
    for name, message in (("empty.txt", "is empty"), ("none.txt", "does not exist")):
        with pytest.raises(ValueError, match=message):
            read_haystack(tmp_path / name)
