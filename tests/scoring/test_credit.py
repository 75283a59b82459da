"""From scores to per-token credit: one published vector end to end, and what every option does.

Layer: pure; no model and no process group. Scores themselves: tests/train; the policies of w_k:
tests/algorithm/test_step_weights.py.
"""

import math
from dataclasses import replace

import pytest
import torch

from megatron_sod.algorithm.policy_loss import clipped_surrogate
from megatron_sod.data.packing import PackItem, pack
from megatron_sod.scoring.credit import assign_credit, distill_coef
from megatron_sod.types import MiniBatch, Step, TokenScores, TrainingBatch, Trajectory
from tests.helpers.tiny import sod_config

MASK = [1, 1, 1, 0, 0, 1, 1, 0, 1, 1, 1, 1, 0, 0]
STEPS = [1, 1, 1, 0, 0, 2, 2, 0, 3, 3, 3, 3, 0, 0]
OLD = [-0.10, -0.50, -1.20, -9, -9, -0.30, -0.70, -9, -0.05, -0.20, -0.40, -0.90, -9, -9]
REF = [-0.20, -0.40, -1.00, -1, -1, -1.50, -2.10, -1, -0.10, -0.15, -0.50, -0.85, -1, -1]
D = [0.133333333, 1.3, 0.0625]
W = [1.0, 0.102564793, 1.2]
A_OPD = [-0.1, 0.1, 0.2, -0.123078, -0.143591, -0.06, 0.06, -0.12, 0.06]
A_TOTAL = [0.7, 0.9, 1.0, 0.676922, 0.656409, 0.74, 0.86, 0.68, 0.86]  # with group advantage 0.8


def _trajectory(steps=STEPS, outcomes=("ok", "user_error", "none")) -> Trajectory:
    return Trajectory(
        trajectory_id="p/0",
        prompt_id="p",
        prompt_token_ids=[3, 4],
        response_token_ids=list(range(len(steps))),
        loss_mask=[s > 0 for s in steps],
        step_ids=list(steps),
        rollout_logprobs=[0.0] * len(steps),
        policy_versions=[0] * len(steps),
        steps=tuple(Step(k + 1, o, 1, 1) for k, o in enumerate(outcomes)),
        finish_reason="answer",
        reward=1.0,
        policy_version=0,
    )


def _pack(trajectory: Trajectory, index: int):
    before = len(trajectory.prompt_token_ids)
    return PackItem(
        trajectory.prompt_token_ids + trajectory.response_token_ids,
        [False] * before + trajectory.loss_mask,
        [0] * before + trajectory.step_ids,
        [0.0] * (before + len(trajectory.step_ids)),
        index,
    )


def _scores(old, ref, kl=None) -> TokenScores:
    old, ref = torch.tensor(old), torch.tensor(ref)
    kl = torch.zeros_like(old) if kl is None else torch.tensor(kl)
    return TokenScores(old, torch.zeros_like(old), ref, torch.zeros_like(old), kl, None)


def _counted(values):
    return [v for v, m in zip(values, MASK, strict=True) if m]


def _batch(advantages=(0.8,), **trajectory):
    items = [_trajectory(**trajectory) for _ in advantages]
    micros = [pack([_pack(item, index)]) for index, item in enumerate(items)]
    return TrainingBatch([MiniBatch(micros)], items, torch.tensor(advantages)), micros


def _credit(old=None, ref=None, *, advantages=(0.8,), kl=None, trajectory=None, **sections):
    config = sod_config("s", "t", **sections)
    batch, micros = _batch(advantages, **(trajectory or {}))
    old, ref = old or _counted(OLD), ref or _counted(REF)
    scores = [_scores(old, ref, kl) for _ in micros]
    credits, steps = assign_credit(batch, micros, scores, config)
    return credits, steps


def test_the_published_vector_gives_its_divergences_weights_and_advantages():
    (credit,), steps = _credit()
    assert steps.valid.tolist() == [[True, True, True]]
    assert steps.step_divergence[0].tolist() == pytest.approx(D, abs=1e-6)
    assert steps.step_weights[0].tolist() == pytest.approx(W, abs=1e-6)
    assert credit.advantages.tolist() == pytest.approx(A_TOTAL, abs=1e-6)
    assert (credit.distill_weights * credit.log_ratios).tolist() == pytest.approx(A_OPD, abs=1e-6)


