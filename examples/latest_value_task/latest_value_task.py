"""A task from outside the tree: a list in which everybody's number is stated again and again, and the latest holds.

    pip install --no-build-isolation --no-deps --editable examples/latest_value_task
    python evaluate.py run=outputs/debug-dash tasks=[latest_value] lengths=[1024] rows=8

A router that finds some line about a name has not yet found the right one. As many lines are shown as fit into the
length: evaluate.py asks for one size after another.
"""

from random import Random

from data.tasks.material import Material
from data.tasks.sample import Draw, Form, Sample, Sized, TextTask, each_sample

NAMES = ("Ada", "Bela", "Carl", "Dora", "Emil", "Frida", "Gert", "Hanna")


def _draw(material: Material, rng: Random) -> Draw:
    """A sample that waits for its number of lines. All that is random is drawn before, so that those of a larger size
    begin with the same ones."""
    lines_seed, place = rng.getrandbits(64), rng.random()

    def make(size: int) -> Sample:
        lines_rng = Random(lines_seed)
        lines, numbers, latest = [], set(), {}
        for _ in range(size):
            name, number = lines_rng.choice(NAMES), lines_rng.randrange(100_000, 1_000_000)
            while number in numbers:  # none comes twice
                number = lines_rng.randrange(100_000, 1_000_000)
            numbers.add(number)
            lines.append(f"The number of {name} is {number}.")
            latest[name] = (lines[-1], number)
        names = sorted(latest)
        name = names[int(place * len(names))]
        line, number = latest[name]
        text = "\n".join(lines)
        return Sample(
            prompt=f"Numbers change, and the latest one holds.\n\n{text}\n\nWhat is the number of {name} now?",
            answer_prefix=f" The number of {name} is",
            references=[str(number)],
            evidence=[line],
            depth=text.index(line) / max(len(text) - len(line), 1),
        )

    return Sized(make, least=2, most=100_000)


TASK = TextTask(
    name="latest_value",  # as the entry point is called
    match="all",  # the answer contains all references
    max_new_tokens=16,
    forms=lambda length: [Form(each_sample("latest_value", _draw))],
)
