"""Divergence straight from hidden states: both output heads, the op and the gradients, by chunks.

T tokens, A rows that carry loss, H student width, G teacher width, Vp this rank's vocabulary rows.
Only the A rows reach the heads; no [A, Vp] tensor larger than one chunk of rows ever exists. The
logits of a chunk are overwritten by their gradient and consumed by two matrix products before the
next chunk is made, so nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_sod.errors import OpError
from megatron_sod.ops.divergence import differentiable_divergence, vocab_parallel_divergence
from megatron_sod.ops.stats import DivergenceStats

LossFn = Callable[[DivergenceStats, torch.Tensor], torch.Tensor]
HEAD_BLOCK = 16384  # vocabulary rows of the head's gradient made at once


@dataclass(frozen=True)
class HeadPair:
    """Two output heads sharded over the same ranks, and how to read them.

    student_head_VpH: [Vp, H]; teacher_head_VpG: [Vp', G] or None; rows are ids vocab_start + v.
    chunk_rows: tokens whose logits exist at once.
    allreduce_dgrad: sum the hidden gradient over `group` here; False where the caller's own
        gather of a sequence-parallel input does it in its backward pass.
    """

    student_head_VpH: torch.Tensor
    teacher_head_VpG: torch.Tensor | None
    vocab_start: int
    vocab_size: int
    group: dist.ProcessGroup | None = None
    temperature: float = 1.0
    jsd_beta: float | None = None
    chunk_rows: int = 2048
    allreduce_dgrad: bool = True

    def options(self) -> dict:
        return dict(
            vocab_start=self.vocab_start,
            vocab_size=self.vocab_size,
            group=self.group,
            temperature=self.temperature,
            jsd_beta=self.jsd_beta,
        )


def fused_linear_divergence(
    student_hidden_TH: torch.Tensor,
    teacher_hidden_TG: torch.Tensor | None,
    target_ids_T: torch.Tensor,
    heads: HeadPair,
) -> DivergenceStats:
    """`vocab_parallel_divergence` from hidden states; [T] fields, 0 on ignored rows. No gradient.

    Distributed: one all-gather over the group per chunk; every rank must hold the same targets.
    """
    _check(student_hidden_TH, teacher_hidden_TG, target_ids_T, heads)
    chunks = []
    with torch.no_grad():
        rows_A = active_rows(target_ids_T)
        for rows in rows_A.split(heads.chunk_rows):
            student, teacher = _chunk_logits(student_hidden_TH, teacher_hidden_TG, rows, heads)
            chunks.append(
                vocab_parallel_divergence(student, teacher, target_ids_T[rows], **heads.options())
            )
    return _scattered(chunks, rows_A, target_ids_T, heads, student_hidden_TH.dtype)


def fused_linear_loss(
    student_hidden_TH: torch.Tensor,
    teacher_hidden_TG: torch.Tensor | None,
    target_ids_T: torch.Tensor,
    heads: HeadPair,
    loss_fn: LossFn,
) -> tuple[torch.Tensor, DivergenceStats]:
    """Sum of per-token losses of the divergence, with gradients for hidden states and head.

    loss = sum over chunks of loss_fn(stats of the chunk, its rows).sum()

    Args:
        student_hidden_TH: [T, H]; teacher_hidden_TG: [T, G] or None.
        target_ids_T: [T]; negative rows never reach a head.
        loss_fn: gets the chunk's DivergenceStats ([c] fields, differentiable) and the chunk's row
            numbers in 0..T-1 ([c] int64), returns [c] losses. It may be any function of the row's
            statistics: weights times a KL, or a clipped policy-gradient ratio.
    Returns:
        loss: scalar; differentiable in student_hidden_TH and heads.student_head_VpH. The head's
            gradient goes to its fp32 `main_grad` where Megatron gave it one.
        stats: as `fused_linear_divergence`.
    Distributed: one all-gather per chunk; one all-reduce of [T, H] in backward unless
        heads.allreduce_dgrad is False.
    """
    _check(student_hidden_TH, teacher_hidden_TG, target_ids_T, heads)
    collected: list[DivergenceStats] = []
    loss = _FusedLinear.apply(
        student_hidden_TH,
        heads.student_head_VpH,
        teacher_hidden_TG,
        target_ids_T,
        heads,
        loss_fn,
        collected,
    )
    rows_A = active_rows(target_ids_T)
    return loss, _scattered(collected, rows_A, target_ids_T, heads, student_hidden_TH.dtype)


class _FusedLinear(torch.autograd.Function):
    """All work in forward, at an upstream gradient of 1; backward scales by the real one."""

    @staticmethod
    def forward(ctx, hidden, head, teacher_hidden, targets, heads, loss_fn, collected):
        want_hidden, want_head = ctx.needs_input_grad[:2]
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        total = torch.zeros((), dtype=dtype, device=hidden.device)
        hidden_grad = torch.zeros_like(hidden) if want_hidden else None
        head_grad = torch.zeros(head.shape, dtype=dtype, device=head.device) if want_head else None
        for rows in active_rows(targets).split(heads.chunk_rows):
            student, teacher = _chunk_logits(hidden, teacher_hidden, rows, heads)
            loss, stats = _chunk_backward(student, teacher, targets[rows], rows, heads, loss_fn)
            collected.append(stats)
            total += loss.to(dtype)
            # `student` now holds the gradient of its own logits
            if hidden_grad is not None:
                hidden_grad[rows] = student @ head
            if head_grad is not None:
                _add_head_gradient(head_grad, student, hidden[rows])
        ctx.heads, ctx.head = heads, head
        ctx.save_for_backward(hidden_grad, head_grad)
        return total

    @staticmethod
    def backward(ctx, upstream):
        if torch.is_grad_enabled():
            raise OpError(
                "the fused linear divergence has no second derivative; call backward without "
                "create_graph=True"
            )
        hidden_grad, head_grad = ctx.saved_tensors
        heads = ctx.heads
        if hidden_grad is not None:
            hidden_grad = hidden_grad * upstream.to(hidden_grad.dtype)
            group = heads.group
            if heads.allreduce_dgrad and group is not None and dist.get_world_size(group) > 1:
                dist.all_reduce(hidden_grad, group=group)
        if head_grad is not None:
            head_grad = _deliver_head_gradient(ctx.head, head_grad, upstream)
        return hidden_grad, head_grad, *[None] * 5


def active_rows(target_ids_T: torch.Tensor) -> torch.Tensor:
    """[A] numbers of the rows that carry loss, ascending."""
    return torch.nonzero(target_ids_T >= 0)[:, 0]


def _chunk_logits(hidden, teacher_hidden, rows, heads: HeadPair):
    student = hidden[rows] @ heads.student_head_VpH.detach().t()
    if teacher_hidden is None or heads.teacher_head_VpG is None:
        return student, None
    return student, teacher_hidden[rows] @ heads.teacher_head_VpG.detach().t()


def _chunk_backward(student, teacher, targets, rows, heads: HeadPair, loss_fn: LossFn):
    """The chunk's loss; afterwards `student` holds d loss / d logits, exact 0 where no loss is."""
    with torch.enable_grad():
        logits = student.detach().requires_grad_()
        stats = differentiable_divergence(logits, teacher, targets, inplace=True, **heads.options())
        losses = loss_fn(stats, rows)
        if losses.shape != rows.shape:
            raise OpError(
                f"loss_fn must return one loss per row, {tuple(rows.shape)}; got "
                f"{tuple(losses.shape)}"
            )
        loss = losses.sum()
        if loss.requires_grad:
            torch.autograd.grad(loss, logits)
        else:
            student.zero_()  # nothing in the loss depends on the logits
    return loss.detach(), stats.detached()


def _add_head_gradient(head_grad, logits_grad, hidden) -> None:
    """head_grad += logits_grad^T @ hidden, accumulated in head_grad's precision, by blocks."""
    for start in range(0, head_grad.shape[0], HEAD_BLOCK):
        block = slice(start, start + HEAD_BLOCK)
        left = logits_grad[:, block].t()
        if left.dtype == head_grad.dtype:
            head_grad[block].addmm_(left, hidden)
        elif left.is_cuda:
            head_grad[block] += torch.mm(left, hidden, out_dtype=head_grad.dtype)
        else:
            head_grad[block].addmm_(left.to(head_grad.dtype), hidden.to(head_grad.dtype))


def _deliver_head_gradient(head, head_grad, upstream) -> torch.Tensor:
    """Into Megatron's fp32 main_grad where it exists; else the gradient in the head's dtype."""
    main_grad = getattr(head, "main_grad", None)
    if main_grad is None:
        return (head_grad * upstream).to(head.dtype)
    main_grad.add_((head_grad * upstream).to(main_grad.dtype))
    if hasattr(head, "grad_added_to_main_grad"):
        head.grad_added_to_main_grad = True  # Megatron's hook must not add it again
    # The hook still wants a gradient to have arrived: one zero, seen as the whole head.
    return head.new_zeros(1).expand(head.shape)


def _scattered(chunks, rows_A, target_ids_T, heads: HeadPair, dtype) -> DivergenceStats:
    """Chunk statistics back to [T]; rows without loss are exactly 0."""
    names = ["student_logprobs", "student_entropy"]
    if heads.teacher_head_VpG is not None:
        names += ["teacher_logprobs", "teacher_entropy", "reverse_kl", "forward_kl"]
    names += ["jsd"] if heads.jsd_beta is not None else []
    sums_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    fields = {}
    for name in names:
        out = torch.zeros(target_ids_T.shape, dtype=sums_dtype, device=target_ids_T.device)
        if chunks:
            out[rows_A] = torch.cat([getattr(chunk, name) for chunk in chunks])
        fields[name] = out
    return DivergenceStats(**fields)


def _check(hidden, teacher_hidden, targets, heads: HeadPair) -> None:
    head, teacher_head = heads.student_head_VpH, heads.teacher_head_VpG
    if hidden.dim() != 2 or hidden.shape[1] != head.shape[1] or targets.shape != hidden.shape[:1]:
        raise OpError(
            f"student hidden states must be [T, {head.shape[1]}] and targets [T]; got "
            f"{tuple(hidden.shape)} and {tuple(targets.shape)}"
        )
    if (teacher_hidden is None) != (teacher_head is None):
        raise OpError("teacher hidden states and the teacher's head come together or not at all")
    if teacher_head is not None and (
        teacher_hidden.shape != (hidden.shape[0], teacher_head.shape[1])
    ):
        raise OpError(
            f"teacher hidden states must be [{hidden.shape[0]}, {teacher_head.shape[1]}]; got "
            f"{tuple(teacher_hidden.shape)}"
        )
    if heads.chunk_rows < 1:
        raise OpError(f"chunk_rows must be at least 1; got {heads.chunk_rows}")
