"""Trajectories with a score that is no number reach no loss and no token count.

Layer: pure. That the remaining rows train as if the others had never been sampled:
tests/train/test_methods.py.
"""

import math

import pytest
import torch

from megatron_sod.data.packing import PackItem, pack
from megatron_sod.scoring.screen import screen
from megatron_sod.types import MiniBatch, TokenScores, TrainingBatch


def _item(index, length=4):
    return PackItem(list(range(length)), [False] + [True] * (length - 1), [0, 1, 1, 2], [0.0] * 4,
                    index)  # fmt: skip


def _batch(*groups):
    """One mini-batch per group of micro-batches, each a tuple of trajectory indices."""
    minis = [MiniBatch([pack([_item(i) for i in micro]) for micro in group]) for group in groups]
    count = 1 + max(i for group in groups for micro in group for i in micro)
    return TrainingBatch(minis, [None] * count, torch.zeros(count))


def _scores(batch, student=None, teacher=None, with_teacher=True):
    """Row scores by (micro-batch, row): the value that replaces -1."""
    found = []
    for number, micro in enumerate(m for mini in batch.mini_batches for m in mini.micro_batches):
        columns = []
        for changed in (student or {}, teacher or {}):
            values = torch.full((micro.rows.numel(),), -1.0)
            for (at, row), value in changed.items():
                if at == number:
                    values[row] = value
            columns.append(values)
        s, t = columns
        hidden = torch.arange(2.0 * s.numel()).reshape(-1, 2)
        found.append(TokenScores(s, s, t, t, s, hidden) if with_teacher
                     else TokenScores(s, s, None, None, None, None))  # fmt: skip
    return found


def test_finite_scores_pass_unchanged():
    batch = _batch([(0, 1)], [(2,)])
    scores = _scores(batch)
    assert screen(batch, scores) == (batch, scores)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_one_bad_score_removes_its_whole_trajectory_and_no_other(bad, side):
    batch = _batch([(0, 1), (2,)], [(3,)])
    clean, scores = screen(batch, _scores(batch, **{side: {(0, 4): bad}}))  # row 4: trajectory 1
    assert clean.num_nonfinite == 1
    micros = [m for mini in clean.mini_batches for m in mini.micro_batches]
    assert [m.trajectory_ids.tolist() for m in micros] == [[0] * 3, [2] * 3, [3] * 3]
    assert micros[0].rows.tolist() == [0, 1, 2] and micros[0].targets.tolist() == [1, 2, 3]
    assert micros[0].token_ids.shape == (1, 8)  # still read, by nobody but itself
    assert [s.student_logprobs.numel() for s in scores] == [3, 3, 3]
    assert scores[0].teacher_hidden.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert all(torch.isfinite(s.teacher_logprobs).all() for s in scores)


def test_scores_without_a_teacher_are_screened_too():
    batch = _batch([(0, 1)])
    clean, (score,) = screen(batch, _scores(batch, {(0, 0): math.nan}, with_teacher=False))
    assert clean.num_nonfinite == 1 and score.student_logprobs.numel() == 3
    assert score.teacher_logprobs is None


def test_nothing_left_is_an_empty_batch():
    batch = _batch([(0,)])
    clean, (score,) = screen(batch, _scores(batch, teacher={(0, 1): math.nan}))
    assert clean.mini_batches[0].micro_batches[0].rows.numel() == 0 == score.teacher_hidden.numel()
