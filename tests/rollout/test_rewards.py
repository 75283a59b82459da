"""Graders against answers people and models write.

Layer: pure, except that equality of formulas asks a helper process. That only the student's final
turn is graded: tests/rollout/test_agent_loop.py.
"""

import os
import signal
import threading
import time

import pytest

from megatron_sod.config.schema import RewardConfig
from megatron_sod.errors import ConfigError, GraderUnavailable
from megatron_sod.rollout.math_check import MathChecker
from megatron_sod.rollout.rewards import grade_auto, grade_math, last_boxed, make_grader
from megatron_sod.types import Prompt
from tests.rollout.answer_pairs import CHOICE, MATH


def _grade(kind: str, reference: str, boxed: str, data_source: str = "") -> float:
    prompt = Prompt("p", [1], reference, data_source)
    return make_grader(RewardConfig(kind=kind))(prompt, f"so \\boxed{{{boxed}}}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\\boxed{7}", "7"),
        ("\\boxed{1} no, \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{2}} done", "\\frac{1}{2}"),
        ("\\boxed{}", ""),
        ("<think>\\boxed{1}</think>\\boxed{2}", "2"),
        ("\\boxed{1}</think> I forgot the box", None),
        ("</think>\\boxed{1}</think>", None),
        ("\\boxed{1 + {2}", None),
        ("no box", None),
        ("", None),
        ("boxed{3}", None),
    ],
)
def test_the_last_box_after_the_last_thought_counts(text, expected):
    assert last_boxed(text) == expected


@pytest.mark.parametrize(
    ("reference", "boxed", "reward"),
    [("504", "504", 1), ("504", " 504 ", 1), ("504", "504.0", 0), ("-4", "4", 0), ("7", "", 0)],
)
def test_exact_answers_are_compared_character_by_character(reference, boxed, reward):
    assert _grade("exact", reference, boxed) == reward


@pytest.mark.parametrize(
    ("reference", "boxed", "reward"),
    [
        ("72", "72", 1),
        ("72", "72.", 1),
        ("72", "072", 1),
        ("72", "72.00", 1),
        ("72", "-72", 0),
        ("0", "-0", 1),
        ("1234567", "1,234,567", 1),
        ("12", "1,2", 0),
        ("#### 1,000".removeprefix("#### "), "1000", 1),
        ("She has 3 x 4 = 12.\n#### 12", "12", 1),
        ("She has 3 x 4 = 12.\n#### 12", "3", 0),
        ("0.5", "0.50", 1),
        ("9007199254740993", "9007199254740992", 0),  # equal as 64-bit floats
        ("9007199254740993", "9007199254740993", 1),
        ("1" * 400, "2" * 400, 0),  # both infinite as floats
        ("\\dfrac{1}{2}", "\\frac{1}{2}", 1),
        ("x + 1", "x+1", 1),
    ],
)
def test_numbers_are_equal_when_their_digits_are(reference, boxed, reward):
    assert _grade("math", reference, boxed) == reward


@pytest.mark.parametrize(
    ("reference", "boxed", "reward"),
    [
        ("0.5", "\\frac{1}{2}", 1),
        ("\\frac{2}{4}", "0.5", 1),
        ("x+1", "1+x", 1),
        ("\\sqrt{8}", "2\\sqrt{2}", 1),
        ("3", "\\frac{1}{2}", 0),
        ("x", "\\frac{", 0),
        ("3", "{}{{", 0),
    ],
)
def test_formulas_are_compared_as_mathematics(reference, boxed, reward):
    assert grade_math(Prompt("p", [1], reference, ""), f"\\boxed{{{boxed}}}") == reward


@pytest.mark.parametrize("theme", MATH)
def test_right_answers_in_other_forms_are_right_and_look_alikes_wrong(theme):
    wrongly = [
        (reference, boxed)
        for reference, boxed, is_right in MATH[theme]
        if _grade("math", reference, boxed) != is_right
    ]
    assert wrongly == []


def test_a_choice_is_one_letter_however_it_is_dressed():
    wrongly = [row for row in CHOICE if _grade("choice", row[0], row[1]) != row[2]]
    assert wrongly == []


