"""How trajectories arise: prompts, engines, sandbox and reward."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_sod.config.sections.section import Section


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
        "colocated",
        description="engines on the trainers' GPUs, or on those after them on every machine",
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
    silence_timeout_s: float = Field(
        300,
        gt=0,
        description="an engine or worker without a sign of life for so long is replaced like a "
        "dead one; must exceed the longest forward pass",
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
    max_concurrency: int | None = Field(
        None,
        gt=0,
        description="calls at a time of each worker, graders apart; null: by cores, 32 per url",
    )
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
        False,
        description="train on 1 for right and min(-0.6, -1 + 0.1 per tool call run) for wrong",
    )
    overlong_buffer: int | None = Field(
        None,
        gt=0,
        description="student tokens before max_response_length over which the reward falls by 1",
    )
