"""What a student is told beside the task: how to work, and in which form to answer."""

from __future__ import annotations

_WORK = (
    "Analyse the task and plan first, then solve it step by step. You can run Python with the "
    "code_interpreter tool to compute or to check."
)
_ANSWER = {
    "math": "Put the final answer in \\boxed{}, without units.",
    "choice": "Put the letter of the right choice in \\boxed{}.",
    "stdin": "Your final message must hold the whole program in one fenced block that starts "
    "with ```python. It reads from standard input and prints to standard output.",
    "function": "Your final message must hold the whole solution in one fenced block that starts "
    "with ```python. It defines what the task names and reads no input.",
}
# Tasks whose text already says so are left as they are.
_ALREADY = {"math": "\\boxed", "choice": "\\boxed", "stdin": "```python", "function": "```python"}


def with_instructions(task: str, form: str, *, add_work: bool = True) -> str:
    """The task followed by how to work and how to answer.

    Args:
        form: math | choice | stdin | function.
        add_work: False for tasks that come with their own wording.
    """
    parts = [task.rstrip()]
    if add_work:
        parts.append(_WORK)
    if _ALREADY[form] not in task:
        parts.append(_ANSWER[form])
    return "\n\n".join(parts)
