import json

import pytest
from tokenizers import Tokenizer

from data.corpora import iterate_documents
from data.tokenizer import TextTokenizer, build_tokenizer


@pytest.fixture
def tokenizer(text_config, tmp_path):
    return build_tokenizer(text_config(), tmp_path / "cache")


def test_any_text_survives(tokenizer):
    everything = "".join(map(chr, [*range(0x250), 0x6CE8, 0x1F642, 0x10FFFF])) + "\r\n\t  tail  "
    for text in ("", everything, "query key value", "a <|endoftext|> b"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.encode_batch([text]) == [tokenizer.encode(text)]


def test_special_tokens_spelled_in_a_text_are_text(tokenizer):
    assert tokenizer.eos_id not in tokenizer.encode("a <|endoftext|> b")
    assert tokenizer.decode([tokenizer.eos_id]) == "<|endoftext|>"


def test_ids_stay_below_vocab_size(tokenizer, text_config):
    assert tokenizer.vocab_size == 320
    ids = [token for document in iterate_documents(text_config()) for token in tokenizer.encode(document.text)]
    assert 0 <= min(ids) < 257 <= max(ids) < tokenizer.vocab_size


def test_training_is_cached_and_deterministic(tokenizer, text_config, tmp_path):
    folders = list((tmp_path / "cache" / "tokenizers").glob("*/tokenizer.json"))
    written = folders[0].stat().st_mtime_ns
    build_tokenizer(text_config(), tmp_path / "cache")
    assert folders[0].stat().st_mtime_ns == written
    again = build_tokenizer(text_config(), tmp_path / "elsewhere")
    assert again.fingerprint() == tokenizer.fingerprint()
    other = build_tokenizer(text_config(vocab_size=300), tmp_path / "cache")
    assert other.fingerprint() != tokenizer.fingerprint()


def test_saved_tokenizer_loads(tokenizer, text_config, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = build_tokenizer(text_config(tokenizer=str(tmp_path / "tokenizer.json")), tmp_path / "cache")
    assert loaded.encode("sparse attention") == tokenizer.encode("sparse attention")
    assert loaded.eos_id == tokenizer.eos_id


def test_bad_tokenizers_are_named(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"missing\.json' is no file"):
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
    settings = {"eos_token": {"content": "</s>", "lstrip": False}, "bos_token": "<s>", "auto_map": {"x": "y.py"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = TextTokenizer.load(str(tmp_path))
    assert (loaded.eos_token, loaded.bos_id) == ("</s>", backend.token_to_id("<s>"))
    other_end = TextTokenizer.load(str(tmp_path), "<end>")
    other_end.save_folder(tmp_path / "other")
    assert (other_end.eos_token, TextTokenizer.load(str(tmp_path / "other")).eos_token) == ("<end>", "</s>")
    loaded.save_folder(tmp_path / "kept" / "tokenizer")
    kept = TextTokenizer.load(str(tmp_path / "kept" / "tokenizer"))
    assert kept.fingerprint() == loaded.fingerprint()
    assert (kept.bos_id, kept.settings.get("auto_map")) == (loaded.bos_id, None)


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
