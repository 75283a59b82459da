"""The accounts of a rollout: every group ends exactly once, whatever happens on the way.

Layer: pure. With real actors: test_controller.py.
"""

import random
from collections import Counter
from dataclasses import replace

import pytest

from megatron_sod.errors import RolloutError
from megatron_sod.rollout.groups import GroupBoard, GroupRequest, GroupResult
from megatron_sod.rollout.waiting import Took
from megatron_sod.types import Prompt
from tests.helpers.tiny import synthetic_trajectories

SIZE = 3
PLAIN = synthetic_trajectories(2, 1, vocab_size=11, seed=0)[0]


def _requests(count, tag="1"):
    return [
        GroupRequest(Prompt(f"p:{i}", [1, 2], "7", "tiny_world"), tag, SIZE) for i in range(count)
    ]


def _result(group, *reasons):
    reasons = reasons or ("answer",) * SIZE
    return GroupResult(
        [
            replace(PLAIN, trajectory_id=group.trajectory_id(i), finish_reason=reason)
            for i, reason in enumerate(reasons)
        ],
        Counter(sandbox_retries=1),
        took=[Took(1.0, 0.5, 2, 7)] * SIZE,
    )


def _ids(trajectories):
    return [t.trajectory_id for t in trajectories]


def _all_ids(groups):
    return [g.trajectory_id(i) for g in groups for i in range(SIZE)]


def test_results_come_in_the_order_asked_for_whatever_order_they_end_in():
    groups = _requests(4)
    board = GroupBoard(groups, max_in_flight=100)
    started = [board.start_next() for _ in range(5)]
    assert started == [0, 1, 2, 3, None]
    for index in (2, 0, 3, 1):
        board.finish(index, _result(groups[index]))
    assert _ids(board.result().trajectories) == _all_ids(groups)
    assert board.counts == {"sandbox_retries": 4}
    assert len(board.result().took) == 4 * SIZE


@pytest.mark.parametrize(("bound", "expected"), [(1, 1), (3, 1), (5, 1), (6, 2), (100, 4)])
def test_no_more_trajectories_are_in_flight_than_allowed_but_always_one_group(bound, expected):
    board = GroupBoard(_requests(4), max_in_flight=bound)
    running = 0
    while board.start_next() is not None:
        running += 1
    assert running == board.num_running == expected


def test_a_group_whose_worker_died_runs_again_and_counts_once():
    groups = _requests(2)
    board = GroupBoard(groups, max_in_flight=100)
    assert [board.start_next(), board.start_next()] == [0, 1]
    board.requeue(0)
    assert board.start_next() == 0
    for index in (0, 1):
        board.finish(index, _result(groups[index]))
    assert _ids(board.result().trajectories) == _all_ids(groups)
    assert board.counts["groups_requeued"] == 1


def test_trajectories_missing_or_returned_twice_are_an_error():
    groups = _requests(1)
    whole = _result(groups[0]).trajectories
    for wrong in (whole[:-1], [*whole[:-1], whole[0]]):
        board = GroupBoard(groups, max_in_flight=9)
        board.start_next()
        with pytest.raises(RolloutError, match="p:0/1/0 to p:0/1/2, each once"):
            board.finish(0, GroupResult(wrong))


def test_what_is_not_needed_is_carried_with_all_it_has():
    groups = _requests(4)
    board = GroupBoard(groups, max_in_flight=9, num_needed=2)  # three groups at a time
    assert [board.start_next() for _ in range(4)] == [0, 1, 2, None]
    board.finish(1, _result(groups[1]))
    assert not board.is_enough
    assert board.start_next() == 3
    board.finish(3, _result(groups[3]))
    assert board.is_enough and board.start_next() is None
    board.finish(0, _result(groups[0], "answer", "interrupted", "max_turns"))
    board.finish(2, _result(groups[2]))  # complete in the same moment, but one too many
    result = board.result()
    assert _ids(result.trajectories) == _all_ids([groups[1], groups[2]])
    assert [(c.prompt.prompt_id, len(c.begun)) for c in result.carried] == [("p:0", 3), ("p:3", 3)]


def test_a_group_is_carried_once_at_most():
    fresh = _requests(3, tag="2")
    begun = replace(_requests(1)[0], begun=tuple(_result(_requests(1)[0]).trajectories))
    board = GroupBoard([begun, *fresh], max_in_flight=100, num_needed=2)
    while board.start_next() is not None:
        pass
    for index in (1, 2):
        board.finish(index, _result(fresh[index - 1]))
    assert not board.is_enough, "two are complete, but the one begun earlier is not among them"
    board.finish(0, _result(begun))
    assert board.is_enough
    board.finish(3, _result(fresh[2], *["interrupted"] * SIZE))
    result = board.result()
    assert _ids(result.trajectories)[:SIZE] == _all_ids([begun])
    assert [c.tag for c in result.carried] == ["2", "2"]


def test_random_histories_lose_and_duplicate_nothing():
    rng = random.Random(3)
    for _ in range(200):
        groups = _requests(rng.randint(1, 6))
        needed = rng.choice([None, rng.randint(1, len(groups))])
        board = GroupBoard(groups, max_in_flight=rng.randint(1, 12), num_needed=needed)
        running = []
        while True:
            while (index := board.start_next()) is not None:
                running.append(index)
            if not running:
                break
            index = running.pop(rng.randrange(len(running)))
            if rng.random() < 0.3:
                board.requeue(index)
            else:
                reasons = ["interrupted" if board.is_enough else "answer"] * SIZE
                board.finish(index, _result(groups[index], *reasons))
        result = board.result()
        carried = [g.trajectory_id(i) for g in result.carried for i in range(SIZE)]
        assert sorted(_ids(result.trajectories) + carried) == sorted(_all_ids(groups))
        assert len(result.trajectories) == SIZE * (needed or len(groups))
