"""What Hydra makes of a text that we put on a command line: the same text."""

import random
import string
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from experiments.overrides import as_text, override, path_of

ODD = [
    "null",
    "true",
    "1e5",
    "0x10",
    "nan",
    "1_000",
    "[a]",
    "{a:b}",
    "choice(1,2)",
    "a,b",
    "~",
    "",
    " ",
    " a ",
    "a\tb",
    "a\nb",
]
ODD += [
    "Läufe/größer",
    "実験/七",
    "🦙",
    "\u00a0",
    "${x}",
    "\\${x}",
    "\\\\${x}",
    "$",
    "$$",
    "${",
    "a${b",
    "${oc.env:HOME}",
]
ODD += ["'", "''", "\\", "\\\\", "\\'", "a\\", "'\\", '"', "lr=0.1", "a=b=c", "*", "?", "a b"]


def read(text):
    """As a value of a configuration that was composed with it."""
    parsed = OverridesParser.create().parse_override(text)
    assert not parsed.is_sweep_override()
    config = OmegaConf.create({"run_dir": ""})
    OmegaConf.update(config, parsed.key_or_group, parsed.value())
    return config.run_dir


@pytest.mark.parametrize("text", [*string.printable, string.printable, *ODD])
def test_every_text_is_read_as_it_is(text):
    for value in (text, f"outputs/a{text}", f"{text}b", f"a{text}{text}b"):
        assert read(override("run_dir", value)) == value


def test_any_mixture_of_what_is_special_is_read_as_it_is():
    draw = random.Random(0)
    for _ in range(500):
        value = "".join(draw.choice("\\'\"${}[]=, a()") for _ in range(draw.randrange(12)))
        assert read(override("run_dir", value)) == value, value


@pytest.mark.parametrize("value", ["outputs/real_model/real-dash-seed0", "text-dash-knob0.5-seed1", "/data/a_b/c.d"])
def test_what_needs_no_quotes_has_none(value):
    """Records of completed commands are compared as texts."""
    assert override("run_dir", value) == f"run_dir={value}"


@pytest.mark.parametrize("text", ["os, sys", "def f(x): return 'a'", "if x == {1: [2]}:", "'a', 'b'", " x ", *ODD])
def test_what_a_user_writes_is_the_text(text):
    for value in (text, f"{text}: x"):
        if value not in ("null", "''"):
            assert read(as_text(f"prompt={value}", "prompt").replace("prompt", "run_dir", 1)) == value


def test_a_path_is_what_an_override_of_its_key_names():
    assert path_of(override("run", "a b, c"), "run", "init_from") == Path("a b, c")
    assert path_of("init_from=x", "run", "init_from") == Path("x")
    for argument in ("other=x", "run=", "run=null", "run=3", "run=[x]", "run=a,b", "run"):
        assert path_of(argument, "run") is None, argument


@pytest.mark.parametrize("argument", ["prompt=null", "prompt='f(x), y'", 'prompt="f(x), y"', "run=f(x)", "-m"])
def test_what_is_said_in_quotes_or_of_another_key_stays(argument):
    assert as_text(argument, "prompt") == argument