def test_the_published_vector_gives_its_loss_and_mean_log_ratio():
    (credit,), _ = _credit()
    loss = clipped_surrogate(
        credit.old_logprobs,
        credit.old_logprobs,
        credit.advantages,
        clip_low=0.2,
        clip_high=0.28,
        dual_clip=3.0,
    )
    assert float(loss.mean()) == pytest.approx(-0.785925726, abs=1e-6)
    assert float(credit.log_ratios.mean()) == pytest.approx(-0.272222222, abs=1e-6)


def test_without_grpo_only_the_distillation_part_is_left():
    (credit,), _ = _credit(grpo={"coef": 0.0})
    assert credit.advantages.tolist() == pytest.approx(A_OPD, abs=1e-6)


def test_without_a_teacher_only_the_group_advantage_is_left():
    config = sod_config("s", "t", distill={"coef": 0.0})
    batch, micros = _batch((0.8, -0.5))
    old = torch.tensor(_counted(OLD))
    scores = [TokenScores(old, old, None, None, None, None) for _ in micros]
    credits, steps = assign_credit(batch, micros, scores, config)
    assert steps is None
    assert [c.advantages.tolist() for c in credits] == [pytest.approx([a] * 9) for a in (0.8, -0.5)]
    assert not any(c.log_ratios.any() or c.distill_weights.any() for c in credits)


def test_a_separate_distillation_term_leaves_the_advantage_alone():
    (credit,), _ = _credit(distill={"loss": "sampled_separate", "coef": 0.5})
    assert credit.advantages.tolist() == pytest.approx([0.8] * 9)
    assert credit.distill_weights.tolist()[3] == pytest.approx(0.5 * W[1], abs=1e-6)


def test_coefficients_scale_their_own_part():
    (credit,), _ = _credit(grpo={"coef": 2.0}, distill={"coef": 3.0})
    expected = [2 * 0.8 + 3 * a for a in A_OPD]
    assert credit.advantages.tolist() == pytest.approx(expected, abs=1e-5)


def test_the_clip_bounds_the_advantage_but_not_the_divergence():
    (credit,), steps = _credit(distill={"log_ratio_clip": 0.5})
    assert credit.log_ratios.tolist()[3:5] == [-0.5, -0.5]  # from -1.2 and -1.4
    assert steps.step_divergence[0, 1] == pytest.approx(1.3, abs=1e-6)
    (free,), _ = _credit(distill={"log_ratio_clip": None})
    assert free.log_ratios.tolist()[3:5] == pytest.approx([-1.2, -1.4])


def test_the_exact_divergence_may_decide_the_weights():
    kl = [0.1, 0.2, 0.3, 0.8, 0.8, 0.1, 0.1, 0.1, 0.1]
    _, steps = _credit(kl=kl, distill={"step_weight": {"source": "reverse_kl"}})
    # d = 0.2, 0.8, 0.1; w = 1, 0.200001 / 0.800001, min(2, 1.2)
    assert steps.step_divergence[0].tolist() == pytest.approx([0.2, 0.8, 0.1])
    assert steps.step_weights[0].tolist() == pytest.approx([1, 0.2500009, 1.2], abs=1e-6)


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        (("ok", "user_error", "ok"), [1, 1, 0]),
        (("malformed", "ok", "none"), [1, 0, 0]),
        (("rejected", "ok", "none"), [1, 0, 0]),
        (("timeout", "ok", "none"), [1, 0, 0]),
        (("ok", "infra_error", "ok"), [1, 1, 1]),
        (("none", "ok", "none"), [1, 1, 1]),
    ],
)
def test_policies_that_look_at_errors_see_the_students_own(outcomes, expected):
    _, steps = _credit(
        trajectory={"outcomes": outcomes},
        distill={"step_weight": {"policy": "mask_after_wrong"}},
    )
    assert steps.step_weights[0].tolist() == expected


