"""Trajectories -> this rank's packed mini-batches."""

from __future__ import annotations

from megatron_sod.algorithm.advantages import group_advantages
from megatron_sod.data.packing import PackItem, pack, plan_micro_batches
from megatron_sod.errors import RolloutError
from megatron_sod.types import MiniBatch, TrainingBatch, Trajectory


def build_training_batch(
    trajectories: list[Trajectory],
    *,
    num_mini_batches: int,
    tokens_per_micro_batch: int,
    dp_rank: int,
    dp_size: int,
    multiple_of: int,
) -> TrainingBatch:
    """Cut one iteration's trajectories for one data-parallel rank.

    Groups stay together in a mini-batch, in rollout order. Trajectories that infrastructure
    failures spoilt take no part in group statistics and reach no loss.

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
    mine: list[int] = []
    mini_batches = []
    for chunk in _chunks(usable, trajectories, num_mini_batches):
        plan = plan_micro_batches(
            [trajectories[i].num_tokens for i in chunk],
            dp_size=dp_size,
            tokens_per_micro_batch=tokens_per_micro_batch,
        )[dp_rank]
        micro_batches = []
        for places in plan:
            items = []
            for place in places:
                items.append(_item(trajectories[chunk[place]], len(mine)))
                mine.append(chunk[place])
            micro_batches.append(pack(items, multiple_of=multiple_of))
        mini_batches.append(MiniBatch(micro_batches))
    return TrainingBatch(mini_batches, [trajectories[i] for i in mine], advantages[mine])


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


def _item(trajectory: Trajectory, index: int) -> PackItem:
    before = len(trajectory.prompt_token_ids)
    return PackItem(
        token_ids=trajectory.prompt_token_ids + trajectory.response_token_ids,
        loss_mask=[False] * before + trajectory.loss_mask,
        step_ids=[0] * before + trajectory.step_ids,
        rollout_logprobs=[0.0] * before + trajectory.rollout_logprobs,
        index=index,
    )
