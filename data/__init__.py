"""Training and validation batches: packed text and multi-query associative recall. Imports nothing of the
project."""

from data.batch import IGNORE, Batch, BatchStream
from data.config import DataConfig, MQARDataConfig, TextDataConfig
from data.loader import build_data
from data.prefetch import Prefetched
from data.tokenizer import TextTokenizer, build_tokenizer

__all__ = [
    "IGNORE",
    "Batch",
    "BatchStream",
    "DataConfig",
    "MQARDataConfig",
    "Prefetched",
    "TextDataConfig",
    "TextTokenizer",
    "build_data",
    "build_tokenizer",
]
