"""Prepare the data of a run: train the tokenizer and tokenise the corpora into the cache, as a job of its own.

    python -m experiments.training.prepare data=hub data.streaming=false    # the arguments of the run, as of train.py

What a killed preparation had finished stays, and the same command goes on after it. What the cache holds already is
verified, and damaged shards are made again. At the end it says how fast the loader reads, which a model must not wait
for. A run prepares by itself what is missing when it starts.
"""

from experiments.help import answer_help

if __name__ == "__main__":
    answer_help("train")  # before PyTorch is imported

import time

import hydra
from omegaconf import DictConfig

from dashattn.fields import user_path
from data import BatchStream, PackedDataConfig, build_data, build_tokenizer, prepare_all
from experiments.config import TrainConfig, register_configs, to_train_config
from experiments.errors import user_errors
from experiments.files import CONFIGS
from experiments.origin import check_origin_tokenizer, with_commits, with_own_tokenizer

register_configs()
LOADER_SECONDS = 3.0  # to read as fast as it goes


def prepare(config: TrainConfig) -> None:
    """Fill the cache for ``config.data`` and print what it holds."""
    if not isinstance(config.data, PackedDataConfig):
        raise ValueError(
            f"data={config.data.name} is generated while training: there is nothing to prepare, start the run"
        )
    if config.init_from is not None and not config.any_tokenizer:
        check_origin_tokenizer(config.data, user_path(config.init_from))
    cache_dir = user_path(config.cache_dir)
    data = with_commits(config.data, config.run_dir, config.branch_from)
    data = with_own_tokenizer(data, user_path(config.run_dir))
    tokenizer = build_tokenizer(data, cache_dir)
    for name, corpus in prepare_all(data, tokenizer, cache_dir, verify=True).items():
        parts = [*corpus.training.values(), corpus.validation]
        tokens, size = sum(len(part) for part in parts), sum(part.num_bytes for part in parts)
        print(
            f"{name}: {sum(part.num_documents for part in parts):,} documents, {size / 1e6:,.1f} MB of text, "
            f"{tokens:,} tokens ({size / tokens:.2f} bytes each), {cache_dir / 'tokens' / corpus.fingerprint}"
        )
    rows = config.rows_per_micro_batch or config.rows_per_batch
    stream = build_data(data, split="train", seed=config.seed, rows=rows, cache_dir=cache_dir)
    print(f"the loader alone: {loader_speed(stream):,.0f} tokens/s on one rank")


def loader_speed(stream: BatchStream) -> float:
    """Tokens per second that a stream hands out when nothing else is done, after its first batch."""
    next(stream)
    tokens, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < LOADER_SECONDS:
        tokens += next(stream).num_tokens
    return tokens / elapsed


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="train")
def main(cfg: DictConfig) -> None:
    with user_errors():
        prepare(to_train_config(cfg))


if __name__ == "__main__":
    main()
