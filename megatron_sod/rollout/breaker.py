"""Stops before what was rolled out is trained on, or measured, when it must not be."""

from __future__ import annotations

from collections import Counter

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
    rate = lost.total() / max(total, 1)
    if rate > watchdog.max_infra_error_rate:
        raise RolloutError(
            f"{lost.total()} of {total} trajectories ({rate:.0%}) were lost to infrastructure "
            f"errors, more than watchdog.max_infra_error_rate {watchdog.max_infra_error_rate:.0%}; "
            f"{meanwhile}. Check the sandbox with tools/doctor.py"
            + (", raise rollout.trajectory_timeout_s" if lost["time_limit"] else "")
            + f", then start again: {resume}"
        )


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
