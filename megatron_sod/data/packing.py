"""Sequences -> packed micro-batches of a bounded number of tokens, balanced over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_sod.types import MicroBatch


@dataclass(frozen=True)
class PackItem:
    """One sequence to be packed. Positions with loss_mask False are context only."""

    token_ids: Sequence[int]  # [L] prompt and response
    loss_mask: Sequence[bool]  # [L]; position 0 can carry no loss
    step_ids: Sequence[int]  # [L]
    rollout_logprobs: Sequence[float]  # [L]
    index: int  # trajectory index on this rank


def balanced_bins(lengths: Sequence[int], num_bins: int) -> list[list[int]]:
    """Indices spread over `num_bins` so that the fullest bin is small (longest first)."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    loads = [0] * num_bins
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        target = loads.index(min(loads))
        bins[target].append(index)
        loads[target] += lengths[index]
    return bins


def plan_micro_batches(
    lengths: Sequence[int], *, dp_size: int, tokens_per_micro_batch: int
) -> list[list[list[int]]]:
    """[dp rank][micro-batch] -> indices. Every rank gets the same number of micro-batches, as
    pipeline schedules and expert parallelism need; some may be empty."""
    total = sum(lengths)
    num_micro_batches = max(1, -(-total // (dp_size * tokens_per_micro_batch)))
    while True:
        bins = balanced_bins(lengths, dp_size * num_micro_batches)
        if max(sum(lengths[i] for i in b) for b in bins) <= tokens_per_micro_batch:
            break
        num_micro_batches += 1
        assert num_micro_batches <= len(lengths) + 1, "a sequence is longer than a micro-batch"
    return [bins[rank::dp_size] for rank in range(dp_size)]


def pack(items: Sequence[PackItem], *, multiple_of: int = 1) -> MicroBatch:
    """Pack sequences one after another; a filler sequence rounds T up to `multiple_of`.

    An empty list gives a pack of filler alone: no rows, so no loss.
    """
    token_ids: list[int] = []
    positions: list[int] = []
    cu_seqlens = [0]
    rows: list[int] = []
    picked: list[tuple[int, int, int, float]] = []
    for item in items:
        start, length = len(token_ids), len(item.token_ids)
        token_ids += item.token_ids
        positions += range(length)
        cu_seqlens.append(start + length)
        for at in range(1, length):
            if item.loss_mask[at]:
                rows.append(start + at - 1)
                picked.append(
                    (
                        item.token_ids[at],
                        item.step_ids[at],
                        item.index,
                        item.rollout_logprobs[at],
                    )
                )
    filler = -len(token_ids) % multiple_of or (multiple_of if not token_ids else 0)
    if filler:
        token_ids += [0] * filler
        positions += range(filler)
        cu_seqlens.append(len(token_ids))
    targets, step_ids, indices, logprobs = zip(*picked, strict=True) if picked else ((),) * 4
    return MicroBatch(
        token_ids=torch.tensor([token_ids]),
        position_ids=torch.tensor([positions]),
        cu_seqlens=torch.tensor(cu_seqlens, dtype=torch.int32),
        max_seqlen=max(b - a for a, b in zip(cu_seqlens, cu_seqlens[1:], strict=False)),
        rows=torch.tensor(rows, dtype=torch.int64),
        targets=torch.tensor(targets, dtype=torch.int64),
        step_ids=torch.tensor(step_ids, dtype=torch.int64),
        trajectory_ids=torch.tensor(indices, dtype=torch.int64),
        rollout_logprobs=torch.tensor(logprobs, dtype=torch.float32),
    )
