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
