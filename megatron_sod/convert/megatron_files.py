"""Megatron's distributed checkpoints read by one process, a box of a parameter at a time.

The format is torch.distributed.checkpoint's, as megatron.core.dist_checkpointing 0.16 uses it
(`torch_dist`); neither Megatron nor a process group is needed here. Its index is a pickle: open
checkpoints you trust.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_sod.convert.layout import Segment, hf_shapes, overlap, segments_of
from megatron_sod.convert.megatron_names import (
    Stored,
    is_vocabulary,
    parameters,
    stored_at,
    whole_shape,
)
from megatron_sod.convert.tensor_source import TensorSource, read_box
from megatron_sod.errors import CheckpointError
from megatron_sod.model.geometry import Geometry

_CONFIG = "metadata.json"
_OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\.")  # chained: experts have one of their own


def is_megatron_checkpoint(directory: str | Path) -> bool:
    """Whether the directory holds a distributed checkpoint (and not HF weights)."""
    return (Path(directory) / _CONFIG).is_file() and (Path(directory) / ".metadata").is_file()


@dataclass(frozen=True)
class _Place:
    """A chunk in row-major order from byte `offset` of its file on."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class MegatronTensors:
    """The model in a distributed checkpoint, of whatever layout, as whole parameters.

    Raises:
        CheckpointError: not such a checkpoint, or a file of it is missing or cut short.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self._reader = FileSystemReader(self.directory)
        metadata = _read_index(self.directory, self._reader)
        self._stored = metadata.state_dict_metadata
        self._chunks: dict[tuple, list[ChunkStorageMetadata]] = {}
        self._places: dict[MetadataIndex, _Place | None] = {}
        _check_files(self.directory, metadata)
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)

    def dtypes(self, geometry: Geometry) -> dict[str, torch.dtype]:
        """What every parameter of the model is stored as.

        Raises:
            CheckpointError: one is not there or has another shape than the geometry says, or
                there is a weight the model does not have.
        """
        found, keys = {}, set()
        for name in parameters(geometry):
            stored = self._find(name, geometry)
            metadata = self._metadata(stored)
            size, shape = tuple(metadata.size), _shape(name, geometry)
            expected = stored.stack + shape
            padded = is_vocabulary(name) and size[0] >= shape[0] and size[1:] == shape[1:]
            if size != expected and not padded:
                raise CheckpointError(
                    f"{self.directory}: {name} is stored with shape {size}, config.json says "
                    f"{expected}; weights and configuration belong to different models"
                )
            found[name] = metadata.properties.dtype
            keys.add(stored.key)
        for key, entry in self._stored.items():
            is_weight = isinstance(entry, TensorStorageMetadata)
            if is_weight and key not in keys and not _OPTIMIZER.match(key):
                raise CheckpointError(
                    f"{self.directory}: it holds {key}, which a {geometry.family} model does not "
                    "have; weights and configuration belong to different models"
                )
        return found

    def fill(
        self, target: torch.Tensor, name: str, geometry: Geometry, start: Sequence[int]
    ) -> None:
        """Read into `target` the box of its size, from `start` on, of the whole parameter `name`
        (global layer and expert numbers)."""
        stored = self._find(name, geometry)
        metadata, target = self._metadata(stored), target[(None,) * len(stored.stack)]
        wanted = ChunkStorageMetadata(torch.Size((*stored.index, *start)), target.shape)
        here = TensorStorageMetadata(metadata.properties, metadata.size, self._chunks_of(stored))
        items = create_read_items_for_chunk_list(stored.key, here, [wanted])
        if sum(torch.Size(item.lengths).numel() for item in items) != target.numel():
            raise CheckpointError(
                f"{self.directory}: {stored.key} {list(stored.index)} is stored incompletely; "
                "the checkpoint was not written to its end"
            )
        for item in items:
            part = _narrow(target, item.dest_offsets, item.lengths)
            self._fill_from_chunk(part, item.storage_index, item.storage_offsets)

    def _fill_from_chunk(
        self, target: torch.Tensor, index: MetadataIndex, start: Sequence[int]
    ) -> None:
        if index not in self._places:
            self._places[index] = self._place(index)
        if place := self._places[index]:
            read_box(target, self._path(index), place.offset, place.shape, place.dtype, start)
        else:
            target.copy_(_narrow(self._load(index, "cpu"), start, target.shape))

    def _place(self, index: MetadataIndex) -> _Place | None:
        """Where the numbers of a chunk lie in its file; None: not in row-major order, or this
        version of PyTorch does not tell."""
        chunk = self._load(index, "meta")
        offset = getattr(chunk.untyped_storage(), "_checkpoint_offset", None)
        if offset is None or not chunk.is_contiguous():
            return None
        offset += self._reader.storage_data[index].offset + chunk.storage_offset() * chunk.itemsize
        return _Place(offset, tuple(chunk.shape), chunk.dtype)

    def _load(self, index: MetadataIndex, device: str) -> torch.Tensor:
        """A whole chunk; on the device "meta" its description alone."""
        stored = self._reader.storage_data[index]
        with self._path(index).open("rb") as file:
            view = cast(IO[bytes], _create_file_view(file, stored.offset, stored.length))
            return torch.load(view, map_location=device, weights_only=True)

    def _path(self, index: MetadataIndex) -> Path:
        return self.directory / self._reader.storage_data[index].relative_path

    def _metadata(self, stored: Stored) -> TensorStorageMetadata:
        return self._stored[stored.key]  # type: ignore[return-value]

    def _find(self, name: str, geometry: Geometry) -> Stored:
        stored = stored_at(name, geometry)
        if isinstance(self._stored.get(stored.key), TensorStorageMetadata):
            return stored
        raise CheckpointError(
            f"{self.directory}: no tensor {stored.key} in it; the checkpoint does not hold the "
            f"{geometry.family} model its config.json describes"
        )

    def _chunks_of(self, stored: Stored) -> list[ChunkStorageMetadata]:
        """The chunks of one layer (and expert): a search over all of them each time would take
        a time quadratic in their number."""
        depth = len(stored.stack)
        if not self._chunks or (stored.key, stored.index) not in self._chunks:
            for chunk in self._metadata(stored).chunks:
                place = (stored.key, tuple(chunk.offsets[:depth]))
                self._chunks.setdefault(place, []).append(chunk)
        return self._chunks.get((stored.key, stored.index), [])


def _shape(name: str, geometry: Geometry) -> tuple[int, ...]:
    """The parameter's whole shape without padded rows."""
    shape = whole_shape(name, geometry)
    return (geometry.vocab_size, *shape[1:]) if is_vocabulary(name) else shape


