"""Rules over several keys, checked before any process starts. Each returns what to change."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

from megatron_sod.config.schema import ParallelConfig, SftConfig, SodConfig


def cross_field_problems(config: BaseModel) -> list[str]:
    """Every broken rule of `config`, one line each."""
    if isinstance(config, SodConfig):
        return [*_layout(config), *_batches(config), *_roles(config), *_engines(config)]
    if isinstance(config, SftConfig):
        return [
            *_parallel_problems("student", config.student.parallel, config.cluster),
            *_cold_start(config),
        ]
    return []


def _cold_start(config: SftConfig) -> Iterator[str]:
    train, data = config.train, config.data
    if (train.num_steps is None) == (train.num_epochs is None):
        yield "give either train.num_steps or train.num_epochs, not both and not neither"
    longest = _padded(data.max_length, [config.student.parallel])
    if train.tokens_per_micro_batch < longest:
        yield (
            f"train.tokens_per_micro_batch {train.tokens_per_micro_batch} is below data.max_length "
            f"{longest}: one conversation must fit; raise the first or lower the second"
        )


def _parallel_problems(role: str, parallel: ParallelConfig, cluster) -> Iterator[str]:
    size, world = parallel.model_parallel_size, cluster.world_size
    if world % size:
        yield (
            f"{role}.parallel: tensor x pipeline x context parallel size {size} does not divide "
            f"the {world} ranks of `cluster`; change cluster.gpus_per_node or {role}.parallel"
        )
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        yield f"{role}.parallel.sequence_parallel needs tensor_model_parallel_size > 1"
    stages = parallel.pipeline_model_parallel_size
    if parallel.virtual_pipeline_model_parallel_size and stages == 1:
        yield (
            f"{role}.parallel.virtual_pipeline_model_parallel_size needs "
            "pipeline_model_parallel_size > 1; drop it"
        )
    experts = parallel.expert_tp_size * parallel.expert_model_parallel_size
    if world % (experts * stages):
        yield (
            f"{role}.parallel: expert tensor x expert x pipeline parallel size {experts * stages} "
            f"does not divide the {world} ranks of `cluster`; change one of them"
        )
    is_split_alike = parallel.expert_tp_size == parallel.tensor_model_parallel_size
    if not is_split_alike and parallel.expert_model_parallel_size == 1:
        yield (
            f"{role}.parallel.expert_tensor_parallel_size needs expert_model_parallel_size > 1: "
            "Megatron sums the gradients of whole experts over expert-parallel layouts only"
        )


def _layout(config: SodConfig) -> Iterator[str]:
    yield from _parallel_problems("student", config.student.parallel, config.cluster)
    if config.teacher is not None:
        yield from _parallel_problems("teacher", config.teacher.parallel, config.cluster)


def _batches(config: SodConfig) -> Iterator[str]:
    train, rollout = config.train, config.rollout
    if train.train_batch_size % train.ppo_mini_batch_size:
        yield (
            f"train.train_batch_size {train.train_batch_size} is not a multiple of "
            f"train.ppo_mini_batch_size {train.ppo_mini_batch_size}; "
            "make the first a multiple of the second"
        )
    longest = rollout.max_prompt_length + rollout.max_response_length
    parts = "rollout.max_prompt_length + max_response_length"
    if config.teacher is not None and config.teacher.privileged != "none":
        longest += config.teacher.max_privileged_length
        parts += " + teacher.max_privileged_length"
    layouts = [config.student.parallel]
    layouts += [config.teacher.parallel] if config.teacher is not None else []
    longest = _padded(longest, layouts)
    if train.tokens_per_micro_batch < longest:
        yield (
            f"train.tokens_per_micro_batch {train.tokens_per_micro_batch} is below the longest "
            f"trajectory, {parts} = {longest}; raise it"
        )
    if rollout.partial_prompts > train.train_batch_size:
        yield (
            f"rollout.partial_prompts {rollout.partial_prompts} exceeds train.train_batch_size "
            f"{train.train_batch_size}: what is carried over has to fit into the next iteration"
        )
    if rollout.max_observation_length >= rollout.max_response_length:
        yield "rollout.max_observation_length must be below rollout.max_response_length"


def _padded(length: int, layouts: list[ParallelConfig]) -> int:
    """What a sequence of `length` tokens grows to: context parallelism cuts it into 2 x C parts."""
    sizes = [layout.context_parallel_size for layout in layouts]
    unit = math.lcm(*(2 * size for size in sizes if size > 1))
    return -(-length // unit) * unit


def _schedules(config: SodConfig) -> Iterator[str]:
    withdraw = config.distill.withdraw
    if withdraw is not None and withdraw.end_iteration <= withdraw.start_iteration:
        yield "distill.withdraw.end_iteration must be above start_iteration"
    if withdraw is not None and withdraw.final_coef == 0 and config.grpo.coef == 0:
        yield (
            "distill.withdraw ends at final_coef 0 and grpo.coef is 0: nothing would be learnt "
            "from then on; raise one"
        )
    if config.ref_compat:
        yield from _not_in_the_reference(config)


def _not_in_the_reference(config: SodConfig) -> Iterator[str]:
    distill, weight = config.distill, config.distill.step_weight
    if weight.d_floor is not None or weight.w_min is not None:
        yield "ref_compat: the reference has no d_floor or w_min; set both to null"
    if weight.source != "sampled":
        yield "ref_compat: the reference has distill.step_weight.source sampled only"
    if distill.loss != "sampled_advantage":
        yield "ref_compat: the reference has distill.loss sampled_advantage only"
    if distill.withdraw is not None or distill.exclude_token_ids:
        yield "ref_compat: the reference has no distill.withdraw or exclude_token_ids; drop them"
    if config.rollout.corrects_behaviour:
        yield (
            "ref_compat: the reference does not correct for older or other weights; set "
            "rollout.max_staleness 0, partial_prompts 0 and correct_mismatch false"
        )


def _roles(config: SodConfig) -> Iterator[str]:
    if config.distill.coef > 0 and config.teacher is None:
        yield f"method {config.method} distils from a teacher; give teacher.path or use method=grpo"
    if config.distill.coef == 0 and config.grpo.coef == 0:
        yield "grpo.coef and distill.coef are both 0: nothing would be learnt; raise one"
    if config.teacher is not None and config.teacher.source == "self":
        if config.teacher.path != config.student.path:
            yield (
                f"teacher.source self copies the student, but teacher.path {config.teacher.path} "
                f"is not student.path {config.student.path}; drop teacher.path"
            )
        if config.teacher.privileged == "none":
            yield (
                "teacher.source self with teacher.privileged none is the student's own opinion; "
                "set teacher.privileged to answer or hint"
            )
    yield from _schedules(config)
    if config.sandbox.kind == "sandbox_fusion" and not config.sandbox.url:
        yield "sandbox.kind sandbox_fusion needs sandbox.url, a list of service addresses"
    if config.reward.kind == "import" and not config.reward.function:
        yield "reward.kind import needs reward.function, e.g. my_rewards:grade"
    if config.rollout.replay is not None:
        yield from _replay(config, config.rollout.replay)
    if config.eval.teacher and config.teacher is None:
        yield "eval.teacher needs a teacher section"


def _engines(config: SodConfig) -> Iterator[str]:
    engine = config.rollout.engine
    if engine.quantization is not None:
        yield (
            f"rollout.engine.quantization {engine.quantization} is not supported yet: a transfer "
            "writes the trainer's numbers as they are, so a quantised engine would need scales; "
            "set it to null and use engine.dtype bfloat16"
        )
    if engine.lora_rank is not None:
        yield (
            "rollout.engine.lora_rank is not supported yet: whole parameters are trained and "
            "transferred; set it to null"
        )
    if config.transfer.backend == "vllm_nccl" and config.rollout.placement == "colocated":
        yield (
            "transfer.backend vllm_nccl needs rollout.placement=disaggregated: NCCL refuses two "
            "processes of one GPU; use auto"
        )
    if config.transfer.backend == "vllm_ipc" and config.cluster.world_size > 1:
        yield "transfer.backend vllm_ipc works with one trainer rank only; use auto"


def _replay(config: SodConfig, folder: str) -> Iterator[str]:
    if config.rollout.record:
        yield "rollout.replay and rollout.record exclude each other: a replay makes no rollouts"
    if Path(config.observe.run_dir.format(name=config.name)) == Path(folder).parent:
        yield "rollout.replay names this run's own folder; give the replay another `name`"
