import bz2
import datetime
import gzip
import hashlib
import json
import lzma
import os
import random
import shutil

import numpy as np
import pytest

import data
from data import DataSourceError, TextDataConfig, corpora, digests, files
from data.corpora import corpus_fingerprint, iterate_documents, split_of
from data.digests import file_digests


def files_config(*files, **overrides):
    return TextDataConfig(name="x", seq_len=8, source="files", files=[str(file) for file in files], **overrides)


def texts(config):
    return [document.text for document in iterate_documents(config)]


def stdlib_config(**overrides):
    return TextDataConfig(name="x", seq_len=8, source="python_stdlib", **overrides)


def test_a_text_file_is_a_document(tmp_path):
    (tmp_path / "b.txt").write_text("second\nfile\n")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "folder.txt").mkdir()
    assert texts(files_config(tmp_path / "*.txt")) == ["first", "second\nfile\n"]


def test_jsonl_parquet_and_compressed_files_give_the_same_documents(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"body": f"document {index}"} for index in range(5)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "x.jsonl").write_text(lines)
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    expected = [row["body"] for row in rows]
    for name in ("x.jsonl", "x.jsonl.gz", "x.parquet"):
        assert texts(files_config(tmp_path / name, text_column="body")) == expected


def test_packed_files_and_any_spelling_of_names_give_the_same_documents(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"text": f"document {index}", "n": index} for index in range(5)]
    expected = [row["text"] for row in rows]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    contents = {
        "X.JSONL": lines,
        "x.ndjson": b"\xef\xbb\xbf" + lines,
        "x.jsonl.zst": pa.compress(lines, codec="zstd", asbytes=True),
        "x.jsonl.bz2": bz2.compress(lines),
        "x.JSON.XZ": lzma.compress(lines),
        "list.json": json.dumps(rows, indent=1).encode(),
        "rows.json": b"".join(json.dumps(row, indent=1).encode() + b" \n"[: i % 3] for i, row in enumerate(rows)),
        "[ab]*.jsonl": lines,
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert texts(files_config(tmp_path / name)) == expected, name
    binary = pa.table({"text": pa.array([text.encode() for text in expected], pa.binary())})
    pq.write_table(binary, tmp_path / "binary.parquet")
    dictionary = pa.table({"text": pa.array(expected).dictionary_encode(), "n": pa.array(range(5))})
    pq.write_table(dictionary, tmp_path / "dictionary.parquet")
    assert texts(files_config(tmp_path / "*.parquet")) == expected * 2
    (tmp_path / "t.TXT").write_text("a text")
    assert texts(files_config(tmp_path / "t.TXT", tmp_path / "X.JSONL")) == ["a text", *expected]


def test_of_a_row_only_the_text_is_parsed(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    others = [{"day": "2026-01-01"}, {"day": 3}, {"day": {"a": [1]}}, {}, {"day": None, "x": [{}]}]
    rows = [{"text": f"document {index}", **other} for index, other in enumerate(others)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert texts(files_config(tmp_path / "x.jsonl")) == [row["text"] for row in rows]
    for index, values in enumerate(([1], ["a"], [datetime.date(2026, 1, 1)])):
        pq.write_table(pa.table({"text": [f"{index}"], "day": values}), tmp_path / f"{index}.parquet")
    assert texts(files_config(tmp_path / "*.parquet")) == ["0", "1", "2"]


def test_what_cannot_be_read_is_left_out_and_named_up_to_a_limit(tmp_path, capsys, monkeypatch):
    good = [b'{"text": "a"}', b'{"text": "b"}', b'{"text": "c"}']
    bad = [b"{", b"[1]", b'{"body": "x"}', b'{"text": 3}', b'{"text": "\\ud800"}', b'{"text": "\xff"}']
    rows = [good[0], b"", *bad, b"", b'{"text": null}', b'{"text": ""}', good[1]]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(rows))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(good[2] + b"\n" + good[2] * 99)[:-9])
    (tmp_path / "c.parquet").write_bytes(b"no parquet")
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "e.json").write_text("[{}")
    (tmp_path / "f.txt").write_text("f")
    config = files_config(tmp_path / "*")
    assert [text for text in texts(config) if text != "c"] == ["a", "b", "f"]
    told = capsys.readouterr().err
    for name in ("a.jsonl, row 3", "a.jsonl, row 8", "b.jsonl.gz", "c.parquet", "d.txt"):
        assert f"{tmp_path}/{name}:" in told
    assert "e.json:" in told
    assert "left out: 10 rows" not in told
    (tmp_path / "ee.json").write_text("[{}")
    assert texts(config)[-1] == "f"
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1, "ten by name, which were named before, and how many in all"
    assert told[0].startswith(f"left out: 11 rows and files in all, the first of them {tmp_path}/a.jsonl, row 3: ")
    (tmp_path / "ee.json").unlink()
    with pytest.raises(
        DataSourceError, match=r"^4 rows or files .* more than data\.bad_rows=3, the last .*a\.jsonl, row 6"
    ):
        texts(files_config(tmp_path / "*", bad_rows=3))
    (tmp_path / "g.jsonl").symlink_to(tmp_path / "gone")
    (tmp_path / "gone").mkdir()  # as a disk that fails: nobody knows what is in it
    monkeypatch.setattr(corpora, "data_files", lambda corpus: [str(tmp_path / "f.txt"), str(tmp_path / "g.jsonl")])
    with pytest.raises(DataSourceError, match=r"cannot be read \(IsADirectoryError"):
        texts(config)
    monkeypatch.undo()
    with pytest.raises(DataSourceError, match=r"no document; 1 rows or files were left out: .*c\.parquet"):
        texts(files_config(tmp_path / "c.parquet"))
    (tmp_path / "h.jsonl.gz").write_bytes(good[2])  # an OSError, but of no disk
    assert texts(files_config(tmp_path / "[fh].*")) == ["f"]


