from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from data import MixtureDataConfig, MQARDataConfig, TextDataConfig
from data.config import MixedCorpusConfig

CONFIGS = Path(__file__).parents[2] / "configs" / "data"
SCHEMAS = {"text_schema": TextDataConfig, "mixture_schema": MixtureDataConfig, "mqar_schema": MQARDataConfig}


def compose(path, **overrides):
    values = OmegaConf.load(path)
    schema, own = values.pop("defaults")
    assert own == "_self_"
    config = OmegaConf.create({"data": OmegaConf.structured(SCHEMAS[schema])})
    config = OmegaConf.merge(config, {"data": values}, {"data": overrides})
    return OmegaConf.to_object(config)["data"]


def defaults(schema):
    """Values of the fields that need none, by name."""
    found = {item.name: (item.default, item.default_factory) for item in fields(schema)}
    return {
        name: made() if value is MISSING else value
        for name, (value, made) in found.items()
        if (value, made) != (MISSING, MISSING)
    }


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_is_valid(path):
    if path.stem == "local":
        with pytest.raises(ValueError, match=r"needs data\.files"):
            compose(path)
        config = compose(path, files=["corpus/*.jsonl"])
    else:
        config = compose(path)
    assert config.name
    assert config.seq_len > 0


def test_fixed_pairs_follow_one_value():
    config = compose(CONFIGS / "mqar.yaml", pairs_max=8)
    assert (config.pairs_min, config.pairs_max) == (8, 8)


# What a configuration that is silent means: with another default the same words would name another run.
CORPUS = {
    **{"path": None, "config_name": None, "hub_split": "train", "revision": None, "files": [], "text_column": "text"},
    **{"document_separator": None, "document_bytes": 1_000_000, "bad_rows": 100, "facts_min": 1, "facts_max": 8},
    **{"hay_max": 64, "recall_seed": 0, "max_documents": None, "max_bytes": None},
}
PACKED = {
    **{"streaming": False, "validation_fraction": 0.02, "validation_rows": 64, "tokenizer": None, "vocab_size": 2048},
    **{"tokenizer_bytes": 4_000_000, "bos_token": None, "eos_token": None, "pack": "documents", "length_buckets": []},
    **{"length_weights": []},
}
RECALL_TASK = {
    **{"placement": "spread", "num_fillers": 16, "num_keys": 64, "num_values": 64, "query_density": 1.0},
    **{"show_answers": True, "curriculum_lengths": [], "curriculum_batches": []},
    **{"validation_rows": 256, "validation_seed": 0},
}


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (TextDataConfig, CORPUS | PACKED),
        (MixtureDataConfig, PACKED),
        (MixedCorpusConfig, CORPUS | {"weight": 1.0}),
        (MQARDataConfig, RECALL_TASK),
    ],
)
def test_defaults_are_what_they_were(schema, expected):
    assert defaults(schema) == expected


def test_a_length_takes_the_place_of_all_others():
    config = MQARDataConfig(**MQAR, curriculum_lengths=[64], curriculum_batches=[3]).at_length(256, pairs_max=9)
    assert config == MQARDataConfig(**MQAR | {"seq_len": 256, "pairs_max": 9})
    assert TextDataConfig(**TEXT).at_length(8, pack="plain") == TextDataConfig(**TEXT | {"seq_len": 8, "pack": "plain"})


@pytest.mark.parametrize(
    "change",
    [
        *({"seq_len": 2}, {"vocab_size": 257}, {"vocab_size": 257, "bos_token": "none"}, {"validation_rows": 1}),
        *({"vocab_size": 258, "bos_token": "<s>"}, {"vocab_size": 9, "tokenizer": "x"}, {"validation_fraction": 1e-9}),
        *({"length_buckets": [2, 3]}, {"length_buckets": [2], "length_weights": [0, 1]}, {"length_weights": [1]}),
        *({"source": "hub", "path": "a/b", "files": []}, {"max_documents": 2, "max_bytes": 1}, {"bad_rows": 0}),
        {"source": "recall", "max_documents": 2, "facts_min": 10_000, "facts_max": 10_000, "streaming": True},
        {"streaming": True},
        {"source": "recall", "max_documents": 2, "facts_min": 1, "facts_max": 1, "hay_max": 0},
    ],
    ids=str,
)
def test_what_is_just_possible(change):
    config = TextDataConfig(**TEXT | change)
    assert config.capped == ("max_bytes" in change)


