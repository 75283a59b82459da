"""Evaluate a policy on held-out prompts through the same engine, agent loop and sandbox."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from megatron_sod.config.schema import SodConfig
from megatron_sod.eval.metrics import bootstrap_interval, mean, wilson_interval
from megatron_sod.eval.report import summarise_samples
from megatron_sod.eval.samples import sample_record
from megatron_sod.rollout.breaker import outage
from megatron_sod.types import Prompt, Trajectory

if TYPE_CHECKING:
    from megatron_sod.rollout.controller import RolloutController


@dataclass(frozen=True)
class EvalResult:
    """One evaluation; rates are fractions."""

    model: str  # student | teacher
    iteration: int
    success: float | None  # mean over prompts of the mean over their graded samples
    # 95 %, over prompts: Wilson's, or bootstrap of several samples
    interval: tuple[float, float] | None
    num_prompts: int
    num_samples: int  # graded trajectories
    num_infra_errors: int  # left out, counted here
    tool_calls_per_trajectory: float
    response_length: float  # tokens
    finish_reasons: dict[str, int]
    # {"aime2024": numbers, ...} of each data source, as tools/evaluate.py reports them
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    # Why nothing was measured: then there is neither success nor interval nor any source.
    problem: str | None = None

    def as_dict(self) -> dict:
        return asdict(self)

    @property
    def infra_error_rate(self) -> float:
        return self.num_infra_errors / max(self.num_samples + self.num_infra_errors, 1)


def evaluate(
    controller: RolloutController,
    prompts: list[Prompt],
    config: SodConfig,
    tokenizer: Any,
    *,
    model: str,
    iteration: int,
) -> EvalResult:
    """Sample and grade `eval.num_samples` trajectories of each prompt.

    When more than watchdog.max_infra_error_rate were lost, the rest is a biased sample (those that
    needed no tool, when the sandbox is down) and no measurement.
    """
    num_samples = config.eval.num_samples
    trajectories = controller.rollout(
        prompts,
        tag=f"eval-{model}-{iteration}",
        num_generations=num_samples,
        temperature=config.eval.temperature,
        top_p=config.eval.top_p,
    )
    result = summarise(trajectories, model=model, iteration=iteration, num_prompts=len(prompts))
    lost = Counter(t.finish_reason for t in trajectories if not t.is_valid)
    problem = outage(lost, len(trajectories), config.watchdog) or result.problem
    if problem is not None:
        return replace(result, success=None, interval=None, problem=problem)
    records = [
        sample_record(
            prompts[place // num_samples], t, tokenizer, seed=0, sample=place % num_samples
        )
        for place, t in enumerate(trajectories)
    ]
    return replace(result, sources=summarise_samples(records, num_samples=num_samples)["sources"])


def summarise(
    trajectories: list[Trajectory], *, model: str, iteration: int, num_prompts: int
) -> EvalResult:
    """The result of graded trajectories."""
    graded = [t for t in trajectories if t.is_valid]
    rewards: dict[str, list[float]] = defaultdict(list)
    for t in graded:
        rewards[t.prompt_id].append(max(0.0, min(1.0, t.reward)))
    success = [mean(values) for values in rewards.values()]
    is_independent = len(success) == len(graded)  # no two samples share a prompt's difficulty
    interval = (
        wilson_interval(sum(success), len(success))
        if is_independent
        else bootstrap_interval(success)
    )
    return EvalResult(
        model=model,
        iteration=iteration,
        success=mean(success) if graded else None,
        interval=interval if graded else None,
        num_prompts=num_prompts,
        num_samples=len(graded),
        num_infra_errors=len(trajectories) - len(graded),
        tool_calls_per_trajectory=mean([sum(s.num_tool_calls for s in t.steps) for t in graded]),
        response_length=mean([len(t.response_token_ids) for t in graded]),
        finish_reasons=dict(Counter(t.finish_reason for t in trajectories)),
        problem=None if graded else f"none of {len(trajectories)} trajectories was graded",
    )
