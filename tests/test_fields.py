"""What the fields of all schemas may hold: every field says it, and nonsense is refused in one line, whatever it is."""

import ast
import copy
import math
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.object_type import ObjectType
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dashattn import fields
from dashattn.backends import BACKENDS
from dashattn.fields import AnyText, Checked, OneOf, PositiveFloat, PositiveInt, UserPath, field_types, user_path
from experiments.config import register_configs, to_train_config
from experiments.evaluation.config import register_evaluate_config
from experiments.evaluation.evaluate import find_target
from experiments.evaluation.generate import run_generation
from experiments.plan import PlanConfig, plan_run
from experiments.rates import rows
from experiments.schema import to_config
from experiments.speed import config as speed
from experiments.sweep.cells import cells, register_sweep_config
from experiments.throughput.scaling import register_parallel_config
from experiments.throughput.steps import register_throughput_config
from experiments.training.check import check
from tests.checkpoints import make_folder
from tests.composition import hasten
from tests.test_imports import modules

hasten()
for register in (
    *(register_configs, register_evaluate_config, register_sweep_config, speed.register_speed_config),
    *(register_throughput_config, register_parallel_config),
):
    register()
CONFIGS = Path(__file__).parents[1] / "configs"


def schemas() -> set[type]:
    """All that are registered, and those inside them."""

    def of(folder: str) -> set[type]:
        store = ConfigStore.instance()
        found = set()
        for name in store.list(folder):
            path = f"{folder}/{name}".strip("/")
            if store.get_type(path) == ObjectType.GROUP:
                found |= of(path)
            else:
                found.add(OmegaConf.get_type(store.load(path).node))
        return {schema for schema in found if schema.__module__.split(".")[0] != "hydra"} - {dict}

    known, new = set(), of("")
    while new:
        known |= new
        new = {part for schema in new for hint in field_types(schema).values() for part in dataclasses_in(hint)} - known
    return known


def dataclasses_in(hint: Any) -> set[type]:
    if get_origin(hint) is Annotated or not get_args(hint):
        return {hint} if is_dataclass(hint) else set()
    return set().union(*(dataclasses_in(argument) for argument in get_args(hint)))


def test_every_entry_point_has_its_schema_in_the_store():
    names = {line.strip("- ").strip() for path in CONFIGS.rglob("*.yaml") for line in path.read_text().splitlines()}
    named = {name for name in names if name.endswith("_schema")}
    store = ConfigStore.instance()
    known = {name.removesuffix(".yaml") for group in ("", *store.list("")) for name in listed(store, group)}
    assert named - known == set()


def listed(store: ConfigStore, group: str) -> list[str]:
    is_group = group == "" or store.get_type(group) == ObjectType.GROUP
    return store.list(group) if is_group else []


def test_every_field_of_every_schema_says_what_it_may_hold():
    """A new field without a range fails here, and wherever one is made; the message names the types to choose from."""
    found = schemas()
    assert len(found) > 25
    assert PlanConfig in found
    for schema in found:
        assert issubclass(schema, Checked), f"{schema.__name__} checks nothing: derive it from dashattn.fields.Checked"
        field_types(schema)


def test_a_field_that_says_nothing_is_refused_with_the_types_to_choose_from():
    @dataclass
    class Loose(Checked):
        rates: list[float] | None = None

    with pytest.raises(TypeError, match=r"Loose\.rates.*PositiveInt"):
        Loose()


def test_values_are_held_to_the_types_of_fields():
    @dataclass
    class Toy(Checked, at="toy"):
        size: PositiveInt = 1
        rates: list[PositiveFloat] | None = None
        table: dict[AnyText, list[PositiveInt]] | None = None
        stage: Annotated[int, OneOf((0, 1))] = 0
        on: bool = False
        later: PositiveInt = fields.MISSING

    assert Toy().later == "???"
    Toy(size=3, rates=[1, 2.5], table={"": [1]}, stage=1, on=True)
    for values, message in (
        ({"size": 2.0}, r"toy\.size must be a positive integer.*got 2\.0"),
        ({"size": True}, "got True"),
        ({"size": None}, "got None"),
        ({"size": 2**31}, "below 2"),
        ({"rates": [1.0, math.nan]}, r"toy\.rates\[1\] must be a positive finite number.*got nan"),
        ({"rates": [math.inf]}, "got inf"),
        ({"rates": 1.0}, "must be a list"),
        ({"table": {"a": [1, 0]}}, r"toy\.table\.a\[1\]"),
        ({"table": [1]}, "must be a mapping"),
        ({"stage": 2}, "one of 0, 1"),
        ({"stage": True}, "got True"),
        ({"on": 1}, "true or false"),
    ):
        with pytest.raises(ValueError, match=message):
            Toy(**values)


