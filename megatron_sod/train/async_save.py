"""Writes a checkpoint in a thread of each rank, from a snapshot, and completes it there too.

Megatron 0.16 plans the save. Its own writers are not used: they fork from the rank, their manager
process outlives a killed rank, the persistent one divides by the number of GPUs, on CPU the
"staged" tensors are the live parameters, and the last step needs the main thread of every rank,
which may be an hour into a rollout. Here tensors are copied first, a thread writes them, and the
threads agree over a gloo group of their own; whatever ends a rank ends its writing.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megatron_sod.train.checkpoint_files import FileSums, checksum

THREAD_NAME = "checkpoint-writer"
_BACKEND, _BACKEND_VERSION, _NUM_FILES_PER_RANK = "torch_dist", 1, 1


@dataclass(frozen=True)
class _Job:
    """One rank's share of a planned save."""

    writer: FileSystemWriterAsync
    metadata: Any  # torch's Metadata, on rank 0
    buckets: list  # (path, file name, (bytes items, tensor items)), tensors copied to the host

    def write(self) -> tuple[list, FileSums]:
        """Write this rank's files; what torch's metadata needs of them, and their sums."""
        transforms = [self.writer.transforms] if hasattr(self.writer, "transforms") else []
        results, sums = [], FileSums()
        for number, bucket in enumerate(self.buckets):
            outcomes: queue.Queue = queue.Queue()
            pending: queue.Queue = queue.Queue()
            pending.put(number)
            FileSystemWriterAsync.write_preloaded_data(
                transforms, number, bucket, outcomes, pending, True
            )
            _, outcome = outcomes.get()
            if isinstance(outcome, Exception):
                raise outcome
            results += outcome
            path = Path(bucket[0])
            sums[path.name] = checksum(path)
        return results, sums

    def complete(self, results: list[list], folder: Path) -> None:
        """On rank 0, once every rank has written."""
        self.writer.finish(self.metadata, results)
        save_config(CheckpointingConfig(_BACKEND, _BACKEND_VERSION), str(folder))


class _Planner(TorchDistSaveShardedStrategy):
    """Plans as Megatron does, and keeps the plan with copies of the tensors."""

    job: _Job

    def __init__(self) -> None:
        super().__init__(_BACKEND, _BACKEND_VERSION, thread_count=_NUM_FILES_PER_RANK)

    def _get_save_and_finalize_callbacks(self, writer, save_state_dict_ret) -> AsyncRequest:
        self.job = _Job(writer, save_state_dict_ret[1], _snapshot(writer.write_buckets))
        return AsyncRequest(None, (), [])


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


def _root(error: BaseException) -> BaseException:
    """The operating system's word for it; torch's zip writer hides it behind its own."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__cause__ or found.__context__
    return found or error


class SaveUnderWay:
    """A checkpoint being written to `folder`. Constructed by all ranks."""

    def __init__(
        self,
        sharded_state: dict[str, Any],
        folder: Path,
        group: dist.ProcessGroup,
        publish: Callable[[FileSums], None],
    ):
        """Plan and copy (a collective of the default group), then write in the background.

        Args:
            group: gloo, all ranks, used by nothing else.
            publish: called on rank 0, in the thread, once every file is there.
        """
        # Megatron would start a manager process for the results of its writer processes.
        filesystem_async._results_queue = queue.Queue()
        planner = _Planner()
        dist_checkpointing.save(
            sharded_state, str(folder), sharded_strategy=planner, async_sharded_save=True
        )
        self._job, self._folder, self._group, self._publish = planner.job, folder, group, publish
        self.problem: str | None = None  # why there is no checkpoint; the same on every rank
        self._thread = threading.Thread(target=self._run, name=THREAD_NAME, daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        return not self._thread.is_alive()

    def wait(self, timeout_s: float | None = None) -> None:
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            self.problem = self._write_and_publish()
        except Exception as error:  # a peer is gone; the main threads find out on their own
            self.problem = f"{type(error).__name__}: {error}"
        del self._job  # the copies

    def _write_and_publish(self) -> str | None:
        rank, world = dist.get_rank(), dist.get_world_size()
        mine: tuple[list, FileSums, str | None]
        try:
            mine = (*self._job.write(), None)
        except Exception as error:
            mine = [], {}, f"rank {rank}: {_root(error)}"
        shares: list[Any] = [None] * world
        dist.all_gather_object(shares, mine, group=self._group)
        problems = [problem for _, _, problem in shares if problem]
        outcome = ["; ".join(problems) or None]
        if rank == 0 and not problems:
            try:
                self._job.complete([results for results, _, _ in shares], self._folder)
                self._publish({name: s for _, sums, _ in shares for name, s in sums.items()})
            except Exception as error:
                outcome = [f"rank 0: {_root(error)}"]
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        return outcome[0]
