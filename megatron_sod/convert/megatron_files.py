"""Megatron's distributed checkpoints read by one process, a parameter at a time.

The format is torch.distributed.checkpoint's, as megatron.core.dist_checkpointing 0.16 uses it
(`torch_dist`); neither Megatron nor a process group is needed here. Its index is a pickle: open
checkpoints you trust.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_sod.convert.layout import hf_shapes, segments_of
from megatron_sod.convert.megatron_names import (
    Stored,
    is_vocabulary,
    parameters,
    stored_at,
    whole_shape,
)
from megatron_sod.errors import CheckpointError
from megatron_sod.model.geometry import Geometry

_CONFIG = "metadata.json"
_OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\.")  # chained: experts have one of their own


def is_megatron_checkpoint(directory: str | Path) -> bool:
    """Whether the directory holds a distributed checkpoint (and not HF weights)."""
    return (Path(directory) / _CONFIG).is_file() and (Path(directory) / ".metadata").is_file()


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

    def parameter(self, name: str, geometry: Geometry) -> torch.Tensor:
        """The whole parameter `name` (global layer and expert numbers), without padded rows."""
        stored, shape = self._find(name, geometry), _shape(name, geometry)
        metadata = self._metadata(stored)
        whole = torch.empty((1,) * len(stored.stack) + shape, dtype=metadata.properties.dtype)
        offsets = stored.index + (0,) * len(shape)
        wanted = ChunkStorageMetadata(torch.Size(offsets), torch.Size(whole.shape))
        here = TensorStorageMetadata(metadata.properties, metadata.size, self._chunks_of(stored))
        items = create_read_items_for_chunk_list(stored.key, here, [wanted])
        if sum(torch.Size(item.lengths).numel() for item in items) != whole.numel():
            raise CheckpointError(
                f"{self.directory}: {stored.key} {list(stored.index)} is stored incompletely; "
                "the checkpoint was not written to its end"
            )
        self._reader.read_data(LoadPlan(items), _IntoOneTensor(whole))
        return whole.reshape(shape)

    def hf_tensors(self, geometry: Geometry) -> Iterator[tuple[str, torch.Tensor]]:
        """Every HF tensor of the model, one Megatron parameter in memory at a time."""
        for name in parameters(geometry):
            yield from _to_hf(name, geometry, self.parameter(name, geometry))

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


class MegatronSource:
    """A distributed checkpoint with the interface of HfTensors, for loading a model from it.

    Slices of one Megatron parameter are best asked for one after the other: it is read whole and
    kept until a slice of another is asked for.
    """

    def __init__(self, directory: str | Path, geometry: Geometry):
        self._tensors, self._geometry = MegatronTensors(directory), geometry
        self._tensors.dtypes(geometry)  # that it holds this model
        self._owner = {
            segment.hf_name: name
            for name in parameters(geometry)
            for segment in segments_of(name, geometry)
        }
        self._kept: tuple[str, dict[str, torch.Tensor]] = ("", {})

    def shape(self, name: str) -> tuple[int, ...]:
        return hf_shapes(self._geometry)[name]

    def read(self, name: str, dim: int, start: int, length: int) -> torch.Tensor:
        """Indices [start, start + length) along `dim` of an HF tensor."""
        owner = self._owner[name]
        if self._kept[0] != owner:
            whole = self._tensors.parameter(owner, self._geometry)
            self._kept = (owner, dict(_to_hf(owner, self._geometry, whole)))
        return self._kept[1][name].narrow(dim, start, length)


class _IntoOneTensor(DefaultLoadPlanner):
    """Puts what is read into the places of one tensor."""

    def __init__(self, target: torch.Tensor):
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        place = self._target
        for dim, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            place = place.narrow(dim, start, length)
        return place

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None: ...


def _to_hf(
    name: str, geometry: Geometry, whole: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor]]:
    """The HF tensors a whole Megatron parameter consists of."""
    parts: dict[str, list] = {}
    for segment in segments_of(name, geometry):
        parts.setdefault(segment.hf_name, []).append(segment)
    for hf_name, segments in parts.items():
        segments.sort(key=lambda segment: segment.hf_start)
        views = [whole.narrow(s.dim, s.local_start, s.length) for s in segments]
        yield hf_name, views[0] if len(views) == 1 else torch.cat(views, segments[0].dim)


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
