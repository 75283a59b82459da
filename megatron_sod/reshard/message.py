"""The bytes of one message: its copies one after the other, then the checksum of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from megatron_sod.errors import WeightTransferError
from megatron_sod.reshard.checksum import checksum
from megatron_sod.reshard.plan import Copy, Message

_ALIGNMENT = 64
ViewOf = Callable[[Copy], torch.Tensor]


def num_bytes(message: Message, dtype: torch.dtype) -> int:
    return _table_offset(message, dtype) + 8 * len(message.copies)


def pack(
    message: Message, buffer: torch.Tensor, view_of: ViewOf, dtype: torch.dtype
) -> torch.Tensor:
    """Write the message into `buffer` ([num_bytes] uint8); `view_of` finds each copy's numbers.

    Returns:
        [copies] int64, the checksum of each copy as it was read.
    """
    views = [view_of(copy) for copy in message.copies]
    sums = [
        checksum(v, dim=c.dim, start=c.start) for c, v in zip(message.copies, views, strict=True)
    ]
    targets = [slot for _, slot in _slots(message, buffer, dtype)]
    torch._foreach_copy_(targets, views)  # on a GPU one batched kernel
    table = torch.stack(sums)
    _table(message, buffer, dtype).copy_(table)
    return table


def unpack(
    message: Message, buffer: torch.Tensor, dtype: torch.dtype
) -> Iterator[tuple[Copy, torch.Tensor, int]]:
    """(copy, its numbers inside `buffer`, its checksum), once all of them have been verified.

    Raises:
        WeightTransferError: naming the tensors whose numbers are not those the sender summed.
    """
    slots = list(_slots(message, buffer, dtype))
    expected = _table(message, buffer, dtype).tolist()
    found = torch.stack([checksum(part, dim=c.dim, start=c.start) for c, part in slots]).tolist()
    wrong = sorted(
        {c.hf_name for (c, _), f, e in zip(slots, found, expected, strict=True) if f != e}
    )
    if wrong:
        raise WeightTransferError(
            f"checksums of {', '.join(wrong)} received from trainer rank {message.source} are not "
            "those of the numbers it read; the transport or a rank's memory corrupts weights"
        )
    for (copy, part), value in zip(slots, found, strict=True):
        yield copy, part, value


def _slots(
    message: Message, buffer: torch.Tensor, dtype: torch.dtype
) -> Iterator[tuple[Copy, torch.Tensor]]:
    offset = 0
    for copy in message.copies:
        size = copy.num_elements * dtype.itemsize
        yield copy, buffer[offset : offset + size].view(dtype).view(copy.shape)
        offset += _aligned(size)


def _table(message: Message, buffer: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    start = _table_offset(message, dtype)
    return buffer[start : start + 8 * len(message.copies)].view(torch.int64)


def _table_offset(message: Message, dtype: torch.dtype) -> int:
    return sum(_aligned(copy.num_elements * dtype.itemsize) for copy in message.copies)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
