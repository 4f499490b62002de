"""Recall from JSON, as HELMET poses it (arXiv 2410.02694; template: github.com/princeton-nlp/HELMET, which has it from
Lost in the Middle, arXiv 2307.03172): one object of random keys and values (UUIDs), two solved examples from it, and a
key whose value is asked for. Made for base models: no instruction has to be followed, only a pattern.
"""

import json
from random import Random

from data.tasks.material import Material, distinct
from data.tasks.sample import Draw, Form, Sample, Sized, TextTask, each_sample

INSTRUCTION = "Extract the value corresponding to the specified key in the JSON object below."
EXAMPLES = 2


def solved(key: str, value: str) -> str:
    """A question with its answer."""
    return f"Key: {key}\nCorresponding value: {value}\n\n"


def _draw(rng: Random, examples: int) -> Draw:
    child, place, asked = rng.getrandbits(64), rng.random(), rng.getrandbits(64)

    def make(size: int) -> Sample:
        ids = distinct(Random(child), "uuids", 2 * size)  # of a larger size, these and more
        pairs = list(zip(ids[::2], ids[1::2], strict=True))
        target = int(place * size)
        key, value = pairs[target]
        others = Random(asked).sample([i for i in range(size) if i != target], examples)
        shown = "".join(solved(*pairs[i]) for i in others)
        context = json.dumps(dict(pairs))
        line = f'"{key}": "{value}"'
        return Sample(
            f"{context}\n\n{INSTRUCTION}\n\n{shown}Key: {key}",
            "\nCorresponding value:",
            [value],
            [line],
            context.index(line) / max(len(context) - len(line), 1),
        )

    return Sized(make, least=examples + 1)


def _form(examples: int) -> Form:
    def make(material: Material, rng: Random) -> Draw:
        return _draw(rng, examples)

    return Form(each_sample("json_kv", make), None if examples == EXAMPLES else f"{examples} solved examples")


JSON_KV = TextTask("json_kv", "all", 64, lambda length: [_form(examples) for examples in (EXAMPLES, 1, 0)])
