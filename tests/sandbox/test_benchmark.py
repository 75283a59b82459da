"""The benchmark command runs and its claims hold: isolation adds at most 100 ms at the median."""

import re

import pytest

from megatron_sod.sandbox import benchmark

pytest.importorskip("sympy")


@pytest.mark.slow
def test_page_is_complete_and_the_bounds_hold():
    page = benchmark.report(*benchmark.measure(num_rounds=10, seconds=0.5))
    assert page.count("sandbox, warm") == 4
    added = float(re.search(r"cold against plain\) \| (-?[\d.]+) ms", page)[1])
    ratio = float(re.search(r"warm against cold \| ([\d.]+) times", page)[1])
    assert added <= 100 and ratio >= 4
    assert "10 MB of output | output_limit" in page
