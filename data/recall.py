"""Generated documents that state facts and then ask for some of them, in the very words of the tasks that a small model
is to be asked (``data/tasks``): only there does it learn what a question is. Their names and numbers are drawn anew.

pairs     letters, words or numbers, each followed by what followed it before: short and dense
json      one object of random keys and values, then solved examples as json_kv shows them
needles   magic numbers or uuids among noise, words or other needles, then RULER's questions, one value or several
chains    RULER's variable tracking, a chain for each question
counts    RULER's common or frequent words, one question

What is merely repeated, in pairs and in the share of json and needles that recites facts as they were stated, is there
for the heads that copy: they form on it, and questions need them.

Document i of a seed depends on nothing else, so that any document can be generated at any time.
"""

import json
import random
import string

from data.tasks import niah, tracing
from data.tasks.aggregation import COMMON_WORDS, FREQUENT_WORDS
from data.tasks.json_kv import INSTRUCTION, solved
from data.tasks.material import Material, all_words, distinct
from data.tasks.niah import NEEDLE, NOISE

RECALL_VERSION = 2  # raise it when a document changes

FORMS = {"pairs": 10, "json": 3, "needles": 4, "chains": 2, "counts": 1}  # how often each comes
RECITED = 0.3
REPEATS = 4  # of a pair


def recall_document(seed: int, index: int, facts_min: int, facts_max: int, hay_max: int) -> str:
    """Document ``index`` of ``seed``, which asks for facts_min to facts_max facts (uniform) among at most ``hay_max``
    sentences that are not asked for (few as often as many: log-uniform)."""
    rng = random.Random(f"recall {seed} {index}")
    (form,) = rng.choices(list(FORMS), FORMS.values())
    facts = rng.randint(facts_min, facts_max)
    hay = int((hay_max + 2) ** rng.random()) - 1
    make = {"pairs": _pairs, "json": _json, "needles": _needles, "chains": _chains, "counts": _counts}[form]
    return make(rng, facts, hay)


def _pairs(rng: random.Random, facts: int, hay: int) -> str:
    names, values = (_short(rng, 2 + facts) for _ in range(2))
    pairs = [f"{name} {value}" for name, value in zip(names, values, strict=True)]
    return " ".join(pairs + rng.choices(pairs, k=REPEATS * len(pairs))) + "\n"


def _short(rng: random.Random, count: int) -> list[str]:
    """Different letters, words or numbers, of a kind of which there are as many."""
    kinds = (string.ascii_uppercase, all_words(), range(10, max(100, 10 + count)))
    kind = rng.choice([kind for kind in kinds if len(kind) >= count])
    return [str(item) for item in rng.sample(kind, count)]


def _json(rng: random.Random, facts: int, hay: int) -> str:
    ids = distinct(rng, "uuids", 2 * (facts + hay // 3))  # a pair is as long as three sentences
    pairs = list(zip(ids[::2], ids[1::2], strict=True))
    asked = rng.sample(pairs, facts)
    if rng.random() < RECITED:
        return f"{json.dumps(dict(pairs))}\n\n{json.dumps(dict(asked))}\n"
    return f"{json.dumps(dict(pairs))}\n\n{INSTRUCTION}\n\n{''.join(solved(*pair) for pair in asked)}"


def _needles(rng: random.Random, facts: int, hay: int) -> str:
    kind = rng.choices(("numbers", "uuids"), (3, 1))[0]
    keys_are = "words" if kind == "numbers" else rng.choice(("words", "uuids"))
    most = rng.choice((1, 1, 4))  # values of a key
    groups: list[list[str]] = []
    while left := facts - sum(map(len, groups)):
        groups.append(distinct(rng, kind, rng.randint(1, min(most, left))))
    names = distinct(rng, keys_are, len(groups))
    held = dict(zip(names, groups, strict=True))
    stated = [NEEDLE.format(kind=kind, key=name, value=value) for name in names for value in held[name]]

    hidden_in = rng.choice(("noise", "words", "needles"))
    if hidden_in == "needles":
        others = zip(distinct(rng, keys_are, hay, set(names)), distinct(rng, kind, hay), strict=True)
        lines = _shuffled(rng, stated + [NEEDLE.format(kind=kind, key=name, value=value) for name, value in others])
    else:
        lines = [NOISE if hidden_in == "noise" else _words(rng) for _ in range(hay)]
        for sentence in stated:
            lines.insert(rng.randint(0, len(lines)), sentence)
    between = " " if hidden_in == "words" else "\n"
    context = between.join(lines)
    if rng.random() < RECITED:
        return f"{context}\n\n{between.join(rng.sample(stated, len(stated)))}\n"

    asked = _shuffled(rng, names)
    if most == 1 and rng.random() < 0.7:
        questions = [[name] for name in asked]
    else:
        size = rng.randint(1, 4)
        questions = [asked[i : i + size] for i in range(0, len(asked), size)]
    text = ""
    for number, question in enumerate(questions):
        values = [value for name in question for value in sorted(held[name], key=context.index)]
        prompt, prefix = niah.question(context, kind, question, len(values) == 1)
        text += f"{_once(number, prompt, context)}{prefix} {niah.listed(values)}.\n"
    return text


def _chains(rng: random.Random, facts: int, hay: int) -> str:
    chains = [tracing.chain(rng, 5, rng.choice((1, 2, 4))) for _ in range(-(-facts // 4))]
    lines = [NOISE] * hay
    for _, _, links in chains:
        places = sorted(rng.randint(0, len(lines)) for _ in links)
        for shift, (place, link) in enumerate(zip(places, links, strict=True)):
            lines.insert(place + shift, link)
    context = "\n".join(lines)
    text = ""
    for number, (names, value, _) in enumerate(_shuffled(rng, chains)):
        prompt, prefix = tracing.question(context, value, len(names))
        text += f"{_once(number, prompt, context)}{prefix} {' '.join(names)}\n"
    return text


def _once(number: int, prompt: str, context: str) -> str:
    """All of a document's first prompt; of the others what follows the context, which stands once."""
    return prompt.partition(f"{context}\n")[2] if number else prompt


def _counts(rng: random.Random, facts: int, hay: int) -> str:
    """A list of up to ``hay`` words beside the common ones, or a coded text of ten times as many."""
    task, length, size = rng.choice(((COMMON_WORDS, 512, hay), (FREQUENT_WORDS, 1024, 100 + 10 * hay)))
    (form, *_) = task.forms(length)
    draw = next(form.draws(Material(), rng.getrandbits(32)))
    sample = draw(max(size, draw.least))
    answer = sample.references
    if task is COMMON_WORDS:
        answer = [f"{number}. {word}" for number, word in enumerate(answer, start=1)]
    return f"{sample.prompt}{sample.answer_prefix} {' '.join(answer)}\n"


def _words(rng: random.Random) -> str:
    return f"{' '.join(rng.choices(all_words(), k=rng.randint(4, 12)))}.".capitalize()


def _shuffled(rng: random.Random, items: list) -> list:
    return rng.sample(items, len(items))
