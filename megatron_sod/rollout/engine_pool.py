"""Which engine serves which trajectory, and what happens when one is lost. Runs in a worker.

A trajectory keeps its engine, whose prefix cache holds its tokens. When the engine dies, the turn
is asked for again elsewhere: the prompt and the tokens so far are all an engine needs.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from typing import Protocol

from megatron_sod.errors import EngineLost
from megatron_sod.rollout.agent_loop import SampledTurn, Sampling
from megatron_sod.rollout.incidents import Incidents


class RemoteEngine(Protocol):
    """An engine somewhere."""

    async def generate(self, token_ids: list[int], sampling: Sampling) -> SampledTurn:
        """Raises EngineLost when the engine is dead."""
        ...


class EnginePool:
    """The engines a worker knows, with the number of trajectories each serves."""

    def __init__(
        self, engines: Sequence[RemoteEngine | None], incidents: Incidents, *, first: int = 0
    ):
        """
        Args:
            engines: None where one is dead; `replace` brings another.
            first: the engine to prefer among equally loaded ones, another one in each worker.
        """
        self._engines = list(engines)
        self._loads = [0] * len(engines)
        self._incidents, self._first = incidents, first
        self._replaced = asyncio.Event()

    @property
    def loads(self) -> list[int]:
        """Trajectories per engine."""
        return list(self._loads)

    def replace(self, index: int, engine: RemoteEngine) -> None:
        """A new engine in the place of a dead one."""
        self._engines[index] = engine
        self._replaced.set()

    @contextlib.contextmanager
    def lease(self) -> Iterator[EngineLease]:
        """An engine for one trajectory, the least loaded one; freed at the end."""
        lease = EngineLease(self)
        try:
            yield lease
        finally:
            lease.release()

    async def _take(self) -> int:
        """The least loaded living engine; waits when all are dead."""
        while True:
            alive = [i for i, engine in enumerate(self._engines) if engine is not None]
            if alive:
                size = len(self._engines)
                index = min(alive, key=lambda i: (self._loads[i], (i - self._first) % size))
                self._loads[index] += 1
                return index
            self._replaced.clear()
            await self._replaced.wait()

    def _lost(self, index: int, engine: RemoteEngine, error: EngineLost) -> None:
        self._incidents.count("turns_resubmitted")
        if self._engines[index] is engine:  # else it has been replaced meanwhile
            self._engines[index] = None
            self._incidents.note(f"engine {index} is lost: {error}")


class EngineLease:
    """One trajectory's hold on an engine."""

    def __init__(self, pool: EnginePool):
        self._pool = pool
        self._index: int | None = None

    async def generate(self, token_ids: list[int], sampling: Sampling) -> SampledTurn:
        """Sample one turn, on another engine when this one dies."""
        while True:
            if self._index is None:
                self._index = await self._pool._take()
            engine = self._pool._engines[self._index]
            if engine is not None:
                try:
                    return await engine.generate(token_ids, sampling)
                except EngineLost as error:
                    self._pool._lost(self._index, engine, error)
            self.release()

    def release(self) -> None:
        if self._index is not None:
            self._pool._loads[self._index] -= 1
            self._index = None
