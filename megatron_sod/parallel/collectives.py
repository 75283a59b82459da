"""Notes every collective this process begins, whoever calls it and however it was imported.

torch.distributed and Megatron end in methods of ProcessGroup; those are wrapped, once. The cost is
a microsecond per call.
"""

from __future__ import annotations

import functools
import threading
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist

from megatron_sod.parallel.status import STATUS, Collective

# Threads with group of their own, whose waiting is not the rank's.
BACKGROUND = ("checkpoint-writer",)
_NAMES = {
    "allreduce": "all_reduce",
    "allreduce_coalesced": "all_reduce",
    "allgather": "all_gather",
    "_allgather_base": "all_gather",
    "all_gather_single": "all_gather",
    "allgather_into_tensor_coalesced": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "_reduce_scatter_base": "reduce_scatter",
    "reduce_scatter_single": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "alltoall": "all_to_all",
    "alltoall_base": "all_to_all",
    "all_to_all_single": "all_to_all",
    "broadcast": "broadcast",
    "reduce": "reduce",
    "gather": "gather",
    "scatter": "scatter",
    "barrier": "barrier",
    "send": "send",
    "recv": "recv",
    "recv_anysource": "recv",
}
_counts: Counter[str] = Counter()
_members: dict[str, str] = {}
_is_installed = False


def note_collectives() -> None:
    """Wrap ProcessGroup; a second call does nothing."""
    global _is_installed
    if _is_installed:
        return
    _is_installed = True
    for method, name in _NAMES.items():
        if hasattr(dist.ProcessGroup, method):
            setattr(dist.ProcessGroup, method, _noting(getattr(dist.ProcessGroup, method), name))


def _noting(method, name: str):
    @functools.wraps(method)
    def noting(group, *args, **kwargs):
        if threading.current_thread().name in BACKGROUND:
            return method(group, *args, **kwargs)
        key = group.group_name
        _counts[key] += 1
        tensor = _first_tensor(args)
        collective = Collective(
            name=name,
            group=group.group_desc or key,
            ranks=_ranks(group),
            number=_counts[key],
            shape=None if tensor is None else tuple(tensor.shape),
            dtype="" if tensor is None else str(tensor.dtype).removeprefix("torch."),
        )
        STATUS.begin(collective, None)  # some block in the call itself
        work = method(group, *args, **kwargs)
        # Holding a CUDA collective's handle would keep its tensors alive.
        on_cpu = tensor is None or tensor.device.type == "cpu"
        STATUS.begin(collective, work if on_cpu and not torch.cuda.is_available() else None)
        return work

    return noting


def _ranks(group: dist.ProcessGroup) -> str:
    """ "0,1"; empty for a group torch made for itself."""
    name = group.group_name
    if name not in _members:
        try:
            _members[name] = ",".join(str(r) for r in dist.get_process_group_ranks(group))
        except (KeyError, ValueError):
            _members[name] = ""
    return _members[name]


def _first_tensor(value: Any) -> torch.Tensor | None:
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, list | tuple):
        for item in value:
            if (found := _first_tensor(item)) is not None:
                return found
    return None
