"""Rates with their uncertainty, against published and hand-checked values.

Layer: pure. Which trajectories are counted: tests/eval/test_runner.py.
"""

import collections
import itertools
import math

import pytest

from megatron_sod.eval.metrics import (
    bootstrap_interval,
    maj_at_k,
    mean,
    pass_at_k,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # z^2 = 3.8416; 5 of 10: centre 0.5, half 1.96 sqrt(.025 + .0096) / 1.38416 = 0.26341
        (5, 10, 0.23659, 0.76341),
        (0, 10, 0.0, 0.27753),  # 3.8416 / (10 + 3.8416)
        (10, 10, 0.72247, 1.0),
        (128, 256, 0.43917, 0.56083),
        (1, 1, 0.20654, 1.0),
    ],
)
def test_intervals_of_known_proportions(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=1e-4)


def test_nothing_tried_says_nothing():
    assert wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("successes", "trials"), [(0, 3), (3, 3), (0.5, 1), (7, 400)])
def test_an_interval_holds_its_rate_and_stays_in_bounds(successes, trials):
    low, high = wilson_interval(successes, trials)
    assert 0 <= low <= successes / trials <= high <= 1 and low < high


def test_more_trials_give_a_narrower_interval():
    widths = [high - low for low, high in (wilson_interval(n / 2, n) for n in (2, 20, 200))]
    assert widths == sorted(widths, reverse=True)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    # exact binomial coverage at p = 0.9, n = 50: between 93 and 97 percent
    coverage = 0.0
    for successes in range(51):
        low, high = wilson_interval(successes, 50)
        if low <= 0.9 <= high:
            coverage += math.comb(50, successes) * 0.9**successes * 0.1 ** (50 - successes)
    assert 0.93 < coverage < 0.98


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [
        (4, 1, 1, 0.25),
        (4, 1, 2, 0.5),  # 1 - C(3,2)/C(4,2) = 1 - 3/6
        (4, 2, 2, 5 / 6),  # 1 - C(2,2)/C(4,2)
        (4, 0, 4, 0.0),
        (4, 1, 4, 1.0),
        (4, 4, 1, 1.0),
        (32, 3, 16, 1 - (16 * 15 * 14) / (32 * 31 * 30)),  # none of 3 in the drawn half
    ],
)
def test_pass_at_k_of_known_counts(n, c, k, expected):
    assert pass_at_k(n, c, k) == pytest.approx(expected)


@pytest.mark.parametrize("correct", range(6))
@pytest.mark.parametrize("k", range(1, 6))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(correct, k):
    samples = [i < correct for i in range(5)]
    subsets = [any(chosen) for chosen in itertools.combinations(samples, k)]
    assert pass_at_k(5, correct, k) == pytest.approx(sum(subsets) / len(subsets))


@pytest.mark.parametrize("k", [0, 5, -1])
def test_pass_at_k_beyond_the_samples_is_refused(k):
    with pytest.raises(ValueError, match="k must lie in 1..4"):
        pass_at_k(4, 2, k)


def test_means():
    assert mean([1.0, 2.0, 6.0]) == 3.0 and mean([]) == 0.0


def _majority_by_enumeration(answers: list[str], k: int) -> float:
    """Every subset of k, literally; "right" is the right answer, "" does not vote."""
    won = []
    for chosen in itertools.combinations(answers, k):
        votes = collections.Counter(a for a in chosen if a)
        most = max(votes.values(), default=0)
        winners = [a for a, n in votes.items() if n == most]
        won.append(winners.count("right") / len(winners) if winners else 0.0)
    return sum(won) / len(won)


TABLES = [
    ["right"],
    ["wrong"],
    [""],
    ["right", "wrong"],
    ["right", "", "", ""],
    ["right", "right", "a", "a", "b"],
    ["right", "a", "b", "c", "d", ""],
    ["right"] * 3 + ["a"] * 3 + ["b"] * 2 + [""],
    ["right"] * 2 + ["a"] * 4 + ["b"] * 2 + ["c"],
    ["a", "a", "b", ""],
]


@pytest.mark.parametrize("answers", TABLES, ids=" ".join)
def test_majority_equals_enumeration_of_every_subset(answers):
    counts = collections.Counter(answers)
    right, empty = counts.pop("right", 0), counts.pop("", 0)
    wrong = tuple(sorted(counts.values()))
    for k in range(1, len(answers) + 1):
        expected = _majority_by_enumeration(answers, k)
        assert maj_at_k(right, wrong, empty, k) == pytest.approx(expected, abs=1e-12)


def test_majority_of_one_is_the_average_and_of_all_is_the_vote():
    assert maj_at_k(3, (2, 5), 2, 1) == pytest.approx(3 / 12)
    assert maj_at_k(5, (5,), 2, 12) == 0.5  # a tie, split
    assert maj_at_k(6, (5,), 21, 32) == 1.0  # empty answers do not vote


def test_thirty_two_scattered_samples_are_counted_exactly():
    # one right and 31 different wrong answers: every draw of 2 with the right one is a tie of two
    assert maj_at_k(1, (1,) * 31, 0, 2) == pytest.approx((31 / 496) / 2)
    assert maj_at_k(1, (1,) * 31, 0, 32) == pytest.approx(1 / 32)


@pytest.mark.parametrize("k", [0, 4])
def test_majority_beyond_the_samples_is_refused(k):
    with pytest.raises(ValueError, match="k must lie in 1..3"):
        maj_at_k(1, (1,), 1, k)


def test_bootstrap_intervals_follow_the_spread_between_prompts():
    assert bootstrap_interval([0.5] * 9) == (0.5, 0.5)
    low, high = bootstrap_interval([0.0, 1.0] * 200)
    # standard error of 400 coin flips: 0.025; 95 % is +-0.049
    assert low == pytest.approx(0.451, abs=0.01) and high == pytest.approx(0.549, abs=0.01)
    assert bootstrap_interval([0.0, 1.0] * 200) == (low, high)  # the same every time
    assert bootstrap_interval([]) == (0.0, 1.0)
