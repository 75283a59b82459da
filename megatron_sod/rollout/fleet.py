"""The actors of one model: engines and rollout workers, each replaced when it dies or hangs."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import ray

from megatron_sod.config.schema import ModelConfig, SodConfig
from megatron_sod.errors import RolloutError
from megatron_sod.observe.progress import say
from megatron_sod.rollout.engine import EngineWeights
from megatron_sod.rollout.engine_actor import RayEngine, engine_options, start_engine
from megatron_sod.rollout.pulse import Pulse
from megatron_sod.rollout.ray_instance import CALLS_AT_ONCE, ActorLost, get, log_folder
from megatron_sod.rollout.worker import RolloutWorker


class Fleet:
    """Starts the actors, watches them, replaces the dead and the silent."""

    def __init__(
        self,
        config: SodConfig,
        model: ModelConfig,
        *,
        load_weights: bool,
        vocab_size: int | None = None,
        machines: Sequence[str] = (),
    ):
        """As RolloutController."""
        self._config, self._machines = config, machines
        self._engine_options = engine_options(config, model, load_weights, vocab_size)
        rollout = config.rollout
        self.weights: EngineWeights | None = None  # what the engines hold; None: from disk
        self.counts: Counter[str] = Counter()
        # Of the least isolated worker: "L3", or "service"; known once the workers are ready.
        self.sandbox_level = ""
        self._num_restarts, self._is_closing = 0, False
        self._lifelines: dict[Any, tuple[str, int]] = {}
        self._joining: dict[Any, int] = {}
        self._arriving: dict[Any, int] = {}  # workers started again, level not known yet
        self._pulse = Pulse(
            self._sign_of_life,
            lambda reply: bool(ray.wait([reply], timeout=0)[0]),
            limit_s=rollout.silence_timeout_s,
            start_limit_s=rollout.engine.start_timeout_s,
        )
        self.engines = [self._new_engine(i) for i in range(rollout.engine.num_engines)]
        self.workers = [self._new_worker(i) for i in range(rollout.num_workers)]

    def wait_until_ready(self, what: str) -> None:
        """Block until every actor answers.

        Raises:
            RolloutError: one failed to start, or not within rollout.engine.start_timeout_s.
        """
        started = time.monotonic()
        replies = [actor.ready.remote() for actor in (*self.workers, *self.engines)]
        timeout_s = self._config.rollout.engine.start_timeout_s
        levels = get(replies, timeout_s, f"{what} start")[: len(self.workers)]
        self.sandbox_level = min(levels)
        say(
            f"{what}: {len(self.engines)} engine(s) ready after {time.monotonic() - started:.0f} s,"
            f" sandbox level {_by_level(levels)}"
        )

    def begin_rollout(self) -> None:
        """A new rollout, or transfer, has a new budget of restarts."""
        self._num_restarts = 0

    def take_counts(self) -> Counter[str]:
        """Restarts and hangs since they were last taken."""
        counts, self.counts = self.counts, Counter()
        return counts

    @property
    def events(self) -> list[Any]:
        """References that become ready when something has to be done; see `handle`."""
        return [*self._lifelines, *self._joining, *self._arriving]

    def handle(self, event: Any) -> None:
        """An actor died, or the one that replaces it is ready.

        Raises:
            RolloutError: more died than rollout.max_restarts; a worker's replacement isolates
                programs less than any worker did.
        """
        if self._is_closing:
            raise RolloutError("the run is ending; its rollout was given up")
        if event in self._joining:
            self._joined(event)
        elif event in self._arriving:
            self._arrived(event)
        elif event in self._lifelines:
            self._replace(self._lifelines[event], f"died ({_reason(event)})")

    def worker_failed(self, worker: Any) -> None:
        """A call to the worker found it dead, maybe before its lifeline did."""
        if worker in self.workers:
            post = ("worker", self.workers.index(worker))
            event = next(event for event, p in self._lifelines.items() if p == post)
            self.handle(event)

    def wait(self, calls: list[Any], timeout_s: float) -> Any | None:
        """The first of `calls` and `events` to become ready; None when nothing did for a moment.
        Actors that hang are replaced on the way.

        Raises:
            RolloutError: as `handle`.
        """
        for actor, silence_s in self._pulse.silent([*self.engines, *self.workers]):
            kind, index = self._post_of(actor)
            self.counts[f"{kind}_hangs"] += 1
            self._replace((kind, index), f"hangs: no sign of life for {silence_s:.0f} s")
        pause_s = min(timeout_s, self._pulse.interval_s)
        # Events first: nothing a new worker made is taken before its sandbox is known.
        ready, _ = ray.wait([*self.events, *calls], num_returns=1, timeout=pause_s)
        return ready[0] if ready else None

    def heal(self, patience_s: float = 0.0) -> bool:
        """Replace whatever died or hangs and wait until all engines serve. Whether there was
        anything to do; `patience_s` is for a death to become known."""
        is_healed, until = bool(self._joining), time.monotonic() + patience_s
        before = self._num_restarts
        while self._joining or self._pulse.is_anyone_silent or time.monotonic() < until:
            event = self.wait([], self._pulse.interval_s)
            if event is not None:
                self.handle(event)
        return is_healed or self._num_restarts > before

    def _post_of(self, actor: Any) -> tuple[str, int]:
        if actor in self.engines:
            return "engine", self.engines.index(actor)
        return "worker", self.workers.index(actor)

    def _sign_of_life(self, actor: Any) -> Any:
        """A call that the actor answers if it can; an engine that joins has one to answer."""
        joins = [event for event, i in self._joining.items() if self.engines[i] == actor]
        return joins[0] if joins else actor.ready.remote()

    def _replace(self, post: tuple[str, int], what: str) -> None:
        """Give the actor at its post up for what it did, and start another one."""
        kind, index = post
        self._lifelines = {event: p for event, p in self._lifelines.items() if p != post}
        self._restarted(kind, index, what)
        if kind == "worker":
            ray.kill(self.workers[index])
            self.workers[index] = self._new_worker(index)
            self._arriving = {event: i for event, i in self._arriving.items() if i != index}
            self._arriving[self.workers[index].ready.remote()] = index
            return
        self._joining = {event: i for event, i in self._joining.items() if i != index}
        ray.kill(self.engines[index])
        if self.weights is not None and not self.weights.is_kept:
            raise RolloutError(
                f"engine {index} {what}, and the weights the others hold are not kept for one that "
                "starts later: start the run again from its checkpoint; on one host, "
                "transfer.keep_sent true with the shared_memory backend keeps them for this case"
            )
        self.engines[index] = self._new_engine(index)
        self._joining[self.engines[index].join.remote(self.weights, index)] = index

    def _joined(self, event: Any) -> None:
        index = self._joining.pop(event)
        try:
            logprobs = get(event, 0, f"engine {index}, started again,")
        except RolloutError as error:
            self._replace(("engine", index), f"failed before it served ({error})")
            return
        self._check_weights(index, logprobs)
        say(f"engine {index} serves again")
        for worker in self.workers:
            worker.replace_engine.remote(index, RayEngine(self.engines[index]))

    def _arrived(self, event: Any) -> None:
        index = self._arriving.pop(event)
        with contextlib.suppress(ActorLost):  # its lifeline tells, and it is replaced
            level = get(event, 0, f"worker {index}, started again,")
            if level < self.sandbox_level:
                raise RolloutError(
                    f"worker {index}, started again, isolates programs at level {level}, the "
                    f"weakest before at {self.sandbox_level}; start Ray only on machines that "
                    "reach it, or set sandbox.level to the level every machine reaches"
                )

    def _check_weights(self, index: int, logprobs: list[list[float]]) -> None:
        expected = self.weights.canary_logprobs if self.weights else []
        tolerance = self._config.transfer.tolerance(self._config.student.dtype)
        for row, reference in zip(logprobs, expected, strict=True):
            error = max(abs(a - b) for a, b in zip(row, reference, strict=True))
            if not error <= tolerance:
                raise RolloutError(
                    f"engine {index}, started again, differs from the weights the others hold by "
                    f"{error:.3g} nats on canary prompts, tolerance {tolerance:.3g}; nothing was "
                    "trained on it"
                )

    def _restarted(self, kind: str, index: int, what: str) -> None:
        self._num_restarts += 1
        self.counts[f"{kind}_restarts"] += 1
        allowed = self._config.rollout.max_restarts
        if self._num_restarts > allowed:
            raise RolloutError(
                f"{kind} {index} {what}, the {self._num_restarts}th process of this rollout that "
                f"is lost; rollout.max_restarts allows {allowed}. Nothing was trained on this "
                f"iteration. See the logs under {log_folder()}. Processes die for want of memory "
                "as a rule: lower rollout.engine.kv_cache_gb, gpu_memory_utilization or "
                "max_num_seqs. Those that only seem to hang need a higher rollout.silence_timeout_s"
            )
        say(f"{kind} {index} {what}; starting it again")

    def _new_engine(self, index: int) -> Any:
        actor = start_engine(self._config, self._engine_options, index, self._machines)
        self._lifelines[actor.lifeline.remote()] = ("engine", index)
        return actor

    def _new_worker(self, index: int) -> Any:
        # One that joins may not have the weights yet; the worker hears of it when it has.
        joining = self._joining.values()
        engines = [None if i in joining else RayEngine(e) for i, e in enumerate(self.engines)]
        actor = ray.remote(  # type: ignore[call-overload]
            num_cpus=0, max_concurrency=CALLS_AT_ONCE
        )(RolloutWorker).remote(self._config, engines, index)
        self._lifelines[actor.lifeline.remote()] = ("worker", index)
        return actor

    def close(self) -> None:
        """End every actor and its processes."""
        self._is_closing = True  # a rollout that runs ahead must not replace what ends here
        for actor, patience_s in [(a, 10) for a in self.workers] + [(a, 20) for a in self.engines]:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(actor.close.remote(), timeout=patience_s)
        for actor in (*self.workers, *self.engines):
            ray.kill(actor)


def _by_level(levels: list[str]) -> str:
    """ "L3", or "L1 (worker 1), L3 (worker 0, 2)", the weakest first."""
    if len(set(levels)) == 1:
        return levels[0]
    numbers = {name: [str(i) for i, n in enumerate(levels) if n == name] for name in levels}
    return ", ".join(f"{name} (worker {', '.join(numbers[name])})" for name in sorted(numbers))


def _reason(event: Any) -> str:
    try:
        ray.get(event, timeout=0)
    except ray.exceptions.RayTaskError as error:
        return repr(error.cause)
    except ray.exceptions.RayError as error:
        return str(error).strip().splitlines()[0]
    return "it returned"
