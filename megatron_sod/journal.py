"""What an iteration leaves behind: per-step rows, kept trajectories, and its metrics."""

from __future__ import annotations

from megatron_sod.observe.metrics import credit_metrics, rollout_metrics
from megatron_sod.observe.records import local_records, merge_records
from megatron_sod.observe.reference_names import with_reference_names
from megatron_sod.rollout.fidelity import render_mismatch_fraction
from megatron_sod.scoring.credit import distill_coef
from megatron_sod.session import Session
from megatron_sod.types import (
    MicroBatch,
    StepCredit,
    TokenCredit,
    TokenScores,
    TrainingBatch,
    Trajectory,
)


def record(
    session: Session,
    trajectories: list[Trajectory],
    batch: TrainingBatch,
    micro_batches: list[MicroBatch],
    scores: list[TokenScores],
    credits: list[TokenCredit],
    steps: StepCredit | None,
) -> dict[str, float]:
    """Write the rows of the iteration just trained on; its metrics on rank 0, {} elsewhere.

    A collective. `scores`, `credits` and `steps` are those of this rank's micro-batches.
    """
    local, rollout = None, session.config.rollout
    if session.makes_records:
        local = local_records(
            batch,
            micro_batches,
            scores,
            credits,
            steps,
            iteration=session.progress.iteration,
            num_trajectories_kept=session.config.observe.num_trajectories_kept,
            importance_cap=rollout.importance_cap if rollout.corrects_behaviour else None,
        )
    records = merge_records(local)
    if records is None:
        return {}
    session.run_dir.write_steps(session.progress.iteration, records.step_rows)
    for row in records.trajectory_rows:
        session.run_dir.append("trajectories.jsonl", row)
    assert session.rollouts is not None, "rank 0 has rollouts"
    measured = rollout_metrics(trajectories, num_text_ids=len(session.tokenizer))
    mismatch = render_mismatch_fraction(trajectories, session.tokenizer)
    measured["rollout/render_mismatch_fraction"] = mismatch
    if session.controller is not None:
        measured |= session.controller.sandbox_metrics()
    config, weight = session.config, session.config.distill.step_weight
    credited = credit_metrics(
        records,
        cap=1 + weight.delta if weight.policy in ("sod", "running_clip") else None,
        epsilon=weight.epsilon,
        grpo_coef=config.grpo.coef,
    )
    credited["sod/distill_coef"] = distill_coef(config.distill, session.progress.iteration)
    return measured | session.rollouts.metrics | credited


def log(session: Session, metrics: dict[str, float]) -> None:
    """One row to metrics.jsonl and to every logger, from rank 0: our names, then the
    reference's."""
    if session.is_main:
        progress, train = session.progress, session.config.train
        drawn_before = progress.num_prompts_drawn - train.train_batch_size
        seconds = metrics["time/total_s"] * session.config.cluster.world_size
        row = with_reference_names(
            {
                "iteration": progress.iteration,
                **metrics,
                **_incidents(session),
                "rollout/epoch": float(drawn_before // len(session.prompts)),
                "perf/throughput": metrics["rollout/total_tokens"] / seconds,
            }
        )
        session.run_dir.append("metrics.jsonl", row)
        for logger in session.loggers:
            logger.log(session.progress.iteration, row)


def _incidents(session: Session) -> dict[str, float]:
    """What was restarted, retried or given up since the row before, in evaluations and transfers
    too; nothing in a replay."""
    if session.controller is None:
        return {}
    counts = session.controller.take_counts()
    return {f"rollout/{name}": float(number) for name, number in counts.items()}
