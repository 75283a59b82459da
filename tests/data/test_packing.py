"""Packing: every loss row once, a bounded number of tokens, the same count on every rank.

Layer: pure. Attention over packs: tests/model; the loss over them: tests/train.
"""

import random

import pytest
import torch

from megatron_sod.data.packing import Alignment, PackItem, balanced_bins, pack, plan_micro_batches


def _item(length: int, index: int, *, rng: random.Random, prompt: int = 1) -> PackItem:
    mask = [position >= prompt and rng.random() < 0.6 for position in range(length)]
    return PackItem(
        token_ids=[100 * index + position for position in range(length)],
        loss_mask=mask,
        step_ids=[1 + position // 4 if m else 0 for position, m in enumerate(mask)],
        rollout_logprobs=[-0.25 * position if m else 0.0 for position, m in enumerate(mask)],
        index=index,
    )


def test_a_worked_example():
    first = PackItem([5, 6, 7], [False, True, True], [0, 1, 1], [0.0, -0.5, -1.5], 0)
    second = PackItem([8, 9], [False, True], [0, 1], [0.0, -2.5], 1)
    batch = pack([first, second], Alignment(pack=4))
    # row r predicts token r + 1: rows 0, 1 give 6, 7; row 3 gives 9; 3 fillers round 5 up to 8
    assert batch.token_ids.tolist() == [[5, 6, 7, 8, 9, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 8]
    assert batch.max_seqlen == 3
    assert batch.rows.tolist() == [0, 1, 3]
    assert batch.targets.tolist() == [6, 7, 9]
    assert batch.trajectory_ids.tolist() == [0, 0, 1]
    assert batch.rollout_logprobs.tolist() == [-0.5, -1.5, -2.5]


@pytest.mark.parametrize("multiple_of", [1, 2, 7, 16])
def test_every_loss_row_appears_exactly_once_with_its_own_values(multiple_of):
    rng = random.Random(multiple_of)
    items = [_item(length, i, rng=rng) for i, length in enumerate([1, 2, 13, 7, 1, 31])]
    batch = pack(items, Alignment(pack=multiple_of))
    expected = [
        (item.token_ids[at], item.step_ids[at], item.index, item.rollout_logprobs[at])
        for item in items
        for at in range(1, len(item.token_ids))
        if item.loss_mask[at]
    ]
    values = (batch.targets, batch.step_ids, batch.trajectory_ids, batch.rollout_logprobs)
    found = list(zip(*(v.tolist() for v in values), strict=True))
    assert found == expected and len(set(batch.rows.tolist())) == len(expected)
    after = batch.token_ids[0][batch.rows + 1]
    assert torch.equal(after, batch.targets)  # the next token of the same sequence
    starts = set(batch.cu_seqlens.tolist())
    assert not starts & {row + 1 for row in batch.rows.tolist()}


@pytest.mark.parametrize("multiple_of", [1, 2, 7, 16])
def test_sequence_bounds_and_positions_agree(multiple_of):
    rng = random.Random(1)
    batch = pack(
        [_item(n, i, rng=rng) for i, n in enumerate([5, 1, 9])], Alignment(pack=multiple_of)
    )
    lengths = batch.cu_seqlens.diff().tolist()
    assert batch.position_ids[0].tolist() == [p for n in lengths for p in range(n)]
    assert batch.token_ids.shape == batch.position_ids.shape == (1, sum(lengths))
    assert batch.token_ids.size(1) % multiple_of == 0 and batch.max_seqlen == max(lengths)
    assert batch.cu_seqlens.dtype == torch.int32 and batch.rows.dtype == torch.int64


def test_the_first_position_of_a_sequence_can_carry_no_loss():
    assert pack([PackItem([1], [True], [1], [0.0], 0)]).rows.tolist() == []


@pytest.mark.parametrize("multiple_of", [1, 4])
def test_an_empty_pack_is_filler_without_rows(multiple_of):
    batch = pack([], Alignment(pack=multiple_of))
    assert batch.token_ids.shape == (1, multiple_of)
    assert batch.cu_seqlens.tolist() == [0, multiple_of]
    assert batch.rows.numel() == 0 and batch.targets.dtype == torch.int64
    assert batch.rollout_logprobs.dtype == torch.float32


def test_a_pack_that_fits_gets_no_filler():
    batch = pack([PackItem([1, 2, 3, 4], [False] * 4, [0] * 4, [0.0] * 4, 0)], Alignment(pack=4))
    assert batch.cu_seqlens.tolist() == [0, 4] and batch.rows.numel() == 0


def test_bins_are_balanced_longest_first():
    # 9 | 7 | 6, then 5 joins the 6, 4 the 7, 1 the 9: loads 10, 11, 11
    assert balanced_bins([5, 9, 1, 7, 4, 6], 3) == [[1, 2], [3, 4], [5, 0]]


def test_bins_are_at_most_one_sequence_apart():
    lengths = [random.Random(i).randint(1, 90) for i in range(101)]
    loads = [sum(lengths[i] for i in b) for b in balanced_bins(lengths, 7)]
    assert sum(loads) == sum(lengths) and max(loads) - min(loads) <= max(lengths)


@pytest.mark.parametrize("dp_size", [1, 2, 3])
@pytest.mark.parametrize("budget", [90, 131, 4000])
def test_a_plan_holds_each_sequence_once_within_the_budget(dp_size, budget):
    rng = random.Random(budget)
    lengths = [rng.choice([1, 17, 44, 89, 90]) for _ in range(53)]
    plan = plan_micro_batches(lengths, dp_size=dp_size, tokens_per_micro_batch=budget)
    assert len(plan) == dp_size and len({len(rank) for rank in plan}) == 1
    assert sorted(i for rank in plan for micro in rank for i in micro) == list(range(53))
    assert all(sum(lengths[i] for i in micro) <= budget for rank in plan for micro in rank)


def test_ranks_get_similar_work():
    rng = random.Random(0)
    lengths = [rng.randint(50, 500) for _ in range(128)]
    plan = plan_micro_batches(lengths, dp_size=4, tokens_per_micro_batch=4096)
    loads = [sum(lengths[i] for micro in rank for i in micro) for rank in plan]
    assert max(loads) <= 1.05 * min(loads)


def test_no_more_micro_batches_than_needed():
    # 4 x 50 tokens in packs of 100 on 2 ranks: one micro-batch each
    assert plan_micro_batches([50] * 4, dp_size=2, tokens_per_micro_batch=100) == [
        [[0, 2]],
        [[1, 3]],
    ]


def test_more_ranks_than_sequences_leaves_empty_micro_batches():
    plan = plan_micro_batches([5, 3], dp_size=3, tokens_per_micro_batch=8)
    assert plan == [[[0]], [[1]], [[]]]
    assert plan_micro_batches([], dp_size=2, tokens_per_micro_batch=8) == [[[]], [[]]]


def test_a_sequence_longer_than_a_micro_batch_is_an_error():
    with pytest.raises(AssertionError, match="longer than a micro-batch"):
        plan_micro_batches([3, 9], dp_size=1, tokens_per_micro_batch=8)
