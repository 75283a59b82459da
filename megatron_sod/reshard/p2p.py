"""Transport across hosts: torch's point-to-point sends in a group of their own.

Trainer ranks come first, engine workers after them. gloo on CPU, NCCL on GPU; two buffers, so that
one is packed (or unpacked) while the other is on the wire.
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_sod.errors import WeightTransferError
from megatron_sod.reshard.transport import NUM_SLOTS


def join(
    address: str,
    port: int,
    *,
    name: str,
    rank: int,
    size: int,
    device: torch.device,
    timeout_s: float,
):
    """The transfer's process group; every member must call it. Apart from the default group, whose
    members vLLM and the trainer each have of their own."""
    timeout = timedelta(seconds=timeout_s)
    store = dist.PrefixStore(name, dist.TCPStore(address, port, is_master=False, timeout=timeout))
    if device.type == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(store, rank, size, options)
    return dist.ProcessGroupGloo(store, rank, size, timeout)


def leave(group, device: torch.device) -> None:
    """Close a group whose other members may be busy or gone; NCCL's shutdown waits for them."""
    if device.type == "cuda":
        group.abort()
    else:
        group.shutdown()


class _Buffers:
    """Two reusable buffers, each busy until its work is done."""

    def __init__(self, num_bytes: int, device: torch.device):
        self._buffers = [
            torch.empty(num_bytes, dtype=torch.uint8, device=device) for _ in range(NUM_SLOTS)
        ]
        self.device = device
        self.works: list = [None] * NUM_SLOTS

    def view(self, number: int, num_bytes: int) -> torch.Tensor:
        return self._buffers[number % NUM_SLOTS][:num_bytes]

    def wait(self, number: int) -> None:
        work, self.works[number % NUM_SLOTS] = self.works[number % NUM_SLOTS], None
        if work is None:
            return
        try:
            work.wait()
            if self.device.type == "cuda":
                torch.cuda.current_stream().synchronize()
        except RuntimeError as error:
            raise WeightTransferError(
                f"weight transfer: a peer is gone or silent ({str(error).splitlines()[0]}); see "
                "the logs of trainer and engines, or raise transfer.timeout_s"
            ) from error


class PointToPointSender:
    """A trainer rank's end."""

    def __init__(self, group, num_trainer_ranks: int, largest: int, device: torch.device):
        """`largest`: bytes of the largest message this rank sends."""
        self._group, self._first_worker = group, num_trainer_ranks
        self._buffers, self._count, self._view = _Buffers(largest, device), 0, torch.empty(0)

    def buffer(self, destination: int, num_bytes: int) -> torch.Tensor:
        self._buffers.wait(self._count)
        self._view = self._buffers.view(self._count, num_bytes)
        return self._view

    def post(self, destination: int) -> None:
        work = self._group.send([self._view], self._first_worker + destination, 0)
        self._buffers.works[self._count % NUM_SLOTS] = work
        self._count += 1

    def flush(self) -> None:
        for number in range(NUM_SLOTS):
            self._buffers.wait(number)

    def abort(self) -> None:
        self._group.abort()

    def cancel(self) -> None:
        """A wait in gloo or NCCL cannot be interrupted from here: peers run into their timeout."""

    def close(self) -> None:
        leave(self._group, self._buffers.device)


class PointToPointReceiver:
    """An engine worker's end: receives are posted two messages ahead."""

    def __init__(self, group, largest: int, device: torch.device):
        self._group, self._buffers = group, _Buffers(largest, device)
        self._expected: list[tuple[int, int]] = []
        self._posted = self._taken = 0

    def expect(self, transfer: int, messages: list[tuple[int, int]]) -> None:
        self._expected, self._posted, self._taken = messages, 0, 0
        for _ in range(NUM_SLOTS):
            self._post()

    def _post(self) -> None:
        if self._posted < len(self._expected):
            source, num_bytes = self._expected[self._posted]
            view = self._buffers.view(self._posted, num_bytes)
            self._buffers.works[self._posted % NUM_SLOTS] = self._group.recv([view], source, 0)
            self._posted += 1

    def take(self) -> torch.Tensor:
        self._buffers.wait(self._taken)
        return self._buffers.view(self._taken, self._expected[self._taken][1])

    def release(self) -> None:
        self._taken += 1
        self._post()

    def abort(self) -> None:
        self._group.abort()

    def close(self) -> None:
        leave(self._group, self._buffers.device)
