"""What a plan needs to know, drawn once from a distillation or an SFT configuration."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_sod.config.schema import (
    ClusterConfig,
    ModelConfig,
    ParallelConfig,
    RolloutConfig,
    SftConfig,
    SodConfig,
    TeacherConfig,
)
from megatron_sod.model.geometry import Geometry
from megatron_sod.plan.geometries import planned_geometry
from megatron_sod.plan.hardware import HARDWARE, Hardware
from megatron_sod.plan.roles import data_parallel_size

ELEMENT_BYTES = {"bfloat16": 2, "float32": 4, "float64": 8}
EXACT_LOSSES = ("reverse_kl", "forward_kl", "jsd")


@dataclass(frozen=True)
class PlannedModel:
    """A model, where it is spread, and the width of its numbers."""

    path: str
    geometry: Geometry
    parallel: ParallelConfig
    dtype: str
    recompute: str = "none"  # as student.recompute

    def with_vocabulary_of(self, other: PlannedModel) -> PlannedModel:
        """As a teacher is held: with as many vocabulary rows as the student."""
        rows = other.geometry.vocab_size
        return replace(self, geometry=replace(self.geometry, vocab_size=rows))

    @property
    def element_bytes(self) -> int:
        return ELEMENT_BYTES[self.dtype]


@dataclass(frozen=True)
class Workload:
    """Mean sizes of one iteration; tokens unless said otherwise."""

    num_trajectories: int
    prompt_tokens: float
    response_tokens: float  # tool results included
    loss_tokens: float  # written by the student
    num_turns: float
    num_optimizer_steps: int

    @property
    def tokens(self) -> float:
        """Of all trajectories."""
        return self.num_trajectories * (self.prompt_tokens + self.response_tokens)

    @property
    def rows(self) -> float:
        """Tokens that carry loss, of all trajectories."""
        return self.num_trajectories * self.loss_tokens


@dataclass(frozen=True)
class Job:
    """One run, seen by the planner. `rollout` is None for supervised fine-tuning."""

    name: str
    cluster: ClusterConfig
    hardware: Hardware
    student: PlannedModel
    tokens_per_micro_batch: int
    use_distributed_optimizer: bool
    workload: Workload
    teacher: PlannedModel | None = None
    rollout: RolloutConfig | None = None
    keeps_teacher_hidden: bool = False  # exact losses apply the teacher's head again in training
    offloaded: frozenset[str] = frozenset()  # of student, optimizer, teacher: on the host when idle

    @property
    def world_size(self) -> int:
        return self.cluster.world_size

    @property
    def dp_size(self) -> int:
        return data_parallel_size(self.world_size, self.student.parallel)


def job_of(config: SodConfig | SftConfig) -> Job:
    """
    Raises:
        ModelError: a model has neither a directory nor a shipped geometry.
    """
    common = dict(
        name=config.name,
        cluster=config.cluster,
        hardware=HARDWARE[config.cluster.gpu],
        student=_planned(config.student),
        tokens_per_micro_batch=config.train.tokens_per_micro_batch,
        use_distributed_optimizer=config.train.use_distributed_optimizer,
    )
    if isinstance(config, SftConfig):
        return Job(**common, workload=_sft_workload(config))  # type: ignore[arg-type]
    teacher = config.teacher if config.distill.coef > 0 else None
    return Job(
        **common,  # type: ignore[arg-type]
        workload=_workload(config),
        teacher=_planned(teacher) if teacher else None,
        rollout=config.rollout,
        keeps_teacher_hidden=config.distill.loss in EXACT_LOSSES,
        offloaded=_offloaded(config, teacher),
    )


def _offloaded(config: SodConfig, teacher: TeacherConfig | None) -> frozenset[str]:
    asked = {
        "student": config.train.param_offload,
        "optimizer": config.train.optimizer_offload,
        "teacher": teacher is not None and teacher.param_offload,
    }
    return frozenset(part for part, is_asked in asked.items() if is_asked)


def _planned(model: ModelConfig) -> PlannedModel:
    return PlannedModel(
        model.path, planned_geometry(model), model.parallel, model.dtype, model.recompute
    )


def _workload(config: SodConfig) -> Workload:
    plan, rollout, train = config.plan, config.rollout, config.train
    response = plan.mean_response_share * rollout.max_response_length
    return Workload(
        num_trajectories=train.train_batch_size * rollout.num_generations,
        prompt_tokens=plan.mean_prompt_share * rollout.max_prompt_length,
        response_tokens=response,
        loss_tokens=response * (1 - plan.observation_share),
        num_turns=min(plan.mean_turns, rollout.max_turns),
        num_optimizer_steps=train.train_batch_size // train.ppo_mini_batch_size,
    )


def _sft_workload(config: SftConfig) -> Workload:
    """One optimizer step; every conversation as long as is allowed."""
    length = config.data.max_length
    return Workload(config.train.global_batch_size, 0.0, length, length, 1.0, 1)
