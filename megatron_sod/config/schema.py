"""Every configuration key, with its meaning, unit, default and range. The only home of defaults.

Keys without a default must be given. Megatron's and verl's words are kept where they exist.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Field(gt=0)
DType = Literal["float32", "bfloat16", "float64"]
GpuName = Literal["a100-80gb", "h100-80gb", "h200-141gb", "h20-96gb", "b200-180gb", "cpu"]


class Section(BaseModel):
    """A group of keys; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ClusterConfig(Section):
    num_nodes: int = Field(1, gt=0, description="machines in the job")
    gpus_per_node: int = Field(1, gt=0, description="trainer ranks per machine")
    gpu: GpuName = Field("h100-80gb", description="what --dry-run plans memory and times for")

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.gpus_per_node


class ParallelConfig(Section):
    tensor_model_parallel_size: int = Field(1, gt=0, description="ranks each layer is split over")
    pipeline_model_parallel_size: int = Field(
        1, gt=0, description="stages the layers are split into"
    )
    virtual_pipeline_model_parallel_size: int | None = Field(
        None, gt=1, description="model chunks per pipeline rank (interleaved schedule)"
    )
    context_parallel_size: int = Field(1, gt=0, description="ranks each sequence is split over")
    expert_model_parallel_size: int = Field(
        1, gt=0, description="ranks the experts are split over (MoE)"
    )
    expert_tensor_parallel_size: int | None = Field(
        None, gt=0, description="split of each expert; null: as tensor_model_parallel_size"
    )
    sequence_parallel: bool = Field(
        False, description="split activations between layers over the tensor-parallel ranks"
    )

    @property
    def expert_tp_size(self) -> int:
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    @property
    def model_parallel_size(self) -> int:
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
        )


class ModelConfig(Section):
    path: str = Field(description="directory in Hugging Face format")
    geometry: str | None = Field(
        None,
        description="for --dry-run where `path` does not exist yet: a name in configs/models, or "
        "another directory; null: the last component of `path`, lower case",
    )
    dtype: DType = Field("float32", description="parameters and computation")
    recompute: Literal["none", "selective", "full"] = Field(
        "none",
        description="activations made again in the backward pass: of attention, or of whole layers",
    )
    parallel: ParallelConfig = ParallelConfig()


class TeacherConfig(ModelConfig):
    source: Literal["model", "self"] = Field(
        "model",
        description="self: a frozen copy of the student's initial weights; every other key of this "
        "section then defaults to the student's",
    )
    privileged: Literal["none", "answer", "hint"] = Field(
        "none", description="what the teacher reads beside the task; its rows stay the student's"
    )
    max_privileged_length: int = Field(
        512, gt=0, description="tokens the privileged prompt may be longer; the text is cut to fit"
    )
    allow_template_mismatch: bool = Field(
        False, description="accept a teacher whose chat template or thinking mode differs"
    )


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


class DataConfig(Section):
    train: list[str] = Field(
        min_length=1, description="JSONL or Parquet files, or tiny_world:SPLIT:COUNT"
    )
    eval: list[str] = Field([], description="same forms; empty: no evaluation")
    prompt_key: str = Field("prompt", description="column with the question or the messages")
    answer_key: str = Field("answer", description="column with the reference answer")
    hint_key: str = Field("hint", description="column with the hint for teacher.privileged=hint")
    tools_in_prompt: bool = Field(True, description="list the tools in a system turn")
    enable_thinking: bool = Field(False, description="passed to the chat template")
    shuffle: bool = Field(True, description="new order each epoch, from `seed`")


class EngineConfig(Section):
    tensor_parallel_size: int = Field(1, gt=0, description="GPUs (on CPU: processes) of one engine")
    num_engines: int = Field(1, gt=0, description="vLLM engines")
    gpu_memory_utilization: float = Field(0.75, gt=0, le=1, description="GPU only")
    kv_cache_gb: float = Field(0.25, gt=0, description="CPU only: gigabytes of KV cache")
    max_num_seqs: int = Field(64, gt=0, description="sequences decoded together")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: the student's dtype"
    )
    quantization: str | None = Field(None, description="not supported yet: fp8 and the like")
    lora_rank: int | None = Field(None, gt=0, description="not supported yet")
    start_timeout_s: float = Field(
        300, gt=0, description="seconds until engines and workers must answer"
    )
    py_executable: str | None = Field(
        None,
        description="Python of the engines' own environment, same minor version and Ray as the "
        "trainer's; null: $SOD_ENGINE_PYTHON, else the trainer's",
    )


