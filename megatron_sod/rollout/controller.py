"""The driver's side of rollouts, on rank 0: hands groups to workers and keeps the accounts."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ray

from megatron_sod.config.schema import ModelConfig, SodConfig
from megatron_sod.errors import RolloutError
from megatron_sod.observe.progress import say
from megatron_sod.reshard.layouts import EngineLayout
from megatron_sod.reshard.sync import EngineControl
from megatron_sod.rollout.engine import EngineWeights
from megatron_sod.rollout.fleet import Fleet
from megatron_sod.rollout.groups import GroupBoard, GroupRequest, RolloutResult
from megatron_sod.rollout.ray_instance import ActorLost, get, start_ray
from megatron_sod.rollout.worker import GroupSampling
from megatron_sod.types import Prompt, Trajectory

_TRANSFER_GRACE_S = 30
_CONTROL_TIMEOUT_S = 60
_DEATH_NOTICE_S = 5.0  # a call may fail a moment before the death is known


class RolloutController:
    """Rollouts with one model. One rollout, evaluation or weight transfer at a time."""

    def __init__(
        self,
        config: SodConfig,
        model: ModelConfig,
        *,
        load_weights: bool,
        vocab_size: int | None = None,
        machines: Sequence[str] = (),
        counts: Counter[str] | None = None,
    ):
        """Begins to start everything and returns; `wait_until_ready` blocks.

        Args:
            model: student or teacher.
            load_weights: False leaves random weights, for engines that get theirs by transfer.
            vocab_size: ids the engines know, so that no other is sampled; None: the model's own.
                Needs `load_weights` False.
            machines: the host of each machine of the job; none: all engines are on this one.
            counts: where incidents are counted, another controller's; None: one of its own.
        """
        start_ray()
        self._config = config
        self.fleet = Fleet(
            config, model, load_weights=load_weights, vocab_size=vocab_size, machines=machines
        )
        self._vocab_size, self._is_ready = vocab_size, False
        self.counts: Counter[str] = Counter() if counts is None else counts
        rollout = config.rollout
        self._max_in_flight = rollout.max_in_flight or (
            2 * rollout.engine.max_num_seqs * rollout.engine.num_engines
        )

    def wait_until_ready(self, what: str) -> None:
        """As Fleet.wait_until_ready; a second call returns at once."""
        if not self._is_ready:
            self.fleet.wait_until_ready(what)
            self._is_ready = True

    def sandbox_metrics(self) -> dict[str, float]:
        """The isolation level as a number, 3 for L3; nothing for a SandboxFusion service."""
        level = self.fleet.sandbox_level
        return {"sandbox/level": float(level[1:])} if level[:1] == "L" else {}

    def take_counts(self) -> Counter[str]:
        """Incidents since they were last taken, of rollouts, evaluations and transfers alike."""
        self.counts.update(self.fleet.take_counts())
        taken = Counter(self.counts)
        self.counts.clear()
        return taken

    def rollout(
        self,
        prompts: list[Prompt],
        *,
        tag: str,
        num_generations: int,
        temperature: float,
        top_p: float,
    ) -> list[Trajectory]:
        """`num_generations` graded trajectories of each prompt, in prompt order."""
        groups = [GroupRequest(prompt, tag, num_generations) for prompt in prompts]
        sampling = GroupSampling(temperature, top_p, self._config.seed)
        return self.run(groups, sampling, what=f"rollout {tag}").trajectories

    def run(
        self,
        groups: Sequence[GroupRequest],
        sampling: GroupSampling,
        *,
        what: str,
        num_needed: int | None = None,
    ) -> RolloutResult:
        """Run groups until all, or `num_needed` of them, are complete; see `take_counts` for what
        happened on the way.

        Raises:
            RolloutError: not within rollout.timeout_s; more than rollout.max_restarts processes
                died or hung; a worker failed.
        """
        started = time.monotonic()
        deadline = started + self._config.rollout.timeout_s
        board = GroupBoard(groups, max_in_flight=self._max_in_flight, num_needed=num_needed)
        self.fleet.begin_rollout()
        running: dict[Any, tuple[int, Any]] = {}
        is_stopping = False
        while True:
            while (index := board.start_next()) is not None:
                worker = self._idlest_worker(running)
                running[worker.run_group.remote(board.group(index), sampling)] = (index, worker)
            if not running:
                break
            if board.is_enough and not is_stopping:
                is_stopping = True
                self._set_stopping(True)
            self._wait(running, board, deadline, what)
        if is_stopping:
            self._set_stopping(False)
        board.counts += self.fleet.take_counts()
        _tell(what, board)
        # Not part of the result, which may be an evaluation's, or be discarded.
        self.counts.update(board.counts)
        return replace(board.result(), wall_s=time.monotonic() - started)

    def _wait(
        self, running: dict[Any, tuple[int, Any]], board: GroupBoard, deadline: float, what: str
    ) -> None:
        """Until something happens, or for a moment; what happened is dealt with."""
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise RolloutError(
                f"{what}: {board.num_running} groups unfinished after rollout.timeout_s "
                f"{self._config.rollout.timeout_s:.0f} s; raise it, lower max_response_length, or "
                "set rollout.trajectory_timeout_s so that single trajectories cannot hold it up"
            )
        event = self.fleet.wait(list(running), left_s)
        if event is None:
            return
        if event not in running:
            self.fleet.handle(event)
            return
        index, worker = running.pop(event)
        try:
            board.finish(index, get(event, _CONTROL_TIMEOUT_S, what))
        except ActorLost:
            board.requeue(index)
            self.fleet.worker_failed(worker)

    def _idlest_worker(self, running: dict[Any, tuple[int, Any]]) -> Any:
        busy = [worker for _, worker in running.values()]
        return min(self.fleet.workers, key=lambda w: sum(b is w for b in busy))

    def _set_stopping(self, is_stopping: bool) -> None:
        """Let trajectories stop at their next token, or again run to their end."""
        calls = [w.set_stopping.remote(is_stopping) for w in self.fleet.workers]
        ray.wait(calls, num_returns=len(calls), timeout=_CONTROL_TIMEOUT_S)
        calls = [e.set_interrupting.remote(is_stopping) for e in self.fleet.engines]
        ray.wait(calls, num_returns=len(calls), timeout=_CONTROL_TIMEOUT_S)

    def engine_control(self) -> EngineControl:
        """What a weight transfer asks of the engines. Each call reaches every engine; one that
        died is replaced first."""

        def connect(info: dict) -> None:
            self._ask("weight transfer set-up", lambda i, e: e.connect_weights.remote(info, i))
            self.fleet.weights = EngineWeights(info)

        def update(info: dict, version: int) -> None:
            assert self.fleet.weights is not None, "connect before update"
            self.fleet.heal()  # one that still joins would get two transfers at once
            connect_info = self.fleet.weights.connect_info
            # An engine started from now on reads the new weights.
            self.fleet.weights = EngineWeights(connect_info, info, version)
            pause = self._config.transfer.pause
            self._ask(
                f"weight transfer {version}",
                lambda _, e: e.update_weights.remote(info, version, pause),
            )

        def score(canaries: list[list[int]]) -> list[list[list[float]]]:
            rows = [
                self._ask("canary scoring", lambda _, e, ids=ids: e.score.remote(ids))
                for ids in canaries
            ]
            by_engine = [list(engine) for engine in zip(*rows, strict=True)]
            assert self.fleet.weights is not None, "update before scoring"
            self.fleet.weights = replace(
                self.fleet.weights, canaries=canaries, canary_logprobs=by_engine[0]
            )
            return by_engine

        def hosts() -> list[str]:
            return self._ask("engine hosts", lambda _, e: e.host.remote())

        engine = self._config.rollout.engine
        layout = EngineLayout(
            engine.tensor_parallel_size, engine.num_engines, vocab_size=self._vocab_size
        )
        return EngineControl(layout, hosts, connect, update, score)

    def _ask(self, what: str, call) -> list[Any]:
        """The answers of all engines; asked again when one died or hung meanwhile."""
        self.fleet.begin_rollout()
        while True:
            try:
                calls = [call(index, e) for index, e in enumerate(self.fleet.engines)]
                # Longer than the engines' own patience: their message is to arrive, no timeout.
                return get(calls, self._config.transfer.timeout_s + _TRANSFER_GRACE_S, what)
            except RolloutError:
                if not self.fleet.heal(_DEATH_NOTICE_S):
                    raise

    def close(self) -> None:
        """End engines, workers and their processes."""
        self.fleet.close()


def _tell(what: str, board: GroupBoard) -> None:
    """What went wrong on the way, for the log."""
    for note in dict.fromkeys(board.notes):
        say(f"{what}: {note}")
    if board.counts:
        say(f"{what}: " + ", ".join(f"{name} {n}" for name, n in sorted(board.counts.items())))
