"""The text a model reads: deterministic, bounded, and never made of an infrastructure error."""

import pytest

from megatron_sod.sandbox import SandboxResult, render_observation
from megatron_sod.sandbox.observation import clean, shorten


def result(outcome="ok", code=0, out="", err="", status="finished", detail=""):
    return SandboxResult(status, outcome, code, out, err, 0.1, detail, timeout_s=2.5)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (result(out="42\n"), "42"),
        (result(), "[no output]"),
        (result(out=" \n\n"), " "),
        (result(out="a\n", err="warn\n"), "a\nwarn"),
        (result("user_error", 3), "Exit code 3"),
        (result("user_error", 1, "a\n", "ValueError: no\n"), "a\nValueError: no"),
        (
            result("timeout", None, "part\n", status="stopped"),
            "part\nExecution timed out after 2.5 seconds",
        ),
        (result("memory", None, status="stopped"), "Execution stopped: out of memory"),
        (
            result("output_limit", None, "x", status="stopped"),
            "x\nExecution stopped: too much output",
        ),
        (
            result("user_error", None, status="stopped", detail="too many processes"),
            "Execution stopped: too many processes",
        ),
        (result("rejected", 1, err="SyntaxError: null\n", status="not_run"), "SyntaxError: null"),
    ],
)
def test_text(given, text):
    assert given.observation_text() == render_observation(given) == text


def test_infrastructure_error_has_no_text():
    with pytest.raises(ValueError, match="retry the call or drop the trajectory"):
        render_observation(result("infra_error", None, "looks like an answer"))


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("a\r\nb\rc", "a\nb\nc"),
        ("\x1b[2J\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07shown", "shown"),
        ("a\0b\x08\x7f\x85\tc", "ab\tc"),
        ("\ud800", "?"),
        ('File "/sandbox/main.py", line 1', 'File "main.py", line 1'),
        ('File "/tmp/sod-sandbox-71-a1b2/3/main.py"', 'File "main.py"'),
        ("/usr/lib/x.py", "/usr/lib/x.py"),
    ],
)
def test_clean(raw, text):
    assert clean(raw) == text


def test_long_text_keeps_head_and_tail_within_the_limit():
    text = shorten("".join(chr(97 + i % 26) for i in range(1000)), 100)
    assert len(text) <= 100
    assert text.startswith("abc") and text.endswith("kl") and "900 characters left out" in text


def test_long_traceback_keeps_its_last_lines():
    text = result(
        "user_error", 1, err="\n".join(f"line {i}" for i in range(100))
    ).observation_text()
    assert text.startswith("[... 80 lines left out ...]\nline 80\n") and text.endswith("line 99")


def test_limit_below_the_useful_is_refused():
    with pytest.raises(ValueError, match="at least 64"):
        render_observation(result(out="x"), limit_chars=10)
