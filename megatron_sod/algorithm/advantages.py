"""Group-relative advantages (GRPO). N trajectories."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

EPSILON = 1e-6


def group_advantages(
    rewards: Sequence[float], group_ids: Sequence[str], valid: Sequence[bool]
) -> torch.Tensor:
    """How much better a trajectory did than the others of its prompt.

    A_i = (R_i - mean) / (std + 1e-6), mean and unbiased std over the group's valid trajectories;
    exactly 0 where all rewards of the group are equal or fewer than two are valid, and on
    trajectories that are not valid.

    Args:
        rewards: [N] any real numbers; values of trajectories that are not valid are not read.
        group_ids: [N] the prompt each trajectory belongs to.
        valid: [N] False removes a trajectory from the statistics.
    Returns:
        [N] float32.
    Raises:
        ValueError: lengths differ, or the reward of a valid trajectory is not finite.
    Source: algorithm as in DeepSeekMath (GRPO); the exact zero is ours, because float32 mean and
        std leave +-0.056 for constant rewards such as 1/3.
    """
    if not len(rewards) == len(group_ids) == len(valid):
        raise ValueError(
            f"one reward, group and validity per trajectory; got {len(rewards)}, {len(group_ids)} "
            f"and {len(valid)}"
        )
    advantages = torch.zeros(len(rewards), dtype=torch.float64)
    members: dict[str, list[int]] = {}
    for index, group in enumerate(group_ids):
        if valid[index]:
            members.setdefault(group, []).append(index)
    for indices in members.values():
        for i in indices:
            if not math.isfinite(rewards[i]):
                raise ValueError(
                    f"trajectory {i} of group {group}: reward {rewards[i]} is not a finite number; "
                    "correct the reward function, or mark the trajectory as not valid"
                )
        values = torch.tensor([rewards[i] for i in indices], dtype=torch.float64)
        if len(indices) < 2 or values.max() == values.min():
            continue
        advantages[indices] = (values - values.mean()) / (values.std() + EPSILON)
    return advantages.float()


def zero_variance_fraction(
    rewards: Sequence[float], group_ids: Sequence[str], valid: Sequence[bool]
) -> float:
    """Share of groups whose valid rewards are all equal: they teach GRPO nothing."""
    seen: dict[str, set[float]] = {}
    for reward, group, ok in zip(rewards, group_ids, valid, strict=True):
        if ok:
            seen.setdefault(group, set()).add(reward)
    return sum(len(values) == 1 for values in seen.values()) / max(len(seen), 1)
