"""Notices that training is collapsing, from the metrics of the iterations so far.

The failure people report: tool calls per trajectory fall from 3.7 to 0.5 within twenty iterations,
while every single iteration looks like training. Each signal compares the newest value with where
the run started, with its recent median, or with a fixed bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Literal

from megatron_sod.config.schema import WatchdogConfig

_RECENT = 20  # iterations the median of a "recent" reference is taken over


@dataclass(frozen=True)
class Signal:
    """One thing to watch; `key` is the bound in WatchdogConfig, None there switches it off."""

    key: str
    metric: str
    what: str
    side: Literal["below", "above"]
    reference: Literal["start", "recent", "fixed"]


SIGNALS = (
    Signal(
        "min_tool_calls_share",
        "rollout/tool_calls_avg",
        "tool calls per trajectory",
        "below",
        "start",
    ),
    Signal("warn_infra_error_rate", "rollout/infra_error_rate", "infra errors", "above", "fixed"),
    Signal("max_malformed_rate", "tool/malformed_rate", "malformed tool calls", "above", "fixed"),
    Signal(
        "min_response_length_share", "rollout/student_tokens", "response length", "below", "start"
    ),
    Signal(
        "max_response_length_share", "rollout/student_tokens", "response length", "above", "start"
    ),
    Signal("min_entropy_share", "actor/student_entropy", "student entropy", "below", "start"),
    Signal("max_grad_norm_ratio", "actor/grad_norm", "gradient norm", "above", "recent"),
    Signal(
        "max_steps_skipped",
        "actor/steps_skipped",
        "optimizer steps left out for a gradient that is not finite",
        "above",
        "fixed",
    ),
    Signal("min_step_weight", "sod/w_mean", "mean step weight w_k", "below", "fixed"),
    Signal(
        "max_extreme_ratio_share",
        "sod/frac_r_beyond_10",
        "share of log-ratios beyond 10 nats",
        "above",
        "fixed",
    ),
    Signal("max_divergence_share", "sod/d_mean", "mean step divergence d_k", "above", "start"),
    Signal(
        "min_teacher_mass_share",
        "actor/teacher_mass",
        "teacher probability of the student's tokens",
        "below",
        "start",
    ),
)


@dataclass(frozen=True)
class Alarm:
    """A signal that has been out of bounds for `patience` iterations."""

    signal: Signal
    since: int  # first iteration out of bounds
    iteration: int
    value: float
    bound: float

    def __str__(self) -> str:
        against = {
            "start": "the run's first iterations",
            "recent": "the recent median",
            "fixed": "a fixed bound",
        }[self.signal.reference]
        return (
            f"{self.signal.what} {self.value:.3g} is {self.signal.side} {self.bound:.3g} since "
            f"iteration {self.since} (watchdog.{self.signal.key}, against {against})"
        )


class Watchdog:
    """Feed it one row of metrics per iteration; it answers with the alarms that hold."""

    def __init__(
        self,
        config: WatchdogConfig,
        history: Iterable[Mapping[str, float]] = (),
        answered: Iterable[tuple[str, int]] = (),
    ):
        """
        Args:
            history: rows of metrics.jsonl of a run that is resumed, oldest first.
            answered: (signal's key, since) of alarms that are no news.
        """
        self._config = config
        self._rows = list(history)
        self._answered = set(answered)

    def check(self, row: Mapping[str, float]) -> list[Alarm]:
        """Alarms that hold at this iteration; a signal without its metric is silent.

        Args:
            row: `iteration` and named scalars.
        """
        self._rows.append(row)
        alarms = (self._alarm(signal) for signal in SIGNALS)
        return [alarm for alarm in alarms if alarm is not None]

    def news(self, row: Mapping[str, float]) -> list[Alarm]:
        """Alarms that hold at this iteration and were not among the news before."""
        alarms = self.check(row)
        new = [a for a in alarms if (a.signal.key, a.since) not in self._answered]
        self._answered |= {(a.signal.key, a.since) for a in new}
        return new

    def forget_after(self, iteration: int) -> None:
        """After a rollback: the iterations past `iteration` have not happened."""
        self._rows = [row for row in self._rows if row["iteration"] <= iteration]
        self._answered = {(key, since) for key, since in self._answered if since <= iteration}

    def _alarm(self, signal: Signal) -> Alarm | None:
        limit = getattr(self._config, signal.key)
        if limit is None:
            return None
        last: Alarm | None = None
        streak = 0
        for iteration, value, bound in self._bounded(signal, limit):
            # written so that NaN is outside
            outside = not (value >= bound if signal.side == "below" else value <= bound)
            streak = streak + 1 if outside else 0
            since = last.since if last is not None and streak > 1 else iteration
            last = Alarm(signal, since, iteration, value, bound) if outside else None
        return last if streak >= self._config.patience else None

    def _bounded(self, signal: Signal, limit: float) -> Iterator[tuple[int, float, float]]:
        """(iteration, value, bound) of each iteration that has a reference."""
        seen: list[float] = []
        for row in self._rows:
            value = row.get(signal.metric)
            if value is None:
                continue
            reference: float | None = 1.0
            if signal.reference == "start":
                first = seen[: self._config.baseline_iterations]
                reference = (
                    median(first) if len(first) == self._config.baseline_iterations else None
                )
            elif signal.reference == "recent":
                reference = median(seen[-_RECENT:]) if len(seen) >= _RECENT // 4 else None
            if reference is not None:
                yield int(row["iteration"]), value, limit * reference
            if math.isfinite(value):
                seen.append(value)
