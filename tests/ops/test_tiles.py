"""Sizes that kernels are launched with."""

import pytest

pytest.importorskip("triton")

from dashattn.ops import tiles


@pytest.mark.parametrize(
    ("programs", "rows", "splits"),
    [
        (18, 32_768 * 16, 56),  # for parallelism
        (66, 131_072 * 16, 15),
        (2048, 32_768, 1),
        (325, 262_144 * 32, 16),  # for the length of a sum
        (65, 262_144 * 32, 16),  # which does not depend on the number of heads
        (2048, 2**19, 1),
        (2048, 2**19 + 1, 2),
        (2048, 2**31, 64),
        (1, 1, 64),
    ],
)
def test_no_sum_of_a_key_is_of_too_many_rows(programs, rows, splits):
    assert tiles.query_splits(programs, rows) == splits
