"""Hard inputs to the divergence on one rank: infinities, NaN, odd shapes, strides, nothing at all.

Every implementation this machine has; ordinary inputs are tests/ops/test_divergence.py's.
"""

import math

import pytest
import torch

from megatron_sod.ops.reference import reference_divergence
from tests.ops.cases import (
    ALL_FIELDS,
    IMPLEMENTATIONS,
    live,
    measured,
    oracle_gradient,
    random_case,
    serving,
    weighted_sum,
)

VOCAB = 37


@pytest.fixture(params=IMPLEMENTATIONS, autouse=True)
def implementation(request):
    with serving(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_minus_infinity_logits_are_columns_of_probability_zero(dtype):
    student, teacher, targets = random_case(dtype=dtype)
    student[:, 3] = teacher[:, 3] = -math.inf  # masked for both: as if absent
    student[1, 5] = -math.inf  # q > 0 there: forward KL infinite, reverse KL finite
    teacher[4, 6] = -math.inf  # p > 0 there: reverse KL infinite, forward KL finite
    got = measured(student, teacher, targets, jsd_beta=0.5)
    keep = [c for c in range(VOCAB) if c != 3]
    short = torch.where(targets > 3, targets - 1, targets)
    want = reference_divergence(
        student[:, keep], teacher[:, keep], short, vocab_size=VOCAB - 1, jsd_beta=0.5
    )
    assert got.forward_kl[1] == math.inf and got.reverse_kl[4] == math.inf
    for name in ("student_logprobs", "teacher_logprobs", "reverse_kl", "forward_kl", "jsd"):
        torch.testing.assert_close(
            getattr(got, name).double(), getattr(want, name), rtol=1e-5, atol=1e-5
        )
    student.requires_grad_()
    weighted_sum(live(student, teacher, targets, jsd_beta=0.5)).backward()
    assert torch.isfinite(student.grad).all() and (student.grad[:, 3] == 0).all()


def test_a_target_of_probability_zero_has_logprob_minus_infinity():
    student, teacher, targets = random_case(dtype=torch.float32)
    student[1, targets[1]] = -math.inf
    got = measured(student, teacher, targets)
    assert got.student_logprobs[1] == -math.inf and torch.isfinite(got.teacher_logprobs[1])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_nan_and_plus_infinity_show_in_their_row_only(value, dtype):
    student, teacher, targets = random_case(dtype=dtype)
    student[1, 7] = value
    got = measured(student, teacher, targets, jsd_beta=0.5)
    for name in ("student_logprobs", "reverse_kl", "student_entropy"):
        bad = torch.isnan(getattr(got, name))
        assert bad.tolist() == [row == 1 for row in range(len(targets))], name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_huge_logits_change_nothing(shift, dtype):
    student, teacher, targets = random_case(dtype=torch.float64)
    student = (student + shift).to(dtype)
    got = measured(student, teacher.to(dtype), targets, jsd_beta=0.5)
    want = reference_divergence(student, teacher.to(dtype), targets, vocab_size=VOCAB, jsd_beta=0.5)
    for name in ALL_FIELDS:
        torch.testing.assert_close(
            getattr(got, name).double(), getattr(want, name), rtol=1e-5, atol=1e-4
        )


@pytest.mark.parametrize("vocab", [1, 2, 7, 15, 16, 17, 31, 33, 1023, 1025])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_vocabulary_width(vocab, dtype):
    student, teacher, targets = random_case(rows=3, vocab=vocab, padded=vocab + 1, dtype=dtype)
    got = measured(student, teacher, targets, vocab=vocab, jsd_beta=0.5)
    want = reference_divergence(student, teacher, targets, vocab_size=vocab, jsd_beta=0.5)
    for name in ALL_FIELDS:
        torch.testing.assert_close(
            getattr(got, name).double(), getattr(want, name), rtol=1e-5, atol=1e-5
        )
    student.requires_grad_()
    weighted_sum(live(student, teacher, targets, vocab=vocab, jsd_beta=0.5)).backward()
    want_grad = oracle_gradient(student.detach(), teacher, targets, vocab=vocab, jsd_beta=0.5)
    tolerance = 1e-2 if dtype != torch.float32 else 2e-5
    torch.testing.assert_close(student.grad.double(), want_grad, rtol=tolerance, atol=tolerance)


def test_strided_logits_are_read_and_written_in_place():
    student, teacher, targets = random_case(dtype=torch.float32)
    want = measured(student, teacher, targets)
    wide = torch.full((6, 90), math.nan)
    wide[:, 5:45] = student
    by_row = wide[:, 5:45]
    by_column = student.t().contiguous().t()
    for strided in (by_row, by_column):
        got = measured(strided, teacher.t().contiguous().t(), targets)
        torch.testing.assert_close(got.reverse_kl, want.reverse_kl)
    plain = student.clone().requires_grad_()
    live(plain, teacher, targets).reverse_kl.sum().backward()
    for strided in (by_row.detach(), by_column.clone(memory_format=torch.preserve_format)):
        logits = strided.requires_grad_().view_as(strided)
        live(logits, teacher, targets, inplace=True).reverse_kl.sum().backward()
        torch.testing.assert_close(logits.detach(), plain.grad)
    assert torch.isnan(wide[:, :5]).all() and torch.isnan(wide[:, 45:]).all()


def test_teacher_may_be_padded_differently_and_targets_be_int32():
    student, teacher, targets = random_case()
    want = measured(student, teacher, targets)
    got = measured(student, teacher[:, :VOCAB].contiguous(), targets.int())
    torch.testing.assert_close(got.reverse_kl, want.reverse_kl)


def test_no_tokens_and_only_ignored_tokens():
    student, teacher, targets = random_case(dtype=torch.float32)
    empty = measured(student[:0], teacher[:0], targets[:0], jsd_beta=0.5)
    assert all(getattr(empty, name).shape == (0,) for name in ALL_FIELDS)
    student.requires_grad_()
    stats = live(student, teacher, torch.full_like(targets, -100))
    stats.reverse_kl.sum().backward()
    assert (stats.reverse_kl == 0).all() and (student.grad == 0).all()


def test_the_same_inputs_give_the_same_bits_on_any_number_of_threads():
    student, teacher, targets = random_case(rows=40, vocab=5000, padded=5000, dtype=torch.bfloat16)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            logits = student.clone().requires_grad_()
            stats = live(logits, teacher, targets, vocab=5000, jsd_beta=0.5)
            weighted_sum(stats).backward()
            results.append([getattr(stats, n).detach() for n in ALL_FIELDS] + [logits.grad])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
