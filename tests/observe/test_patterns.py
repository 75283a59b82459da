"""The paper's three cases are told apart.

Layer: pure.
"""

import pytest

from megatron_sod.observe.patterns import PATTERNS, RULES, pattern_of


@pytest.mark.parametrize(
    ("divergences", "pattern"),
    [
        # the paper's case A: w from 1 to 1.2, uncapped 1 to 2.3
        ([0.50, 0.45, 0.30, 0.22], "stable"),
        # case B: d .218 -> 1.284, w .17
        ([0.218, 1.284], "erroneous"),
        # case C: w 1, .73, .56, .41, .76, 1.12, 1.2
        ([0.3, 0.410959, 0.535714, 0.731707, 0.394737, 0.267857, 0.25], "recovery"),
        ([0.3, 0.9, 0.5], "mixed"),  # ends at 0.6
        ([0.3, 0.45, 0.3], "mixed"),  # a dip to 0.67 is neither stable nor a fall
        ([0.3, 0.3 / 0.8, 0.3], "stable"),  # 0.8 itself still counts
        ([0.3], "short"),
        ([None, 0.3, None], "short"),
        ([], "short"),
        ([None, 0.2, None, 1.0], "erroneous"),  # the first scored step is the anchor
    ],
)
def test_the_pattern_follows_from_the_trust(divergences, pattern):
    assert pattern_of(divergences, epsilon=1e-6) == pattern


def test_epsilon_is_part_of_the_trust():
    assert pattern_of([0.001, 0.02], epsilon=1e-6) == "erroneous"
    assert pattern_of([0.001, 0.02], epsilon=1.0) == "stable"


def test_every_pattern_has_its_rule():
    assert set(RULES) == set(PATTERNS)