def test_the_table_of_answers_is_large_and_has_both_kinds():
    rows = [row for theme in MATH.values() for row in theme] + CHOICE
    assert len(rows) >= 150 and len(set(rows)) == len(rows)
    assert 0.3 < sum(row[2] for row in rows) / len(rows) < 0.7


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("\\boxed{33}", 1.0),
        ("\\boxed{033}", -1.1),  # exact string
        ("\\boxed{33.}", -1.1),
        ("\\boxed{33}" + "x" * 91, -1.1),  # the box begins before the last 100 characters
        ("\\boxed{33}" + "x" * 90, 1.0),
        ("no box", -1.1),
        ("\\boxed{33", -1.1),
        ("</think>\\boxed{33}</think>", 1.0),
    ],
)
def test_the_reference_mode_repeats_the_reference(text, reward):
    grade = make_grader(RewardConfig(kind="reference"))
    assert grade(Prompt("p", [1], "33", ""), text) == reward


def test_an_answer_that_cannot_be_evaluated_is_wrong_within_seconds():
    checker = MathChecker(timeout_s=1.5)
    assert checker.equal("x", "x")  # starts the helper
    started = time.monotonic()
    assert not checker.equal("7", "9^{9^{9^{9}}}")
    assert 1 < time.monotonic() - started < 10
    assert checker.equal("x + 1", "1 + x")  # a new helper serves the next answer


def test_a_killed_helper_is_replaced():
    checker = MathChecker()
    assert checker.equal("x", "x")
    assert checker._helper is not None
    os.kill(checker._helper.pid, signal.SIGKILL)
    checker._helper.wait()
    assert checker.equal("x + 1", "1 + x")


def test_an_endless_answer_is_not_given_to_the_helper():
    checker = MathChecker()
    assert not checker.equal("1", "1+" * 600)
    assert checker._helper is None


REPEATED = ["1", "1 ", "1,", "1.", "0.\\overline{3}", "\\text{a ", "a ", "\\ ", "A1", "{", "5\\, "]


@pytest.mark.parametrize("kind", ["math", "choice"])
def test_a_student_that_repeats_itself_is_graded_at_once(kind):
    reference = {"math": "0.\\overline{3}", "choice": "B"}[kind]
    for piece in REPEATED:
        for text in (piece * 15000, f"0.\\overline{{{piece * 15000}}}", piece * 15000 + "x"):
            started = time.monotonic()
            assert _grade(kind, reference, text) == 0
            assert time.monotonic() - started < 1.0, (piece, text[:20])


@pytest.mark.parametrize(
    ("reference", "boxed", "reward"),
    [
        ("B", "B", 1),
        ("B", "b", 1),
        ("B", "(B)", 1),
        ("B", "\\text{B}", 1),
        ("b ", "B", 1),
        ("B", "C", 0),
        ("B", "AB", 0),
        ("B", "", 0),
    ],
)
def test_choices_are_compared_by_their_only_letter(reference, boxed, reward):
    assert _grade("choice", reference, boxed) == reward


def test_the_kind_follows_from_the_data():
    assert _grade("auto", "4", "4.0", "tiny_world") == 0  # exact
    assert _grade("auto", "4", "4.0", "gsm8k") == 1  # mathematics
    assert _grade("auto", "C", "\\text{c}", "gpqa") == 1  # a letter
    assert grade_auto(Prompt("p", [1], "4", "gsm8k"), "4") == 0  # no box


def own_grader(prompt: Prompt, text: str) -> float:
    return float(text == prompt.answer)


def test_a_function_of_ones_own_can_grade():
    grader = make_grader(
        RewardConfig(kind="import", function="tests.rollout.test_rewards:own_grader")
    )
    assert grader(Prompt("p", [1], "4", ""), "4") == 1.0


@pytest.mark.parametrize("function", ["nowhere:f", "math:nothing", "math", "", None])
def test_a_function_that_cannot_be_imported_is_named(function):
    with pytest.raises(ConfigError, match="module.path:function"):
        make_grader(RewardConfig(kind="import", function=function))


def test_a_helper_killed_in_the_middle_of_a_question_is_asked_again_not_counted_as_wrong():
    checker = MathChecker()
    assert checker.equal("1/2", "0.5")
    process = checker._helper.pid
    os.kill(process, signal.SIGSTOP)  # so that the question below is in the middle
    timer = threading.Timer(0.3, os.kill, (process, signal.SIGKILL))
    timer.start()
    assert checker.equal("1/2", "\\frac{1}{2}")
    assert checker._helper.pid != process


def test_a_helper_that_is_killed_every_time_is_no_verdict(monkeypatch):
    checker = MathChecker()
    monkeypatch.setattr(checker, "_ask", lambda question: ("", -signal.SIGKILL))
    with pytest.raises(GraderUnavailable, match="killed twice"):
        checker.equal("1/2", "0.5")
