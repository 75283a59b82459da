"""Numbers over graded samples. Pure Python."""

from __future__ import annotations

import math
from collections.abc import Sequence


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
