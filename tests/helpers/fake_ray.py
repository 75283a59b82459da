"""Actors without processes: they answer at once, or never, or are dead, as a test says.

Stands in for the `ray` module inside megatron_sod.rollout.fleet; time is the test's own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import ray

from megatron_sod.rollout.ray_instance import ActorLost


@dataclass(eq=False)
class FakeActor:
    kind: str  # Engine, RolloutWorker
    arguments: tuple
    state: str = "serving"  # starting | serving | silent | dead
    level: str = "L3"  # of a worker's sandbox
    join_error: Exception | None = None
    join_result: list = field(default_factory=list)
    group_result: Any = None
    calls: list[tuple[str, tuple]] = field(default_factory=list)

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Method(self, name)


@dataclass
class _Method:
    actor: FakeActor
    name: str

    def remote(self, *arguments):
        self.actor.calls.append((self.name, arguments))
        return Reply(self.actor, self.name)


@dataclass(eq=False)
class Reply:
    actor: FakeActor
    name: str

    @property
    def is_ready(self) -> bool:
        if self.actor.state == "serving":
            return self.name != "lifeline"
        return self.actor.state == "dead"


class FakeRay:
    """What the fleet uses of Ray."""

    exceptions = ray.exceptions

    def __init__(self):
        self.now, self.actors = 0.0, list[FakeActor]()
        self.on_start = lambda actor: None  # the test's chance to make a new actor ill

    def remote(self, **options):
        return lambda kind: _Class(self, kind.__name__)

    def wait(self, replies: list[Reply], *, timeout: float, num_returns: int = 1):
        ready = [reply for reply in replies if reply.is_ready]
        if not ready:
            self.now += timeout
        return ready[:num_returns], [reply for reply in replies if reply not in ready]

    def get(self, reply: Reply | list[Reply], timeout: float = 0, what: str = "") -> Any:
        if isinstance(reply, list):
            return [self.get(each) for each in reply]
        if reply.actor.state == "dead":
            raise self.exceptions.RayActorError()
        if reply.name == "join" and reply.actor.join_error is not None:
            raise reply.actor.join_error
        if reply.actor.kind == "RolloutWorker":
            return reply.actor.group_result if reply.name == "run_group" else reply.actor.level
        return reply.actor.join_result

    def answers(self, replies: Reply | list[Reply], timeout_s: float, what: str) -> Any:
        """As ray_instance.get."""
        try:
            return self.get(replies)
        except self.exceptions.RayActorError as error:
            raise ActorLost(what) from error

    def kill(self, actor: FakeActor) -> None:
        actor.state = "dead"


@dataclass
class _Class:
    ray: FakeRay
    kind: str

    def remote(self, *arguments) -> FakeActor:
        actor = FakeActor(self.kind, arguments)
        self.ray.actors.append(actor)
        self.ray.on_start(actor)
        return actor
