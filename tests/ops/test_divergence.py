"""The vocab-parallel divergence on one rank, every implementation this machine has.

Layers: float64 against autograd (values, gradient, gradcheck), float32 and bfloat16 tolerances,
refusals. Hard inputs: tests/ops/test_divergence_edges.py. Several ranks:
tests/ops/test_tensor_parallel.py; wrong gradients on purpose: tests/ops/test_mutations.py;
instruction sets and speed: tests/kernels.
"""

import math

import pytest
import torch

from megatron_sod.errors import OpError
from megatron_sod.ops.reference import reference_divergence
from tests.ops.cases import (
    ALL_FIELDS,
    FIELDS,
    IMPLEMENTATIONS,
    live,
    measured,
    oracle_gradient,
    random_case,
    serving,
    weighted_sum,
)

OPTIONS = dict(temperature=0.7, jsd_beta=0.3)
VOCAB = 37


@pytest.fixture(params=IMPLEMENTATIONS, autouse=True)
def implementation(request):
    with serving(request.param):
        yield request.param


@pytest.mark.parametrize("precise", [False, True])
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.5])
def test_float64_values_equal_the_reference(temperature, beta, precise):
    case = random_case()
    got = measured(*case, temperature=temperature, jsd_beta=beta, precise_kl=precise)
    want = reference_divergence(*case, vocab_size=VOCAB, temperature=temperature, jsd_beta=beta)
    for name in ALL_FIELDS:
        assert getattr(got, name).dtype == torch.float64
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-11, atol=1e-11)


def test_float64_gradient_equals_the_reference():
    student, teacher, targets = random_case()
    student.requires_grad_()
    weighted_sum(live(student, teacher, targets, **OPTIONS)).backward()
    want = oracle_gradient(student.detach(), teacher, targets, **OPTIONS)
    torch.testing.assert_close(student.grad, want, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", FIELDS)
def test_gradcheck_of_each_output(name):
    student, teacher, targets = random_case(rows=3, vocab=9, padded=11, scale=1.0)

    def output(logits):
        return getattr(live(logits, teacher, targets, vocab=9, **OPTIONS), name)

    assert torch.autograd.gradcheck(output, student.requires_grad_(), atol=1e-6)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-5)])
@pytest.mark.parametrize("vocab", [37, 1024, 2077])
def test_low_precision_logits_lose_nothing_in_the_statistics(dtype, tolerance, vocab):
    """The sums are float32 or better whatever the logits are, so both meet the float32 bound."""
    case = random_case(vocab=vocab, padded=vocab + 11, dtype=dtype, scale=1.0)
    got = measured(*case, vocab=vocab, jsd_beta=0.5)
    want = reference_divergence(*case, vocab_size=vocab, jsd_beta=0.5)
    for name in ALL_FIELDS:
        assert getattr(got, name).dtype == torch.float32
        torch.testing.assert_close(
            getattr(got, name).double(), getattr(want, name), rtol=2e-6, atol=tolerance
        )


def test_reverse_kl_error_at_the_real_vocabulary():
    student, teacher, targets = random_case(
        rows=3, vocab=151_936, padded=152_064, dtype=torch.float32, scale=1.5
    )
    want = reference_divergence(student, teacher, targets, vocab_size=151_936)
    got = measured(student, teacher, targets, vocab=151_936)
    assert (got.reverse_kl - want.reverse_kl).abs().max() < 2e-6
    assert (got.student_logprobs - want.student_logprobs).abs().max() < 1e-5


def test_bfloat16_gradient_is_within_twice_eager_bfloat16():
    student, teacher, targets = random_case(vocab=2077, padded=2088, dtype=torch.bfloat16)
    want = oracle_gradient(student, teacher, targets, vocab=2077, jsd_beta=0.5)
    ours = student.clone().requires_grad_()
    weighted_sum(live(ours, teacher, targets, vocab=2077, jsd_beta=0.5)).backward()
    eager = student.clone().requires_grad_()
    stats = reference_divergence(eager, teacher, targets, vocab_size=2077, jsd_beta=0.5)
    weighted_sum(stats).backward()
    our_error = (ours.grad.double() - want).abs().max()
    assert our_error <= 2 * (eager.grad.double() - want).abs().max() + 1e-7


def test_unit_weights_give_the_unweighted_kl_gradient():
    student, teacher, targets = random_case(dtype=torch.float32)
    first, second = student.clone().requires_grad_(), student.clone().requires_grad_()
    live(first, teacher, targets).reverse_kl.sum().backward()
    weights = torch.ones(student.shape[0])
    (live(second, teacher, targets).reverse_kl * weights).sum().backward()
    assert torch.equal(first.grad, second.grad)


