"""Megatron's distributed checkpoints written by one process, a chunk at a time.

The format is that of megatron_files.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.default_planner import (
    DefaultSavePlanner,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class ChunkToWrite:
    """A box of one stored tensor, and how to come by its numbers when its turn comes."""

    key: str
    whole_size: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype
    produce: Callable[[], torch.Tensor]

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.sizes).numel() * self.dtype.itemsize

    def item(self) -> WriteItem:
        data = TensorWriteData(
            chunk=ChunkStorageMetadata(torch.Size(self.offsets), torch.Size(self.sizes)),
            properties=TensorProperties(dtype=self.dtype),
            size=torch.Size(self.whole_size),
        )
        return WriteItem(
            MetadataIndex(self.key, self.offsets), WriteItemType.SHARD, tensor_data=data
        )


class _OnDemand(DefaultSavePlanner):
    """Makes each chunk when the writer asks for it."""

    def __init__(self, chunks: list[ChunkToWrite], written: Callable[[int], None]):
        super().__init__()
        self._chunks = {chunk.item().index: chunk for chunk in chunks}
        self._written = written

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        chunk = self._chunks[write_item.index]
        self._written(chunk.num_bytes)
        return chunk.produce().reshape(chunk.sizes)


def write_megatron_checkpoint(
    directory: Path, files: Iterable[list[ChunkToWrite]], written: Callable[[int], None]
) -> None:
    """Write a distributed checkpoint, one file per list of chunks.

    In memory at a time: one chunk, and until a file is complete the last chunk of every key in it,
    to which PyTorch's writer holds on. `written` is told the number of bytes of each chunk as it is
    made.
    """
    writer = FileSystemWriter(directory, per_thread_copy_ahead=0)  # >0: GPU hosts make them ahead
    plans, results = [], []
    for number, chunks in enumerate(files):
        plan = writer.prepare_local_plan(SavePlan([chunk.item() for chunk in chunks]))
        [plan] = writer.prepare_global_plan([plan])
        plan.storage_data.prefix = f"__{number}_"
        results.append(writer.write_data(plan, _OnDemand(chunks, written)).wait())
        plans.append(plan)
    _, metadata = create_default_global_save_plan(plans)
    writer.finish(metadata, results)
    torch.save({}, directory / "common.pt")
    (directory / "metadata.json").write_text(json.dumps(_FORMAT))
