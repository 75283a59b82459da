"""Group-relative advantages against hand-checked groups.

Layer: pure. How they reach token rows: tests/scoring/test_credit.py.
"""

import math

import pytest
import torch

from megatron_sod.algorithm.advantages import group_advantages, zero_variance_fraction

NAN = float("nan")


def _one_group(rewards, valid=None):
    return group_advantages(rewards, ["p"] * len(rewards), valid or [True] * len(rewards))


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        # mean -0.05, unbiased std 1.2124356: 1.05 / 1.2124366 = 0.8660247
        ([1, -1.1, -1.1, 1], [0.8660247, -0.8660247, -0.8660247, 0.8660247]),
        ([1, -0.7, -0.9, -0.6], [1.484703, -0.456832, -0.685248, -0.342624]),
        # mean 0.5, std sqrt(0.5): +-0.5 / 0.7071068
        ([0, 1], [-0.7071058, 0.7071058]),
    ],
)
def test_worked_examples(rewards, expected):
    assert _one_group(rewards).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("value", [0.0, 1.0, 1 / 3, -1.1, 1e30])
@pytest.mark.parametrize("size", [2, 3, 7, 16])
def test_constant_rewards_give_exactly_zero(value, size):
    assert _one_group([value] * size).tolist() == [0.0] * size


def test_almost_constant_rewards_are_not_zero():
    advantages = _one_group([0.5, 0.5 + 1e-4])
    assert advantages[1] > 0.5 > 0 > advantages[0]


def test_groups_are_apart_however_they_are_interleaved():
    together = group_advantages(
        [1, 5, 0, 7, 0], ["a", "b", "a", "b", "a"], [True, True, True, True, True]
    )
    assert together[[0, 2, 4]].tolist() == _one_group([1, 0, 0]).tolist()
    assert together[[1, 3]].tolist() == _one_group([5, 7]).tolist()


def test_lost_trajectories_are_zero_and_take_no_part():
    with_lost = _one_group([1, NAN, 0, 99], [True, False, True, False])
    assert with_lost[[0, 2]].tolist() == _one_group([1, 0]).tolist()
    assert with_lost[[1, 3]].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("valid", [[True, False, False], [False, False, False]])
def test_fewer_than_two_valid_trajectories_teach_nothing(valid):
    assert _one_group([1.0, 0.0, 0.5], valid).tolist() == [0.0, 0.0, 0.0]


def test_advantages_sum_to_zero_and_are_float32():
    advantages = _one_group([0.1, 0.9, 0.4, 0.35, 0.2])
    assert advantages.dtype == torch.float32 and abs(float(advantages.sum())) < 1e-6


def test_shifting_all_rewards_changes_nothing():
    shifted = _one_group([1000.25, 1000.75, 1000.5])
    assert shifted.tolist() == pytest.approx(_one_group([0.25, 0.75, 0.5]).tolist(), abs=1e-6)


def test_no_trajectories_give_no_advantages():
    assert group_advantages([], [], []).shape == (0,)


def test_lists_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="got 2, 1 and 2"):
        group_advantages([1, 2], ["a"], [True, True])


def test_a_valid_trajectory_without_a_number_as_reward_is_refused():
    for reward in (NAN, math.inf):
        with pytest.raises(ValueError, match="trajectory 1 of group p: reward"):
            _one_group([1.0, reward, 0.0])


def test_share_of_groups_that_teach_nothing():
    rewards = [1, 1, 0, 1, 0, NAN, 0.5]
    groups = ["a", "a", "b", "b", "c", "c", "d"]
    valid = [True, True, True, True, True, False, False]
    # a constant, b not, c constant (one valid), d has no valid trajectory and is not counted
    assert zero_variance_fraction(rewards, groups, valid) == pytest.approx(2 / 3)
    assert zero_variance_fraction([], [], []) == 0.0
