"""Hugging Face directory -> Megatron distributed checkpoint, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from megatron_sod.config.schema import ParallelConfig
from megatron_sod.convert.hf_files import MAX_SHARD_BYTES, HfTensors, copy_side_files
from megatron_sod.convert.layout import Segment, hf_shapes, segments_of
from megatron_sod.convert.megatron_files import MegatronSource, MegatronTensors
from megatron_sod.convert.megatron_names import (
    num_parts,
    parameters,
    split_dim,
    stored_at,
    whole_shape,
)
from megatron_sod.convert.megatron_writer import ChunkToWrite, write_megatron_checkpoint
from megatron_sod.convert.output import new_directory
from megatron_sod.convert.parity import Report, compare, state_dtype
from megatron_sod.convert.tensor_source import fill_local, row_blocks
from megatron_sod.errors import ConfigError, ModelError
from megatron_sod.model.geometry import Geometry, layout_problems, load_geometry

TIED_HEAD = "lm_head.weight"


def convert_hf_to_megatron(
    hf: str | Path,
    out: str | Path,
    *,
    parallel: ParallelConfig | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Write `out`, a checkpoint that Megatron loads at any layout, and compare it with `hf`.

    Args:
        parallel: one file (of at most `max_shard_bytes`) holds what one rank of this layout
            reads, so that loading at it is quickest; None: one rank.
        dtype: what to store; None: what the source stores.
        on_progress: called with (bytes done, bytes in all), writing and comparing together.
    Raises:
        SodError: the source is incomplete or not supported, the layout does not divide the model,
            or `out` cannot be written; nothing is left behind.
    """
    geometry, parallel = load_geometry(hf), parallel or ParallelConfig()
    if problems := layout_problems(geometry, parallel):
        raise ConfigError("\n".join(problems))
    source = HfTensors(hf)
    left_out = check_tensors(source, geometry)
    files = list(_files(source, geometry, parallel, dtype, max_shard_bytes))
    num_bytes = sum(chunk.num_bytes for chunks in files for chunk in chunks)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        on_progress(min(done, 2 * num_bytes), 2 * num_bytes)

    with new_directory(out, num_bytes) as folder:
        copy_side_files(hf, folder)
        write_megatron_checkpoint(folder, files, advance)
        state_dtype(folder, {chunk.dtype for chunks in files for chunk in chunks})
        written = MegatronSource(MegatronTensors(folder), geometry)
        report = compare(written, source, geometry, dtype=dtype, advance=advance)
        report.describe("Hugging Face to Megatron", hf, out, left_out)
        report.write(folder)
    on_progress(2 * num_bytes, 2 * num_bytes)
    return report


def check_tensors(source: HfTensors, geometry: Geometry) -> list[str]:
    """That the directory holds the model's tensors, all and no others.

    Returns the names that are left out because they repeat another: a tied head stored again.

    Raises:
        ModelError: a tensor is missing, has another shape, is unknown, or a head that should be
            tied differs from the embedding.
    """
    shapes = hf_shapes(geometry)
    for name, shape in shapes.items():
        if (found := source.shape(name)) != shape:
            raise ModelError(
                f"{source.directory}: tensor {name} has shape {found}, config.json says {shape}; "
                "weights and configuration belong to different models"
            )
    unknown = [name for name in source.names() if name not in shapes]
    if geometry.tied_embeddings and TIED_HEAD in unknown:
        if not _equal(source, TIED_HEAD, "model.embed_tokens.weight"):
            raise ModelError(
                f"{source.directory}: config.json ties the output head to the embedding, and "
                f"{TIED_HEAD} holds other numbers; set tie_word_embeddings to false"
            )
        unknown.remove(TIED_HEAD)
        return [TIED_HEAD]
    if unknown:
        raise ModelError(
            f"{source.directory}: {len(unknown)} tensors a {geometry.family} model does not have "
            f"({', '.join(unknown[:3])}, ...); the result would compute something else"
        )
    return []


def _equal(source: HfTensors, name: str, other: str) -> bool:
    return source.shape(name) == source.shape(other) and all(
        torch.equal(source.rows(name, *block), source.rows(other, *block))
        for block in row_blocks(source.shape(name))
    )