@pytest.mark.parametrize("separator", ["|", "||", "|||", "|-|", "abab"])
def test_a_separator_is_found_wherever_a_piece_ends(tmp_path, monkeypatch, separator):
    path, randomness = tmp_path / "book.txt", random.Random(0)
    for _ in range(30):
        text = "".join(randomness.choices("ab|-x", (3, 3, 4, 1, 1), k=60))
        path.write_text(text)
        for size in (1, 2, 3, 7, 60, 99):
            monkeypatch.setattr(files, "_PIECE", size)
            with path.open() as file:
                found = list(files.split_text(file, files_config(path, document_separator=separator)))
            assert found == text.split(separator), (text, size)


def test_a_large_text_is_split_into_documents(tmp_path, text_config):
    path = tmp_path / "book.txt"
    path.write_text("one\n\n---\ntwo\nlines\n---\n \n---\nthree")
    expected = ["one\n\n", "two\nlines\n", "three"]
    for separator in ("---\n", r"---\n", "---\r\n"):
        assert texts(files_config(path, document_separator=separator)) == expected
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    for separator in ("---\n", r"---\r\n"):
        assert texts(files_config(path, document_separator=separator)) == expected
    paragraphs = [f"paragraph {index} " * 9 + "\n\n" for index in range(300)]
    path.write_text("".join(paragraphs))
    assert len(texts(files_config(path))) == 1
    found = texts(files_config(path, document_bytes=2000))
    assert "".join(found) == path.read_text()
    assert all(1000 < len(text) <= 2000 and text.endswith("\n\n") for text in found[:-1])
    for before, end, behind, cut in (
        *(("a" * 1500, "\n\n", "b" * 498, None), ("a" * 1500, "\n\n", "b" * 499, 1502)),  # from a character more on
        *(("a" * 1500, "\n", "b" * 600, 1501), ("a" * 1500, " ", "b" * 600, 1501)),
        *(("a" * 1100, "\n\n", "b\nc d " * 200, 1102), ("a b" * 350, "\n", "c " * 500, 1051)),  # paragraph, line, word
        *(("a" * 900, "\n\n", "b" * 1200, 2000), ("a" * 1000, "\n\n", "b" * 1200, 1002)),  # in the second half alone
        *(("a" * 999, "\n\n", "b" * 1200, 1001), ("a" * 1998, "\n\n", "b" * 9, 2000)),
        ("a" * 1999, "\n\n", "b" * 9, 2000),
    ):
        path.write_text(before + end + behind)
        assert texts(files_config(path, document_bytes=2000))[0] == path.read_text()[:cut], (
            before[-3:],
            end,
            behind[:3],
        )
    path.write_text("x" * 5000)
    assert list(map(len, texts(files_config(path, document_bytes=2000)))) == [2000, 2000, 1000]
    assert len(texts(files_config(path, document_bytes=None))) == 1
    with pytest.raises(ValueError, match=r"no validation document.*data\.document_separator"):
        data.build_data(
            text_config(files=[str(path)], validation_fraction=1e-9), split="train", cache_dir=tmp_path, seed=0, rows=1
        )
    with pytest.raises(ValueError, match="separates nothing"):
        files_config(path, document_separator="")


