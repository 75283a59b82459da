"""Whether two answers are equal as mathematics. Only the helper process imports this module.

math-verify compares numbers to six decimals, which calls all small ones equal: 1.6e-19 and 9.1e-31.
Here they must also agree in their first digits, wherever in an answer they stand.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from math_verify import grader, parse, verify

_SMALL = 0.01  # six decimals say less than _CLOSE below
_CLOSE = 1e-4  # of the larger: the fourth digit


def equal(reference: str, given: str) -> bool:
    """Without a time limit, so that the caller's alarm is the only one."""
    gold, answer = _parsed(reference), _parsed(given)
    # Sets and relations: (3, oo) is x > 3.
    options: dict[str, Any] = {"timeout_seconds": None, "allow_set_relation_comp": True}
    return bool(gold and answer and verify(gold, answer, **options))


@lru_cache(maxsize=256)  # parsing takes most of the time, and references come again
def _parsed(answer: str) -> list:
    return parse(f"${answer}$", parsing_timeout=None)


def _numerically_equal(a: Any, b: Any, *precision: int) -> bool:
    return _to_six_decimals(a, b, *precision) and _of_one_size(a, b)


def _of_one_size(a: Any, b: Any) -> bool:
    """False when both are small numbers, or the same formula plus small numbers, of other sizes."""
    try:
        # x - 1.6e-19 and x - 9.1e-31: what does not depend on x, and the rest
        (x, rest), (y, other) = (e.as_independent(*e.free_symbols, as_Add=True) for e in (a, b))
        x, y = complex(x.doit()), complex(y.doit())
    except (AttributeError, TypeError, OverflowError):
        return True  # a matrix, whose elements have been compared; a number no float holds
    largest = max(abs(x), abs(y))
    return rest != other or largest >= _SMALL or abs(x - y) <= _CLOSE * largest


_to_six_decimals = grader.sympy_numeric_eq
grader.sympy_numeric_eq = _numerically_equal
