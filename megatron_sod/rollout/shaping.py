"""From a graded score to the reward a trajectory is trained on. Evaluation uses the score."""

from __future__ import annotations

from dataclasses import replace

from megatron_sod.config.schema import RewardConfig
from megatron_sod.types import Trajectory

_WRONG, _PER_CALL, _WRONG_AT_MOST = -1.0, 0.1, -0.6


def shape_rewards(
    trajectories: list[Trajectory], config: RewardConfig, *, max_response_length: int
) -> list[Trajectory]:
    """The same trajectories with the reward training sees; `score` stays as graded.

    tool_bonus: 1 for right, min(-0.6, -1 + 0.1 per tool call that was run) for wrong, so that
    trying the tool beats giving up. overlong_buffer: minus the share of the buffer before
    `max_response_length` that the student's own tokens fill; tool output is not the student's and
    does not count.
    """
    if not config.tool_bonus and config.overlong_buffer is None:
        return trajectories
    return [_shaped(t, config, max_response_length) if t.is_valid else t for t in trajectories]


def _shaped(trajectory: Trajectory, config: RewardConfig, max_response_length: int) -> Trajectory:
    reward = trajectory.score
    if config.tool_bonus and reward <= 0:
        num_calls = sum(step.num_tool_calls for step in trajectory.steps)
        reward = min(_WRONG_AT_MOST, _WRONG + _PER_CALL * num_calls)
    if config.overlong_buffer is not None:
        excess = sum(trajectory.loss_mask) - (max_response_length - config.overlong_buffer)
        reward -= min(1.0, max(0.0, excess / config.overlong_buffer))
    return replace(trajectory, reward=reward)
