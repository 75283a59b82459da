"""Inference engines under continuous batching, as an event simulation.

All sequences an engine decodes advance one token per step, so an engine is a step counter and a
heap of the counts at which its sequences end their turn; the length of a step follows from how
many run and how much context they read. Prompts and tool results are prefilled whole and stop
decoding meanwhile. A sequence waiting for its tool keeps its prefix cached.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from dataclasses import dataclass

from megatron_sod.plan.estimate import forward_flops
from megatron_sod.plan.hardware import Hardware
from megatron_sod.plan.job import Job, PlannedModel
from megatron_sod.plan.memory import engine_weights, kv_bytes_per_token, kv_cache_bytes
from megatron_sod.plan.trajectories import Draw

COLLECTIVE_LATENCY_S = 15e-6  # of one small all-reduce inside a node


@dataclass(frozen=True)
class EngineSpeed:
    """What a decode step and a prefill cost on one engine."""

    model: PlannedModel
    hardware: Hardware
    tensor_parallel_size: int
    max_num_seqs: int
    cache_tokens: float
    weight_bytes: int  # on one of its GPUs
    token_bytes: float  # of KV cache, on one of its GPUs

    @classmethod
    def of(cls, job: Job) -> EngineSpeed:
        assert job.rollout is not None, "SFT has no engines"
        engine = job.rollout.engine
        token_bytes = kv_bytes_per_token(job)
        return cls(
            model=job.student,
            hardware=job.hardware,
            tensor_parallel_size=engine.tensor_parallel_size,
            max_num_seqs=engine.max_num_seqs,
            cache_tokens=kv_cache_bytes(job) / token_bytes,
            weight_bytes=engine_weights(job),
            token_bytes=token_bytes,
        )

    def step_s(self, running: int, context: float) -> float:
        """One token for each of `running` sequences that hold `context` tokens together."""
        hardware, tp = self.hardware, self.tensor_parallel_size
        read = self.weight_bytes * self._share_of_weights(running) + context * self.token_bytes
        memory = read / (hardware.memory_bandwidth * hardware.decode_efficiency)
        compute = self._flops(running, context / max(running, 1)) / self._flops_per_s()
        layers = self.model.geometry.num_layers
        collectives = 2 * layers * COLLECTIVE_LATENCY_S if tp > 1 else 0.0
        overhead = hardware.decode_overhead_s + running * hardware.decode_sequence_s
        return overhead + max(memory, compute) + collectives

    def prefill_s(self, tokens: int, context: float) -> float:
        return self._flops(tokens, 2 * context) / self._flops_per_s()

    def _flops(self, tokens: float, context: float) -> float:
        # decoding reads the whole context, where a causal pass reads half of it on average
        return forward_flops(self.model, tokens, rows=0, context=2 * context)

    def _flops_per_s(self) -> float:
        hardware = self.hardware
        return hardware.peak_flops * hardware.prefill_efficiency * self.tensor_parallel_size

    def _share_of_weights(self, running: int) -> float:
        """Experts no token of the batch was sent to are not read."""
        geometry = self.model.geometry
        if not geometry.is_moe:
            return 1.0
        missed = (1 - geometry.experts_per_token / geometry.num_experts) ** running
        return 1.0 - missed


@dataclass(frozen=True)
class RolloutResult:
    """One rollout phase on all simulated engines."""

    wall_s: float
    idle_share: float  # of the engines' time: nothing to decode or prefill
    mean_running: float  # sequences decoded together, while any is
    tool_share: float  # of the trajectories' time: waiting for a tool


class _Engine:
    """One engine's state; `version` outdates the end it has announced."""

    def __init__(self) -> None:
        self.now = self.stalled_until = 0.0
        self.steps = self.step_s = 0.0
        self.running: list[tuple[float, int]] = []  # (step count at which the turn ends, sequence)
        self.waiting: deque[int] = deque()
        self.context = 0.0  # tokens its running sequences hold now
        self.reserved = 0.0  # and at the ends of their turns
        self.version = 0
        self.busy_s = self.sequence_s = 0.0


