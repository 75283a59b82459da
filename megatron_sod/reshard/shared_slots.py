"""Transport on one host: slots per pair of ranks in shared memory, or on the sender's GPU.

A link is a file on /dev/shm: counters, then (on CPU) the slots. On a GPU the slots are one
allocation of the sender, whose CUDA IPC handle lies in the file beside it.

A ring has two slots, each free again once it was read. A kept link has a slot for every message of
a transfer and is written over by the next transfer only: an engine that is started again reads by
itself what the others hold, while the trainer ranks wait for rollouts.
"""

from __future__ import annotations

import mmap
import os
import pickle
from itertools import accumulate
from pathlib import Path

import torch

from megatron_sod.errors import WeightTransferError
from megatron_sod.reshard.transport import NUM_SLOTS, wait_until

_HEADER_BYTES = 4096
_CANCELLED = "cancelled"
_STORAGE_DEVICE = 6  # place of the GPU's number among the arguments of rebuild_cuda_tensor
_POSTED, _RELEASED, _SENDER_PID, _RECEIVER_PID, _ABORTED = range(5)


class Link:
    """One direction between one trainer rank and one engine worker."""

    def __init__(
        self, path: Path, sizes: list[int], *, is_kept: bool, create: bool, device: torch.device
    ):
        """The sender creates, the receiver opens.

        Args:
            sizes: bytes of each message of a transfer over this link.
        Raises:
            WeightTransferError: there is no such link on this host.
        """
        slots = sizes if is_kept else [max(sizes)] * NUM_SLOTS
        self._starts = [0, *accumulate(-(-size // 64) * 64 for size in slots)]
        self.num_slots, self.num_messages = len(slots), len(sizes)
        self._path, self._is_sender = path, create
        self._on_gpu = device.type == "cuda"
        size = _HEADER_BYTES + (0 if self._on_gpu else self._starts[-1])
        try:
            if create:
                path.touch()
                os.truncate(path, size)
            with path.open("r+b") as file:
                self._map = mmap.mmap(file.fileno(), size)
        except (OSError, ValueError) as error:
            raise WeightTransferError(
                f"weight transfer link {path} cannot be opened ({error}); transfer.backend "
                "shared_memory and ipc need trainer and engines on one host: use p2p across hosts"
            ) from error
        self._counters = torch.frombuffer(self._map, dtype=torch.int64, count=8)
        self._counters[_SENDER_PID if create else _RECEIVER_PID] = os.getpid()
        self._slots = self._gpu_slots(device) if self._on_gpu else self._host_slots()

    def _host_slots(self) -> torch.Tensor:
        return torch.frombuffer(
            self._map, dtype=torch.uint8, count=self._starts[-1], offset=_HEADER_BYTES
        )

    def _gpu_slots(self, device: torch.device) -> torch.Tensor:
        from torch.multiprocessing.reductions import reduce_tensor

        handle = self._path.with_suffix(".cuda")
        if self._is_sender:
            slots = torch.empty(self._starts[-1], dtype=torch.uint8, device=device)
            handle.write_bytes(pickle.dumps((_gpu_uuid(slots.device.index), reduce_tensor(slots))))
            return slots
        uuid, (rebuild, arguments) = pickle.loads(handle.read_bytes())
        numbers = {_gpu_uuid(number): number for number in range(torch.cuda.device_count())}
        return rebuild(*on_gpu_number(arguments, gpu_number(uuid, numbers)))

    def slot(self, number: int, num_bytes: int) -> torch.Tensor:
        start = self._starts[number % self.num_slots]
        return self._slots[start : start + num_bytes]

    @property
    def posted(self) -> int:
        return int(self._counters[_POSTED])

    @property
    def released(self) -> int:
        return int(self._counters[_RELEASED])

    def set_count(self, which: int, value: int) -> None:
        if self._on_gpu:
            torch.cuda.current_stream().synchronize()  # the slot is written, or read, by now
        os.sched_yield()  # a system call: what was written before is visible before the counter
        self._counters[which] = value

    def abort(self) -> None:
        self._counters[_ABORTED] = 1

    def peer_failed(self) -> str | None:
        """Why waiting for the peer is in vain; None while it lives."""
        who = "the engine worker" if self._is_sender else "the trainer rank"
        pid = int(self._counters[_RECEIVER_PID if self._is_sender else _SENDER_PID])
        if int(self._counters[_ABORTED]) or self._path.with_name(_CANCELLED).exists():
            return f"{who} gave up; its own message says why"
        if pid and not Path(f"/proc/{pid}").exists():
            return f"{who} (process {pid}) died"
        return None

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)
        self._path.with_suffix(".cuda").unlink(missing_ok=True)


def _gpu_uuid(number: int) -> str:
    return str(torch.cuda.get_device_properties(number).uuid)


def gpu_number(uuid: str, numbers: dict[str, int]) -> int:
    """What this process calls the GPU that another process opened as `uuid`.

    Raises:
        WeightTransferError: the GPU is not visible here.
    """
    if uuid not in numbers:
        raise WeightTransferError(
            f"the trainer's GPU {uuid} is not visible to this engine ({len(numbers)} GPUs are), so "
            "its memory cannot be mapped; give the engine's process all GPUs of the trainers in "
            "CUDA_VISIBLE_DEVICES, or set transfer.backend p2p"
        )
    return numbers[uuid]


def on_gpu_number(arguments: tuple, number: int) -> tuple:
    """Arguments of torch's rebuild_cuda_tensor with the GPU's number in this process."""
    return (*arguments[:_STORAGE_DEVICE], number, *arguments[_STORAGE_DEVICE + 1 :])


class SlotSender:
    """The trainer rank's links, one to each destination it serves."""

    def __init__(
        self,
        folder: str | Path,
        rank: int,
        sizes: dict[int, list[int]],
        *,
        is_kept: bool,
        timeout_s: float,
        device: torch.device,
    ):
        """`sizes`: destination -> bytes of each message for it."""
        self._folder, self._rank = Path(folder), rank
        self._is_kept, self._timeout_s = is_kept, timeout_s
        self._links = {
            destination: Link(
                _path(folder, rank, destination),
                of_link,
                is_kept=is_kept,
                create=True,
                device=device,
            )
            for destination, of_link in sizes.items()
        }

    def buffer(self, destination: int, num_bytes: int) -> torch.Tensor:
        link = self._links[destination]
        if not self._is_kept:  # what was kept is read again at any time, but never while we write
            self._wait(lambda: link.posted - link.released < NUM_SLOTS, destination)
        return link.slot(link.posted, num_bytes)

    def post(self, destination: int) -> None:
        link = self._links[destination]
        link.set_count(_POSTED, link.posted + 1)

    def flush(self) -> None:
        if not self._is_kept:
            for destination, link in self._links.items():
                self._wait(lambda link=link: link.posted == link.released, destination)

    def abort(self) -> None:
        for link in self._links.values():
            link.abort()

    def cancel(self) -> None:
        if self._folder.is_dir():
            (self._folder / _CANCELLED).touch()

    def close(self) -> None:
        for link in self._links.values():
            link.remove()

    def _wait(self, ready, destination: int) -> None:
        wait_until(
            ready,
            f"trainer rank {self._rank} waits for engine worker {destination}",
            timeout_s=self._timeout_s,
            peer_failed=self._links[destination].peer_failed,
        )


class SlotReceiver:
    """The engine worker's links."""

    def __init__(
        self,
        folder: str | Path,
        destination: int,
        sizes: dict[int, list[int]],
        *,
        is_kept: bool,
        timeout_s: float,
        device: torch.device,
    ):
        """`sizes`: source -> bytes of each message from it."""
        self._destination, self._timeout_s, self._device = destination, timeout_s, device
        self._is_kept = is_kept
        self._links = {
            source: Link(
                _path(folder, source, destination),
                of_link,
                is_kept=is_kept,
                create=False,
                device=device,
            )
            for source, of_link in sizes.items()
        }
        self._expected: list[tuple[int, int]] = []
        self._taken: dict[int, int] = {}

    def expect(self, transfer: int, messages: list[tuple[int, int]]) -> None:
        self._expected = list(reversed(messages))
        # A transfer that is read again starts at its own first message, not at the latest.
        self._taken = {s: transfer * link.num_messages for s, link in self._links.items()}

    def take(self) -> torch.Tensor:
        source, num_bytes = self._expected[-1]
        link, number = self._links[source], self._taken[source]
        wait_until(
            lambda: link.posted > number,
            f"engine worker {self._destination} waits for trainer rank {source}",
            timeout_s=self._timeout_s,
            peer_failed=link.peer_failed,
        )
        # From another GPU in one copy: what reads it runs where the engine's weights are.
        return link.slot(number, num_bytes).to(self._device)

    def release(self) -> None:
        source, _ = self._expected.pop()
        self._taken[source] += 1
        if not self._is_kept:
            self._links[source].set_count(_RELEASED, self._taken[source])

    def abort(self) -> None:
        if not self._is_kept:  # another worker may take this one's place and read
            for link in self._links.values():
                link.abort()

    def close(self) -> None:
        self._links.clear()


def _path(folder: str | Path, source: int, destination: int) -> Path:
    return Path(folder) / f"{source}-{destination}.link"
