"""From scores to what the loss multiplies each row by. Pure torch over one rank's trajectories.

R rows of one micro-batch, N trajectories of this rank, K steps.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from megatron_sod.algorithm import quantile_over_ranks, step_weights
from megatron_sod.algorithm.steps import packed_step_divergence, token_weights, valid_steps
from megatron_sod.algorithm.withdrawal import withdrawn
from megatron_sod.config.schema import DistillConfig, SodConfig
from megatron_sod.types import MicroBatch, StepCredit, TokenCredit, TokenScores, TrainingBatch

# Outcomes that are the student's own doing, for policies that look at errors.
WRONG_OUTCOMES = frozenset(
    {"user_error", "timeout", "memory", "output_limit", "rejected", "malformed"}
)


def distill_coef(distill: DistillConfig, iteration: int) -> float:
    """Weight of the distillation term in this iteration."""
    if distill.withdraw is None or distill.coef == 0:
        return distill.coef
    return withdrawn(distill.coef, iteration, **distill.withdraw.model_dump())


def assign_credit(
    batch: TrainingBatch,
    micro_batches: list[MicroBatch],
    scores: list[TokenScores],
    config: SodConfig,
    *,
    coef: float | None = None,
    dp_group: dist.ProcessGroup | None = None,
) -> tuple[list[TokenCredit], StepCredit | None]:
    """Per-row credit of every micro-batch, and the step weights behind it (None without teacher).

    Args:
        coef: weight of the distillation term; None: distill.coef. 0: the teacher has no say.
        dp_group: ranks that hold the iteration's other trajectories, for `d_floor`.
    Distributed: communicates only when `d_floor` is set; a trajectory lies whole on one rank.
    """
    coef = config.distill.coef if coef is None else coef
    steps = None
    if coef > 0:
        steps = _step_credit(batch, micro_batches, scores, config.distill, dp_group)
    credits = [
        _token_credit(micro_batch, score, batch, steps, config, coef)
        for micro_batch, score in zip(micro_batches, scores, strict=True)
    ]
    return credits, steps


def _step_credit(
    batch: TrainingBatch,
    micro_batches: list[MicroBatch],
    scores: list[TokenScores],
    distill: DistillConfig,
    dp_group: dist.ProcessGroup | None,
) -> StepCredit:
    options = distill.step_weight
    values = [_token_divergence(score, options.source) for score in scores]
    max_steps = max((t.steps[-1].step_id for t in batch.trajectories if t.steps), default=1)
    divergence, counts = packed_step_divergence(
        torch.cat(values).cpu(),
        torch.cat([_taught_steps(m, distill) for m in micro_batches]),
        torch.cat([m.trajectory_ids for m in micro_batches]).cpu(),
        len(batch.trajectories),
        max_steps,
    )
    valid = valid_steps(divergence, counts)
    if batch.is_taught is not None:
        valid &= batch.is_taught[:, None]
    anchor_floor = None
    if options.d_floor is not None:
        anchor_floor = _quantile(divergence[valid], options.d_floor, values[0].device, dp_group)
    weights = step_weights(
        divergence,
        valid,
        delta=options.delta,
        epsilon=options.epsilon,
        policy=options.policy,
        wrong_BK=_wrong_steps(batch, max_steps),
        anchor_floor=anchor_floor,
        w_min=options.w_min,
    )
    return StepCredit(divergence, weights, valid)


def _quantile(values: torch.Tensor, q: float, device, group) -> float | None:
    return quantile_over_ranks(values.to(device), q, group)  # collectives run on the device


def _token_divergence(score: TokenScores, source: str) -> torch.Tensor:
    """[R] what d_k averages, nats."""
    assert score.teacher_logprobs is not None and score.reverse_kl is not None, "no teacher scores"
    if source == "sampled":
        return (score.student_logprobs - score.teacher_logprobs).abs()
    return score.reverse_kl


def _taught_steps(micro_batch: MicroBatch, distill: DistillConfig) -> torch.Tensor:
    """[R] each row's step, 0 on tokens that take no part in distillation."""
    step_ids = micro_batch.step_ids.cpu()
    if not distill.exclude_token_ids:
        return step_ids
    excluded = torch.tensor(distill.exclude_token_ids)
    return torch.where(torch.isin(micro_batch.targets.cpu(), excluded), 0, step_ids)


def _wrong_steps(batch: TrainingBatch, max_steps: int) -> torch.Tensor:
    wrong = torch.zeros(len(batch.trajectories), max_steps, dtype=torch.bool)
    for index, trajectory in enumerate(batch.trajectories):
        for step in trajectory.steps:
            wrong[index, step.step_id - 1] = step.outcome in WRONG_OUTCOMES
    return wrong


def _token_credit(
    micro_batch: MicroBatch,
    score: TokenScores,
    batch: TrainingBatch,
    steps: StepCredit | None,
    config: SodConfig,
    coef: float,
) -> TokenCredit:
    rows = score.student_logprobs
    owners = micro_batch.trajectory_ids.cpu()
    advantages = config.grpo.coef * batch.group_advantages[owners].to(rows)
    log_ratios = weights = torch.zeros_like(rows)
    if steps is not None:
        assert score.teacher_logprobs is not None, "no teacher scores"
        log_ratios = score.teacher_logprobs - score.student_logprobs
        if config.distill.log_ratio_clip is not None:
            log_ratios = log_ratios.clamp(
                -config.distill.log_ratio_clip, config.distill.log_ratio_clip
            )
        taught = _taught_steps(micro_batch, config.distill)
        weights = coef * token_weights(steps.step_weights, taught, owners).to(rows)
        log_ratios = torch.where(weights > 0, log_ratios, 0.0)
        if config.distill.loss == "sampled_advantage":
            advantages = advantages + weights * log_ratios
    importance = torch.ones_like(rows)
    if config.rollout.corrects_behaviour:
        importance = _importance(micro_batch, score, config.rollout.importance_cap)
    return TokenCredit(score.student_logprobs, advantages, weights, log_ratios, importance)


def _importance(micro_batch: MicroBatch, score: TokenScores, cap: float) -> torch.Tensor:
    """[R] min(exp(s_t - mu_t), cap): how much likelier the student finds the token now than the
    engine did when it sampled it. A constant: nothing is differentiated through it."""
    log_ratio = score.student_logprobs - micro_batch.rollout_logprobs.to(score.student_logprobs)
    return log_ratio.clamp(max=math.log(cap)).exp()
