"""Which module may import which. Every import counts, also one inside a function or for type checkers alone."""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What each package may import beside itself; all else at the top level are scripts, which nobody imports.
MAY_IMPORT = {
    "dashattn": set(),
    "data": {"dashattn"},
    "slurm": {"dashattn"},
    "models": {"dashattn"},
    "experiments": {"dashattn", "data", "models", "slurm"},
}


class Import(NamedTuple):
    importer: str
    imported: str  # a module of this project
    name: str | None  # what is taken out of it; None = the module itself
    line: int
    is_local: bool  # inside a function

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}" + (f".{self.name}" if self.name else "")


@cache
def modules() -> dict[str, Path]:
    """Dotted name -> file, of all but the tests."""
    files = [*ROOT.glob("*.py"), *(file for package in MAY_IMPORT for file in (ROOT / package).rglob("*.py"))]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imports_of(importer: str, source: str, known: set[str]) -> Iterator[Import]:
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    local = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in {name.split(".")[0] for name in known}:
                    yield Import(importer, alias.name, None, node.lineno, id(node) in local)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{importer}:{node.lineno} imports by a relative name"
            for alias in node.names:
                if f"{node.module}.{alias.name}" in known:
                    yield Import(importer, f"{node.module}.{alias.name}", None, node.lineno, id(node) in local)
                elif node.module in known:
                    yield Import(importer, node.module, alias.name, node.lineno, id(node) in local)


@cache
def imports() -> list[Import]:
    known = set(modules())
    return [found for name, file in modules().items() for found in imports_of(name, file.read_text(), known)]


def package(module: str) -> str:
    return module.split(".")[0]


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """One, as the modules in it; empty if there is none."""
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_every_way_to_import_is_seen():
    source = """
import a.b
from a import b, X
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from c import Y
def f():
    import train
    from a.b import _private
"""
    found = {(i.imported, i.name) for i in imports_of("here", source, {"a", "a.b", "c", "train"})}
    assert found == {("a.b", None), ("a", "X"), ("c", "Y"), ("train", None), ("a.b", "_private")}


def test_every_name_that_a_package_offers_is_there():
    offering = [importlib.import_module(name) for name, file in modules().items() if "__all__ = " in file.read_text()]
    assert {"data", "models", "models.hf", "dashattn"} <= {module.__name__ for module in offering}
    for module in offering:
        assert [name for name in module.__all__ if not hasattr(module, name)] == [], module.__name__


def test_circles_are_seen():
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})) == {"a", "b", "c"}


def test_arrows_between_packages_point_one_way():
    wrong = [
        str(found)
        for found in imports()
        if package(found.imported) != package(found.importer)
        and package(found.imported) not in MAY_IMPORT.get(package(found.importer), MAY_IMPORT)
    ]
    assert not wrong


@pytest.mark.parametrize(
    ("importer", "common"), [("data", {"dashattn.fields", "dashattn.plugins"}), ("slurm", {"dashattn.fields"})]
)
def test_of_the_attention_library_others_may_take_how_fields_are_checked_and_names_found(importer, common):
    taken = {i.imported for i in imports() if package(i.importer) == importer and package(i.imported) != importer}
    assert taken == common


def test_only_experiments_know_files_of_configurations():
    sources = {name: file.read_text() for name, file in modules().items() if package(name) in MAY_IMPORT}
    named = re.compile(r"^ *(?:import|from) (?:hydra|omegaconf)\b", re.MULTILINE)
    assert {package(name) for name, source in sources.items() if named.search(source)} == {"experiments"}


def test_no_module_is_part_of_a_circle():
    arrows = {module: set() for module in modules()}
    for found in imports():
        arrows[found.importer].add(found.imported)
    assert circle(arrows) == []


@pytest.mark.parametrize(
    "parent", ["experiments", "experiments.evaluation", "data", "models", "dashattn", "dashattn.ops"]
)
def test_no_folder_is_part_of_a_circle(parent):
    """A folder counts as one beside the files and folders that lie around it."""
    arrows: dict[str, set[str]] = {}
    for found in imports():
        if found.importer.startswith(f"{parent}.") and found.imported.startswith(f"{parent}."):
            importer, imported = (
                name.removeprefix(f"{parent}.").split(".")[0] for name in (found.importer, found.imported)
            )
            if importer != imported:
                arrows.setdefault(importer, set()).add(imported)
    assert circle(arrows) == []


