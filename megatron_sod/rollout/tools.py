"""What a student can call. A tool answers with text and an outcome; it never raises."""

from __future__ import annotations

import asyncio
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from megatron_sod.data.tiny_world import TOOL_FAILURE_TEXT
from megatron_sod.errors import SandboxError
from megatron_sod.rollout.incidents import Incidents
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
    to the student as if it were an answer. So is a sandbox that does not come back.
    """

    def __init__(
        self,
        sandbox,
        *,
        max_infra_retries: int,
        max_concurrency: int = 16,
        hang_timeout_s: float | None = None,
        incidents: Incidents | None = None,
    ):
        """`hang_timeout_s`: for one call with its retries, beyond what the sandbox itself allows;
        None: for ever."""
        self._sandbox, self._retries = sandbox, max_infra_retries
        self._hang_timeout_s = hang_timeout_s
        self._incidents = incidents or Incidents()
        self._num_threads = max_concurrency
        self._free = asyncio.Semaphore(max_concurrency)
        self._threads = self._new_threads()

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
        async with self._free:
            threads = self._threads
            running = asyncio.get_running_loop().run_in_executor(
                threads, self._run_with_retries, code
            )
            try:
                return await asyncio.wait_for(running, self._hang_timeout_s)
            except TimeoutError:
                return self._hung(threads)

    def _hung(self, threads: ThreadPoolExecutor) -> Observation:
        """The thread cannot be stopped; new ones take the place of all, or calls would queue."""
        if self._threads is threads:
            self._threads = self._new_threads()
            threads.shutdown(wait=False)
        self._incidents.count("sandbox_hangs")
        self._incidents.note(f"sandbox: a call did not return within {self._hang_timeout_s:.0f} s")
        return Observation("", "infra_error")

    def _run_with_retries(self, code: str) -> Observation:
        """An infrastructure error that persists has no text: there is nothing to read in it."""
        for number in range(self._retries + 1):
            if number:
                self._incidents.count("sandbox_retries")
            try:
                result = self._sandbox.run(code)
            except (SandboxError, OSError) as error:
                self._incidents.note(f"sandbox: {error}")
                continue
            if result.outcome != "infra_error":
                return Observation(_text(result), result.outcome)
            self._incidents.note(f"sandbox: {result.detail}")
        return Observation("", "infra_error")

    def _new_threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._num_threads, thread_name_prefix="sandbox")

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
