"""Where the time of an iteration goes: rollout, scoring, training, transfer; idle shares.

    colocated, staleness 0        rollout | score | train | transfer, all on the same GPUs
    disaggregated, staleness 0    the same order; each side idles while the other works
    disaggregated, staleness 1    the next rollout beside score and train, then the transfer

The rollout is simulated (`engines`), the rest follows from the drawn lengths (`estimate`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

from megatron_sod.config.schema import PlanConfig, SodConfig
from megatron_sod.plan.engines import EngineSpeed, RolloutResult, simulate_rollout
from megatron_sod.plan.estimate import PhaseTimes, phase_times
from megatron_sod.plan.hardware import Hardware
from megatron_sod.plan.job import Job, job_of
from megatron_sod.plan.trajectories import Limits, draw_trajectories

MAX_SIMULATED_ENGINES = 16  # of more, these stand for all


@dataclass(frozen=True)
class IterationTimes:
    """Means over the simulated iterations. Shares are of GPU time, over all GPUs."""

    num_gpus: int
    placement: str
    staleness: int
    rollout_s: float
    score_s: float
    train_s: float
    transfer_s: float
    step_s: float
    engine_idle_share: float  # of the rollout: engines with nothing to decode
    idle_share: float  # of all GPU time in a step
    tool_share: float  # of trajectories' time
    tokens: float  # of one iteration

    @property
    def phase_shares(self) -> dict[str, float]:
        """Of the phases' sum."""
        phases = {
            "rollout": self.rollout_s,
            "score": self.score_s,
            "train": self.train_s,
            "transfer": self.transfer_s,
        }
        total = sum(phases.values())
        return {name: seconds / total for name, seconds in phases.items()}

    @property
    def tokens_per_gpu_s(self) -> float:
        return self.tokens / (self.step_s * self.num_gpus)


def simulate(
    config: SodConfig,
    *,
    hardware: Hardware | None = None,
    num_iterations: int = 2,
    staleness: int | None = None,
) -> IterationTimes:
    """Simulated iterations of a configuration; the same numbers for the same seed.

    Args:
        hardware: replaces the table's constants, e.g. with measured ones.
        staleness: replaces rollout.max_staleness.
    """
    job = job_of(config)
    if hardware is not None:
        job = replace(job, hardware=hardware)
    staleness = config.rollout.max_staleness if staleness is None else staleness
    runs = [
        _iteration(job, config, staleness, seed=config.seed + number)
        for number in range(num_iterations)
    ]
    means = {
        name: sum(getattr(run, name) for run in runs) / len(runs)
        for name in IterationTimes.__dataclass_fields__
        if isinstance(getattr(runs[0], name), float)
    }
    return replace(runs[0], **means)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Rollout:
    """A simulated rollout, and what its trajectories weigh; sums over the simulated ones."""

    result: RolloutResult
    count: int
    tokens: int
    rows: int
    squares: int  # of trajectories' tokens


def _iteration(job: Job, config: SodConfig, staleness: int, *, seed: int) -> IterationTimes:
    rollout, num_engines = config.rollout, config.rollout.engine.num_engines
    simulated = min(num_engines, MAX_SIMULATED_ENGINES)
    slots, in_flight = config.plan.tool_slots, config.rollout.max_in_flight
    if slots is not None:
        slots = max(1, slots * simulated // num_engines)
    if in_flight is not None:
        in_flight = max(1, in_flight * simulated // num_engines)
    drawn = _rollout(
        EngineSpeed.of(job),
        config.plan,
        Limits(
            max(1, round(job.workload.prompt_tokens)),
            rollout.max_response_length,
            rollout.max_turns,
        ),
        math.ceil(job.workload.num_trajectories * simulated / num_engines),
        simulated,
        slots,
        in_flight,
        seed,
    )
    share = job.workload.num_trajectories / drawn.count
    phases = phase_times(
        job,
        tokens=share * drawn.tokens,
        rows=share * drawn.rows,
        context=drawn.squares / drawn.tokens,
    )
    return _composed(job, config, staleness, drawn.result, phases, share * drawn.tokens)


@lru_cache(maxsize=1024)  # a larger job's engines see the same as a smaller one's
def _rollout(
    speed: EngineSpeed,
    plan: PlanConfig,
    limits: Limits,
    count: int,
    num_engines: int,
    slots: int | None,
    in_flight: int | None,
    seed: int,
) -> _Rollout:
    draws = draw_trajectories(plan, limits, count=count, seed=seed)
    return _Rollout(
        result=simulate_rollout(
            draws, speed, num_engines=num_engines, tool_slots=slots, max_in_flight=in_flight
        ),
        count=count,
        tokens=sum(draw.tokens for draw in draws),
        rows=sum(draw.rows for draw in draws),
        squares=sum(draw.tokens**2 for draw in draws),
    )


def _composed(
    job: Job,
    config: SodConfig,
    staleness: int,
    rollout: RolloutResult,
    phases: PhaseTimes,
    tokens: float,
) -> IterationTimes:
    """Phases put beside or after one another, and who waits meanwhile."""
    placement, trainers = config.rollout.placement, job.world_size
    engine = config.rollout.engine
    engine_gpus = engine.num_engines * engine.tensor_parallel_size
    training = phases.score_s + phases.train_s
    overlaps = placement == "disaggregated" and staleness > 0
    longer = max(rollout.wall_s, training) if overlaps else rollout.wall_s + training
    step = longer + phases.transfer_s
    busy_rollout = rollout.wall_s * (1 - rollout.idle_share) * engine_gpus
    num_gpus = trainers + (engine_gpus if placement == "disaggregated" else 0)
    busy = busy_rollout + training * trainers + phases.transfer_s * num_gpus
    return IterationTimes(
        num_gpus=num_gpus,
        placement=placement,
        staleness=staleness,
        rollout_s=rollout.wall_s,
        score_s=phases.score_s,
        train_s=phases.train_s,
        transfer_s=phases.transfer_s,
        step_s=step,
        engine_idle_share=rollout.idle_share,
        idle_share=1 - busy / (step * num_gpus),
        tool_share=rollout.tool_share,
        tokens=tokens,
    )
