"""Training and validation batches: packed text, from one corpus or several, and multi-query associative recall.
Of the project it imports only how fields are checked."""

from data.batch import IGNORE, Batch, BatchStream
from data.config import NO_TOKEN, DataConfig, MixtureDataConfig, MQARDataConfig, PackedDataConfig, TextDataConfig
from data.corpora import DataSourceError
from data.loader import build_data, prepare_all
from data.prefetch import Prefetched
from data.shards import DamagedShardError
from data.tokenizer import TextTokenizer, build_tokenizer

__all__ = [
    "IGNORE",
    "NO_TOKEN",
    "Batch",
    "BatchStream",
    "DamagedShardError",
    "DataConfig",
    "DataSourceError",
    "MQARDataConfig",
    "MixtureDataConfig",
    "PackedDataConfig",
    "Prefetched",
    "TextDataConfig",
    "TextTokenizer",
    "build_data",
    "build_tokenizer",
    "prepare_all",
]
