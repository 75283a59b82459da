"""Packed micro-batches through Megatron's pipeline schedules, with and without gradient.

Callers speak of whole micro-batches; here each context-parallel rank takes its part, and what the
given functions see is that part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

from megatron_sod.data.packing import context_part, lengthened, without_rows
from megatron_sod.model.gpt import PipelineModel
from megatron_sod.parallel.cpu import device
from megatron_sod.parallel.state import own_groups
from megatron_sod.parallel.status import STATUS
from megatron_sod.types import MicroBatch

# (hidden states of the last stage, micro-batch, its number) -> (loss sum, rows, values to collect)
LossFn = Callable[[torch.Tensor, MicroBatch, int], tuple[torch.Tensor, torch.Tensor, Any]]
RowsFn = Callable[[torch.Tensor, MicroBatch, int], Any]


def forward_backward(
    model: PipelineModel, micro_batches: Sequence[MicroBatch], loss_fn: LossFn
) -> list[Any]:
    """Accumulate gradients of all micro-batches; what `loss_fn` collects, on the last stage.

    `loss_fn` returns the *sum* of the loss over its rows and their number; Megatron makes the one
    division by the global count when it finalises the gradients.
    """
    return _run(model, micro_batches, loss_fn, forward_only=False)


def forward_only(
    model: PipelineModel, micro_batches: Sequence[MicroBatch], rows_fn: RowsFn
) -> list[Any]:
    """What `rows_fn` returns for each micro-batch, without gradient; on the last stage."""
    with torch.no_grad():
        return _run(model, micro_batches, rows_fn, forward_only=True)


def _run(model: PipelineModel, micro_batches, fn, *, forward_only: bool) -> list[Any]:
    groups = model.pg_collection
    if len(model.runnable) > 1:
        # Megatron's exchange of lengths confuses a rank's two neighbours where they are one rank.
        longest = max(batch.token_ids.size(1) for batch in micro_batches)
        micro_batches = [lengthened(batch, longest) for batch in micro_batches]
    local = [context_part(batch, groups.cp.rank(), groups.cp.size()) for batch in micro_batches]
    padded = local + _fillers(model, local)

    def forward_step(iterator, chunk):
        number, batch = next(iterator)
        STATUS.at_micro_batch(number + 1, len(padded))
        batch = to_device(batch)
        hidden = chunk(
            batch.token_ids, batch.position_ids, None, packed_seq_params=_packed_params(batch)
        )
        finish = _finish if number < len(local) else _finish_filler
        return hidden, partial(finish, fn, batch, number)

    with own_groups(groups):
        collected = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(enumerate(padded)) for _ in model.runnable],
            model=model.runnable,
            num_microbatches=len(padded),
            seq_length=max(batch.token_ids.size(1) for batch in padded) * groups.cp.size(),
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )
    return collected[: len(local)]


def _fillers(model: PipelineModel, batches: list[MicroBatch]) -> list[MicroBatch]:
    """Micro-batches without rows that round the number up to what an interleaved pipeline needs.

    A multiple of its stages, and two of them: with fewer the first stage runs all its forward
    passes as warm-up, and Megatron's exchange of lengths then waits for a gradient that can only
    come after it.
    """
    if len(model.runnable) == 1:
        return []
    stages = model.pg_collection.pp.size()
    wanted = max(2 * stages, -(-len(batches) // stages) * stages)
    return [without_rows(batches[0])] * (wanted - len(batches))


def _finish(fn, batch: MicroBatch, number: int, hidden: torch.Tensor, non_loss_data: bool = False):
    if non_loss_data:
        return fn(hidden, batch, number)
    loss_sum, num_rows, collected = fn(hidden, batch, number)
    return loss_sum, num_rows.int(), collected


def _finish_filler(fn, batch, number, hidden: torch.Tensor, non_loss_data: bool = False):
    """No loss and no rows; its zero gradient keeps the pipeline's backward passes in step."""
    if non_loss_data:
        return None
    return 0.0 * hidden.sum(), torch.zeros((), dtype=torch.int, device=hidden.device), None


def to_device(batch: MicroBatch) -> MicroBatch:
    """The same micro-batch on this rank's device."""
    target = device()
    moved: dict[str, Any] = {
        field.name: value.to(target, non_blocking=True)
        for field in fields(batch)
        if isinstance(value := getattr(batch, field.name), torch.Tensor)
    }
    return replace(batch, **moved)


def _packed_params(batch: MicroBatch) -> PackedSeqParams:
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        max_seqlen_q=batch.max_seqlen,
        max_seqlen_kv=batch.max_seqlen,
    )
