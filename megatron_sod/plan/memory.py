"""Bytes every rank holds in each phase, by what holds them.

Weights, gradients, optimizer state and logits are exact counts of what the trainer allocates;
activations count what Transformer-Engine layers keep for the backward pass (flash attention,
no dropout), and are good to about a fifth. A micro-batch is taken as full and every row of it as
carrying loss: the worst case.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sod.plan.hardware import RESERVE_BYTES
from megatron_sod.plan.job import Job, PlannedModel
from megatron_sod.plan.parameters import rank_parameters, total_parameters
from megatron_sod.plan.resident import head_bytes, is_apart, is_last, resident
from megatron_sod.plan.roles import Role, expert_tensor_size

PHASES = ("rollout", "score", "train", "transfer", "save")
STATISTICS_BYTES = 64  # per row: what scoring and credit keep beside the logits
PARTIAL_SUMS_BYTES = 40  # per row and tensor-parallel rank, in the op's one all-gather
ENGINE_WORKSPACE_BYTES = 3 * 2**30  # graphs, sampler and the profiled prefill
TRANSFER_BUCKET_BYTES = 2 * 256 * 2**20

Components = dict[str, int]  # what -> bytes


@dataclass(frozen=True)
class Stage:
    """What tells apart ranks whose memory differs."""

    pp: int
    teacher_pp: int
    has_engine: bool


def stage_of(role: Role) -> Stage:
    return Stage(role.pp, role.teacher_pp, role.engine is not None)


def stage_memory(job: Job, stage: Stage) -> dict[str, Components]:
    """[phase][component] bytes on the GPU of a rank of this stage; zeros left out."""
    of_phase = {
        "rollout": {},
        "score": _score(job, stage),
        "train": _train(job, stage),
        "transfer": {"transfer buckets": _bucket(job)},
        "save": {"checkpoint gather": _gather(job, stage)},
    }
    engine = engine_components(job, stage)
    phases: dict[str, Components] = {
        phase: resident(job, phase, stage.pp, stage.teacher_pp) | engine | more
        for phase, more in of_phase.items()
    }
    if job.rollout is None:
        phases = {name: phases[name] for name in ("train", "save")}
    return {
        phase: {name: round(size) for name, size in components.items() if size}
        for phase, components in phases.items()
    }


def _tokens(job: Job, model: PlannedModel) -> float:
    """Of one micro-batch on one context-parallel rank."""
    return job.tokens_per_micro_batch / model.parallel.context_parallel_size


def logit_bytes(job: Job, model: PlannedModel, rows: float) -> int:
    """One model's logits of `rows` rows, on a rank of the student's last stage.

    The teacher's head is split there as the student's is.
    """
    tp = job.student.parallel.tensor_model_parallel_size
    columns = model.geometry.padded_vocab_size(tp) // tp
    return round(rows * columns * model.element_bytes)


def _score(job: Job, stage: Stage) -> Components:
    models = [(job.student, stage.pp)]
    if job.teacher is not None:
        models.append((job.teacher, stage.teacher_pp))
    rows = _tokens(job, job.student)
    working = max(_working_set(model, _tokens(job, model)) for model, _ in models)
    components = {"activations": round(working)}
    if is_last(job.student, stage.pp):
        components["logits"] = sum(logit_bytes(job, model, rows) for model, _ in models)
        components["op buffers"] = _op_buffers(job, rows)
        components["scores"] = round(STATISTICS_BYTES * _rows_of_rank(job))
    components["teacher hidden"] = _teacher_hidden(job, stage)
    return components


def _train(job: Job, stage: Stage) -> Components:
    model, rows = job.student, _tokens(job, job.student)
    kept = activation_bytes(model, _tokens(job, model), stage.pp)
    working = 2 * _working_set(model, _tokens(job, model))
    components = {"activations": round(kept + working)}
    if is_last(model, stage.pp):
        logits = logit_bytes(job, model, rows)
        if job.teacher is not None and job.keeps_teacher_hidden:
            logits += logit_bytes(job, job.teacher, rows)
            components["teacher hidden"] = _hidden_bytes(job, job.teacher)
        components["logits"] = logits
        components["op buffers"] = _op_buffers(job, rows) + head_bytes(model, model)
        components["scores"] = round(STATISTICS_BYTES * _rows_of_rank(job))
    return components


def _rows_of_rank(job: Job) -> float:
    """Loss rows of an iteration on one data-parallel rank: the mean, not the worst case."""
    return job.workload.rows / job.dp_size if job.rollout is not None else 0.0


def _teacher_hidden(job: Job, stage: Stage) -> int:
    """Of one micro-batch, where it is made and where the student's head is; those of the others
    wait in host memory."""
    if job.teacher is None:
        return 0
    at_student = is_last(job.student, stage.pp)
    at_teacher = is_apart(job) and is_last(job.teacher, stage.teacher_pp)
    return (at_student + at_teacher) * _hidden_bytes(job, job.teacher)


def _hidden_bytes(job: Job, teacher: PlannedModel) -> int:
    """Teacher hidden states of one whole micro-batch."""
    rows = job.tokens_per_micro_batch
    return rows * teacher.geometry.hidden_size * teacher.element_bytes


def _op_buffers(job: Job, rows: float) -> int:
    tp = job.student.parallel.tensor_model_parallel_size
    return round(rows * (PARTIAL_SUMS_BYTES * (tp + 1) + STATISTICS_BYTES))


def activation_bytes(model: PlannedModel, tokens: float, pp_rank: int) -> float:
    """Kept for the backward pass by all micro-batches in flight on a stage (1F1B schedule)."""
    parallel = model.parallel
    pp, chunks = (
        parallel.pipeline_model_parallel_size,
        (parallel.virtual_pipeline_model_parallel_size),
    )
    in_flight = pp - pp_rank + ((pp - 1) / chunks if chunks else 0.0)
    layers = model.geometry.num_layers / pp
    return in_flight * layers * tokens * _kept_elements(model) * model.element_bytes


def _kept_elements(model: PlannedModel) -> float:
    """Of one token and layer until the backward pass; with full recomputation the layer's input."""
    if model.recompute != "full":
        return layer_activation_elements(model)
    parallel = model.parallel
    return model.geometry.hidden_size / (
        parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    )


