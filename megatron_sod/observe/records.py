"""What one iteration leaves: a row per step, a few whole trajectories, sums for the metrics.

Each data-parallel rank's last stage makes its own; rank 0 merges them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from megatron_sod.types import (
    MicroBatch,
    StepCredit,
    TokenCredit,
    TokenScores,
    TrainingBatch,
)

EXTREME_LOG_RATIO = 10.0  # nats: the student found a token 22,000 times likelier than the teacher


@dataclass
class IterationRecords:
    """Merged over ranks on rank 0."""

    step_rows: list[dict]
    trajectory_rows: list[dict]
    sums: dict[str, float]  # over rows
    maxima: dict[str, float] = field(default_factory=dict)  # over rows
    counts: dict[str, float] = field(default_factory=dict)  # of trajectories
    rank_tokens: list[int] = field(default_factory=list)  # of each data-parallel rank


def local_records(
    batch: TrainingBatch,
    micro_batches: list[MicroBatch],
    scores: list[TokenScores],
    credits: list[TokenCredit],
    steps: StepCredit | None,
    *,
    iteration: int,
    num_trajectories_kept: int,
    importance_cap: float | None = None,
) -> IterationRecords:
    """This rank's records. `importance_cap`: None when losses are not weighed by importance."""
    return IterationRecords(
        _step_rows(batch, steps, iteration),
        _trajectory_rows(batch, micro_batches, scores, steps, iteration, num_trajectories_kept),
        _sums(batch, micro_batches, scores, credits, importance_cap),
        _maxima(batch, micro_batches, scores, credits, importance_cap),
        _counts(batch),
        [sum(trajectory.num_tokens for trajectory in batch.trajectories)],
    )


def merge_records(local: IterationRecords | None) -> IterationRecords | None:
    """All ranks' records on rank 0, None elsewhere. A collective; `local` is None on ranks that
    hold no scores or a copy of another rank's."""
    gathered: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(local, gathered, dst=0)
    if gathered is None:
        return None
    merged = IterationRecords([], [], {})
    for records in gathered:
        if records is not None:
            merged.step_rows += records.step_rows
            merged.trajectory_rows += records.trajectory_rows
            for name, value in records.sums.items():
                merged.sums[name] = merged.sums.get(name, 0.0) + value
            for name, value in records.maxima.items():
                merged.maxima[name] = max(merged.maxima.get(name, value), value)
            for name, value in records.counts.items():
                merged.counts[name] = merged.counts.get(name, 0.0) + value
            merged.rank_tokens += records.rank_tokens
    return merged


def _step_rows(batch: TrainingBatch, steps: StepCredit | None, iteration: int) -> list[dict]:
    rows = []
    for index, trajectory in enumerate(batch.trajectories):
        for step in trajectory.steps:
            at = (index, step.step_id - 1)
            is_valid = steps is not None and bool(steps.valid[at])
            rows.append(
                {
                    "iteration": iteration,
                    "trajectory": trajectory.trajectory_id,
                    "prompt": trajectory.prompt_id,
                    "step": step.step_id,
                    "num_steps": len(trajectory.steps),
                    "tokens": step.num_tokens,
                    "tool_outcome": step.outcome,
                    "tool_calls": step.num_tool_calls,
                    "d_k": float(steps.step_divergence[at]) if is_valid and steps else None,
                    "w_k": float(steps.step_weights[at]) if is_valid and steps else None,
                    "reward": trajectory.reward,
                    "advantage": float(batch.group_advantages[index]),
                    "finish_reason": trajectory.finish_reason,
                    "policy_version": trajectory.policy_version,
                }
            )
    return rows


