"""What a person sees while a run trains, on a terminal and in a file.

Layer: pure, then one child process behind a pseudo-terminal.
"""

import io
import os
import pty
import re
import subprocess
import sys

import pytest
from rich.console import Console

from megatron_sod.observe import live_view
from megatron_sod.observe.live_view import duration, failed_tools, spark, training_view

METRICS = {
    "rollout/reward_mean": 0.5,
    "rollout/tokens": 20_000.0,
    "rollout/tool_calls_avg": 2.5,
    "rollout/infra_error_rate": 0.0,
    "sod/w_mean": 0.75,
    "sod/d_mean": 0.25,
    "tool/ok_rate": 0.9,
    "tool/user_error_rate": 0.1,
    "actor/grad_norm": 1.5,
    "time/total_s": 10.0,
    "time/eval_s": 2.0,
    "memory/host_rss_sum_gb": 1.25,
    "memory/gpu_used_max_gb": 61.0,
}


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when a test says so."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(live_view.time, "monotonic", lambda: Clock.now)
    return Clock


def _drawn(view, width=100) -> str:
    screen = io.StringIO()
    Console(file=screen, width=width).print(view)
    return screen.getvalue()


def test_the_panel_shows_what_matters(clock):
    view = live_view._PanelView("demo", 40, 10)
    view.evaluated("student", 0.41, (0.35, 0.47))
    view.evaluated("teacher", 1.0, (0.985, 1.0))
    for iteration in (11, 12):
        view.phase("rollout")
        clock.now += 8.0
        view.update(iteration, METRICS)
    view.phase("train")
    clock.now += 3.0
    text = _drawn(view)
    for words in (
        "demo",
        "iteration 12/40",
        "3 min 44 s left",  # 28 iterations of 8 s
        "train, 3.0 s",
        "student 41.0% (35.0% to 47.0%), teacher 100.0%",
        "0.500",
        "0.750",
        "2.5 calls per trajectory, 10.0% failed, 0.0% of trajectories lost",
        "2,500 tokens/s, 8.0 s per iteration",
        "trainers 1.2 GB of host memory, fullest GPU 61.0 GB",
    ):
        assert words in text, words


def test_the_panel_is_whole_before_anything_is_known(clock):
    text = _drawn(live_view._PanelView("demo", 40, 0))
    assert "iteration 0/40" in text and "time left unknown" in text and "tokens/s" not in text


def test_the_panel_fits_a_narrow_terminal(clock):
    view = live_view._PanelView("demo", 40, 0)
    view.update(1, METRICS)
    assert max(len(line) for line in _drawn(view, width=60).splitlines()) <= 60


def test_a_file_gets_plain_lines(clock, capsys):
    with training_view("demo", 4) as view:
        clock.now += 60.0  # evaluations before training are no iteration
        for iteration in (1, 2, 3, 4):
            view.phase("rollout")
            clock.now += 8.0
            view.update(iteration, METRICS)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert lines[0] == (
        "demo: iteration 1/4, reward 0.5, w 0.75, d 0.25, grad_norm 1.5, s/it 10, "
        "tokens/s 2500, failed tools 10.0%; 24 s left"
    )


def test_other_ranks_show_nothing(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with training_view("demo", 4) as view:
        view.phase("rollout")
        view.update(1, METRICS)
        view.evaluated("student", 0.5, (0.4, 0.6))
    assert capsys.readouterr() == ("", "")


def test_no_call_no_failure_rate():
    assert failed_tools({}) is None
    assert failed_tools({"tool/ok_rate": 0.0, "tool/timeout_rate": 0.0}) is None


def test_a_spark_spans_its_values():
    assert spark([0.0, 0.5, 1.0]) == "▁▅█" and spark([2.0, 2.0]) == "▁▁"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(3.21, "3.2 s"), (47, "47 s"), (320, "5 min 20 s"), (11100, "3 h 5 min")],
)
def test_durations_read_well(seconds, words):
    assert duration(seconds) == words


CHILD = f"""
import os, sys, time
from pathlib import Path
from megatron_sod.observe import terminal
from megatron_sod.observe.live_view import training_view
from megatron_sod.observe.progress import say
with terminal.others_into(Path(sys.argv[1])):
    with training_view("demo", 2) as view:
        view.phase("rollout")
        time.sleep(0.6)
        os.write(2, b"noise of a library\\n")
        say("a line of ours")
        view.update(2, {METRICS})
        view.phase("save")
"""


def test_a_terminal_gets_a_panel_that_redraws_itself(tmp_path):
    main, end = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"}
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path / "log")],
        stdin=end, stdout=end, stderr=end, env=environment,
    )  # fmt: skip
    os.close(end)
    seen = b""
    while True:
        try:
            part = os.read(main, 65536)
        except OSError:  # what Linux raises once the child's end is closed
            break
        seen += part
        if not part:
            break
    os.close(main)
    assert child.wait(timeout=60) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode())
    assert "a line of ours" in text and "iteration 2/2" in text and "2,500 tokens/s" in text
    assert "noise" not in text and "noise of a library" in (tmp_path / "log").read_text()
    assert seen.count(b"iteration 0/2") >= 2  # drawn again while the phase ran
    assert b"\x1b[?25h" in seen  # the cursor is shown again at the end
