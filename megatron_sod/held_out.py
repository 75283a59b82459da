"""Student and teacher on held-out tasks: before training, and whenever it is due."""

from __future__ import annotations

from dataclasses import replace

from megatron_sod.eval.runner import EvalResult, evaluate
from megatron_sod.observe.progress import say
from megatron_sod.observe.reference_names import validation_scalars
from megatron_sod.parallel.share import from_rank0
from megatron_sod.rollout.breaker import remedy
from megatron_sod.session import Session


def evaluate_at_start(session: Session) -> None:
    """The teacher once, and the student before its first iteration. A collective."""

    def work() -> None:
        if session.teacher_controller is not None:
            session.teacher_controller.wait_until_ready("teacher engines")
            _log(session, _evaluate(session, "teacher"))
            session.teacher_controller.close()
            session.teacher_controller = None
        if session.progress.iteration == 0 and session.eval_prompts:
            _log(session, _evaluate(session, "student"))

    from_rank0(work, timeout_s=session.config.rollout.timeout_s)


def evaluate_if_due(session: Session) -> dict[str, float]:
    """Evaluate the student on time, and remember whether it is the best so far; what the row of
    the iteration says about it, {} when it is not due. A collective."""
    train, iteration = session.config.train, session.progress.iteration
    due = train.eval_interval and iteration % train.eval_interval == 0
    due = due or iteration == train.num_iterations
    if not session.eval_prompts or not due or session.config.rollout.replay is not None:
        return {}
    session.residency.hold()
    result = from_rank0(
        lambda: _evaluate(session, "student"), timeout_s=session.config.rollout.timeout_s
    )
    best = session.progress.best_success
    if result.success is not None and (best is None or result.success > best):
        session.progress = replace(
            session.progress, best_success=result.success, best_iteration=iteration
        )
    return _scalars(result)


def _evaluate(session: Session, model: str) -> EvalResult:
    controller = session.teacher_controller if model == "teacher" else session.controller
    assert controller is not None
    result = evaluate(
        controller,
        session.eval_prompts,
        session.config,
        session.tokenizer,
        model=model,
        iteration=session.progress.iteration,
    )
    session.run_dir.append("evals.jsonl", result.as_dict())
    if result.success is None or result.interval is None:
        say(
            f"{result.model} after iteration {result.iteration}: not measured: {result.problem}; "
            f"training goes on. {remedy(result.finish_reasons)}"
        )
        return result
    (low, high), lost = result.interval, result.num_infra_errors
    session.view.evaluated(result.model, result.success, result.interval)
    say(
        f"{result.model} after iteration {result.iteration}: success {result.success:.1%} "
        f"[{low:.1%}, {high:.1%}] on {result.num_prompts} held-out tasks"
        + _by_source(result)
        + (f"; {lost} samples lost to infrastructure are left out" if lost else "")
    )
    return result


def _by_source(result: EvalResult) -> str:
    """ ": aime2024 20.8%, gpqa 22.2%"; nothing where there is one source."""
    if len(result.sources) < 2:
        return ""
    means = {name: n[f"avg@{n['num_samples']}"] for name, n in result.sources.items()}
    return ": " + ", ".join(
        f"{name} {'-' if mean is None else format(mean, '.1%')}" for name, mean in means.items()
    )


def _log(session: Session, result: EvalResult) -> None:
    """Before the first iteration, which no row of metrics.jsonl belongs to."""
    for logger in session.loggers:
        logger.log(result.iteration, _scalars(result))


def _scalars(result: EvalResult) -> dict[str, float]:
    """An evaluation under our names; the student's under the reference's as well. Of one that
    measured nothing, only what it lost."""
    lost = {f"eval/{result.model}_infra_error_rate": result.infra_error_rate}
    if result.success is None:
        return lost
    theirs = validation_scalars(result.sources) if result.model == "student" else {}
    return {
        **lost,
        f"eval/{result.model}_success": result.success,
        f"eval/{result.model}_tool_calls": result.tool_calls_per_trajectory,
        **theirs,
    }
