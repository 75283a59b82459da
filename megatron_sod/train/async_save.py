"""dist_checkpointing's writer in a thread of this rank, fed from a snapshot.

Megatron 0.16 writes from forked processes: their manager outlives a killed rank, the persistent one
divides by the number of GPUs, and on CPU the "staged" tensors are the live parameters. Here the
tensors are copied first, a thread writes them, and whatever ends the rank ends the writing.
"""

from __future__ import annotations

import queue
import threading
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megatron_sod.parallel.cpu import device
from megatron_sod.train.checkpoint_files import FileSums, checksum

_NUM_FILES_PER_RANK = 1


class SnapshotStrategy(TorchDistSaveShardedStrategy):
    """Plans as Megatron does; the request it returns holds copies and writes them in-process."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1, thread_count=_NUM_FILES_PER_RANK)

    def _get_save_and_finalize_callbacks(self, writer, save_state_dict_ret) -> AsyncRequest:
        # prepare_write_data has just taken the results queue from this module-wide name.
        request = super()._get_save_and_finalize_callbacks(writer, save_state_dict_ret)
        if request.async_fn is None:
            return request
        buckets = _snapshot(writer.write_buckets)
        transforms = [writer.transforms] if hasattr(writer, "transforms") else []
        write = partial(_write_buckets, transforms, buckets, writer.results_queue)
        return request._replace(async_fn=write, async_fn_args=(), preload_fn=None)


def use_in_process_queue() -> None:
    """Megatron would start a manager process for the results of its writer processes."""
    filesystem_async._results_queue = queue.Queue()


def _snapshot(buckets: list) -> list:
    """Host copies that share nothing with the live tensors."""
    staged = FileSystemWriterAsync.preload_tensors(buckets, non_blocking=torch.cuda.is_available())
    copies = []
    for (path, key, (data, sources)), (_, _, (_, tensors)) in zip(buckets, staged, strict=True):
        pairs = zip(sources, tensors, strict=True)
        # .to("cpu") gives a CPU tensor back as it is.
        own = [(item, t.clone() if s.device.type == "cpu" else t) for (item, s), (_, t) in pairs]
        copies.append((path, key, (data, own)))
    return copies


def _write_buckets(transforms: list, buckets: list, results: queue.Queue) -> FileSums:
    """Write each file; its results, or the error, go where Megatron's finalisation looks."""
    written: dict[int, Any] = {}
    sums: FileSums = {}
    for number, bucket in enumerate(buckets):
        local: queue.Queue = queue.Queue()
        pending: queue.Queue = queue.Queue()
        pending.put(number)
        FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, local, pending, True)
        _, outcome = local.get()
        if isinstance(outcome, Exception):
            results.put(outcome)
            return {}
        written[number] = outcome
        path = Path(bucket[0])
        sums[path.name] = checksum(path)
    results.put(written)
    return sums


class PendingSave:
    """One save under way: the writing thread and what has to follow on all ranks."""

    def __init__(self, request: AsyncRequest):
        self._request = request
        self._sums: FileSums = {}
        self._thread = threading.Thread(target=self._run, name="checkpoint-writer", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        if self._request.async_fn is not None:
            self._sums = self._request.async_fn() or {}

    def is_done_everywhere(self) -> bool:
        """A collective."""
        alive = torch.tensor([int(self._thread.is_alive())], device=device())
        dist.all_reduce(alive)
        return not int(alive)

    def wait(self) -> None:
        """Until this rank's file is written."""
        self._thread.join()

    def finish(self) -> FileSums:
        """Megatron's own finalisation, then the sums of all ranks' files. A collective.

        Raises:
            CheckpointException (torch's): a rank could not write; on every rank.
        """
        for step in self._request.finalize_fns:
            step()
        gathered: list[FileSums] = [{}] * dist.get_world_size()
        dist.all_gather_object(gathered, self._sums)
        return {name: entry for sums in gathered for name, entry in sums.items()}
