"""Tools answer with text and an outcome, never with an exception.

Layer: pure, with a scripted sandbox. The real sandbox: tests/sandbox.
"""

import asyncio
import threading

import pytest

from megatron_sod.data.tiny_world import TOOL_FAILURE_TEXT
from megatron_sod.errors import SandboxError
from megatron_sod.rollout.incidents import Incidents
from megatron_sod.rollout.tool_calls import ToolCall
from megatron_sod.rollout.tools import CodeInterpreter, FlakyTool
from tests.helpers.fakes import FakeSandbox, Result

CALL = ToolCall("code_interpreter", {"code": "print(1)"})
LOST = Result(outcome="infra_error", status="not_run", detail="the zygote died")


def _ask(tool, call=CALL, call_id="t/1/0"):
    return asyncio.run(tool.call(call, call_id=call_id))


def _interpreter(*results, retries=2):
    sandbox = FakeSandbox(*results)
    return CodeInterpreter(sandbox, max_infra_retries=retries, max_concurrency=2), sandbox


def test_code_runs_and_its_output_is_the_observation():
    tool, sandbox = _interpreter(Result(stdout="72\n"))
    observation = _ask(tool)
    assert (observation.text, observation.outcome) == ("72", "ok")
    assert sandbox.programs == ["print(1)"]


@pytest.mark.parametrize("outcome", ["user_error", "timeout", "memory", "output_limit", "rejected"])
def test_the_outcome_of_the_program_is_passed_on(outcome):
    tool, _ = _interpreter(Result(outcome=outcome, stderr="ZeroDivisionError: division by zero"))
    observation = _ask(tool)
    assert observation.outcome == outcome and "ZeroDivisionError" in observation.text


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (ToolCall(problem="the tool call is not valid JSON: x"), "not valid JSON"),
        (ToolCall("search", {"code": "1"}), "unknown tool 'search'"),
        (ToolCall("code_interpreter", {}), "`code` must be a string"),
        (ToolCall("code_interpreter", {"code": 3}), "`code` must be a string"),
    ],
)
def test_a_call_that_cannot_run_is_answered_and_not_run(call, text):
    tool, sandbox = _interpreter()
    observation = _ask(tool, call)
    assert observation.outcome == "malformed" and text in observation.text
    assert sandbox.programs == []


def test_infrastructure_errors_are_retried():
    tool, sandbox = _interpreter(LOST, LOST, Result(stdout="7\n"))
    assert _ask(tool).text == "7" and len(sandbox.programs) == 3


def test_an_infrastructure_error_that_persists_has_no_text():
    tool, sandbox = _interpreter(LOST, retries=2)
    observation = _ask(tool)
    assert (observation.text, observation.outcome) == ("", "infra_error")
    assert len(sandbox.programs) == 3


def test_a_sandbox_that_raises_is_an_infrastructure_error():
    class Broken:
        def run(self, code):
            raise SandboxError("the service is unreachable")

    observation = _ask(CodeInterpreter(Broken(), max_infra_retries=1))
    assert (observation.text, observation.outcome) == ("", "infra_error")


def test_calls_run_side_by_side():
    tool, sandbox = _interpreter(Result(stdout="1\n"))

    async def both():
        return await asyncio.gather(*(tool.call(CALL, call_id=str(i)) for i in range(5)))

    assert [o.text for o in asyncio.run(both())] == ["1"] * 5
    assert len(sandbox.programs) == 5


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_the_failure_dial_is_a_share_of_calls_and_a_function_of_their_ids(rate):
    tool, sandbox = _interpreter(Result(stdout="1\n"))
    flaky = FlakyTool(tool, rate)
    first = [_ask(flaky, call_id=f"t/{i}").outcome for i in range(400)]
    assert [_ask(flaky, call_id=f"t/{i}").outcome for i in range(400)] == first
    assert set(first) <= {"ok", "timeout"}
    assert first.count("timeout") / 400 == pytest.approx(rate, abs=0.07)
    assert len(sandbox.programs) == 2 * first.count("ok")


def test_a_dialled_failure_reads_like_a_timeout():
    tool, _ = _interpreter()
    observation = _ask(FlakyTool(tool, 0.999999))
    assert (observation.text, observation.outcome) == (TOOL_FAILURE_TEXT, "timeout")


def test_a_malformed_call_is_never_mistaken_for_a_dialled_failure():
    tool, _ = _interpreter()
    assert _ask(FlakyTool(tool, 0.999999), ToolCall(problem="no")).outcome == "malformed"


def test_a_sandbox_that_never_returns_is_an_infrastructure_error_and_blocks_no_other_call():
    release = threading.Event()

    class Hanging(FakeSandbox):
        def run(self, code):
            if code == "hang":
                release.wait(30)
            return super().run(code)

    incidents = Incidents()
    tool = CodeInterpreter(
        Hanging(Result(stdout="1\n")),
        max_infra_retries=0,
        max_concurrency=1,
        hang_timeout_s=0.1,
        incidents=incidents,
    )
    hang = ToolCall("code_interpreter", {"code": "hang"})

    async def scenario():
        calls = [tool.call(c, call_id="x") for c in (hang, hang, CALL, CALL)]
        return await asyncio.gather(*calls)

    try:
        outcomes = [o.outcome for o in asyncio.run(scenario())]
    finally:
        release.set()
    assert outcomes == ["infra_error", "infra_error", "ok", "ok"]
    counts, notes = incidents.take()
    assert counts["sandbox_hangs"] == 2 and "did not return" in notes[0]


def test_what_was_retried_is_counted_and_told():
    incidents = Incidents()
    sandbox = FakeSandbox(LOST, LOST, Result(stdout="7\n"))
    tool = CodeInterpreter(sandbox, max_infra_retries=2, incidents=incidents)
    assert _ask(tool).text == "7"
    assert incidents.take() == ({"sandbox_retries": 2}, ["sandbox: the zygote died"])
