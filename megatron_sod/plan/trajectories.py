"""Made-up trajectories with the lengths, turns and tool latencies a configuration assumes."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from megatron_sod.config.schema import PlanConfig


@dataclass(frozen=True)
class Draw:
    """One trajectory as the simulator sees it; `num_turns` turns of equal length."""

    prompt_tokens: int
    num_turns: int
    turn_tokens: int  # the student's, per turn
    observation_tokens: int  # per tool result
    tool_latencies_s: tuple[float, ...]  # one fewer than turns

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.rows + self.observation_tokens * (self.num_turns - 1)

    @property
    def rows(self) -> int:
        """Tokens that carry loss."""
        return self.turn_tokens * self.num_turns


@dataclass(frozen=True)
class Limits:
    """What bounds a trajectory; tokens and turns."""

    prompt_tokens: int  # of every prompt
    max_response_length: int
    max_turns: int


def draw_trajectories(plan: PlanConfig, limits: Limits, *, count: int, seed: int) -> list[Draw]:
    """Log-normal response lengths and tool latencies, 1 + Poisson turns; cut at the limits.

    Turns and length are independent of each other.
    """
    generator = random.Random(seed)
    mean = plan.mean_response_share * limits.max_response_length
    centre = math.log(mean) - plan.response_spread**2 / 2
    latency = math.log(plan.tool_latency_s) if plan.tool_latency_s > 0 else -math.inf
    draws = []
    for _ in range(count):
        response = math.exp(generator.gauss(centre, plan.response_spread))
        response = max(1.0, min(response, limits.max_response_length))
        turns = min(1 + _poisson(generator, plan.mean_turns - 1), limits.max_turns)
        seen = plan.observation_share * response if turns > 1 else 0.0
        draws.append(
            Draw(
                prompt_tokens=limits.prompt_tokens,
                num_turns=turns,
                turn_tokens=max(1, round((response - seen) / turns)),
                observation_tokens=round(seen / (turns - 1)) if turns > 1 else 0,
                tool_latencies_s=tuple(
                    math.exp(generator.gauss(latency, plan.tool_latency_spread))
                    for _ in range(turns - 1)
                ),
            )
        )
    return draws


def _poisson(generator: random.Random, mean: float) -> int:
    """By multiplying uniforms, exact for the small means turns have."""
    bound, product, count = math.exp(-mean), generator.random(), 0
    while product > bound:
        product *= generator.random()
        count += 1
    return count
