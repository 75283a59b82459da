"""The loss of one micro-batch: a sum over its rows, to be divided once by the global row count.

R rows that carry loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Protocol

import torch
import torch.nn.functional as F

from megatron_sod.algorithm.policy_loss import (
    MAX_LOG_RATIO,
    clipped_rows,
    clipped_surrogate,
    importance_ratio,
)
from megatron_sod.config.schema import SodConfig
from megatron_sod.model.gpt import PipelineModel
from megatron_sod.ops import differentiable_divergence
from megatron_sod.train.schedule import LossFn
from megatron_sod.types import MicroBatch, TokenCredit, TokenScores

EXACT_LOSSES = ("reverse_kl", "forward_kl", "jsd")


class OutputHead(Protocol):
    """What the exact losses need of the teacher."""

    def head_weight(self) -> torch.Tensor: ...


def make_loss_fn(
    model: PipelineModel,
    teacher: OutputHead | None,
    credits: Sequence[TokenCredit],
    scores: Sequence[TokenScores],
    config: SodConfig,
) -> LossFn:
    """The loss function of one mini-batch; `credits` and `scores` belong to its micro-batches."""

    def loss_fn(hidden: torch.Tensor, batch: MicroBatch, number: int):
        credit = _part_of(credits[number], batch)
        stats = _divergence(model, teacher, hidden, batch, scores[number], config)
        surrogate_R = clipped_surrogate(
            stats.student_logprobs, credit.old_logprobs, credit.advantages, **_clips(config)
        )
        loss_R = credit.importance * (surrogate_R + _distillation(stats, credit, config))
        count = torch.tensor(batch.rows.numel(), device=hidden.device)
        return loss_R.sum(), count, _collected(loss_R, surrogate_R, stats, credit, config)

    return loss_fn


def _part_of(credit: TokenCredit, batch: MicroBatch) -> TokenCredit:
    """The rows of this context-parallel rank."""
    named = {f.name: v for f in fields(credit) if (v := getattr(credit, f.name)) is not None}
    return replace(credit, **{name: batch.part_of(whole) for name, whole in named.items()})


def _divergence(model, teacher, hidden, batch: MicroBatch, score: TokenScores, config: SodConfig):
    held = score.teacher_hidden  # kept when an exact loss needs the teacher's logits
    teacher_logits = None
    if held is not None:
        with torch.no_grad():
            rows = batch.part_of(held.to(hidden.device, non_blocking=True))
            teacher_logits = F.linear(rows, teacher.head_weight())
    needs_jsd = held is not None and config.distill.loss == "jsd"
    return differentiable_divergence(
        model.output_logits(hidden, batch.rows),
        teacher_logits,
        batch.targets,
        vocab_start=model.vocab_start,
        vocab_size=model.real_vocab_size,
        group=model.pg_collection.tp,
        temperature=config.rollout.temperature,
        jsd_beta=config.distill.jsd_beta if needs_jsd else None,
        inplace=True,
    )


def _distillation(stats, credit: TokenCredit, config: SodConfig) -> torch.Tensor:
    """[R] the term beside the surrogate; `sampled_advantage` has none, it is in the advantage."""
    loss = config.distill.loss
    if loss == "sampled_advantage":
        return torch.zeros_like(credit.advantages)
    if loss == "sampled_separate":
        ratio = importance_ratio(stats.student_logprobs, credit.old_logprobs)
        return -credit.distill_weights * credit.log_ratios * ratio
    divergence_R = getattr(stats, loss)  # None once the teacher is withdrawn
    if divergence_R is None:
        return torch.zeros_like(credit.advantages)
    return credit.distill_weights * divergence_R


def _clips(config: SodConfig) -> dict[str, float]:
    return config.grpo.model_dump(include={"clip_low", "clip_high", "dual_clip"})


def _collected(
    loss_R, surrogate_R, stats, credit: TokenCredit, config: SodConfig
) -> dict[str, torch.Tensor]:
    """Sums for the metrics, detached."""
    logprobs = stats.student_logprobs.detach()
    log_ratio = (logprobs - credit.old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    clipped, dual = clipped_rows(logprobs, credit.old_logprobs, credit.advantages, **_clips(config))
    return {
        "loss": loss_R.detach().double().sum(),
        "pg_loss": surrogate_R.detach().double().sum(),
        "ppo_kl": -log_ratio.double().sum(),
        "pg_clipfrac": clipped.double().sum(),
        "pg_clipfrac_lower": dual.double().sum(),
        "rows": torch.tensor(float(loss_R.numel()), dtype=torch.float64, device=loss_R.device),
    }
