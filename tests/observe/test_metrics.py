"""Named scalars of one iteration, against trajectories counted by hand.

Layer: pure. Merging over ranks: tests/observe/test_records.py for one rank, tests/train for more.
"""

from dataclasses import replace

import pytest

from megatron_sod.observe.metrics import credit_metrics, rollout_metrics
from megatron_sod.observe.records import IterationRecords
from megatron_sod.types import Step, Trajectory


def _trajectory(prompt="p", reward=1.0, steps=(("none", 2, 0),), reason="answer", context=0):
    num_student = sum(count for _, count, _ in steps)
    return Trajectory(
        trajectory_id=f"{prompt}/0",
        prompt_id=prompt,
        prompt_token_ids=[1, 2, 3],
        response_token_ids=[5] * (num_student + context),
        loss_mask=[True] * num_student + [False] * context,
        step_ids=[1] * num_student + [0] * context,
        rollout_logprobs=[0.0] * (num_student + context),
        policy_versions=[0] * (num_student + context),
        steps=tuple(Step(k, o, n, c) for k, (o, n, c) in enumerate(steps, 1)),
        finish_reason=reason,
        reward=reward,
        policy_version=0,
    )


TRAJECTORIES = [
    _trajectory("a", 1.0, (("ok", 3, 1), ("user_error", 4, 1), ("none", 1, 0)), context=6),
    _trajectory("a", 0.0, (("ok", 2, 2),), reason="max_length", context=2),
    _trajectory("b", 0.0, (("malformed", 2, 0), ("none", 2, 0))),
    _trajectory("b", 0.0),
    _trajectory("b", float("nan"), (("infra_error", 9, 1),), reason="infra_error", context=1),
]


def test_rollouts_are_averaged_over_valid_trajectories():
    m = rollout_metrics(TRAJECTORIES)
    assert m["rollout/reward_mean"] == 0.25
    assert m["rollout/tool_calls_avg"] == 4 / 4  # 2 + 2 + 0 + 0: a malformed call is not run
    assert m["rollout/num_turns"] == 7 / 4  # 3 + 1 + 2 + 1
    assert m["rollout/student_tokens"] == (8 + 2 + 4 + 2) / 4
    assert m["rollout/response_length"] == (14 + 4 + 4 + 2) / 4
    assert m["rollout/truncated_rate"] == 0.25
    assert m["rollout/infra_error_rate"] == pytest.approx(0.2)
    assert m["rollout/tokens"] == 14 + 4 + 4 + 2 + 10
    assert m["rollout/zero_var_group_frac"] == 0.5  # b is constant, a is not


def test_outcomes_are_shares_of_steps_that_called_a_tool():
    m = rollout_metrics(TRAJECTORIES)
    # ok, user_error, ok, malformed
    assert (m["tool/ok_rate"], m["tool/user_error_rate"]) == (0.5, 0.25)
    assert (m["tool/malformed_rate"], m["tool/timeout_rate"]) == (0.25, 0.0)
    shares = {name: m[name] for name in m if name.startswith("tool/") and name.endswith("_rate")}
    assert shares.pop("tool/infra_error_rate") == 0.2  # of all five calling steps
    assert sum(shares.values()) == 1.0
    assert m["tool/calls"] == 4.0 and m["rollout/tool_success_avg"] == 2 / 4


def test_lengths_and_turns_have_ends():
    m = rollout_metrics(TRAJECTORIES)
    assert (m["rollout/num_turns_max"], m["rollout/num_turns_min"]) == (3.0, 1.0)
    assert (m["rollout/response_length_max"], m["rollout/response_length_min"]) == (14.0, 2.0)
    assert (m["rollout/tool_calls_max"], m["rollout/reward_min"]) == (2.0, 0.0)
    assert m["rollout/observation_tokens"] == (6 + 2) / 4  # the rest the student wrote
    assert m["rollout/response_length"] == m["rollout/student_tokens"] + 2.0
    assert m["rollout/total_tokens"] == m["rollout/tokens"] + 5 * 3  # and the prompts


@pytest.mark.parametrize("trajectories", [[], TRAJECTORIES[-1:]])
def test_nothing_valid_gives_finite_numbers(trajectories):
    m = rollout_metrics(trajectories)
    assert all(value == value for value in m.values())
    assert m["rollout/reward_mean"] == 0.0


def _records(rows, **sums):
    return IterationRecords(
        [{"step": s, "d_k": d, "w_k": w} for s, d, w in rows], [], {"rows": 4.0, **sums}
    )


