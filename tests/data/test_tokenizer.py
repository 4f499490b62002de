import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, processors

from data import MixtureDataConfig
from data import tokenizer as tokenizer_module
from data.config import MixedCorpusConfig
from data.corpora import iterate_documents, split_of
from data.tokenizer import DEFAULT_EOS, LARGEST_ID, TextTokenizer, _training_texts, build_tokenizer


@pytest.fixture
def tokenizer(text_config, tmp_path):
    return build_tokenizer(text_config(), tmp_path / "cache")


def test_any_text_survives(tokenizer):
    everything = "".join(map(chr, [*range(0x250), 0x6CE8, 0x1F642, 0x10FFFF])) + "\r\n\t  tail  "
    for text in ("", everything, "query key value", "a <|endoftext|> b"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.encode_documents([text]) == [[*tokenizer.encode(text), tokenizer.eos_id]]


def test_special_tokens_spelled_in_a_text_are_text(tokenizer):
    assert tokenizer.eos_id not in tokenizer.encode("a <|endoftext|> b")
    assert tokenizer.decode([tokenizer.eos_id]) == "<|endoftext|>"


def test_ids_stay_below_vocab_size(tokenizer, text_config):
    assert tokenizer.vocab_size == 320
    ids = [token for document in iterate_documents(text_config()) for token in tokenizer.encode(document.text)]
    assert 0 <= min(ids) < 257 <= max(ids) < tokenizer.vocab_size


def test_training_is_cached_and_deterministic(tokenizer, text_config, tmp_path, monkeypatch):
    folders = list((tmp_path / "cache" / "tokenizers").glob("*/tokenizer.json"))
    written = folders[0].stat().st_mtime_ns
    build_tokenizer(text_config(), tmp_path / "cache")
    assert folders[0].stat().st_mtime_ns == written
    again = build_tokenizer(text_config(), tmp_path / "elsewhere")
    assert again.fingerprint() == tokenizer.fingerprint()
    other = build_tokenizer(text_config(vocab_size=300), tmp_path / "cache")
    assert other.fingerprint() != tokenizer.fingerprint()
    # What decides the merges, and nothing else, makes another one.
    assert (
        build_tokenizer(text_config(seq_len=32, pack="plain"), tmp_path / "cache").fingerprint() == again.fingerprint()
    )
    changes = [{"tokenizer_bytes": 9}, {"validation_fraction": 0.3}, {"eos_token": "</s>"}, {"bos_token": "<s>"}]
    for change in [*changes, {"max_documents": 100}]:
        build_tokenizer(text_config(**change), tmp_path / "cache")
    monkeypatch.setattr(tokenizer_module, "TRAINER_VERSION", tokenizer_module.TRAINER_VERSION + 1)
    build_tokenizer(text_config(), tmp_path / "cache")
    monkeypatch.undo()
    assert len(list((tmp_path / "cache" / "tokenizers").glob("*/tokenizer.json"))) == 2 + len(changes) + 2
    other.save(folders[0])  # as a flipped bit in a merge: a tokenizer, and not the one that was trained
    with pytest.raises(ValueError, match=rf"is another tokenizer .* or remove {folders[0].parent}: the same"):
        build_tokenizer(text_config(), tmp_path / "cache")


def test_it_is_trained_on_so_much_of_each_corpus_as_its_weight_says(corpus, tmp_path):
    """Documents of the training split, up to the one that brings a corpus to its share."""
    (tmp_path / "other.jsonl").write_text("".join(f'{{"text": "other {i}"}}\n' for i in range(40)))
    files = {"toy": corpus, "other": tmp_path / "other.jsonl"}
    corpora = {
        name: MixedCorpusConfig(source="files", files=[str(path)], weight=weight)
        for (name, path), weight in zip(files.items(), (3.0, 1.0), strict=True)
    }
    fields = {"name": "x", "seq_len": 8, "corpora": corpora, "validation_fraction": 0.2, "vocab_size": 300}
    three = sum([len(text) for text in (f"other {i}" for i in range(40)) if split_of(text, 0.2) == "train"][:3])
    for wanted in (4 * three, 4 * three + 4, 4_000_000):  # with the fourth document from a byte more on
        config, expected = MixtureDataConfig(**fields, tokenizer_bytes=wanted), []
        for path, share in zip(files.values(), (0.75, 0.25), strict=True):
            read = 0
            for text in (json.loads(line)["text"] for line in path.read_text().splitlines()):
                if split_of(text, 0.2) == "train" and read < wanted * share:
                    expected.append(text)
                    read += len(text.encode())
        assert list(_training_texts(config)) == expected
    build_tokenizer(config, tmp_path / "cache")
    other_weights = replace(config, corpora=corpora | {"other": replace(corpora["other"], weight=2.0)})
    build_tokenizer(other_weights, tmp_path / "cache")
    assert len(list((tmp_path / "cache" / "tokenizers").glob("*/tokenizer.json"))) == 2


def test_what_cannot_be_written_leaves_nothing(tokenizer, tmp_path, monkeypatch):
    def full(backend, path):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenizer_module, "_write", full)
    for save in (tokenizer.save, tokenizer.save_folder):
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path / "kept")
        assert [path.name for path in tmp_path.iterdir() if "kept" in path.name] == []


