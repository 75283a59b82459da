"""Seconds per phase from counted work and stated hardware constants.

matrix work of a token   2 x parameters it meets, forward; three times that with backward
attention                2 x layers x query width x context, forward, causal
head                     2 x vocabulary x width, only for rows that carry loss
a pipeline               stretched by (stages - 1 + micro-batches) / micro-batches
communication            bytes over bandwidth, added: overlap is not counted on
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sod.plan.job import Job, PlannedModel
from megatron_sod.plan.parameters import active_layer_parameters
from megatron_sod.plan.traffic import (
    gradient_traffic,
    hidden_traffic,
    pass_traffic,
    transfer_bytes,
)


@dataclass(frozen=True)
class PhaseTimes:
    """Seconds of one iteration's phases outside the rollout."""

    score_s: float
    train_s: float
    transfer_s: float


def forward_flops(model: PlannedModel, tokens: float, rows: float, context: float) -> float:
    """Of `tokens` tokens, `rows` of which reach the head, in sequences of `context` tokens."""
    geometry = model.geometry
    matrices = 2 * geometry.num_layers * active_layer_parameters(geometry)
    queries = geometry.num_attention_heads * geometry.head_dim
    attention = 2 * geometry.num_layers * queries * context
    head = 2 * geometry.vocab_size * geometry.hidden_size
    return tokens * (matrices + attention) + rows * head


def phase_times(
    job: Job, *, tokens: float | None = None, rows: float | None = None, context: float = 0.0
) -> PhaseTimes:
    """Of one iteration; the workload's means unless tokens, rows and context are given."""
    work = job.workload
    tokens, rows = tokens or work.tokens, rows or work.rows
    context = context or work.prompt_tokens + work.response_tokens
    score = train = 0.0
    if job.rollout is not None:
        score = _pass_s(job, job.student, "score", tokens, rows, context)
        if job.teacher is not None:
            score += _pass_s(job, job.teacher, "score", tokens, rows, context)
            score += hidden_traffic(job) / _bandwidth(job, "PP", job.teacher.parallel)
        score += job.hardware.score_overhead_s
    train = _pass_s(job, job.student, "train", tokens, rows, context)
    train += _gradient_s(job) + work.num_optimizer_steps * job.hardware.train_overhead_s
    return PhaseTimes(score, train, transfer_s(job) if job.rollout is not None else 0.0)


def _pass_s(job: Job, model: PlannedModel, kind: str, tokens, rows, context) -> float:
    hardware, parallel = job.hardware, model.parallel
    flops = forward_flops(model, tokens, rows, context)
    if kind == "train":
        flops *= 3
    efficiency = hardware.train_efficiency if kind == "train" else hardware.prefill_efficiency
    compute = flops / (job.world_size * hardware.peak_flops * efficiency)
    steps = job.workload.num_optimizer_steps if kind == "train" else 1
    replicas = job.world_size // parallel.model_parallel_size
    micro_batches = max(1.0, tokens / (replicas * steps * job.tokens_per_micro_batch))
    bubble = (parallel.pipeline_model_parallel_size - 1) / micro_batches
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    sent = pass_traffic(job, model, kind)
    scale = tokens / job.workload.tokens
    communication = scale * sum(
        size / _bandwidth(job, group, parallel) for group, size in sent.items() if size
    )
    return compute * (1 + bubble / chunks) + communication


def _bandwidth(job: Job, group: str, parallel) -> float:
    """Bytes per second of the slowest link the group spans."""
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    span = {
        "TP": tp,
        "CP": tp * cp,
        "EP": parallel.expert_tp_size * parallel.expert_model_parallel_size,
        "DP": job.world_size // parallel.pipeline_model_parallel_size,
        "PP": job.world_size,  # stages lie furthest apart
    }[group]
    hardware = job.hardware
    inside = span <= job.cluster.gpus_per_node
    link = hardware.link_bandwidth if inside else hardware.network_bandwidth
    return link * hardware.link_efficiency


def _gradient_s(job: Job) -> float:
    return gradient_traffic(job) / _bandwidth(job, "DP", job.student.parallel)


def transfer_s(job: Job) -> float:
    """The slower of the trainers sending and one engine GPU receiving, and the fixed part."""
    assert job.rollout is not None, "SFT has no engines"
    hardware, engine = job.hardware, job.rollout.engine
    crosses_nodes = job.rollout.placement == "disaggregated" or job.cluster.num_nodes > 1
    link = hardware.network_bandwidth if crosses_nodes else hardware.link_bandwidth
    link *= hardware.link_efficiency
    total = transfer_bytes(job)
    received = total / (engine.num_engines * engine.tensor_parallel_size)
    owners = job.student.parallel.model_parallel_size * job.dp_size
    return hardware.transfer_overhead_s + max(received, total / owners) / link
