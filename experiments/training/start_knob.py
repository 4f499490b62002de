"""The knob that a run with a target sparsity begins with."""

import copy
import math

from dashattn.fields import user_path
from data import build_data
from experiments.config import TrainConfig
from experiments.origin import with_own_tokenizer
from experiments.schema import DTYPES
from experiments.sparsity import Found, calibrate
from experiments.training.ranks import Ranks
from models import Transformer

_ROWS = 16  # at least: a few rows' sparsity is not yet the data's


def find_start_knob(config: TrainConfig, model: Transformer, ranks: Ranks, rows: int) -> Found:
    """Found on the first training rows, of a step or 16, and set in ``model``; all ranks must call it.

    A copy of the model is measured, in the precision of training. The rows are read by a stream of their own, so that
    those of the run stay where they are.

    Args:
        rows: of a micro-batch of this rank.

    Raises:
        ValueError: the target cannot be reached.
    """
    attention, length = config.attention, config.data.seq_len
    data = with_own_tokenizer(config.data, user_path(config.run_dir))
    stream = build_data(
        data.at_length(length),
        split="train",
        seed=config.seed,
        rows=rows,
        rank=ranks.reader,
        world_size=ranks.readers,
        cache_dir=user_path(config.cache_dir),
    )
    micro_batches = math.ceil(max(config.rows_per_batch, _ROWS) / (rows * ranks.readers))
    copied = copy.deepcopy(model).to(ranks.device, DTYPES[config.deepspeed.precision])
    if ranks.sequence is not None:
        copied.share_sequences(ranks.sequence)
    found = calibrate(
        copied,
        [next(stream) for _ in range(micro_batches)],
        attention.target_sparsity,
        attention.sparsity_count,
        length,
        device=ranks.device,
        total=ranks.sum,
    )
    model.set_knob(found.knob)
    return found
