"""The `sod::` operators as PyTorch sees them: opcheck, fake tensors, torch.compile(fullgraph=True).

Numbers are compared with the eager op, which tests/ops/test_divergence.py compares with float64.
"""

import pytest
import torch

from megatron_sod.ops import differentiable_divergence, functional_divergence
from tests.ops.cases import random_case, weighted_sum

OPTIONS = dict(vocab_start=0, vocab_size=37, temperature=0.7, jsd_beta=0.3)
CHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_static",
)


def arguments(dtype=torch.float32):
    student, teacher, targets = random_case(dtype=dtype)
    shard = (0, 37, 1.0)
    partials = torch.ops.sod.vp_stats(student, teacher, targets, *shard)
    rows = torch.ops.sod.vp_finish(partials[None], targets)
    second = torch.ops.sod.vp_second(student, teacher, targets, rows, 37, 1.0, 0.3)
    coefficients = torch.randn(rows.shape[0], 6, dtype=rows.dtype)
    out = torch.empty_like(student)
    ids = torch.tensor([1, 1, 2, 0, 2, 2]), torch.tensor([0, 0, 0, 1, 1, 1])
    values = -torch.rand(6)
    sums = torch.ops.sod.step_sums(values, None, *ids, 2, 2)
    weights = torch.ops.sod.step_weights(sums, 2, 2, 0.2, 1e-6)[1]
    logits = (student, teacher, targets)
    live = (student.clone().requires_grad_(), teacher, targets)
    return {
        "vp_stats": (*logits, *shard),
        "vp_finish": (partials[None], targets),
        "vp_second": (*logits, rows, 37, 1.0, 0.3),
        "vp_grad": (*logits, rows, coefficients, *shard, 0.3),
        "vp_grad_out": (*logits, rows, coefficients, *shard, 0.3, out),
        "vp_outputs": (*live, rows, second, *shard, 0.3),
        "step_sums": (values, None, *ids, 2, 2),
        "step_weights": (sums, 2, 2, 0.2, 1e-6),
        "step_gather": (weights, *ids),
    }


@pytest.mark.parametrize("name", list(arguments()))
def test_opcheck(name):
    torch.library.opcheck(
        getattr(torch.ops.sod, name).default, arguments()[name], test_utils=CHECKS
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_functional_form_equals_the_eager_op(dtype):
    student, teacher, targets = random_case(dtype=dtype)
    a, b = student.clone().requires_grad_(), student.clone().requires_grad_()
    eager = differentiable_divergence(a, teacher, targets, **OPTIONS)
    functional = functional_divergence(b, teacher, targets, **OPTIONS)
    for name, value in vars(eager).items():
        torch.testing.assert_close(getattr(functional, name), value, rtol=1e-6, atol=1e-6)
    weighted_sum(eager).backward()
    weighted_sum(functional).backward()
    torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("beta", [None, 0.3])
def test_compile_traces_the_whole_graph(beta):
    student, teacher, targets = random_case(dtype=torch.float32)
    options = {**OPTIONS, "jsd_beta": beta}

    def loss(logits):
        stats = functional_divergence(logits * 2.0, teacher, targets, **options)
        return (stats.reverse_kl * torch.arange(6)).sum() + stats.student_logprobs.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    a, b = student.clone().requires_grad_(), student.clone().requires_grad_()
    plain, traced = loss(a), compiled(b)
    plain.backward(), traced.backward()
    torch.testing.assert_close(traced, plain)
    torch.testing.assert_close(b.grad, a.grad)


def test_without_a_teacher():
    student, _, targets = random_case(dtype=torch.float32)
    student.requires_grad_()
    options = {**OPTIONS, "jsd_beta": None}
    stats = functional_divergence(student, None, targets, **options)
    stats.student_logprobs.sum().backward()
    want = student.detach().clone().requires_grad_()
    differentiable_divergence(want, None, targets, **options).student_logprobs.sum().backward()
    torch.testing.assert_close(student.grad, want.grad)
    assert stats.reverse_kl is None
