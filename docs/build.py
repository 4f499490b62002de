"""The pages of the documentation, written for mkdocs: ``python -m docs.build outputs/docs/pages``, by ``make docs``.

Nothing stands here twice: the guide is README.md cut at its headings, methods and formats are docstrings, options are
what ``--help`` says, which reads the comments of the dataclasses. Sources are read, not imported.
"""

import ast
import re
import shutil
import sys
from pathlib import Path

from experiments.files import check_exists
from experiments.help import SCHEMAS, help_page

ROOT = Path(__file__).resolve().parents[1]
TITLE = "DashAttention: pretraining and ablation of sparse attention"  # of README.md
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Page -> (its title, headings of README.md).
GUIDE = {
    "index": (
        "DashAttention",
        [TITLE, "Where DashAttention loses"],
    ),
    "quickstart": ("Quickstart", ["A tour", "The tree"]),
    "recipes": ("Recipes", ["Recipes"]),
    "library": ("The library", ["The attention library alone", "A backend of your own"]),
    "results": ("Results", ["Results", "Limits"]),
    "trust": ("Trust", ["Trust"]),
}
# What computes a method -> its definition in PyTorch, and the module of its options.
METHODS = {
    "DashAttention": ("dashattn/backends/dash.py", "dashattn/routing.py", "dashattn/functional.py"),
    "Its operations": ("dashattn/ops/*/reference.py",),
    "InfLLM v2": ("dashattn/backends/infllmv2.py",),
    "NSA": ("dashattn/backends/nsa.py",),
    "A learned index": ("dashattn/backends/indexer.py", "dashattn/indexer.py"),
    "Controls": ("dashattn/backends/controls.py",),
    "Layers that differ, and share": ("dashattn/backends/layers.py", "dashattn/backends/sharing.py"),
}
FORMATS = {
    "Run directory": "experiments/training/run_dir.py",
    "Checkpoint": "experiments/training/checkpoint.py",
    "Metrics": "experiments/training/metrics.py",
    "Anomalies": "experiments/training/anomalies.py",
    "Rows of an evaluation": "experiments/evaluation/evaluate.py",
    "Where the knob stood": "experiments/evaluation/knobs.py",
    "Export": "experiments/evaluation/export.py",
    "Attention of a Hugging Face folder": "models/hf/attention.py",
    "Prepared text": "data/shards.py",
}


def pages() -> dict[str, str]:
    """Path below the folder of pages -> Markdown."""
    parts = sections(README)
    found = {
        f"{name}.md": _page(title, *(_of_site(parts[heading]) for heading in headings))
        for name, (title, headings) in GUIDE.items()
    }
    found["examples.md"] = _of_site((ROOT / "examples/README.md").read_text(encoding="utf-8"), ROOT / "examples")
    found["methods.md"] = _page("Methods", *(_method(title, *paths) for title, paths in METHODS.items()))
    found["formats.md"] = _page("File formats", *(f"## {title}\n\n{_module(path)}" for title, path in FORMATS.items()))
    for name in SCHEMAS:
        found[f"options/{name}.md"] = f"---\nhide: [toc]\n---\n\n# Options: {name}\n\n```text\n{help_page(name)}\n```\n"
    return found


def _page(title: str, *parts: str) -> str:
    return "\n\n".join((f"# {title}", *parts)) + "\n"


def sections(text: str) -> dict[str, str]:
    """Under each heading of the first two levels, with it where it is no title."""
    parts = re.split(r"^(##? .+)\n", text, flags=re.MULTILINE)[1:]
    return {
        heading.lstrip("# "): (f"{heading}\n" if heading.startswith("##") else "") + body.strip("\n")
        for heading, body in zip(parts[::2], parts[1::2], strict=True)
    }


def _of_site(text: str, folder: Path = ROOT) -> str:
    """Links into the repository, which a site does not hold, as the names of what they lead to."""

    def named(link: re.Match) -> str:
        is_image, words, target = link.groups()
        path = (folder / target).relative_to(ROOT).as_posix()
        return f"![{words}](images/{path.replace('/', '-')})" if is_image else f"{words} (`{path}`)"

    return re.sub(r"(!?)\[([^\]]+)\]\((?!https?:)([^)]+)\)", named, text)


def images() -> dict[str, Path]:
    """Those of the README: name on the site -> file."""
    targets = re.findall(r"!\[[^\]]*\]\((?!https?:)([^)]+)\)", README)
    return {target.replace("/", "-"): ROOT / target for target in targets}


def _method(title: str, *patterns: str) -> str:
    files = [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]
    return "\n\n".join([f"## {title}", *(_module(path.relative_to(ROOT).as_posix(), members=True) for path in files)])


def _module(path: str, *, members: bool = False) -> str:
    """The docstring of a file, and those of its public classes and functions."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    parts = [f"`{path}`", _prose(ast.get_docstring(tree))]
    for node in tree.body if members else ():
        is_public = isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")
        if is_public and ast.get_docstring(node):
            parts += [f"### `{node.name}`", _prose(ast.get_docstring(node))]
    return "\n\n".join(parts)


def _prose(docstring: str) -> str:
    """Text up to the first section (``Args:``); a section as a list."""
    text, *rest = re.split(r"^(?=(?:Args|Attributes|Returns|Raises):$)", docstring, maxsplit=1, flags=re.MULTILINE)
    parts = [_table(paragraph) for paragraph in text.rstrip().split("\n\n")]
    for section in re.split(r"^(?=\w+:$)", rest[0], flags=re.MULTILINE) if rest else ():
        head, _, body = section.partition(":\n")
        entries = re.split(r"\n(?= {4}\S)", body.rstrip()) if head else []
        parts += [f"**{head}**", "\n".join(f"- {' '.join(entry.split())}" for entry in entries)] if head else []
    return "\n\n".join(parts)


def _table(paragraph: str) -> str:
    """A paragraph; as it is set where its lines are columns."""
    columns = [re.match(r"\S+(?: \S+)* {2,}\S", line) for line in paragraph.splitlines()]
    return f"```text\n{paragraph}\n```" if sum(map(bool, columns)) > len(columns) / 2 else paragraph


def write(folder: Path) -> None:
    for name, text in pages().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    shutil.copy(ROOT / "docs/site.css", folder)
    for name, source in images().items():
        (folder / "images").mkdir(exist_ok=True)
        check_exists(source, "README.md shows it")
        shutil.copy(source, folder / "images" / name)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