class _Simulation:
    def __init__(
        self,
        draws: list[Draw],
        speed: EngineSpeed,
        num_engines: int,
        slots: int | None,
        in_flight: int,
    ):
        self.draws, self.speed = draws, speed
        self.engines = [_Engine() for _ in range(num_engines)]
        self.free_slots = len(draws) if slots is None else slots
        self.tool_queue: deque[int] = deque()
        self.unstarted = deque(range(len(draws)))
        self.in_flight = in_flight
        self.turn = [0] * len(draws)
        self.held = [float(draw.prompt_tokens) for draw in draws]  # context of each sequence
        self.events: list[tuple[float, int, str, int, int]] = []
        self.order = itertools.count()
        self.tool_s, self.ended_s = 0.0, [0.0] * len(draws)

    def run(self) -> RolloutResult:
        for _ in range(min(self.in_flight, len(self.draws))):
            self._start_next()
        for number, engine in enumerate(self.engines):
            self._admit(number, engine)
        while self.events:
            time, _, kind, which, version = heapq.heappop(self.events)
            if kind == "tool":
                self._tool_done(which, time)
            elif version == self.engines[which].version:
                self._turn_ends(which, time)
        return self._result()

    def _start_next(self) -> _Engine:
        sequence = self.unstarted.popleft()
        engine = self.engines[sequence % len(self.engines)]
        engine.waiting.append(sequence)
        return engine

    def _advance(self, engine: _Engine, time: float) -> None:
        elapsed = time - engine.now
        decoding = max(0.0, time - max(engine.now, engine.stalled_until))
        if engine.running:
            done = decoding / engine.step_s
            engine.steps += done
            engine.context += done * len(engine.running)
            engine.busy_s += elapsed
            engine.sequence_s += elapsed * len(engine.running)
        engine.now = time

    def _admit(self, number: int, engine: _Engine) -> None:
        """Start what fits, and announce when the next turn ends."""
        speed = self.speed
        while engine.waiting and len(engine.running) < speed.max_num_seqs:
            sequence = engine.waiting[0]
            draw = self.draws[sequence]
            needed = self.held[sequence] + draw.turn_tokens
            if engine.running and engine.reserved + needed > speed.cache_tokens:
                break
            engine.waiting.popleft()
            new = draw.observation_tokens if self.turn[sequence] else draw.prompt_tokens
            stall = speed.prefill_s(new, self.held[sequence] - new / 2)
            engine.stalled_until = max(engine.now, engine.stalled_until) + stall
            heapq.heappush(engine.running, (engine.steps + draw.turn_tokens, sequence))
            engine.context += self.held[sequence]
            engine.reserved += needed
        engine.version += 1
        if engine.running:
            engine.step_s = speed.step_s(len(engine.running), engine.context)
            left = engine.running[0][0] - engine.steps
            at = max(engine.now, engine.stalled_until) + max(0.0, left) * engine.step_s
            self._push(at, "turn", number, engine.version)

    def _push(self, time: float, kind: str, which: int, version: int) -> None:
        heapq.heappush(self.events, (time, next(self.order), kind, which, version))

    def _turn_ends(self, number: int, time: float) -> None:
        engine = self.engines[number]
        self._advance(engine, time)
        _, sequence = heapq.heappop(engine.running)
        draw = self.draws[sequence]
        self.held[sequence] += draw.turn_tokens
        engine.context = max(0.0, engine.context - self.held[sequence])
        engine.reserved -= self.held[sequence]
        self.turn[sequence] += 1
        if self.turn[sequence] < draw.num_turns:
            self.tool_queue.append(sequence)
            self.tool_s -= time
            self._start_tools(time)
        else:
            self.ended_s[sequence] = time
            if self.unstarted:
                other = self._start_next()
                if other is not engine:
                    self._advance(other, time)
                    self._admit(self.engines.index(other), other)
        self._admit(number, engine)

    def _start_tools(self, time: float) -> None:
        while self.tool_queue and self.free_slots:
            sequence = self.tool_queue.popleft()
            self.free_slots -= 1
            latency = self.draws[sequence].tool_latencies_s[self.turn[sequence] - 1]
            self._push(time + latency, "tool", sequence, 0)

    def _tool_done(self, sequence: int, time: float) -> None:
        self.free_slots += 1
        self.tool_s += time
        self._start_tools(time)
        self.held[sequence] += self.draws[sequence].observation_tokens
        number = sequence % len(self.engines)
        engine = self.engines[number]
        self._advance(engine, time)
        engine.waiting.append(sequence)
        self._admit(number, engine)

    def _result(self) -> RolloutResult:
        wall = max(self.ended_s)
        busy = sum(engine.busy_s for engine in self.engines)
        running = sum(engine.sequence_s for engine in self.engines)
        return RolloutResult(
            wall_s=wall,
            idle_share=1 - busy / (wall * len(self.engines)),
            mean_running=running / busy,
            tool_share=self.tool_s / sum(self.ended_s),
        )


def simulate_rollout(
    draws: list[Draw],
    speed: EngineSpeed,
    *,
    num_engines: int,
    tool_slots: int | None = None,
    max_in_flight: int | None = None,
) -> RolloutResult:
    """
    Args:
        draws: trajectories; number i runs on engine i modulo `num_engines`.
        tool_slots: calls at a time, over all engines; None: no limit.
        max_in_flight: trajectories at a time, over all engines; None: no limit.
    """
    in_flight = len(draws) if max_in_flight is None else max_in_flight
    return _Simulation(draws, speed, num_engines, tool_slots, in_flight).run()