def test_a_name_that_is_no_file_is_one_on_the_hub(tokenizer, monkeypatch):
    asked = []
    monkeypatch.setattr(tokenizer_module, "_from_hub", lambda name: asked.append(name) or tokenizer.backend)
    loaded = TextTokenizer.load("some/model")
    assert (asked, loaded.name, loaded.eos_token, loaded.settings) == (["some/model"], "some/model", DEFAULT_EOS, {})


def test_saved_tokenizer_loads(tokenizer, text_config, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = build_tokenizer(text_config(tokenizer=str(tmp_path / "tokenizer.json")), tmp_path / "cache")
    assert loaded.encode("sparse attention") == tokenizer.encode("sparse attention")
    assert loaded.eos_id == tokenizer.eos_id


def test_bad_tokenizers_are_named(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"missing\.json' does not exist"):
        TextTokenizer.load(str(tmp_path / "missing.json"), "<|endoftext|>")
    tokenizer.save(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=r"data\.eos_token"):
        TextTokenizer.load(str(tmp_path / "tokenizer.json"), "</s>")


def test_a_folder_says_which_token_ends_a_document(tokenizer, tmp_path):
    backend = Tokenizer.from_str(tokenizer.backend.to_str())
    backend.add_special_tokens(["<s>", "</s>", "<end>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    assert TextTokenizer.load(str(tmp_path)).eos_token == "<|endoftext|>"  # nothing says otherwise
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [backend.token_to_id("<end>"), 0]}))
    assert TextTokenizer.load(str(tmp_path)).eos_token == "<end>"
    for junk in (-1, 2**32, 10**30, True, 2.5, "x", [], [None], {}):
        (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": junk}))
        assert TextTokenizer.load(str(tmp_path)).eos_token == "<|endoftext|>"
    settings = {"eos_token": {"content": "</s>", "lstrip": False}, "bos_token": "<s>", "auto_map": {"x": "y.py"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = TextTokenizer.load(str(tmp_path))
    assert (loaded.eos_token, loaded.bos_id, loaded.named_bos_id) == ("</s>", None, backend.token_to_id("<s>"))
    begun = TextTokenizer.load(str(tmp_path), bos_token="<end>")
    assert begun.named_bos_id == begun.bos_id == backend.token_to_id("<end>")
    other_end = TextTokenizer.load(str(tmp_path), "<end>")
    other_end.save_folder(tmp_path / "other")
    assert other_end.eos_token == TextTokenizer.load(str(tmp_path / "other")).eos_token == "<end>"
    saved = json.loads((tmp_path / "other" / "tokenizer_config.json").read_text())
    assert saved["eos_token"] == "</s>", "what ends a turn of a chat stays"
    loaded.save_folder(tmp_path / "kept" / "tokenizer")
    kept = TextTokenizer.load(str(tmp_path / "kept" / "tokenizer"))
    assert kept.fingerprint() == loaded.fingerprint()
    assert (kept.named_bos_id, kept.settings.get("auto_map")) == (loaded.named_bos_id, None)


def llama_like(tokenizer, folder, settings=None, template=None):
    """A folder whose tokenizer has <s>, which ``template`` puts somewhere."""
    backend = Tokenizer.from_str(tokenizer.backend.to_str())
    backend.add_special_tokens(["<s>", "<t>"])
    if template is not None:
        tokens = [(name, backend.token_to_id(name)) for name in ("<s>", "<t>")]
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=tokens)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings or {}))
    return str(folder)


