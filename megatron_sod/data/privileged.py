"""What a privileged teacher reads: the student's task with its answer, or a hint, added.

The teacher scores the student's own response after this prompt, so the prompt ends at the same
assistant marker and in the same thinking mode.
"""

from __future__ import annotations

from megatron_sod.data.chat import ChatFormat
from megatron_sod.errors import DataError
from megatron_sod.observe.progress import say
from megatron_sod.types import Prompt

_ADDITIONS = {
    "answer": "\n\nThe reference answer to this task, for you alone:\n{text}\n\n"
    "Now solve the task yourself, step by step, and use the tool where it helps.",
    "hint": "\n\nA hint for this task, for you alone:\n{text}\n\n"
    "Now solve the task yourself, step by step, and use the tool where it helps.",
}


def privileged_ids(
    chat: ChatFormat, messages: list[dict], kind: str, text: str, *, max_extra_length: int
) -> list[int] | None:
    """Ids of the prompt with `text` in its last user message; None when there is no text.

    Args:
        kind: "answer" or "hint".
        max_extra_length: tokens by which the prompt may grow; `text` is cut from the right to fit.
    Returns:
        None as well when even the wording around the text does not fit.
    """
    text = text.strip()
    limit = len(chat.prompt_ids(messages)) + max_extra_length
    ids = chat.plain_ids(text)
    while text:
        prompt = chat.prompt_ids(_with_addition(messages, _ADDITIONS[kind].format(text=text)))
        if len(prompt) <= limit:
            return prompt
        ids = ids[: len(ids) - (len(prompt) - limit)] if len(prompt) - limit < len(ids) else []
        text = chat.decode(ids).strip("\ufffd \n")
    return None


def _with_addition(messages: list[dict], addition: str) -> list[dict]:
    last = max(i for i, message in enumerate(messages) if message["role"] == "user")
    changed = {**messages[last], "content": messages[last]["content"] + addition}
    return [*messages[:last], changed, *messages[last + 1 :]]


def teacher_prompts(
    prompts: list[Prompt], chat: ChatFormat, kind: str, *, max_extra_length: int
) -> dict[str, list[int]]:
    """prompt_id -> ids the teacher reads; prompts without an answer or hint are counted and said.

    Raises:
        DataError: no prompt has one.
    """
    found = {}
    for prompt in prompts:
        text = prompt.hint if kind == "hint" else prompt.answer
        ids = privileged_ids(chat, prompt.messages, kind, text, max_extra_length=max_extra_length)
        if ids is not None:
            found[prompt.prompt_id] = ids
    if not found:
        raise DataError(
            f"teacher.privileged {kind}: none of {len(prompts)} prompts has one that fits into "
            f"teacher.max_privileged_length {max_extra_length}; add the column data.hint_key or "
            "data.answer_key names, or raise the limit"
        )
    if len(found) < len(prompts):
        say(
            f"data: {len(prompts) - len(found)} of {len(prompts)} prompts have no {kind} for the "
            "teacher; they get no distillation term"
        )
    return found