def test_each_row_has_its_own_coefficient():
    student, teacher, targets = random_case()
    whole = student.clone().requires_grad_()
    weights = torch.linspace(0.5, 3.0, student.shape[0], dtype=torch.float64)
    (live(whole, teacher, targets).reverse_kl * weights).sum().backward()
    for row in range(student.shape[0]):
        alone = student[row : row + 1].clone().requires_grad_()
        live(alone, teacher[row : row + 1], targets[row : row + 1]).reverse_kl.sum().backward()
        torch.testing.assert_close(whole.grad[row], alone.grad[0] * weights[row])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_inplace_gradient_has_the_same_bits_in_the_logits_storage(dtype):
    student, teacher, targets = random_case(dtype=dtype)
    apart = student.clone().requires_grad_()
    weighted_sum(live(apart, teacher, targets, **OPTIONS)).backward()
    leaf = student.clone().requires_grad_()
    logits = leaf.clone()
    storage = logits.data_ptr()
    loss = weighted_sum(live(logits, teacher, targets, inplace=True, **OPTIONS))
    loss.backward(retain_graph=True)
    assert torch.equal(leaf.grad, apart.grad)
    assert logits.data_ptr() == storage and torch.equal(logits.detach(), apart.grad)
    with pytest.raises(OpError, match="runs once"):
        loss.backward()


def test_padded_columns_and_ignored_rows_get_exactly_zero():
    student, teacher, targets = random_case(dtype=torch.bfloat16)
    student[:, VOCAB:] = math.nan  # padding is not even read
    student[targets < 0] = math.nan
    student.requires_grad_()
    stats = live(student, teacher, targets, **OPTIONS)
    for name in ALL_FIELDS:
        value = getattr(stats, name)
        assert torch.isfinite(value).all() and (value[targets < 0] == 0).all()
    weighted_sum(stats).backward()
    assert (student.grad[:, VOCAB:] == 0).all() and (student.grad[targets < 0] == 0).all()
    assert torch.isfinite(student.grad).all()


def test_identical_models_diverge_by_exactly_zero_and_pull_nowhere():
    student, _, targets = random_case(dtype=torch.bfloat16)
    teacher = student.clone()
    student.requires_grad_()
    stats = live(student, teacher, targets)
    assert (stats.reverse_kl == 0).all() and (stats.forward_kl == 0).all()
    stats.reverse_kl.sum().backward()
    assert (student.grad == 0).all()


def test_a_tiny_kl_keeps_its_digits():
    """Logits 1e-4 apart: KL about 5e-9, far below what one float32 pass can resolve."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(4, 50_000, generator=generator)
    teacher = student + 1e-4 * torch.randn(4, 50_000, generator=generator)
    targets = torch.zeros(4, dtype=torch.long)
    want = reference_divergence(student, teacher, targets, vocab_size=50_000)
    got = measured(student, teacher, targets, vocab=50_000, precise_kl=True)
    assert 2e-9 < want.reverse_kl.min() < want.reverse_kl.max() < 1e-8
    torch.testing.assert_close(got.reverse_kl.double(), want.reverse_kl, rtol=1e-2, atol=0)
    torch.testing.assert_close(got.forward_kl.double(), want.forward_kl, rtol=1e-2, atol=0)


def test_without_a_teacher_only_the_students_fields_exist():
    student, teacher, targets = random_case()
    full = measured(student, teacher, targets)
    alone = measured(student, None, targets)
    torch.testing.assert_close(alone.student_logprobs, full.student_logprobs)
    torch.testing.assert_close(alone.student_entropy, full.student_entropy)
    assert alone.teacher_logprobs is None and alone.reverse_kl is None and alone.jsd is None
    student.requires_grad_()
    weighted_sum(live(student, None, targets)).backward()
    want = oracle_gradient(student.detach(), None, targets)
    torch.testing.assert_close(student.grad, want, rtol=1e-10, atol=1e-12)


def test_double_backward_is_refused_in_words():
    student, teacher, targets = random_case()
    student.requires_grad_()
    loss = live(student, teacher, targets).reverse_kl.sum()
    with pytest.raises(OpError, match="no second derivative"):
        torch.autograd.grad(loss, student, create_graph=True)


def test_the_plain_call_carries_no_gradient():
    student, teacher, targets = random_case()
    stats = measured(student.requires_grad_(), teacher, targets, jsd_beta=0.5)
    assert not any(getattr(stats, name).requires_grad for name in ALL_FIELDS)
    stats = live(student, teacher, targets, jsd_beta=0.5)
    assert not stats.teacher_logprobs.requires_grad and stats.student_entropy.requires_grad


def test_mistakes_are_named():
    student, teacher, targets = random_case()
    beyond = targets.clone()
    beyond[0] = VOCAB
    for call, match in [
        (lambda: measured(student[0], teacher, targets), r"\[T, Vp\]"),
        (lambda: measured(student, teacher[:2], targets), "T = 6"),
        (lambda: measured(student, teacher.float(), targets), "share dtype"),
        (lambda: measured(student.long(), None, targets), "one of"),
        (lambda: measured(student, teacher, targets, temperature=0.0), "temperature"),
        (lambda: measured(student, teacher, targets, jsd_beta=1.0), "strictly between"),
        (lambda: measured(student, None, targets, jsd_beta=0.5), "need teacher"),
        (lambda: measured(student, teacher[:, :20], targets), "20 columns"),
        (lambda: measured(student, teacher, beyond), "outside the vocabulary"),
    ]:
        with pytest.raises(OpError, match=match):
            call()
