"""A Ray actor that runs agent loops: engines on one side, the sandbox and graders on the other."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

from megatron_sod.config.schema import SodConfig
from megatron_sod.data.chat import ChatFormat
from megatron_sod.data.sources import tool_schemas
from megatron_sod.data.tokenizer import load_tokenizer
from megatron_sod.rollout.agent_loop import AgentLoop, Limits, SampledTurn, Sampling
from megatron_sod.rollout.rewards import make_grader
from megatron_sod.rollout.tools import CodeInterpreter, FlakyTool, Tool
from megatron_sod.sandbox import open_sandbox
from megatron_sod.types import Prompt, Trajectory


def make_chat(config: SodConfig, model_dir: str) -> ChatFormat:
    """The chat format of a model under this configuration."""
    tools = tool_schemas() if config.data.tools_in_prompt else None
    return ChatFormat(
        load_tokenizer(model_dir), tools=tools, enable_thinking=config.data.enable_thinking
    )


class RolloutWorker:
    """Runs groups of trajectories concurrently on one event loop."""

    def __init__(self, config: SodConfig, engines: list[Any]):
        """`engines`: handles of Engine actors; requests of one trajectory stay on one engine."""
        self._config, self._engines = config, engines
        self._chat = make_chat(config, config.student.path)
        sandbox = config.sandbox
        self._sandbox = _open(sandbox)
        concurrency = sandbox.max_concurrency or 4
        self._interpreter = CodeInterpreter(
            self._sandbox,
            max_infra_retries=sandbox.max_infra_retries,
            max_concurrency=concurrency,
        )
        self._tool: Tool = self._interpreter
        if sandbox.failure_rate > 0:
            self._tool = FlakyTool(self._interpreter, sandbox.failure_rate)
        self._grader = make_grader(
            config.reward, lambda: _open(sandbox, timeout_s=config.reward.code_timeout_s)
        )
        rollout = config.rollout
        self._limits = Limits(
            rollout.max_turns,
            rollout.max_response_length,
            rollout.max_observation_length,
            rollout.max_tool_calls_per_turn,
        )
        self._next_engine = itertools.cycle(range(len(engines)))

    def sandbox_level(self) -> str:
        return getattr(self._sandbox, "level", "service")

    async def rollout(
        self,
        prompts: list[Prompt],
        *,
        tag: str,
        num_generations: int,
        temperature: float,
        top_p: float,
        seed: int,
    ) -> list[Trajectory]:
        """`num_generations` trajectories of each prompt, in order; `tag` makes their ids unique."""
        runs = [
            self._one(prompt, f"{prompt.prompt_id}/{tag}/{sample}", temperature, top_p, seed)
            for prompt in prompts
            for sample in range(num_generations)
        ]
        return list(await asyncio.gather(*runs))

    async def _one(self, prompt, trajectory_id, temperature, top_p, seed) -> Trajectory:
        engine = self._engines[next(self._next_engine)]

        async def generate(token_ids: list[int], sampling: Sampling) -> SampledTurn:
            return await engine.generate.remote(token_ids, sampling)

        loop = AgentLoop(self._chat, generate, self._tool, self._grade, self._limits)
        return await loop.run(
            prompt, trajectory_id, temperature=temperature, top_p=top_p, seed=seed
        )

    async def _grade(self, prompt: Prompt, text: str) -> float:
        return float(await asyncio.to_thread(self._grader, prompt, text))

    async def close(self) -> None:
        self._interpreter.close()
        self._sandbox.close()


def _open(sandbox, *, timeout_s: float | None = None):
    timeout_s = timeout_s or sandbox.timeout_s
    if sandbox.kind == "sandbox_fusion":
        from megatron_sod.sandbox.fusion_client import FusionClient

        return FusionClient(sandbox.url, timeout_s=timeout_s, memory_mb=sandbox.memory_mb)
    return open_sandbox(
        level=sandbox.level,
        timeout_s=timeout_s,
        memory_mb=sandbox.memory_mb,
        warm=sandbox.warm,
        preload=tuple(sandbox.preload),
        allow_unsafe=sandbox.allow_unsafe,
        max_concurrency=sandbox.max_concurrency,
    )
