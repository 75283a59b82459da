"""Notices actors that live and answer nothing: stopped, deadlocked, waiting for a lost device.

Each is asked for a sign of life, an engine's from inside the loop that samples. It answers between
two forward passes however many sequences it serves, so the silence of a slow engine is that of one
pass. Pure; what asks and how an answer is seen is the caller's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

_INTERVAL_S = 2.0
_LOOKS_PER_LIMIT = 4  # so that a short limit is kept as well


@dataclass
class _Call:
    reply: Any
    is_first: bool  # before its first answer an actor is starting
    silence_s: float = 0.0


class Pulse:
    """One open call per actor, and how long it has not been answered."""

    def __init__(
        self,
        ask: Callable[[Any], Any],
        has_answered: Callable[[Any], bool],
        *,
        limit_s: float,
        start_limit_s: float,
        clock: Callable[[], float] = time.monotonic,
    ):
        """
        Args:
            ask: calls an actor; returns the pending reply at once.
            has_answered: whether a reply has come; an error is one too.
            limit_s: of silence; above the longest forward pass.
            start_limit_s: until the first answer.
        """
        self._ask, self._has_answered, self._clock = ask, has_answered, clock
        self._limit_s, self._start_limit_s = limit_s, start_limit_s
        self.interval_s = min(_INTERVAL_S, limit_s / _LOOKS_PER_LIMIT)
        self._calls: dict[Any, _Call] = {}
        self._looked_at = -float("inf")

    @property
    def is_anyone_silent(self) -> bool:
        """Whether an actor had not answered yet when it was last looked at."""
        return any(call.silence_s > 0 for call in self._calls.values())

    def silent(self, actors: Iterable[Any]) -> list[tuple[Any, float]]:
        """Actors silent for longer than the limit, with the seconds; to be called again and again.

        Only time in which somebody looked counts: after a pause of the caller (training, a
        debugger, a machine that was frozen as a whole) everybody gets the time to answer.
        """
        now = self._clock()
        elapsed_s = now - self._looked_at
        if elapsed_s < self.interval_s:
            return []
        self._looked_at = now
        known, self._calls = self._calls, {}
        for actor in actors:
            call = known.get(actor)
            if call is None or self._has_answered(call.reply):
                call = _Call(self._ask(actor), is_first=call is None)
            else:
                call.silence_s += min(elapsed_s, 2 * self.interval_s)
            self._calls[actor] = call
        return [(a, c.silence_s) for a, c in self._calls.items() if c.silence_s > self._limit(c)]

    def _limit(self, call: _Call) -> float:
        return self._start_limit_s if call.is_first else self._limit_s
