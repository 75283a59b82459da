"""Work that rank 0 does while the others wait: on the store, never inside a collective.

A pending NCCL kernel would occupy the processors the engines need, and would time out during a
long rollout. Failures on rank 0 reach the waiting ranks at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from megatron_sod.errors import PeerFailed
from megatron_sod.parallel.status import STATUS

Result = TypeVar("Result")
_POLL_S = 0.05
_GRACE_S = 60.0  # rank 0's work ends itself after the same time, and what it says is to arrive
_calls = 0


def from_rank0(work: Callable[[], Result], *, timeout_s: float) -> Result:
    """`work()` on rank 0, its (picklable) result on every rank.

    Raises:
        whatever `work` raises, on rank 0; PeerFailed on the others.
    """
    global _calls
    _calls += 1
    key = f"megatron_sod/from_rank0/{_calls}"
    store = _get_default_store()
    holder: list = [None]
    if dist.get_rank() == 0:
        try:
            with STATUS.may_take(timeout_s):
                holder[0] = work()
        except BaseException as error:
            store.set(key, f"error {type(error).__name__}: {error}"[:2000])
            raise
        store.set(key, "ok")
    else:
        _wait(store, key, timeout_s)
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def _wait(store, key: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s + _GRACE_S
    while not store.check([key]):
        if time.monotonic() > deadline:
            raise PeerFailed(
                f"rank 0 did not finish within {timeout_s:.0f} s; raise rollout.timeout_s if "
                "rollouts are that long"
            )
        time.sleep(_POLL_S)
    status = store.get(key).decode()
    if status != "ok":
        raise PeerFailed(f"rank 0 failed: {status}")
