"""What the fields of a configuration may hold: said by their types, checked whenever one is made.

    @dataclass
    class OptimConfig(Checked, at="optim"):
        lr: PositiveFloat = MISSING
        schedule: Annotated[str, OneOf(SCHEDULES)] = "cosine"
        warmup_steps: NonNegativeInt = 0

A field of numbers or text has one of the types below, or ``Annotated`` with a rule of its own; a plain ``int``,
``float`` or ``str``, which would take anything, ends in a TypeError when the first such configuration is made. NaN and
infinity are in no range.
"""

import os
import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

MISSING = "???"  # a value that is still to come, as OmegaConf spells it
MOST_INT = 2**31 - 1  # of sizes and counts, which tensors and kernels index
MOST_LONG = 2**63 - 1
LEAST_FLOAT, MOST_FLOAT = 2.0**-126, 2.0**127  # beyond them float32 has 0, a denormal or infinity


class Rule:
    """What an annotation can hold. ``phrase`` ends the sentence "NAME must be ..."."""

    phrase: str

    def holds(self, value: Any) -> bool:
        raise NotImplementedError

    def check(self, name: str, value: Any) -> None:
        if not self.holds(value):
            raise ValueError(f"{name} must be {self.phrase}; got {value!r}")


@dataclass(frozen=True)
class Range(Rule):
    """Numbers from ``least`` to ``most``, without those in ``but``. ``kind`` float takes integers, too."""

    kind: type
    least: float
    most: float
    phrase: str
    but: tuple[float, ...] = ()

    def holds(self, value):
        if isinstance(value, bool) or not isinstance(value, int if self.kind is int else (int, float)):
            return False
        return self.least <= value <= self.most and value not in self.but


@dataclass(frozen=True)
class OneOf(Rule):
    """One of a few values."""

    choices: tuple

    @property
    def phrase(self):
        return f"one of {', '.join(map(str, self.choices))}"

    def holds(self, value):
        return type(value) in map(type, self.choices) and value in self.choices


@dataclass(frozen=True)
class Pattern(Rule):
    """Text that a regular expression matches as a whole."""

    expression: str
    phrase: str

    def holds(self, value):
        return isinstance(value, str) and re.fullmatch(self.expression, value, re.DOTALL) is not None


POSITIVE_INT = Range(int, 1, MOST_INT, "a positive integer, below 2**31")
NON_NEGATIVE_INT = Range(int, 0, MOST_INT, "an integer of at least 0, below 2**31")
POSITIVE = Range(float, LEAST_FLOAT, MOST_FLOAT, "a positive finite number, in float32")
NON_NEGATIVE = Range(float, 0, MOST_FLOAT, "a finite number of at least 0, in float32")

PositiveInt = Annotated[int, POSITIVE_INT]
NonNegativeInt = Annotated[int, NON_NEGATIVE_INT]
PositiveLong = Annotated[int, Range(int, 1, MOST_LONG, "a positive integer, below 2**63")]  # bytes, documents
Seed = Annotated[int, Range(int, 0, MOST_LONG, "an integer of at least 0, below 2**63")]
Threads = Annotated[int, Range(int, 1, 1024, "a number of threads from 1 to 1024")]
PositiveFloat = Annotated[float, POSITIVE]
NonNegativeFloat = Annotated[float, NON_NEGATIVE]
Share = Annotated[float, Range(float, 0, 1, "a share between 0 and 1")]
PositiveShare = Annotated[float, Range(float, 0, 1, "a share in (0, 1]", but=(0,))]
Sparsity = Annotated[float, Range(float, 0, 1, "a share of the keys in [0, 1), such as 0.75", but=(1,))]
AnyText = Annotated[str, Pattern(r".*", "a text")]
Text = Annotated[str, Pattern(r"[^\0]*[^\0\s][^\0]*", "a text that is not empty")]
# Of a line, as names, labels and paths are: what no terminal, table or file name can show stands in none.
_LINE = r"[^\0-\x1f\x7f]*[^\0-\x1f\x7f\s][^\0-\x1f\x7f]*"
Line = Annotated[str, Pattern(_LINE, "a line of text that is not empty")]
UserPath = Annotated[str, Pattern(_LINE, "a path, where ~ is your home")]  # stays as it was given; see ``user_path``


def user_path(given: str | os.PathLike) -> Path:
    """Where a path leads that a user gave: ``~`` or ``~NAME`` in front is a home. Nothing else in it is looked up, and
    ``$`` is a letter.

    Raises:
        ValueError: there is no such home.
    """
    path = os.path.expanduser(given)
    if path.startswith("~"):
        raise ValueError(f"{given}: no home is known for {path.split(os.sep)[0]}; give the path from / on")
    return Path(path)


class Checked:
    """Base of configurations: a dataclass whose values are what the types of its fields say.

    Args:
        at: where in a whole configuration it stands, for the messages; subclasses inherit it.

    Raises ValueError that names the field, what it may hold and what it was given.
    """

    _at = ""

    def __init_subclass__(cls, at: str | None = None, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        if at is not None:
            cls._at = f"{at}."

    def __post_init__(self) -> None:
        for name, hint in field_types(type(self)).items():
            if getattr(self, name) != MISSING:
                _check(f"{self._at}{name}", getattr(self, name), hint)


@cache
def field_types(schema: type) -> dict[str, Any]:
    """The types of a configuration's fields with their rules. TypeError where one says nothing about its values."""
    hints = get_type_hints(schema, include_extras=True)
    for field in fields(schema):
        if any(bare in (int, float, str) for bare in _leaves(hints[field.name])):
            raise TypeError(
                f"{schema.__name__}.{field.name}: {hints[field.name]} takes any value, NaN and '' too. Give it a type "
                "that says what it may be: PositiveInt, NonNegativeFloat, Share, Seed, Line, UserPath ... of "
                "dashattn/fields.py, or Annotated[...] with a rule of its own"
            )
    return {field.name: hints[field.name] for field in fields(schema)}


def _leaves(hint: Any) -> Iterator[Any]:
    """The parts of a type that hold values, unless a rule is said for them."""
    if get_origin(hint) is Annotated:
        return
    arguments = get_args(hint)
    if arguments:
        for argument in arguments:
            yield from _leaves(argument)
    else:
        yield hint


def _check(name: str, value: Any, hint: Any) -> None:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        for rule in hint.__metadata__:
            rule.check(name, value)
    elif origin in (Union, types.UnionType):
        if value is not None:
            (of_value,) = (argument for argument in arguments if argument is not type(None))
            _check(name, value, of_value)
    elif origin is list:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{name} must be a list; got {value!r}")
        for index, element in enumerate(value):
            _check(f"{name}[{index}]", element, arguments[0])
    elif origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{name} must be a mapping; got {value!r}")
        for key, element in value.items():
            _check(f"a key of {name}", key, arguments[0])
            _check(f"{name}.{key}", element, arguments[1])
    elif hint is bool or is_dataclass(hint):
        if not isinstance(value, hint):
            raise ValueError(f"{name} must be {'true or false' if hint is bool else hint.__name__}; got {value!r}")
    else:
        assert hint is Any, hint