TEXT = {"name": "x", "seq_len": 64, "source": "files", "files": ["a.txt"]}
MQAR = {"name": "x", "seq_len": 128, "pairs_min": 4, "pairs_max": 8}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "web"}, "one of hub, files, python_stdlib, recall"),
        ({"source": "hub"}, r"needs data\.path"),
        ({"files": []}, r"needs data\.files"),
        ({"seq_len": 1}, "at least 2"),
        ({"seq_len": 2**31}, "at least 2"),
        ({"pack": "best"}, "documents, plain"),
        ({"validation_fraction": 0.0}, "between 0 and 1"),
        ({"validation_rows": 0}, "positive"),
        ({"vocab_size": 256}, "at least 257"),
        ({"vocab_size": 257, "bos_token": "<s>"}, "at least 258"),
        ({"max_documents": 1}, "at least 2"),
        ({"source": "python_stdlib", "streaming": True}, "cannot stream"),
        ({"streaming": True, "max_bytes": 10}, "capped corpus"),
        ({"streaming": True, "max_documents": 10}, "capped corpus"),
        ({"streaming": True, "validation_rows": None}, r"set data\.validation_rows"),
        ({"streaming": True, "length_buckets": [8]}, "need a prepared corpus"),
        ({"length_buckets": [8, 8]}, "must increase"),
        ({"length_buckets": [1]}, "from 2 tokens on"),
        ({"length_buckets": [8], "length_weights": [1.0]}, "one weight more"),
        ({"length_weights": [1.0, 2.0]}, "one weight more"),
        ({"length_buckets": [8], "length_weights": [1.0, -1.0]}, r"length_weights\[1\] must be"),
        ({"length_buckets": [8], "length_weights": [0.0, 0.0]}, "all 0"),
        ({"source": "recall"}, r"needs data\.max_documents"),
        ({"source": "recall", "max_documents": 9, "facts_min": 5, "facts_max": 4}, "at least 5"),
        ({"source": "recall", "max_documents": 9, "facts_max": 10_001}, "from 1 to 10000"),
    ],
)
def test_bad_text_values_name_the_mend(change, message):
    with pytest.raises(ValueError, match=message):
        TextDataConfig(**(TEXT | change))


def test_bad_mixtures_name_the_mend():
    mixture = {"name": "x", "seq_len": 64, "corpora": {"a": MixedCorpusConfig(source="files", files=["a.txt"])}}
    assert MixtureDataConfig(**mixture).parts["a"][1] == 1.0
    with pytest.raises(ValueError, match="name at least one corpus"):
        MixtureDataConfig(**(mixture | {"corpora": {}}))
    for weight in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=r"data\.corpora\.weight must be a positive"):
            MixedCorpusConfig(source="files", files=["a.txt"], weight=weight)
    with pytest.raises(ValueError, match="cannot stream"):
        MixtureDataConfig(
            **(mixture | {"corpora": {"a": MixedCorpusConfig(source="python_stdlib")}, "streaming": True})
        )
    capped = MixedCorpusConfig(source="files", files=["a.txt"], max_documents=9)
    with pytest.raises(ValueError, match="capped corpus"):
        MixtureDataConfig(**(mixture | {"corpora": {"a": capped}, "streaming": True}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"placement": "anywhere"}, "spread"),
        ({"pairs_min": 0}, "positive"),
        ({"pairs_min": 9}, "below"),
        ({"pairs_max": 33}, "give at most 32"),
        ({"num_keys": 7}, "different keys"),
        ({"seq_len": 126}, "multiple of 4"),
        ({"query_density": 0.0}, "query_density"),
        ({"curriculum_lengths": [32]}, "one number for each"),
        ({"curriculum_lengths": [64, 32], "curriculum_batches": [1, 1]}, "must increase"),
        ({"curriculum_lengths": [48], "curriculum_batches": [1]}, "divides"),
        ({"curriculum_lengths": [2], "curriculum_batches": [1]}, "has 2, which must be a multiple of 4"),
        ({"curriculum_lengths": [128], "curriculum_batches": [1]}, r"below data\.seq_len, got \[128, 128\]"),
        ({"curriculum_lengths": [64], "curriculum_batches": [0]}, "positive"),
    ],
)
def test_bad_mqar_values_name_the_mend(change, message):
    with pytest.raises(ValueError, match=message):
        MQARDataConfig(**(MQAR | change))
