"""Trajectories -> this rank's packed mini-batches."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from megatron_sod.algorithm.advantages import group_advantages
from megatron_sod.data.packing import Alignment, PackItem, pack, plan_micro_batches
from megatron_sod.errors import RolloutError
from megatron_sod.types import MicroBatch, MiniBatch, TrainingBatch, Trajectory


def build_training_batch(
    trajectories: list[Trajectory],
    *,
    num_mini_batches: int,
    tokens_per_micro_batch: int,
    dp_rank: int,
    dp_size: int,
    alignment: Alignment = Alignment(),  # noqa: B008 (frozen)
    teacher_prompts: Mapping[str, list[int]] | None = None,
) -> TrainingBatch:
    """Cut one iteration's trajectories for one data-parallel rank.

    Groups stay together in a mini-batch, in rollout order. Trajectories that infrastructure
    failures spoilt take no part in group statistics and reach no loss.

    Args:
        teacher_prompts: prompt_id -> ids a privileged teacher reads in place of the prompt; ids
            without an entry keep theirs and are marked as not taught. None: an ordinary teacher.
    Raises:
        RolloutError: no usable trajectory is left.
    """
    valid = [t.is_valid for t in trajectories]
    advantages = group_advantages(
        [t.reward for t in trajectories], [t.prompt_id for t in trajectories], valid
    )
    usable = [index for index, ok in enumerate(valid) if ok]
    if not usable:
        raise RolloutError(
            f"all {len(trajectories)} trajectories of this iteration were lost to infrastructure "
            "errors; check the sandbox (tools/doctor.py) and start again with train.resume=auto"
        )
    readers: list[Mapping[str, list[int]]] = [{}]  # the student, then a privileged teacher
    readers += [] if teacher_prompts is None else [teacher_prompts]
    mine: list[int] = []
    mini_batches = []
    for chunk in _chunks(usable, trajectories, num_mini_batches):
        plan = plan_micro_batches(
            [max(len(_token_ids(trajectories[i], r)) for r in readers) for i in chunk],
            dp_size=dp_size,
            tokens_per_micro_batch=tokens_per_micro_batch,
            alignment=alignment,
        )[dp_rank]
        packs: list[list[MicroBatch]] = [[] for _ in readers]
        for places in plan:
            for reader, micro_batches in zip(readers, packs, strict=True):
                items = [
                    _item(trajectories[chunk[place]], reader, len(mine) + number)
                    for number, place in enumerate(places)
                ]
                micro_batches.append(pack(items, alignment))
            mine += [chunk[place] for place in places]
        mini_batches.append(MiniBatch(*packs))
    kept = [trajectories[i] for i in mine]
    is_taught = None
    if teacher_prompts is not None:
        is_taught = torch.tensor([t.prompt_id in teacher_prompts for t in kept], dtype=torch.bool)
    return TrainingBatch(mini_batches, kept, advantages[mine], is_taught)


def _chunks(
    usable: list[int], trajectories: list[Trajectory], num_mini_batches: int
) -> list[list[int]]:
    """Whole prompts per mini-batch; fewer mini-batches when failures left too few prompts."""
    groups: dict[str, list[int]] = {}
    for index in usable:
        groups.setdefault(trajectories[index].prompt_id, []).append(index)
    members = list(groups.values())
    size = -(-len(members) // num_mini_batches)
    return [
        [index for group in members[start : start + size] for index in group]
        for start in range(0, len(members), size)
    ]


def _token_ids(trajectory: Trajectory, prompts: Mapping[str, list[int]]) -> list[int]:
    """Prompt and response as a reader with its own `prompts` sees them."""
    prompt = prompts.get(trajectory.prompt_id, trajectory.prompt_token_ids)
    return prompt + trajectory.response_token_ids


def _item(trajectory: Trajectory, prompts: Mapping[str, list[int]], index: int) -> PackItem:
    token_ids = _token_ids(trajectory, prompts)
    before = len(token_ids) - len(trajectory.response_token_ids)
    return PackItem(
        token_ids=token_ids,
        loss_mask=[False] * before + trajectory.loss_mask,
        step_ids=[0] * before + trajectory.step_ids,
        rollout_logprobs=[0.0] * before + trajectory.rollout_logprobs,
        index=index,
    )
