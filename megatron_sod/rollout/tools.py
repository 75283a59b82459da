"""What a student can call. A tool answers with text and an outcome; it never raises."""

from __future__ import annotations

import asyncio
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from megatron_sod.data.tiny_world import TOOL_FAILURE_TEXT
from megatron_sod.errors import SandboxError
from megatron_sod.observe.progress import say
from megatron_sod.rollout.tool_calls import ToolCall


@dataclass(frozen=True)
class Observation:
    """A tool's answer."""

    text: str
    outcome: str  # as Step.outcome


class Tool(Protocol):
    async def call(self, call: ToolCall, *, call_id: str) -> Observation: ...


class CodeInterpreter:
    """`code_interpreter(code)`: runs Python in a sandbox, a fresh process per call.

    Infrastructure errors are retried; what persists is reported as `infra_error` and never shown
    to the student as if it were an answer.
    """

    def __init__(self, sandbox, *, max_infra_retries: int, max_concurrency: int = 16):
        self._sandbox = sandbox
        self._retries = max_infra_retries
        self._threads = ThreadPoolExecutor(max_concurrency, thread_name_prefix="sandbox")

    async def call(self, call: ToolCall, *, call_id: str) -> Observation:
        if call.problem is not None:
            return Observation(f"Error: {call.problem}", "malformed")
        if call.name != "code_interpreter":
            return Observation(
                f"Error: unknown tool {call.name!r}; the only tool is code_interpreter", "malformed"
            )
        code = call.arguments.get("code")
        if not isinstance(code, str):
            return Observation("Error: `code` must be a string of Python source", "malformed")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._run_with_retries, code)

    def _run_with_retries(self, code: str) -> Observation:
        """An infrastructure error that persists has no text: there is nothing to read in it."""
        for _ in range(self._retries + 1):
            try:
                result = self._sandbox.run(code)
            except (SandboxError, OSError) as error:
                say(f"sandbox: {error}")
                continue
            if result.outcome != "infra_error":
                return Observation(_text(result), result.outcome)
        return Observation("", "infra_error")

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


class FlakyTool:
    """The tiny world's dial: a share of calls answers with a timeout, deterministic by call id.

    The failure is part of the task (a right student calls again), so it is the model's business
    and not an infrastructure error.
    """

    def __init__(self, tool: Tool, failure_rate: float):
        self._tool, self._failure_rate = tool, failure_rate

    async def call(self, call: ToolCall, *, call_id: str) -> Observation:
        is_runnable = call.problem is None
        if is_runnable and random.Random(call_id).random() < self._failure_rate:
            return Observation(TOOL_FAILURE_TEXT, "timeout")
        return await self._tool.call(call, call_id=call_id)


def _text(result) -> str:
    from megatron_sod.sandbox import render_observation

    return render_observation(result)
