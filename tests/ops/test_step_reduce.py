"""Step weights of packed tokens and the step-weighted KL, against the per-trajectory functions.

Layers: packed reduction against the literal loops, the whole call, its gradient. Context parallel:
tests/ops/test_tensor_parallel.py; time of the reduction: kernels/bench.
"""

import math

import pytest
import torch

from megatron_sod.algorithm import packed_step_divergence, step_weights, token_weights, valid_steps
from megatron_sod.errors import OpError
from megatron_sod.ops import dispatch, packed_step_weights, step_weighted_kl
from megatron_sod.ops.reference import reference_divergence
from tests.helpers.paper_forms import step_divergence_loop, step_weights_loop
from tests.ops.cases import random_case

TRAJECTORIES, STEPS = 5, 4
VOCAB = 37


def packed_case(tokens=300, seed=0, dtype=torch.int64):
    generator = torch.Generator().manual_seed(seed)
    student = -torch.rand(tokens, generator=generator) * 3
    teacher = -torch.rand(tokens, generator=generator) * 3
    steps = torch.randint(0, STEPS + 1, (tokens,), generator=generator)
    rows = torch.randint(0, TRAJECTORIES, (tokens,), generator=generator)
    steps[rows == 2] = 0  # a trajectory without a counted token
    steps[(rows == 3) & (steps == 2)] = 0  # an empty step in the middle
    return student, teacher, steps.to(dtype), rows.to(dtype)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_packed_weights_equal_the_literal_loops(dtype):
    student, teacher, steps, rows = packed_case(dtype=dtype)
    d, w, counts, w_T = packed_step_weights(student, teacher, steps, rows, TRAJECTORIES, STEPS)
    for n in range(TRAJECTORIES):
        mine = rows == n
        literal = step_divergence_loop(
            student[mine].tolist(), teacher[mine].tolist(), steps[mine].tolist()
        )
        present = [k for k, value in enumerate(literal) if not math.isnan(value)]
        weights = step_weights_loop([literal[k] for k in present], 0.2, 1e-6)
        for k, weight in zip(present, weights, strict=True):
            assert float(d[n, k]) == pytest.approx(literal[k], abs=1e-6)
            assert float(w[n, k]) == pytest.approx(weight, rel=1e-5)
            assert counts[n, k] == int(((rows == n) & (steps == k + 1)).sum())
        absent = [k for k in range(STEPS) if k not in present]
        assert (w[n, absent] == 0).all() and (d[n, absent] == 0).all()
    assert torch.equal(w_T, token_weights(w, steps, rows))
    assert (w[2] == 0).all() and w[3, 1] == 0 and w[3, 2] > 0


@pytest.mark.parametrize("tokens", [0, 1, 31, 33, 1025, 5000])
def test_any_number_of_tokens(tokens):
    student, teacher, steps, rows = packed_case(tokens)
    steps, rows = steps.sort().values, torch.zeros_like(rows)  # long runs
    d, _, counts, _ = packed_step_weights(student, teacher, steps, rows, 1, STEPS)
    want, want_counts = packed_step_divergence((student - teacher).abs(), steps, rows, 1, STEPS)
    torch.testing.assert_close(d, want, rtol=1e-6, atol=1e-6)
    assert torch.equal(counts, want_counts)


