import pytest

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