def _files(
    source: HfTensors,
    geometry: Geometry,
    parallel: ParallelConfig,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
) -> Iterator[list[ChunkToWrite]]:
    """The chunks of each file: by pipeline stage, expert rank and tensor rank, then by size."""
    ranks: dict[tuple[int, int, int], list[ChunkToWrite]] = {}
    dtypes: dict[str, torch.dtype] = {}
    for name in parameters(geometry):
        stored = _dtype_of(name, source, geometry, dtype)
        key = stored_at(name, geometry).key
        if dtypes.setdefault(key, stored) != stored:
            raise _mixed(source, name, {dtypes[key], stored})
        stage, expert_rank = _place(name, geometry, parallel)
        for tp_rank in range(parallel.tensor_model_parallel_size):
            chunks = _chunks(name, source, geometry, parallel, tp_rank, stored)
            ranks.setdefault((stage, expert_rank, tp_rank), []).extend(chunks)
    for _, held in sorted(ranks.items()):
        file: list[ChunkToWrite] = []
        room = max_shard_bytes
        for chunk in held:
            if file and chunk.num_bytes > room:
                yield file
                file, room = [], max_shard_bytes
            file.append(chunk)
            room -= chunk.num_bytes
        yield file


def _dtype_of(
    name: str, source: HfTensors, geometry: Geometry, dtype: torch.dtype | None
) -> torch.dtype:
    found = {source.dtype(segment.hf_name) for segment in segments_of(name, geometry)}
    if dtype is None and len(found) > 1:
        raise _mixed(source, name, found)
    return dtype or found.pop()


def _mixed(source: HfTensors, name: str, found: set[torch.dtype]) -> ModelError:
    return ModelError(
        f"{source.directory}: {name} and what Megatron stores with it have different dtypes "
        f"({', '.join(sorted(map(str, found)))}); choose one with --dtype"
    )


def _place(name: str, geometry: Geometry, parallel: ParallelConfig) -> tuple[int, int]:
    """(pipeline stage, expert rank) that reads the parameter at this layout."""
    stages, index = parallel.pipeline_model_parallel_size, stored_at(name, geometry).index
    if not index:
        return (0 if name.startswith("embedding.") else stages - 1), 0
    stage = index[0] * stages // geometry.num_layers
    if len(index) < 2:
        return stage, 0
    return stage, index[1] * parallel.expert_model_parallel_size // geometry.num_experts


def _chunks(
    name: str,
    source: HfTensors,
    geometry: Geometry,
    parallel: ParallelConfig,
    tp_rank: int,
    dtype: torch.dtype,
) -> Iterator[ChunkToWrite]:
    """What one tensor-parallel rank holds of a parameter, in blocks of rows: of one box, or of gate
    and up."""
    tp_size, dim = parallel.tensor_model_parallel_size, split_dim(name)
    if dim is None and tp_rank > 0:
        return
    place = stored_at(name, geometry)
    whole = whole_shape(name, geometry, tp_size=tp_size)
    split = {} if dim is None else {"tp_rank": tp_rank, "tp_size": tp_size}
    segments = segments_of(name, geometry, **split)
    for part in range(num_parts(name)):
        size, offset = list(whole), [0] * len(whole)
        if dim is not None:
            size[dim] //= tp_size * num_parts(name)
            offset[dim] = (part * tp_size + tp_rank) * size[dim]
        for first, length in row_blocks(size):
            box = (length, *size[1:])
            start = (part * size[0] + first,) + (0,) * (len(size) - 1)
            yield ChunkToWrite(
                key=place.key,
                whole_size=place.stack + whole,
                offsets=(*place.index, offset[0] + first, *offset[1:]),
                sizes=(1,) * len(place.stack) + box,
                dtype=dtype,
                produce=partial(_assemble, source, segments, start, box, dtype),
            )


def _assemble(
    source: HfTensors,
    segments: list[Segment],
    start: tuple[int, ...],
    size: tuple[int, ...],
    dtype: torch.dtype,
) -> torch.Tensor:
    """The numbers of one chunk; padded vocabulary rows are zero."""
    chunk = torch.empty(size, dtype=dtype)
    fill_local(chunk, start, segments, source)
    return chunk
