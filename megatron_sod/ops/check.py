"""Compares one implementation of the op with the float64 reference on simulated shards.

The shards of a tensor-parallel run are worked through one after another on one device and merged
as the ranks would merge them, so no process group is needed. Behind tools/check_loss.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch

from megatron_sod.errors import OpError
from megatron_sod.ops.reference import reference_divergence

# dtype name -> (torch dtype, absolute error of statistics, of gradients, beyond 1e-6 relative)
TOLERANCES = {
    "bfloat16": (torch.bfloat16, 1e-5, 4e-3),
    "float16": (torch.float16, 1e-5, 5e-4),
    "float32": (torch.float32, 1e-5, 2e-6),
    "float64": (torch.float64, 1e-11, 1e-12),
}
ROW_COLUMNS = {
    "student_logprobs": 0,
    "teacher_logprobs": 1,
    "reverse_kl": 2,
    "forward_kl": 3,
    "student_entropy": 4,
    "teacher_entropy": 5,
}
DIFFERENTIABLE = ("student_logprobs", "reverse_kl", "forward_kl", "student_entropy", "jsd")


@dataclass(frozen=True)
class Case:
    """What the user runs: vocabulary, sharding, dtype, temperature."""

    vocab_size: int
    tensor_model_parallel_size: int
    divisible_by: int
    dtype: str
    temperature: float
    jsd_beta: float
    tokens: int
    seed: int

    @property
    def width(self) -> int:
        """Columns per rank after Megatron's padding."""
        multiple = self.divisible_by * self.tensor_model_parallel_size
        return math.ceil(self.vocab_size / multiple) * self.divisible_by


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    quantity: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # False for NaN


def errors(case: Case, implementation: ModuleType, device: str) -> Iterator[Row]:
    """Largest absolute error of each statistic and of each statistic's gradient.

    Raises:
        OpError: a case that makes no sense (sizes below 1, temperature or beta out of range).
    """
    if min(case.vocab_size, case.tensor_model_parallel_size, case.divisible_by, case.tokens) < 1:
        raise OpError("vocabulary, tensor-parallel size, padding multiple and tokens must be >= 1")
    if not case.temperature > 0 or not 0 < case.jsd_beta < 1:
        raise OpError("temperature must be > 0 and jsd_beta strictly between 0 and 1")
    dtype, stats_allowed, grad_allowed = TOLERANCES[case.dtype]
    student, teacher, targets = _inputs(case, dtype)
    live = student.double().requires_grad_()
    want = reference_divergence(
        live,
        teacher,
        targets,
        vocab_size=case.vocab_size,
        temperature=case.temperature,
        jsd_beta=case.jsd_beta,
    )
    shards = _Shards(case, implementation, student, teacher, targets, device)
    for name, value in shards.statistics().items():
        error = (value.cpu().double() - getattr(want, name)).abs().max().item()
        yield Row(name, error, stats_allowed)
    for name in DIFFERENTIABLE:
        (exact,) = torch.autograd.grad(getattr(want, name).sum(), live, retain_graph=True)
        error = (shards.gradient(name).cpu().double() - exact).abs().max().item()
        # one rounding to the logits' dtype, relative to the largest element
        allowed = grad_allowed * max(1.0, exact.abs().max().item())
        yield Row(f"d {name}"[:17], error, allowed)


def _inputs(case: Case, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(case.seed)
    shape = (case.tokens, case.vocab_size)
    student = torch.randn(shape, generator=generator) * 2
    teacher = (student + torch.randn(shape, generator=generator)).to(dtype)
    targets = torch.randint(0, case.vocab_size, (case.tokens,), generator=generator)
    targets[0] = case.vocab_size - 1  # next to the padding
    if case.tokens > 1:
        targets[-1] = -100
    return student.to(dtype), teacher, targets


class _Shards:
    """The case cut into Megatron's shards, padding filled with what must not be read."""

    def __init__(self, case, implementation, student, teacher, targets, device):
        self.case, self.impl = case, implementation
        self.inv_temperature = 1.0 / case.temperature
        self.targets = targets.to(device)
        self.parts = []
        for rank in range(case.tensor_model_parallel_size):
            start = rank * case.width
            valid = max(0, min(case.width, case.vocab_size - start))
            cut = [self._cut(full, start, valid).to(device) for full in (student, teacher)]
            self.parts.append((*cut, start, valid))
        partials = [
            self.impl.vp_stats(z, y, self.targets, start, valid, self.inv_temperature)
            for z, y, start, valid in self.parts
        ]
        self.rows = self.impl.vp_finish(torch.stack(partials), self.targets)
        second = [
            self.impl.vp_second(
                z, y, self.targets, self.rows, valid, self.inv_temperature, case.jsd_beta
            )
            for z, y, _, valid in self.parts
        ]
        self.second = torch.stack(second).sum(dim=0)

    def _cut(self, full, start, valid):
        shard = torch.full((full.shape[0], self.case.width), math.nan, dtype=full.dtype)
        shard[:, :valid] = full[:, start : start + valid]
        return shard

    def statistics(self) -> dict[str, torch.Tensor]:
        found = {name: self.rows[:, column] for name, column in ROW_COLUMNS.items()}
        beta = self.case.jsd_beta
        found["jsd"] = beta * self.second[:, 1] + (1 - beta) * self.second[:, 0]
        return found

    def gradient(self, name: str) -> torch.Tensor:
        """[T, V] gradient of the sum of one statistic, put together from the shards."""
        order = ("student_logprobs", "reverse_kl", "forward_kl", "student_entropy", "jsd")
        coefficients = self.rows.new_zeros((self.case.tokens, 6))
        coefficients[:, order.index(name)] = 1
        coefficients[:, 5] = self.second[:, 0]
        pieces = []
        for z, y, start, valid in self.parts:
            out = torch.empty_like(z)
            self.impl.vp_grad_(
                z,
                y,
                self.targets,
                self.rows,
                coefficients,
                start,
                valid,
                self.inv_temperature,
                self.case.jsd_beta,
                out,
            )
            pieces.append(out)
        return torch.cat(pieces, dim=1)[:, : self.case.vocab_size]