def test_a_path_leads_home_and_nothing_else_in_it_is_looked_up(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    led = {given: str(user_path(given)) for given in ("~", "~/a", "a/~", "$HOME/~a", "/a", Path("~/a"))}
    assert led == {
        **{"~": "/home/me", "~/a": "/home/me/a", Path("~/a"): "/home/me/a"},
        **{"a/~": "a/~", "$HOME/~a": "$HOME/~a", "/a": "/a"},
    }
    with pytest.raises(ValueError, match=r"~nobody-here/a: no home is known for ~nobody-here; give the path from /"):
        user_path("~nobody-here/a")


# Keys whose values are opened under another name, by what takes them.
OPENED_AS = {"branch_from": "run", "files": "pattern", "hotpotqa": "path", "squad": "path"}


def test_every_path_of_a_configuration_is_opened_through_one_door():
    """``user_path``: no key that holds a path is taken as it is, and no other function looks for a home."""

    def is_path(hint):
        return hint == UserPath or any(map(is_path, get_args(hint)))

    keys = {name for schema in schemas() for name, hint in field_types(schema).items() if is_path(hint)}
    opened, wrong = set(), []
    for module, file in modules().items():
        for call in (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)):
            called = ast.unparse(call.func)
            parts = [part for argument in call.args for part in ast.walk(argument)]
            taken = keys & {part.attr for part in parts if isinstance(part, ast.Attribute)}
            if called == "user_path":
                opened |= taken | {part.id for part in parts if isinstance(part, ast.Name)}
            elif called.endswith("expanduser") and module not in ("dashattn.fields", "experiments.arguments"):
                wrong.append(f"{module}:{call.lineno} calls {called}")
            elif taken and (called in ("Path", "open") or called.startswith(("os.", "glob."))):
                wrong.append(f"{module}:{call.lineno} has {', '.join(taken)} without user_path")
    assert {"run_dir", "cache_dir", "files", "tokenizer", "output_dir", "haystack"} <= keys
    assert {OPENED_AS.get(key, key) for key in keys} - opened == set()
    assert wrong == []


@pytest.mark.parametrize(
    ("hint", "least", "most"),
    [
        (fields.PositiveInt, 1, 2**31 - 1),
        (fields.NonNegativeInt, 0, 2**31 - 1),
        (fields.PositiveLong, 1, 2**63 - 1),
        (fields.Seed, 0, 2**63 - 1),
        (fields.Threads, 1, 1024),
        (fields.PositiveFloat, 2.0**-126, 2.0**127),
        (fields.NonNegativeFloat, 0.0, 2.0**127),
        (fields.Share, 0.0, 1.0),
        (fields.PositiveShare, math.nextafter(0.0, 1.0), 1.0),
        (fields.Sparsity, 0.0, math.nextafter(1.0, 0.0)),
    ],
    ids=lambda value: value if isinstance(value, int | float) else value.__metadata__[0].phrase,
)
def test_ranges_end_where_they_say(hint, least, most):
    (rule,) = hint.__metadata__
    beyond = (
        (least - 1, most + 1) if hint.__origin__ is int else (math.nextafter(least, -1), math.nextafter(most, 1e300))
    )
    assert [rule.holds(value) for value in (*beyond, least, most)] == [False, False, True, True]
    assert rule.holds(1) == (least <= 1 <= most)
    assert not any(rule.holds(value) for value in (math.nan, math.inf, -math.inf, True, "1", None))


# Whatever a field is, none of these can be meant. Those of the wrong type OmegaConf refuses.
NONSENSE = {
    int: (-1, 10**30, math.nan, math.inf, None),
    float: (math.nan, math.inf, -math.inf, -1.0, 1e300, None),
    str: ("", " ", "a\0b", None),
    bool: ("maybe", None),
}
# What may be meant, and then must be taken or refused in one line.
PLAUSIBLE = {
    int: (0, 1, 3, 64, 2**31 - 1),
    float: (0.0, 1e-30, 0.5, 1.5, 1e30),
    str: ("x", "=", "/nowhere"),
    bool: (True, False),
}


