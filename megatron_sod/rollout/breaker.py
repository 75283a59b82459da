"""Stops an iteration before the optimizer when what was rolled out must not be trained on."""

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
