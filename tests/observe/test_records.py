"""Rows per step and whole trajectories, from one rank's batch.

Layer: pure. Merging over real ranks: tests/train and tests/end_to_end.
"""

from dataclasses import replace

import pytest
import torch

from megatron_sod.data.packing import PackItem, pack
from megatron_sod.observe.records import local_records
from megatron_sod.types import MiniBatch, StepCredit, TokenCredit, TokenScores, TrainingBatch
from tests.observe.test_metrics import _trajectory


@pytest.fixture
def parts():
    """Two trajectories in one pack, two steps and one, with scores by hand."""
    first = _trajectory("a", 1.0, (("ok", 2, 1), ("none", 1, 0)))
    second = _trajectory("b", 0.0, (("none", 2, 0),))
    first.step_ids[2] = 2
    items = [
        PackItem([9, *t.response_token_ids], [False, *t.loss_mask], [0, *t.step_ids],
                 [0.0] * (1 + len(t.step_ids)), index)
        for index, t in enumerate((first, second))
    ]  # fmt: skip
    micro = pack(items)
    batch = TrainingBatch([MiniBatch([micro])], [first, second], torch.tensor([0.5, -0.5]))
    student = torch.tensor([-1.0, -1.0, -2.0, -0.5, -0.5])
    teacher = torch.tensor([-1.5, -0.5, -2.0, -30.5, -0.25])
    entropy = torch.ones(5)
    scores = [TokenScores(student, entropy, teacher, 2 * entropy, 3 * entropy, None)]
    ratios = (teacher - student).clamp(-10, 10)
    weights = torch.tensor([1.0, 1.0, 0.5, 1.0, 1.0])
    credits = [TokenCredit(student, student, weights, ratios, torch.ones_like(student))]
    steps = StepCredit(
        torch.tensor([[0.5, 0.0], [15.125, 0.0]]),
        torch.tensor([[1.0, 0.5], [1.0, 0.0]]),
        torch.tensor([[True, True], [True, False]]),
    )
    return batch, [micro], scores, credits, steps


def _records(parts, kept=8):
    return local_records(*parts, iteration=4, num_trajectories_kept=kept)


def test_one_row_per_step_with_its_divergence_and_weight(parts):
    rows = _records(parts).step_rows
    assert [(r["prompt"], r["step"], r["num_steps"], r["tokens"]) for r in rows] == [
        ("a", 1, 2, 2),
        ("a", 2, 2, 1),
        ("b", 1, 1, 2),
    ]
    assert [(r["d_k"], r["w_k"]) for r in rows] == [(0.5, 1.0), (0.0, 0.5), (15.125, 1.0)]
    assert [r["tool_outcome"] for r in rows] == ["ok", "none", "none"]
    assert {r["iteration"] for r in rows} == {4} and rows[2]["advantage"] == -0.5


def test_trajectories_carry_the_log_ratio_of_each_of_the_students_tokens(parts):
    first, second = _records(parts).trajectory_rows
    assert first["log_ratios"] == [-0.5, 0.5, 0.0]
    assert second["log_ratios"] == [-30.0, 0.25]
    assert first["student_logprobs"] == [-1.0, -1.0, -2.0]
    assert second["student_logprobs"] == [-0.5, -0.5]
    assert (first["d"], first["w"]) == ([0.5, 0.0], [1.0, 0.5])
    assert second["d"] == [15.125, None] and first["outcomes"] == ["ok", "none"]


@pytest.mark.parametrize("kept", [0, 1, 5])
def test_only_as_many_trajectories_are_kept_as_asked_for(parts, kept):
    assert len(_records(parts, kept).trajectory_rows) == min(kept, 2)


def test_kept_trajectories_are_spread_over_the_batch():
    many = [_trajectory(str(i), 1.0, (("none", 1, 0),)) for i in range(10)]
    batch = TrainingBatch([], many, torch.zeros(10))
    rows = local_records(
        batch, [], [], [], None, iteration=1, num_trajectories_kept=4
    ).trajectory_rows
    assert [row["trajectory"] for row in rows] == [many[i].trajectory_id for i in (0, 2, 5, 7)]


def test_sums_are_over_rows(parts):
    sums = _records(parts).sums
    # log-ratios -0.5, 0.5, 0, -30, 0.25 sum to -29.75
    assert sums["rows"] == 5 and sums["kl_k1"] == pytest.approx(29.75)
    assert (sums["student_entropy"], sums["teacher_entropy"]) == (5.0, 10.0)
    assert sums["reverse_kl"] == 15.0 and sums["log_ratio_clipped"] == 1.0
    assert sums["log_ratio_extreme"] == 1.0  # -30
    assert sums["opd_abs"] == pytest.approx(0.5 + 0.5 + 0 + 10 + 0.25)


def test_without_a_teacher_there_are_rows_but_no_divergences(parts):
    batch, micros, scores, credits, _ = parts
    alone = [TokenScores(scores[0].student_logprobs, torch.ones(5), None, None, None, None)]
    records = _records((batch, micros, alone, credits, None))
    assert {(r["d_k"], r["w_k"]) for r in records.step_rows} == {(None, None)}
    # the engine said 0 for every token, the student -1, -1, -2, -0.5, -0.5
    assert records.sums == {
        "rows": 5.0,
        "student_entropy": 5.0,
        "engine_gap": 5.0,
        "group_advantage": 0.5,  # three rows of 0.5 and two of -0.5
        "group_advantage_abs": 2.5,
        "advantage": -5.0,
    }
    assert "r" not in records.maxima and records.counts == {"nonfinite_trajectories": 0.0}
    assert records.trajectory_rows[0]["log_ratios"] == [] == records.trajectory_rows[0]["d"]


def test_importance_weights_are_summed_and_their_largest_kept_only_when_they_are_used(parts):
    batch, micros, scores, (credit,), steps = parts
    importance = torch.tensor([0.5, 1.0, 2.0, 1.5, 2.0])
    parts = (batch, micros, scores, [replace(credit, importance=importance)], steps)
    options = {"iteration": 4, "num_trajectories_kept": 0}
    records = local_records(*parts, **options, importance_cap=2.0)
    assert (records.sums["importance"], records.sums["importance_clipped"]) == (7.0, 2.0)
    assert (records.maxima["importance"], records.maxima["-importance"]) == (2.0, -0.5)
    unused = local_records(*parts, **options)
    assert "importance" not in unused.sums and "importance" not in unused.maxima


def test_the_ends_of_the_log_ratio_and_lost_trajectories_are_kept(parts):
    batch, *rest = parts
    batch = replace(batch, num_nonfinite=3, is_taught=torch.tensor([True, False]))
    records = _records((batch, *rest))
    assert (records.maxima["r"], records.maxima["-r"]) == (0.5, 30.0)
    assert (records.maxima["advantage"], records.maxima["-advantage"]) == (-0.5, 2.0)
    assert records.maxima["group_advantage"] == records.maxima["-group_advantage"] == 0.5
    assert records.rank_tokens == [5 + 6]  # with prompts of three tokens each
    assert records.counts == {"nonfinite_trajectories": 3.0, "untaught_trajectories": 1.0}
    # -.5 .5 0 -30 .25
    assert records.sums["log_ratio_squared"] == pytest.approx(900.5625)
