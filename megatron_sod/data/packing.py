"""Sequences -> packed micro-batches of a bounded number of tokens, balanced over ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from megatron_sod.parallel.context import held_tokens
from megatron_sod.types import MicroBatch

_ROW_FIELDS = ("targets", "step_ids", "trajectory_ids", "rollout_logprobs")


class Layout(Protocol):
    """ParallelConfig, or Megatron's own configuration of a model."""

    @property
    def tensor_model_parallel_size(self) -> int: ...
    @property
    def context_parallel_size(self) -> int: ...
    @property
    def sequence_parallel(self) -> bool: ...


@dataclass(frozen=True)
class Alignment:
    """What a layout asks of packed lengths, in tokens."""

    sequence: int = 1  # each sequence's length is a multiple of this
    pack: int = 1  # and the sum of all; a multiple of `sequence`

    def padded(self, length: int) -> int:
        """Length of one sequence once it is aligned."""
        return -(-length // self.sequence) * self.sequence


def alignment_of(*layouts: Layout) -> Alignment:
    """For models that all read the same packs.

    Context parallelism cuts each sequence into 2 x C chunks; sequence parallelism cuts what a
    rank holds once more."""
    sequence = pack = 1
    for layout in layouts:
        cp = layout.context_parallel_size
        sequence = math.lcm(sequence, 2 * cp if cp > 1 else 1)
        tp = layout.tensor_model_parallel_size if layout.sequence_parallel else 1
        pack = math.lcm(pack, cp * tp)
    return Alignment(sequence, math.lcm(sequence, pack))


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
    lengths: Sequence[int],
    *,
    dp_size: int,
    tokens_per_micro_batch: int,
    alignment: Alignment = Alignment(),  # noqa: B008 (frozen)
) -> list[list[list[int]]]:
    """[dp rank][micro-batch] -> indices. Every rank gets the same number of micro-batches, as
    pipeline schedules and expert parallelism need; some may be empty."""
    lengths = [alignment.padded(length) for length in lengths]
    total = sum(lengths)
    num_micro_batches = max(1, -(-total // (dp_size * tokens_per_micro_batch)))
    while True:
        bins = balanced_bins(lengths, dp_size * num_micro_batches)
        if max(sum(lengths[i] for i in b) for b in bins) <= tokens_per_micro_batch:
            break
        num_micro_batches += 1
        assert num_micro_batches <= len(lengths) + 1, "a sequence is longer than a micro-batch"
    return [bins[rank::dp_size] for rank in range(dp_size)]


def pack(items: Sequence[PackItem], alignment: Alignment = Alignment()) -> MicroBatch:  # noqa: B008
    """Pack sequences one after another.

    What fills a sequence up stands at its end, where nothing reads it; a filler sequence fills up
    the pack. An empty list gives a pack of filler alone: no rows, so no loss.
    """
    token_ids: list[int] = []
    positions: list[int] = []
    cu_seqlens = [0]
    rows: list[int] = []
    picked: list[tuple[int, int, int, float]] = []

    def extend(ids: Sequence[int], length: int) -> None:
        token_ids.extend(ids)
        token_ids.extend([0] * (length - len(ids)))
        positions.extend(range(length))
        cu_seqlens.append(len(token_ids))

    for item in items:
        start, length = len(token_ids), len(item.token_ids)
        extend(item.token_ids, alignment.padded(length))
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
    filler = -len(token_ids) % alignment.pack or (0 if token_ids else alignment.pack)
    if filler:
        extend([], filler)
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


def context_part(batch: MicroBatch, rank: int, size: int) -> MicroBatch:
    """The tokens and rows of `batch` on one context-parallel rank.

    Targets were picked from the whole sequences, so a row at the end of a chunk keeps its own.
    `cu_seqlens` and `max_seqlen` still describe the whole pack, as Megatron expects.
    """
    if size == 1:
        return batch
    held = held_tokens(batch.cu_seqlens, rank, size)
    local = torch.full((batch.token_ids.size(1),), -1).index_put((held,), torch.arange(len(held)))
    places = (local[batch.rows] >= 0).nonzero()[:, 0]
    return replace(
        batch,
        token_ids=batch.token_ids[:, held],
        position_ids=batch.position_ids[:, held],
        rows=local[batch.rows[places]],
        places=places,
        **{name: getattr(batch, name)[places] for name in _ROW_FIELDS},
    )


def lengthened(batch: MicroBatch, num_tokens: int) -> MicroBatch:
    """The same pack with a filler sequence up to `num_tokens` tokens."""
    extra = num_tokens - batch.token_ids.size(1)
    if extra == 0:
        return batch
    filler = torch.zeros(1, extra, dtype=torch.int64)
    return replace(
        batch,
        token_ids=torch.cat([batch.token_ids, filler], 1),
        position_ids=torch.cat([batch.position_ids, torch.arange(extra)[None]], 1),
        cu_seqlens=torch.cat([batch.cu_seqlens, batch.cu_seqlens.new_tensor([num_tokens])]),
        max_seqlen=max(batch.max_seqlen, extra),
    )


def without_rows(batch: MicroBatch) -> MicroBatch:
    """The same tokens with nothing to learn from them."""
    return replace(
        batch, rows=batch.rows[:0], **{name: getattr(batch, name)[:0] for name in _ROW_FIELDS}
    )
