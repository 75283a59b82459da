"""Student and teacher on held-out tasks: before training, and whenever it is due."""

from __future__ import annotations

from dataclasses import replace

from megatron_sod.eval.runner import EvalResult, evaluate
from megatron_sod.observe.loggers import evaluation_scalars
from megatron_sod.observe.progress import say
from megatron_sod.parallel.share import from_rank0
from megatron_sod.session import Session


def evaluate_at_start(session: Session) -> None:
    """The teacher once, and the student before its first iteration. A collective."""

    def work() -> None:
        if session.teacher_controller is not None:
            session.teacher_controller.wait_until_ready("teacher engines")
            _note(session, _evaluate(session, "teacher"))
            session.teacher_controller.close()
            session.teacher_controller = None
        if session.progress.iteration == 0 and session.eval_prompts:
            _note(session, _evaluate(session, "student"))

    from_rank0(work, timeout_s=session.config.rollout.timeout_s)


def evaluate_if_due(session: Session) -> None:
    """Evaluate the student on time, and remember whether it is the best so far. A
    collective."""
    train, iteration = session.config.train, session.progress.iteration
    due = train.eval_interval and iteration % train.eval_interval == 0
    due = due or iteration == train.num_iterations
    if not session.eval_prompts or not due or session.config.rollout.replay is not None:
        return
    session.residency.hold()

    def work() -> float:
        result = _evaluate(session, "student")
        _note(session, result)
        return result.success

    success = from_rank0(work, timeout_s=session.config.rollout.timeout_s)
    best = session.progress.best_success
    if best is None or success > best:
        session.progress = replace(session.progress, best_success=success, best_iteration=iteration)


def _evaluate(session: Session, model: str) -> EvalResult:
    controller = session.teacher_controller if model == "teacher" else session.controller
    assert controller is not None
    return evaluate(
        controller,
        session.eval_prompts,
        session.config,
        model=model,
        iteration=session.progress.iteration,
    )


def _note(session: Session, result: EvalResult) -> None:
    session.run_dir.append("evals.jsonl", result.as_dict())
    for logger in session.loggers:
        logger.log(result.iteration, evaluation_scalars(result.as_dict()))
    low, high = result.interval
    session.view.evaluated(result.model, result.success, result.interval)
    say(
        f"{result.model} after iteration {result.iteration}: success {result.success:.1%} "
        f"[{low:.1%}, {high:.1%}] on {result.num_prompts} held-out tasks"
    )
