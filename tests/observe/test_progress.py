"""A bar on a terminal, plain lines in a file, nothing on other ranks.

Layer: pure.
"""

import io

import pytest

from megatron_sod.observe import progress as module
from megatron_sod.observe.progress import progress, say


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when a test says so."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(module.time, "monotonic", lambda: Clock.now)
    return Clock


def test_lines_come_every_few_seconds_and_at_the_end(clock, capsys):
    with progress("train", 40, unit="step") as bar:
        for done in range(1, 41):
            clock.now += 1.0
            bar.update(done, loss=0.123456, phase="x")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 8
    assert lines[0] == "train: step 5/40, loss 0.1235, phase x; 35 s left"
    assert lines[-1] == "train: step 40/40, loss 0.1235, phase x; 0 s left"


def test_a_line_without_values_reads_well(clock, capsys):
    with progress("train", 2) as bar:
        bar.update(2)
    assert capsys.readouterr().err == "train: item 2/2, 0 s left\n"


def test_progress_from_the_middle_estimates_from_the_work_done_here(clock, capsys):
    with progress("train", 30, unit="iteration", start=20) as bar:
        for done in range(21, 24):  # resumed after 20
            clock.now += 10.0
            bar.update(done)
    # 10 s each, 7 left after 23
    assert capsys.readouterr().err.splitlines()[-1] == "train: iteration 23/30, 70 s left"


def test_other_ranks_stay_silent(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    say("hello")
    with progress("train", 1) as bar:
        bar.update(1, loss=1.0)
    captured = capsys.readouterr()
    assert captured.err == captured.out == ""


@pytest.mark.parametrize("rank", ["0", None])
def test_rank_zero_speaks_on_stderr(monkeypatch, capsys, rank):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    say("hello")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "hello\n")


def test_a_terminal_gets_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr(module.terminal.sys, "stderr", screen)
    with progress("train", 4) as bar:
        bar.update(4, loss=0.5)
    assert "train" in screen.getvalue() and "4/4" in screen.getvalue()
    assert "loss 0.5" in screen.getvalue()