def layer_activation_elements(model: PlannedModel) -> float:
    """Numbers one token leaves behind in one layer, on one rank."""
    geometry, parallel = model.geometry, model.parallel
    tp = parallel.tensor_model_parallel_size
    hidden = geometry.hidden_size / (tp if parallel.sequence_parallel else 1)
    queries = geometry.num_attention_heads * geometry.head_dim
    keys = geometry.num_query_groups * geometry.head_dim
    norms = 4 * hidden  # input and output of both
    attention = 3 * (queries + keys) / tp  # around q/k norms, rotary embedding and attention
    return norms + attention + _feed_forward_elements(model)


def _feed_forward_elements(model: PlannedModel) -> float:
    """gate and up, silu(gate), their product; with experts also each token's copies."""
    geometry, parallel = model.geometry, model.parallel
    tp = parallel.tensor_model_parallel_size
    if not geometry.is_moe:
        return 4 * geometry.ffn_hidden_size / tp
    copies = 2 * geometry.hidden_size * expert_tensor_size(parallel) / tp
    return geometry.experts_per_token * (copies + 4 * geometry.expert_ffn_hidden_size / tp)


def _working_set(model: PlannedModel, tokens: float) -> float:
    """Alive at once inside one layer of a forward pass."""
    return tokens * layer_activation_elements(model) * model.element_bytes


def engine_components(job: Job, stage: Stage) -> Components:
    """What the engine on this GPU holds, from its start on."""
    if job.rollout is None or not stage.has_engine:
        return {}
    weights, cache = engine_weights(job), kv_cache_bytes(job)
    workspace = ENGINE_WORKSPACE_BYTES if job.hardware.memory_bytes else 0
    return {"engine weights": weights, "KV cache": cache, "engine workspace": workspace}


def engine_weights(job: Job) -> int:
    """One engine GPU's part of the student."""
    assert job.rollout is not None, "SFT has no engines"
    engine = job.rollout.engine
    width = (
        job.student.element_bytes
        if engine.dtype == "auto"
        else (2 if engine.dtype == "bfloat16" else 4)
    )
    return total_parameters(job.student.geometry) * width // engine.tensor_parallel_size


def kv_cache_bytes(job: Job) -> int:
    """One engine GPU's cache: what gpu_memory_utilization leaves beside weights and workspace."""
    assert job.rollout is not None, "SFT has no engines"
    memory, engine = job.hardware.memory_bytes, job.rollout.engine
    if memory is None:
        return round(engine.kv_cache_gb * 2**30)
    budget = engine.gpu_memory_utilization * memory
    return max(0, round(budget) - engine_weights(job) - ENGINE_WORKSPACE_BYTES)


def kv_bytes_per_token(job: Job) -> float:
    """On one engine GPU; more tensor-parallel ranks than KV heads hold copies."""
    assert job.rollout is not None, "SFT has no engines"
    geometry, tp = job.student.geometry, job.rollout.engine.tensor_parallel_size
    heads = max(1.0, geometry.num_query_groups / tp)
    width = 4 if job.student.dtype == "float32" else 2
    return 2 * geometry.num_layers * heads * geometry.head_dim * width


def _bucket(job: Job) -> int:
    return TRANSFER_BUCKET_BYTES if job.hardware.memory_bytes else 0


def _gather(job: Job, stage: Stage) -> int:
    """One float32 state of this rank's model-parallel shard, gathered over data-parallel ranks."""
    held = rank_parameters(job.student.geometry, job.student.parallel, stage.pp).total
    return 4 * held if job.use_distributed_optimizer and job.dp_size > 1 else 0


def engine_memory(job: Job) -> Components:
    """Of a GPU that only an engine uses (disaggregated placement)."""
    reserve = RESERVE_BYTES if job.hardware.memory_bytes else 0
    return {"reserve": reserve} | engine_components(job, Stage(0, 0, True))
