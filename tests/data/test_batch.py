"""Trajectories to mini-batches: whole groups, lost trajectories left out, the same on every rank.

Layer: pure. Packing itself: tests/data/test_packing.py; losses over batches: tests/train.
"""

from dataclasses import replace

import pytest
import torch

from megatron_sod.data.batch import build_training_batch
from megatron_sod.data.packing import Alignment
from megatron_sod.errors import RolloutError
from tests.helpers.tiny import synthetic_trajectories

VOCAB = 31


@pytest.fixture
def trajectories():
    return synthetic_trajectories(5, 3, vocab_size=VOCAB, seed=1)


def _build(trajectories, *, dp_rank=0, dp_size=1, num_mini_batches=2, budget=120, multiple_of=1):
    return build_training_batch(
        trajectories,
        num_mini_batches=num_mini_batches,
        tokens_per_micro_batch=budget,
        dp_rank=dp_rank,
        dp_size=dp_size,
        alignment=Alignment(pack=multiple_of),
    )


def _rows(batch):
    """(trajectory, step, target) of every row, in order."""
    return [
        (batch.trajectories[t].trajectory_id, int(s), int(y))
        for mini in batch.mini_batches
        for micro in mini.micro_batches
        for t, s, y in zip(micro.trajectory_ids, micro.step_ids, micro.targets, strict=True)
    ]


def _expected_rows(trajectories):
    return sorted(
        (t.trajectory_id, step, token)
        for t in trajectories
        if t.is_valid
        for token, step in zip(t.response_token_ids, t.step_ids, strict=True)
        if step
    )


@pytest.mark.parametrize("dp_size", [1, 2, 3])
def test_every_token_of_the_student_is_trained_on_once_over_all_ranks(trajectories, dp_size):
    batches = [_build(trajectories, dp_rank=r, dp_size=dp_size) for r in range(dp_size)]
    rows = [row for batch in batches for row in _rows(batch)]
    assert sorted(rows) == _expected_rows(trajectories)


@pytest.mark.parametrize("dp_size", [2, 3, 16])
def test_ranks_agree_on_the_number_of_mini_and_micro_batches(trajectories, dp_size):
    shapes = {
        tuple(len(m.micro_batches) for m in _build(trajectories, dp_rank=r, dp_size=dp_size)
              .mini_batches)
        for r in range(dp_size)
    }  # fmt: skip
    assert len(shapes) == 1 and len(shapes.pop()) == 2


def test_lost_trajectories_reach_no_loss_and_no_group_statistic(trajectories):
    lost = trajectories[-1]
    assert lost.finish_reason == "infra_error"
    batch = _build(trajectories)
    assert lost.trajectory_id not in {t.trajectory_id for t in batch.trajectories}
    assert torch.isfinite(batch.group_advantages).all()
    assert len(batch.trajectories) == len(trajectories) - 1


def test_advantages_follow_their_trajectories(trajectories):
    rewards = [0.0, 1.0, 1.0, *[0.5] * 12]
    trajectories = [replace(t, reward=r) for t, r in zip(trajectories, rewards, strict=True)]
    batch = _build(trajectories)
    by_id = {
        t.trajectory_id: float(a)
        for t, a in zip(batch.trajectories, batch.group_advantages, strict=True)
    }
    # rewards 0, 1, 1: mean 2/3, unbiased std sqrt(1/3) = 0.57735; -1.1547, 0.57735, 0.57735
    assert by_id["p0/0"] == pytest.approx(-1.154699, abs=1e-5)
    assert by_id["p0/1"] == by_id["p0/2"] == pytest.approx(0.577349, abs=1e-5)
    assert {v for k, v in by_id.items() if not k.startswith("p0")} == {0.0}


def test_a_group_lies_in_one_mini_batch_and_order_is_kept(trajectories):
    batch = _build(trajectories, num_mini_batches=2)
    prompts = [
        {batch.trajectories[int(i)].prompt_id for m in mini.micro_batches for i in m.trajectory_ids}
        for mini in batch.mini_batches
    ]
    assert prompts == [{"p0", "p1", "p2"}, {"p3", "p4"}]


def test_fewer_prompts_left_than_mini_batches_gives_fewer_mini_batches(trajectories):
    lost = [
        replace(t, finish_reason="infra_error") if t.prompt_id in ("p1", "p2", "p3") else t
        for t in trajectories
    ]
    batch = _build(lost, num_mini_batches=4)
    assert len(batch.mini_batches) == 2  # p0 and p4 are left
    assert all(m.rows.numel() for mini in batch.mini_batches for m in mini.micro_batches)


def test_the_budget_and_the_multiple_are_kept(trajectories):
    longest = max(t.num_tokens for t in trajectories)
    for micro in (
        m
        for mini in _build(trajectories, budget=longest, multiple_of=4).mini_batches
        for m in mini.micro_batches
    ):
        assert micro.token_ids.size(1) % 4 == 0
        assert micro.token_ids.size(1) < longest + 4


def test_a_rank_without_work_gets_empty_packs(trajectories):
    one = [t for t in trajectories if t.prompt_id == "p0"][:2]
    batch = _build(one, dp_rank=2, dp_size=3, num_mini_batches=1)
    assert batch.trajectories == [] and batch.group_advantages.shape == (0,)
    assert [m.rows.numel() for m in batch.mini_batches[0].micro_batches] == [0]


def test_an_iteration_without_a_usable_trajectory_is_an_error(trajectories):
    lost = [replace(t, finish_reason="infra_error") for t in trajectories]
    with pytest.raises(RolloutError, match="all 15 trajectories of this iteration were lost"):
        _build(lost)
