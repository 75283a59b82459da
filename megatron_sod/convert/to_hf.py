"""Megatron distributed checkpoint -> Hugging Face directory, block by block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from megatron_sod.convert.hf_files import MAX_SHARD_BYTES, HfTensors, write_hf_directory
from megatron_sod.convert.layout import hf_shapes
from megatron_sod.convert.megatron_files import MegatronSource, MegatronTensors
from megatron_sod.convert.output import new_directory
from megatron_sod.convert.parity import Report, compare, state_dtype
from megatron_sod.convert.tensor_source import row_blocks
from megatron_sod.errors import CheckpointError
from megatron_sod.model.geometry import load_geometry


def convert_megatron_to_hf(
    checkpoint: str | Path,
    out: str | Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Write `out`, which transformers loads, from nothing but a checkpoint directory.

    The directory is one that `convert_hf_to_megatron` wrote, or an iter_* folder of a training
    run; config, tokenizer, generation config and chat template are in it.

    Raises:
        SodError: the checkpoint is incomplete or foreign, or `out` cannot be written; nothing is
            left behind.
    """
    stored = MegatronTensors(checkpoint)
    if not (Path(checkpoint) / "config.json").is_file():
        raise CheckpointError(
            f"{checkpoint}: no config.json in it, so another program wrote it; copy config.json "
            "and the tokenizer files of the model it was trained from into it"
        )
    geometry = load_geometry(checkpoint)
    source = MegatronSource(stored, geometry)
    contents = {name: (source.dtype(name), shape) for name, shape in hf_shapes(geometry).items()}
    num_bytes = sum(math.prod(shape) * dtype.itemsize for dtype, shape in contents.values())
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        on_progress(min(done, 2 * num_bytes), 2 * num_bytes)

    def blocks() -> Iterator[tuple[str, torch.Tensor]]:
        for name, (_, shape) in contents.items():
            for rows in row_blocks(shape):
                yield name, source.rows(name, *rows)
                advance(rows[1] * math.prod(shape[1:]) * source.dtype(name).itemsize)

    with new_directory(out, num_bytes) as folder:
        write_hf_directory(folder, contents, blocks(), checkpoint, max_shard_bytes=max_shard_bytes)
        state_dtype(folder, {dtype for dtype, _ in contents.values()})
        report = compare(source, HfTensors(folder), geometry, advance=advance)
        report.describe("Megatron to Hugging Face", checkpoint, out, [])
        report.write(folder)
    on_progress(2 * num_bytes, 2 * num_bytes)
    return report
