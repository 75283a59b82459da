"""From scores to what the loss multiplies each row by. Pure torch over one rank's trajectories.

R rows of one micro-batch, N trajectories of this rank, K steps.
"""

from __future__ import annotations

import torch

from megatron_sod.algorithm import step_weights
from megatron_sod.algorithm.steps import packed_step_divergence, token_weights, valid_steps
from megatron_sod.config.schema import DistillConfig, SodConfig
from megatron_sod.types import MicroBatch, StepCredit, TokenCredit, TokenScores, TrainingBatch

# Outcomes that are the student's own doing, for policies that look at errors.
WRONG_OUTCOMES = frozenset(
    {"user_error", "timeout", "memory", "output_limit", "rejected", "malformed"}
)


def assign_credit(
    batch: TrainingBatch,
    micro_batches: list[MicroBatch],
    scores: list[TokenScores],
    config: SodConfig,
) -> tuple[list[TokenCredit], StepCredit | None]:
    """Per-row credit of every micro-batch, and the step weights behind it (None without teacher).

    Every trajectory lies whole on one rank, so no communication is needed.
    """
    steps = None
    if config.distill.coef > 0:
        steps = _step_credit(batch, micro_batches, scores, config.distill)
    credits = [
        _token_credit(micro_batch, score, batch, steps, config)
        for micro_batch, score in zip(micro_batches, scores, strict=True)
    ]
    return credits, steps


def _step_credit(
    batch: TrainingBatch,
    micro_batches: list[MicroBatch],
    scores: list[TokenScores],
    distill: DistillConfig,
) -> StepCredit:
    options = distill.step_weight
    values = [_token_divergence(score, options.source) for score in scores]
    max_steps = max((t.steps[-1].step_id for t in batch.trajectories if t.steps), default=1)
    divergence, counts = packed_step_divergence(
        torch.cat(values).cpu(),
        torch.cat([m.step_ids for m in micro_batches]).cpu(),
        torch.cat([m.trajectory_ids for m in micro_batches]).cpu(),
        len(batch.trajectories),
        max_steps,
    )
    valid = valid_steps(divergence, counts)
    weights = step_weights(
        divergence,
        valid,
        delta=options.delta,
        epsilon=options.epsilon,
        policy=options.policy,
        wrong_BK=_wrong_steps(batch, max_steps),
        d_floor=options.d_floor,
        w_min=options.w_min,
    )
    return StepCredit(divergence, weights, valid)


def _token_divergence(score: TokenScores, source: str) -> torch.Tensor:
    """[R] what d_k averages, nats."""
    assert score.teacher_logprobs is not None and score.reverse_kl is not None, "no teacher scores"
    if source == "sampled":
        return (score.student_logprobs - score.teacher_logprobs).abs()
    return score.reverse_kl


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
) -> TokenCredit:
    rows = score.student_logprobs
    owners = micro_batch.trajectory_ids.cpu()
    advantages = config.grpo.coef * batch.group_advantages[owners].to(rows)
    log_ratios = weights = torch.zeros_like(rows)
    if steps is not None:
        assert score.teacher_logprobs is not None, "no teacher scores"
        # A score that is not finite removes its trajectory: no step of it is valid.
        usable = steps.valid.any(dim=1)[owners].to(rows.device)
        advantages = torch.where(usable, advantages, 0.0)
        log_ratios = score.teacher_logprobs - score.student_logprobs
        if config.distill.log_ratio_clip is not None:
            log_ratios = log_ratios.clamp(
                -config.distill.log_ratio_clip, config.distill.log_ratio_clip
            )
        weights = config.distill.coef * token_weights(
            steps.step_weights, micro_batch.step_ids.cpu(), owners
        ).to(rows)
        log_ratios = torch.where(weights > 0, log_ratios, 0.0)  # a dropped step may hold a NaN
        if config.distill.loss == "sampled_advantage":
            advantages = advantages + weights * log_ratios
    return TokenCredit(score.student_logprobs, advantages, weights, log_ratios)
