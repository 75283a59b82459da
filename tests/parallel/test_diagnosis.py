"""Who is to blame, from the ranks' records alone.

Layer: pure. The records of real ranks: test_watch.
"""

from __future__ import annotations

import pytest

from megatron_sod.parallel.diagnosis import as_table, describe, diagnose

TIMEOUT = 10.0


def collective(name="all_reduce", number=7, shape=(4,), dtype="float32", group="TP", ranks="0,1"):
    return dict(name=name, number=number, shape=shape, dtype=dtype, group=group, ranks=ranks)


def record(**changed):
    return {
        "host": "a",
        "pid": 5,
        "state": "running",
        "iteration": 3,
        "phase": "train",
        "micro_batch": (2, 4),
        "collective": collective(),
        "in_collective": True,
        "quiet_s": 1.0,
        "patience_s": 0.0,
        "unheard_s": 0.1,
        "is_gone": False,
        **changed,
    }


def verdict(*table):
    return diagnose(table, stall_timeout_s=TIMEOUT)


STUCK = dict(quiet_s=TIMEOUT + 1)


def test_moving_ranks_are_healthy_even_when_one_is_quiet_for_long():
    assert verdict(record(), record(**STUCK)) is None


def test_announced_silence_of_one_rank_excuses_those_that_wait_for_it():
    assert verdict(record(**STUCK), record(**STUCK, patience_s=100.0)) is None
    assert verdict(record(**STUCK), record(**STUCK, patience_s=0.0)) is not None


def test_a_dead_rank_is_named_at_once():
    found = verdict(record(), record(is_gone=True, pid=9))
    assert found.ranks == (1,) and not found.is_expected
    assert "rank 1 (pid 9 on a" in found.message and "died" in found.message


def test_a_rank_that_failed_or_finished_is_not_a_dead_one():
    assert verdict(record(), record(is_gone=True, state="failed")).is_expected
    assert verdict(record(), record(is_gone=True, state="ended")) is None


def test_a_failing_rank_has_time_to_clean_up_but_not_for_ever():
    assert verdict(record(**STUCK), record(state="failed", in_collective=False)) is None
    found = verdict(record(**STUCK), record(**STUCK, state="failed", in_collective=False))
    assert found.ranks == (1,)


def test_a_rank_on_another_machine_is_judged_by_its_silence():
    assert verdict(record(), record(is_gone=None, unheard_s=TIMEOUT - 1)) is None
    found = verdict(record(), record(is_gone=None, unheard_s=TIMEOUT + 1))
    assert found.ranks == (1,) and "has not been heard of for 10 s" in found.message


def test_when_nobody_moves_the_rank_that_does_not_even_speak_is_the_reason():
    found = verdict(record(**STUCK), record(**STUCK, in_collective=False, unheard_s=TIMEOUT - 1))
    assert found.ranks == (1,) and "has not been heard of for 5 s" in found.message


def test_the_rank_outside_any_collective_is_the_one_the_others_wait_for():
    found = verdict(record(**STUCK), record(**STUCK, in_collective=False), record(**STUCK))
    assert found.ranks == (1,) and "the others wait for rank 1" in found.message


@pytest.mark.parametrize(
    "changed",
    [dict(name="broadcast"), dict(shape=(8,)), dict(dtype="int64")],
)
def test_different_calls_at_the_same_place_are_a_mismatch(changed):
    found = verdict(record(**STUCK), record(**STUCK, collective=collective(**changed)))
    assert found.ranks == (0, 1) and "mismatch" in found.message


@pytest.mark.parametrize(
    "changed",
    [dict(name="recv"), dict(group="DP"), dict(ranks="2,3")],
)
def test_a_receive_and_calls_in_different_groups_are_no_mismatch(changed):
    other = record(**STUCK, collective=collective(**changed))
    found = verdict(record(**STUCK), other)
    assert "mismatch" not in found.message and "no rank has moved for 10 s" in found.message


def test_unequal_shares_of_a_gather_are_no_mismatch():
    one = record(**STUCK, collective=collective("all_gather", shape=(2,)))
    other = record(**STUCK, collective=collective("all_gather", shape=(3,)))
    assert "mismatch" not in verdict(one, other).message


def test_the_rank_with_fewer_collectives_is_behind():
    found = verdict(record(**STUCK), record(**STUCK, collective=collective(number=6)))
    assert found.ranks == (1,) and "behind" in found.message


def test_ranks_without_handles_of_their_collectives_are_still_reported():
    """On GPUs nothing says whether a collective is pending."""
    unknown = record(**STUCK, in_collective=False)
    found = verdict(unknown, unknown)
    assert found is not None and found.ranks == ()


def test_a_rank_is_described_in_one_phrase_and_the_table_has_a_line_each():
    assert describe(record()) == (
        "pid 5 on a, iteration 3, train, micro-batch 2/4, in all_reduce float32[4] #7 of TP"
    )
    bare = record(micro_batch=None, collective=None, in_collective=False, phase="rollout")
    assert describe(bare) == "pid 5 on a, iteration 3, rollout"
    assert as_table([record(), bare]).count("\n") == 2
