"""Mistakes other systems shipped, made on purpose: the two-rank comparison notices each of them.

This is the proof that tests/ops/test_tensor_parallel.py can fail. Each mutant is described where it
is defined, in tests/ops/mutants.py.
"""

import functools

import pytest

from tests.helpers.gloo import run_on_ranks
from tests.ops import mutants

pytestmark = pytest.mark.dist


@functools.cache
def verdicts() -> list[dict[str, dict[str, bool]]]:
    return run_on_ranks(2, mutants.all_verdicts)


def test_the_op_itself_passes_the_comparison():
    assert all(rank["real"] == {"value": True, "gradient": True} for rank in verdicts())


@pytest.mark.parametrize("name", [*mutants.MUTANTS, "non_autograd_all_reduce"])
def test_the_comparison_notices(name):
    assert not all(rank[name]["gradient"] for rank in verdicts())


@pytest.mark.parametrize(
    "name", ["gradient_times_tp", "first_elements_coefficient", "non_autograd_all_reduce"]
)
def test_values_alone_would_have_looked_right(name):
    """Why gradients are compared: these mistakes leave every reported number correct."""
    assert all(rank[name]["value"] for rank in verdicts())
