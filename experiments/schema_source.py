"""The options of a command, read off the source of its dataclasses: names, what they may hold, defaults and meanings.

Nothing is imported, so that help and advice come before PyTorch does. A field is explained by the comment behind it or
above it, or under ``Attributes:`` in the docstring of its class. Names are followed through this project's imports.
"""

import ast
import io
import re
import textwrap
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from experiments.files import ROOT

REQUIRED = "???"  # a value that is still to come, as Hydra spells it


@dataclass(frozen=True)
class Option:
    """A field of a configuration.

    Attributes:
        kind: what it may hold, in words; empty where only its own schema knows.
        default: as YAML spells it; ``REQUIRED``.
        comment: what it means, in one line.
        schema: the dataclass that it holds, or that the values of a mapping are.
        is_mapping: its keys are names that a configuration chooses.
        is_open: what lies below it is of no schema.
    """

    name: str
    kind: str
    default: str
    comment: str
    schema: "Schema | None" = None
    is_mapping: bool = False
    is_open: bool = False


@dataclass(frozen=True)
class Schema:
    """A dataclass: where it is defined, what it says of itself."""

    module: str
    name: str

    @property
    def summary(self) -> str:
        return (ast.get_docstring(_class(self)) or "").split("\n\n")[0].replace("\n", " ").replace("``", "")

    def options(self) -> dict[str, Option]:
        """By name, those of its bases first."""
        return dict(_options(self))


@cache
def _options(schema: Schema) -> dict[str, Option]:
    node, found = _class(schema), {}
    for base in node.bases:
        where = _definition(schema.module, ast.unparse(base))
        if where is not None and isinstance(where[1], ast.ClassDef):
            found |= Schema(where[0], where[1].name).options()
    attributes = _attributes(ast.get_docstring(node) or "")
    for name, comment in attributes.items():  # of a base's fields, too
        if name in found:
            found[name] = _with_comment(found[name], comment)
    comments = _comments(schema.module)
    for field in node.body:
        if not isinstance(field, ast.AnnAssign) or ast.unparse(field.annotation).startswith("ClassVar"):
            continue
        name = field.target.id
        inherited = found[name].comment if name in found else ""
        comment = attributes.get(name) or _comment_of(field, comments) or inherited
        found[name] = _option(schema.module, name, field, comment)
    return found


def _with_comment(option: Option, comment: str) -> Option:
    return Option(**{**vars(option), "comment": comment})


@cache
def schema_of_choice(store_module: str, name: str) -> Schema | None:
    """The dataclass that ``store.store(name=NAME, node=...)`` of a module hands to Hydra; those that come from a loop
    over a registry are looked up there."""
    for call in (node for node in ast.walk(_tree(store_module)) if isinstance(node, ast.Call)):
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        if "node" not in given or "name" not in given:
            continue
        if isinstance(given["name"], ast.Constant) and given["name"].value == name:
            return _schema(store_module, ast.unparse(given["node"]))
    module, registry = _definition(store_module, "BACKENDS")
    _, registry = _definition(module, ast.unparse(registry.args[1]))  # of Registry(group, own, ...)
    for key, value in zip(registry.keys, registry.values, strict=True):
        if f"{key.value}_schema" == name:
            return _schema(module, ast.unparse(value.elts[0]))
    return None


def _schema(module: str, name: str) -> Schema | None:
    where = _definition(module, name)
    if where is None or not isinstance(where[1], ast.ClassDef) or not _is_dataclass(where[1]):
        return None
    return Schema(where[0], where[1].name)


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)


def _option(module: str, name: str, field: ast.AnnAssign, comment: str) -> Option:
    hint, default = field.annotation, _default(module, field.value)
    optional = isinstance(hint, ast.BinOp)
    if optional:  # X | None
        hint = hint.left
    if isinstance(hint, ast.Subscript) and ast.unparse(hint.value) == "dict":
        schema = _schema(module, ast.unparse(hint.slice.elts[1]))
        return Option(name, "a mapping", default, comment, schema, is_mapping=True, is_open=schema is None)
    if isinstance(hint, ast.Subscript) and ast.unparse(hint.value) == "list":
        kind = _kind(module, hint.slice)
        return Option(name, f"a list; of each: {kind}" if kind else "a list", default, comment)
    schema = _schema(module, ast.unparse(hint)) if isinstance(hint, ast.Name) else None
    if schema is not None:
        return Option(name, "", default, comment, schema)
    kind = _kind(module, hint)
    return Option(name, f"{kind}, or null" if optional and kind else kind, default, comment, is_open=kind == "")


def _kind(module: str, hint: ast.expr) -> str:
    """What a value may be, in words."""
    if isinstance(hint, ast.Name):
        if hint.id in ("bool", "Any"):
            return "true or false" if hint.id == "bool" else ""
        where = _definition(module, hint.id)
        return "" if where is None or isinstance(where[1], ast.ClassDef) else _kind(*where)
    if not isinstance(hint, ast.Subscript):
        return ""
    if ast.unparse(hint.value) == "list":
        return f"a list; of each: {_kind(module, hint.slice)}"
    if ast.unparse(hint.value) != "Annotated":
        return ""
    rule = hint.slice.elts[1]
    if isinstance(rule, ast.Name):
        module, rule = _definition(module, rule.id)
    if ast.unparse(rule.func) == "OneOf":
        return " | ".join(map(str, _value(module, rule.args[0])))
    phrase = next(a for a in reversed(rule.args) if isinstance(a, ast.JoinedStr | ast.Constant) and _is_text(a))
    if isinstance(phrase, ast.Constant):
        return phrase.value
    return "".join(
        part.value if isinstance(part, ast.Constant) else str(_value(module, part.value)) for part in phrase.values
    )


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or isinstance(node.value, str)