def test_weights_and_divergences_are_summarised_over_scored_steps():
    m = credit_metrics(
        _records([(1, 0.3, 1.0), (2, 1.5, 0.1), (1, 0.5, 1.0), (2, None, None), (3, 0.3, 1.2)])
    )
    assert m["sod/n_steps"] == 4 and m["sod/w_mean"] == pytest.approx(3.3 / 4)
    assert (m["sod/w_min"], m["sod/frac_w_below_0.2"]) == (0.1, 0.25)
    assert m["sod/frac_w_above_1"] == 0.25
    assert m["sod/d_mean"] == pytest.approx(2.6 / 4)
    assert m["sod/d_step_1"] == pytest.approx(0.4) and m["sod/d_step_2"] == 1.5
    assert m["sod/w_step_3"] == pytest.approx(1.2) and "sod/d_step_4" not in m
    assert m["sod/w_p50"] == 1.0
    assert m["sod/d_1_mean"] == 0.3  # of the one trajectory these rows name
    assert m["sod/w_p5"] == pytest.approx(0.1 + 0.15 * 0.9)  # a fifth of the way is 0.15 of a gap


def test_sums_are_divided_by_the_rows_of_all_ranks():
    m = credit_metrics(_records([], student_entropy=6.0, kl_k1=-2.0))
    assert m == {"actor/student_entropy": 1.5, "actor/kl_k1": -0.5}


def test_an_iteration_without_rows_gives_finite_numbers():
    assert credit_metrics(IterationRecords([], [], {"rows": 0.0, "kl_k3": 0.0})) == {
        "actor/kl_k3": 0.0
    }


def test_later_steps_are_left_to_the_table():
    m = credit_metrics(_records([(k, 0.1, 1.0) for k in range(1, 13)]))
    assert "sod/d_step_8" in m and "sod/d_step_9" not in m


def test_reward_is_that_of_valid_trajectories_only():
    better = [replace(TRAJECTORIES[3], reward=1.0), TRAJECTORIES[4]]
    assert rollout_metrics(better)["rollout/reward_mean"] == 1.0


def test_the_two_parts_of_the_advantage_are_compared():
    sums = {"group_advantage_abs": 2.0, "opd_abs": 6.0, "log_ratio_squared": 8.0, "kl_k1": 4.0}
    records = IterationRecords(
        [], [], {"rows": 4.0, **sums}, {"r": 0.5, "-r": 3.0, "advantage": 2.0, "-advantage": 4.0}
    )
    m = credit_metrics(records, grpo_coef=0.5)
    assert (m["sod/grpo_abs_mean"], m["sod/opd_abs_mean"]) == (0.25, 1.5)
    assert m["sod/opd_to_grpo_ratio"] == 6.0
    assert (m["sod/r_max"], m["sod/r_min"], m["sod/r_std"]) == (0.5, -3.0, 1.0)  # 2 - 1^2
    assert (m["actor/advantage_max"], m["actor/advantage_min"]) == (2.0, -4.0)
    assert m["actor/kl_k1"] == 1.0 and "actor/log_ratio_squared" not in m


def test_the_anchor_is_the_first_scored_step():
    records = _records([])
    records.step_rows += [
        {"trajectory": t, "step": k, "d_k": d, "w_k": 1.0}
        for t, k, d in (("a", 1, 0.5), ("a", 2, 9.0), ("b", 3, 4.0), ("b", 2, 1.5))
    ]
    assert credit_metrics(records)["sod/d_1_mean"] == 1.0  # 0.5 and 1.5


def test_tokens_of_the_data_parallel_ranks_are_compared():
    m = credit_metrics(IterationRecords([], [], {"rows": 4.0}, rank_tokens=[60, 100]))
    assert (m["rollout/rank_tokens"], m["rollout/rank_tokens_max"]) == (80.0, 100.0)


def test_lost_trajectories_are_counted_not_averaged():
    m = credit_metrics(IterationRecords([], [], {"rows": 4.0}, {}, {"nonfinite_trajectories": 3.0}))
    assert m["sod/nonfinite_trajectories"] == 3.0


def test_capped_steps_and_patterns_are_shares():
    rows = [("a", 1, 0.5, 1.0), ("a", 2, 0.3, 1.2), ("b", 1, 0.2, 1.0), ("b", 2, 1.6, 0.125)]
    records = _records([])
    records.step_rows += [
        {"trajectory": t, "step": k, "d_k": d, "w_k": w} for t, k, d, w in rows
    ]  # fmt: skip
    m = credit_metrics(records, cap=1.2)
    assert m["sod/cap_fraction"] == 0.25 and "sod/cap_fraction" not in credit_metrics(records)
    assert m["sod/pattern_stable"] == m["sod/pattern_erroneous"] == 0.5
