"""A trainer rank's part of a transfer: its own shards, message by message."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from megatron_sod.convert.layout import Segment
from megatron_sod.errors import WeightTransferError
from megatron_sod.reshard.checksum import as_unsigned
from megatron_sod.reshard.message import num_bytes, pack
from megatron_sod.reshard.plan import Copy, Message
from megatron_sod.reshard.setup import TransferSetup

Shards = dict[str, list[tuple[Segment, torch.Tensor]]]


def index_shards(segments: Iterable[tuple[Segment, torch.Tensor]]) -> Shards:
    """HF tensor -> this rank's parts of it; the tensors are views of live parameters."""
    shards: Shards = {}
    for segment, view in segments:
        shards.setdefault(segment.hf_name, []).append((segment, view))
    return shards


class ShardSender:
    """Sends what the plan asks of this rank. Holds the two buffers of the transport, no more."""

    def __init__(self, setup: TransferSetup, rank: int, shards: Shards, device: torch.device):
        """
        Raises:
            WeightTransferError: the plan asks for numbers this rank does not hold.
        """
        self._rank, self._shards, self._dtype = rank, shards, setup.torch_dtype
        self._engine_size = setup.engine.tp_size
        self._sums: list[tuple[Message, torch.Tensor]] = []
        self.messages = list(setup.plan().messages_from(rank))
        for message in self.messages:
            for copy in message.copies:
                self._view(copy)
        self._end = setup.sending_end(rank, self.messages, device)

    @property
    def num_bytes(self) -> int:
        """Bytes of weights this rank sends in one transfer."""
        return sum(message.num_elements for message in self.messages) * self._dtype.itemsize

    def send(self) -> None:
        """One whole transfer. The weights must not change until it returns.

        Raises:
            WeightTransferError: a receiver is gone, gave up, or is silent for too long.
        """
        self._sums.clear()
        try:
            for message in self.messages:
                buffer = self._end.buffer(message.destination, num_bytes(message, self._dtype))
                self._pack(message, buffer)
                self._end.post(message.destination)
            self._end.flush()
        except BaseException:
            self._end.abort()
            raise

    def checksums(self) -> dict[str, int]:
        """HF tensor -> sum of the checksums of what this rank last sent engine 0."""
        total: dict[str, int] = {}
        for message, sums in self._sums:
            if message.destination < self._engine_size:
                for copy, value in zip(message.copies, sums.tolist(), strict=True):
                    total[copy.hf_name] = as_unsigned(total.get(copy.hf_name, 0) + value)
        return total

    def _pack(self, message: Message, buffer: torch.Tensor) -> None:
        with torch.no_grad():
            self._sums.append((message, pack(message, buffer, self._view, self._dtype)))

    def _view(self, copy: Copy) -> torch.Tensor:
        for segment, view in self._shards.get(copy.hf_name, []):
            if segment.dim != copy.dim and (segment.hf_start, segment.length) == (0, copy.width):
                return view.narrow(copy.dim, copy.start, copy.length)  # the whole tensor
            inside = copy.start - segment.hf_start
            if segment.dim == copy.dim and 0 <= inside <= segment.length - copy.length:
                return view.narrow(copy.dim, inside, copy.length)
        raise WeightTransferError(
            f"trainer rank {self._rank} is to send indices {copy.start} to "
            f"{copy.start + copy.length} of {copy.hf_name} and does not hold them: its parallel "
            "layout is not the one the transfer was planned for"
        )

    def cancel(self) -> None:
        """From another thread: end the waiting of every rank."""
        self._end.cancel()

    def close(self) -> None:
        self._end.close()
