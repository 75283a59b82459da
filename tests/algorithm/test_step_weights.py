"""Step divergence and step weights against worked examples and the equations written literally.

Layers: hand-checked tables, then random trajectories against the literal loops, then packing.
The compiled reductions are compared with these functions in tests/ops/test_step_reduce.py.
"""

import json
import math
import random

import pytest
import torch

from megatron_sod.algorithm import (
    STEP_WEIGHTS,
    packed_step_divergence,
    register_step_weight,
    step_divergence,
    step_weights,
    token_weights,
    valid_steps,
)
from tests.helpers.paper_forms import running_clip_loop, step_divergence_loop, step_weights_loop

# name, d_k, w_k (Eq. 7), running-clip weights (None: the same), options
CASES = [
    ("one_step", [0.37], [1], None, {}),
    ("identical_models", [0, 0, 0], [1, 1, 1], None, {}),
    ("stable", [0.3] * 4, [1] * 4, None, {}),
    ("drift", [0.2, 0.4, 0.8, 1.6], [1, 0.50000125, 0.25000094, 0.12500055], None, {}),
    ("paper_case_b", [0.218, 1.284], [1, 0.169783], None, {}),
    (
        "error_then_recovery",
        [0.3, 0.6, 0.9, 0.45, 0.25, 0.2],
        [1, 0.500001, 0.333334, 0.666667, 1.2, 1.2],
        None,
        {},
    ),
    (
        "paper_case_c",
        [0.3, 0.410959, 0.535714, 0.731707, 0.394737, 0.267857, 0.25],
        [1, 0.730001, 0.560001, 0.410001, 0.760001, 1.12, 1.2],
        None,
        {},
    ),
    ("improves_at_once", [0.5, 0.25, 0.22], [1, 1.2, 1.2], None, {}),
    ("cap_then_relapse", [0.5, 0.1, 0.5], [1, 1.2, 1.0], [1, 1.2, 0.240002], {}),
    ("first_is_zero", [0, 0.3, 0.5], [1, 3.33332e-6, 2e-6], None, {}),
    ("tiny_first", [1e-4, 0.3, 0.3], [1, 3.36666e-4, 3.36666e-4], None, {}),
    ("later_zero", [0.3, 0, 0.3], [1, 1.2, 1], [1, 1.2, 4e-6], {}),
    ("no_cap_allowed", [0.5, 0.25, 1], [1, 1, 0.5], [1, 1, 0.25], {"delta": 0.0}),
    ("infinite_cap", [0.5, 0.05, 1], [1, 9.99982, 0.5], None, {"delta": math.inf}),
    ("half_cap", [0.5, 0.25, 1], [1, 1.5, 0.5], [1, 1.5, 0.375], {"delta": 0.5}),
    ("uniform_by_epsilon", [0.2, 0.9, 0.05], [1, 1, 1], None, {"epsilon": 1e9}),
]
TOKENS = json.loads("""{"mask":[1,1,1,0,0,1,1,0,1,1,1,1,0,0],
 "old":[-0.10,-0.50,-1.20,-9,-9,-0.30,-0.70,-9,-0.05,-0.20,-0.40,-0.90,-9,-9],
 "ref":[-0.20,-0.40,-1.00,-1,-1,-1.50,-2.10,-1,-0.10,-0.15,-0.50,-0.85,-1,-1],
 "spans":[[0,3],[5,7],[8,12]], "d":[0.133333333,1.3,0.0625], "w":[1.0,0.102564793,1.2],
 "A_opd":[-0.1,0.1,0.2,0,0,-0.123078,-0.143591,0,-0.06,0.06,-0.12,0.06,0,0]}""")


def one_row(values, dtype=torch.float64):
    return torch.tensor([values], dtype=dtype)


@pytest.mark.parametrize("name, d, w, clipped, options", CASES, ids=[c[0] for c in CASES])
def test_worked_examples(name, d, w, clipped, options):
    valid = torch.ones(1, len(d), dtype=torch.bool)
    got = step_weights(one_row(d), valid, **options)
    torch.testing.assert_close(got, one_row(w), rtol=4e-6, atol=2e-8)  # the table has 6 digits
    running = step_weights(one_row(d), valid, policy="running_clip", **options)
    torch.testing.assert_close(running, one_row(clipped or w), rtol=4e-6, atol=2e-7)