def values_of(hint: Any, kinds: dict[type, tuple]) -> list:
    """Values for a field, in lists and mappings as it has them."""
    if get_origin(hint) is Annotated:
        empty_is_fine = hint == AnyText and kinds is NONSENSE
        return [None] if empty_is_fine else list(kinds[hint.__origin__])
    if hint in kinds:
        return list(kinds[hint])
    if hint is Any or is_dataclass(hint):
        return []
    arguments = [argument for argument in get_args(hint) if argument is not type(None)]
    inner = values_of(arguments[-1], kinds)
    if get_origin(hint) is list:
        return [[value] for value in inner]
    if get_origin(hint) is dict:
        return [{"x": value} for value in inner]
    return [value for value in inner if value is not None]  # null is an answer


def leaves(node: DictConfig | ListConfig, prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted key and type of every field, those of schemas in lists and mappings included."""
    schema = OmegaConf.get_type(node)
    hints = field_types(schema) if is_dataclass(schema) else {}
    found = [(prefix + name, hint) for name, hint in hints.items()]
    for name in hints or (node.keys() if isinstance(node, DictConfig) else range(len(node))):
        child = node._get_node(name)
        if OmegaConf.is_config(child) and not (child._is_none() or child._is_missing()):
            found += leaves(child, f"{prefix}{name}.")
    return found


def check_train(cfg):
    check(to_train_config(cfg))


def check_plan(cfg):
    plan_run(to_train_config(compose("train", ["model.vocab_size=1024"])), to_config(cfg), rows())


DATA = {
    "python_stdlib": [],
    "mixture": ["model.max_seq_len=8192"],
    "mqar": ["model.max_seq_len=8192", "data.pairs_max=8"],
}
CASES = {
    "train": ("train", [], check_train, ""),
    **{f"attention={name}": ("train", [f"attention={name}"], check_train, "attention.") for name in BACKENDS},
    "attention=oracle": ("train", ["attention=oracle"], to_train_config, "attention."),
    **{f"data={name}": ("train", [f"data={name}", *more], check_train, "data.") for name, more in DATA.items()},
    "launcher": ("train", ["launcher=slurm"], check_train, "launcher."),
    "model": ("train", ["model=llama3_8b", "model.vocab_size=4096"], check_train, "model.rope."),
    "evaluate": ("evaluate", ["run=FOLDER", "data=python_stdlib"], lambda cfg: find_target(to_config(cfg)), ""),
    "generate": ("generate", ["run=nowhere", "prompt=x"], lambda cfg: run_generation(to_config(cfg)), ""),
    "plan": ("plan", [], check_plan, ""),
    "sweep": ("sweep", ["sweep=smoke", "launcher=slurm"], lambda cfg: cells(to_config(cfg)), ""),
    "speed": ("speed", [], lambda cfg: speed.check(to_config(cfg)), ""),
    "throughput": ("throughput", [], to_config, ""),
    "scaling": ("scaling", [], to_config, ""),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_no_field_takes_nonsense_or_ends_in_a_traceback(case, folder, monkeypatch):
    entry, overrides, use, prefix = CASES[case]
    overrides = [override.replace("FOLDER", str(folder)) for override in overrides]
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # a name may be one of the hub
    wrong = []
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        base = compose(entry, overrides)
        whole = copy.deepcopy(base)
        if case != "generate":  # which needs a run
            use(copy.deepcopy(base))
        tried = [(key, hint) for key, hint in leaves(base) if key.startswith(prefix)]
        assert tried
        for key, hint in tried:
            for values in (NONSENSE, PLAUSIBLE):
                for value in values_of(hint, values):
                    found = outcome(base, key, value, use)
                    if found not in ("refused", "taken") or (values is NONSENSE and found == "taken"):
                        wrong.append(f"{key}={value!r}: {found}")
    assert wrong == []
    assert base == whole


def outcome(base: DictConfig, key: str, value: Any, use) -> str:
    """With one value in ``base``, which is as it was afterwards: a copy for each took as long as what is tested."""
    path, _, name = key.rpartition(".")
    holder = OmegaConf.select(base, path) if path else base
    content, name = holder._content, int(name) if isinstance(holder, ListConfig) else name
    kept = copy.deepcopy(content[name])
    try:
        OmegaConf.update(base, key, value, merge=False)  # a number in a key is the index of a list
        use(base)
    except (ValueError, OmegaConfBaseException, HydraException):  # what ``user_errors`` makes a message of
        return "refused"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"[:300]
    finally:
        content[name] = kept
    return "taken"
