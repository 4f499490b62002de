import json
import random

import pytest

from data import TextDataConfig

WORDS = ["block", "chunk", "dense", "head", "key", "mask", "query", "router", "sparse", "über", "注意", "🙂"]


@pytest.fixture
def corpus(tmp_path):
    """A .jsonl of 240 different documents of 1 to 400 words."""
    generator = random.Random(0)
    path = tmp_path / "corpus.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for index in range(240):
            length = generator.choice([1, 5, 30, 60, 400])
            text = f"{index} " + " ".join(generator.choices(WORDS, k=length))
            file.write(json.dumps({"text": text, "extra": index}) + "\n")
    return path


@pytest.fixture
def text_config(corpus):
    """Makes configs of a small text corpus; keyword arguments override its fields."""

    def make(**overrides) -> TextDataConfig:
        fields = {
            "name": "toy",
            "seq_len": 64,
            "source": "files",
            "files": [str(corpus)],
            "validation_fraction": 0.2,
            "vocab_size": 320,
        }
        return TextDataConfig(**(fields | overrides))

    return make
