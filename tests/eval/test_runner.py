"""What an evaluation counts and what it leaves out.

Layer: pure; the controller is a list of graded trajectories. With a real engine: tests/end_to_end.
"""

from dataclasses import replace

import pytest

from megatron_sod.types import Step
from tests.helpers.tiny import synthetic_trajectories

runner = pytest.importorskip("megatron_sod.eval.runner", reason="needs ray, which rollouts run on")


def _graded(*rewards):
    plain = synthetic_trajectories(len(rewards) + 1, 1, vocab_size=11, seed=2)[: len(rewards)]
    steps = (Step(1, "ok", 3, 1), Step(2, "none", 2, 0))
    return [
        replace(t, reward=r, steps=steps, finish_reason="answer")
        for t, r in zip(plain, rewards, strict=True)
    ]


def _summary(trajectories, num_prompts=4):
    return runner.summarise(trajectories, model="student", iteration=3, num_prompts=num_prompts)


def test_success_is_the_mean_reward_with_its_interval():
    result = _summary(_graded(1.0, 0.0, 1.0, 1.0))
    assert result.success == 0.75 and result.num_samples == 4
    # Wilson, 3 of 4: 0.3006 to 0.9544
    assert result.interval == pytest.approx((0.3006, 0.9544), abs=1e-4)
    assert result.tool_calls_per_trajectory == 1.0
    assert (result.model, result.iteration, result.num_prompts) == ("student", 3, 4)


def test_lost_trajectories_are_left_out_and_counted():
    trajectories = _graded(1.0, 0.0, 1.0)
    trajectories[1] = replace(trajectories[1], finish_reason="infra_error", reward=float("nan"))
    result = _summary(trajectories)
    assert (result.success, result.num_samples, result.num_infra_errors) == (1.0, 2, 1)
    assert result.finish_reasons == {"answer": 2, "infra_error": 1}


def test_penalties_and_bonuses_do_not_leave_the_range_of_a_rate():
    assert _summary(_graded(-0.6, 1.5)).success == 0.5


def test_nothing_graded_is_no_success_and_full_uncertainty():
    result = _summary([])
    assert (result.success, result.interval, result.num_samples) == (0.0, (0.0, 1.0), 0)


def test_a_result_is_plain_data():
    row = _summary(_graded(1.0)).as_dict()
    assert row["success"] == 1.0 and isinstance(row["finish_reasons"], dict)


def test_an_evaluation_samples_as_configured():
    from tests.helpers.tiny import sod_config

    asked = {}

    class Controller:
        def rollout(self, prompts, **options):
            asked.update(options, prompts=prompts)
            return _graded(1.0, 0.0)

    config = sod_config("s", "t", eval={"num_samples": 2, "temperature": 0.8, "top_p": 0.6})
    result = runner.evaluate(Controller(), ["p"], config, model="teacher", iteration=0)
    assert asked == {
        "prompts": ["p"],
        "tag": "eval-teacher-0",
        "num_generations": 2,
        "temperature": 0.8,
        "top_p": 0.6,
    }
    assert (result.model, result.num_prompts, result.num_samples) == ("teacher", 1, 2)
