"""One iteration, top to bottom. Read this first.

prompts -> rollout -> scoring -> step weights -> update -> weight transfer -> records
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace

import torch
import torch.distributed as dist

from megatron_sod.collapse import answer_alarms
from megatron_sod.config.schema import SodConfig
from megatron_sod.data.batch import build_training_batch
from megatron_sod.data.packing import alignment_of
from megatron_sod.held_out import evaluate_at_start, evaluate_if_due
from megatron_sod.journal import log, record
from megatron_sod.model.weights import export_hf
from megatron_sod.observe.live_view import TrainingView, training_view
from megatron_sod.observe.progress import say
from megatron_sod.observe.summary import finish_run
from megatron_sod.observe.telemetry import merge_telemetry
from megatron_sod.parallel.cpu import device
from megatron_sod.parallel.share import from_rank0
from megatron_sod.parallel.status import STATUS
from megatron_sod.rollout.breaker import check_infrastructure, check_sampling
from megatron_sod.rollout.shaping import shape_rewards
from megatron_sod.scoring.credit import assign_credit, distill_coef
from megatron_sod.scoring.score import score
from megatron_sod.scoring.screen import screen
from megatron_sod.session import Session, open_session
from megatron_sod.train.checkpoint_files import iteration_of
from megatron_sod.train.loss import EXACT_LOSSES
from megatron_sod.train.update import update
from megatron_sod.types import (
    MicroBatch,
    StepCredit,
    TokenCredit,
    TrainingBatch,
    Trajectory,
)


def train(config: SodConfig) -> None:
    """Run the whole job a configuration describes."""
    with open_session(config) as session:
        started = time.monotonic()
        total = config.train.num_iterations
        with training_view(config.name, total, start=session.progress.iteration) as session.view:
            session.view.phase("evaluation before training")
            _begin(session)
            while session.progress.iteration < total:
                metrics = run_iteration(session)
                session.view.update(session.progress.iteration, metrics)
                if _is_interrupted(session) and session.progress.iteration < total:
                    return _stop(session)
            session.view.phase("finished")
        _end(session, wall_s=time.monotonic() - started)


def run_iteration(session: Session) -> dict[str, float]:
    """One round of on-policy distillation; the metrics, complete on rank 0."""
    config, clock = session.config, _Clock(session.view)
    STATUS.iteration = iteration = session.progress.iteration + 1
    with clock("rollout"):
        session.residency.hold()
        trajectories = _roll_out(session, iteration)
    batch = _training_batch(session, trajectories)
    micro_batches = [m for mini in batch.mini_batches for m in mini.micro_batches]
    coef = distill_coef(config.distill, iteration)
    with clock("score"):
        scores = score(
            session.student.model,
            session.teacher if coef > 0 else None,
            micro_batches,
            temperature=config.rollout.temperature,
            keep_teacher_hidden=config.distill.loss in EXACT_LOSSES,
            teacher_micro_batches=_teacher_micro_batches(batch),
            hold=session.residency.hold,
        )
    credits: list[TokenCredit] = []
    steps: StepCredit | None = None
    if session.is_last_stage:
        batch, scores = screen(batch, scores)
        micro_batches = [m for mini in batch.mini_batches for m in mini.micro_batches]
        credits, steps = assign_credit(
            batch, micro_batches, scores, config, coef=coef, dp_group=session.groups.dp
        )
    with clock("train"):
        session.residency.hold("student", "optimizer")
        update_metrics = update(session, batch, credits, scores)
    with clock("rollout"):
        _finish_ahead(session)
    with clock("transfer"):
        update_metrics |= _transfer(session, session.progress.policy_version + 1)
    session.progress = replace(
        session.progress,
        iteration=iteration,
        policy_version=session.progress.policy_version + 1,
        num_prompts_drawn=session.progress.num_prompts_drawn + config.train.train_batch_size,
        num_optimizer_steps=session.progress.num_optimizer_steps + len(batch.mini_batches),
    )
    with clock("record"):
        metrics = record(session, trajectories, batch, micro_batches, scores, credits, steps)
    metrics |= update_metrics
    with clock("eval"):
        metrics |= evaluate_if_due(session)
    metrics |= merge_telemetry(session.telemetry.collect())
    metrics |= clock.seconds()
    # A checkpoint counts the iteration as done: its rows are on disk before, with what the save
    # before this one cost.
    log(session, metrics | {"time/save_s": session.last_save_s})
    session.last_save_s = _save_if_due(session)
    answer_alarms(session, metrics, _transfer)
    return metrics


def _is_interrupted(session: Session) -> bool:
    """Whether any rank was asked to stop. A collective.

    Raises:
        CheckpointError: the checkpoint being written failed on some rank.
    """
    flags = torch.tensor(
        [int(session.stop.is_asked()), int(session.checkpoints.has_failed)], device=device()
    )
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    if flags[1]:
        session.checkpoints.finish()
    return bool(flags[0])


def _stop(session: Session) -> None:
    """Leave a complete checkpoint of the last iteration, and say how to go on."""
    session.checkpoints.finish()
    latest = session.checkpoints.latest()
    if latest is None or iteration_of(latest) != session.progress.iteration:
        session.save()
        session.checkpoints.finish()
    session.stop.obeyed()
    say(
        f"stopped as asked after iteration {session.progress.iteration}, which is saved in "
        f"{session.checkpoints.latest()}; the same command goes on from there"
    )


def _begin(session: Session) -> None:
    """Put the student into the engines; evaluate student and teacher before training."""
    _transfer(session, session.progress.policy_version)
    if session.is_main:
        session.run_dir.drop_after(session.progress.iteration)
    if session.progress.iteration:
        say(f"resumed after iteration {session.progress.iteration}")
    if session.config.rollout.replay is not None:
        say(f"replaying the rollouts in {session.config.rollout.replay}: no engine, no evaluation")
        return
    evaluate_at_start(session)


def _end(session: Session, *, wall_s: float) -> None:
    """Export the student, write the report and the summary."""
    config = session.config
    STATUS.enter("end")
    session.checkpoints.finish()
    if config.train.export_hf:
        student = session.student
        session.residency.hold("student")
        export_hf(student.model, student.geometry, session.run_dir.hf, config.student.path)
    from_rank0(
        lambda: finish_run(session.run_dir, config, session.tokenizer, wall_s=wall_s),
        timeout_s=config.rollout.timeout_s,
    )


def _roll_out(session: Session, iteration: int) -> list[Trajectory]:
    """This iteration's graded trajectories, on every rank; with staleness the next rollout begins
    as soon as they are there."""
    config, num_trained = session.config, session.progress.num_prompts_drawn

    def work() -> list[Trajectory]:
        assert session.rollouts is not None, "rank 0 has rollouts"
        trajectories = session.rollouts.collect(iteration, num_trained)
        check_infrastructure(trajectories, config.watchdog)
        check_sampling(trajectories, config.rollout.temperature)
        if config.rollout.max_staleness and iteration < config.train.num_iterations:
            after = num_trained + config.train.train_batch_size
            session.rollouts.start_ahead(iteration + 1, after)
        return shape_rewards(
            trajectories,
            config.reward,
            max_response_length=config.rollout.max_response_length,
        )

    return from_rank0(work, timeout_s=config.rollout.timeout_s)


def _finish_ahead(session: Session) -> None:
    """Engines take new weights between rollouts, so one that runs ahead ends first."""

    def work() -> None:
        assert session.rollouts is not None, "rank 0 has rollouts"
        session.rollouts.finish_ahead()

    if session.config.rollout.max_staleness:
        from_rank0(work, timeout_s=session.config.rollout.timeout_s)


def _transfer(session: Session, policy_version: int) -> dict[str, float]:
    """The student's weights into the engines, proven; nothing in a replay."""
    if session.sync is None:
        return {}
    session.residency.hold("student")
    report = session.sync.transfer(policy_version)
    if session.is_main and report.canary_max_error is not None:
        session.run_dir.write_json("transfer.json", asdict(report))
    metrics = {"transfer/bytes": float(report.num_bytes), "transfer/wall_s": report.wall_s}
    if report.canary_max_error is not None:
        metrics["transfer/canary_max_error"] = report.canary_max_error
    return metrics


