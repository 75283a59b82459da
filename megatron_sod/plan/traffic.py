"""Bytes one rank sends in an iteration, by the group it sends them over.

Collectives are counted as rings do them: over n ranks an all-gather or a reduce-scatter of a
tensor of B bytes sends B (n - 1) / n from each rank, an all-reduce twice that.
"""

from __future__ import annotations

from megatron_sod.plan.job import Job, PlannedModel
from megatron_sod.plan.memory import PARTIAL_SUMS_BYTES
from megatron_sod.plan.parameters import rank_parameters, total_parameters
from megatron_sod.plan.roles import expert_tensor_size

GROUPS = {
    "TP": "tensor parallel",
    "PP": "pipeline parallel",
    "CP": "context parallel",
    "EP": "expert parallel",
    "DP": "data parallel",
    "hidden": "teacher's hidden states to the student's ranks",
    "weights": "weight transfer, all engines together",
}


def iteration_traffic(job: Job) -> dict[str, float]:
    """[group] bytes a middle rank sends per iteration; "weights" counts what all engines receive.

    Zeros are left out.
    """
    passes = [(job.student, "train")]
    if job.rollout is not None:
        passes.append((job.student, "score"))
        if job.teacher is not None:
            passes.append((job.teacher, "score"))
    sent = dict.fromkeys(GROUPS, 0.0)
    for model, kind in passes:
        for group, size in pass_traffic(job, model, kind).items():
            sent[group] += size
    sent["DP"] = gradient_traffic(job)
    sent["hidden"] = hidden_traffic(job)
    if job.rollout is not None:
        sent["weights"] = float(transfer_bytes(job))
    return {group: size for group, size in sent.items() if size}


def pass_traffic(job: Job, model: PlannedModel, kind: str) -> dict[str, float]:
    """Of one rank in one pass over the iteration's tokens: kind "score" or "train" (backward too).

    A backward pass repeats the forward pass's collectives on gradients.
    """
    parallel, geometry = model.parallel, model.geometry
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    cp, ep = parallel.context_parallel_size, parallel.expert_model_parallel_size
    replicas = job.world_size // (tp * pp * cp)
    tokens = job.workload.tokens / (replicas * cp)
    rows = job.workload.rows / (replicas * cp)
    directions = 2 if kind == "train" else 1
    layers = geometry.num_layers / pp
    hidden_bytes = tokens * geometry.hidden_size * model.element_bytes
    ring = (tp - 1) / tp
    tensor = directions * layers * 4 * ring * hidden_bytes  # two all-reduces in each layer
    tensor += rows * PARTIAL_SUMS_BYTES * (tp - 1)
    boundary = hidden_bytes / (tp if parallel.sequence_parallel else 1)
    keys = 2 * geometry.num_query_groups * geometry.head_dim / tp
    context = directions * layers * (cp - 1) * tokens * keys * model.element_bytes
    expert = 0.0
    if geometry.is_moe:
        # tokens go to their experts and come back; tensor ranks that share an expert share them
        share = expert_tensor_size(parallel) / tp
        copies = 2 * geometry.experts_per_token * share * hidden_bytes
        expert = directions * layers * copies * (ep - 1) / ep
    return {
        "TP": tensor,
        "PP": directions * boundary if pp > 1 else 0.0,
        "CP": context,
        "EP": expert,
    }


def gradient_traffic(job: Job) -> float:
    """Gradients summed and weights spread again, for all optimizer steps of an iteration."""
    model, world = job.student, job.world_size
    parallel = model.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    held = rank_parameters(model.geometry, parallel, 0)
    gradient_bytes = 4 if model.dtype == "bfloat16" else model.element_bytes
    expert_ranks = expert_tensor_size(parallel) * parallel.expert_model_parallel_size * pp
    total = 0.0
    for elements, ranks in (
        (held.dense, world // (tp * pp)),
        (held.expert, world // expert_ranks),
    ):
        second = model.element_bytes if job.use_distributed_optimizer else gradient_bytes
        total += elements * (gradient_bytes + second) * (ranks - 1) / ranks
    return job.workload.num_optimizer_steps * total


def hidden_traffic(job: Job) -> float:
    """Rows of hidden states a teacher of another layout sends from each rank of its last stage."""
    teacher = job.teacher
    if teacher is None or teacher.parallel == job.student.parallel:
        return 0.0
    student = job.student.parallel
    receivers = student.tensor_model_parallel_size * student.context_parallel_size
    row = teacher.geometry.hidden_size * teacher.element_bytes
    senders = job.world_size // teacher.parallel.pipeline_model_parallel_size
    return job.workload.rows * row * receivers / senders


def transfer_bytes(job: Job) -> int:
    """What all engines receive after an update: one whole student each."""
    assert job.rollout is not None, "SFT has no engines"
    size = total_parameters(job.student.geometry) * job.student.element_bytes
    return size * job.rollout.engine.num_engines
