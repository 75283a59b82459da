"""No-gradient passes of teacher and student over an iteration's rollouts.

Only rows that carry loss reach the two output heads. The teacher runs first and leaves the hidden
states of those rows on the student's last stage; the student's pass applies both heads and the op.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_sod.model.gpt import PipelineModel
from megatron_sod.ops import vocab_parallel_divergence
from megatron_sod.parallel.context import whole_rows
from megatron_sod.scoring.teacher import Teacher
from megatron_sod.train.schedule import forward_only
from megatron_sod.types import MicroBatch, TokenScores


def score(
    student: PipelineModel,
    teacher: Teacher | None,
    micro_batches: list[MicroBatch],
    *,
    temperature: float,
    keep_teacher_hidden: bool = False,
    teacher_micro_batches: list[MicroBatch] | None = None,
    hold: Callable[[str], None] | None = None,
) -> list[TokenScores]:
    """Scores of each micro-batch on the last pipeline stage; an empty list on other stages.

    Args:
        teacher: None for methods without one.
        temperature: of the rollouts; both distributions are taken at it.
        keep_teacher_hidden: keep what the exact-KL losses need to apply the teacher's head again.
        teacher_micro_batches: what the teacher reads, if not the student's micro-batches; rows
            must agree one to one.
        hold: called with the one of "teacher" and "student" whose turn on the device it is.
    """
    hold = hold or _stay
    teacher_hidden: list[torch.Tensor] = []
    if teacher is not None:
        hold("teacher")
        teacher_hidden = teacher.hidden_states(teacher_micro_batches or micro_batches)
    hold("student")
    groups = student.pg_collection

    def rows_fn(hidden: torch.Tensor, batch: MicroBatch, number: int) -> TokenScores:
        held = teacher_logits = None
        if teacher is not None:
            held = teacher_hidden[number]
            rows = batch.part_of(held.to(hidden.device, non_blocking=True))
            teacher_logits = F.linear(rows, teacher.head_weight())
        stats = vocab_parallel_divergence(
            student.output_logits(hidden, batch.rows),
            teacher_logits,
            batch.targets,
            vocab_start=student.vocab_start,
            vocab_size=student.real_vocab_size,
            group=groups.tp,
            temperature=temperature,
        )
        assert stats.student_entropy is not None, "the op always gives the student's entropy"
        part = TokenScores(
            student_logprobs=stats.student_logprobs,
            student_entropy=stats.student_entropy,
            teacher_logprobs=stats.teacher_logprobs,
            teacher_entropy=stats.teacher_entropy,
            reverse_kl=stats.reverse_kl,
            teacher_hidden=None,
        )
        whole = _whole_scores(part, batch, len(micro_batches[number].rows), groups.cp)
        return replace(whole, teacher_hidden=held if keep_teacher_hidden else None)

    return forward_only(student, micro_batches, rows_fn)


def _stay(name: str) -> None:
    """Every model is on the device anyway."""


def _whole_scores(
    part: TokenScores, batch: MicroBatch, num_rows: int, cp_group: dist.ProcessGroup
) -> TokenScores:
    """The scores of all rows on every context-parallel rank: a step may lie on several of them."""
    if batch.places is None:
        return part
    named = {f.name: v for f in fields(part) if (v := getattr(part, f.name)) is not None}
    columns = whole_rows(torch.stack(list(named.values()), 1), batch.places, num_rows, cp_group)
    return replace(part, **dict(zip(named, columns.unbind(1), strict=True)))
