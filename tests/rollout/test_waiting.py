"""Where the time of a trajectory goes. Layer: pure, with a clock of its own."""

import pytest

from megatron_sod.rollout import waiting
from megatron_sod.rollout.waiting import Took, Waits, waiting_metrics


def test_waits_add_up_even_when_a_call_fails(monkeypatch):
    times = iter([10.0, 12.5, 20.0, 21.0, 30.0, 34.0])
    monkeypatch.setattr(waiting.time, "monotonic", lambda: next(times))
    waits = Waits()
    with waits.on("generate_s"):
        pass
    with waits.on("tools_s"):
        pass
    with pytest.raises(TimeoutError), waits.on("generate_s"):
        raise TimeoutError
    assert (waits.generate_s, waits.tools_s) == (6.5, 1.0)


def test_the_slowest_trajectory_is_the_one_that_waited_longest_in_all():
    took = [Took(3.0, 0.0, 5, 40), Took(2.0, 2.5, 6, 90), Took(1.0, 0.5, 7, 10)]
    m = waiting_metrics(took)
    assert (m["time/generate_s"], m["time/generate_s_max"], m["time/generate_s_min"]) == (2, 3, 1)
    assert m["time/tools_s"] == 1.0
    assert (m["time/slowest_generate_s"], m["time/slowest_tools_s"]) == (2.0, 2.5)
    assert (m["time/slowest_prompt_length"], m["time/slowest_response_length"]) == (6.0, 90.0)


def test_a_replay_waits_for_nothing():
    assert waiting_metrics([]) == {}
