"""Ranks that wait for rank 0 learn what it says, its own time limit included.

Layer: pure; store and clock are stand-ins. Real ranks: tests/end_to_end.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_sod.errors import PeerFailed
from megatron_sod.parallel import share

LIMIT_S = 1800.0


class Store:
    """Rank 0 gives up after its limit and the `late_s` that takes."""

    def __init__(self, late_s: float):
        self.now, self._due = 0.0, LIMIT_S + late_s

    def check(self, keys):
        return self.now >= self._due

    def get(self, key):
        return b"error RolloutError: the rollout took longer than rollout.timeout_s"

    def sleep(self, seconds):
        self.now += 1.0


@pytest.mark.parametrize(
    ("late_s", "says"), [(30, "rank 0 failed: error RolloutError"), (1e9, "did not finish within")]
)
def test_a_rank_that_waits_lets_rank_0_say_first_that_the_time_is_over(monkeypatch, late_s, says):
    store = Store(late_s)
    clock = SimpleNamespace(monotonic=lambda: store.now, sleep=store.sleep)
    monkeypatch.setattr(share, "time", clock)
    with pytest.raises(PeerFailed, match=says):
        share._wait(store, "key", LIMIT_S)
    assert store.now < LIMIT_S + 100, "a rank 0 that is lost is not waited for"
