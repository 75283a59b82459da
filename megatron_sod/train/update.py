"""The optimizer steps of one iteration."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatron_sod.config.schema import TrainConfig
from megatron_sod.parallel.cpu import device
from megatron_sod.train.loss import make_loss_fn
from megatron_sod.types import TokenCredit, TokenScores, TrainingBatch

if TYPE_CHECKING:
    from megatron_sod.session import Session

_SUMS = ("loss", "pg_loss", "ppo_kl", "pg_clipfrac", "pg_clipfrac_lower", "rows")


def learning_rate(train: TrainConfig, num_steps_done: int) -> float:
    """Of the next optimizer step: a linear rise (Adam's first steps have unit size), then constant
    or a linear fall."""
    lr = train.lr * min(1.0, (num_steps_done + 1) / max(train.lr_warmup_steps, 1))
    if train.lr_decay_style == "linear":
        per_iteration = train.train_batch_size // train.ppo_mini_batch_size
        lr *= max(0.0, 1.0 - num_steps_done / (train.num_iterations * per_iteration))
    return lr


def update(
    session: Session,
    batch: TrainingBatch,
    credits: list[TokenCredit],
    scores: list[TokenScores],
) -> dict[str, float]:
    """One step per mini-batch, and the learning rate goes on also where a step is left out. Metrics
    on every rank. A collective.

    `credits` and `scores` follow the micro-batches of all mini-batches in order; they are empty on
    all but the last pipeline stage.
    """
    student, groups = session.student, session.groups
    sums = torch.zeros(len(_SUMS), dtype=torch.float64, device=device())
    grad_norms, num_skipped, start = [], 0, 0
    for number, mini_batch in enumerate(batch.mini_batches):
        lr = learning_rate(session.config.train, session.progress.num_optimizer_steps + number)
        student.set_lr(lr)
        end = start + len(mini_batch.micro_batches)
        loss_fn = make_loss_fn(
            student.model, session.teacher, credits[start:end], scores[start:end], session.config
        )
        result = student.step(mini_batch.micro_batches, loss_fn)
        for collected in result.collected:
            sums += torch.stack([collected[name] for name in _SUMS])
        if result.is_applied:
            grad_norms.append(result.grad_norm)
        else:
            num_skipped += 1
        start = end
    for group in (groups.dp_cp, groups.pp):
        dist.all_reduce(sums, group=group)
    rows = max(float(sums[-1]), 1.0)  # none when no score was a finite number
    means = {f"actor/{name}": float(sums[place]) / rows for place, name in enumerate(_SUMS[:-1])}
    return means | {
        "actor/grad_norm": max(grad_norms, default=math.nan),
        "actor/steps_skipped": float(num_skipped),
        "actor/lr": lr,
    }
