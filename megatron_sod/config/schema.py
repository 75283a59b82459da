"""Every configuration key, with its meaning, unit, default and range: here and in `sections/`,
the only home of defaults.

Keys without a default must be given. Megatron's and verl's words are kept where they exist.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_sod.config.sections.models import (
    ClusterConfig,
    ModelConfig,
    ParallelConfig,
    TeacherConfig,
)
from megatron_sod.config.sections.objective import (
    DistillConfig,
    GrpoConfig,
    StepWeightConfig,
    WithdrawConfig,
)
from megatron_sod.config.sections.rollout import (
    DataConfig,
    EngineConfig,
    RewardConfig,
    RolloutConfig,
    SandboxConfig,
)
from megatron_sod.config.sections.run import (
    EvalConfig,
    ObserveConfig,
    PlanConfig,
    TrainConfig,
    TransferConfig,
    WatchdogConfig,
)
from megatron_sod.config.sections.section import Section
from megatron_sod.config.sections.sft import (
    SftDataConfig,
    SftTrainConfig,
)

__all__ = [
    "ClusterConfig",
    "DataConfig",
    "DistillConfig",
    "EngineConfig",
    "EvalConfig",
    "GrpoConfig",
    "ModelConfig",
    "ObserveConfig",
    "ParallelConfig",
    "PlanConfig",
    "RewardConfig",
    "RolloutConfig",
    "SandboxConfig",
    "SftConfig",
    "SftDataConfig",
    "SftTrainConfig",
    "SodConfig",
    "StepWeightConfig",
    "TeacherConfig",
    "TrainConfig",
    "TransferConfig",
    "WatchdogConfig",
    "WithdrawConfig",
]


class SodConfig(Section):
    name: str = Field("sod", description="names the run directory")
    seed: int = Field(0, description="of data order, sampling and initialisation")
    cluster: ClusterConfig = ClusterConfig()
    student: ModelConfig
    teacher: TeacherConfig | None = Field(None, description="not needed by grpo")
    method: Literal[
        "sod",
        "sod_no_grpo",
        "sod_no_cap",
        "sod_running_clip",
        "sod_heuristic",
        "sod_mask_after_wrong",
        "opd",
        "opd_naive",
        "opsd_gt",
        "opsd_hint",
        "grpo",
    ] = Field("sod", description="presets other keys, see config/methods.py")
    ref_compat: bool = Field(
        False, description="the reference's arithmetic where it differs on purpose; for parity"
    )
    grpo: GrpoConfig = GrpoConfig()
    distill: DistillConfig = DistillConfig()
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    sandbox: SandboxConfig = SandboxConfig()
    reward: RewardConfig = RewardConfig()
    train: TrainConfig
    eval: EvalConfig = EvalConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    transfer: TransferConfig = TransferConfig()
    observe: ObserveConfig = ObserveConfig()
    plan: PlanConfig = PlanConfig()


class SftConfig(Section):
    name: str = Field("sft", description="names the run directory")
    seed: int = Field(0, description="of data order, sampling and initialisation")
    cluster: ClusterConfig = ClusterConfig()
    student: ModelConfig
    data: SftDataConfig
    train: SftTrainConfig
    out: str = Field(description="directory the trained model is written to, in HF format")
    run_dir: str | None = Field(
        None, description="home of metrics.jsonl and checkpoints; null: neither is kept"
    )