class RolloutConfig(Section):
    placement: Literal["colocated", "disaggregated"] = Field(
        "colocated", description="whether engines share the trainers' GPUs"
    )
    num_generations: int = Field(16, gt=1, description="trajectories per prompt (the group)")
    temperature: float = Field(1.0, gt=0, description="of sampling, scoring and the loss")
    max_turns: int = Field(16, gt=0, description="assistant turns per trajectory")
    max_tool_calls_per_turn: int = Field(1, gt=0, description="further calls are answered, not run")
    max_prompt_length: int = Field(2560, gt=0, description="tokens")
    max_response_length: int = Field(20480, gt=0, description="tokens, observations included")
    max_observation_length: int = Field(512, gt=0, description="tokens kept of each tool result")
    max_staleness: Literal[0, 1] = Field(
        0, description="1: the next rollout runs while this one is trained on, one version behind"
    )
    correct_mismatch: bool = Field(
        False, description="weigh losses by pi / mu without staleness too; always on with it"
    )
    partial_prompts: int = Field(
        0,
        ge=0,
        description="prompts in flight beyond the batch; what is unfinished when the batch is "
        "complete is interrupted and goes on in the next iteration with its weights",
    )
    importance_cap: float = Field(2.0, ge=1, description="of pi / mu per token")
    timeout_s: float = Field(1800, gt=0, description="one rollout phase at most")
    trajectory_timeout_s: float | None = Field(
        None, gt=0, description="one trajectory at most; what is cut so teaches nothing"
    )
    num_workers: int = Field(
        1, gt=0, description="processes that run agent loops, each with a sandbox of its own"
    )
    max_in_flight: int | None = Field(
        None, gt=0, description="trajectories at a time; null: twice what the engines decode"
    )
    max_restarts: int = Field(
        3, ge=0, description="engine and worker processes replaced per rollout; one more: stop"
    )
    record: bool = Field(False, description="keep every trajectory in RUN/rollouts")
    replay: str | None = Field(
        None, description="train on the rollouts of this folder; starts no engine and no sandbox"
    )
    engine: EngineConfig = EngineConfig()

    @property
    def corrects_behaviour(self) -> bool:
        """Whether losses are weighed for having been sampled from another policy."""
        return self.correct_mismatch or self.max_staleness > 0 or self.partial_prompts > 0


class SandboxConfig(Section):
    kind: Literal["local", "sandbox_fusion"] = Field(
        "local", description="programs run on this machine, or by a service"
    )
    url: list[str] = Field([], description="sandbox_fusion only: service addresses")
    level: str = Field("auto", description="isolation level: auto, L3, L2, L1, L0")
    allow_unsafe: bool = Field(False, description="permit L0: no isolation at all")
    timeout_s: float = Field(60, gt=0, description="wall time of one call")
    memory_mb: int = Field(2048, gt=0, description="of one call, all its processes together")
    warm: bool = Field(True, description="fork calls from a parent that has imported `preload`")
    preload: list[str] = Field([], description="modules imported once by the warm parent")
    max_concurrency: int | None = Field(None, gt=0, description="calls at a time; null: by cores")
    max_infra_retries: int = Field(2, ge=0, description="per call, on infrastructure errors")
    failure_rate: float = Field(
        0.0, ge=0, lt=1, description="the tiny world's dial: share of calls that answer a timeout"
    )


class RewardConfig(Section):
    kind: Literal["auto", "math", "choice", "exact", "code", "reference", "import"] = Field(
        "auto",
        description="auto: by each prompt's answer; reference: the public reference's -1.1 and 1",
    )
    function: str | None = Field(None, description="kind import: module.path:function")
    code_score: Literal["all", "fraction"] = Field(
        "all", description="a program earns 1 when all its tests pass, or the share that pass"
    )
    code_timeout_s: float = Field(10, gt=0, description="of one test")
    max_code_tests: int | None = Field(None, gt=0, description="the first so many only; null: all")
    tool_bonus: bool = Field(
        False, description="train on 1 for right and min(-0.6, -1 + 0.1 per tool call) for wrong"
    )
    overlong_buffer: int | None = Field(
        None,
        gt=0,
        description="student tokens before max_response_length over which the reward falls by 1",
    )


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
    min_step_weight: float | None = Field(0.1, ge=0, description="mean w_k")
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
    canary_tolerance: float = Field(
        1e-3, gt=0, description="nats; engine and trainer logprobs may differ by this on canaries"
    )
    num_canary_tokens: int = Field(32, gt=1, description="tokens of each canary sequence")


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
