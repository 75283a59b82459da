"""Numbers over graded samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np


def wilson_interval(successes: float, trials: int, *, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson score); (0, 1) without trials.

    Source: Wilson 1927; keeps its coverage near 0 and 1, unlike the normal approximation.
    """
    if trials == 0:
        return 0.0, 1.0
    p = successes / trials
    denominator = 1 + z * z / trials
    centre = (p + z * z / (2 * trials)) / denominator
    half = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials)) / denominator
    return max(0.0, centre - half), min(1.0, centre + half)


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Probability that at least one of k samples drawn without replacement is right; unbiased.

    1 - C(n - c, k) / C(n, k)    Source: arXiv 2107.03374.
    """
    if not 0 < k <= num_samples:
        raise ValueError(f"k must lie in 1..{num_samples}; got {k}")
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


@lru_cache(maxsize=65536)
def maj_at_k(num_correct: int, wrong_counts: tuple[int, ...], num_empty: int, k: int) -> float:
    """Chance that the most frequent answer among k samples drawn without replacement is right.

    Empty answers do not vote; an answer that ties with t others wins 1 / (t + 1). Exact: the sum
    over every subset, by counting.

    Args:
        num_correct: samples with the right answer.
        wrong_counts: samples per distinct wrong answer.
        num_empty: samples without an answer.
    """
    total = num_correct + sum(wrong_counts) + num_empty
    if not 0 < k <= total:
        raise ValueError(f"k must lie in 1..{total}; got {k}")
    wins = Fraction(0)
    for votes in range(1, min(num_correct, k) + 1):
        ways = _ways_with_at_most(votes, wrong_counts, num_empty, k - votes)
        wins += math.comb(num_correct, votes) * sum(
            (Fraction(count, ties + 1) for ties, count in enumerate(ways)), Fraction(0)
        )
    return float(wins / math.comb(total, k))


def _ways_with_at_most(
    votes: int, wrong_counts: tuple[int, ...], num_empty: int, rest: int
) -> list[int]:
    """[ties] number of ways to draw `rest` other samples in which no wrong answer is drawn more
    than `votes` times and exactly `ties` of them are drawn that often."""
    # table[drawn][ties]
    table = [[math.comb(num_empty, drawn)] for drawn in range(rest + 1)]
    for count in wrong_counts:
        grown = [[0] * (len(row) + 1) for row in table]
        for drawn, row in enumerate(table):
            for more in range(min(count, votes, rest - drawn) + 1):
                factor, is_tie = math.comb(count, more), int(more == votes)
                for ties, ways in enumerate(row):
                    grown[drawn + more][ties + is_tie] += ways * factor
        table = grown
    return table[rest]


def bootstrap_interval(
    prompt_means: Sequence[float], *, num_resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of the mean over prompts: prompts are drawn again with replacement.

    Samples of one prompt share its difficulty, so prompts, not samples, are the units.
    """
    values = np.asarray(prompt_means, dtype=np.float64)
    if not values.size:
        return 0.0, 1.0
    picks = np.random.default_rng(seed).integers(0, values.size, (num_resamples, values.size))
    low, high = np.percentile(values[picks].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)
