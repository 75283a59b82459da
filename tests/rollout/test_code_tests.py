"""Programs are graded by their tests, in the sandbox, as written.

Layers: pure -> the real sandbox at the level this machine reaches.
"""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from megatron_sod.config.schema import RewardConfig
from megatron_sod.errors import DataError, GraderUnavailable, SandboxError
from megatron_sod.rollout.code_tests import CodeGrader, CodeTests, last_program, same_output
from megatron_sod.rollout.rewards import make_grader
from megatron_sod.sandbox import open_sandbox
from megatron_sod.sandbox.result import infra_error
from megatron_sod.types import Prompt
from tests.helpers.fakes import Result


@pytest.fixture(scope="module")
def sandbox():
    with open_sandbox(timeout_s=5, warm=True, max_concurrency=1) as opened:
        yield opened


def _prompt(**tests) -> Prompt:
    return Prompt("code/1", [1], json.dumps(tests), "taco")


def _turn(code: str) -> str:
    return f"<think>\n\n</think>\n\nHere:\n```python\n{code}\n```\nDone."


DOUBLE = {"inputs": ["2\n", "5\n", "-1\n"], "outputs": ["4\n", "10\n", "-2"]}


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("```python\na\n```", "a"),
        ("```py\na\n```", "a"),
        ("```python\na\n```\n```python\nb\n```", "b"),
        ("```python\na\n```</think>```python\nb\n```", "b"),
        ("</think>\n```python\nx\n```\n</think> none after the last", None),
        ("```\na\n```", None),
        ("```python\nprint('```')\n```", "print('```')"),
        ("```python\nprint('\\n'.join(x))\n```", "print('\\n'.join(x))"),  # never rewritten
        ("```python\ncut off", "cut off"),
        ("", None),
    ],
)
def test_the_last_fenced_block_is_the_program(text, program):
    assert last_program(text) == program


@pytest.mark.parametrize(
    ("code", "all_or_nothing", "fraction"),
    [
        ("print(2 * int(input()))", 1.0, 1.0),
        ("print('\\n'.join([str(2 * int(input()))]))", 1.0, 1.0),
        ("print(float(2 * int(input())))", 1.0, 1.0),  # 4.0 is 4
        ("print(abs(2 * int(input())))", 0.0, 2 / 3),
        ("print(int(input()))", 0.0, 0.0),
        ("print(2 * int(input())", 0.0, 0.0),
        ("while True: pass", 0.0, 0.0),
        ("print(2 * int(input())); raise SystemExit(3)", 0.0, 0.0),
    ],
)
def test_programs_are_run_on_stdin(sandbox, code, all_or_nothing, fraction):
    if "while" in code:
        sandbox = open_sandbox(timeout_s=0.5, max_concurrency=1)
    prompt = _prompt(**DOUBLE)
    assert CodeGrader(sandbox)(prompt, _turn(code)) == all_or_nothing
    assert CodeGrader(sandbox, score="fraction")(prompt, _turn(code)) == pytest.approx(fraction)


@pytest.mark.parametrize(
    ("code", "score"),
    [
        ("def add(a, b):\n    return a + b", 1.0),
        ("class Solution:\n    def add(self, a, b):\n        return a + b", 1.0),
        ("def add(a, b):\n    return a - b", 0.0),
        ("def other(a, b):\n    return a + b", 0.0),
        ("import json\njson.dump(3, open('result.json', 'w'))\nraise SystemExit", 1 / 2),
    ],
)
def test_functions_are_called_with_values(sandbox, code, score):
    prompt = _prompt(inputs=["1\n2", "[1]\n[2]"], outputs=["3", "[1, 2]"], fn_name="add")
    assert CodeGrader(sandbox, score="fraction")(prompt, _turn(code)) == score
    as_lists = _prompt(inputs=[[1, 2], [[1], [2]]], outputs=[[3], [[1, 2]]], fn_name="add")
    assert CodeGrader(sandbox, score="fraction")(as_lists, _turn(code)) == score


@pytest.mark.parametrize(
    ("code", "score"),
    [
        ("def f(x):\n    return x * x", 1.0),
        ("def f(x):\n    return x", 0.0),
        ("import os\nos._exit(0)", 0.0),  # a clean exit is no passed assertion
        ("import sys, json\njson.dump('x', open('result.json', 'w'))\nsys.exit(0)", 0.0),
    ],
)
def test_assertions_must_be_reached(sandbox, code, score):
    assert CodeGrader(sandbox)(_prompt(assert_case=["assert f(3) == 9"]), _turn(code)) == score


SECRET = 918273645
SPY = """
import os, sys
print(sorted(os.listdir(".")), sys.argv, sorted(os.environ.items()), sys.stdin.read())
print([open(name).read() for name in os.listdir(".") if os.path.isfile(name)])
"""