def test_a_value_per_token_needs_no_teacher():
    student, _, steps, rows = packed_case()
    d, _, _, _ = packed_step_weights(-student, None, steps, rows, TRAJECTORIES, STEPS)
    want, _ = packed_step_divergence(-student, steps, rows, TRAJECTORIES, STEPS)
    torch.testing.assert_close(d, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_value_that_is_not_finite_removes_its_trajectory(bad):
    student, teacher, steps, rows = packed_case()
    at = int(torch.nonzero((rows == 1) & (steps > 0))[0])
    student[at] = bad
    for policy in ("sod", "uniform"):
        d, w, _, w_T = packed_step_weights(
            student, teacher, steps, rows, TRAJECTORIES, STEPS, policy=policy
        )
        assert (w[1] == 0).all() and (w_T[rows == 1] == 0).all() and torch.isfinite(d).all()
        assert (w[0] > 0).all()


def test_policies_and_options_reach_the_registry():
    student, teacher, steps, rows = packed_case()
    wrong = torch.zeros(TRAJECTORIES, STEPS, dtype=torch.bool)
    wrong[0, 1] = True
    packed = (student, teacher, steps, rows, TRAJECTORIES, STEPS)
    d, counts = packed_step_divergence((student - teacher).abs(), steps, rows, *packed[4:])
    valid = valid_steps(d, counts)
    for options in (
        dict(policy="no_cap"),
        dict(policy="running_clip", delta=0.1),
        dict(policy="mask_after_wrong", wrong=wrong),
        dict(d_floor=0.5),
        dict(w_min=0.7),
    ):
        wrong_steps = options.pop("wrong", None)
        got = packed_step_weights(*packed, wrong_NK=wrong_steps, **options)[1]
        want = step_weights(d, valid, wrong_BK=wrong_steps, **options)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_ids_out_of_range_are_refused():
    student, teacher, steps, rows = packed_case()
    for bad_steps, bad_rows in ((steps + 1, rows), (steps, rows + 1), (steps - 1, rows)):
        with pytest.raises((ValueError, RuntimeError), match="ids"):
            packed_step_weights(student, teacher, bad_steps, bad_rows, TRAJECTORIES, STEPS)


def test_the_fallback_equals_the_compiled_reduction():
    student, teacher, steps, rows = packed_case()
    from megatron_sod.ops import registration

    served = torch.ops.sod.step_sums(student, teacher, steps, rows, TRAJECTORIES, STEPS)
    torch_sums = registration._step_sums(student, teacher, steps, rows, TRAJECTORIES, STEPS)
    torch.testing.assert_close(served, torch_sums, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(
        torch.ops.sod.step_weights(served, TRAJECTORIES, STEPS, 0.2, 1e-6),
        registration._step_weights(served, TRAJECTORIES, STEPS, 0.2, 1e-6),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    assert dispatch.installed_implementations("cpu")


def kl_case(dtype=torch.float64):
    student, teacher, targets = random_case(rows=12, vocab=VOCAB, padded=40, dtype=dtype)
    step_ids = torch.tensor([1, 1, 2, 0, 2, 3, 3, 1, 1, 2, 2, 0])
    trajectory_ids = torch.tensor([0] * 7 + [1] * 5)
    return student, teacher, targets, step_ids, trajectory_ids


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
@pytest.mark.parametrize("source", ["sampled", "reverse_kl"])
def test_step_weighted_kl_equals_the_equations(divergence, source):
    student, teacher, targets, step_ids, rows = kl_case()
    student.requires_grad_()
    loss, info = step_weighted_kl(
        student,
        teacher,
        targets,
        step_ids,
        rows,
        vocab_start=0,
        vocab_size=VOCAB,
        divergence=divergence,
        step_source=source,
    )
    loss.sum().backward()
    x = student.detach().clone().requires_grad_()
    stats = reference_divergence(x, teacher, targets, vocab_size=VOCAB, jsd_beta=0.5)
    gap = (stats.student_logprobs - stats.teacher_logprobs).abs()
    values = (gap if source == "sampled" else stats.reverse_kl).tolist()
    want = 0.0
    for n in range(2):
        counted = [
            (t, int(step_ids[t]))
            for t in range(12)
            if rows[t] == n and targets[t] >= 0 and step_ids[t]
        ]
        literal = step_divergence_loop(
            [values[t] for t, _ in counted], [0.0] * len(counted), [k for _, k in counted]
        )
        weights = step_weights_loop(literal, 0.2, 1e-6)
        for t, k in counted:
            want = want + weights[k - 1] * getattr(stats, divergence)[t]
            assert float(info.token_weights[t]) == pytest.approx(weights[k - 1])
    torch.testing.assert_close(loss.sum(), want)
    want.backward()
    torch.testing.assert_close(student.grad, x.grad)
    uncounted = (step_ids == 0) | (targets < 0)
    assert (loss[uncounted] == 0).all() and (student.grad[uncounted] == 0).all()


def test_uniform_policy_is_the_plain_kl():
    student, teacher, targets, step_ids, rows = kl_case()
    loss, _ = step_weighted_kl(
        student, teacher, targets, step_ids, rows, vocab_start=0, vocab_size=VOCAB, policy="uniform"
    )
    plain = reference_divergence(student, teacher, targets, vocab_size=VOCAB).reverse_kl
    torch.testing.assert_close(loss, torch.where(step_ids > 0, plain, 0.0))


def test_a_broken_trajectory_neither_moves_nor_poisons_the_student():
    student, teacher, targets, step_ids, rows = kl_case(torch.bfloat16)
    student[1, 4] = math.nan  # trajectory 0
    student.requires_grad_()
    loss, info = step_weighted_kl(
        student, teacher, targets, step_ids, rows, vocab_start=0, vocab_size=VOCAB, inplace=False
    )
    loss.sum().backward()
    assert (info.step_weights[0] == 0).all() and (info.step_weights[1, :2] > 0).all()
    assert (student.grad[rows == 0] == 0).all() and torch.isfinite(student.grad).all()


def test_unknown_names_are_refused():
    case = kl_case()
    for options in (dict(divergence="kl"), dict(step_source="logits")):
        with pytest.raises(OpError, match="must be one of"):
            step_weighted_kl(*case, vocab_start=0, vocab_size=VOCAB, **options)
