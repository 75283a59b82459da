"""Every instruction set of the CPU library gives the same numbers; the override is obeyed.

Values against the float64 reference per set; speed and instruction counts are kernels/bench's.
"""

import pytest
import torch

from megatron_sod.ops import (
    differentiable_divergence,
    dispatch,
    packed_step_weights,
    vocab_parallel_divergence,
)
from megatron_sod.ops.reference import reference_divergence
from tests.ops.cases import ALL_FIELDS, random_case, weighted_sum

pytestmark = pytest.mark.skipif(
    "cpu" not in dispatch.COMPILED_DEVICES,
    reason="no compiled CPU library: python setup.py build_ext --inplace",
)


def has(*flags: str) -> bool:
    try:
        with open("/proc/cpuinfo") as info:
            present = set(info.read().split())
    except OSError:
        return False
    return all(flag in present for flag in flags)


SETS = [
    "scalar",
    pytest.param("avx2", marks=pytest.mark.skipif(not has("avx2", "fma"), reason="no AVX2 here")),
    pytest.param(
        "avx512",
        marks=pytest.mark.skipif(not has("avx512f", "avx512bw", "avx512vl"), reason="no AVX-512"),
    ),
]
VOCAB = 3001


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_each_set_meets_the_reference(monkeypatch, isa, dtype):
    monkeypatch.setenv("SOD_CPU_ISA", isa)
    student, teacher, targets = random_case(vocab=VOCAB, padded=VOCAB + 7, dtype=dtype, scale=1.5)
    student.requires_grad_()
    options = dict(vocab_start=0, vocab_size=VOCAB, temperature=0.9, jsd_beta=0.4)
    stats = differentiable_divergence(student, teacher, targets, **options)
    weighted_sum(stats).backward()
    x = student.detach().double().requires_grad_()
    want = reference_divergence(
        x, teacher, targets, vocab_size=VOCAB, temperature=0.9, jsd_beta=0.4
    )
    weighted_sum(want).backward()
    for name in ALL_FIELDS:
        torch.testing.assert_close(
            getattr(stats, name).double(), getattr(want, name), rtol=3e-6, atol=3e-6
        )
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-3}.get(dtype, 1e-2)
    torch.testing.assert_close(student.grad.double(), x.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_round_to_the_nearest(monkeypatch, isa, dtype):
    """Every stored element is the float64 gradient rounded once: within half a unit and a bit."""
    monkeypatch.setenv("SOD_CPU_ISA", isa)
    student, teacher, targets = random_case(vocab=512, padded=512, dtype=dtype, scale=1.5)
    student.requires_grad_()
    differentiable_divergence(
        student, teacher, targets, vocab_start=0, vocab_size=512
    ).reverse_kl.sum().backward()
    x = student.detach().double().requires_grad_()
    reference_divergence(x, teacher, targets, vocab_size=512).reverse_kl.sum().backward()
    exact = x.grad
    rounded = exact.to(dtype)
    spacing = torch.nextafter(rounded.abs(), torch.full_like(rounded, 60000.0)) - rounded.abs()
    error = (student.grad.double() - exact).abs()
    assert (error <= 0.51 * spacing.double() + 2e-6 * exact.abs() + 1e-7).all()


@pytest.mark.parametrize("isa", SETS)
def test_step_sums_agree(monkeypatch, isa):
    monkeypatch.setenv("SOD_CPU_ISA", isa)
    generator = torch.Generator().manual_seed(0)
    steps = torch.arange(1, 7).repeat_interleave(700)
    rows = torch.zeros_like(steps)
    student, teacher = (-torch.rand(4200, generator=generator) for _ in range(2))
    d, _, counts, _ = packed_step_weights(student, teacher, steps, rows, 1, 6)
    want = (student - teacher).double().abs().reshape(6, 700).mean(1)
    torch.testing.assert_close(d[0].double(), want, rtol=1e-6, atol=0)
    assert (counts == 700).all()


def test_an_unknown_set_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("SOD_CPU_ISA", "mmx")
    student, teacher, targets = random_case(dtype=torch.float32)
    with pytest.raises(RuntimeError, match="SOD_CPU_ISA"):
        vocab_parallel_divergence(student, teacher, targets, vocab_start=0, vocab_size=37)
