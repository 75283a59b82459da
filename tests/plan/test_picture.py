"""The picture shows every second of the step, for engines and trainers alike.

Layer: pure.
"""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from megatron_sod.plan.picture import COLOURS, draw_iterations
from megatron_sod.plan.simulate import IterationTimes

TIMES = dict(
    num_gpus=8, rollout_s=60.0, score_s=20.0, train_s=15.0, transfer_s=1.0, tokens=1e6,
    engine_idle_share=0.25, idle_share=0.2, tool_share=0.1,
)  # fmt: skip


def _bars(file) -> list[tuple[float, float, str]]:
    """(y, width, colour) of every drawn piece."""
    tree = ElementTree.fromstring(file.read_text())
    pieces = [e for e in tree.iter() if e.tag.endswith("rect") and len(e)]
    return [(float(e.get("y")), float(e.get("width")), e.get("fill")) for e in pieces]


def _draw(tmp_path, *times: IterationTimes):
    return draw_iterations([(f"<{t.placement}>", t) for t in times], tmp_path / "out.svg")


def test_every_bar_is_as_long_as_its_step(tmp_path):
    colocated = IterationTimes(placement="colocated", staleness=0, step_s=96.0, **TIMES)
    apart = IterationTimes(placement="disaggregated", staleness=1, step_s=61.0, **TIMES)
    bars = _bars(_draw(tmp_path, colocated, apart))
    lengths = {}
    for y, width, _ in bars:
        lengths[y] = lengths.get(y, 0.0) + width
    first, engines, trainers = (lengths[y] for y in sorted(lengths))
    assert engines == pytest.approx(first * 61 / 96, abs=0.5)
    assert trainers == pytest.approx(engines, abs=0.5)


def test_idle_time_is_drawn_as_waiting(tmp_path):
    times = IterationTimes(placement="colocated", staleness=0, step_s=96.0, **TIMES)
    bars = _bars(_draw(tmp_path, times))
    waiting = sum(width for _, width, colour in bars if colour == COLOURS["waiting"])
    assert waiting / sum(width for _, width, _ in bars) == pytest.approx(15 / 96, abs=0.01)


def test_labels_are_escaped_and_the_same_numbers_give_the_same_file(tmp_path):
    times = IterationTimes(placement="colocated", staleness=0, step_s=96.0, **TIMES)
    first = _draw(tmp_path, times).read_text()
    assert "&lt;colocated&gt;" in first and not re.search("<colocated>", first)
    assert _draw(tmp_path, times).read_text() == first
