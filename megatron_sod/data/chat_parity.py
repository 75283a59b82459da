"""Whether the teacher was taught to read chats as the student's rollouts write them.

The teacher scores ids rendered by the student's template. Where its own template or thinking mode
differs, template tokens dominate d_k: the teacher is punished for a format it has never seen.
"""

from __future__ import annotations

from collections.abc import Callable

from megatron_sod.data.chat import ChatFormat
from megatron_sod.errors import DataError

_QUESTION = [{"role": "user", "content": "What is 6 * 7?"}]
_EPISODE = [
    *_QUESTION,
    {"role": "assistant", "content": "I compute it."},
    {"role": "tool", "content": "42"},
    {"role": "assistant", "content": "\\boxed{42}"},
]


def check_same_chat(student: ChatFormat, open_teacher: Callable[[], ChatFormat]) -> None:
    """Render one tool episode both ways and compare ids.

    Args:
        open_teacher: makes the teacher's ChatFormat with the same tools and thinking mode.
    Raises:
        DataError: with the first difference, or when the teacher's template cannot be used.
    """
    try:
        teacher = open_teacher()
    except DataError as error:
        raise DataError(f"teacher's chat format: {error}; {_REMEDY}") from error
    renders: list[tuple[str, Callable[[ChatFormat], list[int]]]] = [
        ("a prompt up to the assistant marker", lambda chat: chat.prompt_ids(_QUESTION)),
        ("two tool results", lambda chat: chat.observation_ids(["42", "43"])),
        ("a whole tool episode", lambda chat: chat.conversation(_EPISODE).token_ids),
        ("the end-of-turn token", lambda chat: [chat.end_of_turn_id]),
    ]
    for what, render in renders:
        left, right = render(student), render(teacher)
        if left != right:
            at = next(
                (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b),
                min(len(left), len(right)),
            )
            raise DataError(
                f"student and teacher render {what} differently: from token {at} on, the student "
                f"has {student.decode(left[at : at + 8])!r} and the teacher "
                f"{teacher.decode(right[at : at + 8])!r} (chat template or thinking mode); "
                f"{_REMEDY}"
            )


_REMEDY = (
    "copy the student's chat template into the teacher's directory if the teacher was trained on "
    "it, or set teacher.allow_template_mismatch=true and watch d_k of the first tokens of each step"
)
