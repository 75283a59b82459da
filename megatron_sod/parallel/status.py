"""What this rank is doing right now, cheap enough to note at every micro-batch and collective.

One record per process. The main thread writes it; threads that wait for Ray beside it (a rollout
ahead, a weight transfer) only announce their silence. The watching thread (parallel/watch.py)
shares it with the other ranks.
"""

from __future__ import annotations

import functools
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Collective:
    """The last one this rank began."""

    name: str  # all_reduce
    group: str  # TENSOR_MODEL_PARALLEL_GROUP
    ranks: str  # "0,1": who takes part
    number: int  # how many this rank has begun in the group
    shape: tuple[int, ...] | None
    dtype: str


class Status:
    """This rank's record. Setting a field counts as a sign of progress."""

    def __init__(self) -> None:
        self.iteration = 0
        self.phase = "start"
        self.micro_batch: tuple[int, int] | None = None  # (number from 1, of how many)
        self.collective: Collective | None = None
        self.work: Any = None  # the pending collective's handle, where holding it costs nothing
        self.state = "running"  # running | failed | ended
        self._touched = time.monotonic()
        self._deadlines: list[float] = []  # of announced work, of any thread

    def touch(self) -> None:
        self._touched = time.monotonic()

    def fail(self) -> None:
        """This rank is about to end with an error of its own."""
        self.state = "failed"
        self.touch()

    def enter(self, phase: str) -> None:
        self.phase, self.micro_batch = phase, None
        self.touch()

    def at_micro_batch(self, number: int, total: int) -> None:
        self.micro_batch = (number, total)
        self.touch()

    def begin(self, collective: Collective, work: Any) -> None:
        self.collective, self.work = collective, work
        self.touch()

    @contextmanager
    def may_take(self, seconds: float) -> Iterator[None]:
        """Work that is silent for up to `seconds` and has a timeout of its own."""
        deadline = time.monotonic() + seconds
        self._deadlines.append(deadline)
        try:
            yield
        finally:
            self._deadlines.remove(deadline)
            self.touch()

    def snapshot(self) -> dict[str, Any]:
        """The record as plain values, `quiet_s` and `patience_s` relative to now."""
        now, collective = time.monotonic(), self.collective
        work, deadline = self.work, max(tuple(self._deadlines), default=now)
        return {
            "host": socket.gethostname(),
            "pid_space": _pid_space(),
            "pid": os.getpid(),
            "state": self.state,
            "iteration": self.iteration,
            "phase": self.phase,
            "micro_batch": self.micro_batch,
            "collective": None if collective is None else vars(collective),
            "in_collective": work is not None and not work.is_completed(),
            "quiet_s": now - self._touched,
            "patience_s": max(deadline - now, 0.0),
        }


@functools.cache
def _pid_space() -> str:
    """Ranks in containers of their own cannot see each other's process ids."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


STATUS = Status()
