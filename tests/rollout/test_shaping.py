"""What training sees of a score. Layer: pure, with the tiny tokenizer where a loop runs."""

import math
from dataclasses import replace

import pytest

from megatron_sod.config.schema import RewardConfig
from megatron_sod.data.tiny_world import tool_call_text
from megatron_sod.rollout.shaping import shape_rewards
from megatron_sod.types import Step
from tests.helpers.tiny import synthetic_trajectories
from tests.rollout.one_run import Run


def _trajectory(score: float, num_calls: int, num_tokens: int = 10):
    plain = synthetic_trajectories(1, 2, vocab_size=11, seed=0)[0]
    count = num_tokens + 5  # five tokens of tool output
    return replace(
        plain,
        response_token_ids=[1] * count,
        loss_mask=[True] * num_tokens + [False] * 5,
        steps=tuple(Step(i + 1, "ok", 1, 1) for i in range(num_calls)),
        reward=score,
        score=score,
        finish_reason="answer",
    )


def _reward(trajectory, **config) -> float:
    (shaped,) = shape_rewards([trajectory], RewardConfig(**config), max_response_length=100)
    assert shaped.score == trajectory.score or math.isnan(trajectory.score)
    return shaped.reward


@pytest.mark.parametrize(
    ("score", "num_calls", "reward"),
    [(1.0, 0, 1.0), (1.0, 5, 1.0), (0.0, 0, -1.0), (0.0, 3, -0.7), (0.0, 4, -0.6), (0.0, 9, -0.6)],
)
def test_a_wrong_answer_that_tried_the_tool_costs_less(score, num_calls, reward):
    assert _reward(_trajectory(score, num_calls), tool_bonus=True) == pytest.approx(reward)


@pytest.mark.parametrize(
    ("blocks", "reward"),
    [
        ("<tool_call>\n{oops\n</tool_call>" * 4, -1.0),  # none is run
        (tool_call_text("print(1)") * 4, -0.9),  # the first is run, the others are refused
    ],
)
def test_blocks_that_are_not_run_earn_nothing(blocks, reward):
    run = Run([blocks + "<|im_end|>", "\\boxed{3}<|im_end|>"], reward=0.0)
    assert _reward(run.trajectory, tool_bonus=True) == pytest.approx(reward)


@pytest.mark.parametrize(("tokens", "reward"), [(80, 1.0), (85, 0.75), (100, 0.0), (120, 0.0)])
def test_only_the_students_tokens_are_overlong(tokens, reward):
    assert _reward(_trajectory(1.0, 1, tokens), overlong_buffer=20) == pytest.approx(reward)


def test_without_shaping_the_reward_is_the_score():
    assert _reward(_trajectory(0.25, 3)) == 0.25


def test_a_spoilt_trajectory_keeps_no_reward():
    spoilt = replace(_trajectory(math.nan, 1), finish_reason="infra_error")
    assert math.isnan(_reward(spoilt, tool_bonus=True, overlong_buffer=5))
