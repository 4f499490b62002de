"""Generated documents that state facts and then ask for each of them once, in the forms that long-context tasks use.

json         one object of random keys and values, then `Key: ... Value: ...` (as in HELMET, arXiv 2410.02694)
numbers      a magic number for each of many names, among sentences that say nothing (as in RULER, arXiv 2404.06654)
assignments  variables that hold numbers or other variables, then all that hold a number (RULER's variable tracking)

Document i of a seed depends on nothing else, so that any document can be generated at any time.
"""

import itertools
import random

RECALL_VERSION = 1  # raise it when a document changes

_ADJECTIVES = """
amber ancient bitter bright broad calm clever cold crimson curious distant dusty early eager faint fierce gentle
golden hidden hollow humble icy jolly keen late lively lonely mellow modest narrow noble odd pale patient plain proud
quiet rapid rare rough royal rusty secret shallow sharp silent silver simple slender small solemn steady stormy subtle
swift tender tidy urban vivid warm wild wise young
"""
_NOUNS = """
anchor arrow badge barrel basket beacon bell bottle bridge bucket cabin candle canyon carpet castle chimney circle
cloud compass copper cradle desert dragon engine falcon feather forest fountain garden glacier hammer harbor island
jacket kettle ladder lantern lemon magnet marble meadow mirror mountain needle ocean orchard paddle pencil piano
pillow planet quarry ribbon river saddle shadow signal spoon stable statue temple thunder tunnel valley violin window
"""
ADJECTIVES, NOUNS = _ADJECTIVES.split(), _NOUNS.split()
SENTENCES = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
    "The road goes on.",
    "Nothing else is said here.",
    "The wind comes from the west.",
    "Some of it was written long ago.",
)


def recall_document(seed: int, index: int, facts_min: int, facts_max: int) -> str:
    """Document `index` of `seed`, with facts_min to facts_max facts (uniform) and as many questions, shuffled."""
    generator = random.Random(f"recall {seed} {index}")
    form = generator.choice((_json, _numbers, _assignments))
    return form(generator, generator.randint(facts_min, facts_max))


def _shuffled(generator: random.Random, items: list) -> list:
    return generator.sample(items, len(items))


def _different(draw, count: int) -> list[str]:
    """The first `count` different strings that `draw` gives."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw()] = None
    return list(found)


def _json(generator: random.Random, facts: int) -> str:
    keys = _different(lambda: f"{generator.getrandbits(32):08x}", facts)
    pairs = {key: f"{generator.getrandbits(32):08x}" for key in keys}
    stated = ",\n ".join(f'"{key}": "{value}"' for key, value in pairs.items())
    asked = "\n".join(f'Key: "{key}" Value: "{pairs[key]}"' for key in _shuffled(generator, keys))
    return f"{{{stated}}}\n\n{asked}\n"


def _numbers(generator: random.Random, facts: int) -> str:
    def draw() -> str:
        # A number keeps the names apart however many there are.
        return f"{generator.choice(ADJECTIVES)} {generator.choice(NOUNS)} {generator.randint(1, 99)}"

    names = _different(draw, facts)
    numbers = {name: generator.randint(1_000_000, 9_999_999) for name in names}
    sentences = []
    for name in names:
        sentences += generator.choices(SENTENCES, k=generator.randint(0, 3))
        sentences.append(f"One of the special magic numbers for {name} is: {numbers[name]}.")
    asked = [f"The special magic number for {name} is {numbers[name]}." for name in _shuffled(generator, names)]
    return f"{' '.join(sentences)}\n\n" + "\n".join(asked) + "\n"


def _assignments(generator: random.Random, facts: int) -> str:
    def draw() -> str:
        return "".join(generator.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5))

    names = _different(draw, facts)
    numbers = _different(lambda: str(generator.randint(10_000, 99_999)), -(-facts // 4))
    held_by: dict[str, list[str]] = {number: [] for number in numbers}
    lines = []
    # Each number is held by a name of its own; every further name takes over what an earlier one of any number holds.
    for name, number in itertools.zip_longest(names, numbers):
        number = number or generator.choice(numbers)
        source = f"VAR {generator.choice(held_by[number])}" if held_by[number] else number
        held_by[number].append(name)
        lines.append(f"VAR {name} = {source}")
    asked = [f"{number} is the value of: {' '.join(held_by[number])}" for number in _shuffled(generator, numbers)]
    return "\n".join(lines) + "\n\n" + "\n".join(asked) + "\n"
