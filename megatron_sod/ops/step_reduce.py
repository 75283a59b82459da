"""Step divergences and step weights of packed tokens, and each token's weight (the op's K4).

T tokens, N trajectories, K steps. Same meaning as `algorithm.packed_step_divergence` and
`algorithm.step_weights`, which are its oracle; compiled where a library serves the device.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_sod.algorithm.step_weights import step_weights
from megatron_sod.algorithm.steps import packed_step_divergence, token_weights, valid_steps


def packed_step_weights(
    values_T: torch.Tensor,
    teacher_values_T: torch.Tensor | None,
    step_ids_T: torch.Tensor,
    trajectory_ids_T: torch.Tensor,
    num_trajectories: int,
    max_steps: int,
    *,
    group: dist.ProcessGroup | None = None,
    policy: str = "sod",
    delta: float = 0.2,
    epsilon: float = 1e-6,
    wrong_NK: torch.Tensor | None = None,
    d_floor: float | None = None,
    w_min: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean of |values - teacher values| (of the values, without a teacher) per step, and weights.

    Args:
        values_T: [T] float, nats: student logprobs, or any per-token divergence.
        teacher_values_T: [T] float or None.
        step_ids_T, trajectory_ids_T: [T] integer, as in `packed_step_divergence`; int32 ids cost
            half the bytes of int64 ones.
        group: context-parallel ranks that hold other tokens of the same trajectories.
    Returns:
        d_NK and w_NK [N, K] float32 (float64 for float64 values), 0 where not valid;
        counts_NK [N, K] float64; token weights [T], 0 on tokens that are not counted.
    Distributed: one all-reduce of [2, N * K] float64 over `group`.
    """
    options: dict[str, Any] = dict(
        delta=delta, epsilon=epsilon, policy=policy, wrong_BK=wrong_NK, d_floor=d_floor, w_min=w_min
    )
    if values_T.dtype == torch.float64:
        gap_T = values_T if teacher_values_T is None else (values_T - teacher_values_T).abs()
        d_NK, counts_NK = packed_step_divergence(
            gap_T, step_ids_T, trajectory_ids_T, num_trajectories, max_steps, group
        )
        valid_NK = valid_steps(d_NK, counts_NK)
        d_NK = torch.where(valid_NK, d_NK, 0.0)
        w_NK = step_weights(d_NK, valid_NK, **options)
        return d_NK, w_NK, counts_NK, token_weights(w_NK, step_ids_T, trajectory_ids_T)

    step_ids_T = step_ids_T.contiguous()
    trajectory_ids_T = trajectory_ids_T.to(step_ids_T.dtype).contiguous()
    teacher_values_T = None if teacher_values_T is None else _float(teacher_values_T)
    sums = torch.ops.sod.step_sums(
        _float(values_T),
        teacher_values_T,
        step_ids_T,
        trajectory_ids_T,
        num_trajectories,
        max_steps,
    )
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(sums, group=group)
    d_NK, w_NK = torch.ops.sod.step_weights(sums, num_trajectories, max_steps, delta, epsilon)
    counts_NK = sums[1].reshape(num_trajectories, max_steps)
    if policy != "sod" or d_floor is not None or w_min is not None:
        usable_NK = torch.isfinite(sums[0].reshape(d_NK.shape)).all(dim=1, keepdim=True)
        w_NK = step_weights(d_NK, (counts_NK > 0) & usable_NK, **options)
    w_T = torch.ops.sod.step_gather(w_NK, step_ids_T, trajectory_ids_T)
    return d_NK, w_NK, counts_NK, w_T


def _float(values_T: torch.Tensor) -> torch.Tensor:
    return values_T.detach().float().contiguous()
