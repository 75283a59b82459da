r"""Units of answers: found after the number, and spelled one way. 5 cm is not 5 m.

`5\text{ cm}` and `5 dollars` are written out. Bare letters, as in `5 km`, may as well be a product:
they only tell apart, or agree, when both answers end in letters.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_WRITTEN = re.compile(
    r"(?P<value>.*[0-9.}])\s*(?:\\[,; ])*\s*"
    r"(?:\\(?:text|mathrm|mbox|textrm)\{\s*(?P<latex>[A-Za-z][A-Za-z /^0-9.]*?)\s*\}"
    r"(?P<power>\^(?:[0-9]|\{[0-9]\}))?"
    r"|(?<=[ ])(?P<plain>[A-Za-z]{3,}(?: [A-Za-z]+)*))\s*\.?"
)
_BARE = re.compile(
    r"(?P<value>[+-]?[0-9.,:]*[0-9])\s*(?P<unit>[A-Za-z]+(?:\.[A-Za-z]+)*(?:\^[0-9])?)\.?"
)
_BASE = re.compile(r"(?P<value>[0-9]+)_(?:(?P<digit>[0-9])|\{(?P<digits>[0-9]+)\})")
_CONNECTIVES = {"or", "and", "to"}
_WORD = re.compile(r"([a-z]+)\^?([0-9]?)")
_POWERS = {"square": "2", "sq": "2", "squared": "2", "cubic": "3", "cu": "3", "cubed": "3"}
_PREFIXES = {"kilo": "k", "centi": "c", "milli": "m", "deci": "d", "micro": "u", "nano": "n"}
_SYMBOLS = {
    "meter": "m", "metre": "m", "mtr": "m", "gram": "g", "gm": "g", "ton": "t",
    "liter": "l", "litre": "l", "lt": "l",
    "second": "s", "sec": "s", "minute": "min", "hour": "h", "hr": "h", "day": "d", "year": "yr",
    "inch": "in", "inche": "in", "foot": "ft", "feet": "ft", "yard": "yd", "mile": "mi",
    "pound": "lb", "ounce": "oz", "gallon": "gal", "degree": "deg", "cent": "c", "rupee": "rs",
    "joule": "j", "newton": "n", "watt": "w", "volt": "v",
    "mph": "mi/h", "kmh": "km/h", "kph": "km/h", "kmph": "km/h",
}  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """An answer, parted."""

    value: str
    unit: str = ""  # one spelling per unit: "cm", "m/s^2", "dollar", "base 5"; "" without one
    letters: str = ""  # of a bare unit, in order: they may be variables

    def differs(self, other: Measured) -> bool:
        """Whether both have units that cannot be the same."""
        if not (self.unit and other.unit) or self.unit == other.unit:
            return False
        return not self.letters or self.letters != other.letters  # 2 xy is 2 yx


def measured(answer: str) -> Measured:
    r"""("5", "cm") of "5\text{ cm}", ("60", "mi/h") of "60 miles per hour"; number bases are units
    too: ("4210", "base 5") of "4210_5"."""
    text = answer.strip()
    if match := _BASE.fullmatch(text):
        return Measured(match["value"], f"base {match['digit'] or match['digits']}")
    if match := _WRITTEN.fullmatch(text):
        unit = (match["latex"] or match["plain"]) + (match["power"] or "").strip("^{}")
    elif match := _BARE.fullmatch(text):
        unit = match["unit"]
    else:
        return Measured(answer)
    if _CONNECTIVES & set(unit.lower().split()):
        return Measured(answer)
    letters = "".join(sorted(unit.lower())) if match.re is _BARE else ""
    return Measured(match["value"], _one_spelling(unit), letters)


def _one_spelling(unit: str) -> str:
    """ "cm^2" of "sq. centimeters", "m/s^2" of "meters per second squared"."""
    spelled: list[str] = []
    power = ""
    for word in unit.lower().replace(".", "").replace("/", " / ").split():
        if word in ("squared", "cubed") and spelled:
            spelled[-1] += "^" + _POWERS[word]
        elif word in _POWERS:
            power = word
        elif word in ("/", "per"):
            spelled.append("/")
        else:
            spelled.append(_symbol(word, _POWERS.get(power, "")))
            power = ""
    return "".join([*spelled, power])


def _symbol(word: str, power: str) -> str:
    if match := _WORD.fullmatch(word):
        word, power = match[1], match[2] or power
    singular = word.removesuffix("s")
    prefix = next((p for p in _PREFIXES if singular.startswith(p)), "")
    symbol = _SYMBOLS.get(singular.removeprefix(prefix))
    if symbol is not None:
        word = _PREFIXES.get(prefix, "") + symbol
    elif len(word) > 3 or (len(singular) > 1 and singular in _SYMBOLS.values()):
        word = singular  # but "ms" is no plural
    return f"{word}^{power}" if power else word
