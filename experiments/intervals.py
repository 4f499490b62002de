"""How far a score is from what more samples would give: standard errors, and 95 % confidence intervals.

A sample is what was drawn by itself: a row of a validation split, a prompt, a question. What stands in one (tokens,
queries) is not independent, and is summed first.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist

LEVEL = 0.95
SHARES = ("match", "accuracy", "acc", "acc_norm", "exact_match")  # metrics between 0 and 1, means over samples
LOSSES = ("nats", "perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte")


def unfiltered(metric: str) -> str:
    """A metric without the filter that lm_eval put answers through: ``exact_match (strict-match)`` is an
    exact_match."""
    return metric.partition(" (")[0]


def filled(counts: Sequence[float]) -> int:
    """How many samples hold something."""
    return sum(count > 0 for count in counts)


def ratio_stderr(sums: Sequence[float], counts: Sequence[float]) -> float | None:
    """Standard error of ``sum(sums) / sum(counts)``, a mean over what samples hold, such as the loss over the targets
    of rows; None of fewer than two samples that hold something. Linearised (Cochran, Sampling Techniques, 6.4): where
    each sample holds the same it is their deviation over the root of their number."""
    pairs = [(total, count) for total, count in zip(sums, counts, strict=True) if count > 0]
    if len(pairs) < 2:
        return None
    held = math.fsum(count for _, count in pairs)
    ratio = math.fsum(total for total, _ in pairs) / held
    squares = math.fsum((total - ratio * count) ** 2 for total, count in pairs)
    return math.sqrt(squares * len(pairs) / (len(pairs) - 1)) / held


def stderr_of(row: Mapping) -> tuple[float | None, int | None]:
    """A row's standard error and number of samples, as far as it tells; of rows from before they were kept, too."""
    stderr, samples = row.get("stderr"), row.get("samples")
    if samples is None and row["metric"] == "match" and row.get("depth") is None:
        samples = row["rows"]  # a prompt a row
    if stderr is None and row.get("by_row"):
        nats, targets = row["by_row"]["nats"], row["by_row"]["targets"]
        stderr, samples = ratio_stderr(nats, targets), filled(targets)
    if stderr is None and unfiltered(row["metric"]) in SHARES and samples:
        # At most: what is between 0 and 1 scatters less.
        stderr = math.sqrt(row["score"] * (1 - row["score"]) / samples)
    return stderr, samples


def interval(row: Mapping) -> tuple[float, float] | None:
    """The 95 % confidence interval of an evaluation's row; None where it does not say how its samples scatter.

    Of a share it is Wilson's, with as many samples as would scatter so: it stays within 0 and 1, and has a width where
    all samples agree. Of other scores it is Student's.
    """
    score, (stderr, samples) = row["score"], stderr_of(row)
    if not samples:
        return None
    if unfiltered(row["metric"]) in SHARES:
        return _wilson(score, score * (1 - score) / stderr**2 if stderr else samples)
    return None if stderr is None or samples < 2 else student(score, stderr, samples)


def bar(row: Mapping) -> tuple[float, float] | None:
    """The row's interval as a figure of several lines shows it: none of a loss. Rows of text differ far more from each
    other than lines do on the same row; differences of lines are ``experiments.figures.paired``."""
    return None if unfiltered(row["metric"]) in LOSSES else interval(row)


def student(mean: float, stderr: float, samples: int) -> tuple[float, float]:
    """Student's 95 % confidence interval of a mean over ``samples`` of at least 2."""
    from scipy.special import stdtrit

    half = float(stdtrit(samples - 1, (1 + LEVEL) / 2)) * stderr
    return mean - half, mean + half


def _wilson(share: float, samples: float) -> tuple[float, float]:
    """Wilson's score interval (J. Am. Stat. Assoc. 22, 1927)."""
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    centre = (share + z**2 / (2 * samples)) / (1 + z**2 / samples)
    half = z * math.sqrt(share * (1 - share) / samples + z**2 / (4 * samples**2)) / (1 + z**2 / samples)
    # Of none and of all the bound is the share itself, but for rounding.
    return min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))
