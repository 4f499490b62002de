"""RULER's variable tracking (arXiv 2404.06654, section 3.2; template and counts: github.com/NVIDIA/RULER).

One chain of five assignments, VAR A = 12345, VAR B = VAR A, ..., among noise sentences; asked for are all variables
that hold the value. A solved example with names of three letters goes before. RULER's answer prefix ends in a space,
which byte-pair tokenizers have at the beginning of the next token: left out here; and it spells "assgined".
"""

import string
from itertools import pairwise
from random import Random

from data.tasks.material import Material
from data.tasks.niah import NOISE
from data.tasks.sample import Draw, Form, Sample, Sized, TextTask, each_sample

HOPS = 4
PROMPT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: Find "
    "all variables that are assigned the value {value} in the text above."
)
PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned the "
    "value {value}, they are:"
)
EXAMPLE_NOISE = 5  # sentences of the example, where they fit


def chain(rng: Random, letters: int, hops: int = HOPS) -> tuple[list[str], str, list[str]]:
    """Variables, the value, and the assignments."""
    names: dict[str, None] = {}
    while len(names) < hops + 1:
        names["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
    variables, value = list(names), str(rng.randint(10_000, 99_999))
    lines = [f"VAR {variables[0]} = {value}"]
    lines += [f"VAR {new} = VAR {old} " for old, new in pairwise(variables)]
    return variables, value, lines


def _context(rng: Random, lines: list[str], noise: int) -> str:
    """The assignments, in order, at random places among ``noise`` sentences."""
    text = [NOISE] * noise
    for place, line in zip(sorted(rng.sample(range(noise + len(lines)), len(lines))), lines, strict=True):
        text.insert(place, line)
    return "\n".join(text)


def question(context: str, value: str, count: int) -> tuple[str, str]:
    """The prompt that asks for the ``count`` variables of a value, and the beginning of its answer."""
    return PROMPT.format(context=context, value=value), PREFIX.format(count=count, value=value)


def _draw(rng: Random, example_noise: int | None) -> Draw:
    example = ""
    if example_noise is not None:
        variables, value, lines = chain(rng, letters=3)
        context = _context(rng, lines, example_noise)
        example = f"{''.join(question(context, value, HOPS + 1))} {' '.join(variables)}\n\n"
    variables, value, lines = chain(rng, letters=5)
    child = rng.getrandbits(64)

    def make(size: int) -> Sample:
        context = _context(Random(f"{child}/{size}"), lines, size)
        prompt, prefix = question(context, value, HOPS + 1)
        return Sample(example + prompt, prefix, variables, list(lines))

    return Sized(make)


def _form(example_noise: int | None) -> Form:
    differs = None
    if example_noise is None:
        differs = "no example"
    elif example_noise != EXAMPLE_NOISE:
        differs = f"example with {example_noise} noise sentences"

    def make(material: Material, rng: Random) -> Draw:
        return _draw(rng, example_noise)

    return Form(each_sample("vt", make), differs)


TRACKING = TextTask("vt", "all", 30, lambda length: [_form(noise) for noise in (EXAMPLE_NOISE, 2, 0, None)])