@pytest.mark.parametrize(
    "answer",
    [
        {"inputs": ["2\n"], "outputs": [f"{SECRET}\n"]},
        {"inputs": [[2]], "outputs": [[SECRET]], "fn_name": "f"},
    ],
)
def test_expected_outputs_are_not_in_the_sandbox(sandbox, answer):
    ran, seen = [], []

    class Watched:
        def run(self, *given, **options):
            ran.append(repr((given, options)))
            seen.append(sandbox.run(*given, **options))
            return seen[-1]

    program = SPY + "def f(x):\n    return x\n"
    assert CodeGrader(Watched())(_prompt(**answer), _turn(program)) == 0.0
    assert "main.py" in seen[0].stdout and "HOME" in seen[0].stdout, "the spy saw nothing"
    assert str(SECRET) not in ran[0] + seen[0].stdout + seen[0].stderr


def test_the_first_tests_only_when_asked(sandbox):
    code = "x = int(input())\nprint(2 * x if x != -1 else 0)"
    assert CodeGrader(sandbox)(_prompt(**DOUBLE), _turn(code)) == 0.0
    assert CodeGrader(sandbox, max_tests=2)(_prompt(**DOUBLE), _turn(code)) == 1.0


def test_a_failing_sandbox_is_not_a_wrong_answer():
    class Down:
        def run(self, *_, **__):
            return infra_error("connection refused")

    with pytest.raises(GraderUnavailable, match="connection refused"):
        CodeGrader(Down())(_prompt(**DOUBLE), _turn("print(1)"))


def test_a_turn_without_a_program_is_wrong_without_asking_the_sandbox():
    assert CodeGrader(None)(_prompt(**DOUBLE), "the answer is \\boxed{4}") == 0.0


def test_code_tasks_are_known_by_their_answers(sandbox):
    opened = []

    def opener():
        opened.append(1)
        return sandbox

    grade = make_grader(RewardConfig(), opener)
    assert grade(Prompt("p", [1], "4", ""), "\\boxed{4}") == 1.0 and opened == []
    assert grade(_prompt(**DOUBLE), _turn("print(2 * int(input()))")) == 1.0
    assert grade(_prompt(**DOUBLE), _turn("print(1)")) == 0.0 and opened == [1]


@pytest.mark.parametrize(
    "answer", ["4", "{}", "[1]", '{"inputs": ["1"], "outputs": []}', '{"inputs": 3}', "{"]
)
def test_an_answer_that_is_no_tests_is_named(answer):
    with pytest.raises(DataError, match="code/7"):
        CodeTests.parse(answer, prompt_id="code/7")


@pytest.mark.parametrize(
    ("printed", "expected", "is_same"),
    [
        ("1\n2\n", "1\n2", True),
        ("1 \n2", "1\n2\n\n", True),
        ("1\n2", "1 2", False),
        ("0.50", "0.5", True),
        ("1e3", "1000", True),
        ("YES", "yes", False),
        ("", "", True),
        ("nan", "nan", True),
        ("1 2", "1 3", False),
    ],
)
def test_outputs_are_compared_line_by_line(printed, expected, is_same):
    assert same_output(printed, expected) is is_same


class _Opener:
    """Opens sandboxes in which every program prints 1; counts them."""

    def __init__(self, *failures: Exception):
        self.failures, self.num_opened = list(failures), 0

    def __call__(self):
        self.num_opened += 1
        time.sleep(0.05)  # so that whoever comes meanwhile is seen
        if self.failures:
            raise self.failures.pop()
        return SimpleNamespace(run=lambda code, stdin: Result(stdout="1\n"))


def test_answers_graded_at_once_share_one_sandbox():
    opener = _Opener()
    grader = make_grader(RewardConfig(), opener)
    prompt = _prompt(inputs=[""], outputs=["1\n"])
    with ThreadPoolExecutor(16) as pool:
        rewards = list(pool.map(lambda _: grader(prompt, _turn("print(1)")), range(16)))
    assert rewards == [1.0] * 16 and opener.num_opened == 1


@pytest.mark.parametrize("error", [SandboxError("no free user ids"), OSError(24, "too many files")])
def test_a_sandbox_that_does_not_open_is_no_verdict_and_is_tried_again(error):
    opener = _Opener(error)
    grader = make_grader(RewardConfig(), opener)
    prompt = _prompt(inputs=[""], outputs=["1\n"])
    with pytest.raises(GraderUnavailable, match=str(error.args[-1])):
        grader(prompt, _turn("print(1)"))
    assert grader(prompt, _turn("print(1)")) == 1.0 and opener.num_opened == 2
