import gzip
import io
import json
import os
import shutil
import subprocess
import tarfile
import zipfile

import pytest

from data import TextDataConfig
from data import collect as module
from data.collect import clean, collect, html_text, main
from data.corpora import iterate_documents

PROSE = "The first linë of a text that is long enough to be a document.\n" * 6


def archive(files, mode="w:xz"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def zipped(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in files.items():
            packed.writestr(name, content)
    return buffer.getvalue()


@pytest.fixture
def sources(tmp_path):
    """A folder with a text, a copy of it, HTML, a binary, and an archive with an archive in it."""
    folder = tmp_path / "sources"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("a\n" + PROSE)
    (folder / "deep" / "copy.txt").write_text("a  \r\n" + PROSE)
    (folder / "deep" / "packed.rst.gz").write_bytes(gzip.compress(b"b\n" + PROSE.encode()))
    (folder / "image.txt").write_bytes(b"\x89PNG\xff" * 100)
    (folder / "table.txt").write_text("0x12, 0x34, 0x56\n" * 100)
    (folder / "short.txt").write_text("short")
    inner = archive({"c.c": b"c\n" + PROSE.encode(), "c.bin": b"\0" * 999})
    (folder / "outer.tar").write_bytes(archive({"./inner.tar.xz": inner, "d.txt": b"d\n" + PROSE.encode()}, "w"))
    return folder


def first_letters(path):
    return [json.loads(line)["text"][0] for line in path.read_text().splitlines()]


def test_documents_are_found_wherever_they_lie_and_only_once(sources, tmp_path):
    output = tmp_path / "newly" / "made" / "corpus.jsonl"
    counts = collect(output, [str(sources)], [])
    assert first_letters(output) == ["a", "b", "c", "d"]
    assert (counts["documents"], counts["duplicates"], counts["no documents"]) == (4, 1, 4)
    assert counts["bytes"] == 4 * (2 + len(PROSE.encode()))
    before = output.read_bytes()
    collect(output, [str(sources)], [])
    assert output.read_bytes() == before
    assert [path.name for path in output.parent.iterdir()] == ["corpus.jsonl"]
    config = TextDataConfig(name="x", seq_len=8, source="files", files=[str(output)])
    assert [document.text[2:] for document in iterate_documents(config)] == [PROSE] * 4


def test_globs_and_patterns_choose(sources, tmp_path):
    output = tmp_path / "corpus.jsonl"
    collect(output, [str(sources / "**" / "*")], ["*.c", "*/deep/*.gz"])
    assert sorted(first_letters(output)) == ["b", "c"]
    with pytest.raises(ValueError, match="no document among 0 files"):
        collect(output, [str(sources)], ["*.nothing"])
    assert sorted(first_letters(output)) == ["b", "c"], "the old result stays"
    with pytest.raises(ValueError, match="matches no file"):
        collect(output, [str(sources / "nothing*")], [])
    (sources / "broken.tar.xz").write_bytes((sources / "outer.tar").read_bytes()[:700])
    told = []
    counts = collect(output, [str(sources)], [], lambda name, why: told.append(name))
    assert first_letters(output) == ["a", "b", "c", "d"], "what is beside it is read"
    assert (counts["unreadable"], told[-1]) == (len(told), str(sources / "broken.tar.xz"))


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
def test_a_debian_package_is_read_without_installing_it(sources, tmp_path):
    (sources / "DEBIAN").mkdir()
    (sources / "DEBIAN" / "control").write_text(
        "Package: texts\nVersion: 1\nArchitecture: all\nMaintainer: x <x@example.org>\nDescription: texts\n"
    )
    subprocess.run(["dpkg-deb", "--build", str(sources), str(tmp_path / "texts.deb")], check=True, capture_output=True)
    collect(tmp_path / "corpus.jsonl", [str(tmp_path / "texts.deb")], [])
    assert sorted(first_letters(tmp_path / "corpus.jsonl")) == ["a", "b", "c", "d"]
    (tmp_path / "texts.deb").write_bytes(b"no package")
    with pytest.raises(ValueError, match="no document among 1 files, 1 of which cannot be read"):
        collect(tmp_path / "corpus.jsonl", [str(tmp_path / "texts.deb")], [])


def test_what_cannot_be_read_is_named_and_ends_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOST_UNPACKED", 2**20)
    folder, prose = tmp_path / "folder", PROSE.encode()
    folder.mkdir()
    (tmp_path / "secret.txt").write_text("secret\n" + PROSE)
    bad = {
        "corrupt.gz": gzip.compress(b"x" + prose)[:-20],
        "bomb.gz": gzip.compress(bytes(10**7)),
        "bomb.tar.gz": gzip.compress(archive({"a.txt": bytes(2**24)}, "w")),
        "none.tar.gz": b"no archive",
        "broken.zip": zipped({"z.txt": b"z\n" + prose})[:-30],
        "large.txt": b"word " * 10**6,
    }
    for name, content in bad.items():
        (folder / name).write_bytes(content)
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "device").symlink_to("/dev/zero")
    (folder / "circle").symlink_to("circle")
    inner = {"none.tar.xz": b"no archive", "i.txt": b"i\n" + prose, "cut.gz": b"\x1f\x8b"}
    (folder / "good.tar").write_bytes(archive(inner, "w"))
    (folder / "SHOUT.TXT.GZ").write_bytes(gzip.compress(b"s\n" + prose))
    (folder / "[1].txt").write_bytes(b"g\n" + prose)
    (folder / "PACK.ZIP").write_bytes(zipped({"p.txt": b"p\n" + prose, "inner.zip": zipped({"q.txt": b"q\n" + prose})}))
    (folder / os.fsdecode(b"\xff.txt")).write_bytes(b"f\n" + prose)
    told = {}
    counts = collect(tmp_path / "corpus.jsonl", [str(folder)], [], lambda name, why: told.update({name: why}))
    assert sorted(first_letters(tmp_path / "corpus.jsonl")) == ["f", "g", "i", "p", "q", "s"]
    named = {name.removeprefix(f"{folder}/") for name in told}
    inside = {"bomb.tar.gz/a.txt", "good.tar/none.tar.xz", "good.tar/cut.gz"}
    assert named == {*bad, *inside, "link.txt", "device", "circle"}
    assert counts["unreadable"] == len(named)
    assert "leads out" in told[f"{folder}/link.txt"]
    collect(tmp_path / "one.jsonl", [str(folder / "[1].txt")], [])
    assert first_letters(tmp_path / "one.jsonl") == ["g"]


def test_a_folder_that_cannot_be_listed_is_named(sources, tmp_path, monkeypatch):
    def denied(path):
        if path.name == "deep":
            raise PermissionError(13, "Permission denied", str(path))
        return list_folder(path)

    list_folder = os.scandir
    monkeypatch.setattr(module.os, "scandir", denied)
    told = {}
    collect(tmp_path / "corpus.jsonl", [str(sources)], [], lambda name, why: told.update({name: why}))
    assert first_letters(tmp_path / "corpus.jsonl") == ["a", "c", "d"]
    assert list(told) == [str(sources / "deep")]
    assert "Permission denied" in told[str(sources / "deep")]


def test_a_corpus_within_its_source_does_not_hold_itself(sources):
    for _ in range(2):
        counts = collect(sources / "corpus.jsonl", [str(sources)], [])
        assert first_letters(sources / "corpus.jsonl") == ["a", "b", "c", "d"]
        assert (counts["documents"], counts["duplicates"], counts["no documents"]) == (4, 1, 4)
    assert counts["bytes"] == 4 * (2 + len(PROSE.encode()))


@pytest.mark.parametrize("piece", [" ", "\t\f", "\n ", "<a ", "<a b='", "<!--", "<p\n", "<p>", "&"])
def test_no_text_takes_hours(piece):
    content = (piece * 300_000)[:300_000].encode()
    assert clean("x.txt", content) is None or piece.startswith("<")
    assert "<" not in (clean("x.html", content) or "")


def test_cleaning():
    text = clean("x.txt", ("\ufeff\n\nOne  \r\n\r\n\r\n\r\n\r\n\r\ntwo\t\n" + PROSE).encode())
    assert text == "One\n\n\ntwo\n" + PROSE
    assert clean("x.txt", PROSE.encode() + b"\0") is None, "binary"


@pytest.mark.parametrize(
    ("text", "is_text"),
    [
        ("a" * 255 + "\n", True),  # of 256 bytes
        ("a" * 254 + "\n", False),
        ("ü" * 128, True),  # 257 bytes with the end of the line
        ("a word " * 142_857, True),  # of 1,000,000, less the last space and more the end of the line
        ("a word " * 142_857 + "a", False),
        ("a" * 299 + "." * 300, True),  # half of it, the end of the line among the letters
        ("a" * 298 + "." * 300, False),
        ("a" * 190 + "1_" * 100, False),  # digits are no words
    ],
)
def test_the_bounds_of_a_document(text, is_text):
    assert (clean("x.txt", text.encode()) is not None) == is_text


def test_so_much_of_a_file_is_read(monkeypatch, tmp_path):
    """A file and an archive up to their bounds, and not a byte more."""
    monkeypatch.setattr(module, "LARGEST_FILE", 1000)
    monkeypatch.setattr(module, "MOST_UNPACKED", 30_000)
    monkeypatch.setattr(module, "MOST_RATIO", 2)
    for name, size, is_read in (("a.txt", 1000, True), ("a.txt", 1001, False), ("a.txt.gz", 1001, False)):
        content = b"a word " * 143
        content = gzip.compress(content[:size]) if name.endswith(".gz") else content[:size]
        (tmp_path / name).write_bytes(content)
        told = []
        found = list(module.read_sources([str(tmp_path / name)], [], lambda name, why, told=told: told.append(why)))
        assert (len(found), told) == ((1, []) if is_read else (0, ["TooLarge: more than 1,000 bytes"]))
    inner = zipped({"z.txt": b"z"})  # in an archive that is read once, from its beginning to its end
    (tmp_path / "a.tar").write_bytes(archive({"inner.zip": inner}, "w"))
    for size, is_read in ((len(inner), True), (len(inner) - 1, False)):
        monkeypatch.setattr(module, "LARGEST_ZIP", size)
        told = []
        found = list(module.read_sources([str(tmp_path / "a.tar")], [], lambda name, why, told=told: told.append(why)))
        assert found == ([(f"{tmp_path}/a.tar/inner.zip/z.txt", b"z")] if is_read else [])
        assert told == ([] if is_read else [f"TooLarge: more than {size:,} bytes"])
    (tmp_path / "a.zip").write_bytes(inner)  # on a disk it need not be held in memory
    found = list(module.read_sources([str(tmp_path / "a.zip")], [], lambda name, why: told.append(why)))
    assert found == [(f"{tmp_path}/a.zip/z.txt", b"z")]
    for size, is_read in ((15_000, True), (30_000, False)):  # tar ends at a multiple of 10,240
        (tmp_path / "a.tar.gz").write_bytes(gzip.compress(archive({"a.bin": bytes(size), "b.txt": b"b"}, "w")))
        told = []
        found = list(
            module.read_sources([str(tmp_path / "a.tar.gz")], ["*.txt"], lambda name, why, told=told: told.append(why))
        )
        assert (len(found), len(told)) == (is_read, not is_read)
        assert is_read or "it unpacks to more than" in told[0]


def test_html_becomes_what_a_reader_sees():
    page = """<html><head><title>T</title></head><body><div role="navigation"><div>Menu</div>next</div>
    <h1>Head<a class="headerlink">#</a></h1><p>One
    <b>two</b> &amp; three.</p><script>x()</script><pre>  a = 1
  b = 2</pre><ul><li>item</ul></body></html>"""
    assert html_text(page).strip().split("\n") == ["Head", "", "One two & three.", "", "  a = 1", "  b = 2", "", "item"]


def test_what_a_page_closes_without_having_opened_it_changes_nothing():
    assert html_text("<p>a</pre></nav></p><pre>1\n  2</pre>").split("\n")[-3:-1] == ["1", "  2"]


def test_what_every_element_of_a_page_becomes():
    headings, lists = ("h1", "h6"), ("li", "ul", "ol", "dl", "dt", "dd")
    blocks = ("p", "div", "br", "tr", "pre", "table", "section", "article", "blockquote", *headings, *lists)
    found = {tag: html_text(f"a<{tag}>b</{tag}>c") for tag in (*blocks, "span", "h7", "pred", "header")}
    assert found == {tag: "a\nb\nc" if tag in blocks else "abc" for tag in found}
    for tag in ("head", "nav", "footer"):
        assert html_text(f"a<{tag}>b<{tag}>x</{tag}>y</{tag}>c") == "ac", "one within another"
    for tag in ("script", "style"):
        assert html_text(f"a<{tag}>b</{tag}>c") == "ac"
    links = '<div class="footer">b</div><div class="x">k</div><p class="headerlink">z</p><a role="navigation">q</a>'
    assert html_text(f"a{links}c") == "a\n\nk\n\nc"
    assert html_text("a<pre>1<pre>2</pre>\n 3</pre>\n 4") == "a\n1\n2\n\n 3\n4"
    for rest in (2000, 2001):  # what is left open at the end: so much is taken to be text
        assert html_text(f"<p>{'word ' * 14_000}<a {'x' * (rest - 3)}").count("x") == (rest - 3) * (rest == 2000)
    for name in ("x.htm", "X.HTML", "x.xhtml", "x.html.gz"):
        assert clean(name, b"<p>" + PROSE.encode()) == " ".join(PROSE.split()) + "\n"


def test_the_command(sources, tmp_path, monkeypatch, capsys):
    command = ["collect", str(tmp_path / "corpus.jsonl"), str(sources)]
    monkeypatch.setattr("sys.argv", command)
    main()
    assert "4 documents" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", [*command, "--match", "*.c", "*/copy.txt"])
    (sources / "broken.zip").write_bytes(b"no archive")
    main()
    said = capsys.readouterr()
    assert "corpus.jsonl: 2 documents" in said.out
    assert f"left out: {sources / 'broken.zip'} (BadZipFile: File is not a zip file)\n" in said.err
    monkeypatch.setattr("sys.argv", [*command, "absent"])
    with pytest.raises(SystemExit, match="error: absent does not exist"):
        main()
    monkeypatch.setattr("sys.argv", ["collect", str(tmp_path / "a.txt"), str(sources)])
    with pytest.raises(SystemExit):
        main()
    assert "a.txt must end in .jsonl" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["collect", str(sources / "a.txt" / "b.jsonl"), str(sources)])
    with pytest.raises(SystemExit, match=r"error: .*b\.jsonl cannot be written \(.*: make room, or name another place"):
        main()
    monkeypatch.setattr("sys.argv", command)
    counts = {"documents": 1234, "bytes": 2_500_000, "no documents": 5, "duplicates": 6, "unreadable": 7}
    monkeypatch.setattr("data.collect.collect", lambda *_: counts)
    main()
    said = "1,234 documents, 2.5 MB; left out: 5 files that are none, 6 duplicates, 7 that cannot be read"
    assert said in capsys.readouterr().out