def _training_batch(session: Session, trajectories: list[Trajectory]) -> TrainingBatch:
    train, groups = session.config.train, session.groups
    models = (session.config.student, session.config.teacher)
    return build_training_batch(
        trajectories,
        num_mini_batches=train.train_batch_size // train.ppo_mini_batch_size,
        tokens_per_micro_batch=train.tokens_per_micro_batch,
        dp_rank=groups.dp.rank(),
        dp_size=groups.dp.size(),
        alignment=alignment_of(*(model.parallel for model in models if model is not None)),
        teacher_prompts=session.teacher_prompts,
    )


def _teacher_micro_batches(batch: TrainingBatch) -> list[MicroBatch] | None:
    """What a privileged teacher reads; None when it reads what the student does."""
    parts = [mini.teacher_micro_batches for mini in batch.mini_batches]
    return [m for part in parts if part is not None for m in part] or None


def _save_if_due(session: Session) -> float:
    """Begin a checkpoint; the seconds training waited for it."""
    train, progress, begin = session.config.train, session.progress, time.monotonic()
    STATUS.enter("save")
    is_due = progress.iteration % train.save_interval == 0
    if (
        is_due
        or progress.iteration == train.num_iterations
        or progress.best_iteration == progress.iteration
    ):
        session.save()
    return time.monotonic() - begin


class _Clock:
    """Wall seconds per phase, and the phase for those who watch."""

    def __init__(self, view: TrainingView) -> None:
        self._view = view
        self._started, self._phases = time.monotonic(), dict[str, float]()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._view.phase(phase)
        begin = time.monotonic()
        STATUS.enter(phase)
        yield
        key = f"time/{phase}_s"
        self._phases[key] = self._phases.get(key, 0.0) + time.monotonic() - begin

    def seconds(self) -> dict[str, float]:
        return {**self._phases, "time/total_s": time.monotonic() - self._started}
