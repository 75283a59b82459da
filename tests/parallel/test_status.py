"""A rank's record of itself while several threads wait for something.

Layer: pure. What other ranks conclude from records: test_diagnosis; real ranks: test_watch.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from megatron_sod.parallel.status import Status


@pytest.fixture
def ahead():
    """Calls in one other thread, as of a rollout ahead; returns when each is done."""
    with ThreadPoolExecutor(1) as thread:
        yield lambda call, *arguments: thread.submit(call, *arguments).result(10)


def test_a_call_that_ends_in_another_thread_takes_no_patience_from_the_main_one(ahead):
    """The call of a rollout ahead begins before the main thread's work and ends within it."""
    status = Status()
    call = status.may_take(60)
    ahead(call.__enter__)
    with status.may_take(1800):
        ahead(call.__exit__, None, None, None)
        assert status.snapshot()["patience_s"] > 1700, "silence that was announced is no stall"
    assert status.snapshot()["patience_s"] == 0


def test_a_call_that_outlives_the_main_threads_work_leaves_no_patience_behind(ahead):
    status = Status()
    call = status.may_take(60)
    with status.may_take(1800):
        ahead(call.__enter__)
    assert 0 < status.snapshot()["patience_s"] <= 60
    ahead(call.__exit__, None, None, None)
    assert status.snapshot()["patience_s"] == 0, "a rank that hangs now is stalled"


def test_a_short_wait_inside_a_long_one_shortens_nothing():
    status = Status()
    with status.may_take(1800):
        with status.may_take(60):
            assert status.snapshot()["patience_s"] > 1700
        assert status.snapshot()["patience_s"] > 1700


def test_the_end_of_announced_work_is_a_sign_of_life():
    status = Status()
    status._touched -= 100
    with status.may_take(60):
        assert status.snapshot()["quiet_s"] >= 100
    assert status.snapshot()["quiet_s"] < 50