def test_token_level_example():
    ids = [0] * len(TOKENS["mask"])
    for k, (begin, end) in enumerate(TOKENS["spans"], start=1):
        ids[begin:end] = [k] * (end - begin)
    student, teacher, step_ids = one_row(TOKENS["old"]), one_row(TOKENS["ref"]), torch.tensor([ids])
    d, valid = step_divergence(student, teacher, step_ids)
    w = step_weights(d, valid)
    torch.testing.assert_close(d, one_row(TOKENS["d"]), rtol=0, atol=1e-9)
    torch.testing.assert_close(w, one_row(TOKENS["w"]), rtol=0, atol=1e-9)
    w_tokens = token_weights(w, step_ids[0], torch.zeros(len(ids), dtype=torch.long))
    advantage = w_tokens * (teacher - student)[0]
    torch.testing.assert_close(advantage, one_row(TOKENS["A_opd"])[0], rtol=0, atol=1e-6)


def test_closed_form_equals_the_literal_product():
    rng = random.Random(1)
    for _ in range(200):
        d = [rng.choice([0.0, rng.expovariate(2.0), 1e-5]) for _ in range(rng.randint(1, 16))]
        delta = rng.choice([0.0, 0.2, 1.0])
        got = step_weights(one_row(d), torch.ones(1, len(d), dtype=torch.bool), delta=delta)
        torch.testing.assert_close(
            got, one_row(step_weights_loop(d, delta, 1e-6)), rtol=1e-9, atol=1e-12
        )
        clipped = step_weights(
            one_row(d), torch.ones(1, len(d), dtype=torch.bool), delta=delta, policy="running_clip"
        )
        torch.testing.assert_close(
            clipped, one_row(running_clip_loop(d, delta, 1e-6)), rtol=1e-9, atol=1e-12
        )


def test_weight_returns_to_one_when_the_student_recovers():
    d = one_row([0.3, 0.9, 0.3])
    w = step_weights(d, torch.ones_like(d, dtype=torch.bool))
    assert w[0, 2] == 1.0 and w[0, 1] < 0.34


def test_an_empty_step_keeps_its_number_and_weighs_nothing():
    # steps 1 and 3 have tokens, step 2 has none: d = .3, -, .6 -> w = 1, 0, .500001
    student, teacher = one_row([-0.3, -0.6]), one_row([0.0, 0.0])
    d, valid = step_divergence(student, teacher, torch.tensor([[1, 3]]))
    assert valid.tolist() == [[True, False, True]]
    w = step_weights(d, valid)
    torch.testing.assert_close(w, one_row([1.0, 0.0, 0.500001]), rtol=1e-6, atol=0)


