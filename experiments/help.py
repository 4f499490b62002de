"""``--help`` and advice on overrides, from configs/ and the source alone: nobody waits for PyTorch, Hydra and the
composition of all values."""

import difflib
import os
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from string import Template

import yaml

from experiments.files import CONFIGS
from experiments.own_configs import wrong_file
from experiments.schema_source import REQUIRED, Option, Schema, schema_of_choice, spell
from experiments.signals import end_silently

# The schema of each configs/NAME.yaml, as it registers it.
SCHEMAS = {
    "train": Schema("experiments.config", "TrainConfig"),
    "evaluate": Schema("experiments.evaluation.config", "EvaluateConfig"),
    "generate": Schema("experiments.evaluation.generate", "GenerateConfig"),
    "sweep": Schema("experiments.sweep.cells", "SweepConfig"),
    "speed": Schema("experiments.speed.config", "SpeedConfig"),
    "throughput": Schema("experiments.throughput.steps", "ThroughputConfig"),
    "scaling": Schema("experiments.throughput.scaling", "ParallelConfig"),
    "plan": Schema("experiments.plan", "PlanConfig"),
}
_CHOICE_SCHEMAS = "experiments.config"  # registers those of the groups' choices
_TAKE_A_VALUE = ("-c", "--cfg", "-p", "--package", "-i", "--info", "--experimental-rerun")  # of Hydra's options
_WIDTH = 118


def answer_help(config_name: str) -> None:
    """End the process with the help of configs/NAME.yaml if the command line asks for it, or with what is wrong with
    the names in it; and without a word on Ctrl-C, until there is something to say about it.

    Called before the imports that take long, by what is started as NAME. Hydra's own help explains no value.
    """
    end_silently()
    arguments = sys.argv[1:]
    if {"-h", "--help"}.intersection(arguments):
        show(help_page(config_name, arguments))
        raise SystemExit
    wrong = advice(config_name, arguments)
    if wrong is not None:
        print(f"error: {wrong}", file=sys.stderr)
        raise SystemExit(1)


