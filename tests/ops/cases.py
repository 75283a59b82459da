"""Inputs and comparisons the op's tests share."""

from __future__ import annotations

from contextlib import contextmanager

import torch

from megatron_sod.ops import (
    differentiable_divergence,
    dispatch,
    divergence,
    vocab_parallel_divergence,
)
from megatron_sod.ops.reference import reference_divergence

FIELDS = ("student_logprobs", "reverse_kl", "forward_kl", "student_entropy", "jsd")
ALL_FIELDS = (*FIELDS, "teacher_logprobs", "teacher_entropy")
IMPLEMENTATIONS = tuple(dispatch.installed_implementations("cpu"))


@contextmanager
def serving(name: str):
    """Let one implementation serve the CPU."""
    chosen = dispatch.installed_implementations("cpu")[name]
    before = divergence.implementation_for
    divergence.implementation_for = lambda tensor: chosen
    try:
        yield
    finally:
        divergence.implementation_for = before


def random_case(rows=6, vocab=37, padded=40, dtype=torch.float64, scale=2.0, seed=0):
    """Student and teacher logits with junk in the padded columns, targets with one ignored row."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(rows, padded, generator=generator, dtype=torch.float64) * scale
    teacher = torch.randn(rows, padded, generator=generator, dtype=torch.float64) * scale
    student[:, vocab:], teacher[:, vocab:] = 50.0, -70.0  # would dominate every sum if counted
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    targets[rows // 2] = -100
    targets[0] = vocab - 1  # the last real column, next to the padding
    return student.to(dtype), teacher.to(dtype), targets


def weighted_sum(stats, seed=1):
    """A scalar loss in which every row and every output has its own coefficient."""
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for name in FIELDS:
        value = getattr(stats, name)
        coefficient = torch.randn(100, generator=generator, dtype=torch.float64)
        if value is not None:
            total = total + (coefficient[: value.shape[0]].to(value.dtype) * value).sum()
    return total


def measured(student, teacher, targets, vocab=37, **options):
    return vocab_parallel_divergence(
        student, teacher, targets, vocab_start=0, vocab_size=vocab, **options
    )


def live(student, teacher, targets, vocab=37, **options):
    return differentiable_divergence(
        student, teacher, targets, vocab_start=0, vocab_size=vocab, **options
    )


def oracle_gradient(student, teacher, targets, vocab=37, **options):
    student = student.double().requires_grad_()
    stats = reference_divergence(student, teacher, targets, vocab_size=vocab, **options)
    weighted_sum(stats).backward()
    return student.grad