class MegatronSource(TensorSource):
    """The HF tensors of the model in a distributed checkpoint.

    Raises:
        CheckpointError: it does not hold this model.
    """

    def __init__(self, tensors: MegatronTensors, geometry: Geometry):
        self.directory = tensors.directory
        self._tensors, self._geometry = tensors, geometry
        self._dtypes: dict[str, torch.dtype] = {}
        self._parts: dict[str, list[tuple[str, Segment]]] = {}
        for name, dtype in tensors.dtypes(geometry).items():
            for segment in segments_of(name, geometry):
                self._dtypes[segment.hf_name] = dtype
                self._parts.setdefault(segment.hf_name, []).append((name, segment))

    def shape(self, name: str) -> tuple[int, ...]:
        return hf_shapes(self._geometry)[name]

    def dtype(self, name: str) -> torch.dtype:
        return self._dtypes[name]

    def fill(self, target: torch.Tensor, name: str, start: Sequence[int]) -> None:
        for owner, s in self._parts[name]:
            if part := overlap(s.dim, s.hf_start, s.local_start, s.length, start, target.shape):
                at, there, length = part
                box = target.narrow(s.dim, at, length)
                self._tensors.fill(box, owner, self._geometry, there)


def _narrow(tensor: torch.Tensor, start: Sequence[int], size: Sequence[int]) -> torch.Tensor:
    for dim, (first, length) in enumerate(zip(start, size, strict=True)):
        tensor = tensor.narrow(dim, first, length)
    return tensor


def _read_index(directory: Path, reader: FileSystemReader) -> Metadata:
    remedy = (
        "give a directory written by tools/convert_hf_to_megatron.py, or an iter_* folder of a "
        "run's checkpoints/"
    )
    if not is_megatron_checkpoint(directory):
        raise CheckpointError(
            f"{directory} is not a Megatron distributed checkpoint ({_CONFIG} and .metadata are "
            f"not both there); {remedy}"
        )
    try:
        found = json.loads((directory / _CONFIG).read_text())
        backend = found.get("sharded_backend")
        metadata = reader.read_metadata()
    except (ValueError, AttributeError, EOFError, ImportError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{directory}: its index cannot be read ({error}); {remedy}") from (
            error
        )
    if backend != "torch_dist":
        raise CheckpointError(
            f"{directory}: written with the backend {backend!r}, torch_dist is read; {remedy}"
        )
    return metadata


def _check_files(directory: Path, metadata: Metadata) -> None:
    ends: dict[str, int] = {}
    for place in metadata.storage_data.values():
        name = place.relative_path
        ends[name] = max(ends.get(name, 0), place.offset + place.length)
    for name, end in sorted(ends.items()):
        path = directory / name
        if not path.is_file():
            raise CheckpointError(
                f"{directory}: {name} is missing, one of {len(ends)} files; copy it again"
            )
        if path.stat().st_size < end:
            raise CheckpointError(
                f"{path}: {path.stat().st_size} bytes, the index needs {end}; the file is cut "
                "short, copy it again"
            )
