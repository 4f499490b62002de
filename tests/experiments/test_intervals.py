"""Standard errors and intervals against their definitions, and against what they promise."""

import random
from statistics import mean, stdev

import pytest

from experiments.evaluation.tasks.base import scatter
from experiments.intervals import interval, ratio_stderr


def test_of_equal_samples_it_is_the_usual_standard_error():
    values = [0.1, 0.4, 0.9, 0.3]
    assert ratio_stderr(values, [1] * 4) == pytest.approx(stdev(values) / 2)
    assert ratio_stderr([10 * v for v in values], [10] * 4) == pytest.approx(stdev(values) / 2)
    assert ratio_stderr([5.0, 0.0], [2, 0]) is None  # one sample holds all


def test_what_holds_nothing_is_no_sample():
    assert scatter([3.0, 0.0, 5.0], [1, 0, 1]) == {"stderr": pytest.approx(1.0), "samples": 2}


def test_of_unequal_samples_it_is_how_much_the_mean_moves():
    draw, means, errors = random.Random(0), [], []
    for _ in range(2000):
        counts = [draw.choice((1, 5, 10)) for _ in range(100)]
        sums = [count * draw.gauss(2.0, 0.5) for count in counts]
        means.append(sum(sums) / sum(counts))
        errors.append(ratio_stderr(sums, counts))
    assert mean(errors) == pytest.approx(stdev(means), rel=0.05)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.95])
@pytest.mark.parametrize("says_stderr", [False, True])
def test_intervals_of_shares_hold_the_true_one_as_often_as_they_say(share, says_stderr):
    draw, held, count = random.Random(1), 0, 33
    for _ in range(2000):
        hits = [float(draw.random() < share) for _ in range(count)]
        row = {"metric": "match", "score": mean(hits), "rows": count}
        if says_stderr:
            row |= {"stderr": ratio_stderr(hits, [1] * count), "samples": count}
        low, high = interval(row)
        assert 0 <= low < high <= 1
        held += low <= share <= high
    assert 0.93 <= held / 2000 <= 0.99


def test_a_share_is_one_whatever_filter_its_answers_went_through():
    row = {"metric": "exact_match", "score": 0.97, "stderr": 0.017, "samples": 100}
    assert (
        interval(row | {"metric": "exact_match (strict-match)"})
        == interval(row)
        == pytest.approx((0.915, 0.990), abs=2e-3)
    )


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("count", [7, 33, 64, 363])
def test_an_interval_ends_at_the_share_where_all_samples_agree(share, count):
    low, high = interval({"metric": "match", "score": share, "rows": count})
    assert (low, high)[int(share)] == share
    assert low < high


def test_the_interval_of_a_loss_is_students_over_rows_also_of_rows_from_before():
    nats, targets = [30.0, 32.0, 29.0, 37.0], [10, 10, 10, 10]
    row = {"metric": "nats", "score": 3.2, "by_row": {"nats": [*nats, 0.0], "targets": [*targets, 0]}}
    low, high = interval(row)
    half = 3.182446 * stdev(n / 10 for n in nats) / 2  # of the t distribution with 3 degrees of freedom
    assert (low, high) == pytest.approx((3.2 - half, 3.2 + half), rel=1e-5)
    known = {"metric": "nats", "score": 3.2, "stderr": ratio_stderr(nats, targets), "samples": 4}
    assert interval(known) == pytest.approx((low, high))


@pytest.mark.parametrize(
    "row",
    [
        {"metric": "accuracy", "score": 0.9, "rows": 64},  # queries of a row hang together: how, it does not say
        {"metric": "match", "score": 0.5, "rows": 10, "depth": 0.5},  # some of the ten
        {"metric": "nats", "score": 3.0, "rows": 16},
        {"metric": "ms", "score": 3.0, "rows": 1, "stderr": None, "samples": None},
    ],
)
def test_what_says_nothing_of_its_samples_has_none(row):
    assert interval(row) is None


@pytest.mark.parametrize("metric", ["match", "accuracy", "acc", "acc_norm", "exact_match"])
def test_every_share_has_wilsons_interval(metric):
    z, n, share = 1.959964, 25, 0.2
    centre, half = share + z**2 / (2 * n), z * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
    expected = [(centre + side * half) / (1 + z**2 / n) for side in (-1, 1)]
    assert interval({"metric": metric, "score": share, "samples": n}) == pytest.approx(expected, rel=1e-6)
    row = {"metric": metric, "score": share, "samples": n, "rows": 7, "stderr": (share * (1 - share) / n) ** 0.5}
    assert interval(row) == pytest.approx(expected, rel=1e-6)


def test_two_samples_are_the_fewest_that_scatter():
    row = {"metric": "nats", "score": 3.0, "stderr": 0.5}
    assert interval(row | {"samples": 1}) is interval(row | {"samples": 0}) is None
    low, high = interval(row | {"samples": 2})
    assert (low, high) == pytest.approx((3 - 12.7062 * 0.5, 3 + 12.7062 * 0.5), rel=1e-5)
    assert ratio_stderr([1.0], [1]) is None
    assert ratio_stderr([1.0, 3.0], [1, 1]) == 1.0


def test_samples_that_all_agree_leave_room_for_others():
    low, high = interval({"metric": "match", "score": 1.0, "stderr": 0.0, "samples": 33})
    assert (low, high) == (pytest.approx(33 / (33 + 1.959964**2), abs=1e-6), pytest.approx(1.0))


def test_a_share_over_samples_that_scatter_more_is_as_of_fewer():
    found = interval({"metric": "accuracy", "score": 0.5, "stderr": 0.1, "samples": 1000})
    assert found == pytest.approx(interval({"metric": "match", "score": 0.5, "rows": 25}))
