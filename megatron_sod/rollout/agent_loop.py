"""One trajectory: sample a turn, run its tool calls, append what they printed, and again.

Token in, token out: sampled ids are kept as they are, only observation ids are added.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from megatron_sod.data.chat import ChatFormat
from megatron_sod.errors import GraderUnavailable, RolloutError
from megatron_sod.observe.progress import say
from megatron_sod.rollout.breaker import check_sampling
from megatron_sod.rollout.tool_calls import ToolCall, ToolCallParser
from megatron_sod.rollout.tools import Observation, Tool
from megatron_sod.rollout.trajectory_builder import TrajectoryBuilder
from megatron_sod.rollout.waiting import Waits
from megatron_sod.types import Prompt, Trajectory

UNGRADED = ("infra_error", "time_limit", "interrupted")
NOT_RUN = ("malformed", "rejected")  # outcomes of calls that nothing was run for
NOT_EXECUTED = "Error: not executed, one call per turn is allowed; call again"


@dataclass(frozen=True)
class Sampling:
    """How an engine samples a turn."""

    temperature: float
    top_p: float
    max_tokens: int
    stop_token_ids: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class SampledTurn:
    """What an engine returns for one turn."""

    token_ids: list[int]  # with the stop token when one was sampled
    logprobs: list[float]  # after temperature, of each sampled token
    policy_versions: list[int]  # of the weights that sampled each token; never falls
    is_interrupted: bool = False  # told to stop before its end


@dataclass(frozen=True)
class Limits:
    """Where a trajectory ends."""

    max_turns: int
    max_response_length: int  # tokens, observations included
    max_observation_length: int  # tokens kept of each tool result
    max_tool_calls_per_turn: int
    timeout_s: float | None = None  # wall time of one trajectory


Generate = Callable[[list[int], Sampling], Awaitable[SampledTurn]]
Grade = Callable[[Prompt, str], Awaitable[float]]


class AgentLoop:
    """Runs trajectories; holds nothing between them."""

    def __init__(
        self,
        chat: ChatFormat,
        generate: Generate,
        tool: Tool,
        grade: Grade,
        limits: Limits,
        is_stopping: Callable[[], bool] = lambda: False,
    ):
        """`is_stopping`: asked before each turn; True leaves the trajectory "interrupted"."""
        self._chat, self._generate, self._tool, self._grade = chat, generate, tool, grade
        self._limits, self._is_stopping = limits, is_stopping
        self._parser = ToolCallParser(chat.tokenizer)

    async def run(
        self,
        prompt: Prompt,
        trajectory_id: str,
        *,
        temperature: float,
        top_p: float,
        seed: int,
        begun: Trajectory | None = None,
        waits: Waits | None = None,
    ) -> Trajectory:
        """One trajectory from the prompt, or from where `begun` was interrupted, to its end;
        graded on the student's final turn. `waits` is added to as it goes."""
        builder = TrajectoryBuilder(prompt, trajectory_id)
        if begun is not None:
            check_sampling([begun], temperature, top_p)
            builder = TrajectoryBuilder.resumed(prompt, begun)
        waits = waits or Waits()
        try:
            async with asyncio.timeout(self._limits.timeout_s) as time_limit:
                reason = None
                while reason is None:
                    reason = await self._turn(builder, temperature, top_p, seed, waits)
        except TimeoutError:
            if not time_limit.expired():
                raise
            reason = "time_limit"
        score = 0.0
        if reason == "answer":
            try:
                score = await self._graded(prompt, builder)
            except GraderUnavailable as error:
                say(f"trajectory {trajectory_id} cannot be graded: {error}")
                reason = "infra_error"
        score = float("nan") if reason in UNGRADED else score
        return builder.finish(reason, score, temperature=temperature, top_p=top_p)

    async def _graded(self, prompt: Prompt, builder: TrajectoryBuilder) -> float:
        final_turn = builder.last_turn[:-1]  # without the token that ended it
        score = await self._grade(prompt, self._chat.decode(final_turn))
        if not math.isfinite(score):
            raise RolloutError(
                f"trajectory {builder.trajectory_id}: the grader returned {score}; a reward must "
                "be a finite number, so correct reward.function"
            )
        return score

    async def _turn(
        self, builder, temperature: float, top_p: float, seed: int, waits: Waits
    ) -> str | None:
        """One turn and its tools; the finish reason when the trajectory ends here."""
        if self._is_stopping():
            return "interrupted"
        limits = self._limits
        room = limits.max_response_length - len(builder.response)
        if room <= 0:
            return "max_length"
        stop = tuple(self._chat.stop_token_ids)
        sampling = Sampling(temperature, top_p, room, stop, _seed(seed, builder))
        with waits.on("generate_s"):
            sampled = await self._generate(builder.token_ids, sampling)
        if sampled.is_interrupted and not sampled.token_ids:
            return "interrupted"
        builder.add_turn(sampled.token_ids, sampled.logprobs, sampled.policy_versions)
        turn = builder.last_turn
        if sampled.is_interrupted:
            return "interrupted"
        if not turn or turn[-1] not in stop:
            return "max_length"  # cut: neither a newline nor an observation may follow
        calls = self._parser.parse(turn)
        if not calls:
            return "answer"
        if turn[-1] != self._chat.end_of_turn_id:
            return "unanswered_call"  # it ended the text instead of its turn: nothing may follow
        if builder.num_turns >= limits.max_turns:
            return "max_turns"
        with waits.on("tools_s"):
            observations = await self._run_calls(calls, builder)
        num_run = sum(o.outcome not in NOT_RUN for o in observations)
        builder.set_outcome(_worst(observations), num_run)
        if any(o.outcome == "infra_error" for o in observations):
            return "infra_error"
        ids = self._chat.observation_ids([self._truncate(o.text) for o in observations])
        if len(builder.response) + len(ids) >= limits.max_response_length:
            return "max_length"
        builder.add_context(ids)
        return None

    async def _run_calls(self, calls: list[ToolCall], builder) -> list[Observation]:
        allowed = self._limits.max_tool_calls_per_turn
        observations = []
        for number, call in enumerate(calls):
            if number >= allowed:
                observations.append(Observation(NOT_EXECUTED, "rejected"))
                continue
            call_id = f"{builder.trajectory_id}/{builder.num_turns}/{number}"
            observations.append(await self._tool.call(call, call_id=call_id))
        return observations

    def _truncate(self, text: str) -> str:
        """Head and tail of an observation longer than the limit, in tokens."""
        limit = self._limits.max_observation_length
        ids = self._chat.plain_ids(text)
        if len(ids) <= limit:
            return text
        mark = "\n...(truncated)...\n"
        half = max(1, (limit - len(self._chat.plain_ids(mark))) // 2)
        while True:
            # A cut inside a character leaves replacement characters, which are longer than it.
            head = self._chat.decode(ids[:half]).rstrip("\ufffd")
            tail = self._chat.decode(ids[-half:]).lstrip("\ufffd")
            shortened = head + mark + tail
            if half == 1 or len(self._chat.plain_ids(shortened)) <= limit:
                return shortened
            half -= 1


def _worst(observations: list[Observation]) -> str:
    """One outcome for the step: infra_error if there is one, else the first that is not ok."""
    outcomes = [observation.outcome for observation in observations]
    if "infra_error" in outcomes:
        return "infra_error"
    return next((outcome for outcome in outcomes if outcome != "ok"), "ok")


def _seed(seed: int, builder: TrajectoryBuilder) -> int:
    """A function of run, trajectory, turn and, in a turn that is continued, its length so far."""
    place = f"{builder.trajectory_id}/{builder.num_turns}"
    if builder.is_turn_open:
        place = f"{builder.trajectory_id}/{builder.num_turns - 1}+{len(builder.last_turn)}"
    digest = hashlib.sha256(f"{seed}/{place}".encode()).digest()
    return int.from_bytes(digest[:4], "little")
