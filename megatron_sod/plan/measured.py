"""Predictions against a run's metrics.jsonl: constants fitted to one run, the others predicted."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from megatron_sod.config.load import load_config
from megatron_sod.config.schema import SodConfig
from megatron_sod.errors import DataError
from megatron_sod.plan.hardware import HARDWARE, Hardware
from megatron_sod.plan.simulate import IterationTimes, simulate

PHASES = ("rollout", "score", "train", "transfer")
WARM_UP = 1  # first iterations, left out of the medians


@dataclass(frozen=True)
class MeasuredRun:
    """A finished run: its configuration with the rollouts' measured sizes, and median seconds."""

    config: SodConfig
    seconds: dict[str, float]
    num_iterations: int

    @property
    def shares(self) -> dict[str, float]:
        total = sum(self.seconds.values())
        return {phase: seconds / total for phase, seconds in self.seconds.items()}


def read_run(run_dir: str | Path) -> MeasuredRun:
    """
    Raises:
        DataError: the run has too few iterations.
    """
    folder = Path(run_dir)
    file = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    if len(rows) <= WARM_UP:
        raise DataError(
            f"{file}: {len(rows)} iteration(s); give a run directory with more than {WARM_UP}"
        )
    rows = rows[WARM_UP:]

    def middle(name: str) -> float:
        return median(row[name] for row in rows)

    config = load_config(folder / "config.yaml")
    response = middle("rollout/response_length")
    plan = config.plan.model_copy(
        update={
            "mean_response_share": response / config.rollout.max_response_length,
            "observation_share": 1 - middle("rollout/student_tokens") / response,
            "mean_turns": middle("rollout/num_turns"),
        }
    )
    seconds = {phase: middle(f"time/{phase}_s") for phase in PHASES}
    return MeasuredRun(config.model_copy(update={"plan": plan}), seconds, len(rows))


def calibrated(run: MeasuredRun) -> Hardware:
    """Constants with which the simulator gives `run`'s phase times.

    One number per phase is fitted: scoring and training rates, the transfer's fixed part, and a
    factor on the overheads of a decode step. The tools' latency and slots are the configuration's.

    Raises:
        DataError: no overhead is small enough, the assumed tools take longer than the run.
    """
    hardware = HARDWARE[run.config.cluster.gpu]
    for _ in range(3):  # prefill and decoding share a rate, so once round is not enough
        hardware = _fit_rates(run, hardware)
        hardware = _fit_decode(run, hardware)
    return hardware


def _predict(run: MeasuredRun, hardware: Hardware) -> IterationTimes:
    return simulate(run.config, hardware=hardware, num_iterations=4)


def _fit_rates(run: MeasuredRun, hardware: Hardware) -> Hardware:
    found, wanted = _predict(run, hardware), run.seconds
    transfer = wanted["transfer"] - (found.transfer_s - hardware.transfer_overhead_s)
    return replace(
        hardware,
        prefill_efficiency=hardware.prefill_efficiency * found.score_s / wanted["score"],
        train_efficiency=hardware.train_efficiency * found.train_s / wanted["train"],
        transfer_overhead_s=max(0.0, transfer),
    )


def _fit_decode(run: MeasuredRun, hardware: Hardware) -> Hardware:
    """By bisection: the rollout's length rises with the overheads of a decode step."""

    def slowed(factor: float) -> Hardware:
        return replace(
            hardware,
            decode_overhead_s=factor * table.decode_overhead_s,
            decode_sequence_s=factor * table.decode_sequence_s,
        )

    table = HARDWARE[hardware.name]
    free = _predict(run, slowed(0.0)).rollout_s
    if free > run.seconds["rollout"]:
        raise DataError(
            f"{run.config.name}: with these assumptions the tools alone take {free:.1f} s of a "
            f"rollout measured at {run.seconds['rollout']:.1f} s; lower plan.tool_latency_s or "
            "raise plan.tool_slots in the run's config.yaml"
        )
    low, high = 0.0, 64.0
    for _ in range(30):
        middle = (low + high) / 2
        found = _predict(run, slowed(middle))
        low, high = (middle, high) if found.rollout_s < run.seconds["rollout"] else (low, middle)
    return slowed((low + high) / 2)


def comparison(runs: list[MeasuredRun]) -> list[tuple[MeasuredRun, IterationTimes]]:
    """Each run beside its prediction, with constants fitted to the first run alone."""
    hardware = calibrated(runs[0])
    return [(run, _predict(run, hardware)) for run in runs]
