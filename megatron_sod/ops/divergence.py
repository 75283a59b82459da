"""Divergences between a student's and a teacher's vocabulary-parallel logits, per token.

T tokens, Vp this rank's columns of the vocabulary. Three visible lines: local sums, one
collective, finish. Without a group, or alone in it, the same lines run without the collective.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_sod.errors import OpError
from megatron_sod.ops.dispatch import implementation_for
from megatron_sod.ops.stats import INFINITE_ABOVE, DivergenceStats

LOGIT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def vocab_parallel_divergence(
    student_logits_TVp: torch.Tensor,
    teacher_logits_TVp: torch.Tensor | None,
    target_ids_T: torch.Tensor,
    *,
    vocab_start: int,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    jsd_beta: float | None = None,
    precise_kl: bool = False,
) -> DivergenceStats:
    """Logprobs of the targets, entropies and divergences over the whole vocabulary. No gradient.

    Args:
        student_logits_TVp: [T, Vp] bf16, fp16, fp32 or fp64; columns are ids vocab_start + v.
        teacher_logits_TVp: [T, Vp'] same kind, Vp' may be padded differently; None: no teacher.
        target_ids_T: [T] integer ids over the whole vocabulary; negative (-100): ignored row.
        vocab_start: the id of this rank's column 0.
        vocab_size: real vocabulary size; columns past it are padding and count for nothing.
        group: the ranks that share the vocabulary, in the order of their shards; None: no one.
        temperature: > 0; both distributions are softmax(logits / temperature).
        jsd_beta: in (0, 1), the teacher's share of the mixture; None: no JSD.
        precise_kl: one more pass (and the second gather) gives KLs that keep their digits down to
            1e-9; the one-pass value has an absolute error of about 1e-6.
    Returns:
        DivergenceStats; a KL is reported as at least 0.
    Raises:
        OpError: shapes, dtypes or options that the op cannot serve.
    Distributed: one all-gather of [T, 10] over `group`; jsd_beta or precise_kl adds one of [T, 4].
    """
    call = _Call(
        student_logits_TVp,
        teacher_logits_TVp,
        target_ids_T,
        vocab_start,
        vocab_size,
        group,
        temperature,
        jsd_beta,
        precise_kl,
    )
    with torch.no_grad():
        rows, second = call.measure()
    return call.stats(rows, second)


def differentiable_divergence(
    student_logits_TVp: torch.Tensor,
    teacher_logits_TVp: torch.Tensor | None,
    target_ids_T: torch.Tensor,
    *,
    vocab_start: int,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    jsd_beta: float | None = None,
    precise_kl: bool = False,
    inplace: bool = False,
) -> DivergenceStats:
    """As `vocab_parallel_divergence`; all but the teacher's own fields differentiate.

    student_logprobs, reverse_kl, forward_kl, jsd and student_entropy carry a gradient to the
    student logits; whatever the loss does with them, the backward pass is one sweep over the
    vocabulary with one coefficient per row and output, and no collective: each rank's upstream
    gradient must be that of the one loss all ranks of the group share. Double backward is
    refused. A row whose KL is infinite takes no gradient from that KL.

    Args:
        inplace: write the gradient into the storage of student_logits_TVp, which is then no
            longer the logits; backward can run once.
    """
    call = _Call(
        student_logits_TVp,
        teacher_logits_TVp,
        target_ids_T,
        vocab_start,
        vocab_size,
        group,
        temperature,
        jsd_beta,
        precise_kl,
    )
    outputs = _Divergence.apply(student_logits_TVp, call, inplace)
    return DivergenceStats(**dict(zip(call.fields(), outputs, strict=True)))


class _Call:
    """One checked call: the arguments every pass shares, and the passes."""

    def __init__(
        self, student, teacher, targets, vocab_start, vocab_size, group, temperature, beta, precise
    ):
        _check(student, teacher, targets, vocab_start, vocab_size, temperature, beta)
        self.student = student.detach()
        self.teacher = None if teacher is None else teacher.detach()
        self.targets = targets.detach()
        self.vocab_start = int(vocab_start)
        self.valid_cols = max(0, min(student.shape[1], vocab_size - self.vocab_start))
        if self.teacher is not None and self.teacher.shape[1] < self.valid_cols:
            raise OpError(
                f"teacher logits have {self.teacher.shape[1]} columns but this rank holds "
                f"{self.valid_cols} real ones; shard both heads at the same ids"
            )
        if beta is not None or precise:
            if teacher is None:
                raise OpError("jsd_beta and precise_kl need teacher logits; got None")
        self.group = group
        self.inv_temperature = 1.0 / float(temperature)
        self.beta = beta
        self.precise = precise
        self.impl = implementation_for(student)

    def measure(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Row statistics [T, 10], and the second pass's sums [T, 4] where something needs them."""
        shape = (self.vocab_start, self.valid_cols, self.inv_temperature)
        partials = self.impl.vp_stats(self.student, self.teacher, self.targets, *shape)
        rows = self.impl.vp_finish(gather_ranks(partials, self.group), self.targets)
        if self.beta is None and not self.precise:
            return rows, None
        beta = 0.5 if self.beta is None else self.beta
        sums = self.impl.vp_second(self.student, self.teacher, self.targets, rows, *shape[1:], beta)
        second = gather_ranks(sums, self.group).double()
        total = second[0]
        for rank_sums in second[1:]:  # in rank order: the same bits on every rank
            total = total + rank_sums
        return rows, total.to(rows.dtype)

    def fields(self) -> list[str]:
        """Names of the statistics this call returns, in the order of `outputs`."""
        names = ["student_logprobs", "student_entropy"]
        if self.teacher is not None:
            names += ["teacher_logprobs", "teacher_entropy", "reverse_kl", "forward_kl"]
        return names + (["jsd"] if self.beta is not None else [])

    def outputs(self, rows: torch.Tensor, second: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """The returned tensors. KLs are clamped at 0 here and nowhere else."""
        out = [rows[:, 0], rows[:, 4]]
        if self.teacher is not None:
            reverse, forward = rows[:, 2], rows[:, 3]
            if self.precise:
                assert second is not None
                reverse, forward = second[:, 2], second[:, 3]
                infinite = torch.full_like(reverse, float("inf"))
                reverse = torch.where(reverse > INFINITE_ABOVE, infinite, reverse)
                forward = torch.where(forward > INFINITE_ABOVE, infinite, forward)
            out += [rows[:, 1], rows[:, 5], reverse.clamp_min(0), forward.clamp_min(0)]
        if self.beta is not None:
            assert second is not None
            out.append(self.beta * second[:, 1] + (1.0 - self.beta) * second[:, 0])
        return tuple(x.contiguous() for x in out)

    def stats(self, rows: torch.Tensor, second: torch.Tensor | None) -> DivergenceStats:
        return DivergenceStats(**dict(zip(self.fields(), self.outputs(rows, second), strict=True)))


class _Divergence(torch.autograd.Function):
    """Statistics forward, the whole gradient in one pass backward."""

    @staticmethod
    def forward(ctx, student_logits, call: _Call, inplace: bool):
        rows, second = call.measure()
        ctx.set_materialize_grads(False)
        ctx.call, ctx.inplace, ctx.used = call, inplace, False
        ctx.save_for_backward(student_logits, rows, *([] if second is None else [second]))
        outputs = call.outputs(rows, second)
        names = call.fields()
        ctx.mark_non_differentiable(
            *[t for n, t in zip(names, outputs, strict=True) if n.startswith("teacher")]
        )
        return outputs

    @staticmethod
    def backward(ctx, *upstream):
        if torch.is_grad_enabled():
            raise OpError(
                "the vocab-parallel divergence has no second derivative; call backward without "
                "create_graph=True"
            )
        if ctx.used:
            raise OpError("inplace=True: the logits already hold the gradient; backward runs once")
        logits, rows, *second = ctx.saved_tensors
        call = ctx.call
        given = dict(zip(call.fields(), upstream, strict=True))
        mix = second[0][:, 0] if second else None
        coefficients = _coefficients(given, rows, mix)
        target = logits.detach() if ctx.inplace else torch.empty_like(logits)
        ctx.used = ctx.inplace
        call.impl.vp_grad_(
            logits.detach(),
            call.teacher,
            call.targets,
            rows,
            coefficients,
            call.vocab_start,
            call.valid_cols,
            call.inv_temperature,
            0.0 if call.beta is None else call.beta,  # 0: no row asks for a JSD gradient
            target,
        )
        return target, None, None


def _coefficients(given: dict, rows: torch.Tensor, mix: torch.Tensor | None) -> torch.Tensor:
    """[T, 6] upstream gradients of the row's statistics, in the order of ops.stats, and its mix."""
    zero = rows.new_zeros(rows.shape[0])
    names = ["student_logprobs", "reverse_kl", "forward_kl", "student_entropy", "jsd"]
    asked = [given.get(name) for name in names]
    columns = [zero if c is None else c.to(rows.dtype) for c in asked]
    return torch.stack([*columns, zero if mix is None else mix], dim=1)


def gather_ranks(local: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """[R, ...] the group's tensors in rank order: the op's only kind of collective."""
    if group is None or dist.get_world_size(group) == 1:
        return local[None]
    world = dist.get_world_size(group)
    out = local.new_empty((world * local.shape[0], *local.shape[1:]))
    dist.all_gather_into_tensor(out, local.contiguous(), group=group)
    return out.reshape(world, *local.shape)


def _check(student, teacher, targets, vocab_start, vocab_size, temperature, beta) -> None:
    if student.dim() != 2 or targets.shape != student.shape[:1]:
        raise OpError(
            "student logits must be [T, Vp] and targets [T]; got "
            f"{tuple(student.shape)} and {tuple(targets.shape)}; flatten batch and sequence first"
        )
    if student.dtype not in LOGIT_DTYPES or targets.dtype not in (torch.int64, torch.int32):
        raise OpError(
            f"logits must be one of {LOGIT_DTYPES} and targets int64 or int32; got "
            f"{student.dtype} and {targets.dtype}"
        )
    if teacher is not None:
        if teacher.dim() != 2 or teacher.shape[0] != student.shape[0]:
            raise OpError(
                f"teacher logits must be [T, Vp] with T = {student.shape[0]}; got "
                f"{tuple(teacher.shape)}"
            )
        if teacher.dtype != student.dtype or teacher.device != student.device:
            raise OpError(
                "teacher and student logits must share dtype and device; got "
                f"{teacher.dtype} on {teacher.device} and {student.dtype} on {student.device}"
            )
    if not temperature > 0:
        raise OpError(f"temperature must be > 0; got {temperature}")
    if vocab_start < 0 or vocab_size < 1:
        raise OpError(f"vocab_start >= 0, vocab_size >= 1; got {vocab_start}, {vocab_size}")
    if beta is not None and not 0 < beta < 1:
        raise OpError(
            f"jsd_beta must lie strictly between 0 and 1; got {beta}; its limits are the KLs "
            "(reverse_kl, forward_kl), which are always returned"
        )
    if not targets.is_cuda and targets.numel() and int(targets.max()) >= vocab_size:
        raise OpError(
            f"target id {int(targets.max())} is outside the vocabulary of {vocab_size}; "
            "use -100 for ignored rows"
        )
