r"""Boxed answers as text: found, and spelled one way before they are compared."""

from __future__ import annotations

import re

# Commas only where they group thousands: "1,2" is a pair.
_NUMBER = re.compile(r"([+-]?)((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+))(?:\.([0-9]+))?")
_GROUPING = re.compile(r"(?<=[0-9])(?:\{,\}|\\[,!; ]|\\!,\\!|,\\!|\\,)(?=[0-9]{3}(?![0-9]))")
_SPACE_IN_NUMBER = re.compile(r"(?<=[0-9]) +(?=[0-9])")
_UNIT = re.compile(
    r"(?P<value>.*[0-9.}])\s*(?:\\[,; ])*\s*"
    r"(?:\\(?:text|mathrm|mbox|textrm)\{\s*(?P<latex>[A-Za-z][A-Za-z /^0-9]*?)\s*\}"
    r"|(?<=[ ])(?P<plain>[A-Za-z]{3,}(?: [A-Za-z]+)*))\s*\.?"
)
_CONNECTIVES = {"or", "and", "to"}


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


def reference_answer(answer: str) -> str:
    """GSM8K writes its solution before `#### 42`."""
    return answer.rpartition("####")[2].strip()


def split_unit(answer: str) -> tuple[str, str]:
    r"""("5", "cm") of "5\text{ cm}" or "5 dollars"; the unit is empty when there is none."""
    match = _UNIT.fullmatch(answer.strip())
    if match is None:
        return answer, ""
    unit = (match["latex"] or match["plain"] or "").lower()
    if _CONNECTIVES & set(unit.split()):
        return answer, ""
    return match["value"], unit


def normalised(answer: str) -> str:
    """One spelling per number, digit by digit: floats would call distinct large numbers equal."""
    answer = answer.strip().strip("'\"").strip().rstrip(".").replace("\\dfrac", "\\frac")
    answer = _GROUPING.sub("", answer)
    if match := _NUMBER.fullmatch(answer):
        sign, whole, fraction = match.groups(default="")
        whole, fraction = whole.replace(",", "").lstrip("0") or "0", fraction.rstrip("0")
        number = f"{whole}.{fraction}" if fraction else whole
        return number if number == "0" else sign.replace("+", "") + number
    return answer if _SPACE_IN_NUMBER.search(answer) else answer.replace(" ", "")


def splits_a_number(answer: str) -> bool:
    """Whether digits stand beside digits with a plain space between: two numbers, not one."""
    return _SPACE_IN_NUMBER.search(answer.replace("\\ ", "").strip()) is not None
