"""Bytes of models and optimizer on a rank, by phase: what waits in host memory does not count."""

from __future__ import annotations

from megatron_sod.plan.hardware import RESERVE_BYTES
from megatron_sod.plan.job import Job, PlannedModel
from megatron_sod.plan.parameters import rank_parameters
from megatron_sod.plan.roles import expert_tensor_size

# part that may leave -> phases that hold it
HELD_IN = {
    "student": ("score", "train", "transfer", "save"),
    "optimizer": ("train", "save"),
    "teacher": ("score",),
}


def resident(job: Job, phase: str, pp_rank: int, teacher_pp_rank: int) -> dict[str, int]:
    """[component] bytes on one rank; a colocated engine comes on top."""
    away = {part for part in job.offloaded if phase not in HELD_IN[part]}
    weights, gradients, optimizer = training_state(job, pp_rank)
    body, head = _teacher(job, pp_rank, teacher_pp_rank)
    if phase == "score" and job.offloaded >= {"student", "teacher"}:
        away.add("student" if body > weights else "teacher")  # they take turns: the worse one
    return {
        "reserve": RESERVE_BYTES if job.hardware.memory_bytes else 0,
        "weights": 0 if "student" in away else weights,
        "gradients": 0 if "optimizer" in away else gradients,
        "optimizer": 0 if "optimizer" in away else optimizer,
        "teacher": head if "teacher" in away else head + body,
    }


def _teacher(job: Job, pp_rank: int, teacher_pp_rank: int) -> tuple[int, int]:
    """(what may leave, the head that stays with the student's logits) of the teacher's weights."""
    model = job.teacher
    if model is None:
        return 0, 0
    held = rank_parameters(model.geometry, model.parallel, teacher_pp_rank).total
    body, at_logits = held * model.element_bytes, is_last(job.student, pp_rank)
    head = head_bytes(model, job.student) if at_logits else 0
    return body if is_apart(job) else body - head, head


def training_state(job: Job, pp_rank: int) -> tuple[int, int, int]:
    """(weights, gradients, optimizer) bytes of the student on one rank.

    bfloat16 keeps float32 gradients and, sharded over data-parallel ranks by the distributed
    optimizer, a float32 copy of the weights beside Adam's two moments.
    """
    model, world = job.student, job.world_size
    held = rank_parameters(model.geometry, model.parallel, pp_rank)
    is_half = model.dtype == "bfloat16"
    gradient_bytes = 4 if is_half else model.element_bytes
    state_bytes = 12 if is_half else 2 * model.element_bytes
    if job.use_distributed_optimizer:
        pp = model.parallel.pipeline_model_parallel_size
        tp, ep = (
            model.parallel.tensor_model_parallel_size,
            model.parallel.expert_model_parallel_size,
        )
        dense_ranks = world // (tp * pp)
        expert_ranks = world // (expert_tensor_size(model.parallel) * ep * pp)
        optimizer = state_bytes * (held.dense / dense_ranks + held.expert / expert_ranks)
    else:
        optimizer = state_bytes * held.total
    return held.total * model.element_bytes, held.total * gradient_bytes, round(optimizer)


def is_last(model: PlannedModel, pp_rank: int) -> bool:
    """Whether this stage holds the output head."""
    return pp_rank == model.parallel.pipeline_model_parallel_size - 1


def is_apart(job: Job) -> bool:
    """The teacher has a layout of its own; its hidden states travel to the student's last stage."""
    return job.teacher is not None and job.teacher.parallel != job.student.parallel


def head_bytes(model: PlannedModel, split_like: PlannedModel) -> int:
    """A shard of an output head: the teacher's copy, or the student's gradient before it is added
    to the gradient buffer."""
    tp = split_like.parallel.tensor_model_parallel_size
    rows = model.geometry.padded_vocab_size(tp) // tp
    return rows * model.geometry.hidden_size * model.element_bytes
