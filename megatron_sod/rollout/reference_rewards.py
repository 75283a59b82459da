r"""The public reference's mathematics reward, number for number. For parity tests and comparisons.

It looks at the last 100 characters, compares the boxed text character by character, and gives every
wrong answer -1.1: its bonus for tool calls always sees none (min(-0.6, -1 + (0 - 2) / 2 * 0.1)).
Source: the defects R1 and R4 of the reference, see docs/rewards.md.
"""

from __future__ import annotations

from megatron_sod.types import Prompt

_WINDOW = 100  # characters
RIGHT, WRONG = 1.0, -1.0


def grade_reference(prompt: Prompt, text: str) -> float:
    """1 or -1.1."""
    boxed = _last_box(text[-_WINDOW:])
    score = RIGHT if boxed == prompt.answer else WRONG
    return score if score > 0 else min(-0.6, score + (0 - 2) / 2 * 0.1)


def _last_box(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for at in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0 and text[at] == "}":
            return text[start + len("\\boxed{") : at]
    return None