def test_a_separator_that_no_file_has_is_told(tmp_path, capsys):
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(f"file {number}\n---")
    (tmp_path / "rows.jsonl").write_text('{"text": "===\\n***"}\n' * 2)  # rows are no cut texts
    every = [tmp_path / "*.txt", tmp_path / "rows.jsonl"]
    assert len(texts(files_config(*every, document_separator="==="))) == 5
    told = "data.document_separator='===' is in no text file of data.files: each of them is one document\n"
    assert capsys.readouterr().err == told
    (tmp_path / "1.txt").write_text("one file has it at its end\n***")
    texts(files_config(*every, document_separator="***"))
    texts(files_config(*every, document_separator="==", max_documents=2))  # not all were looked at
    texts(files_config(tmp_path / "rows.jsonl", document_separator="+++"))
    list(
        files.file_texts(
            [str(tmp_path / "0.txt")], files_config(tmp_path / "0.txt", document_separator="+++"), are_all=False
        )
    )
    assert capsys.readouterr().err == ""


def test_empty_and_null_documents_are_skipped(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"text": null}\n{"text": ""}\n{"text": "b"}\n')
    assert texts(files_config(tmp_path / "x.jsonl")) == ["a", "b"]
    (tmp_path / "x.jsonl").write_text("\n")
    assert texts(files_config(tmp_path / "x.jsonl")) == [], "nothing was left out"


def test_bad_files_are_named(tmp_path, corpus):
    with pytest.raises(ValueError, match=r"nothing.*matches no file"):
        texts(files_config(tmp_path / "nothing*"))
    with pytest.raises(ValueError, match=r"text_column='body' is not among the columns .*extra"):
        texts(files_config(corpus, text_column="body"))
    with pytest.raises(ValueError, match="holds int, not text"):
        texts(files_config(corpus, text_column="extra"))
    (tmp_path / "x.pdf").write_text("text")
    with pytest.raises(ValueError, match=r"x\.pdf: names must end in"):
        texts(files_config(corpus, tmp_path / "x.pdf"))


@pytest.mark.parametrize("max_documents", [None, 5])
def test_a_hub_that_is_out_of_reach_is_named(monkeypatch, max_documents):
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    config = TextDataConfig(name="x", seq_len=8, source="hub", path="no/such", max_documents=max_documents)
    with pytest.raises(DataSourceError, match=r"data\.path='no/such': Cannot resolve .* Go online once"):
        texts(config)


def test_caps(corpus):
    everything = texts(files_config(corpus))
    assert texts(files_config(corpus, max_documents=7)) == everything[:7]
    sizes = np.cumsum([len(text.encode()) for text in everything])
    for most, count in ((1, 1), (sizes[4], 5), (sizes[4] + 1, 6), (sizes[-1] + 9, len(everything))):
        assert texts(files_config(corpus, max_bytes=int(most))) == everything[:count]


def test_split_depends_on_the_content_only_and_has_about_the_share_asked_for():
    names = [split_of(f"document {index}", 0.2) for index in range(5000)]
    assert 0.17 < names.count("validation") / 5000 < 0.23
    assert names == [split_of(f"document {index}", 0.2) for index in range(5000)]
    # A larger share keeps the validation documents of a smaller one.
    assert all(split_of(f"document {i}", 0.4) == "validation" for i in range(5000) if names[i] == "validation")


def test_python_sources_sample_all_packages_in_a_fixed_order():
    documents = list(iterate_documents(stdlib_config(max_documents=200)))
    assert documents == list(iterate_documents(stdlib_config(max_documents=200)))
    assert len({document.text for document in documents}) == len(documents) == 200
    packages = {document.id.split("/")[0] for document in documents}
    assert len(packages) > 10
    assert min(packages) < "f" < "p" < max(packages), "not the alphabet's head"