def test_the_first_valid_step_is_the_anchor():
    d, valid = one_row([0.0, 0.4, 0.8]), torch.tensor([[False, True, True]])
    w = step_weights(d, valid)
    torch.testing.assert_close(w, one_row([0.0, 1.0, 0.500001]), rtol=1e-6, atol=0)
    for policy in ("no_cap", "running_clip"):
        torch.testing.assert_close(step_weights(d, valid, policy=policy), w, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_logprob_that_is_not_finite_removes_its_trajectory_only(bad):
    student = torch.tensor([[-0.1, bad, -0.3], [-0.1, -0.2, -0.3]])
    d, valid = step_divergence(student, torch.zeros(2, 3), torch.tensor([[1, 2, 2], [1, 2, 2]]))
    assert valid.tolist() == [[False, False], [True, True]]
    w = step_weights(d, valid)
    assert torch.isfinite(d).all() and w[0].tolist() == [0, 0] and w[1, 0] == 1


def test_a_logprob_that_is_not_finite_outside_the_steps_is_harmless():
    student = torch.tensor([[-0.1, math.nan, -0.3]])
    d, valid = step_divergence(student, torch.zeros(1, 3), torch.tensor([[1, 0, 2]]))
    torch.testing.assert_close(d, torch.tensor([[0.1, 0.3]]))
    assert valid.all()


def test_weights_that_follow_the_tools_outcomes():
    d = one_row([0.3, 0.5, 0.9, 0.2])
    valid = torch.ones_like(d, dtype=torch.bool)
    wrong = torch.tensor([[False, True, False, False]])
    heuristic = step_weights(d, valid, policy="heuristic", wrong_BK=wrong)
    torch.testing.assert_close(heuristic, one_row([1, 1, 0.9, 0.81]))
    masked = step_weights(d, valid, policy="mask_after_wrong", wrong_BK=wrong)
    assert masked.tolist() == [[1, 1, 0, 0]]
    never = step_weights(d, valid, policy="mask_after_wrong", wrong_BK=torch.zeros_like(valid))
    assert never.tolist() == [[1, 1, 1, 1]]
    with pytest.raises(ValueError, match="needs the tool outcome"):
        step_weights(d, valid, policy="heuristic")


def test_options_floor_and_minimum():
    d = torch.tensor([[0.0, 0.4], [0.2, 0.4]], dtype=torch.float64)
    valid = torch.ones_like(d, dtype=torch.bool)
    # the median of {0, .2, .4, .4} is .3: both anchors rise to it
    w = step_weights(d, valid, d_floor=0.5)
    torch.testing.assert_close(
        w, torch.tensor([[1.0, 0.75], [1.0, 0.75]]).double(), rtol=1e-5, atol=0
    )
    w = step_weights(d, valid, w_min=0.3)
    assert w[0].tolist() == [1.0, 0.3]


def test_uniform_weighs_valid_steps_only():
    w = step_weights(one_row([0.1, 0.0]), torch.tensor([[True, False]]), policy="uniform")
    assert w.tolist() == [[1, 0]]


def test_packed_tokens_in_any_order_equal_the_rows():
    torch.manual_seed(3)
    rows, length, steps = 5, 40, 6
    student, teacher = -torch.rand(rows, length), -torch.rand(rows, length)
    ids = torch.randint(0, steps + 1, (rows, length))
    d, valid = step_divergence(student, teacher, ids, max_steps=steps)
    trajectory = torch.arange(rows).repeat_interleave(length)
    shuffle = torch.randperm(rows * length)
    gap = (student - teacher).abs().reshape(-1)
    d_packed, counts = packed_step_divergence(
        gap[shuffle], ids.reshape(-1)[shuffle], trajectory[shuffle], rows, steps
    )
    torch.testing.assert_close(d_packed, d)
    assert torch.equal(valid_steps(d_packed, counts), valid)
    for row in range(rows):
        literal = step_divergence_loop(
            student[row].tolist(), teacher[row].tolist(), ids[row].tolist()
        )
        for k, value in enumerate(literal):
            assert math.isnan(value) or value == pytest.approx(float(d[row, k]), abs=1e-6)


def test_weights_carry_no_gradient_and_keep_the_dtype():
    student = (-torch.rand(2, 6)).requires_grad_()
    d, valid = step_divergence(student, torch.zeros(2, 6), torch.tensor([[1, 1, 2, 2, 3, 3]] * 2))
    w = step_weights(d, valid)
    assert not d.requires_grad and not w.requires_grad
    assert d.dtype == w.dtype == torch.float32


def test_no_steps_at_all():
    d, valid = step_divergence(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3).long())
    assert d.shape == valid.shape == (2, 0)
    assert step_weights(d, valid).shape == (2, 0)


def test_mistakes_are_named():
    d, valid = one_row([0.1]), torch.ones(1, 1, dtype=torch.bool)
    for kwargs, match in [
        ({"policy": "sodd"}, "unknown"),
        ({"delta": -0.1}, "delta"),
        ({"delta": math.nan}, "delta"),
        ({"epsilon": 0.0}, "epsilon"),
        ({"d_floor": 2.0}, "quantile"),
        ({"w_min": 3.0}, "w_min"),
    ]:
        with pytest.raises(ValueError, match=match):
            step_weights(d, valid, **kwargs)
    with pytest.raises(ValueError, match="one shape"):
        step_divergence(torch.zeros(1, 2), torch.zeros(1, 3), torch.zeros(1, 2).long())
    with pytest.raises(ValueError, match="step ids"):
        step_divergence(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([[1, 5]]), max_steps=2)


def test_a_registered_policy_is_selectable():
    @register_step_weight("half_for_this_test")
    def half(x):
        return torch.full_like(x.d_BK, 0.5)

    try:
        w = step_weights(
            one_row([0.1]), torch.ones(1, 1, dtype=torch.bool), policy="half_for_this_test"
        )
        assert w.tolist() == [[0.5]]
        with pytest.raises(ValueError, match="already registered"):
            register_step_weight("half_for_this_test")(half)
    finally:
        del STEP_WEIGHTS["half_for_this_test"]
