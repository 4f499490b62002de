"""The documentation's sources: every page is there, every option on one, and nothing named that does not exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from docs import build
from experiments.help import SCHEMAS

ROOT = Path(__file__).resolve().parents[1]
PAGES = build.pages()
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text())


def options(schema, prefix=""):
    for name, option in schema.options().items():
        if option.schema is None or option.is_mapping:
            yield prefix + name
        else:
            yield from options(option.schema, f"{prefix}{name}.")


@pytest.mark.parametrize("command", SCHEMAS)
def test_every_option_is_listed(command):
    page = PAGES[f"options/{command}.md"]
    named = set(re.findall(r"^\s*([\w.]+)=", page, re.MULTILINE)) | set(
        re.findall(r"^\s*([\w.]+)\b", page, re.MULTILINE)
    )
    missing = [name for name in options(SCHEMAS[command]) if name not in named and name.rpartition(".")[2] not in named]
    assert missing == []


def test_every_page_is_in_the_index_and_every_part_of_the_readme_on_a_page():
    named = []
    for entry in CONFIG["nav"]:
        named += (
            [entry]
            if isinstance(entry, str)
            else [page for (group,) in [entry.values()] for one in group for page in one.values()]
        )
    assert sorted(named) == sorted(PAGES)
    headings = re.findall(r"^## (.+)$", build.README, re.MULTILINE)
    taken = {heading for _, headings in build.GUIDE.values() for heading in headings}
    assert {*headings, build.TITLE} - taken == {"License, citation, changes"}
    for heading, text in build.sections(build.README).items():
        assert text.count("```") % 2 == 0, heading


def test_what_the_pages_name_exists():
    for name, text in PAGES.items():
        prose = re.sub(r"```.*?```|``[^`]+``|`[^`\n]+`", "", text, flags=re.DOTALL)
        assert re.findall(r"\]\((?!https?:|images/)[^)]*\)", prose) == [], name
        for path in re.findall(r"\(`([\w.-]*/[\w/.-]+|\w+\.md)`\)", text):
            assert (ROOT / path).exists(), (name, path)
        for image in re.findall(r"\(images/([^)]+)\)", text):
            assert build.images()[image].is_file()
    assert len(PAGES["methods.md"].splitlines()) > 400
    assert "entmax" in PAGES["methods.md"]
    assert "```text\nconfig.yaml        the composed" in PAGES["formats.md"], "columns stay columns"
    for title, paths in build.METHODS.items():
        assert all(list(ROOT.glob(path)) for path in paths), title


def test_pages_are_made_of_headings_links_and_docstrings():
    text = "# A\n\nfirst\n## B `c`\n\n### D\nlast\n\n"
    assert build.sections(text) == {"A": "first", "B `c`": "## B `c`\n### D\nlast"}
    assert build._page("T", "a", "b") == "# T\n\na\n\nb\n"
    linked = "[w](results/x.md) ![p](results/y.png) [o](https://o.org)"
    assert build._of_site(linked) == "w (`results/x.md`) ![p](images/results-y.png) [o](https://o.org)"
    assert build._of_site("[e](a.py)", ROOT / "examples") == "e (`examples/a.py`)"
    docstring = (
        "One line.\n\nkey    what\nother  more\n\nwords  two\nno columns here\n\nArgs:\n    a: of it,\n        longer\n"
        "    b: x\n\nRaises:\n    ValueError: no."
    )
    assert build._prose(docstring) == (
        "One line.\n\n```text\nkey    what\nother  more\n```\n\nwords  two\nno columns here\n\n"
        "**Args**\n\n- a: of it, longer\n- b: x\n\n**Raises**\n\n- ValueError: no."
    )
    assert build._prose("Text.") == "Text."
    module = build._module("experiments/figures/setpoints.py", members=True)
    assert module.startswith("`experiments/figures/setpoints.py`\n\nWhere a row's knob stands, for")
    assert re.findall(r"^### .*", module, re.MULTILINE) == [
        "### `AtSparsity`",
        "### `with_setpoints`",
        "### `is_as_trained`",
    ]
    assert "**Attributes**\n\n- count: how it is counted.\n- is_held: training" in module
    assert "###" not in build._module("experiments/figures/setpoints.py")


def test_pages_are_written_with_what_they_show(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "pages", lambda: {"index.md": PAGES["index.md"], "options/plan.md": "ö\n"})
    build.write(tmp_path)
    assert (tmp_path / "index.md").read_text() == PAGES["index.md"]
    assert (tmp_path / "options/plan.md").read_text(encoding="utf-8") == "ö\n"
    assert (tmp_path / "site.css").read_bytes() == (ROOT / "docs/site.css").read_bytes()
    shown = re.findall(r"\]\(images/([^)]+)\)", "".join(PAGES.values()))
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == sorted(set(shown))
    assert {
        name: next(line for line in text.splitlines() if line.startswith("# ")) for name, text in PAGES.items()
    } == {
        "index.md": "# DashAttention",
        "quickstart.md": "# Quickstart",
        "recipes.md": "# Recipes",
        "library.md": "# The library",
        "results.md": "# Results",
        "trust.md": "# Trust",
        "examples.md": "# Examples",
        "methods.md": "# Methods",
        "formats.md": "# File formats",
        **{f"options/{name}.md": f"# Options: {name}" for name in SCHEMAS},
    }
    assert PAGES["options/plan.md"].startswith("---\nhide: [toc]\n---\n\n# Options: plan\n\n```text\n")
    assert PAGES["options/plan.md"].endswith("\n```\n")
    for name, titles in (("methods.md", build.METHODS), ("formats.md", build.FORMATS)):
        assert re.findall(r"^## (.*)", PAGES[name], re.MULTILINE) == list(titles)
    for path in build.FORMATS.values():
        assert f"\n\n`{path}`\n\n" in PAGES["formats.md"]


@pytest.mark.slow
def test_the_site_is_built(tmp_path):
    build.write(tmp_path / "pages")
    config = (ROOT / "mkdocs.yml").read_text().replace("outputs/docs", str(tmp_path))
    (tmp_path / "mkdocs.yml").write_text(config)
    command = (sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(tmp_path / "mkdocs.yml"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    pages = {
        path.relative_to(tmp_path / "site").with_suffix(".md").as_posix() for path in tmp_path.glob("site/**/*.html")
    }
    assert pages - {"404.md"} == set(PAGES)
    assert (tmp_path / "site/site.css").is_file()
    assert "fonts.googleapis" not in (tmp_path / "site/index.html").read_text()
