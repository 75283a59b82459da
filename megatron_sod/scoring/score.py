"""No-gradient passes of teacher and student over an iteration's rollouts.

Only rows that carry loss reach the two output heads. The teacher runs first and leaves the hidden
states of those rows on the last stage; the student's pass applies both heads and the op.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron_sod.model.build import HiddenStateGPT, unwrapped
from megatron_sod.ops import vocab_parallel_divergence
from megatron_sod.train.schedule import forward_only
from megatron_sod.types import MicroBatch, TokenScores


def score(
    student: torch.nn.Module,
    teacher: HiddenStateGPT | None,
    micro_batches: list[MicroBatch],
    *,
    temperature: float,
    keep_teacher_hidden: bool = False,
    teacher_micro_batches: list[MicroBatch] | None = None,
) -> list[TokenScores]:
    """Scores of each micro-batch on the last pipeline stage; an empty list on other stages.

    Args:
        student: HiddenStateGPT, or the DDP module around it.
        teacher: None for methods without one.
        temperature: of the rollouts; both distributions are taken at it.
        keep_teacher_hidden: keep what the exact-KL losses need to apply the teacher's head again.
        teacher_micro_batches: what the teacher reads, if not the student's micro-batches; rows
            must agree one to one.
    """
    teacher_hidden: list[torch.Tensor] = []
    if teacher is not None:
        teacher.eval()
        teacher_hidden = forward_only(
            teacher,
            teacher_micro_batches or micro_batches,
            lambda hidden, batch, _: teacher.select_rows(hidden, batch.rows),
        )
    model = unwrapped(student)

    def rows_fn(hidden: torch.Tensor, batch: MicroBatch, number: int) -> TokenScores:
        held = teacher_logits = None
        if teacher is not None:
            held = teacher_hidden[number]
            teacher_logits = F.linear(held, teacher.head_weight())
        stats = vocab_parallel_divergence(
            model.output_logits(hidden, batch.rows),
            teacher_logits,
            batch.targets,
            vocab_start=model.vocab_start,
            vocab_size=model.real_vocab_size,
            group=model.pg_collection.tp,
            temperature=temperature,
        )
        assert stats.student_entropy is not None, "the op always gives the student's entropy"
        return TokenScores(
            student_logprobs=stats.student_logprobs,
            student_entropy=stats.student_entropy,
            teacher_logprobs=stats.teacher_logprobs,
            teacher_entropy=stats.teacher_entropy,
            reverse_kl=stats.reverse_kl,
            teacher_hidden=held if keep_teacher_hidden else None,
        )

    return forward_only(student, micro_batches, rows_fn)
