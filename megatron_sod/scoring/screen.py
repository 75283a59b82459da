"""Removes trajectories with a score that is not a finite number from everything that follows.

One NaN makes every later ratio of its trajectory meaningless, and a zero weight does not stop it
(0 * NaN is NaN), so its rows leave the micro-batches: they reach no loss and no token count.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TypeVar

import torch

from megatron_sod.types import MicroBatch, MiniBatch, TokenScores, TrainingBatch

_ROW_FIELDS = ("rows", "targets", "step_ids", "trajectory_ids", "rollout_logprobs")
_LOGPROBS = ("student_logprobs", "teacher_logprobs")
Rows = TypeVar("Rows", MicroBatch, TokenScores)


def screen(
    batch: TrainingBatch, scores: list[TokenScores]
) -> tuple[TrainingBatch, list[TokenScores]]:
    """The batch and its scores without rows of spoilt trajectories; `num_nonfinite` counts them.

    Args:
        scores: of the micro-batches of all mini-batches, in order.
    Distributed: no communication; every rank of a replica has the scores of all its rows.
    """
    micro_batches = [m for mini in batch.mini_batches for m in mini.micro_batches]
    spoilt_N = torch.zeros(len(batch.trajectories), dtype=torch.int32)
    for micro_batch, score in zip(micro_batches, scores, strict=True):
        spoilt_N[micro_batch.trajectory_ids.cpu()[~_is_finite(score).cpu()]] = 1
    if not spoilt_N.any():
        return batch, scores
    keep = [spoilt_N[m.trajectory_ids.cpu()] == 0 for m in micro_batches]
    kept = iter([_take(m, k, _ROW_FIELDS) for m, k in zip(micro_batches, keep, strict=True)])
    mini_batches = [
        MiniBatch([next(kept) for _ in mini.micro_batches]) for mini in batch.mini_batches
    ]
    names = tuple(field.name for field in fields(TokenScores))
    scores = [_take(s, k, names) for s, k in zip(scores, keep, strict=True)]
    return replace(batch, mini_batches=mini_batches, num_nonfinite=int(spoilt_N.sum())), scores


def _is_finite(score: TokenScores) -> torch.Tensor:
    """[R] bool."""
    values = [v for name in _LOGPROBS if (v := getattr(score, name)) is not None]
    return torch.stack([torch.isfinite(v) for v in values]).all(dim=0)


def _take(table: Rows, keep: torch.Tensor, names: tuple[str, ...]) -> Rows:
    """The listed fields at the rows where `keep` is True."""
    columns = {name: getattr(table, name) for name in names}
    return replace(
        table, **{name: v[keep.to(v.device)] for name, v in columns.items() if v is not None}
    )
