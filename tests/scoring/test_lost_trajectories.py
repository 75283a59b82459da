"""Trajectories lost to infrastructure change nothing for the healthy ones.

Layer: pure; recorded trajectories, scores that depend on the token alone, as a model's do. That
real faults lose the trajectories they should and no other: tests/rollout/test_controller.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_sod.algorithm.policy_loss import clipped_surrogate
from megatron_sod.data.batch import build_training_batch
from megatron_sod.scoring.credit import assign_credit
from megatron_sod.types import TokenScores
from tests.helpers.tiny import sod_config, synthetic_trajectories

CLIP = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0}


def _score(micro_batch) -> TokenScores:
    """A function of target and step: the same for a token wherever it is packed."""
    mixed = micro_batch.targets * 31 + micro_batch.step_ids * 7
    student, teacher = -0.1 - (mixed % 13) / 5, -0.2 - (mixed % 17) / 4
    zeros = torch.zeros_like(student)
    return TokenScores(student, zeros, teacher, zeros, (student - teacher).abs(), None)


def _credit(trajectories) -> dict[str, dict[str, list[float]]]:
    """Everything the loss does with each trajectory, and its gradient by token."""
    batch = build_training_batch(
        trajectories, num_mini_batches=2, tokens_per_micro_batch=64, dp_rank=0, dp_size=1
    )
    micros = [m for mini in batch.mini_batches for m in mini.micro_batches]
    scores = [_score(m) for m in micros]
    credits, steps = assign_credit(batch, micros, scores, sod_config("s", "t"))
    rows: dict[str, dict[str, list[float]]] = {}
    for index, trajectory in enumerate(batch.trajectories):
        valid = steps.valid[index]
        rows[trajectory.trajectory_id] = {
            "d_k": steps.step_divergence[index][valid].tolist(),
            "w_k": steps.step_weights[index][valid].tolist(),
            "advantages": [],
            "gradient": [],
        }
    for micro, score, credit in zip(micros, scores, credits, strict=True):
        logprobs = score.student_logprobs.clone().requires_grad_()
        loss = clipped_surrogate(logprobs, credit.old_logprobs, credit.advantages, **CLIP)
        loss.sum().backward()
        for row, owner in enumerate(micro.trajectory_ids.tolist()):
            kept = rows[batch.trajectories[owner].trajectory_id]
            kept["advantages"].append(float(credit.advantages[row]))
            kept["gradient"].append(float(logprobs.grad[row]))
    return rows


@pytest.mark.parametrize("reason", ["infra_error", "time_limit"])
@pytest.mark.parametrize("share", [0.1, 0.6])
def test_weights_advantages_and_gradients_of_healthy_trajectories_stay(share, reason):
    trajectories = synthetic_trajectories(12, 4, vocab_size=97, seed=3)[:-4]  # all of them healthy
    size = len(trajectories)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(1))
    lost = set(order[: round(share * size)].tolist())
    damaged = [
        replace(t, finish_reason=reason, reward=float("nan")) if i in lost else t
        for i, t in enumerate(trajectories)
    ]
    before, after = _credit(trajectories), _credit(damaged)
    spoilt_groups = {trajectories[i].prompt_id for i in lost}
    assert set(after) == {t.trajectory_id for i, t in enumerate(trajectories) if i not in lost}
    num_whole = 0
    for name, found in after.items():
        expected = before[name]
        assert found["d_k"] == expected["d_k"] and found["w_k"] == expected["w_k"], name
        if name.split("/")[0] not in spoilt_groups:
            assert found == expected, name
            num_whole += 1
    assert num_whole or share > 0.5, "no group is whole: the test says nothing about advantages"
