"""The demo's world: left-to-right arithmetic that needs one `code_interpreter` call per operation.

    user       Compute left to right: 41 + 31 * 7
    assistant  <tool_call> ... "print(41+31)" ... </tool_call>
    tool       72
    assistant  <tool_call> ... "print(72*7)" ... </tool_call>
    tool       504
    assistant  \\boxed{504}

Calls are stateless, so each dependent call carries the earlier result in its code. A model must
copy digits without a slip and know which operation comes next; both are learnt by small models
within minutes. Training and held-out tasks are disjoint by construction: the split is a function
of the expression's hash.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_sod.errors import DataError

SPLITS = ("train", "heldout")
HELDOUT_SHARE = 5  # one expression in five is held out
MAX_ABS_VALUE = 9_999  # results stay short enough to copy
TOOL_FAILURE_TEXT = "TimeoutError: call again"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "code_interpreter",
            "description": "Run Python code and return what it prints.",
            "parameters": {
                "type": "object",
                "properties": {"code": {"type": "string", "description": "Python source"}},
                "required": ["code"],
            },
        },
    }
]


@dataclass(frozen=True)
class Task:
    """One expression: `first` followed by (operator, operand) pairs, applied left to right."""

    first: int
    operations: tuple[tuple[str, int], ...]

    @property
    def question(self) -> str:
        chain = " ".join(f"{operator} {operand}" for operator, operand in self.operations)
        return f"Compute left to right: {self.first} {chain}"

    @property
    def split(self) -> str:
        digest = hashlib.sha256(self.question.encode()).digest()
        return "heldout" if digest[0] % HELDOUT_SHARE == 0 else "train"

    def calls(self) -> list[tuple[str, int]]:
        """(code, result) of each call on the correct path."""
        value, calls = self.first, []
        for operator, operand in self.operations:
            code = f"print({value}{operator}{operand})"
            value = _apply(value, operator, operand)
            calls.append((code, value))
        return calls

    @property
    def answer(self) -> str:
        return str(self.calls()[-1][1])


def _apply(value: int, operator: str, operand: int) -> int:
    if operator == "+":
        return value + operand
    return value - operand if operator == "-" else value * operand


def _random_task(rng: random.Random, num_operations: int) -> Task:
    value = first = rng.randint(10, 99)
    operations: list[tuple[str, int]] = []
    while len(operations) < num_operations:
        operator = rng.choice("+-*")
        operand = rng.randint(2, 9) if operator == "*" else rng.randint(10, 99)
        result = _apply(value, operator, operand)
        if abs(result) <= MAX_ABS_VALUE:
            operations.append((operator, operand))
            value = result
    return Task(first, tuple(operations))


def generate_tasks(
    split: str, num_tasks: int, *, seed: int, num_operations: tuple[int, int] = (1, 4)
) -> list[Task]:
    """`num_tasks` distinct tasks of `split`; the number of operations is uniform in the range.

    Raises:
        DataError: unknown split, or more tasks than distinct expressions can be found.
    """
    if split not in SPLITS:
        raise DataError(f"tiny world: unknown split {split!r}; expected one of {SPLITS}")
    rng = random.Random(f"{split}-{seed}")
    tasks: dict[str, Task] = {}
    for _ in range(100 * num_tasks + 1000):
        if len(tasks) == num_tasks:
            return list(tasks.values())
        task = _random_task(rng, rng.randint(*num_operations))
        if task.split == split:
            tasks.setdefault(task.question, task)
    raise DataError(
        f"tiny world: only {len(tasks)} distinct {split} tasks with {num_operations} operations; "
        f"{num_tasks} were asked for; ask for fewer or widen num_operations"
    )


def tool_call_text(code: str) -> str:
    """The Hermes tool call Qwen3 writes for this code."""
    call = json.dumps({"name": "code_interpreter", "arguments": {"code": code}})
    return f"<tool_call>\n{call}\n</tool_call>"


def conversation(task: Task, *, tool_failure_rate: float, rng: random.Random) -> list[dict]:
    """A clean solution as chat messages; a failed call is repeated until it works."""
    messages: list[dict] = [{"role": "user", "content": task.question}]
    for code, result in task.calls():
        while True:
            messages.append({"role": "assistant", "content": tool_call_text(code)})
            if rng.random() >= tool_failure_rate:
                break
            messages.append({"role": "tool", "content": TOOL_FAILURE_TEXT})
        messages.append({"role": "tool", "content": str(result)})
    messages.append({"role": "assistant", "content": f"\\boxed{{{task.answer}}}"})
    return messages


def conversations(
    num_conversations: int,
    *,
    seed: int,
    num_operations: tuple[int, int] = (1, 4),
    tool_failure_rate: float = 0.0,
) -> Iterator[list[dict]]:
    """Cold-start conversations over training tasks."""
    rng = random.Random(f"conversations-{seed}")
    tasks = generate_tasks("train", num_conversations, seed=seed, num_operations=num_operations)
    for task in tasks:
        yield conversation(task, tool_failure_rate=tool_failure_rate, rng=rng)