def test_python_sources_are_neither_stubs_nor_tables_nor_there_twice(tmp_path, monkeypatch):
    """Of a virtual environment whose Python has packages of its own, which do not count."""
    stdlib, packages = tmp_path / "lib", tmp_path / "venv" / "site-packages"
    files = {stdlib / f"{size}.py": b"#" * size for size in (255, 256, 262_144, 262_145)}
    files |= {stdlib / "site-packages" / "theirs.py": b"a" * 300, stdlib / "dist-packages" / "x.py": b"b" * 300}
    files |= {stdlib / "a" / "deep" / "c.py": b"c" * 300, stdlib / "d.txt": b"d" * 300, stdlib / "e.py": b"\xff" * 300}
    files |= {packages / "a" / "copy.py": b"c" * 300, packages / "256.py": b"hidden by the other " * 20}
    files |= {packages / "site-packages" / "f.py": b"f" * 300}
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    paths = {"stdlib": str(stdlib), "purelib": str(packages), "platlib": str(packages)}
    monkeypatch.setattr(corpora.sysconfig, "get_paths", lambda: paths)
    corpora._list_python_sources.cache_clear()
    try:
        found = list(iterate_documents(stdlib_config()))
    finally:
        corpora._list_python_sources.cache_clear()
    (copied,) = {document.id for document in found} & {"a/deep/c.py", "a/copy.py"}  # the first in the order of hashes
    assert {document.id for document in found} == {"256.py", "262144.py", copied, "site-packages/f.py"}
    assert [document.id for document in found] == sorted((document.id for document in found), key=corpora.digest)
    assert {document.text[0] for document in found} == {"#", "c", "f"}


def test_fingerprint_follows_what_decides_the_documents(corpus, tmp_path, monkeypatch):
    def of(config):
        return corpus_fingerprint(config, tmp_path / "cache")

    base = of(files_config(corpus))
    assert of(files_config(corpus, vocab_size=999)) == base
    for change in ({"max_documents": 9}, {"max_bytes": 9}, {"text_column": "t"}):
        assert of(files_config(corpus, **change)) != base
    cuts = ({"document_separator": "-"}, {"document_bytes": 9})  # of texts, and of nothing else
    assert {of(files_config(corpus, **cut)) for cut in cuts} == {base}
    (tmp_path / "a.txt").write_text("one - two")
    assert len({of(files_config(tmp_path / "a.txt", **cut)) for cut in ({}, *cuts)}) == 3
    assert len({of(files_config(corpus, tmp_path / "a.txt", **cut)) for cut in ({}, *cuts)}) == 3
    shutil.copy(corpus, tmp_path / "b.jsonl")  # which was called .txt by mistake
    mixed = of(files_config(tmp_path / "a.txt", tmp_path / "b.jsonl"))
    (tmp_path / "b.jsonl").rename(tmp_path / "b.txt")
    assert of(files_config(tmp_path / "a.txt", tmp_path / "b.txt")) != mixed
    recall = {"name": "x", "seq_len": 8, "source": "recall", "max_documents": 9}
    changes = ({}, {"recall_seed": 1}, {"facts_min": 2}, {"facts_max": 9}, {"hay_max": 9}, {"max_documents": 8})
    fingerprints = {of(TextDataConfig(**recall | change)) for change in changes}
    monkeypatch.setattr(corpora, "RECALL_VERSION", 99)
    assert len(fingerprints | {of(TextDataConfig(**recall))}) == len(changes) + 1
    assert len({of(stdlib_config(max_bytes=count, max_documents=9)) for count in (1, 30_000)}) == 2
    with corpus.open("a") as file:
        file.write('{"text": "one more"}\n')
    assert of(files_config(corpus)) != base
    assert len({of(stdlib_config(max_documents=count)) for count in (20, 30)}) == 2


