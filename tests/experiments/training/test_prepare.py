"""The command that fills the cache before a run."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir

from data import build_data, build_tokenizer, prepare_all
from experiments.schema import to_config
from experiments.training import prepare as prepare_module
from experiments.training.prepare import loader_speed, prepare
from tests import forked

ROOT = Path(__file__).parents[3]
MIXTURE = (
    *("data=mixture", "data.seq_len=64", "data.vocab_size=300", "data.tokenizer_bytes=200000"),
    *("data.corpora.python.max_bytes=1000000", "data.corpora.recall.max_documents=100", "data.validation_rows=4"),
)


class Part(SimpleNamespace):
    """Of documents of 250,000 tokens."""

    def __len__(self):
        return 250_000 * self.num_documents


@pytest.mark.long
def test_prepare_mends_what_is_damaged_and_a_run_finds_it_all(make_config, tmp_path, capfd):
    config = make_config("run", "data.max_bytes=1000000", f"cache_dir={tmp_path}")
    prepare(config)
    said = capfd.readouterr().out
    told = r"^python_stdlib: ([\d,]+) documents, (1\.\d) MB of text, ([\d,]+) tokens \(([\d.]+) bytes each\), (.*)"
    *numbers, folder = re.search(told, said, re.MULTILINE).groups()
    documents, megabytes, count, each = (float(number.replace(",", "")) for number in numbers)
    (corpus,) = prepare_all(config.data, build_tokenizer(config.data, tmp_path), tmp_path).values()
    parts = [*corpus.training.values(), corpus.validation]
    assert documents == sum(part.num_documents for part in parts)
    assert count == sum(path.stat().st_size for path in Path(folder).rglob("*.tokens")) / 2
    size = sum(part.num_bytes for part in parts)
    assert (megabytes, each) == (round(size / 1e6, 1), round(size / count, 2))
    assert re.search(r"^the loader alone: [\d,]+ tokens/s", said, re.MULTILINE)
    (tokens,) = tmp_path.glob("tokens/*/shard-00000/train-0.tokens")
    written, whole = tokens.stat().st_mtime_ns, tokens.read_bytes()
    prepare(config)
    assert tokens.stat().st_mtime_ns == written, "intact: nothing is made again"
    tokens.write_bytes(whole[:1000] + b"\0\0" + whole[1002:])
    prepare(config)
    assert tokens.read_bytes() == whole
    written = tokens.stat().st_mtime_ns
    build_data(config.data, split="train", seed=0, rows=1, cache_dir=tmp_path)
    assert tokens.stat().st_mtime_ns == written


def test_the_loaders_speed_leaves_out_its_first_batch(monkeypatch):
    now = 0.0
    monkeypatch.setattr(prepare_module, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(prepare_module, "LOADER_SECONDS", 3.0)

    def stream():
        nonlocal now
        for seconds in (100.0, *[0.75] * 9):
            now += seconds
            yield SimpleNamespace(num_tokens=30)

    assert loader_speed(stream()) == 4 * 30 / 3.0


def test_what_is_prepared_is_what_the_run_would_read(make_config, tmp_path, monkeypatch, capsys):
    """The commits and the tokenizer that its directory holds already, of every part what is damaged made again."""
    asked = []
    first, second, held = (
        Part(num_documents=n, num_bytes=size) for n, size in ((3, 1_500_000), (4, 2_500_000), (1, 10**6))
    )
    corpus = SimpleNamespace(training={"a": first, "b": second}, validation=held, fingerprint="f00")

    def step(name, answer):
        monkeypatch.setattr(
            prepare_module, name, lambda *given, **options: asked.append((name, given, options)) or answer
        )

    for name, answer in (
        ("check_origin_tokenizer", None),
        ("with_commits", "with commits"),
        ("with_own_tokenizer", "with all"),
        ("build_tokenizer", "a tokenizer"),
        ("prepare_all", {"python": corpus}),
        ("build_data", "a stream"),
        ("loader_speed", 1234.5),
    ):
        step(name, answer)
    config = make_config("run", "seed=3", "rows_per_micro_batch=2", "data.tokenizer=null")
    config = replace(config, init_from=str(tmp_path / "origin"), branch_from="trunk@3")
    prepare(config)
    cache, run = Path(config.cache_dir), Path(config.run_dir)
    own = [
        ("with_commits", (config.data, config.run_dir, "trunk@3"), {}),
        ("with_own_tokenizer", ("with commits", run), {}),
        ("build_tokenizer", ("with all", cache), {}),
        ("prepare_all", ("with all", "a tokenizer", cache), {"verify": True}),
        ("build_data", ("with all",), {"split": "train", "seed": 3, "rows": 2, "cache_dir": cache}),
        ("loader_speed", ("a stream",), {}),
    ]
    assert asked == [("check_origin_tokenizer", (config.data, tmp_path / "origin"), {}), *own]
    told = f"python: 8 documents, 5.0 MB of text, 2,000,000 tokens (2.50 bytes each), {cache}/tokens/f00\n"
    assert capsys.readouterr().out == told + "the loader alone: 1,234 tokens/s on one rank\n"
    asked.clear()
    prepare(replace(config, any_tokenizer=True, rows_per_micro_batch=None))
    assert [name for name, _, _ in asked] == [name for name, _, _ in own]
    assert asked[-2][2]["rows"] == 4


def test_what_is_generated_while_training_needs_no_preparation():
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = to_config(compose("train", ["data=mqar"]))
    with pytest.raises(ValueError, match="nothing to prepare"):
        prepare(config)


def test_the_command_takes_the_arguments_of_a_run(tmp_path):
    done = forked.run("-m", "experiments.training.prepare", *MIXTURE, f"cache_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^(\w+): ", done.stdout, re.MULTILINE) == ["python", "recall"]
