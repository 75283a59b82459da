"""Named scalars of one iteration."""

from __future__ import annotations

from collections import Counter

import numpy as np

from megatron_sod.algorithm.advantages import zero_variance_fraction
from megatron_sod.observe.patterns import PATTERNS, pattern_of
from megatron_sod.observe.records import IterationRecords
from megatron_sod.types import Trajectory

ERROR_OUTCOMES = ("user_error", "timeout", "memory", "output_limit", "rejected", "malformed")


def rollout_metrics(
    trajectories: list[Trajectory], *, num_text_ids: int | None = None
) -> dict[str, float]:
    """What the rollouts say about themselves; infrastructure failures are counted, not averaged.

    Args:
        num_text_ids: ids from here on have no text; models pad their vocabulary beyond the
            tokenizer's, and a random one samples such ids now and then. None: not counted.
    """
    valid = [t for t in trajectories if t.is_valid]
    metrics = {
        **spread("rollout/reward", [t.reward for t in valid], mean="_mean"),
        **spread("rollout/score", [t.score for t in valid], mean="_mean"),
        **spread("rollout/tool_calls", [_num_calls(t) for t in valid], mean="_avg"),
        **spread("rollout/num_turns", [len(t.steps) for t in valid]),
        **spread("rollout/response_length", [len(t.response_token_ids) for t in valid]),
        **spread("rollout/prompt_length", [len(t.prompt_token_ids) for t in valid]),
        "rollout/student_tokens": _mean([sum(t.loss_mask) for t in valid]),
        "rollout/observation_tokens": _mean([t.loss_mask.count(False) for t in valid]),
        "rollout/infra_error_rate": 1 - len(valid) / max(len(trajectories), 1),
        "rollout/time_limit_rate": _mean([t.finish_reason == "time_limit" for t in trajectories]),
        "rollout/truncated_rate": _mean([t.finish_reason == "max_length" for t in valid]),
        "rollout/unanswered_call_rate": _mean(
            [t.finish_reason == "unanswered_call" for t in valid]
        ),
        "rollout/mixed_version_share": _mean([t.is_mixed_version for t in valid]),
        "rollout/zero_var_group_frac": zero_variance_fraction(
            [t.reward for t in trajectories],
            [t.prompt_id for t in trajectories],
            [t.is_valid for t in trajectories],
        ),
        "rollout/tokens": float(sum(len(t.response_token_ids) for t in trajectories)),
        "rollout/total_tokens": float(sum(t.num_tokens for t in trajectories)),
    }
    if num_text_ids is not None:
        without = sum(id >= num_text_ids for t in trajectories for id in t.response_token_ids)
        metrics["rollout/ids_without_text"] = float(without)
    return metrics | _tool_metrics(trajectories)


def _tool_metrics(trajectories: list[Trajectory]) -> dict[str, float]:
    """Outcomes as shares of the steps that called a tool, of valid trajectories; infrastructure
    errors, which end a trajectory, as their share of all such steps."""
    calling = [(t, step) for t in trajectories for step in t.steps if step.outcome != "none"]
    outcomes = Counter(step.outcome for t, step in calling if t.is_valid)
    num_infra = sum(step.outcome == "infra_error" for _, step in calling)
    num_valid = sum(t.is_valid for t in trajectories)
    metrics = {
        f"tool/{outcome}_rate": outcomes[outcome] / max(sum(outcomes.values()), 1)
        for outcome in ("ok", *ERROR_OUTCOMES)
    }
    return metrics | {
        "tool/calls": float(sum(step.num_tool_calls for t, step in calling if t.is_valid)),
        "tool/infra_error_rate": num_infra / max(len(calling), 1),
        "rollout/tool_success_avg": outcomes["ok"] / max(num_valid, 1),
    }