def test_a_step_without_tokens_keeps_its_number_and_weighs_nothing():
    steps_with_gap = [1, 1, 1, 0, 0, 3, 3, 0, 3, 3, 3, 3, 0, 0]
    (credit,), steps = _credit(trajectory={"steps": steps_with_gap})
    assert steps.valid.tolist() == [[True, False, True]]
    assert steps.step_weights[0, 1] == 0
    # d_3 = (1.2 + 1.4 + .05 + .05 + .1 + .05) / 6 = 0.475
    assert steps.step_divergence[0, 2] == pytest.approx(0.475)


def test_excluded_ids_leave_divergence_and_distillation_but_not_the_group_advantage():
    # targets are 0..13 at the response positions; 5 and 6 are all of step 2, 8 opens step 3
    (credit,), steps = _credit(distill={"exclude_token_ids": [5, 6, 8, 77]})
    assert steps.valid.tolist() == [[True, False, True]]
    # d_3 over the last three tokens: (.05 + .1 + .05) / 3; w_3 = min(.1333 / .0667, 1.2)
    assert steps.step_divergence[0].tolist() == pytest.approx([D[0], 0.0, 0.2 / 3], abs=1e-6)
    assert steps.step_weights[0].tolist() == pytest.approx([1.0, 0.0, 1.2])
    expected = [0.7, 0.9, 1.0, 0.8, 0.8, 0.8, 0.8 + 0.06, 0.8 - 0.12, 0.8 + 0.06]
    assert credit.advantages.tolist() == pytest.approx(expected, abs=1e-6)


def test_everything_excluded_leaves_plain_grpo():
    (credit,), steps = _credit(distill={"exclude_token_ids": list(range(14))})
    assert not steps.valid.any()
    assert credit.advantages.tolist() == pytest.approx([0.8] * 9)


def test_a_trajectory_its_teacher_has_no_privileged_prompt_for_is_left_to_grpo():
    config = sod_config("s", "t")
    batch, micros = _batch((0.8, 0.4))
    batch = replace(batch, is_taught=torch.tensor([True, False]))
    scores = [_scores(_counted(OLD), _counted(REF)) for _ in micros]
    (taught, alone), steps = assign_credit(batch, micros, scores, config)
    assert taught.advantages.tolist() == pytest.approx(A_TOTAL, abs=1e-6)
    assert alone.advantages.tolist() == pytest.approx([0.4] * 9)
    assert steps.valid.tolist() == [[True] * 3, [False] * 3]


def test_a_withdrawing_teacher_fades_and_then_has_no_say():
    withdraw = {"start_iteration": 2, "end_iteration": 6, "final_coef": 0.0}
    config = sod_config("s", "t", distill={"coef": 2.0, "withdraw": withdraw})
    coefs = [distill_coef(config.distill, i) for i in (1, 2, 3, 4, 6, 9)]
    assert coefs == [2.0, 2.0, 1.5, 1.0, 0.0, 0.0]
    batch, micros = _batch((0.8,))
    scores = [_scores(_counted(OLD), _counted(REF))]
    (half,), _ = assign_credit(batch, micros, scores, config, coef=1.5)
    assert half.advantages.tolist() == pytest.approx([0.8 + 1.5 * a for a in A_OPD], abs=1e-6)
    (gone,), steps = assign_credit(batch, micros, scores, config, coef=0.0)
    assert steps is None and gone.advantages.tolist() == pytest.approx([0.8] * 9)


def test_the_floor_raises_the_anchor_to_a_quantile_of_all_divergences():
    # d = .1333, 1.3, .0625; median .1333; the second trajectory's d_1 = .001 rises to it
    near = [x - 0.001 * (i < 3) for i, x in enumerate(_counted(OLD))]
    near[3:5] = [_counted(OLD)[3] - 0.4, _counted(OLD)[4] - 0.4]
    near[5:] = [x - 0.2 for x in _counted(OLD)[5:]]  # d = .001, .4, .2
    config = sod_config("s", "t", distill={"step_weight": {"d_floor": 0.5}})
    batch, micros = _batch((0.0, 0.0))
    scores = [_scores(_counted(OLD), _counted(REF)), _scores(_counted(OLD), near)]
    _, steps = assign_credit(batch, micros, scores, config)
    # sorted: .001 .0625 .1333 .2 .4 1.3; median (.1333 + .2) / 2 = .166667
    assert steps.step_weights[1].tolist() == pytest.approx([1, 1 / 2.4, 1 / 1.2], abs=1e-4)