def test_a_corpus_is_what_its_files_hold_wherever_they_lie(corpus, tmp_path):
    base = corpus_fingerprint(files_config(corpus), tmp_path / "cache")
    os.utime(corpus, (1, 1))
    assert corpus_fingerprint(files_config(corpus), tmp_path / "cache") == base
    (tmp_path / "elsewhere").mkdir()
    copy = shutil.copy(corpus, tmp_path / "elsewhere" / "renamed.jsonl")
    assert corpus_fingerprint(files_config(copy), tmp_path / "other_cache") == base
    (tmp_path / "later").mkdir()
    other = tmp_path / "later" / "other.jsonl"
    other.write_text('{"text": "x"}\n')
    both = corpus_fingerprint(files_config(copy, other), tmp_path / "cache")
    other = other.rename(tmp_path / "earlier.jsonl")
    assert corpus_fingerprint(files_config(copy, other), tmp_path / "cache") == both, "in the order that is given"
    assert corpus_fingerprint(files_config(other, copy), tmp_path / "cache") != both
    assert texts(files_config(other, copy, tmp_path / "*.jsonl"))[0] == "x", "a file is one, by whichever name"


def test_a_file_is_read_again_only_if_its_size_or_times_have_changed(tmp_path, monkeypatch):
    path, read = tmp_path / "a.txt", []
    monkeypatch.setattr(digests, "_look", lambda path, look=digests._look: read.append(path) or look(path))

    def digest():
        read.clear()
        (found,) = file_digests([str(path)], tmp_path / "cache")
        assert found == hashlib.sha256(path.read_bytes()).hexdigest()
        return len(read)

    path.write_text("one")
    assert [digest(), digest()] == [1, 1], "written a moment ago, it may change within the clock's grain"
    for age, reads in ((1.5, 1), (2.5, 0)):
        monkeypatch.setattr(digests.time, "time", lambda age=age: path.stat().st_ctime + age)
        assert [digest(), digest()] == [1, reads]
    monkeypatch.setattr(digests, "_SETTLED_SECONDS", -1)
    os.utime(path)
    assert [digest(), digest()] == [1, 0]
    stat = path.stat()
    path.write_text("two")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as some copy programs do: the same size and time
    assert [digest(), digest()] == [1, 0]
    for index in (tmp_path / "cache" / "digests").glob("*.json"):
        whole = index.read_text()
        for damaged in ("{", "[]", '{"a.txt": 7}', whole.replace(hashlib.sha256(b"two").hexdigest()[:9], "0" * 9)):
            index.write_text(damaged)
            assert [digest(), digest()] == [1, 0]


def test_digests_come_in_the_order_of_the_files_and_only_what_changed_is_read(tmp_path, monkeypatch):
    """Of several folders, in which files have the same names."""
    read = []
    monkeypatch.setattr(digests, "_look", lambda path, look=digests._look: read.append(path) or look(path))
    monkeypatch.setattr(digests, "_SETTLED_SECONDS", -1)
    paths = [tmp_path / folder / name for name in ("b.txt", "a.txt") for folder in ("two", "one")]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{path}")

    def check(*looked_at):
        read.clear()
        expected = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
        assert file_digests(list(map(str, paths)), tmp_path / "cache") == expected
        assert sorted(read) == sorted(map(str, looked_at))

    check(*paths)
    check()
    paths[1].write_text("other")
    check(paths[1])
    assert file_digests([str(paths[2])], tmp_path / "cache") == [hashlib.sha256(paths[2].read_bytes()).hexdigest()]
    check()
    assert {path.suffix for path in (tmp_path / "cache" / "digests").iterdir()} <= {".json", ".lock"}


def test_a_file_that_changes_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    path, digest = tmp_path / "a.txt", hashlib.file_digest
    path.write_text("one")
    monkeypatch.setattr(digests, "_SETTLED_SECONDS", -1)

    def change(file, kind):
        found = digest(file, kind)
        path.write_text("other")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(digests.hashlib, "file_digest", change)
        file_digests([str(path)], tmp_path / "cache")
    assert file_digests([str(path)], tmp_path / "cache") == [hashlib.sha256(b"other").hexdigest()]


def test_a_cache_that_cannot_be_written_keeps_no_digests(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "cache").write_text("a file")
    assert file_digests([str(tmp_path / "a.txt")], tmp_path / "cache") == [hashlib.sha256(b"one").hexdigest()]


def test_a_file_that_cannot_be_read_is_named(corpus, tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(digests, "_look", refuse)
    with pytest.raises(DataSourceError, match=r"corpus\.jsonl.*cannot be read \(PermissionError"):
        corpus_fingerprint(files_config(corpus), tmp_path / "cache")
