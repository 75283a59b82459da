"""Recorded trajectories, scored and credited, against the equations written out token by token.

Layer: pure, float64 oracles. Published vectors: tests/scoring/test_credit.py and
tests/algorithm; the same numbers in every layout: test_certificate.py.
"""

import random

import pytest
import torch

from megatron_sod.algorithm.policy_loss import clipped_surrogate
from megatron_sod.data.batch import build_training_batch
from megatron_sod.rollout.recording import Recording
from megatron_sod.scoring.credit import WRONG_OUTCOMES, assign_credit
from megatron_sod.types import TokenScores
from tests.helpers import paper_forms as paper
from tests.helpers.tiny import sod_config, synthetic_trajectories

DELTA, EPSILON = 0.2, 1e-6
MODES = {
    "sod": lambda d, wrong: paper.step_weights_loop(d, DELTA, EPSILON),
    "uniform": lambda d, wrong: [1.0] * len(d),
    "no_cap": lambda d, wrong: paper.step_weights_loop(d, float("inf"), EPSILON),
    "running_clip": lambda d, wrong: paper.running_clip_loop(d, DELTA, EPSILON),
    "heuristic": lambda d, wrong: paper.heuristic_loop(wrong),
    "mask_after_wrong": lambda d, wrong: paper.mask_after_wrong_loop(wrong),
}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Rollouts that went to disk and back, and two logprobs for each of their tokens."""
    recording = Recording(tmp_path_factory.mktemp("rollouts"))
    recording.write(1, synthetic_trajectories(5, 4, vocab_size=50, seed=8))
    trajectories = recording.read(1)
    rng, spoken = random.Random(3), {}
    for t in trajectories:
        count = sum(t.loss_mask)
        drift = [rng.choice([0.05, 0.5, 3.0]) for _ in t.steps]
        steps = [s for s in t.step_ids if s]
        student = [-rng.random() - 0.05 for _ in range(count)]
        teacher = [s - rng.uniform(-1, 1.5) * drift[k - 1] * 6
                   for s, k in zip(student, steps, strict=True)]  # fmt: skip
        spoken[t.trajectory_id] = (steps, student, teacher)
    return trajectories, spoken


@pytest.mark.parametrize("tokens_per_micro_batch", [10_000, 45])
@pytest.mark.parametrize("ref_compat", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_credit_and_loss_equal_the_loops(recorded, mode, ref_compat, tokens_per_micro_batch):
    trajectories, spoken = recorded
    clip = None if ref_compat else 2.0
    config = sod_config("s", "t", ref_compat=ref_compat, distill={
        "log_ratio_clip": clip, "step_weight": {"policy": mode, "delta": DELTA}})  # fmt: skip
    batch = build_training_batch(
        trajectories, num_mini_batches=2, tokens_per_micro_batch=tokens_per_micro_batch,
        dp_rank=0, dp_size=1,
    )  # fmt: skip
    micros = [m for mini in batch.mini_batches for m in mini.micro_batches]
    scores = [_scores(m, batch, spoken) for m in micros]
    credits, steps = assign_credit(batch, micros, scores, config)
    found = {index: [] for index in range(len(batch.trajectories))}
    losses = {index: [] for index in found}
    moved = 0.13  # the policy after some updates: log pi - log pi_old
    for micro, credit in zip(micros, credits, strict=True):
        loss = clipped_surrogate(credit.old_logprobs + moved, credit.old_logprobs,
                                 credit.advantages, clip_low=0.2, clip_high=0.28,
                                 dual_clip=3.0)  # fmt: skip
        for owner, a, value in zip(micro.trajectory_ids.tolist(), credit.advantages.tolist(),
                                   loss.tolist(), strict=True):  # fmt: skip
            found[owner].append(a)
            losses[owner].append(value)
    for index, trajectory in enumerate(batch.trajectories):
        step_ids, student, teacher = spoken[trajectory.trajectory_id]
        d = paper.step_divergence_loop(student, teacher, step_ids)
        w = MODES[mode](d, [step.outcome in WRONG_OUTCOMES for step in trajectory.steps])
        num = len(trajectory.steps)
        assert steps.step_divergence[index, :num].tolist() == pytest.approx(d, rel=1e-9)
        assert steps.step_weights[index, :num].tolist() == pytest.approx(w, rel=1e-9)
        group = float(batch.group_advantages[index])
        expected = paper.advantages_loop(student, teacher, step_ids, w, group, clip)
        assert found[index] == pytest.approx(expected, rel=1e-6, abs=1e-9)
        old = [0.0] * len(student)
        new = [moved] * len(student)
        wanted = paper.ppo_loss_loop(new, old, expected, 0.2, 0.28, 3.0)
        assert losses[index] == pytest.approx(wanted, rel=1e-6, abs=1e-9)


def test_the_recorded_trajectories_are_awkward_enough(recorded):
    trajectories, spoken = recorded
    assert any(len(t.steps) >= 3 for t in trajectories)
    assert any(step.outcome == "user_error" for t in trajectories for step in t.steps[:-1])
    ratios = [abs(t - s) for _, ss, ts in spoken.values() for s, t in zip(ss, ts, strict=True)]
    assert max(ratios) > 2.0  # the clip of the other half of the cases bites


def _scores(micro, batch, spoken) -> TokenScores:
    seen = {index: 0 for index in range(len(batch.trajectories))}
    student, teacher = [], []
    for owner in micro.trajectory_ids.tolist():
        _, s, t = spoken[batch.trajectories[owner].trajectory_id]
        student.append(s[seen[owner]])
        teacher.append(t[seen[owner]])
        seen[owner] += 1
    s = torch.tensor(student, dtype=torch.float64)
    t = torch.tensor(teacher, dtype=torch.float64)
    none = torch.zeros_like(s)
    return TokenScores(s, none, t, none, none, None)
