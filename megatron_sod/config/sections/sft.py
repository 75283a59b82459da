"""The cold start's own keys."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_sod.config.sections.section import Section


class SftTrainConfig(Section):
    num_steps: int | None = Field(None, gt=0, description="optimizer steps; or give num_epochs")
    num_epochs: float | None = Field(None, gt=0, description="passes over the conversations")
    global_batch_size: int = Field(128, gt=0, description="conversations per optimizer step")
    tokens_per_micro_batch: int = Field(
        32768, gt=0, description="packed tokens of one forward pass, at most"
    )
    lr: float = Field(1e-5, ge=0, description="highest learning rate")
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="share of lr the cosine ends at")
    warmup_ratio: float = Field(
        0.1, ge=0, lt=1, description="share of the steps over which lr rises from 0"
    )
    weight_decay: float = Field(0.01, ge=0, description="AdamW; not on norms and biases")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW")
    adam_beta2: float = Field(0.95, ge=0, lt=1, description="AdamW")
    clip_grad: float = Field(1.0, gt=0, description="global gradient norm")
    use_distributed_optimizer: bool = Field(
        True, description="optimizer state is split over data-parallel ranks"
    )
    log_interval: int = Field(10, gt=0, description="optimizer steps")
    save_interval: int = Field(50, gt=0, description="optimizer steps; needs run_dir")
    keep_last: int = Field(1, gt=0, description="checkpoints kept")
    resume: str = Field("auto", description="auto | never | path of a checkpoint")


class SftDataConfig(Section):
    conversations: list[str] = Field(
        min_length=1, description="JSONL or Parquet with `messages`, or tiny_world:train:COUNT"
    )
    tools_in_prompt: bool = Field(True, description="list the tools in a system turn")
    enable_thinking: bool = Field(
        False, description="as data.enable_thinking of the rollouts to come: same turn openings"
    )
    max_length: int = Field(32768, gt=0, description="tokens")
    overlong: Literal["cut", "drop", "error"] = Field(
        "cut", description="what happens to longer conversations; cut: on the right"
    )