@pytest.mark.parametrize(
    ("settings", "template", "begins"),
    [
        ({"bos_token": "<s>"}, None, None),  # SmolLM2's names one, and puts it nowhere
        ({"bos_token": "<s>"}, "<s> $A", "<s>"),  # Llama's
        ({}, "$A <t>", None),
        ({"bos_token": "<s>", "add_bos_token": False}, "<s> $A", "<s>"),  # transformers goes by the file, too
    ],
)
def test_documents_begin_as_the_tokenizer_begins_texts(tokenizer, tmp_path, settings, template, begins):
    from transformers import PreTrainedTokenizerFast

    folder = llama_like(tokenizer, tmp_path, settings, template)
    loaded = TextTokenizer.load(folder)
    assert loaded.bos_token == begins
    begin = [] if begins is None else [loaded.backend.token_to_id(begins)]
    words = loaded.encode("query key")
    assert loaded.encode_prompt("query key") == [*begin, *words]
    assert loaded.encode_documents(["query key", ""]) == [[*begin, *words, loaded.eos_id], [*begin, loaded.eos_id]]
    assert loaded.begin([*begin, *words]) == [*begin, *words], "once"
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)("query key")["input_ids"]
    assert theirs[: len(begin) + len(words)] == [*begin, *words]
    loaded.save_folder(tmp_path / "kept")
    kept = TextTokenizer.load(str(tmp_path / "kept"))
    assert (kept.bos_token, kept.fingerprint()) == (begins, loaded.fingerprint())


def test_of_two_files_that_differ_the_tokenizers_own_counts(tokenizer, tmp_path):
    llama_like(tokenizer, tmp_path, {"bos_token": "<s>", "eos_token": {"content": "<t>"}})
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "<t>", "eos_token": "<s>"}')
    loaded = TextTokenizer.load(str(tmp_path))
    assert (loaded.settings["bos_token"], loaded.eos_token) == ("<s>", "<t>")
    assert loaded.settings["eos_token"] == "<t>"
    (tmp_path / "tokenizer_config.json").unlink()
    loaded = TextTokenizer.load(str(tmp_path))
    assert (loaded.named_bos_id, loaded.eos_token) == (loaded.backend.token_to_id("<t>"), "<s>")
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "of the settings"}')
    assert TextTokenizer.load(str(tmp_path)).settings["chat_template"] == "of the settings"
    (tmp_path / "chat_template.jinja").write_text(" of its own file\n")
    assert TextTokenizer.load(str(tmp_path)).settings["chat_template"] == " of its own file\n"


