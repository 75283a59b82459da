"""What a student is trained on: the group-relative term and the distillation term."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_sod.config.sections.section import Section


class GrpoConfig(Section):
    coef: float = Field(1.0, ge=0, description="weight of the group-relative advantage")
    clip_low: float = Field(0.2, ge=0, lt=1, description="ratio clipped below at 1 - clip_low")
    clip_high: float = Field(0.28, ge=0, description="ratio clipped above at 1 + clip_high")
    dual_clip: float = Field(3.0, gt=1, description="loss bound for negative advantages")


class StepWeightConfig(Section):
    policy: Literal["sod", "uniform", "no_cap", "running_clip", "heuristic", "mask_after_wrong"] = (
        Field("sod", description="how w_k follows from d_k")
    )
    source: Literal["sampled", "reverse_kl"] = Field(
        "sampled", description="per-token divergence averaged into d_k"
    )
    epsilon: float = Field(1e-6, gt=0, description="nats; keeps the ratio finite")
    delta: float = Field(0.2, ge=0, description="w_k is capped at 1 + delta")
    d_floor: float | None = Field(
        None, ge=0, le=1, description="anchor d_1 clipped from below at this quantile of batch d"
    )
    w_min: float | None = Field(None, ge=0, le=1, description="w_k is clipped from below at this")


class WithdrawConfig(Section):
    start_iteration: int = Field(ge=0, description="last iteration at the full distill.coef")
    end_iteration: int = Field(gt=0, description="first iteration at final_coef; linear between")
    final_coef: float = Field(0.0, ge=0, description="`distill.coef` from then on")


class DistillConfig(Section):
    loss: Literal["sampled_advantage", "sampled_separate", "reverse_kl", "forward_kl", "jsd"] = (
        Field("sampled_advantage", description="the distillation term; see docs/mathematics.md")
    )
    coef: float = Field(1.0, ge=0, description="weight of the distillation term")
    jsd_beta: float = Field(0.5, gt=0, lt=1, description="teacher share of the JSD mixture")
    log_ratio_clip: float | None = Field(
        10.0, gt=0, description="nats; per-token log-ratio is clipped to +- this; null: never"
    )
    withdraw: WithdrawConfig | None = Field(
        None, description="lower `coef` on the way, for teachers the student may outgrow"
    )
    exclude_token_ids: list[int] = Field(
        [], description="ids left out of d_k and of the distillation term, e.g. think tags"
    )
    step_weight: StepWeightConfig = StepWeightConfig()
