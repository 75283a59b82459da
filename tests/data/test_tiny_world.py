"""The generated world: exact answers, disjoint splits, the same tasks every time.

Layer: pure. How the tokenizer renders it: tests/data/test_chat.py.
"""

import json
import random
import re

import pytest

from megatron_sod.data import tiny_world
from megatron_sod.data.tiny_world import (
    MAX_ABS_VALUE,
    SPLITS,
    TOOL_FAILURE_TEXT,
    Task,
    conversation,
    conversations,
    generate_tasks,
    tool_call_text,
)
from megatron_sod.errors import DataError


def _python_value(task: Task) -> int:
    """Left to right with Python's own arithmetic: ((41 + 31) * 7)."""
    text = str(task.first)
    for operator, operand in task.operations:
        text = f"({text} {operator} {operand})"
    return eval(text)


def test_a_worked_example():
    task = Task(41, (("+", 31), ("*", 7)))
    assert task.question == "Compute left to right: 41 + 31 * 7"
    assert task.calls() == [("print(41+31)", 72), ("print(72*7)", 504)]  # not 41 + 217
    assert task.answer == "504"


def test_negative_values_are_carried_into_the_next_call():
    task = Task(10, (("-", 99), ("-", 11), ("*", 9)))
    # 10-99 = -89; -89-11 = -100; -100*9 = -900
    assert [code for code, _ in task.calls()] == ["print(10-99)", "print(-89-11)", "print(-100*9)"]
    assert task.answer == "-900"


@pytest.mark.parametrize("split", SPLITS)
def test_answers_equal_python_and_every_call_prints_its_result(split, capsys):
    for task in generate_tasks(split, 211, seed=3):
        assert task.answer == str(_python_value(task))
        for code, result in task.calls():
            exec(code)
            assert capsys.readouterr().out == f"{result}\n"
            assert abs(result) <= MAX_ABS_VALUE


def test_each_call_after_the_first_carries_the_earlier_result():
    for task in generate_tasks("train", 50, seed=1, num_operations=(2, 4)):
        calls = task.calls()
        for (_, before), (code, _) in zip(calls, calls[1:], strict=False):
            assert code.startswith(f"print({before}")


def test_splits_are_disjoint_by_construction():
    # Different seeds on purpose: the split is a property of the expression, not of the draw.
    train = {t.question for seed in (0, 1) for t in generate_tasks("train", 3000, seed=seed)}
    heldout = {t.question for seed in (0, 7) for t in generate_tasks("heldout", 800, seed=seed)}
    assert not train & heldout


def test_split_depends_on_the_question_alone():
    for task in generate_tasks("heldout", 20, seed=0):
        assert Task(task.first, task.operations).split == "heldout"


def test_about_one_expression_in_five_is_held_out():
    rng = random.Random(0)
    tasks = [Task(rng.randint(10, 99), (("+", rng.randint(10, 99)), ("*", 3))) for _ in range(4000)]
    share = sum(task.split == "heldout" for task in tasks) / len(tasks)
    # 52 of 256 digest bytes are multiples of 5: 0.203; four standard deviations are 0.025
    assert share == pytest.approx(0.203, abs=0.026)


@pytest.mark.parametrize("operations", [(1, 4), (2, 2), (4, 4)])
def test_tasks_are_distinct_and_within_the_asked_range(operations):
    tasks = generate_tasks("train", 500, seed=5, num_operations=operations)
    assert len({task.question for task in tasks}) == 500
    lengths = {len(task.operations) for task in tasks}
    assert lengths == set(range(operations[0], operations[1] + 1))


def test_the_same_seed_gives_the_same_tasks_and_another_does_not():
    first = generate_tasks("train", 40, seed=0)
    assert generate_tasks("train", 40, seed=0) == first
    assert generate_tasks("train", 40, seed=1) != first
    assert generate_tasks("train", 60, seed=0)[:40] == first  # asking for more keeps a prefix


def test_tasks_do_not_depend_on_the_hash_seed_or_global_random_state():
    random.seed(1)
    first = [t.question for t in generate_tasks("heldout", 5, seed=0)]
    random.seed(2)
    assert [t.question for t in generate_tasks("heldout", 5, seed=0)] == first


def test_an_unknown_split_and_too_many_tasks_are_refused(monkeypatch):
    with pytest.raises(DataError, match="unknown split 'test'"):
        generate_tasks("test", 1, seed=0)
    # one operation: 90 first numbers x (2 x 90 + 8) operations = 16,920 expressions; of these
    # 2 / 256, about 132, are held out when the share is one in 255
    monkeypatch.setattr(tiny_world, "HELDOUT_SHARE", 255)
    with pytest.raises(DataError, match=r"only \d+ distinct heldout tasks"):
        generate_tasks("heldout", 200, seed=0, num_operations=(1, 1))


def test_a_conversation_without_failures_alternates_calls_and_results():
    task = Task(12, (("*", 3), ("-", 40)))
    messages = conversation(task, tool_failure_rate=0.0, rng=random.Random(0))
    assert [m["role"] for m in messages] == ["user"] + ["assistant", "tool"] * 2 + ["assistant"]
    assert [m["content"] for m in messages if m["role"] == "tool"] == ["36", "-4"]
    assert messages[-1]["content"] == "\\boxed{-4}"
    assert messages[1]["content"] == tool_call_text("print(12*3)")


def test_tool_call_text_is_hermes_json():
    inner = re.fullmatch(r"<tool_call>\n(.+)\n</tool_call>", tool_call_text('print("a")'))
    assert inner is not None
    assert json.loads(inner[1]) == {
        "name": "code_interpreter",
        "arguments": {"code": 'print("a")'},
    }


def test_a_failed_call_is_answered_and_repeated_until_it_works():
    task = Task(12, (("*", 3), ("-", 40)))
    messages = conversation(task, tool_failure_rate=0.7, rng=random.Random(4))
    calls = [m["content"] for m in messages if m["role"] == "assistant"][:-1]
    results = [m["content"] for m in messages if m["role"] == "tool"]
    assert TOOL_FAILURE_TEXT in results and len(calls) == len(results) > 2
    for call, result, next_call in zip(calls, results, calls[1:], strict=False):
        assert (call == next_call) == (result == TOOL_FAILURE_TEXT)
    assert [r for r in results if r != TOOL_FAILURE_TEXT] == ["36", "-4"]


@pytest.mark.parametrize(("rate", "expected"), [(0.0, 0.0), (0.25, 0.25), (0.5, 0.5)])
def test_the_failure_dial_sets_the_share_of_failed_calls(rate, expected):
    results = [
        message["content"]
        for messages in conversations(800, seed=0, tool_failure_rate=rate)
        for message in messages
        if message["role"] == "tool"
    ]
    share = sum(text == TOOL_FAILURE_TEXT for text in results) / len(results)
    assert share == pytest.approx(expected, abs=0.045)


def test_conversations_come_from_training_tasks_only():
    for messages in conversations(300, seed=9):
        question = messages[0]["content"]
        first, *rest = question.removeprefix("Compute left to right: ").split()
        operations = tuple(zip(rest[::2], map(int, rest[1::2]), strict=True))
        assert Task(int(first), operations).split == "train"
