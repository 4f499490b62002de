"""RULER's needle-in-a-haystack tasks (arXiv 2404.06654, section 3; templates and counts: github.com/NVIDIA/RULER).

Needles "One of the special magic numbers for KEY is: VALUE." stand among noise sentences, among prose, or among other
such needles. Prose (RULER: Paul Graham's essays) is what the material holds. Two departures: where RULER begins every
sample of a set at the same word of the essays, a sample here begins at a word of its own; and sentences are split at
punctuation, not by NLTK's trained model.
"""

from collections.abc import Sequence
from random import Random

from data.tasks.material import Material, distinct, random_pair, sentences
from data.tasks.sample import Draw, Form, Sample, Sized, TextTask, each_sample

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
DEPTHS = [round(100 * i / 39) for i in range(40)]  # per cent of the sentences, where needles can stand in prose
HEAT_DEPTHS = [i / 10 for i in range(11)]  # of the heat map

MANY = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {kind} afterwards.\n{context}\nWhat are all the special magic {kind} for {query} mentioned in the provided "
    "text?",
    " The special magic {kind} for {query} mentioned in the provided text are",
)
ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{kind} afterwards.\n{context}\nWhat is the special magic {kind} for {query} mentioned in the provided text?",
    " The special magic {kind} for {query} mentioned in the provided text is",
)

# haystack, kind of keys, kind of values, keys, values of a key, keys asked for
VARIANTS = {
    "niah_single_1": ("noise", "words", "numbers", 1, 1, 1),
    "niah_single_2": ("prose", "words", "numbers", 1, 1, 1),
    "niah_single_3": ("prose", "words", "uuids", 1, 1, 1),
    "niah_multikey_1": ("prose", "words", "numbers", 4, 1, 1),
    "niah_multikey_2": ("needles", "words", "numbers", 1, 1, 1),
    "niah_multikey_3": ("needles", "uuids", "uuids", 1, 1, 1),
    "niah_multivalue": ("prose", "words", "numbers", 1, 4, 1),
    "niah_multiquery": ("prose", "words", "numbers", 4, 1, 4),
}
VALUES = (1, 2, 4, 8, 16)  # of the one key in niah_values_N: how much of the context an answer needs


def draw_niah(
    material: Material, rng: Random, haystack: str, keys_are: str, values_are: str, keys: int, values: int, asked: int
) -> Draw:
    """One sample; the size counts words of prose, else sentences."""
    names = distinct(rng, keys_are, keys)
    numbers = distinct(rng, values_are, keys * values)
    groups = [numbers[i * values : (i + 1) * values] for i in range(keys)]
    needles = [
        NEEDLE.format(kind=values_are, key=name, value=value)
        for name, group in zip(names, groups, strict=True)
        for value in group
    ]
    queried = rng.sample(range(keys), asked)
    references = [value for i in queried for value in groups[i]]
    evidence = [needles[i * values + j] for i in queried for j in range(values)]
    rng.shuffle(needles)
    depths = sorted(rng.sample(DEPTHS, len(needles)))
    start, child = rng.random(), rng.getrandbits(64)

    def context(size: int) -> str:
        if haystack == "prose":
            return hide_in_prose(material, start, size, needles, [depth / 100 for depth in depths])
        places = Random(child)
        if haystack == "noise":
            hay = [NOISE] * size
        else:
            taken = {*names, *numbers}
            hay = [
                NEEDLE.format(kind=values_are, key=key, value=value)
                for key, value in zip(
                    distinct(places, keys_are, size, taken), distinct(places, values_are, size, taken), strict=True
                )
            ]
        positions = Random(f"{child}/{size}").sample(range(size + len(needles)), len(needles))
        for position, needle in zip(sorted(positions), needles, strict=True):
            hay.insert(position, needle)
        return "\n".join(hay)

    return Sized(lambda size: pose(context(size), values_are, [names[i] for i in queried], references, evidence))


def hide_in_prose(material: Material, start: float, size: int, needles: Sequence[str], depths: Sequence[float]) -> str:
    """``size`` words of the haystack with a needle after the share ``depths[i]`` of its sentences, in order."""
    words = material.haystack
    first = int(start * len(words))
    repeats = 1 + (first + size) // len(words)
    prose = sentences(" ".join((words * repeats)[first : first + size])) if size else []
    parts, last = [], 0
    for depth, needle in zip(depths, needles, strict=True):
        place = int(len(prose) * depth)
        parts += [*prose[last:place], needle]
        last = place
    return " ".join([*parts, *prose[last:]])


def listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + ", and " + names[-1]


def question(context: str, values_are: str, queries: Sequence[str], single: bool) -> tuple[str, str]:
    """The prompt that asks for one value, or for several, and the beginning of its answer."""
    prompt, prefix = ONE if single else MANY
    words = {"kind": values_are.removesuffix("s") if single else values_are, "query": listed(queries)}
    return prompt.format(context=context, **words), prefix.format(**words)


def pose(context: str, values_are: str, queries: list[str], references: list[str], evidence: list[str]) -> Sample:
    """The question about a context."""
    single = len(references) == 1
    depth = context.index(evidence[0]) / max(len(context) - len(evidence[0]), 1) if single else None
    return Sample(*question(context, values_are, queries, single), references, evidence, depth)


def draw_at_depth(material: Material, rng: Random, depth: float) -> Draw:
    """One needle at a given depth of prose, for the heat map."""
    key, (value,) = random_pair(rng), distinct(rng, "numbers", 1)
    needle = NEEDLE.format(kind="numbers", key=key, value=value)
    start = rng.random()

    def make(size: int) -> Sample:
        context = hide_in_prose(material, start, size, [needle], [depth])
        sample = pose(context, "numbers", [key], [value], [needle])
        return Sample(sample.prompt, sample.answer_prefix, [value], [needle], depth)

    return Sized(make)


def _heat_map_draws(material: Material, seed: int):
    index = 0
    while True:
        depth = HEAT_DEPTHS[index % len(HEAT_DEPTHS)]
        yield draw_at_depth(material, Random(f"niah/{seed}/{index}"), depth)
        index += 1


def niah_task(name: str, variant: tuple) -> TextTask:
    form = Form(each_sample(name, lambda material, rng: draw_niah(material, rng, *variant)))
    return TextTask(name, "all", 128, lambda length: [form], needs="haystack" if variant[0] == "prose" else None)


NIAH = [niah_task(name, variant) for name, variant in VARIANTS.items()]
NIAH_VALUES = [niah_task(f"niah_values_{n}", ("prose", "words", "numbers", 1, n, 1)) for n in VALUES]
HEAT_MAP = TextTask("niah", "all", 32, lambda length: [Form(_heat_map_draws)], needs="haystack")
