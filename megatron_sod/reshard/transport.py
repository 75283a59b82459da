"""How a message gets from a trainer rank to an engine worker: the interface, and waiting.

Two buffers per pair of ranks: one is filled while the other travels.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import torch

from megatron_sod.errors import WeightTransferError

NUM_SLOTS = 2
_SPINS = 200
_SLEEP_S = 1e-4
_CHECK_EVERY_S = 0.2


class Sending(Protocol):
    """A trainer rank's end. Messages to one destination arrive in the order they were posted."""

    def buffer(self, destination: int, num_bytes: int) -> torch.Tensor:
        """A free [num_bytes] uint8 buffer; waits until there is one."""

    def post(self, destination: int) -> None:
        """Send what the latest buffer for `destination` holds."""

    def flush(self) -> None:
        """Wait until everything posted has been taken."""

    def abort(self) -> None:
        """Make every peer's waiting fail: this end cannot go on."""

    def cancel(self) -> None:
        """Make the waiting of every rank fail, from another thread: an engine has failed."""

    def close(self) -> None: ...


class Receiving(Protocol):
    """An engine worker's end."""

    def expect(self, transfer: int, messages: list[tuple[int, int]]) -> None:
        """(source, bytes) of everything transfer number `transfer`, from 0, brings, in order."""

    def take(self) -> torch.Tensor:
        """The next expected message as [bytes] uint8, valid until `release`."""

    def release(self) -> None: ...

    def abort(self) -> None: ...

    def close(self) -> None: ...


def wait_until(
    ready: Callable[[], bool], what: str, *, timeout_s: float, peer_failed: Callable[[], str | None]
) -> None:
    """Return when `ready()`; look now and then whether the peer still lives.

    Raises:
        WeightTransferError: the peer is gone, or `timeout_s` have passed.
    """
    started = checked = time.monotonic()
    spins = 0
    while not ready():
        spins += 1
        if spins < _SPINS:
            continue
        time.sleep(_SLEEP_S)
        now = time.monotonic()
        if now - checked > _CHECK_EVERY_S:
            checked = now
            if (reason := peer_failed()) is not None and not ready():
                raise WeightTransferError(f"{what}: {reason}")
            if now - started > timeout_s:
                raise WeightTransferError(
                    f"{what}: nothing for {timeout_s:.0f} s; the other side hangs, or is slow: "
                    "then raise transfer.timeout_s"
                )