def _trajectory_rows(
    batch: TrainingBatch,
    micro_batches: list[MicroBatch],
    scores: list[TokenScores],
    steps: StepCredit | None,
    iteration: int,
    num_kept: int,
) -> list[dict]:
    """Whole trajectories for the report, spread over the batch: ids, steps, and what both models
    said about each of the student's tokens."""
    total = len(batch.trajectories)
    kept = [i * total // num_kept for i in range(num_kept)] if num_kept < total else range(total)
    students: dict[int, list[float]] = {index: [] for index in kept}
    ratios: dict[int, list[float]] = {index: [] for index in kept}
    for micro_batch, score in zip(micro_batches, scores, strict=True):
        student = score.student_logprobs.cpu()
        teacher = None if score.teacher_logprobs is None else score.teacher_logprobs.cpu()
        owners = micro_batch.trajectory_ids.cpu()
        for index in kept:
            mine = owners == index
            students[index] += student[mine].tolist()
            if teacher is not None:
                ratios[index] += (teacher - student)[mine].tolist()
    return [
        {
            "iteration": iteration,
            "trajectory": batch.trajectories[index].trajectory_id,
            "prompt_token_ids": batch.trajectories[index].prompt_token_ids,
            "response_token_ids": batch.trajectories[index].response_token_ids,
            "step_ids": batch.trajectories[index].step_ids,
            "log_ratios": [round(x, 4) for x in ratios[index]],
            "student_logprobs": [round(x, 4) for x in students[index]],
            "reward": batch.trajectories[index].reward,
            "finish_reason": batch.trajectories[index].finish_reason,
            "outcomes": [step.outcome for step in batch.trajectories[index].steps],
            **_step_values(steps, index),
        }
        for index in kept
    ]


def _step_values(steps: StepCredit | None, index: int) -> dict[str, list[float | None]]:
    if steps is None:
        return {"d": [], "w": []}
    valid = steps.valid[index].tolist()
    return {
        "d": _valid_values(steps.step_divergence[index], valid),
        "w": _valid_values(steps.step_weights[index], valid),
    }


def _valid_values(values: torch.Tensor, valid: list[bool]) -> list[float | None]:
    return [round(v, 5) if ok else None for v, ok in zip(values.tolist(), valid, strict=True)]


def _maxima(
    batch: TrainingBatch,
    micro_batches: list[MicroBatch],
    scores: list[TokenScores],
    credits: list[TokenCredit],
    importance_cap: float | None,
) -> dict[str, float]:
    """Largest values over rows; under "-NAME", the largest of -NAME."""
    columns = {
        "advantage": [c.advantages for c in credits],
        "group_advantage": [batch.group_advantages[m.trajectory_ids.cpu()] for m in micro_batches],
        "r": [  # the log-ratio teacher - student, nats
            s.teacher_logprobs - s.student_logprobs
            for s in scores
            if s.teacher_logprobs is not None
        ],
    }
    if importance_cap is not None:
        columns["importance"] = [c.importance for c in credits]
    maxima = {}
    for name, parts in columns.items():
        if any(part.numel() for part in parts):
            values = torch.cat(parts)
            maxima[name], maxima[f"-{name}"] = float(values.max()), float((-values).max())
    return maxima


def _counts(batch: TrainingBatch) -> dict[str, float]:
    counts = {"nonfinite_trajectories": float(batch.num_nonfinite)}
    if batch.is_taught is not None:
        counts["untaught_trajectories"] = float((~batch.is_taught).sum())
    return counts


def _sums(
    batch: TrainingBatch,
    micro_batches: list[MicroBatch],
    scores: list[TokenScores],
    credits: list[TokenCredit],
    importance_cap: float | None,
) -> dict[str, float]:
    """Sums over rows; divided by `rows` once all ranks are merged."""
    sums: dict[str, float] = {"rows": 0.0}

    def add(name: str, values: torch.Tensor | None) -> None:
        assert values is not None, f"{name} comes with a teacher"
        sums[name] = sums.get(name, 0.0) + float(values.double().sum())

    for micro_batch, score, credit in zip(micro_batches, scores, credits, strict=True):
        sums["rows"] += score.student_logprobs.numel()
        group_advantage = batch.group_advantages[micro_batch.trajectory_ids.cpu()]
        add("group_advantage", group_advantage)
        add("group_advantage_abs", group_advantage.abs())
        add("advantage", credit.advantages)
        add("student_entropy", score.student_entropy)
        sampled = micro_batch.rollout_logprobs.to(score.student_logprobs)
        add("engine_gap", (score.student_logprobs - sampled).abs())
        if importance_cap is not None:
            add("importance", credit.importance)
            add("importance_clipped", credit.importance > importance_cap * (1 - 1e-6))
        if score.teacher_logprobs is None:
            continue
        log_ratio = score.teacher_logprobs - score.student_logprobs
        add("teacher_entropy", score.teacher_entropy)
        add("teacher_mass", score.teacher_logprobs.exp())
        add("kl_k1", -log_ratio)
        add("log_ratio_squared", log_ratio.square())
        add("kl_k3", log_ratio.exp() - 1 - log_ratio)
        add("reverse_kl", score.reverse_kl)
        add("log_ratio_extreme", log_ratio.abs() > EXTREME_LOG_RATIO)
        add("opd_abs", (credit.distill_weights * credit.log_ratios).abs())
        add("log_ratio_clipped", (credit.log_ratios != log_ratio) & (credit.distill_weights > 0))
    return sums