def test_what_begins_documents_can_be_said(tokenizer, text_config, tmp_path):
    folder = llama_like(tokenizer, tmp_path, template="<s> $A")
    own, without, other = (
        build_tokenizer(text_config(tokenizer=folder, bos_token=x), tmp_path) for x in (None, "none", "<t>")
    )
    assert [x.bos_token for x in (own, without, other)] == ["<s>", None, "<t>"]
    assert len({x.fingerprint() for x in (own, without, other)}) == 3
    assert own.has_tokens_of(without)
    assert own.has_tokens_of(other)
    assert not own.has_tokens_of(tokenizer)
    for tokenizers in (own, without, other):
        tokenizers.save_folder(tmp_path / f"kept{tokenizers.bos_token}")
        assert TextTokenizer.load(str(tmp_path / f"kept{tokenizers.bos_token}")).bos_token == tokenizers.bos_token
        framing = tokenizers.framing()
        assert framing.backend.encode("query").ids == tokenizers.encode_prompt("query")
        assert (framing.name, framing.settings) == (tokenizers.name, tokenizers.settings)
    first = own.backend.id_to_token(0)
    with_template = TextTokenizer(own.backend, own.eos_token, settings={"chat_template": "x"}, bos_token=first)
    assert (with_template.bos_id, with_template.framing().settings) == (0, {"chat_template": "x"})
    trained = build_tokenizer(text_config(bos_token="<s>"), tmp_path)
    assert trained.encode_documents(["x"])[0][0] == trained.backend.token_to_id("<s>")
    assert (trained.eos_id, trained.bos_id) == (0, 1)
    assert trained.vocab_size == tokenizer.vocab_size
    with pytest.raises(ValueError, match=r"has no token '<u>'; name the one .* in data\.bos_token, or none"):
        build_tokenizer(text_config(tokenizer=folder, bos_token="<u>"), tmp_path)
    llama_like(tokenizer, tmp_path, template="<s> <t> $A")
    with pytest.raises(ValueError, match=r"puts \['<s>', '<t>'\] before a text: name one in data\.bos_token"):
        build_tokenizer(text_config(tokenizer=folder), tmp_path)
    assert build_tokenizer(text_config(tokenizer=folder, bos_token="<t>"), tmp_path).bos_token == "<t>"


def test_a_kept_tokenizer_knows_what_it_was(tokenizer, tmp_path):
    tokenizer.save_folder(tmp_path / "kept")
    assert json.loads((tmp_path / "kept" / "tokenizer_config.json").read_text()) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": DEFAULT_EOS,
        "begin_of_document": "none",
        "end_of_document": DEFAULT_EOS,
        "fingerprint": tokenizer.fingerprint(),
    }
    other = Tokenizer.from_str(tokenizer.backend.to_str())
    other.add_special_tokens(["<new>"])
    other.save(str(tmp_path / "kept" / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"kept is another tokenizer than was saved there.*restore it"):
        TextTokenizer.load(str(tmp_path / "kept"))


def test_who_interrupts_the_reading_of_a_tokenizer_ends_it(tokenizer, tmp_path, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    tokenizer.save(tmp_path / "tokenizer.json")
    monkeypatch.setattr(tokenizer_module, "Tokenizer", SimpleNamespace(from_str=interrupt))
    with pytest.raises(KeyboardInterrupt):
        TextTokenizer.load(str(tmp_path))


def test_a_token_with_a_number_that_cannot_be_is_refused_at_once(tokenizer, tmp_path):
    content = json.loads(tokenizer.backend.to_str())
    content["model"]["vocab"]["far"] = LARGEST_ID
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert TextTokenizer.load(str(tmp_path)).vocab_size == LARGEST_ID + 1 == 2**24 + 1
    content["model"]["vocab"]["far"] = 2**31
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer .*a token with the number 2147483648"):
        TextTokenizer.load(str(tmp_path))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model": 3}', '{"model": {"type": "BPE"}}', "\xff"])
def test_damaged_files_are_named_with_their_size(tokenizer, tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"tokenizer\.json is no tokenizer \({len(content)} bytes"):
        TextTokenizer.load(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n")
    with pytest.raises(ValueError, match="pointer of Git LFS"):
        TextTokenizer.load(str(tmp_path))
    tokenizer.save(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_bytes(b"[]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json holds no JSON object"):
        TextTokenizer.load(str(tmp_path))


def test_settings_of_wrong_types_are_left_out(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    junk = (None, True, -1, 2.5, [], [1], {}, {"content": True}, {"content": None}, 10**30)
    for key in ("bos_token", "eos_token", "add_bos_token", "chat_template"):
        for value in junk:
            (tmp_path / "tokenizer_config.json").write_text(json.dumps({key: value}))
            assert TextTokenizer.load(str(tmp_path)).eos_token == DEFAULT_EOS
