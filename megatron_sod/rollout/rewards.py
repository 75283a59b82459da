"""Grades a final answer. Sees the student's own final turn only, never tool output."""

from __future__ import annotations

import importlib
import re
import threading
from collections.abc import Callable

from megatron_sod.config.schema import RewardConfig
from megatron_sod.errors import ConfigError, GraderUnavailable, SandboxError
from megatron_sod.rollout.answers import (
    last_boxed,
    normalised,
    reference_answer,
    same_symbols,
    splits_a_number,
    without_periods,
)
from megatron_sod.rollout.code_tests import CodeGrader, is_code_task
from megatron_sod.rollout.math_check import MAX_CHARACTERS, MathChecker
from megatron_sod.rollout.reference_rewards import grade_reference
from megatron_sod.rollout.units import measured
from megatron_sod.types import Prompt

Grader = Callable[[Prompt, str], float]

_COMMAND = re.compile(r"\\[A-Za-z]+")  # \text, \mathrm
_LABEL = re.compile(
    r"(?:the )?(?:(?:final|correct) )?(?:answer|option|choice)(?: is)?\b[\s:]*", re.I
)
_LABELLED = re.compile(r"\(?([A-Ja-j])(?:\)|\.|:)+\s*(\S.*)", re.S)
_OTHER_LABEL = re.compile(r"\b(?:[A-Jb-j]|a(?! [a-z]))\b")
_PLAIN = re.compile(r"-?[0-9]+|[A-Za-z]")  # a whole number or a letter
_MATH = MathChecker()


def make_grader(config: RewardConfig, open_sandbox: Callable[[], object] | None = None) -> Grader:
    """The grader a configuration names.

    Args:
        open_sandbox: called when the first code task comes, and again only where it failed.
    Raises:
        ConfigError: the imported function does not exist.
    """
    if config.kind == "import":
        return _imported(config.function or "")
    if config.kind in ("auto", "code"):
        return _AutoGrader(config, open_sandbox)
    return {
        "math": grade_math,
        "choice": grade_choice,
        "exact": grade_exact,
        "reference": grade_reference,
    }[config.kind]


class _AutoGrader:
    """Code by its tests, letters as choices, the tiny world exactly, the rest as mathematics."""

    def __init__(self, config: RewardConfig, open_sandbox: Callable[[], object] | None):
        self._config, self._open_sandbox = config, open_sandbox
        self._opening = threading.Lock()  # answers are graded in threads
        self._code: CodeGrader | None = None

    def __call__(self, prompt: Prompt, text: str) -> float:
        if self._config.kind == "code" or is_code_task(prompt):
            return self._code_grader()(prompt, text)
        return grade_auto(prompt, text)

    def _code_grader(self) -> CodeGrader:
        with self._opening:
            if self._code is None:
                assert self._open_sandbox is not None, "code tasks are graded in a sandbox"
                config = self._config
                try:
                    sandbox = self._open_sandbox()
                except (SandboxError, OSError) as error:
                    raise GraderUnavailable(f"code tests: no sandbox opens ({error})") from error
                self._code = CodeGrader(
                    sandbox, score=config.code_score, max_tests=config.max_code_tests
                )
            return self._code


def grade_exact(prompt: Prompt, text: str) -> float:
    """1 when the boxed answer is the reference answer, character by character."""
    boxed = last_boxed(text)
    return float(boxed is not None and boxed.strip() == prompt.answer.strip())


def grade_math(prompt: Prompt, text: str) -> float:
    """1 when the boxed answer is mathematically the reference answer."""
    boxed = last_boxed(text)
    return float(boxed is not None and same_answer(reference_answer(prompt.answer), boxed))


def same_answer(reference: str, given: str) -> bool:
    """Whether two answers of a mathematical task are the same."""
    plain = normalised(reference), normalised(given)
    if plain[0] == plain[1]:
        return True
    if all(map(_PLAIN.fullmatch, plain)) and plain[0].upper() != plain[1].upper():
        return False  # as math-verify says, thousands of times faster
    if max(map(len, plain)) > MAX_CHARACTERS:
        return False
    by_symbols = same_symbols(reference, given)
    if by_symbols is not None:
        return by_symbols
    mine, wanted = measured(given), measured(reference)
    if mine.differs(wanted) and normalised(wanted.value) != "0":  # 0 m is 0 km
        return False
    if splits_a_number(mine.value) != splits_a_number(wanted.value):
        return False  # math-verify reads "3 3" as 33
    # Bare letters are taken off only where the other answer has the same unit.
    if (mine.unit and wanted.unit) or not (mine.letters or wanted.letters):
        given, reference = mine.value, wanted.value
    if normalised(given) == normalised(reference):
        return True
    return _MATH.equal(without_periods(reference), without_periods(given))


def grade_choice(prompt: Prompt, text: str) -> float:
    """1 when the boxed letter is the reference letter."""
    letter = choice_letter(last_boxed(text) or "")
    return float(letter != "" and letter == prompt.answer.strip().upper())


def choice_letter(boxed: str) -> str:
    r"""B of "(b)", "\text{Option B}" and "B) Acetone"; "" when it is not one letter."""
    plain = _LABEL.sub("", re.sub(r"[{}]", "", _COMMAND.sub("", boxed)))
    letters = re.findall(r"[A-Za-z]", plain)
    if len(letters) == 1:
        return letters[0].upper()
    match = _LABELLED.fullmatch(plain.strip())
    return match[1].upper() if match and not _OTHER_LABEL.search(match[2]) else ""


def grade_auto(prompt: Prompt, text: str) -> float:
    """Letters are graded as choices, the tiny world exactly, everything else as mathematics."""
    if prompt.data_source == "tiny_world":
        return grade_exact(prompt, text)
    return grade_choice(prompt, text) if is_choice_task(prompt) else grade_math(prompt, text)


def is_choice_task(prompt: Prompt) -> bool:
    """Whether the answer is a letter; decided by its form, whatever the data source is called."""
    return re.fullmatch(r"\s*[A-Ja-j]\s*", prompt.answer) is not None


def _imported(path: str) -> Grader:
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"reward.function {path!r}: cannot be imported ({error}); give module.path:function "
            "of a function (prompt, final_text) -> float that PYTHONPATH reaches"
        ) from error
