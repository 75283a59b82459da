"""Stops before what was rolled out is trained on, or measured, when it must not be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from megatron_sod.config.schema import WatchdogConfig
from megatron_sod.errors import RolloutError
from megatron_sod.types import Trajectory


def check_infrastructure(trajectories: list[Trajectory], watchdog: WatchdogConfig) -> None:
    """Raises RolloutError when too many trajectories were lost to infrastructure errors.

    Lost trajectories never train; this bound keeps what is left from being a biased sample.
    """
    check_losses(
        Counter(t.finish_reason for t in trajectories if not t.is_valid),
        len(trajectories),
        watchdog,
        meanwhile="nothing was trained on this iteration",
        resume="train.resume=auto continues from the last checkpoint",
    )


def check_losses(
    lost: Counter[str], total: int, watchdog: WatchdogConfig, *, meanwhile: str, resume: str
) -> None:
    """Raises RolloutError when more than watchdog.max_infra_error_rate of `total` were lost.

    Args:
        lost: how many were lost, by finish reason.
        meanwhile: what was, or was not, done with the rest; for the message.
        resume: how to go on once the cause is removed; for the message.
    """
    if (problem := outage(lost, total, watchdog)) is not None:
        raise RolloutError(f"{problem}; {meanwhile}. {remedy(lost)}, then start again: {resume}")


def outage(lost: Counter[str], total: int, watchdog: WatchdogConfig) -> str | None:
    """What is wrong when more than watchdog.max_infra_error_rate of `total` were lost, else
    None."""
    rate = lost.total() / max(total, 1)
    if rate <= watchdog.max_infra_error_rate:
        return None
    return (
        f"{lost.total()} of {total} trajectories ({rate:.0%}) were lost to infrastructure errors, "
        f"more than watchdog.max_infra_error_rate {watchdog.max_infra_error_rate:.0%}"
    )


def remedy(finish_reasons: Mapping[str, int]) -> str:
    """What to look at, from how many trajectories ended why."""
    late = finish_reasons.get("time_limit", 0)
    hint = ", raise rollout.trajectory_timeout_s" if late else ""
    return f"Check the sandbox with tools/doctor.py{hint}"


def check_sampling(trajectories: list[Trajectory], temperature: float, top_p: float = 1.0) -> None:
    """Raises RolloutError unless all were sampled at `temperature` and `top_p`.

    Logprobs of student and teacher are taken at the configured temperature; of tokens sampled at
    another, every ratio and divergence would be wrong and look right.
    """
    for t in trajectories:
        if (t.temperature, t.top_p) != (temperature, top_p):
            raise RolloutError(
                f"trajectory {t.trajectory_id}: sampled at temperature {t.temperature} and top_p "
                f"{t.top_p}, expected {temperature} and {top_p}; set rollout.temperature to what "
                "the recording or checkpoint was made with, or start with train.resume=never"
            )
