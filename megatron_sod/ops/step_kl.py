"""The SOD loss term in one call: divergence per token, step weights, differentiable product.

T tokens, N trajectories, K steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_sod.errors import OpError
from megatron_sod.ops.divergence import differentiable_divergence
from megatron_sod.ops.stats import DivergenceStats
from megatron_sod.ops.step_reduce import packed_step_weights

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")
STEP_SOURCES = ("sampled", "reverse_kl")


@dataclass(frozen=True)
class StepInfo:
    """What the weights were made of. No gradient.

    step_divergence: [N, K] nats, 0 where not valid; e.g. [[.2, .4]].
    step_weights: [N, K], 0 where not valid; e.g. [[1., .5]].
    counts: [N, K] float64 counted tokens; a step with a count but weight 0 under policy sod
        belongs to a trajectory with a logprob that is not finite.
    token_weights: [T] the weight each token got, 0 where not counted.
    stats: the per-token statistics, detached.
    """

    step_divergence: torch.Tensor
    step_weights: torch.Tensor
    counts: torch.Tensor
    token_weights: torch.Tensor
    stats: DivergenceStats


def step_weighted_kl(
    student_logits_TVp: torch.Tensor,
    teacher_logits_TVp: torch.Tensor,
    target_ids_T: torch.Tensor,
    step_ids_T: torch.Tensor,
    trajectory_ids_T: torch.Tensor,
    *,
    vocab_start: int,
    vocab_size: int,
    divergence: str = "reverse_kl",
    step_source: str = "sampled",
    policy: str = "sod",
    delta: float = 0.2,
    epsilon: float = 1e-6,
    tp_group: dist.ProcessGroup | None = None,
    cp_group: dist.ProcessGroup | None = None,
    inplace: bool = False,
    temperature: float = 1.0,
    jsd_beta: float = 0.5,
    num_trajectories: int | None = None,
    max_steps: int | None = None,
    wrong_NK: torch.Tensor | None = None,
    d_floor: float | None = None,
    w_min: float | None = None,
) -> tuple[torch.Tensor, StepInfo]:
    """Divergence of each token times the trust in the teacher at its step.

    loss_t = w_{k(t)} * D_t,  D one of DIVERGENCES,  w as in `algorithm.step_weights`, no gradient
    through w. Sum it, and divide by the *global* token count.

    Args:
        target_ids_T: [T] sampled ids; negative rows are ignored.
        step_ids_T: [T] integer, 0 = not counted (then the loss is exactly 0), 1..K.
        trajectory_ids_T: [T] integer, 0..N-1 where step_ids_T > 0.
        step_source: "sampled" = mean |log-ratio| of the sampled tokens (Eq. 6), "reverse_kl" =
            mean exact KL(student || teacher) (Eq. 5).
        cp_group: ranks that hold other tokens of the same trajectories.
        inplace: the gradient overwrites the student logits (see `differentiable_divergence`).
        num_trajectories, max_steps: N and K; required with cp_group, since every rank must agree;
            read from the ids when None.
        wrong_NK: [N, K] bool tool outcomes, for the policies that need them.
    Returns:
        loss_T [T], differentiable in student_logits_TVp, and StepInfo.
    Raises:
        OpError, ValueError: unknown names, shapes that differ.
    Distributed: one all-gather over tp_group (two for JSD), one all-reduce of [N * K, 2] over
        cp_group.
    """
    if divergence not in DIVERGENCES or step_source not in STEP_SOURCES:
        raise OpError(
            f"divergence must be one of {DIVERGENCES} and step_source one of {STEP_SOURCES}; got "
            f"{divergence!r} and {step_source!r}"
        )
    sizes = _sizes(step_ids_T, trajectory_ids_T, num_trajectories, max_steps, cp_group)
    targets_T = torch.where(step_ids_T > 0, target_ids_T, -100)
    live = differentiable_divergence(
        student_logits_TVp,
        teacher_logits_TVp,
        targets_T,
        vocab_start=vocab_start,
        vocab_size=vocab_size,
        group=tp_group,
        temperature=temperature,
        jsd_beta=jsd_beta if divergence == "jsd" else None,
        inplace=inplace,
    )
    stats = live.detached()
    sampled = step_source == "sampled"
    assert stats.reverse_kl is not None, "a teacher was given, so its divergences exist"
    # a token without a target is in no mean, whatever its step id says
    counted_T = torch.where(target_ids_T >= 0, step_ids_T, 0)
    d_NK, w_NK, counts_NK, w_T = packed_step_weights(
        stats.student_logprobs if sampled else stats.reverse_kl,
        stats.teacher_logprobs if sampled else None,
        counted_T,
        trajectory_ids_T,
        *sizes,
        group=cp_group,
        policy=policy,
        delta=delta,
        epsilon=epsilon,
        wrong_NK=wrong_NK,
        d_floor=d_floor,
        w_min=w_min,
    )
    # where, not a bare product: an excluded trajectory's NaN or inf must not survive a weight of 0
    loss_T = torch.where(w_T > 0, getattr(live, divergence) * w_T, 0.0)
    return loss_T, StepInfo(d_NK, w_NK, counts_NK, w_T, stats)


def _sizes(step_ids_T, trajectory_ids_T, num_trajectories, max_steps, cp_group) -> tuple[int, int]:
    if num_trajectories is None or max_steps is None:
        if cp_group is not None and dist.get_world_size(cp_group) > 1:
            raise OpError(
                "num_trajectories and max_steps must be given with a cp_group: each rank sees "
                "only some of the ids"
            )
        steps = int(step_ids_T.max()) if step_ids_T.numel() else 0
        rows = int(trajectory_ids_T.max()) + 1 if trajectory_ids_T.numel() else 0
        num_trajectories = rows if num_trajectories is None else num_trajectories
        max_steps = steps if max_steps is None else max_steps
    return num_trajectories, max_steps
