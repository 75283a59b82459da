"""The plan of a run: roles, memory, traffic and times, and what would not work about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_sod.config.schema import SftConfig, SodConfig
from megatron_sod.errors import ConfigError
from megatron_sod.model.geometry import layout_problems
from megatron_sod.plan.estimate import PhaseTimes, phase_times
from megatron_sod.plan.job import Job, job_of
from megatron_sod.plan.memory import (
    Components,
    Stage,
    engine_memory,
    engine_weights,
    kv_bytes_per_token,
    kv_cache_bytes,
    stage_memory,
    stage_of,
)
from megatron_sod.plan.resident import HELD_IN
from megatron_sod.plan.roles import Role, trainer_roles
from megatron_sod.plan.simulate import IterationTimes, simulate
from megatron_sod.plan.traffic import iteration_traffic
from megatron_sod.rollout.placement import engine_places

GIB = 2**30
# One tokenizer is padded to 151936 or 152064 rows; a run compares tokenizers, a plan has none.
_SAME_VOCABULARY = 0.99
# What to change when a component is the largest that a phase can give up.
_REMEDIES = {
    "weights": "raise student.parallel.tensor_model_parallel_size or pipeline_model_parallel_size",
    "gradients": "raise student.parallel.tensor_model_parallel_size or "
    "pipeline_model_parallel_size",
    "optimizer": "set train.use_distributed_optimizer, or raise cluster.num_nodes",
    "teacher": "raise teacher.parallel.tensor_model_parallel_size or pipeline_model_parallel_size",
    "activations": "set student.recompute=full, lower train.tokens_per_micro_batch, or raise "
    "student.parallel."
    "tensor_model_parallel_size with sequence_parallel",
    "logits": "lower train.tokens_per_micro_batch, or raise student.parallel."
    "tensor_model_parallel_size",
    "teacher hidden": "lower train.tokens_per_micro_batch",
    "engine weights": "raise rollout.engine.tensor_parallel_size",
    "KV cache": "lower rollout.engine.gpu_memory_utilization",
    "checkpoint gather": "raise student.parallel.tensor_model_parallel_size",
}

# component -> (the part it leaves with, the key that lets it)
_OFFLOAD_KEYS = {
    "weights": ("student", "train.param_offload"),
    "gradients": ("optimizer", "train.optimizer_offload"),
    "optimizer": ("optimizer", "train.optimizer_offload"),
    "teacher": ("teacher", "teacher.param_offload"),
}


@dataclass(frozen=True)
class Plan:
    """Everything --dry-run says."""

    job: Job
    roles: list[Role]
    memory: dict[Stage, dict[str, Components]]  # [stage][phase][component] bytes
    engine_only: Components  # of a GPU that serves an engine alone; empty when colocated
    traffic: dict[str, float]  # [group] bytes per iteration
    times: PhaseTimes
    iteration: IterationTimes | None  # None for SFT
    problems: list[str]


def make_plan(config: SodConfig | SftConfig) -> Plan:
    """
    Raises:
        ConfigError: the models cannot be split as the configuration asks.
        ModelError: a model's shapes are not known.
    """
    job = job_of(config)
    _check_layout(job)
    if job.teacher is not None:
        job = replace(job, teacher=job.teacher.with_vocabulary_of(job.student))
    teacher = job.teacher.parallel if job.teacher else None
    roles = trainer_roles(job.cluster, job.student.parallel, teacher, job.rollout)
    memory = {stage: stage_memory(job, stage) for stage in dict.fromkeys(map(stage_of, roles))}
    is_apart = job.rollout is not None and job.rollout.placement == "disaggregated"
    engine_only = engine_memory(job) if is_apart else {}
    problems = [*_gpu_problems(job), *_memory_problems(job, memory, engine_only)]
    return Plan(
        job=job,
        roles=roles,
        memory=memory,
        engine_only=engine_only,
        traffic=iteration_traffic(job),
        times=phase_times(job),
        iteration=simulate(config) if isinstance(config, SodConfig) else None,
        problems=problems + ([] if problems else list(_cache_problems(job))),
    )


def _check_layout(job: Job) -> None:
    problems = layout_problems(job.student.geometry, job.student.parallel, "student")
    if job.teacher is not None:
        problems += layout_problems(job.teacher.geometry, job.teacher.parallel, "teacher")
        sizes = job.teacher.geometry.vocab_size, job.student.geometry.vocab_size
        if min(sizes) < _SAME_VOCABULARY * max(sizes):
            problems.append(
                f"teacher: vocabulary of {sizes[0]} rows, the student has {sizes[1]}; distillation "
                "compares token by token: choose models of one family"
            )
    if problems:
        raise ConfigError("\n".join(problems))


def _gpu_problems(job: Job) -> Iterator[str]:
    if job.rollout is None or job.hardware.memory_bytes is None:
        return
    try:
        engine_places(job.cluster, job.rollout)
    except ConfigError as error:
        yield f"rollout: {error}"


def _memory_problems(
    job: Job, memory: dict[Stage, dict[str, Components]], engine_only: Components
) -> Iterator[str]:
    limit = job.hardware.memory_bytes
    if limit is None:
        return
    worst: dict[str, tuple[int, str, Components]] = {}
    for stage, phases in memory.items():
        for phase, components in phases.items():
            candidate = (sum(components.values()), f"pipeline stage {stage.pp}", components)
            worst[phase] = max(worst.get(phase, candidate), candidate, key=lambda entry: entry[0])
    for phase, (needed, where, components) in worst.items():
        if needed > limit:
            yield _does_not_fit(job, phase, where, components)
    if sum(engine_only.values()) > limit:
        yield _does_not_fit(job, "rollout", "an engine's GPU", engine_only)


def _does_not_fit(job: Job, phase: str, where: str, components: Components) -> str:
    limit = job.hardware.memory_bytes
    assert limit is not None, "no limit, no problem"
    largest = sorted(
        (name for name in components if name in _REMEDIES), key=components.__getitem__, reverse=True
    )
    named = ", ".join(f"{name} {components[name] / GIB:.1f}" for name in largest[:3])
    remedy = _offload(job, phase, largest[0]) or _REMEDIES[largest[0]]
    if "KV cache" in components:
        remedy = _lower_utilization(job, components) or remedy
    return (
        f"{phase}: {where} needs {sum(components.values()) / GIB:.1f} GiB, a {job.hardware.name} "
        f"has {limit / GIB:.1f}; largest: {named} GiB; {remedy}"
    )


def _offload(job: Job, phase: str, component: str) -> str | None:
    """The key that moves the component to the host in this phase; None: none does, or it is set."""
    part, key = _OFFLOAD_KEYS.get(component, ("", ""))
    if not part or phase in HELD_IN[part] or part in job.offloaded:
        return None
    return f"set {key}=true"


def _lower_utilization(job: Job, components: Components) -> str | None:
    """The highest gpu_memory_utilization that fits, in steps of 0.05; None: too little is left."""
    limit = job.hardware.memory_bytes
    assert limit is not None and job.rollout is not None, "engines on GPUs only"
    held = ("engine weights", "KV cache", "engine workspace")
    others = sum(size for name, size in components.items() if name not in held)
    share = int((limit - others) / limit * 20) / 20
    least = sum(components[name] for name in ("engine weights", "engine workspace"))
    if share * limit <= least + _longest(job) * kv_bytes_per_token(job):
        return None
    return f"lower rollout.engine.gpu_memory_utilization to {share:.2f}"


def _longest(job: Job) -> int:
    assert job.rollout is not None, "SFT has no rollouts"
    return job.rollout.max_prompt_length + job.rollout.max_response_length


def _cache_problems(job: Job) -> Iterator[str]:
    """An engine refuses to start when one longest trajectory does not fit its cache."""
    if job.rollout is None:
        return
    tokens, longest = kv_cache_bytes(job) / kv_bytes_per_token(job), _longest(job)
    if tokens < longest:
        yield (
            f"rollout: the KV cache of one engine holds {tokens:.0f} tokens beside "
            f"{engine_weights(job) / GIB:.1f} GiB of weights, the longest trajectory has "
            f"{longest}; raise rollout.engine.gpu_memory_utilization (kv_cache_gb on CPU) or "
            "tensor_parallel_size, or lower rollout.max_response_length"
        )
