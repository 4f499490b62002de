"""Multi-query associative recall (Zoology, arXiv 2312.04927), generated on the fly.

A sample of length T: the first half holds key-value pairs, one pair to a slot of two tokens, among filler; the second
half asks for them, a query being a key at an even position t whose label is the key's value, followed by that value (or
by filler: show_answers=False). Every query's key is among the sample's pairs; keys and values occur nowhere else.

    token ids:  [0, F) filler,  [F, F + K) keys,  [F + K, F + K + V) values

Sample i of a (seed, split, T) reads the i-th run of numbers of one counter-based generator (Philox), so any
range of samples can be generated at any time, and training and validation share no stream.
"""

import numpy as np
import torch

from data.batch import IGNORE, Batch, BatchStream, check_placement, check_state
from data.config import MQARDataConfig

SPLITS = ("train", "validation")


def pairs_at(config: MQARDataConfig, length: int) -> tuple[int, int]:
    """Fewest and most pairs of a sample of ``length`` tokens: in proportion to seq_len's, at least one."""
    return tuple(max(1, pairs * length // config.seq_len) for pairs in (config.pairs_min, config.pairs_max))


def _uniforms(seed: int, split: str, length: int, first: int, count: int, width: int) -> np.ndarray:
    """float64 [count, width] in [0, 1): the numbers of samples first ... first + count - 1."""
    generator = np.random.Philox(np.random.SeedSequence([seed, SPLITS.index(split), length]))
    padded = -(-width // 4) * 4  # the generator advances by four numbers at a time
    generator.advance(first * padded // 4)
    raw = generator.random_raw(count * padded).reshape(count, padded)[:, :width]
    return (raw >> np.uint64(11)) * 2.0**-53


def generate(
    config: MQARDataConfig, *, seed: int, split: str, first: int, count: int, length: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Samples first ... first + count - 1 as (input_ids, labels), int64 [count, length]."""
    length = length or config.seq_len
    fewest, most = pairs_at(config, length)
    slots = length // 4  # two-token slots of each half
    queries = max(1, round(config.query_density * slots))

    widths = (length, 1, config.num_keys, most, most, slots, queries)
    draws = _uniforms(seed, split, length, first, count, sum(widths))
    filler, pairs, key_order, value, place, query_order, query = np.split(draws, np.cumsum(widths)[:-1], axis=1)

    input_ids = (filler * config.num_fillers).astype(np.int64)
    labels = np.full((count, length), IGNORE, dtype=np.int64)
    sample = np.arange(count)[:, None]

    pairs = fewest + (pairs * (most - fewest + 1)).astype(np.int64)  # [count, 1]
    keys = config.num_fillers + np.argsort(key_order, axis=1)[:, :most]
    values = config.num_fillers + config.num_keys + (value * config.num_values).astype(np.int64)

    pair = np.arange(most)[None, :]
    if config.placement == "spread":  # one pair in each of ``pairs`` equal stretches of the first half
        left = pair * slots // pairs
        right = (pair + 1) * slots // pairs
        pair_slots = left + (place * (right - left)).astype(np.int64)
    else:
        pair_slots = np.broadcast_to(pair, keys.shape)
    present = pair < pairs
    rows = np.broadcast_to(sample, keys.shape)[present]
    input_ids[rows, 2 * pair_slots[present]] = keys[present]
    input_ids[rows, 2 * pair_slots[present] + 1] = values[present]

    asked = (query * pairs).astype(np.int64)  # [count, queries]
    asked_at = length // 2 + 2 * np.argsort(query_order, axis=1)[:, :queries]
    input_ids[sample, asked_at] = keys[sample, asked]
    labels[sample, asked_at] = values[sample, asked]
    if config.show_answers:
        input_ids[sample, asked_at + 1] = values[sample, asked]
    return input_ids, labels


class MQARStream(BatchStream):
    """Batches of fresh samples; B = rows at seq_len, and more at the curriculum's shorter lengths, so that the tokens
    of a batch stay the same. Validation is always at seq_len."""

    def __init__(
        self, config: MQARDataConfig, *, split: str, seed: int, rows: int, rank: int = 0, world_size: int = 1
    ) -> None:
        check_placement(split, rows, rank, world_size, config.validation_rows)
        self.config, self.split, self.rows, self.rank, self.world_size = config, split, rows, rank, world_size
        self.seed = seed if split == "train" else config.validation_seed
        self.vocab_size = config.num_fillers + config.num_keys + config.num_values
        self.rewind()

    def rewind(self) -> None:
        self.batches = 0  # handed out
        self.samples = 0  # handed out at the current length, by all ranks

    def _length(self) -> int:
        """Length of the next batch."""
        if self.split == "train":
            ends = np.cumsum(self.config.curriculum_batches)
            for length, end in zip(self.config.curriculum_lengths, ends, strict=True):
                if self.batches < end:
                    return length
        return self.config.seq_len

    def __next__(self) -> Batch:
        length = self._length()
        rows = self.rows * (self.config.seq_len // length)
        if self.split == "validation":
            rows = min(rows, self.config.validation_rows // self.world_size - self.batches * self.rows)
            if rows <= 0:
                raise StopIteration
        first = self.samples + self.rank * rows
        input_ids, labels = generate(
            self.config, seed=self.seed, split=self.split, first=first, count=rows, length=length
        )
        self.batches += 1
        self.samples += rows * self.world_size
        if self._length() != length:
            self.samples = 0
        position_ids = torch.arange(length).expand(rows, length).contiguous()
        return Batch(torch.from_numpy(input_ids), torch.from_numpy(labels), position_ids)

    def _identity(self) -> dict:
        return {"seq_len": self.config.seq_len, "seed": self.seed, "vocab_size": self.vocab_size}

    def state_dict(self) -> dict:
        rows = self.rows * self.world_size
        return {**self._identity(), "batches": self.batches, "samples": self.samples, "batch_rows": rows}

    def load_state_dict(self, state: dict) -> None:
        check_state(state, self._identity())
        rows = self.rows * self.world_size
        if self.config.curriculum_lengths and state["batch_rows"] != rows:
            raise ValueError(
                f"data.curriculum_batches counts micro-batches, which had {state['batch_rows']} rows over all ranks, "
                f"and have {rows} now: choose the ranks and rows_per_micro_batch so that their product stays"
            )
        self.batches, self.samples = state["batches"], state["samples"]

    def describe(self) -> dict:
        fewest, most = pairs_at(self.config, self.config.seq_len)
        return {
            "task": "mqar",
            "split": self.split,
            "seq_len": self.config.seq_len,
            "vocab_size": self.vocab_size,
            "pairs_min": fewest,
            "pairs_max": most,
        }