# What a start must not wait for: it may be missing, or takes a second.
PUT_OFF = {"triton", "lm_eval", "torch.nn.attention.varlen"}


def is_put_off(file: Path) -> bool:
    """Whether importing a module imports one of ``PUT_OFF``."""
    body = ast.parse(file.read_text()).body
    names = [alias.name for node in body if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in body if isinstance(node, ast.ImportFrom)]
    return any(name in PUT_OFF or name.split(".")[0] in PUT_OFF for name in names)


def test_imports_inside_functions_are_of_what_is_put_off():
    """Of this project's own modules: those, not others that would close a circle."""
    optional = {name for name, file in modules().items() if is_put_off(file)}
    while True:
        more = {found.importer for found in imports() if found.imported in optional and not found.is_local}
        if more <= optional:
            break
        optional |= more
    assert "dashattn.ops.dash_attention.triton" in optional
    assert "dashattn.functional" not in optional
    assert [str(found) for found in imports() if found.is_local and found.imported not in optional] == []


def private_uses(importer: str, source: str, known: set[str]) -> Iterator[str]:
    """Names with a leading underscore that are taken out of another module, by an import or as ``module._name``."""
    tree, modules_here = ast.parse(source), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if f"{node.module}.{alias.name}" in known:
                    modules_here[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                elif node.module in known and alias.name.startswith("_"):
                    yield f"{importer}:{node.lineno} imports {node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            modules_here |= {alias.asname: alias.name for alias in node.names if alias.asname and alias.name in known}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = modules_here.get(node.value.id)
            if module is not None and node.attr.startswith("_"):
                yield f"{importer}:{node.lineno} uses {module}.{node.attr}"


def test_private_uses_are_seen():
    source = "from a import b, _x\nimport a.b as c\nb._y(); c._z; b.open"
    assert sorted(private_uses("here", source, {"a", "a.b"})) == [
        "here:1 imports a._x",
        "here:3 uses a.b._y",
        "here:3 uses a.b._z",
    ]


def test_private_names_stay_in_their_module():
    known = set(modules())
    wrong = [use for name, file in modules().items() for use in private_uses(name, file.read_text(), known)]
    assert wrong == []


def test_generators_of_tasks_are_had_without_the_rest_of_data():
    assert [str(found) for found in imports() if found.importer == "data.tasks"] == []


def test_nothing_needs_the_libraries_that_it_can_be_used_in():
    others = [i for i in imports() if not i.importer.startswith("dashattn.integrations")]
    assert [str(found) for found in others if found.imported.startswith("dashattn.integrations")] == []


def test_scripts_start_without_what_only_work_needs():
    """A wrong override is answered before anything slow is loaded; PyTorch itself is there for its dtypes."""
    heavy = ["deepspeed", "datasets", "transformers", "torch._dynamo", "triton", "wandb", "matplotlib", "lm_eval"]
    heavy += ["rich", "submitit"]
    scripts = ["data.collect", "train", "evaluate", "experiments.sweep.__main__"]
    code = "".join(f"import {script}; print([name for name in {heavy} if name in sys.modules])\n" for script in scripts)
    done = subprocess.run([sys.executable, "-c", f"import sys\n{code}"], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split("\n") == ["[]", "[]", "[]", "['rich']", ""], done.stderr  # a sweep draws a table


COMMANDS = sorted(name for name, file in modules().items() if "@hydra.main" in file.read_text())


@pytest.mark.parametrize("script", COMMANDS)
def test_help_is_answered_before_pytorch_and_hydra_are_imported(script):
    command = [sys.executable, "-X", "importtime", "-m", script.removesuffix(".__main__"), "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "string" in imported
    assert not imported & {"torch", "hydra", "omegaconf", "numpy"}
    assert "--cfg job" in done.stdout
