"""Grades a final answer. Sees the student's own final turn only, never tool output."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable

from megatron_sod.errors import ConfigError
from megatron_sod.rollout.math_check import MathChecker
from megatron_sod.types import Prompt

Grader = Callable[[Prompt, str], float]

# Commas only where they group thousands: "1,2" is a pair.
_NUMBER = re.compile(r"(-?)((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+))(?:\.([0-9]+))?")
_COMMAND = re.compile(r"\\[A-Za-z]+")  # \text, \mathrm
_MATH = MathChecker()


def make_grader(kind: str, function: str | None = None) -> Grader:
    """The grader a configuration names.

    Raises:
        ConfigError: the imported function does not exist.
    """
    if kind == "import":
        return _imported(function or "")
    return {"auto": grade_auto, "math": grade_math, "choice": grade_choice, "exact": grade_exact}[
        kind
    ]


def last_boxed(text: str) -> str | None:
    r"""Content of the last \boxed{...} after the last </think>, braces balanced; None if absent."""
    text = text.rpartition("</think>")[2]
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed{")
    for at in range(begin - 1, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[begin:at]
    return None


def grade_exact(prompt: Prompt, text: str) -> float:
    """1 when the boxed answer is the reference answer, character by character."""
    boxed = last_boxed(text)
    return float(boxed is not None and boxed.strip() == prompt.answer.strip())


def grade_math(prompt: Prompt, text: str) -> float:
    """1 when the boxed answer is mathematically the reference answer."""
    boxed = last_boxed(text)
    if boxed is None:
        return 0.0
    reference = _reference(prompt.answer)
    if _normalised(boxed) == _normalised(reference):
        return 1.0
    return float(_MATH.equal(reference, boxed))


def grade_choice(prompt: Prompt, text: str) -> float:
    """1 when the boxed letter is the reference letter."""
    boxed = last_boxed(text)
    letters = re.findall(r"[A-Za-z]", _COMMAND.sub("", boxed or ""))
    return float(len(letters) == 1 and letters[0].upper() == prompt.answer.strip().upper())


def grade_auto(prompt: Prompt, text: str) -> float:
    """Letters are graded as choices, the tiny world exactly, everything else as mathematics."""
    if prompt.data_source == "tiny_world":
        return grade_exact(prompt, text)
    if re.fullmatch(r"\s*[A-Ja-j]\s*", prompt.answer):
        return grade_choice(prompt, text)
    return grade_math(prompt, text)


def _reference(answer: str) -> str:
    """GSM8K writes its solution before `#### 42`."""
    return answer.rpartition("####")[2].strip()


def _normalised(answer: str) -> str:
    """One spelling per number, digit by digit: floats would call distinct large numbers equal."""
    answer = answer.strip().rstrip(".").replace("\\dfrac", "\\frac")
    if match := _NUMBER.fullmatch(answer):
        sign, whole, fraction = match.groups(default="")
        whole, fraction = whole.replace(",", "").lstrip("0") or "0", fraction.rstrip("0")
        number = f"{whole}.{fraction}" if fraction else whole
        return number if number == "0" else sign + number
    return answer.replace(" ", "")


def _imported(path: str) -> Grader:
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"reward.function {path!r}: cannot be imported ({error}); give module.path:function "
            "of a function (prompt, final_text) -> float that PYTHONPATH reaches"
        ) from error
