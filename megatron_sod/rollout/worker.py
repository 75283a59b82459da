"""A Ray actor that runs agent loops: engines on one side, the sandbox and graders on the other."""

from __future__ import annotations

import asyncio
import contextlib
import math
from dataclasses import dataclass

from megatron_sod.config.schema import SandboxConfig, SodConfig
from megatron_sod.data.chat import ChatFormat
from megatron_sod.data.sources import tool_schemas
from megatron_sod.data.tokenizer import load_tokenizer
from megatron_sod.rollout.agent_loop import AgentLoop, Limits
from megatron_sod.rollout.engine_pool import EnginePool, RemoteEngine
from megatron_sod.rollout.groups import GroupRequest, GroupResult
from megatron_sod.rollout.incidents import Incidents
from megatron_sod.rollout.rewards import make_grader
from megatron_sod.rollout.tools import CodeInterpreter, FlakyTool, Tool
from megatron_sod.rollout.waiting import Took, Waits
from megatron_sod.sandbox import open_sandbox
from megatron_sod.types import Prompt, Trajectory

_FUSION_CALLS_PER_ADDRESS = 32


@dataclass(frozen=True)
class GroupSampling:
    """How the trajectories of a group are sampled."""

    temperature: float
    top_p: float
    seed: int


def make_chat(config: SodConfig, model_dir: str) -> ChatFormat:
    """The chat format of a model under this configuration."""
    tools = tool_schemas() if config.data.tools_in_prompt else None
    return ChatFormat(
        load_tokenizer(model_dir), tools=tools, enable_thinking=config.data.enable_thinking
    )


class RolloutWorker:
    """Runs groups of trajectories concurrently on one event loop."""

    def __init__(self, config: SodConfig, engines: list[RemoteEngine | None], number: int = 0):
        self._config = config
        self._chat = make_chat(config, config.student.path)
        self._incidents = Incidents()
        self._engines = EnginePool(engines, self._incidents, first=number)
        sandbox, self._closing = config.sandbox, contextlib.ExitStack()
        self._sandbox = self._closing.enter_context(_open(sandbox))
        self._interpreter = CodeInterpreter(
            self._sandbox,
            max_infra_retries=sandbox.max_infra_retries,
            max_concurrency=_concurrency(sandbox, self._sandbox),
            # Both kinds end a call themselves, at the latest after 2 x timeout_s + 120 s a try.
            hang_timeout_s=(sandbox.max_infra_retries + 1) * (2 * sandbox.timeout_s + 150),
            incidents=self._incidents,
        )
        self._closing.callback(self._interpreter.close)
        self._tool: Tool = self._interpreter
        if sandbox.failure_rate > 0:
            self._tool = FlakyTool(self._interpreter, sandbox.failure_rate)
        self._grader = make_grader(
            config.reward,
            lambda: self._closing.enter_context(
                _open(sandbox, timeout_s=config.reward.code_timeout_s)
            ),
        )
        rollout = config.rollout
        self._limits = Limits(
            rollout.max_turns,
            rollout.max_response_length,
            rollout.max_observation_length,
            rollout.max_tool_calls_per_turn,
            rollout.trajectory_timeout_s,
        )
        self._is_stopping = False

    async def ready(self) -> str:
        """The sandbox's isolation level."""
        return getattr(self._sandbox, "level", "service")

    async def lifeline(self) -> None:
        """Never returns while this process lives."""
        await asyncio.Event().wait()

    async def replace_engine(self, index: int, engine: RemoteEngine) -> None:
        self._engines.replace(index, engine)

    async def set_stopping(self, is_stopping: bool) -> None:
        """True: trajectories stop before their next turn and are returned as "interrupted"."""
        self._is_stopping = is_stopping

    async def run_group(self, group: GroupRequest, sampling: GroupSampling) -> GroupResult:
        """All trajectories of a group, finished, unless told to stop."""
        runs = [self._one(group, sample, sampling) for sample in range(group.num_generations)]
        found = await asyncio.gather(*runs)
        took = [took for _, took in found if took is not None]
        return GroupResult([t for t, _ in found], *self._incidents.take(), took)

    async def _one(
        self, group: GroupRequest, sample: int, sampling: GroupSampling
    ) -> tuple[Trajectory, Took | None]:
        begun = group.begun[sample] if group.begun else None
        if begun is not None and begun.finish_reason != "interrupted":
            return begun, None
        waits = Waits()
        with self._engines.lease() as engine:
            loop = AgentLoop(
                self._chat,
                engine.generate,
                self._tool,
                self._grade,
                self._limits,
                is_stopping=lambda: self._is_stopping,
            )
            trajectory = await loop.run(
                group.prompt,
                group.trajectory_id(sample),
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=sampling.seed,
                begun=begun,
                waits=waits,
            )
        lengths = len(trajectory.prompt_token_ids), len(trajectory.response_token_ids)
        return trajectory, Took(waits.generate_s, waits.tools_s, *lengths)

    async def _grade(self, prompt: Prompt, text: str) -> float:
        return float(await asyncio.to_thread(self._grader, prompt, text))

    async def close(self) -> None:
        self._closing.close()


def _concurrency(config: SandboxConfig, sandbox) -> int:
    """Tool calls at a time."""
    if config.kind == "sandbox_fusion":
        return config.max_concurrency or _FUSION_CALLS_PER_ADDRESS * len(config.url)
    return sandbox.max_concurrency


def _calls_per_address(config: SandboxConfig) -> int:
    """Of a service. What the client kept waiting would count as hanging, so it takes all that the
    interpreter lets through."""
    if config.max_concurrency is None:
        return _FUSION_CALLS_PER_ADDRESS
    return math.ceil(config.max_concurrency / len(config.url))


def _open(sandbox: SandboxConfig, *, timeout_s: float | None = None):
    timeout_s = timeout_s or sandbox.timeout_s
    if sandbox.kind == "sandbox_fusion":
        from megatron_sod.sandbox.fusion_client import FusionClient

        return FusionClient(
            sandbox.url,
            timeout_s=timeout_s,
            memory_mb=sandbox.memory_mb,
            max_concurrency=_calls_per_address(sandbox),
        )
    return open_sandbox(
        level=sandbox.level,
        timeout_s=timeout_s,
        memory_mb=sandbox.memory_mb,
        warm=sandbox.warm,
        preload=tuple(sandbox.preload),
        allow_unsafe=sandbox.allow_unsafe,
        max_concurrency=sandbox.max_concurrency,
    )