def show(page: str) -> None:
    """Print what may be longer than what reads it, ``head`` say, wants to know."""
    try:
        print(page, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end


def help_page(config_name: str, overrides: Sequence[str] = ()) -> str:
    """Hydra's template, with the groups and their choices, the default first; then every option. Of a group whose
    choice is among the overrides that choice's alone, of others those of all kinds."""
    command = Command(config_name, overrides)
    groups = ""
    for group, default in command.groups.items():
        choices = sorted(command.choices(group), key=lambda choice, d=default: choice != (d or "null"))
        groups += f"  {group}: {_listed([*choices, *sorted(_of_packages(group))])}\n"
    template = _read(Path(CONFIGS, f"{config_name}.yaml"))["hydra"]["help"]["template"]
    page = [
        Template(template).substitute(APP_CONFIG_GROUPS=groups.rstrip()).rstrip(),
        "",
        "Options (key=value, the default):",
        "",
    ]
    page += _explain(command.schema, "", command.values, skip=set(command.groups))
    for group in command.groups:
        page += _explain_group(command, group)
    return "\n".join(page)


def advice(config_name: str, overrides: Sequence[str]) -> str | None:
    """What is wrong with overrides, and what was meant: with names, with a word that is no override, or that stands
    where a list or an integer belongs. None where nothing is, or only Hydra can tell.

    Names behind ``+``, in ``hydra.*`` and of another configuration (``--config-name``) are left to Hydra, but for what
    its own files would end in.
    """
    if any(
        argument.startswith(("-cn", "--config-name", "-cp", "--config-path", "-cd", "--config-dir"))
        for argument in overrides
    ):
        return wrong_file(overrides)
    if config_name == "plan":  # what is none of its own is of what is planned
        own = SCHEMAS["plan"].options()
        others = [override for override in overrides if override.partition("=")[0] not in own]
        return advice("sweep" if any(other.startswith("sweep=") for other in others) else "train", others)
    command = Command(config_name, overrides)
    before = ""
    for override in overrides:
        if "=" not in override and before not in _TAKE_A_VALUE:
            wrong = command.wrong_word(override)
            if wrong is not None:
                return wrong
        before = override
        found = re.fullmatch(r"([A-Za-z_][\w./-]*)=(.*)", override, re.DOTALL)
        if found is None or found[1].split(".")[0].split("/")[0] == "hydra":
            continue
        wrong = command.wrong_with(*found.groups())
        if wrong is not None:
            return wrong
    return None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message about ``word``, which is none of ``known``: those that look like it; nothing without any."""
    close = difflib.get_close_matches(word, list(dict.fromkeys(known)), n=3, cutoff=0.6)
    return f": did you mean {' or '.join(close)}?" if close else ""


def _wrong_value(key: str, value: str, kind: str) -> str | None:
    """What Hydra would say of grammar and types: keys in quotes; a word where a list or a number belongs."""
    if re.match(r"\{(.*,)?\s*([\"'])[^\"']*\2\s*:", value, re.DOTALL):
        return f"{key}: keys of a mapping take no quotes on a command line, as in {{*:full}}"
    is_list, words = kind.startswith("a list"), r"[\w.+/-]+(, *[\w.+/-]+)*"
    inside = re.fullmatch(rf"\[({words})\]", value)
    if is_list and inside:
        each = kind.partition("of each: ")[2]
        wrong = [f"{key}[{i}]: {word}" for i, word in enumerate(re.split(", *", inside[1])) if _is_none(word, each)]
        return f"{wrong[0].replace(':', f' must be {each}; got', 1)}" if wrong else None
    if not re.fullmatch(words, value) or (is_list and value == "null"):
        return None
    if is_list:
        return f"{key} is a list: did you mean {key}=[{value}]?"
    return f"{key} must be {kind}; got {value}" if "," not in value and _is_none(value, kind) else None


_NUMBER = re.compile(r"(above|at least|between|from|in|hours|a( positive)?( finite)?( number| share))\b")
_TRUTHS = {"true", "false", "yes", "no", "on", "off", "y", "n", "1", "0"}


def _is_none(word: str, kind: str) -> bool:
    """Whether a word is of another type than what is explained so."""
    if word == "null":
        return kind != "" and not kind.endswith("or null")
    if "integer" in kind:
        return not re.fullmatch(r"[+-]?\d[\d_]*", word)
    if kind.startswith("true or false"):
        return word.lower() not in _TRUTHS
    if not _NUMBER.match(kind):
        return False
    try:
        float(word)
    except ValueError:
        return True
    return False


def _of_packages(group: str) -> set[str]:
    """Choices that installed packages bring."""
    return entry_points(group="dashattn.backends").names if group == "attention" else set()


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


class Command:
    """A configuration, its groups, and what the overrides choose of them."""

    def __init__(self, config_name: str, overrides: Sequence[str]):
        self.schema = SCHEMAS[config_name]
        config = _read(Path(CONFIGS, f"{config_name}.yaml"))
        self.values = {key: value for key, value in config.items() if key not in ("defaults", "hydra")}
        self.groups: dict[str, str | None] = {}
        for entry in config["defaults"]:
            if isinstance(entry, dict):
                self.groups |= {group: str(c) if c else None for group, c in entry.items() if " " not in group}
        self.given, self.keys = {}, {override.partition("=")[0] for override in overrides}
        for override in overrides:
            group, _, choice = override.partition("=")
            if group in self.groups:
                self.given[group] = choice
        self.chosen = self.groups | self.given
        for group in self.groups.keys() & {"experiment", "sweep"}:  # a file that composes groups and sets values
            name = self.chosen.get(group)
            for file in _chain(group, name) if name in self.choices(group) else []:
                for entry in file.get("defaults", []):
                    for key, choice in entry.items() if isinstance(entry, dict) else ():
                        overridden = key.removeprefix("override ").lstrip("/")
                        if overridden not in self.given:
                            self.chosen[overridden] = choice
                self.values = _merged(self.values, {k: v for k, v in file.items() if k != "defaults"})

    def choices(self, group: str) -> list[str]:
        choices = sorted(file.stem for file in Path(CONFIGS, group).glob("*.yaml"))
        return choices if self.groups[group] == REQUIRED else choices + ["null"] * (self.groups[group] is None)

    def schema_of(self, group: str, choice: str) -> Schema | None:
        """Of what a choice of a group holds; None for those that set values of the whole configuration."""
        for entry in _read(Path(CONFIGS, group, f"{choice}.yaml")).get("defaults", []):
            if isinstance(entry, str) and entry.endswith("_schema"):
                return schema_of_choice(_CHOICE_SCHEMAS, entry)
            if isinstance(entry, str) and entry != "_self_" and group not in ("experiment", "sweep"):
                return self.schema_of(group, entry)
        return None

    def kinds(self, group: str) -> dict[Schema, list[str]]:
        """The schemas that a group's choices have, each with these choices."""
        kinds: dict[Schema, list[str]] = {}
        for choice in self.choices(group):
            schema = None if choice == "null" else self.schema_of(group, choice)
            if schema is not None:
                kinds.setdefault(schema, []).append(choice)
        return kinds

    def wrong_with(self, key: str, value: str) -> str | None:
        first, *rest = key.split(".")
        if key in self.groups:
            return self._wrong_choices(key, value)
        options = self.schema.options()
        if "/" in key or (first not in options and first not in self.groups):
            return self._unknown(key)
        if not rest:
            return _wrong_value(key, value, options[first].kind)
        if options[first].is_open:
            return None
        if first in self.groups:
            return self._wrong_in_group(first, rest, value)
        return self._wrong_below(options[first], rest, first, self.values.get(first))

    def wrong_word(self, word: str) -> str | None:
        """What is wrong with an argument that has no value."""
        name = word.lstrip("-")
        if word.startswith("--") and name in {*self.schema.options(), *self.groups} - {"run"}:  # Hydra has a --run
            return f"{word} does not exist: a setting has no dashes, and its value behind =, as in {name}=..."
        if not word or word[0] in "-~":
            return None
        known = self.keys | self.values.keys() | self.groups.keys()
        missing = [k for k, option in self.schema.options().items() if option.default == REQUIRED and k not in known]
        meant = [f"{group}={word}" for group in self.groups if word in self.choices(group)]
        meant = meant or [f"{key}={word}" for key in missing if len(missing) == 1]
        return f"{word} is no setting" + (f": did you mean {' or '.join(meant)}?" if meant else "; these are key=value")

    def _wrong_choices(self, group: str, value: str) -> str | None:
        if not re.fullmatch(r"[\w,\"' -]*", value):
            return None  # a list, a glob: Hydra's
        known = self.choices(group)
        for choice in (part.strip("\"' ") for part in value.split(",")):
            if choice == "null" and choice in known:  # which Hydra takes for a default alone
                return f"{group}=null: nothing is chosen unless you choose, so leave it out"
            if choice in ("", *known) or choice in _of_packages(group):
                continue
            return f"{group}={choice} does not exist" + (
                did_you_mean(choice, (*known, *_of_packages(group))) or f": choose from {_listed(known)}"
            )
        return None

    def _wrong_in_group(self, group: str, path: list[str], value: str) -> str | None:
        choice = self.chosen[group]
        if choice is not None and choice not in self.choices(group):
            return None  # several, or of another package
        name = ".".join((group, *path))
        schema = None if choice in (None, "null") else self.schema_of(group, choice)
        own = {} if schema is None else schema.options()
        if path[0] in own:
            if path[1:] == []:
                return _wrong_value(name, value, own[path[0]].kind)
            values = {} if schema is None else _values(group, choice)
            return self._wrong_below(own[path[0]], path[1:], f"{group}.{path[0]}", values.get(path[0]))
        kinds = self.kinds(group)
        fitting = [min(choices, key=len) for kind, choices in kinds.items() if path[0] in kind.options()]
        if fitting:
            now = "nothing is chosen" if schema is None else f"{group}={choice} has no {path[0]}"
            return f"{name}: choose {' or '.join(f'{group}={c}' for c in fitting[:4])} first ({now})"
        everywhere = [option for kind in kinds for option in kind.options()]
        close = did_you_mean(path[0], own) or did_you_mean(path[0], dict.fromkeys(everywhere))
        return f"{name} does not exist{close.replace('mean ', f'mean {group}.').replace(' or ', f' or {group}.')}" + (
            "" if close else self._elsewhere(path[-1]) or "; --help shows what does"
        )

    def _wrong_below(self, option: Option, path: list[str], name: str, values: object) -> str | None:
        """``path``: what follows the option in a key, ``values`` what it holds by default."""
        if not path or option.is_open or (option.schema is None and not option.is_mapping):
            return None
        if option.is_mapping:
            known, below = values if isinstance(values, dict) else {}, option.schema
            if known and path[0] not in known:
                close = did_you_mean(path[0], known) or f": there are {_listed(known)}"
                return f"{name}.{path[0]} does not exist{close}"
            return below and self._wrong_inside(below, path[1:], f"{name}.{path[0]}", known.get(path[0]))
        return self._wrong_inside(option.schema, path, name, values)

    def _wrong_inside(self, schema: Schema, path: list[str], name: str, values: object) -> str | None:
        options = schema.options()
        if not path:
            return None
        if path[0] not in options:
            return f"{name}.{path[0]} does not exist{did_you_mean(path[0], options) or self._elsewhere(path[0])}"
        below = values.get(path[0]) if isinstance(values, dict) else None
        return self._wrong_below(options[path[0]], path[1:], f"{name}.{path[0]}", below)

    def _unknown(self, key: str) -> str:
        first = re.split(r"[./]", key)[0]
        close = self._elsewhere(key.split(".")[-1]) or did_you_mean(first, [*self.schema.options(), *self.groups])
        return f"{key} does not exist" + (close or did_you_mean(key, self._keys()) or "; --help shows what does")

    def _elsewhere(self, last: str) -> str:
        """Keys whose last name is this one; or else that are explained by these words."""
        keys, words = self._keys(), last.replace("_", " ")
        same = [key for key in keys if key.split(".")[-1] == last] or [key for key in keys if words in keys[key]]
        return f": did you mean {' or '.join(same[:3])}?" if same else ""

    def _keys(self) -> dict[str, str]:
        """All that there are, with what explains them."""
        keys = dict(_keys_of(self.schema, ""))
        for group in self.groups:
            for kind in self.kinds(group):
                keys |= _keys_of(kind, f"{group}.")
        return keys


def _keys_of(schema: Schema, prefix: str) -> Iterator[tuple[str, str]]:
    for option in schema.options().values():
        if option.schema is not None and not option.is_mapping:
            yield from _keys_of(option.schema, f"{prefix}{option.name}.")
        else:
            yield f"{prefix}{option.name}", option.comment


def _explain_group(command: Command, group: str) -> list[str]:
    given = command.given.get(group)
    if given in _of_packages(group):
        point = entry_points(group="dashattn.backends")[given]
        return ["", f"{group}={given}: of the package {point.dist.name}, which explains its options in {point.module}"]
    kinds = {schema: choices for schema, choices in command.kinds(group).items() if given in (None, "null", *choices)}
    # What all have in common is explained once.
    common = set.intersection(*({option for option in schema.options().values()} for schema in kinds)) if kinds else ()
    shared = {option.name for option in common} if len(kinds) > 1 else set()
    lines = []
    for number, (schema, choices) in enumerate(kinds.items()):
        shown = given if given in choices else min(choices, key=lambda c: (c != command.groups[group], len(c), c))
        lines += ["", *textwrap.wrap(f"{group}={'|'.join(choices)}: {schema.summary}", _WIDTH, subsequent_indent="  ")]
        lines += _explain(schema, f"{group}.", _values(group, shown), skip=shared if number else ())
    return lines


def _explain(schema: Schema, prefix: str, values: dict, skip: Iterable[str] = ()) -> list[str]:
    """A paragraph an option, and what lies below it."""
    lines = []
    for option in schema.options().values():
        if option.name in skip:
            continue
        key, value = f"{prefix}{option.name}", values.get(option.name)
        if option.schema is not None:
            lines += [f"  {key}: {option.comment}"] if option.is_mapping else []
            inside = value if isinstance(value, dict) and not option.is_mapping else {}
            lines += _explain(option.schema, f"{key}.NAME." if option.is_mapping else f"{key}.", inside)
            continue
        default = spell(value) if option.name in values and not isinstance(value, dict) else option.default
        head = f"  {key}" + (" (required)" if default == REQUIRED else f"={default}")
        text = f"[{option.kind}] {option.comment}" if option.kind else option.comment
        lines += [head if len(head) < _WIDTH else f"{head[: _WIDTH - 4]} ...", *_wrapped(text)]
    return lines


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _read(file: Path) -> dict:
    return yaml.load(file.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader)) or {}


def _chain(group: str, name: str) -> list[dict]:
    """A file of a group and those of the group that it begins with, the last wins."""
    path = Path(CONFIGS, group, f"{name}.yaml")
    if not path.exists():  # a schema
        return []
    file = _read(path)
    bases = [entry for entry in file.get("defaults", []) if isinstance(entry, str) and entry != "_self_"]
    return [*(found for base in bases for found in _chain(group, base)), file]


def _values(group: str, choice: str) -> dict:
    values: dict = {}
    for file in _chain(group, choice):
        values = _merged(values, {key: value for key, value in file.items() if key != "defaults"})
    return values


def _merged(old: dict, new: dict) -> dict:
    both = {
        key: _merged(old[key], new[key]) for key in new if isinstance(old.get(key), dict) and isinstance(new[key], dict)
    }
    return old | new | both
