"""How a run goes: updates, evaluation, alarms, weight transfer, records and plans."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_sod.config.sections.section import Section


class TrainConfig(Section):
    num_iterations: int = Field(gt=0, description="rounds of rollout and training")
    train_batch_size: int = Field(64, gt=0, description="prompts per iteration")
    ppo_mini_batch_size: int = Field(16, gt=0, description="prompts per optimizer step")
    tokens_per_micro_batch: int = Field(
        23040, gt=0, description="packed tokens of one forward pass, at most"
    )
    lr: float = Field(1e-6, ge=0, description="AdamW's learning rate")
    lr_warmup_steps: int = Field(0, ge=0, description="optimizer steps over which lr rises from 0")
    lr_decay_style: Literal["constant", "linear"] = Field(
        "constant", description="linear: falls to 0 with the last optimizer step"
    )
    weight_decay: float = Field(0.01, ge=0, description="AdamW; not on norms and biases")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW")
    clip_grad: float = Field(1.0, gt=0, description="global gradient norm")
    use_distributed_optimizer: bool = Field(
        True, description="optimizer state is split over data-parallel ranks"
    )
    param_offload: bool = Field(
        False, description="the student waits in host memory during rollouts and teacher scoring"
    )
    optimizer_offload: bool = Field(
        False, description="optimizer state waits in host memory outside the update; gradients go"
    )
    save_interval: int = Field(10, gt=0, description="iterations")
    keep_last: int = Field(2, gt=0, description="checkpoints kept")
    eval_interval: int | None = Field(10, gt=0, description="iterations; null: only at the ends")
    resume: str = Field("auto", description="auto | never | path of a checkpoint")
    export_hf: bool = Field(True, description="write the final student in Hugging Face format")


class EvalConfig(Section):
    num_samples: int = Field(32, gt=0, description="trajectories per prompt")
    temperature: float = Field(1.0, gt=0, description="of sampling")
    top_p: float = Field(
        0.6, gt=0, le=1, description="nucleus sampling; training always samples with 1"
    )
    teacher: bool = Field(False, description="also evaluate the teacher, once, before training")
    seeds: list[int] = Field([0], min_length=1, description="tools/evaluate.py: repeated for each")
    limit: int | None = Field(None, gt=0, description="tools/evaluate.py: first so many prompts")
    prompts_per_round: int = Field(
        32, gt=0, description="tools/evaluate.py: prompts sampled together, then written"
    )


class WatchdogConfig(Section):
    max_infra_error_rate: float = Field(
        0.05, ge=0, le=1, description="share of trajectories lost to infrastructure; above: stop"
    )
    action: Literal["warn", "pause", "rollback"] = Field(
        "warn",
        description="on an alarm: only say it; save and end; return to the last good checkpoint",
    )
    patience: int = Field(2, gt=0, description="iterations a signal must stay out of bounds")
    baseline_iterations: int = Field(
        3, gt=0, description="first iterations whose median the `share` bounds are relative to"
    )
    max_rollbacks: int = Field(2, ge=0, description="then pause")
    warn_infra_error_rate: float | None = Field(
        0.01, ge=0, le=1, description="share of trajectories"
    )
    max_malformed_rate: float | None = Field(
        0.5, ge=0, le=1, description="malformed share of all tool calls"
    )
    min_tool_calls_share: float | None = Field(0.5, ge=0, description="per trajectory")
    min_response_length_share: float | None = Field(
        0.3, ge=0, description="tokens the student wrote per trajectory"
    )
    max_response_length_share: float | None = Field(
        3.0, gt=0, description="as min_response_length_share"
    )
    min_entropy_share: float | None = Field(0.1, ge=0, description="of the student, per token")
    max_grad_norm_ratio: float | None = Field(
        10.0, gt=0, description="against the median of the last 20 iterations"
    )
    max_steps_skipped: float | None = Field(
        0, ge=0, description="optimizer steps of an iteration left out: gradient not finite"
    )
    min_step_weight: float | None = Field(0.1, ge=0, description="mean w_k")
    max_extreme_ratio_share: float | None = Field(
        0.05, ge=0, le=1, description="of tokens whose log-ratio is beyond 10 nats"
    )
    max_divergence_share: float | None = Field(3.0, gt=0, description="mean d_k")
    min_teacher_mass_share: float | None = Field(
        0.5, ge=0, description="mean teacher probability of the tokens the student sampled"
    )


class TransferConfig(Section):
    backend: Literal["auto", "shared_memory", "ipc", "p2p", "vllm_nccl", "vllm_ipc"] = Field(
        "auto", description="how weights reach the engines; auto: by hosts and devices"
    )
    bucket_mb: int = Field(256, gt=0, description="most a rank holds in transit, twice")
    keep_sent: bool = Field(
        True,
        description="shared_memory: hold what was sent, the model's size per engine, so that an "
        "engine started again can read it; false: two buckets",
    )
    pause: Literal["wait", "keep"] = Field(
        "wait", description="sequences in flight are finished first, or kept and go on afterwards"
    )
    timeout_s: float = Field(300, gt=0, description="silence of a peer after which a run stops")
    canary_interval: int = Field(
        1, gt=0, description="transfers between comparisons of engine and trainer logprobs"
    )
    canary_tolerance: float | None = Field(
        None,
        gt=0,
        description="nats; engine and trainer logprobs may differ by this on canaries; null: "
        "0.001, or 1 for a student in bfloat16, whose logits two kernels round differently",
    )
    num_canary_tokens: int = Field(32, gt=1, description="tokens of each canary sequence")

    def tolerance(self, dtype: str) -> float:
        """`canary_tolerance` for a student of this dtype."""
        # Logits of 16 and more come in steps of 0.125 in bfloat16; another layout is off by more.
        by_dtype = 1.0 if dtype == "bfloat16" else 1e-3
        return self.canary_tolerance or by_dtype


class ObserveConfig(Section):
    run_dir: str = Field("runs/{name}", description="{name} is replaced by `name`")
    loggers: list[Literal["console", "jsonl", "tensorboard", "wandb"]] = Field(
        ["console", "jsonl"], description="where the metrics of each iteration go"
    )
    project: str = Field("megatron_sod", description="wandb: the project runs are filed under")
    num_trajectories_kept: int = Field(8, ge=0, description="per iteration, for the report")
    stall_timeout_s: float = Field(
        600, gt=0, description="without a sign of progress of any rank, the job ends"
    )
    telemetry_interval_s: float | None = Field(
        1.0, gt=0, description="between samples of host memory and GPUs; null: none are taken"
    )


class PlanConfig(Section):
    """What --dry-run and the simulator assume of the rollouts. A run never reads it.

    The defaults are a public run of the method on 8 GPUs: 4,950 tokens and 4.2 assistant turns
    per trajectory at max_response_length 20,480.
    """

    mean_prompt_share: float = Field(0.15, gt=0, le=1, description="of rollout.max_prompt_length")
    mean_response_share: float = Field(
        0.24, gt=0, le=1, description="of rollout.max_response_length, observations included"
    )
    response_spread: float = Field(0.8, ge=0, description="standard deviation of log length")
    mean_turns: float = Field(4.2, ge=1, description="assistant turns per trajectory")
    observation_share: float = Field(0.1, ge=0, lt=1, description="of response tokens")
    tool_latency_s: float = Field(1.0, ge=0, description="median of one call")
    tool_latency_spread: float = Field(1.0, ge=0, description="standard deviation of log seconds")
    tool_slots: int | None = Field(
        None, gt=0, description="calls at a time, over all engines; null: no limit"
    )
