"""Reading a model's Hugging Face tensors in boxes of bounded size, wherever they are stored.

A box is [start, start + size) of a tensor, one number per dimension. Only its bytes are read, with
plain reads: pages of a mapped file would count as memory of this process.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from megatron_sod.convert.layout import Segment, overlap
from megatron_sod.errors import CheckpointError

BLOCK_NUMEL = 2**23  # 16 MiB in bfloat16, 32 MiB in float32


class TensorSource(ABC):
    """The HF tensors of a model directory of either kind."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]: ...

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype: ...

    @abstractmethod
    def box(self, name: str, start: Sequence[int], size: Sequence[int]) -> torch.Tensor:
        """A fresh tensor of shape `size`; no more of the directory is read."""

    def rows(self, name: str, first: int, length: int) -> torch.Tensor:
        shape = self.shape(name)
        return self.box(name, (first,) + (0,) * (len(shape) - 1), (length, *shape[1:]))


def row_blocks(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first row, rows) that cover a tensor in blocks of at most BLOCK_NUMEL elements, or a row."""
    step = max(1, BLOCK_NUMEL // math.prod(shape[1:]))
    for first in range(0, shape[0], step):
        yield first, min(step, shape[0] - first)


def fill_box(
    target: torch.Tensor, start: Sequence[int], segments: Iterable[Segment], source: TensorSource
) -> None:
    """Fill `target`, the box of a local parameter from `start` on; zero where no segment lies."""
    target.zero_()
    for s in segments:
        part = overlap(s.dim, s.local_start, s.hf_start, s.length, start, target.shape)
        if part:
            at, there, size = part
            values = source.box(s.hf_name, there, size)
            target.narrow(s.dim, at, size[s.dim]).copy_(values)


def read_box(
    path: Path,
    offset: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    start: Sequence[int],
    size: Sequence[int],
) -> torch.Tensor:
    """A box of the tensor that lies in row-major order at byte `offset` of a file.

    Of more than two dimensions, the leading ones have size 1 in the box.

    Raises:
        CheckpointError: the file ends before the box does.
    """
    assert all(extent == 1 for extent in size[:-2]), f"box {list(size)} is not a matrix"
    row, columns, num_rows = 0, shape[-1], math.prod(size[:-1])
    for extent, index in zip(shape[:-1], start[:-1], strict=True):
        row = row * extent + index
    with path.open("rb") as file:
        if num_rows == 1 or size[-1] == columns:
            file.seek(offset + (row * columns + start[-1]) * dtype.itemsize)
            return _next(file, tuple(size), dtype)
        box = torch.empty(num_rows, size[-1], dtype=dtype)
        file.seek(offset + row * columns * dtype.itemsize)
        for first, length in row_blocks((num_rows, columns)):
            block = _next(file, (length, columns), dtype)
            box[first : first + length] = block.narrow(1, start[-1], size[-1])
    return box.reshape(tuple(size))


def _next(file, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The tensor that begins where the file stands."""
    tensor = torch.empty(shape, dtype=dtype)
    if (found := file.readinto(tensor.view(torch.uint8).numpy())) != tensor.nbytes:
        raise CheckpointError(
            f"{file.name}: it ends {tensor.nbytes - found} bytes early; it was changed while it "
            "was read, try again"
        )
    return tensor
