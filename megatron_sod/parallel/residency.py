"""What of the models is on the device now; the rest waits in host memory.

A rollout needs no trainer memory, scoring by the teacher no student, the update no teacher. Whole
storages leave and come back, so that every view of them (Megatron's parameters are views of one
buffer, and a distributed optimizer's shards are views of the parameters) stays what it is. On CPU
it works all the same, and saves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

Tensors = Callable[[], Iterable[torch.Tensor]]


class Residency:
    """Parts that may leave the device, by name. Nothing here communicates."""

    def __init__(self) -> None:
        self._parts: dict[str, list[_Part]] = {}

    def may_leave(self, name: str, tensors: Tensors, *, keeps_content: bool = True) -> None:
        """Let a part leave when it is not held.

        Args:
            tensors: its tensors, asked for whenever it leaves: an optimizer's state is made by its
                first step. No other part may share their storages.
            keeps_content: False for what is made anew each time, such as gradients: it is freed,
                and comes back as zeros.
        """
        self._parts.setdefault(name, []).append(_Part(tensors, keeps_content))

    def hold(self, *names: str) -> None:
        """Bring these parts to the device, after every other one has left it."""
        leaving = [p for name, parts in self._parts.items() if name not in names for p in parts]
        moved = [part.leave() for part in leaving]
        if any(moved) and torch.cuda.is_available():
            torch.cuda.empty_cache()  # an engine beside us needs it, not our allocator
        for name in names:
            for part in self._parts.get(name, ()):
                part.come_back()

    def is_away(self, name: str) -> bool:
        """Whether something of this part is in host memory now."""
        return any(part.num_away for part in self._parts.get(name, ()))


class _Part:
    def __init__(self, tensors: Tensors, keeps_content: bool):
        self._tensors, self._keeps_content = tensors, keeps_content
        # A storage stays the same Python object as long as it is held, which makes it a key.
        self._away: dict[torch.UntypedStorage, int] = {}  # -> bytes
        self._copies: dict[torch.UntypedStorage, torch.Tensor] = {}  # reused each time

    @property
    def num_away(self) -> int:
        return len(self._away)

    def leave(self) -> bool:
        """Whether there was anything to move."""
        if self._away:
            return False
        # Counters of steps stay: they are on the host already, or not worth the trip.
        storages = {tensor.untyped_storage() for tensor in self._tensors() if tensor.numel() > 1}
        self._away = {storage: storage.nbytes() for storage in storages}
        if self._keeps_content:
            self._copies = {storage: self._copied(storage) for storage in self._away}
            _wait_for_copies()
        for storage in self._away:
            storage.resize_(0)
        return bool(self._away)

    def come_back(self) -> None:
        for storage, num_bytes in self._away.items():
            storage.resize_(num_bytes)
            content = _bytes_of(storage)
            if self._keeps_content:
                content.copy_(self._copies[storage], non_blocking=True)
            else:
                content.zero_()
        self._away = {}
        _wait_for_copies()

    def _copied(self, storage: torch.UntypedStorage) -> torch.Tensor:
        copy = self._copies.get(storage)
        if copy is None or copy.numel() != storage.nbytes():
            on_gpu = storage.device.type == "cuda"
            copy = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=on_gpu)
        return copy.copy_(_bytes_of(storage), non_blocking=True)


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # type: ignore


def _wait_for_copies() -> None:
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()