def test_trajectories_do_not_mix_however_they_are_packed():
    config = sod_config("s", "t")
    first, second = _trajectory(), _trajectory(steps=[1, 1, 2, 0, 2, 2], outcomes=("ok", "none"))
    old_2, ref_2 = [-1.0] * 5, [-1.5, -1.5, -3.0, -3.0, -3.0]
    one = pack([_pack(first, 0), _pack(second, 1)])
    batch = TrainingBatch([MiniBatch([one])], [first, second], torch.tensor([0.8, 0.0]))
    scores = [_scores(_counted(OLD) + old_2, _counted(REF) + ref_2)]
    (credit,), steps = assign_credit(batch, [one], scores, config)
    # second trajectory: d = 0.5, 2.0; w = 1, 0.25
    assert steps.step_divergence[1].tolist() == pytest.approx([0.5, 2.0, 0.0])
    assert steps.step_weights[1].tolist() == pytest.approx([1, 0.2500004, 0])
    expected = [*A_TOTAL, -0.5, -0.5, -0.5, -0.5, -0.5]  # 1 x -0.5, then 0.25 x -2
    assert credit.advantages.tolist() == pytest.approx(expected, abs=1e-5)


def test_a_rank_without_trajectories_gets_empty_credit():
    config = sod_config("s", "t")
    empty = pack([])
    batch = TrainingBatch([MiniBatch([empty])], [], torch.zeros(0))
    (credit,), steps = assign_credit(batch, [empty], [_scores([], [])], config)
    assert credit.advantages.shape == (0,) and steps.valid.shape[0] == 0


def _with_engine(micros, engine):
    """The same pack, sampled by an engine with these logprobs."""
    return [replace(micros[0], rollout_logprobs=torch.tensor(engine))]


def test_importance_is_student_over_engine_up_to_the_cap_and_leaves_the_divergence_alone():
    batch, micros = _batch()
    old, ref = _counted(OLD), _counted(REF)
    # ratios exp(0.2), exp(-0.3), then 3, above the cap of 2, then exactly 1
    shifts = [0.2, -0.3, math.log(3.0)] + [0.0] * (len(old) - 3)
    engine = [s - shift for s, shift in zip(old, shifts, strict=True)]
    micros = _with_engine(micros, engine)
    scores = [_scores(old, ref)]
    plain = sod_config("s", "t")
    (credit,), steps = assign_credit(batch, micros, scores, plain)
    assert credit.importance.tolist() == [1.0] * len(old)
    for rollout in ({"max_staleness": 1}, {"correct_mismatch": True}, {"partial_prompts": 2}):
        config = sod_config("s", "t", rollout=rollout)
        (corrected,), corrected_steps = assign_credit(batch, micros, scores, config)
        expected = [math.exp(0.2), math.exp(-0.3), 2.0] + [1.0] * (len(old) - 3)
        assert corrected.importance.tolist() == pytest.approx(expected, rel=1e-6)
        assert torch.equal(corrected_steps.step_divergence, steps.step_divergence)
        assert torch.equal(corrected.advantages, credit.advantages)


def test_an_engine_that_found_a_token_impossible_does_not_make_its_weight_infinite():
    batch, micros = _batch()
    old, ref = _counted(OLD), _counted(REF)
    micros = _with_engine(micros, [-1e30] * len(old))
    config = sod_config("s", "t", rollout={"max_staleness": 1, "importance_cap": 1.5})
    (credit,), _ = assign_credit(batch, micros, [_scores(old, ref)], config)
    assert credit.importance.tolist() == pytest.approx([1.5] * len(old))
