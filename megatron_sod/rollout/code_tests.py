"""Grades a program by running its tests in the sandbox. Expected outputs never enter the sandbox.

A code task's answer is JSON:
    {"inputs": [...], "outputs": [...]}                  programs that read stdin and print
    {"inputs": [...], "outputs": [...], "fn_name": "f"}  a function, or a method of `Solution`
    {"assert_case": ["assert f(1) == 2", ...]}           assertions over what the program defines
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from megatron_sod.errors import DataError, GraderUnavailable
from megatron_sod.types import Prompt

_FENCE = re.compile(r"```(?:python|py|python3)[ \t]*\r?\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)

# Read before the program runs, which could otherwise take them from stdin itself.
_CALL = """
import json, sys
_task = json.loads(sys.stdin.read())
_space = {"__name__": "solution"}
exec(compile(open("solution.py", encoding="utf-8").read(), "solution.py", "exec"), _space)
_f = _space.get(_task["fn_name"])
if _f is None:
    _f = getattr(_space["Solution"](), _task["fn_name"])
with open("result.json", "w", encoding="utf-8") as _file:
    json.dump(_f(*_task["arguments"]), _file)
"""
_ASSERT = """
import json, sys
_task = json.loads(sys.stdin.read())
_space = {"__name__": "solution"}
exec(compile(open("solution.py", encoding="utf-8").read(), "solution.py", "exec"), _space)
exec(compile(_task["assert"], "assertion", "exec"), _space)
with open("result.json", "w", encoding="utf-8") as _file:
    json.dump(_task["nonce"], _file)
"""


@dataclass(frozen=True)
class CodeTests:
    """The tests of one task."""

    inputs: list[Any]
    outputs: list[Any]
    fn_name: str | None
    assert_case: list[str]

    @classmethod
    def parse(cls, answer: str, *, prompt_id: str = "?") -> CodeTests:
        """From a task's answer.

        Raises:
            DataError: not JSON of one of the three forms.
        """
        try:
            given = json.loads(answer)
            tests = cls(
                list(given.get("inputs") or []),
                list(given.get("outputs") or []),
                given.get("fn_name") or None,
                list(given.get("assert_case") or []),
            )
        except (ValueError, AttributeError, TypeError) as error:
            raise DataError(
                f"{prompt_id}: the answer of a code task must be JSON with `inputs` and `outputs`, "
                f"or `assert_case`; found {answer[:80]!r}"
            ) from error
        if len(tests.inputs) != len(tests.outputs) or not (tests.inputs or tests.assert_case):
            raise DataError(
                f"{prompt_id}: {len(tests.inputs)} inputs, {len(tests.outputs)} outputs, "
                f"{len(tests.assert_case)} assertions; a code task needs as many outputs as inputs "
                "and at least one test"
            )
        return tests


def is_code_task(prompt: Prompt) -> bool:
    """Whether the answer is tests; decided by its form, whatever the data source is called."""
    text = prompt.answer.lstrip()
    return text.startswith("{") and ('"inputs"' in text or '"assert_case"' in text)


def last_program(text: str) -> str | None:
    """The last fenced Python block after the last </think>, unmodified; None without one."""
    blocks = _FENCE.findall(text.rpartition("</think>")[2])
    return blocks[-1] if blocks else None


class CodeGrader:
    """Share of tests passed, or all-or-nothing."""

    def __init__(self, sandbox, *, score: str = "all", max_tests: int | None = None):
        """
        Args:
            sandbox: has `run(code, stdin, files=..., fetch=...)`.
            score: "all" (1 when every test passes, stops at the first that fails) | "fraction".
            max_tests: the first so many only; None: all.
        """
        self._sandbox, self._score, self._max_tests = sandbox, score, max_tests

    def __call__(self, prompt: Prompt, text: str) -> float:
        """In [0, 1]; 0 without a program.

        Raises:
            GraderUnavailable: the sandbox failed, not the program.
        """
        program = last_program(text)
        if program is None:
            return 0.0
        tests = CodeTests.parse(prompt.answer, prompt_id=prompt.prompt_id)
        passed = total = 0
        for is_passed in self._results(program, tests):
            total += 1
            passed += is_passed
            if self._score == "all" and not is_passed:
                return 0.0
            if total == self._max_tests:
                break
        return passed / total

    def _results(self, program: str, tests: CodeTests) -> Iterator[bool]:
        for given, expected in zip(tests.inputs, tests.outputs, strict=True):
            if tests.fn_name:
                yield self._call(program, tests.fn_name, given, expected)
            else:
                result = self._run(program, _text(given))
                yield result.outcome == "ok" and same_output(result.stdout, _text(expected))
        for assertion in tests.assert_case:
            nonce = secrets.token_hex(8)
            yield self._value(program, _ASSERT, {"assert": assertion, "nonce": nonce}) == nonce

    def _call(self, program: str, fn_name: str, given: Any, expected: Any) -> bool:
        as_lines = isinstance(given, str)
        if as_lines:  # one JSON value per line and argument
            arguments = [json.loads(line) for line in given.splitlines() if line.strip()]
        else:
            arguments = list(given)
        if isinstance(expected, str) and as_lines:
            expected = json.loads(expected)
        value = self._value(program, _CALL, {"fn_name": fn_name, "arguments": arguments})
        # Some collections wrap the value in a list of one.
        wrapped = not as_lines and isinstance(expected, list) and len(expected) == 1
        return value == expected or (wrapped and value == expected[0])

    def _value(self, program: str, harness: str, task: dict) -> Any:
        """What the harness wrote; a private object when it wrote nothing."""
        result = self._run(
            harness,
            json.dumps(task),
            files={"solution.py": program.encode()},
            fetch=["result.json"],
        )
        if result.outcome != "ok" or "result.json" not in result.files:
            return _NOTHING
        try:
            return json.loads(result.files["result.json"])
        except ValueError:
            return _NOTHING

    def _run(self, code: str, stdin: str, **more):
        result = self._sandbox.run(code, stdin, **more)
        if result.outcome == "infra_error":
            raise GraderUnavailable(f"code tests: the sandbox failed ({result.detail})")
        return result


_NOTHING = object()


def _text(given: Any) -> str:
    """Stdin or stdout of a test: text, or a list of lines."""
    return given if isinstance(given, str) else "\n".join(str(line) for line in given)


def same_output(printed: str, expected: str) -> bool:
    """Equal line by line up to trailing blanks; numbers by value ("1.0" is "1")."""
    left, right = (
        [line.rstrip() for line in text.rstrip().splitlines()] for text in (printed, expected)
    )
    if len(left) != len(right):
        return False
    return all(
        a == b or _same_tokens(a.split(), b.split()) for a, b in zip(left, right, strict=True)
    )


def _same_tokens(left: list[str], right: list[str]) -> bool:
    if len(left) != len(right):
        return False
    return all(a == b or _same_number(a, b) for a, b in zip(left, right, strict=True))


def _same_number(left: str, right: str) -> bool:
    try:
        return Decimal(left) == Decimal(right)
    except InvalidOperation:
        return False
