"""An iteration stops before the optimizer when infrastructure is failing.

Layer: pure.
"""

from dataclasses import replace

import pytest

from megatron_sod.config.schema import WatchdogConfig
from megatron_sod.errors import RolloutError
from megatron_sod.rollout.breaker import check_infrastructure, check_sampling
from tests.helpers.tiny import synthetic_trajectories


def _trajectories(num_lost: int, total: int = 20):
    plain = synthetic_trajectories(total + 1, 1, vocab_size=11, seed=0)[:total]
    return [
        replace(t, finish_reason="infra_error" if i < num_lost else "max_turns")
        for i, t in enumerate(plain)
    ]


@pytest.mark.parametrize("num_lost", [0, 1])
def test_a_share_up_to_the_bound_passes(num_lost):
    check_infrastructure(_trajectories(num_lost), WatchdogConfig())  # 1 of 20 is exactly 5 %


@pytest.mark.parametrize("num_lost", [2, 20])
def test_a_larger_share_stops_with_what_to_do(num_lost):
    with pytest.raises(RolloutError, match=f"{num_lost} of 20 trajectories") as caught:
        check_infrastructure(_trajectories(num_lost), WatchdogConfig())
    assert "nothing was trained" in str(caught.value) and "train.resume=auto" in str(caught.value)


def test_the_bound_is_a_setting():
    check_infrastructure(_trajectories(20), WatchdogConfig(max_infra_error_rate=1.0))
    with pytest.raises(RolloutError):
        check_infrastructure(_trajectories(1), WatchdogConfig(max_infra_error_rate=0.0))


def test_wrong_answers_and_truncation_are_not_infrastructure():
    failed = [replace(t, finish_reason="max_length", reward=0.0) for t in _trajectories(0)]
    check_infrastructure(failed, WatchdogConfig(max_infra_error_rate=0.0))


def test_no_trajectories_are_no_failure():
    check_infrastructure([], WatchdogConfig())


def test_time_limits_count_as_lost_and_the_message_names_their_key():
    late = [replace(t, finish_reason="time_limit") for t in _trajectories(20)]
    with pytest.raises(RolloutError, match="raise rollout.trajectory_timeout_s"):
        check_infrastructure(late, WatchdogConfig())


@pytest.mark.parametrize("other", [{"temperature": 0.7}, {"top_p": 0.6}, {"temperature": None}])
def test_what_was_sampled_otherwise_than_it_would_be_scored_is_refused(other):
    plain = _trajectories(0)
    check_sampling(plain, 1.0)
    changed = [*plain[:3], replace(plain[3], **other), *plain[4:]]
    with pytest.raises(RolloutError, match=plain[3].trajectory_id) as caught:
        check_sampling(changed, 1.0)
    assert "rollout.temperature" in str(caught.value)
