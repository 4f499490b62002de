"""From a data config to the stream of batches of one rank."""

from pathlib import Path

from data.batch import BatchStream, check_placement
from data.config import DataConfig, MQARDataConfig, PackedDataConfig
from data.mqar import MQARStream
from data.prepared import PreparedCorpus, prepare
from data.text import PreparedTextStream, StreamedTextStream
from data.tokenizer import TextTokenizer, build_tokenizer


def build_data(
    config: DataConfig,
    *,
    split: str,
    seed: int,
    rows: int,
    rank: int = 0,
    world_size: int = 1,
    cache_dir: str | Path | None = None,
) -> BatchStream:
    """Batches of ``rows`` rows of config.seq_len tokens for one rank.

    split: "train" (infinite; its order depends on ``seed``) or "validation" (finite, the same for every seed).
    cache_dir: holds trained tokenizers and tokenised corpora; text needs it. All ranks may call this at once.
    Raises ValueError for what the configuration or the corpus cannot serve.
    """
    check_placement(split, rows, rank, world_size)
    share = {"rows": rows, "rank": rank, "world_size": world_size}
    if isinstance(config, MQARDataConfig):
        return MQARStream(config, split=split, seed=seed, **share)
    if not isinstance(config, PackedDataConfig):
        raise ValueError(f"data must be text, a mixture or mqar, not a {type(config).__name__}")
    if cache_dir is None:
        raise ValueError("text needs a cache_dir for its tokenizer and tokens")
    tokenizer = build_tokenizer(config, cache_dir)
    if config.streaming and split == "train":
        return StreamedTextStream(config, tokenizer, cache_dir, seed=seed, **share)
    corpora = prepare_all(config, tokenizer, cache_dir)
    return PreparedTextStream(config, corpora, tokenizer, split=split, seed=seed, **share)


def prepare_all(
    config: PackedDataConfig, tokenizer: TextTokenizer, cache_dir: str | Path, *, verify: bool = False
) -> dict[str, PreparedCorpus]:
    """Whatever of the corpora is kept on disk, by the corpora's names; see data.prepared.prepare."""
    # An evaluation must not search a stream for validation documents each time: keep the first ones.
    scope = {}
    if config.streaming:
        scope = {"splits": ("validation",), "max_tokens": config.validation_rows * config.seq_len}
    return {
        name: prepare(corpus, config, tokenizer, cache_dir, verify=verify, **scope)
        for name, (corpus, _) in config.parts.items()
    }
