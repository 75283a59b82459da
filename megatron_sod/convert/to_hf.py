"""Megatron distributed checkpoint -> Hugging Face directory, parameter by parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from megatron_sod.convert.hf_files import MAX_SHARD_BYTES, HfTensors, write_hf_directory
from megatron_sod.convert.megatron_files import MegatronTensors
from megatron_sod.convert.megatron_names import whole_shape
from megatron_sod.convert.output import new_directory
from megatron_sod.convert.parity import Report, compare, state_dtype
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
    source = MegatronTensors(checkpoint)
    if not (Path(checkpoint) / "config.json").is_file():
        raise CheckpointError(
            f"{checkpoint}: no config.json in it, so another program wrote it; copy config.json "
            "and the tokenizer files of the model it was trained from into it"
        )
    geometry = load_geometry(checkpoint)
    dtypes = source.dtypes(geometry)
    num_bytes = sum(
        torch.Size(whole_shape(name, geometry)).numel() * dtype.itemsize
        for name, dtype in dtypes.items()
    )
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        on_progress(min(done, 2 * num_bytes), 2 * num_bytes)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in source.hf_tensors(geometry):
            advance(tensor.nbytes)
            yield name, tensor

    with new_directory(out, num_bytes) as folder:
        write_hf_directory(folder, tensors(), checkpoint, max_shard_bytes=max_shard_bytes)
        state_dtype(folder, set(dtypes.values()))
        report = compare(checkpoint, HfTensors(folder), geometry, advance=advance)
        report.describe("Megatron to Hugging Face", checkpoint, out, [])
        report.write(folder)
    on_progress(2 * num_bytes, 2 * num_bytes)
    return report
