"""Silence is noticed, slowness is not.

Layer: pure, a clock that the test moves. With actors: test_fleet.py, test_lost_actors.py.
"""

from __future__ import annotations

import pytest

from megatron_sod.rollout.pulse import Pulse

LIMIT_S, START_S = 30.0, 100.0


class Ward:
    """Actors that answer `delay_s` after they were asked; None: never."""

    def __init__(self, **delays_s):
        self.now, self.delays_s, self.num_asked = 0.0, delays_s, 0
        self.pulse = Pulse(
            self._ask,
            lambda due: due is not None and due <= self.now,
            limit_s=LIMIT_S,
            start_limit_s=START_S,
            clock=lambda: self.now,
        )

    def _ask(self, name):
        self.num_asked += 1
        delay_s = self.delays_s[name]
        return None if delay_s is None else self.now + delay_s

    def watch(self, seconds, step_s=0.5):
        """Who was silent for too long, and when that was first said."""
        found, end = {}, self.now + seconds
        while self.now < end:
            for name, _ in self.pulse.silent(self.delays_s):
                found.setdefault(name, self.now)
            self.now += step_s
        return found


def test_an_actor_that_stops_answering_is_named_within_the_limit_and_a_few_looks():
    ward = Ward(a=0.1, b=0.1)
    assert ward.watch(20) == {}
    ward.delays_s["b"], stopped_at = None, ward.now
    found = ward.watch(60)
    assert list(found) == ["b"]
    assert LIMIT_S < found["b"] - stopped_at <= LIMIT_S + 3 * ward.pulse.interval_s


def test_forward_passes_just_below_the_limit_are_slow_and_not_silent():
    ward = Ward(a=LIMIT_S - 3)
    assert ward.watch(3600) == {}
    assert 100 < ward.num_asked < 140, "asked again after each answer and not before"


@pytest.mark.parametrize(("delay_s", "is_named"), [(START_S - 5, False), (None, True)])
def test_until_its_first_answer_an_actor_is_starting_and_has_longer(delay_s, is_named):
    ward = Ward(a=0.1, new=delay_s)
    found = ward.watch(START_S + 10)
    assert set(found) == ({"new"} if is_named else set())
    assert not is_named or found["new"] > START_S


def test_time_in_which_nobody_looked_is_nobodys_silence():
    """An hour of training, a debugger, a machine frozen as a whole: the answer comes after it."""
    ward = Ward(a=0.1)
    ward.watch(10)
    ward.delays_s["a"] = 3600 + 10  # asked before the pause, answered after it
    ward.watch(3)
    ward.now += 3600
    assert ward.watch(20) == {}
    ward.delays_s["a"] = None
    assert set(ward.watch(LIMIT_S + 10)) == {"a"}, "and then the limit holds as ever"


def test_a_new_actor_in_the_same_place_starts_with_a_clean_record():
    ward = Ward(old=0.1)
    ward.watch(4)
    ward.delays_s = {"old": None}
    ward.watch(LIMIT_S - 5)
    ward.delays_s = {"new": 0.1}
    assert ward.watch(60) == {} and not ward.pulse.is_anyone_silent


def test_a_short_limit_is_kept_too():
    pulse = Pulse(lambda _: 0, lambda _: False, limit_s=1.0, start_limit_s=1.0)
    assert pulse.interval_s <= 0.25