def credit_metrics(
    records: IterationRecords,
    *,
    cap: float | None = None,
    epsilon: float = 1e-6,
    grpo_coef: float = 1.0,
) -> dict[str, float]:
    """Divergences, step weights and token statistics over all ranks.

    Args:
        cap: 1 + delta where the policy caps w_k; None: it does not.
        epsilon: of the step weights, for the patterns.
        grpo_coef: scales the group advantage before it is compared with the distillation term.
    """
    rows = max(records.sums.get("rows", 0.0), 1.0)
    means = {name: value / rows for name, value in records.sums.items() if name != "rows"}
    metrics = {f"sod/{name}": value for name, value in records.counts.items()}
    metrics |= _advantage_metrics(means, grpo_coef)
    metrics |= {f"actor/{name}": value for name, value in means.items()}
    for name, value in records.maxima.items():
        sign, end = (-1, "min") if name.startswith("-") else (1, "max")
        name = name.removeprefix("-")
        metrics[f"{'sod' if name == 'r' else 'actor'}/{name}_{end}"] = sign * value
    if records.rank_tokens:
        metrics |= spread("rollout/rank_tokens", records.rank_tokens)
    scored = [row for row in records.step_rows if row["w_k"] is not None]
    if not scored:
        return metrics
    weights = np.array([row["w_k"] for row in scored])
    divergences = np.array([row["d_k"] for row in scored])
    trajectories = _by_trajectory(scored)
    numbers = np.array([row["step"] for row in scored])
    metrics |= {
        "sod/w_mean": float(weights.mean()),
        "sod/w_min": float(weights.min()),
        "sod/frac_w_below_0.2": float((weights < 0.2).mean()),
        "sod/frac_w_above_1": float((weights > 1.0).mean()),
        "sod/d_mean": float(divergences.mean()),
        "sod/d_1_mean": _mean([d[0] for d in trajectories]),
        "sod/n_steps": float(len(scored)),
    }
    if cap is not None:
        metrics["sod/cap_fraction"] = float((weights >= cap - 1e-6).mean())
    for percent in (5, 50, 95):
        metrics[f"sod/w_p{percent}"] = float(np.percentile(weights, percent))
    for number in range(1, min(int(numbers.max()), 8) + 1):
        at = numbers == number
        if at.any():
            metrics[f"sod/d_step_{number}"] = float(divergences[at].mean())
            metrics[f"sod/w_step_{number}"] = float(weights[at].mean())
    return metrics | _pattern_shares(trajectories, epsilon)


def _advantage_metrics(means: dict, grpo_coef: float) -> dict[str, float]:
    """How the two parts of the advantage compare; takes what it uses up out of `means`."""
    metrics = {}
    if "group_advantage_abs" in means:
        metrics["sod/grpo_abs_mean"] = grpo_coef * means.pop("group_advantage_abs")
    if "opd_abs" in means:
        metrics["sod/opd_abs_mean"] = means["opd_abs"]
        if metrics.get("sod/grpo_abs_mean"):
            metrics["sod/opd_to_grpo_ratio"] = means["opd_abs"] / metrics["sod/grpo_abs_mean"]
    if "log_ratio_squared" in means:
        variance = means.pop("log_ratio_squared") - means["kl_k1"] ** 2
        metrics["sod/r_std"] = max(variance, 0.0) ** 0.5
    if "log_ratio_extreme" in means:
        metrics["sod/frac_r_beyond_10"] = means.pop("log_ratio_extreme")
    if "log_ratio_clipped" in means:
        metrics["sod/r_clip_frac"] = means["log_ratio_clipped"]
    return metrics


def _pattern_shares(trajectories: list[list[float]], epsilon: float) -> dict[str, float]:
    """Share of trajectories of each pattern."""
    found = Counter(pattern_of(d, epsilon=epsilon) for d in trajectories)
    return {f"sod/pattern_{name}": found[name] / len(trajectories) for name in PATTERNS}


def _by_trajectory(scored: list[dict]) -> list[list[float]]:
    """The divergences of each trajectory, by step."""
    found: dict[str, list[float]] = {}
    for row in sorted(scored, key=lambda row: row["step"]):
        found.setdefault(row.get("trajectory", ""), []).append(row["d_k"])
    return list(found.values())


def _num_calls(trajectory: Trajectory) -> int:
    return sum(step.num_tool_calls for step in trajectory.steps)


def spread(name: str, values, *, mean: str = "") -> dict[str, float]:
    """{name + mean: the mean, name_max: ..., name_min: ...}; 0 without values."""
    return {
        f"{name}{mean}": _mean(values),
        f"{name}_max": float(max(values, default=0.0)),
        f"{name}_min": float(min(values, default=0.0)),
    }


def _mean(values) -> float:
    return float(np.mean(values)) if len(values) else 0.0
