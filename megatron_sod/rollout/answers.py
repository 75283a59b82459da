r"""Boxed answers as text: found, and spelled one way before they are compared."""

from __future__ import annotations

import re
from fractions import Fraction

# Commas only where they group thousands: "1,2" is a pair.
_NUMBER = re.compile(r"([+-]?)((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+))(?:\.([0-9]+))?")
_GROUPING = re.compile(r"(?<=[0-9])(?:\{,\}|\\[,!; ]|\\!,\\!|,\\!|\\,)(?=[0-9]{3}(?![0-9]))")
_SPACE_IN_NUMBER = re.compile(r"(?<=[0-9]) +(?=[0-9])")
_REPEATING = re.compile(
    r"(?<![0-9])([0-9]{0,30})\.([0-9]{0,30})\\(?:overline|bar)\{([0-9]{1,30})\}"
)
_TEXT = re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf|mbox)\{([^{}]*)\}")
_SUBSTANCE = re.compile(r"(?:[A-Z][a-z]?_?\{?[0-9]*\}?){2,}")


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


def normalised(answer: str) -> str:
    """One spelling per number, digit by digit: floats would call distinct large numbers equal."""
    answer = (
        without_periods(answer)
        .strip()
        .strip("'\"")
        .strip()
        .rstrip(".")
        .replace("\\dfrac", "\\frac")
    )
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


def without_periods(answer: str) -> str:
    r"""Repeating decimals as fractions: -\frac{7}{55} of -0.1\overline{27}."""
    return _REPEATING.sub(lambda match: _fraction(*match.groups()), answer)


def _fraction(whole: str, fixed: str, period: str) -> str:
    """(127 - 1) / 990 of 0.1 and the period 27."""
    nines = (10 ** len(period) - 1) * 10 ** len(fixed)
    value = Fraction(int(whole + fixed + period) - int(whole + fixed or "0"), nines)
    if value.denominator == 1:
        return str(value)
    return f"\\frac{{{value.numerator}}}{{{value.denominator}}}"


def same_symbols(reference: str, given: str) -> bool | None:
    """Whether four or more labels from A on stand in the same order (BADC), and formulas of
    substances have the same digits (N2O), which as products would say the same; None for other
    answers."""
    first, second = (_TEXT.sub(r"\1", text).strip(" $.") for text in (reference, given))
    if len(first) >= 4 and "".join(sorted(first)) == "ABCDEFGHIJ"[: len(first)]:
        return first == second if sorted(first) == sorted(second) else None
    if not (_SUBSTANCE.fullmatch(first) and _SUBSTANCE.fullmatch(second)):
        return None
    first, second = (re.sub("[_{}]", "", text) for text in (first, second))
    elements = [re.sub("[0-9]", "", text) for text in (first, second)]
    return first == second if elements[0] == elements[1] else None
