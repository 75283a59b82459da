"""Which tokens of packed sequences each context-parallel rank holds.

Every sequence is cut into 2 x C equal chunks; rank r of C holds chunks r and 2 x C - 1 - r, so that
causal attention costs each rank the same. Megatron's rotary embedding and Transformer-Engine's
attention expect this order.
"""

from __future__ import annotations

import torch
import torch.distributed as dist


def held_tokens(cu_seqlens: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """[T / size] numbers of the pack's tokens that lie on `rank`, in its order.

    Args:
        cu_seqlens: [sequences + 1] bounds in the whole pack; lengths are multiples of 2 x size.
    """
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    chunk = torch.repeat_interleave(lengths // (2 * size), lengths // size)
    start = torch.repeat_interleave(starts, lengths // size)
    length = torch.repeat_interleave(lengths, lengths // size)
    first = torch.repeat_interleave(starts // size, lengths // size)
    place = torch.arange(len(chunk), device=chunk.device) - first  # within the rank's own part
    at_back = place >= chunk
    return start + place + torch.where(at_back, length - (rank + 2) * chunk, rank * chunk)


def whole_order(cu_seqlens: torch.Tensor, size: int) -> torch.Tensor:
    """[T] where each token of the pack lies once the ranks' parts stand one after another."""
    parts = [held_tokens(cu_seqlens, rank, size) for rank in range(size)]
    return torch.argsort(torch.cat(parts))


def whole_rows(
    values: torch.Tensor, places: torch.Tensor | None, num_rows: int, group: dist.ProcessGroup
) -> torch.Tensor:
    """[num_rows, ...] from every rank's part: `values` belong at `places`; None: all are here.

    Distributed: one all-reduce over `group`.
    """
    if places is None:
        return values
    whole = values.new_zeros(num_rows, *values.shape[1:])
    whole[places] = values
    dist.all_reduce(whole, group=group)
    return whole
