"""Public data sets by the columns of their rows. Each row is read by its own columns, so one file
may mix sources.

Recognised, most specific first:
    Open-AgentRL RL        prompt (messages), reward_model.ground_truth, data_source
    Open-AgentRL Eval      problem, reward_model (JSON text), data_source     LiveCodeBench
    LiveCodeBench          question_content, starter_code, public_test_cases, private_test_cases
    SandboxFusion samples  content, test.input_output
    GPQA                   Question, Correct Answer, Incorrect Answer 1..3
    GPQA (Eval pack)       problem, solution (a letter)
    AIME                   Problem, Answer   or   problem, answer
    GSM8K                  question, answer (ends with #### NUMBER)
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_sod.data.instructions import with_instructions
from megatron_sod.data.livecodebench import private_tests
from megatron_sod.errors import DataError

_LETTER = re.compile(r"\s*[A-J]\s*")


@dataclass(frozen=True)
class Task:
    """One row, understood."""

    messages: list[dict]
    answer: str  # a value, a letter, or tests as JSON


def read_task(row: dict, origin: str) -> Task | None:
    """The task of a row whose columns are known; None for any other row.

    Raises:
        DataError: the columns are known but a value is not usable.
    """
    for columns, read in _READERS:
        if all(row.get(column) not in (None, "") for column in columns):
            return read(row, origin)
    return None


def _user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def _text(row: dict, column: str, origin: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise DataError(f"{origin}: {column!r} must be text; found {value!r:.80}")
    return value


def _rl_row(row: dict, origin: str) -> Task:
    messages, answer = row["prompt"], _ground_truth(row, origin)
    source = str(row.get("data_source") or "")
    if isinstance(messages, str):
        messages = _user(messages)
    if not messages or not all(isinstance(m, dict) and m.get("content") for m in messages):
        raise DataError(
            f"{origin}: 'prompt' must be messages with role and content; found {messages!r:.80}"
        )
    is_code = _is_tests(answer)
    if "code" in source and not is_code:
        raise DataError(
            f"{origin}: data_source {source!r} names a code task, but its ground truth is not "
            f"tests: {answer[:60]!r}"
        )
    form = _test_form(answer) if is_code else _answer_form(answer)
    last = {**messages[-1]}
    last["content"] = with_instructions(last["content"], form, add_work=len(messages) == 1)
    return Task([*messages[:-1], last], answer)


def _eval_code_row(row: dict, origin: str) -> Task:
    answer = _ground_truth(row, origin)
    if not _is_tests(answer):
        raise DataError(f"{origin}: reward_model.ground_truth holds no inputs and outputs")
    text = with_instructions(_text(row, "problem", origin), _test_form(answer))
    return Task(_user(text), answer)


def _ground_truth(row: dict, origin: str) -> str:
    """As text; tests as JSON."""
    model = _decoded(row["reward_model"])
    truth = model.get("ground_truth") if isinstance(model, dict) else None
    if truth in (None, ""):
        raise DataError(f"{origin}: no reward_model.ground_truth; found {model!r:.80}")
    if isinstance(truth, list) and len(truth) == 1:
        truth = truth[0]
    if isinstance(truth, dict):  # Parquet fills the keys of other rows with None
        return json.dumps({key: value for key, value in truth.items() if value is not None})
    return truth if isinstance(truth, str) else json.dumps(truth)


def _decoded(value: Any) -> Any:
    """The value of JSON text; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _is_tests(answer: str) -> bool:
    tests = _decoded(answer)
    return isinstance(tests, dict) and ("inputs" in tests or "assert_case" in tests)


def _test_form(answer: str) -> str:
    tests = json.loads(answer)
    return "function" if tests.get("fn_name") or tests.get("assert_case") else "stdin"


def _answer_form(answer: str) -> str:
    return "choice" if _LETTER.fullmatch(answer) else "math"


def _livecodebench_row(row: dict, origin: str) -> Task:
    public = private_tests(row.get("public_test_cases") or [], origin)
    tests = public + private_tests(row["private_test_cases"], origin)
    try:
        inputs, outputs = [t["input"] for t in tests], [t["output"] for t in tests]
    except (KeyError, TypeError) as error:
        raise DataError(f"{origin}: a test case needs input and output ({error})") from error
    metadata = _decoded(row.get("metadata")) or {}
    fn_name = metadata.get("func_name") if isinstance(metadata, dict) else None
    text = _text(row, "question_content", origin)
    if row.get("starter_code"):
        text += f"\n\nComplete this:\n```python\n{row['starter_code']}\n```"
        text += "\n\n" + with_instructions("", "function").strip()
    else:
        text = with_instructions(text, "stdin")
    answer = json.dumps({"inputs": inputs, "outputs": outputs, "fn_name": fn_name})
    return Task(_user(text), answer)


def _sandbox_sample_row(row: dict, origin: str) -> Task:
    tests = row["test"].get("input_output") if isinstance(row["test"], dict) else None
    if not isinstance(tests, str) or not _is_tests(tests):
        raise DataError(f"{origin}: test.input_output must be JSON with inputs and outputs")
    return Task(_user(_text(row, "content", origin)), tests)


def _gpqa_row(row: dict, origin: str) -> Task:
    right = _text(row, "Correct Answer", origin).strip()
    choices = [right, *(str(row[f"Incorrect Answer {i}"]).strip() for i in (1, 2, 3))]
    question = _text(row, "Question", origin).strip()
    # A fixed order per question: no seed, no state, the same prompt in every run.
    choices.sort(key=lambda choice: hashlib.sha256((question + choice).encode()).digest())
    lines = [f"{letter}) {choice}" for letter, choice in zip("ABCD", choices, strict=True)]
    text = with_instructions(question + "\n\n" + "\n".join(lines), "choice")
    return Task(_user(text), "ABCD"[choices.index(right)])


def _problem_solution_row(row: dict, origin: str) -> Task | None:
    solution = str(row["solution"])
    if not _LETTER.fullmatch(solution):
        return _value_row("problem", "answer")(row, origin) if row.get("answer") else None
    text = with_instructions(_text(row, "problem", origin), "choice")
    return Task(_user(text), solution.strip())


def _value_row(problem: str, answer: str) -> Callable[[dict, str], Task]:
    def read(row: dict, origin: str) -> Task:
        value = str(row[answer])
        text = with_instructions(_text(row, problem, origin), _answer_form(value))
        return Task(_user(text), value)

    return read


_READERS: list[tuple[tuple[str, ...], Callable[[dict, str], Task | None]]] = [
    (("prompt", "reward_model"), _rl_row),
    (("problem", "reward_model"), _eval_code_row),
    (("question_content", "private_test_cases"), _livecodebench_row),
    (("content", "test"), _sandbox_sample_row),
    (("Question", "Correct Answer", "Incorrect Answer 1"), _gpqa_row),
    (("problem", "solution"), _problem_solution_row),
    (("Problem", "Answer"), _value_row("Problem", "Answer")),
    (("problem", "answer"), _value_row("problem", "answer")),
    (("question", "answer"), _value_row("question", "answer")),
]
