"""Stops an iteration before the optimizer when infrastructure, not the student, is failing."""

from __future__ import annotations

from megatron_sod.config.schema import WatchdogConfig
from megatron_sod.errors import RolloutError
from megatron_sod.types import Trajectory


def check_infrastructure(trajectories: list[Trajectory], watchdog: WatchdogConfig) -> None:
    """Raises RolloutError when too many trajectories were lost to infrastructure errors.

    Lost trajectories never train; this bound keeps what is left from being a biased sample.
    """
    lost = sum(not t.is_valid for t in trajectories)
    rate = lost / max(len(trajectories), 1)
    late = any(t.finish_reason == "time_limit" for t in trajectories)
    if rate > watchdog.max_infra_error_rate:
        raise RolloutError(
            f"{lost} of {len(trajectories)} trajectories ({rate:.0%}) were lost to infrastructure "
            f"errors, more than watchdog.max_infra_error_rate {watchdog.max_infra_error_rate:.0%}; "
            "nothing was trained on this iteration. Check the sandbox with tools/doctor.py"
            + (", raise rollout.trajectory_timeout_s" if late else "")
            + ", then start again: train.resume=auto continues from the last checkpoint"
        )