def _value(module: str, node: ast.expr):
    """Of an expression of literals, names of such, and what makes a tuple of them. ValueError where it is another."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Tuple | ast.List):
        parts = []
        for element in node.elts:
            starred = isinstance(element, ast.Starred)
            parts += _value(module, element.value) if starred else [_value(module, element)]
        return parts
    if isinstance(node, ast.Dict):
        parts = []
        for key, value in zip(node.keys, node.values, strict=True):
            parts += _value(module, value) if key is None else [_value(module, key)]
        return parts
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("tuple", "list", "frozenset"):
        return _value(module, node.args[0])
    where = None
    if isinstance(node, ast.Name):
        where = _definition(module, node.id)
    elif isinstance(node, ast.Attribute) and (imported := _definition(module, ast.unparse(node.value))) is not None:
        where = _definition(imported[0], node.attr)
    if where is None or not isinstance(where[1], ast.expr):
        raise ValueError(ast.unparse(node))
    return _value(*where)


def _default(module: str, node: ast.expr | None) -> str:
    if node is None or (isinstance(node, ast.Name) and node.id == "MISSING"):
        return REQUIRED
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "field":
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        factory = given.get("default_factory")
        if not isinstance(factory, ast.Lambda):
            return {"list": "[]", "dict": "{}"}.get(ast.unparse(factory), "")
        node = factory.body
    try:
        return spell(_value(module, node))
    except ValueError:  # it is computed
        return ast.unparse(node)


def spell(value: object) -> str:
    """A value as YAML and a command line have it."""
    if isinstance(value, list):
        return f"[{','.join(map(spell, value))}]"
    return {None: "null", True: "true", False: "false"}.get(value, str(value)) if _is_plain(value) else str(value)


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, bool)


def _attributes(docstring: str) -> dict[str, str]:
    """What stands under ``Attributes:``."""
    _, _, text = docstring.partition("Attributes:\n")
    text = textwrap.dedent(text)
    found = re.findall(r"^(\w[\w, ]*): (.*(?:\n +.*)*)", text, re.MULTILINE)
    return {
        name: " ".join(comment.split()).replace("``", "")
        for names, comment in found
        for name in re.split(r", *", names)
    }


def _comment_of(field: ast.AnnAssign, comments: dict[int, tuple[bool, str]]) -> str:
    """The comment behind a field, with what stands on lines of their own above it."""
    above, line = [], field.lineno - 1
    while comments.get(line, (False, ""))[0]:
        above.insert(0, comments[line][1])
        line -= 1
    # Behind a field of several lines it may stand on any of them.
    behind = [comments[n][1] for n in range(field.lineno, field.end_lineno + 1) if n in comments]
    joint = " " if not (above and behind) or above[-1].endswith(":") else "; "
    return f"{' '.join(above).rstrip('.' if behind else '')}{joint}{' '.join(behind)}".strip()


@cache
def _comments(module: str) -> dict[int, tuple[bool, str]]:
    """Of each line: whether its comment stands alone, and what it says."""
    tokens = tokenize.generate_tokens(io.StringIO(_source(module)).readline)
    return {
        token.start[0]: (not token.line[: token.start[1]].strip(), token.string.lstrip("# ").replace("``", ""))
        for token in tokens
        if token.type == tokenize.COMMENT
    }


def _file(module: str) -> Path | None:
    path = ROOT / module.replace(".", "/")
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.exists()), None)


@cache
def _source(module: str) -> str:
    return _file(module).read_text(encoding="utf-8")


@cache
def _tree(module: str) -> ast.Module:
    return ast.parse(_source(module))


def _class(schema: Schema) -> ast.ClassDef:
    return next(x for x in _tree(schema.module).body if isinstance(x, ast.ClassDef) and x.name == schema.name)


def _names(module: str) -> Iterator[tuple[str, ast.AST]]:
    """What a module defines: classes, imports, and what is assigned."""
    for node in _tree(module).body:
        if isinstance(node, ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.ImportFrom):
            yield from ((alias.asname or alias.name, node) for alias in node.names)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            yield node.target.id, node.value
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            yield node.targets[0].id, node.value
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            yield from zip((target.id for target in node.targets[0].elts), node.value.elts, strict=True)


@cache
def _definition(module: str, name: str) -> tuple[str, ast.AST] | None:
    """(module, what ``name`` stands for there), through imports; None for what is not of this project."""
    node = next((node for known, node in _names(module) if known == name), None)
    if isinstance(node, ast.ImportFrom):
        original = next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
        if _file(node.module) is None:
            return None
        if _file(f"{node.module}.{original}") is not None:
            return f"{node.module}.{original}", node
        return _definition(node.module, original)
    return None if node is None else (module, node)
